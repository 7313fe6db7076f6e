"""Operations for which the host would wait for a GPU, recorded on a processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READING = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "_unique2"}  # lift_fresh: torch.tensor(...)


class Waits(TorchDispatchMode):
    """Records the operations that need a value of the device, or that send one to it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = operation.overloadpacket.__name__
        places = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(isinstance(place, Tensor) and place.dtype == torch.bool for place in places)
        if name in READING or by_mask:
            self.found.append(name)
        return operation(*args, **(kwargs or {}))
