"""Number of parameters, ours and NeMo's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from omegaconf import DictConfig

from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel

NEMO_VERSION = "3.0.0"


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters by name, each as (trainable, frozen), and their sums."""

    modules: dict[str, tuple[int, int]]

    @property
    def trainable(self) -> int:
        return sum(trainable for trainable, _ in self.modules.values())

    @property
    def frozen(self) -> int:
        return sum(frozen for _, frozen in self.modules.values())

    @property
    def total(self) -> int:
        return self.trainable + self.frozen

    def to_depth(self, depth: int) -> dict[str, tuple[int, int]]:
        """Sum the counts by the first `depth` parts of the parameters' names."""
        summed: dict[str, tuple[int, int]] = {}
        for name, (trainable, frozen) in self.modules.items():
            short = ".".join(name.split(".")[:depth])
            before = summed.get(short, (0, 0))
            summed[short] = (before[0] + trainable, before[1] + frozen)
        return summed


def skeleton(config: DictConfig) -> NestModel:
    """Build the model without memory for its weights. Raises ConfigError."""
    with torch.device("meta"):
        return NestModel(NestConfig.from_config(config))


def count_parameters(config: DictConfig) -> ParameterCount:
    """Count the model's parameters. Raises ConfigError."""
    model = skeleton(config)
    return ParameterCount(
        {
            name: (parameter.numel(), 0) if parameter.requires_grad else (0, parameter.numel())
            for name, parameter in model.named_parameters()
        }
    )


def nemo_count(config: DictConfig) -> int | None:
    """Return NeMo 3.0.0's number of parameters, computed from sizes; None for kinds of models not recorded from NeMo.

    Per layer (4f + 8) d² + (k + 14) d, with biases (2f + 10) d more, for width d, feed-forward factor f and kernel
    k; then the sub-sampling, the decoder, the frozen quantizer and the mask. Checked against every preset as NeMo
    builds it (tests/golden/structure.json).
    """
    nest = NestConfig.from_config(config)
    encoder, quantizer = nest.encoder, nest.quantizer
    if encoder.conv_norm_type != "batch_norm" or not encoder.untie_biases or encoder.feat_out > 0:
        return None
    sizes: Counter[str] = Counter()
    d, f, k = encoder.d_model, encoder.ff_expansion_factor, encoder.conv_kernel_size
    sizes["layers"] = encoder.n_layers * ((4 * f + 8) * d * d + (k + 14) * d + encoder.use_bias * (2 * f + 10) * d)
    c = encoder.subsampling_channels
    stages = encoder.subsampling_factor.bit_length() - 1
    bins = -(-encoder.feat_in // encoder.subsampling_factor)
    sizes["subsampling"] = 10 * c + (stages - 1) * (c * c + 11 * c) + (c * bins + 1) * d
    sizes["decoder"] = nest.decoder.num_classes * nest.decoder.num_decoders * (d + nest.decoder.use_bias)
    stack = quantizer.feat_in * quantizer.combine_time_steps
    sizes["quantizer"] = quantizer.num_books * quantizer.code_dim * (stack + quantizer.num_classes)
    sizes["mask"] = nest.masking.feat_in
    return sum(sizes.values())
