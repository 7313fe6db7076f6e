"""The private names of PyTorch that the model uses, as they are in torch 2.13.0; no other file here uses any.

Open this file when a new PyTorch breaks the model. tests/model/test_torch_private.py lists the names that no longer
exist.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

SEEN_IN = "2.13.0"
NAMES = {
    "torch._functorch.config.activation_memory_budget": "how much compiled layers keep for the backward pass",
    "torch._functorch.config.patch": "sets it for one forward pass",
    "torch._dynamo.maybe_mark_dynamic": "one compilation for batches of every size",
    "torch._foreach_norm": "norms of all gradients in one launch on a GPU",
    "torch.nn.Module._apply": "the preprocessor stays in fp32 in a model in bf16",
    "torch.ops.aten.convolution_backward": "the sub-sampling's own backward pass",
    "torch.ops.aten.threshold_backward": "the same",
}


def activation_memory_budget(share: float) -> AbstractContextManager[Any]:
    """Have layers that are compiled inside this context keep a share of their activations for the backward pass."""
    from torch._functorch import config

    return config.patch(activation_memory_budget=share)


def mark_dynamic(tensor: Tensor, axis: int) -> None:
    """Tell the compiler that the size of an axis differs from call to call."""
    torch._dynamo.maybe_mark_dynamic(tensor, axis)


def norms_in_fp32(tensors: list[Tensor]) -> list[Tensor]:
    """Return the Euclidean norm of each tensor, computed in fp32."""
    return list(torch._foreach_norm(tensors, 2.0, torch.float32))


def convolution_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return a convolution's gradients of its input, weight and bias; arguments as of the ATen operator."""
    return torch.ops.aten.convolution_backward(*arguments)


def relu_backward_(grad: Tensor, result: Tensor) -> None:
    """Zero a gradient in place where a ReLU gave zero."""
    torch.ops.aten.threshold_backward(grad, result, 0, grad_input=grad)


class FullPrecisionBuffers(nn.Module):
    """A module whose own buffers keep their type where a model moves to a shorter one (`model.to(torch.bfloat16)`)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FullPrecisionBuffers:
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype.itemsize < before.dtype.itemsize:
                setattr(self, name, before.to(after.device))
        return self
