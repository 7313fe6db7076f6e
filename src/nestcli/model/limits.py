"""A model that is larger than the machine: refused before it takes the memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nestcli.errors import ConfigError

if TYPE_CHECKING:
    from nestcli.model.nest import NestConfig


def check_memory(nest: NestConfig) -> None:
    """Raise ConfigError for a model whose weights alone are larger than this machine's memory."""
    encoder, quantizer = nest.encoder, nest.quantizer
    layers = encoder.n_layers * (4 * encoder.ff_expansion_factor + 8) * encoder.d_model**2
    stacked = quantizer.code_dim + encoder.d_model  # of a class: in the codebook and in the decoder
    needed = 4 * (layers + quantizer.num_books * quantizer.num_classes * stacked)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ConfigError(
            f"the model's weights need {needed / 2**30:,.0f} GiB, and this machine has {memory / 2**30:,.0f}. "
            "Lower model.encoder.d_model, model.encoder.n_layers or model.quantizer.num_classes."
        )
