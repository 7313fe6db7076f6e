"""Statistics of targets on planted cases whose answers are known in closed form."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from nestcli.config import load_config
from nestcli.model.config import LossConfig, MaskingConfig, NestConfig
from nestcli.model.loss import MaskedTokenLoss
from nestcli.model.masking import draw_mask
from nestcli.model.nest import NestModel
from nestcli.model.target_statistics import (
    Targets,
    explained_by_visible,
    explained_variance,
    hidden_distances,
    principal_components,
    target_statistics,
    unchanged_share,
    use_of_codes,
    with_white_noise,
)

TINY = [
    "model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=1", "model.num_classes=32",
    "model.encoder.subsampling_conv_channels=8",
]  # fmt: skip


def model_of(*overrides: str) -> NestModel:
    torch.manual_seed(0)
    return NestModel(NestConfig.from_config(load_config("small", [*TINY, *overrides])))


def noise(count: int, seconds: float = 10.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(int(seconds * 16000), generator=generator) * 0.1 for _ in range(count)]


# ---- codes ----


def test_the_codes_of_constant_features_are_one() -> None:
    found = target_statistics(model_of(), [torch.zeros(160_000) for _ in range(5)])
    assert found.perplexity == 1.0
    assert found.unigram_loss == 0.0
    assert found.dead_codes == 31
    assert found.stable_after_shift == 1.0
    assert math.isnan(found.explained_by_visible)  # a constant leaves nothing to explain


def test_even_use_is_recovered_from_a_sample_that_is_small() -> None:
    tokens_SG = torch.randint(64, (640, 2), generator=torch.Generator().manual_seed(0))
    perplexity, dead, loss = use_of_codes(tokens_SG, 64)
    assert perplexity == pytest.approx(64, rel=0.02)  # without the correction it is 5% too low
    assert loss == pytest.approx(math.log(64), abs=0.02)
    assert dead == 0
    assert math.isnan(use_of_codes(tokens_SG[:-1], 64)[1])  # below ten tokens a code
    assert use_of_codes(torch.zeros(1280, 1, dtype=torch.long), 128)[1] == 127


# ---- stability ----


def test_tokens_survive_no_change_and_not_another_sound() -> None:
    targets, audios = Targets(model_of()), noise(3)
    tokens = [targets.of_audio(audio) for audio in audios]
    assert unchanged_share(targets, audios, tokens, lambda audio: audio[0:]) == 1.0
    shifted = unchanged_share(targets, audios, tokens, lambda audio: audio[80:])
    other = unchanged_share(targets, audios, tokens, lambda audio: audio.flip(0))
    assert other < shifted < 1.0


def test_white_noise_has_the_ratio_that_was_asked_for() -> None:
    audio = 0.3 * torch.sin(torch.arange(160_000) / 7)
    added = with_white_noise(audio, 20.0, torch.Generator().manual_seed(0)) - audio
    assert 10 * float((audio.square().mean() / added.square().mean()).log10()) == pytest.approx(20, abs=0.1)


# ---- neighbours ----


def independent(count: int, width: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(2))


def test_neighbours_explain_nothing_of_independent_noise() -> None:
    inputs, one = independent(2000, 8), torch.zeros(2000)
    assert explained_variance(inputs, inputs, one, 1, 1) < 0.02
    stacks = Targets(model_of()).stacks(noise(1, 100.0)[0])  # white noise: its frames overlap by 15 ms at the borders
    found = explained_variance(principal_components(stacks), stacks, torch.zeros(len(stacks)), 2, 2)
    assert found < 0.02


def test_neighbours_explain_a_slow_sinusoid() -> None:
    phase_S = torch.arange(2000) * 0.1
    inputs = torch.stack([phase_S.sin(), phase_S.cos()], 1)
    shares = [explained_variance(inputs, inputs, torch.zeros(2000), *pair) for pair in ((1, 1), (3, 3), (0, 4))]
    assert min(shares) > 0.98
    noisy = inputs + independent(2000, 2)
    assert 0.1 < explained_variance(noisy, noisy, torch.zeros(2000), 1, 1) < 0.6


def test_neighbours_are_of_the_same_utterance() -> None:
    # Each utterance repeats one vector: a neighbour across a border says nothing.
    utterance = torch.arange(300).repeat_interleave(4)
    inputs = independent(300, 3).repeat_interleave(4, 0)
    assert explained_variance(inputs, inputs, utterance, 1, 1) > 0.98
    assert math.isnan(explained_variance(inputs, inputs, utterance, 2, 2))  # no utterance holds five tokens
    assert math.isnan(explained_variance(inputs[:400], inputs[:400], utterance[:400], 1, 1))  # too few places


# ---- distances ----


def masking(**changed: object) -> MaskingConfig:
    values = {"feat_in": 80, "block_size": 24, "mask_prob": 1.0, "freeze": True, "allow_overlap": True}
    return MaskingConfig(**{**values, **changed})  # type: ignore[arg-type]


def loss(steps: int = 8) -> MaskedTokenLoss:
    return MaskedTokenLoss(LossConfig(steps, 0.8, num_decoders=1, squeeze_single=False))


def counted(mask_T: torch.Tensor, steps: int) -> list[tuple[float, float]]:
    """The distances of an utterance's tokens, frame by frame."""
    found = []
    for first in range(0, len(mask_T), steps):
        if mask_T[first : first + steps].float().mean() <= 0.8:
            continue
        left = next((first - place for place in range(first - 1, -1, -1) if not mask_T[place]), math.inf)
        behind = first + steps
        right = next((place - behind + 1 for place in range(behind, len(mask_T)) if not mask_T[place]), math.inf)
        found.append((1 + (left - 1) / steps, 1 + (right - 1) / steps))
    return found


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_distances_are_those_counted_by_hand(monkeypatch: pytest.MonkeyPatch, overlap: bool, steps: int) -> None:
    config = masking(allow_overlap=overlap, mask_prob=0.03 if overlap else 0.4, block_size=20)
    frames = torch.tensor([400, 80, 240])
    mask = draw_mask(frames.repeat(86), 400, config)
    monkeypatch.setattr("nestcli.model.target_statistics.draw_mask", lambda *_: mask)
    left, right = hidden_distances(frames, config, loss(steps))
    lengths = frames.repeat(86)
    expected = [pair for row, length in zip(mask, lengths, strict=True) for pair in counted(row[:length], steps)]
    assert len(expected) > 500
    assert torch.allclose(torch.stack([left, right], 1), torch.tensor(expected).double())


def test_a_block_alone_leaves_neighbours_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    block = torch.zeros(256, 120, dtype=torch.bool)
    block[:, 40:80] = True  # five tokens
    monkeypatch.setattr("nestcli.model.target_statistics.draw_mask", lambda *_: block)
    left, right = hidden_distances(torch.tensor([120]), masking(), loss())
    assert left[:5].tolist() == [1, 2, 3, 4, 5]
    assert right[:5].tolist() == [5, 4, 3, 2, 1]
    asked = []

    def explained(left: int, right: int) -> float:
        asked.append((left, right))
        return {1: 0.5, 2: 0.2, 3: 0.1}[left]

    assert explained_by_visible(left, right, explained) == pytest.approx((2 * 0.5 + 2 * 0.2 + 0.1) / 5)
    assert sorted(asked) == [(1, 5), (2, 4), (3, 3)]


def test_tokens_without_visible_frames_are_far_away() -> None:
    left, right = hidden_distances(torch.tensor([48]), masking(), loss())  # a block begins everywhere
    assert left.isinf().all()
    assert right.isinf().all()
    assert explained_by_visible(left, right, lambda left, right: float((left, right) != (5, 5))) == 0
    assert math.isnan(explained_by_visible(left[:0], right[:0], lambda *_: 0.0))


# ---- the whole ----


@pytest.mark.parametrize("position", ["pre_conv", "post_conv"])
def test_a_model_and_the_generators_stay_as_they_were(position: str) -> None:
    model = model_of(f"model.mask_position={position}", "model.num_books=2", "model.masking.block_size=16").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    audios = noise(6)
    first = target_statistics(model, audios)
    assert first == target_statistics(model, audios)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (first.utterances, first.seconds, first.tokens) == (6, 60.0, 750)
    assert first.token_seconds == 0.08
    assert 1 < first.perplexity < 32
    assert 1 <= first.nearest_visible < 4
    assert all(later <= earlier + 0.1 for earlier, later in pairwise(first.explained))


def test_audio_shorter_than_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter than a token"):
        target_statistics(model_of(), [torch.zeros(400)])
