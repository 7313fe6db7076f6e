"""The comparison can fail: faults planted one at a time, each caught first in the section where it sits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nestcli.config import leaves, load_config
from nestcli.data import mixing
from nestcli.model import (
    attention,
    conformer,
    fast,
    features,
    loss,
    masking,
    nest,
    optim,
    quantizer,
)
from nestcli.parity import archive, structure
from nestcli.parity.compare import Request, compare
from nestcli.parity.nemo import RecordedNemo
from nestcli.parity.report import SECTIONS, Report

Plant = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, tuple[str, str, Plant]] = {}


def fault(section: str, check: str) -> Callable[[Plant], Plant]:
    """Register a fault with the section in which it must be caught first, and what its check is called."""

    def register(plant: Plant) -> Plant:
        FAULTS[plant.__name__] = (section, check, plant)
        return plant

    return register


def around(patch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a function by `change(original, *arguments)`."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *arguments, **options: change(original, *arguments, **options))


# ---- configuration and structure ---------------------------------------------------------------------------------


@fault("config", "model.masking")
def a_value_of_the_file(patch: pytest.MonkeyPatch) -> None:
    def changed(original: Any, preset: str) -> Any:
        content = original(preset)
        content["model"]["masking"]["mask_prob"] = 0.02
        return content

    around(patch, structure, "raw_config", changed)


@fault("parameters", "small: names, shapes, types and order")
def a_bias_too_many(patch: pytest.MonkeyPatch) -> None:
    def built(original: Any, self: Any, d_model: int, *arguments: Any, **options: Any) -> None:
        original(self, d_model, *arguments, **options)
        self.linear_pos = torch.nn.Linear(d_model, d_model)

    original = attention.RelativeAttention.__init__
    patch.setattr(attention.RelativeAttention, "__init__", lambda self, *a, **o: built(original, self, *a, **o))


@fault("parameters", "initial weights from the same seed")
def weights_drawn_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(conformer.ConformerEncoder, "reset_parameters", lambda self: None)


# ---- features, masks, tokens -------------------------------------------------------------------------------------


@fault("preprocessor", "features, evaluation")
def another_preemphasis(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(features, "PREEMPHASIS", 0.95)


@fault("preprocessor", "features, evaluation")
def a_biased_variance(patch: pytest.MonkeyPatch) -> None:
    def biased(original: Any, self: Any, x_BDT: torch.Tensor, frames_B: torch.Tensor) -> torch.Tensor:
        return original(self, x_BDT, frames_B) * (frames_B / (frames_B - 1.0))[:, None, None].sqrt()

    original = features.LogMelPreprocessor._normalised
    patch.setattr(features.LogMelPreprocessor, "_normalised", lambda self, x, n: biased(original, self, x, n))


@fault("preprocessor", "lengths, evaluation")
def a_frame_too_many(patch: pytest.MonkeyPatch) -> None:
    def longer(original: Any, self: Any, audio_BN: torch.Tensor, audio_len_B: torch.Tensor) -> Any:
        features_BDT, frames_B = original(self, audio_BN, audio_len_B)
        return features_BDT, frames_B + 1

    original = features.LogMelPreprocessor.forward
    patch.setattr(features.LogMelPreprocessor, "forward", lambda self, x, n: longer(original, self, x, n))


@fault("masking", "masks, overlapping blocks")
def blocks_a_frame_too_long(patch: pytest.MonkeyPatch) -> None:
    around(patch, masking, "_covered", lambda original, starts, block: original(starts, block + 1))


@fault("masking", "masks, disjoint blocks")
def blocks_counted_down(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(masking.torch, "ceil", torch.floor)


@fault("quantizer", "tokens, books: 1")
def frames_stacked_by_bins(patch: pytest.MonkeyPatch) -> None:
    def transposed(original: Any, self: Any, features_BDT: torch.Tensor) -> torch.Tensor:
        B, D, T = features_BDT.shape
        steps = self.config.combine_time_steps
        by_bin = features_BDT.view(B, D, T // steps, steps).permute(0, 2, 1, 3).reshape(B, T // steps, steps, D)
        return original(self, by_bin.reshape(B, T, D).transpose(1, 2))

    original = quantizer.RandomProjectionQuantizer.project
    patch.setattr(quantizer.RandomProjectionQuantizer, "project", lambda self, x: transposed(original, self, x))


@fault("quantizer", "tokens, books: 4")
def a_transposed_codebook(patch: pytest.MonkeyPatch) -> None:
    def transposed(original: Any, self: Any, unit_BSGE: torch.Tensor) -> torch.Tensor:
        return (
            original(self, unit_BSGE.transpose(2, 3))
            if unit_BSGE.size(2) == unit_BSGE.size(3)
            else original(self, unit_BSGE)
        )

    original = quantizer.RandomProjectionQuantizer.nearest_codes
    patch.setattr(quantizer.RandomProjectionQuantizer, "nearest_codes", lambda self, x: transposed(original, self, x))


# ---- encoder -----------------------------------------------------------------------------------------------------


@fault("encoder", "evaluation: pre_encode")
def padding_reaches_the_convolutions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fast, "_zero_padding", lambda x, lengths: x)
    around(
        patch,
        fast,
        "_stretch",
        lambda whole, x, begins, span, _length: whole(x, begins, span, begins + x.size(0)),
    )


@fault("encoder", "evaluation: layers.0")
def a_relative_shift_off_by_one(patch: pytest.MonkeyPatch) -> None:
    around(patch, attention, "relative_shift", lambda original, scores: original(scores.roll(1, -1)))


@fault("encoder", "evaluation: layers.0")
def u_and_v_swapped(patch: pytest.MonkeyPatch) -> None:
    def swapped(original: Any, self: Any, *arguments: Any) -> torch.Tensor:
        biases = self.pos_bias_u.data, self.pos_bias_v.data
        self.pos_bias_u.data, self.pos_bias_v.data = biases[1], biases[0]
        attended = original(self, *arguments)
        self.pos_bias_u.data, self.pos_bias_v.data = biases
        return attended

    original = attention.RelativeAttention.forward
    patch.setattr(attention.RelativeAttention, "forward", lambda self, *a: swapped(original, self, *a))


@fault("encoder", "evaluation: layers.0")
def half_steps_made_whole(patch: pytest.MonkeyPatch) -> None:
    original = conformer.FeedForward.forward
    patch.setattr(conformer.FeedForward, "forward", lambda self, *a: 2.0 * original(self, *a))


@fault("encoder", "evaluation: layers.1")
def a_wrong_bias(patch: pytest.MonkeyPatch) -> None:
    def off(original: Any, self: Any, x_BSM: torch.Tensor, padding_BS: torch.Tensor) -> torch.Tensor:
        bias_M = torch.zeros(x_BSM.size(-1))
        bias_M[0] = 1e-3 if getattr(self, "is_second", False) else 0.0
        return original(self, x_BSM, padding_BS) + bias_M

    original = conformer.Convolution.forward
    patch.setattr(conformer.Convolution, "forward", lambda self, x, padding: off(original, self, x, padding))
    encode = conformer.ConformerEncoder.encode

    def marking(self: Any, *arguments: Any) -> Any:
        self.layers[1].conv.is_second = True
        return encode(self, *arguments)

    patch.setattr(conformer.ConformerEncoder, "encode", marking)


@fault("encoder", "evaluation: layers.0")
def convolution_before_attention(patch: pytest.MonkeyPatch) -> None:
    def forward(
        self: Any, x: torch.Tensor, positions: torch.Tensor, hidden: torch.Tensor, padding: torch.Tensor, _key: Any
    ) -> Any:
        drop1, drop2, drop3, drop4 = self.residual_dropouts
        x = x + 0.5 * drop1(self.feed_forward1(self.norm_feed_forward1(x)))
        x = x + drop2(self.conv(self.norm_conv(x), padding))
        x = x + drop3(self.self_attn(self.norm_self_att(x), positions, hidden))
        x = x + 0.5 * drop4(self.feed_forward2(self.norm_feed_forward2(x)))
        return self.norm_out(x)

    patch.setattr(conformer.ConformerLayer, "forward", forward)


@fault("encoder", "training with dropout: layers.0.conv.batch_norm.running_mean")
def another_momentum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        conformer.nn, "BatchNorm1d", lambda width: torch.nn.modules.batchnorm.BatchNorm1d(width, momentum=0.2)
    )


@fault("encoder", "training with dropout: layers.0")
def dropout_left_out_of_attention(patch: pytest.MonkeyPatch) -> None:
    around(
        patch, attention.RelativeAttention, "_plain",
        lambda original, self, *a: (setattr(self.dropout, "p", 0.0), original(self, *a))[1],
    )  # fmt: skip


@fault("encoder", "fused attention, evaluation: layers.0")
def fused_bias_not_scaled(patch: pytest.MonkeyPatch) -> None:
    original = attention.RelativeAttention._fused
    patch.setattr(
        attention.RelativeAttention,
        "_fused",
        lambda self, q, k, v, bias, hidden: original(self, q, k, v, 2 * bias, hidden),
    )


@fault("encoder", "context [12, 6], evaluation: layers.0")
def a_context_one_too_wide(patch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    def wider(original: Any, n_frames: int, config: Any, device: torch.device) -> Any:
        left, right = config.att_context_size
        return original(n_frames, replace(config, att_context_size=(left + 1 if left > 0 else left, right)), device)

    around(patch, conformer, "outside_context", wider)


# ---- decoder, loss, gradients ------------------------------------------------------------------------------------


@fault("decoder", "log-probabilities")
def a_decoder_without_bias(patch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, frames: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(frames, self.layer.weight.squeeze(-1))
        return logits.unflatten(-1, (self.config.num_classes, self.config.num_decoders))

    patch.setattr(loss.MultiSoftmaxDecoder, "forward", forward)


@fault("loss", "loss of the same predictions")
def another_threshold(patch: pytest.MonkeyPatch) -> None:
    def select(self: Any, mask_BT: torch.Tensor) -> torch.Tensor:
        return mask_BT.unflatten(1, (-1, self.config.combine_time_steps)).float().mean(-1) > 0.5

    patch.setattr(loss.MaskedTokenLoss, "select", select)


@fault("loss", "loss, evaluation")
def targets_of_the_noisy_audio(patch: pytest.MonkeyPatch) -> None:
    original = nest.NestModel.forward
    patch.setattr(nest.NestModel, "forward", lambda self, clean, n, noisy, m: original(self, noisy, m, noisy, m))


@fault("gradients", "encoder.pre_encode")
def no_gradient_into_the_subsampling(patch: pytest.MonkeyPatch) -> None:
    original = conformer.ConformerEncoder.encode
    patch.setattr(
        conformer.ConformerEncoder, "encode",
        lambda self, x, lengths: original(self, x.detach() + 0.5 * (x - x.detach()), lengths),
    )  # fmt: skip


# ---- training, augmentation, checkpoints -------------------------------------------------------------------------


@fault("training", "learning rates")
def a_schedule_one_step_ahead(patch: pytest.MonkeyPatch) -> None:
    def ahead(self: Any) -> Any:
        self.last_epoch += 1
        rates = original(self)
        self.last_epoch -= 1
        return rates

    original = optim.NoamAnnealing.get_lr
    patch.setattr(optim.NoamAnnealing, "get_lr", ahead)


@fault("training", "optimiser and its settings")
def no_decay_on_biases(patch: pytest.MonkeyPatch) -> None:
    def two_groups(parameters: Any, weight_decay: float, **options: Any) -> torch.optim.AdamW:
        matrices, rest = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, **options)

    patch.setattr(optim, "AdamW", two_groups)


@fault("augmentation", "MultiSpeakerNoiseAugmentation: noise")
def a_ratio_of_amplitudes(patch: pytest.MonkeyPatch) -> None:
    around(patch, mixing, "_gain", lambda original, *arguments: original(*arguments) ** 2)


@fault("augmentation", "MultiSpeakerNoiseAugmentation: noise")
def a_draw_left_out(patch: pytest.MonkeyPatch) -> None:
    def chosen(original: Any, item: int, given: Any, wanted: int) -> Any:
        return original(item, given, wanted) if given.config.noise_ratio > 0 else (0.0, None)

    around(patch, mixing, "_chosen_source", chosen)


@fault("checkpoint", "NeMo's archive: weights")
def weights_read_in_half_precision(patch: pytest.MonkeyPatch) -> None:
    def halved(original: Any, path: Any) -> Any:
        config, state = original(path)
        return config, {name: value.half().to(value.dtype) for name, value in state.items()}

    around(patch, archive, "read_nemo", halved)


# ---- the tests ---------------------------------------------------------------------------------------------------


def recorded(only: tuple[str, ...] = ()) -> Report:
    return compare(Request("small", load_config("small"), only=only), RecordedNemo())


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_where_it_sits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    section, check, plant = FAULTS[name]
    plant(monkeypatch)
    costly = {"parameters", "training"} - {section}
    before = SECTIONS[: SECTIONS.index(section) + 1]
    report = recorded(tuple(name for name in before if name not in costly))
    assert not report.passed
    assert report.first_divergence is not None
    found_section, found_check = report.first_divergence
    assert (found_section.name, found_check.name[: len(check)]) == (section, check)
    assert found_check.where, "the divergence is not pinpointed"


def test_without_a_fault_everything_is_the_same() -> None:
    report = recorded()
    assert report.passed, report.first_divergence
    assert tuple(section.name for section in report.sections) == SECTIONS
    assert all(section.checks for section in report.sections)
    proofs = [difference.reproduced for difference in report.known_differences]
    assert False not in proofs
    assert proofs.count(True) >= 10


def test_every_value_of_the_configuration_is_looked_at() -> None:
    section = recorded(("config",)).sections[0]
    counted = sum(check.ours for check in section.checks if not check.name.startswith("sizes of"))
    assert counted == len(dict(leaves(structure.raw_config("nest_fast-conformer"))))
