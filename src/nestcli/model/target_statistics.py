"""Statistics of the quantizer's targets, computed from audio before training.

They show how evenly the codes are used, how stable the tokens are, and how much of a hidden target is explained by the
visible frames. Separate random generators are used, so that the draws of training do not change.

Axes: N samples, D features, T frames, S tokens (of all utterances in a row), W width of a stack of frames, P principal
components, G codebooks, E code width, Y = G * E, B utterances, H hidden tokens that count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestcli.model.config import MaskingConfig
from nestcli.model.features import LogMelPreprocessor
from nestcli.model.health import count_codes, dead_codes
from nestcli.model.loss import MaskedTokenLoss
from nestcli.model.masking import draw_mask
from nestcli.model.nest import NestModel

SHIFT_SECONDS, NOISE_DB = 0.005, 20.0  # changes (time shift; noise at this SNR) that should not change a stable token
_COMPONENTS, _RIDGE = 32, 0.03  # of the linear model; more components or less ridge overfit five minutes of audio
_ENOUGH = 500  # minimum number of tokens to fit the linear model
_FAR = 5  # tokens; visible frames that are farther away explain nothing
_TOKENS_A_CODE = 10  # with fewer, many codes have no token by chance
_MASKED_UTTERANCES = 256  # utterances with random masks for the statistics of distances


@dataclass(frozen=True)
class TargetStatistics:
    """The targets of a sample of audio. Distances in tokens; shares from 0 to 1; NaN if the sample is too small."""

    utterances: int
    seconds: float  # of audio
    tokens: int
    token_seconds: float
    n_books: int
    n_codes: int
    perplexity: float  # mean over codebooks
    dead_codes: float  # never used in the sample, mean over codebooks
    unigram_loss: float  # of guessing by frequency, nats, mean over codebooks
    stable_after_shift: float
    stable_with_noise: float
    explained: tuple[float, ...]  # of a target's variance, by the visible tokens 1, 2, 3 away on both sides
    nearest_visible: float  # mean distance of a hidden token to visible frames; 1 is the neighbour
    explained_by_visible: float  # with the visible frames that the masks leave, mean over hidden tokens


class Targets:
    """Compute a model's targets from clean audio, without dither: stacks of frames, then unit vectors, then tokens."""

    def __init__(self, model: NestModel) -> None:
        self.model, self.quantizer = model, model.quantizer
        self.preprocessor = LogMelPreprocessor(replace(model.preprocessor.config, dither=0.0))
        self.steps = self.quantizer.config.combine_time_steps

    @torch.no_grad()
    def stacks(self, audio_N: Tensor) -> Tensor:
        """Return the quantizer's inputs (S, W): stacks of frames, or sub-sampled frames with `post_conv`."""
        features_BDT, frames_B = self.preprocessor(audio_N[None], torch.tensor([len(audio_N)]))
        if self.model.mask_after_subsampling:
            subsampling = self.model.encoder.pre_encode
            dtype = next(subsampling.parameters()).dtype
            subsampled_BSM, frames_B = subsampling(features_BDT.transpose(1, 2).to(dtype), frames_B)
            features_BDT = subsampled_BSM.transpose(1, 2).float()
        tokens = int(frames_B) // self.steps
        return features_BDT[0, :, : tokens * self.steps].T.reshape(tokens, self.steps * features_BDT.size(1))

    @torch.no_grad()
    def unit_vectors(self, stacks_SW: Tensor) -> Tensor:
        """Return the projections (S, G, E) that the codes are looked up with."""
        features_BDT = stacks_SW.reshape(1, -1, self.quantizer.config.feat_in).transpose(1, 2)
        return self.quantizer.project(features_BDT)[0]

    @torch.no_grad()
    def tokens(self, unit_SGE: Tensor) -> Tensor:
        """Return the tokens (S, G)."""
        return self.quantizer.nearest_codes(unit_SGE[None])[0]

    def of_audio(self, audio_N: Tensor) -> Tensor:
        """Return the tokens (S, G) of audio."""
        return self.tokens(self.unit_vectors(self.stacks(audio_N)))


def target_statistics(model: NestModel, audios: Sequence[Tensor]) -> TargetStatistics:
    """Return the statistics of utterances (N,), fp32 at the configured rate. Raises ValueError if they hold no token.

    Leaves the model and the global generators unchanged.
    """
    targets, rate = Targets(model), model.preprocessor.config.sample_rate
    stacks = [targets.stacks(audio_N) for audio_N in audios]
    stacks_SW = torch.cat(stacks)
    if len(stacks_SW) == 0:
        raise ValueError("the audio is shorter than a token")
    utterance_S = torch.arange(len(stacks)).repeat_interleave(torch.tensor([len(each) for each in stacks]))
    unit_SGE = targets.unit_vectors(stacks_SW)
    tokens_SG = targets.tokens(unit_SGE)
    noise = torch.Generator().manual_seed(0)
    of_each = tokens_SG.split([len(each) for each in stacks])
    perplexity, dead, unigram_loss = use_of_codes(tokens_SG, targets.quantizer.config.num_classes)
    inputs_SP, unit_SY = principal_components(stacks_SW), unit_SGE.flatten(1)

    def explained(left: int, right: int) -> float:
        return explained_variance(inputs_SP, unit_SY, utterance_S, left, right)

    frames_B = torch.tensor([len(each) * targets.steps for each in stacks])
    left_H, right_H = hidden_distances(frames_B, model.mask_processor.config, model.loss)
    nearest_H = torch.minimum(left_H, right_H)
    return TargetStatistics(
        utterances=len(audios),
        seconds=sum(len(audio_N) for audio_N in audios) / rate,
        tokens=len(tokens_SG),
        token_seconds=model.preprocessor.config.hop_length * model.encoder.config.subsampling_factor / rate,
        n_books=targets.quantizer.config.num_books,
        n_codes=targets.quantizer.config.num_classes,
        perplexity=perplexity,
        dead_codes=dead,
        unigram_loss=unigram_loss,
        stable_after_shift=unchanged_share(
            targets, audios, of_each, lambda audio_N: audio_N[round(SHIFT_SECONDS * rate) :]
        ),
        stable_with_noise=unchanged_share(
            targets, audios, of_each, lambda audio_N: with_white_noise(audio_N, NOISE_DB, noise)
        ),
        explained=tuple(explained(distance, distance) for distance in (1, 2, 3)),
        nearest_visible=float(nearest_H[nearest_H.isfinite()].mean()),
        explained_by_visible=explained_by_visible(left_H, right_H, explained),
    )


# ---- codes and stability ----


def use_of_codes(tokens_SG: Tensor, n_codes: int) -> tuple[float, float, float]:
    """Return perplexity, codes without a token, and the loss of guessing by frequency (nats); means over codebooks.

    The entropy of a sample is too low; Miller and Madow's term corrects it. Too few tokens make the dead codes NaN.
    """
    counts_GC = torch.zeros(tokens_SG.size(1), n_codes, dtype=torch.int64)
    count_codes(counts_GC, tokens_SG)
    shares_GC = counts_GC.double() / len(tokens_SG)
    used_G = (counts_GC > 0).sum(1)
    entropy_G = torch.special.entr(shares_GC).sum(1) + (used_G - 1) / (2 * len(tokens_SG))
    dead = float(dead_codes(counts_GC)) if len(tokens_SG) >= _TOKENS_A_CODE * n_codes else math.nan
    return float(entropy_G.exp().mean()), dead, float(entropy_G.mean())


def unchanged_share(
    targets: Targets, audios: Sequence[Tensor], tokens: Sequence[Tensor], change: Callable[[Tensor], Tensor]
) -> float:
    """Return the share of tokens that stay the same when `change` is applied to the audio."""
    same = total = 0
    for audio_N, tokens_SG in zip(audios, tokens, strict=True):
        others_SG = targets.of_audio(change(audio_N))
        n_tokens = min(len(tokens_SG), len(others_SG))
        same += int((tokens_SG[:n_tokens] == others_SG[:n_tokens]).sum())
        total += tokens_SG[:n_tokens].numel()
    return same / total if total else math.nan


def with_white_noise(audio_N: Tensor, ratio_db: float, generator: torch.Generator) -> Tensor:
    """Add white noise at a signal-to-noise ratio in dB."""
    deviation = audio_N.square().mean().sqrt() * 10 ** (-ratio_db / 20)
    return audio_N + deviation * torch.randn(len(audio_N), generator=generator)


# ---- neighbours ----


def principal_components(stacks_SW: Tensor) -> Tensor:
    """Return the strongest principal components (S, P) of stacks: those of speech hold 91% of their variance."""
    centred_SW = stacks_SW - stacks_SW.mean(0)
    _, directions_WW = torch.linalg.eigh((centred_SW.T @ centred_SW).double())
    return centred_SW @ directions_WW[:, -_COMPONENTS:].float()


def explained_variance(inputs_SP: Tensor, targets_SY: Tensor, utterance_S: Tensor, left: int, right: int) -> float:
    """Return the share of the targets' variance that the inputs `left` tokens before and `right` tokens after explain.

    The ridge regression is fitted on one half of the places and judged on the other, both ways; a guess that is worse
    than the mean explains 0. NaN if the places are too few or the targets do not vary.
    """
    places_S = torch.arange(left, len(inputs_SP) - right)
    places_S = places_S[utterance_S[places_S - left] == utterance_S[places_S + right]]
    if len(places_S) < _ENOUGH:
        return math.nan
    pairs_SP = torch.cat([inputs_SP[places_S - left], inputs_SP[places_S + right]], dim=1).double()
    wanted_SY = targets_SY[places_S].double()
    is_first_S = torch.arange(len(places_S)) < len(places_S) // 2
    missed = total = 0.0
    for fitted_S in (is_first_S, ~is_first_S):
        mean_P, mean_Y = pairs_SP[fitted_S].mean(0), wanted_SY[fitted_S].mean(0)
        centred_SP = pairs_SP[fitted_S] - mean_P
        gram_PP = centred_SP.T @ centred_SP
        ridge_PP = torch.eye(len(gram_PP)).double() * gram_PP.diagonal().mean().clamp_min(1e-12) * _RIDGE
        weights_PY = torch.linalg.solve(gram_PP + ridge_PP, centred_SP.T @ (wanted_SY[fitted_S] - mean_Y))
        judged_SY = wanted_SY[~fitted_S] - mean_Y
        total += float(judged_SY.square().sum())
        missed += float((judged_SY - (pairs_SP[~fitted_S] - mean_P) @ weights_PY).square().sum())
    return max(0.0, 1 - missed / total) if total > 0 else math.nan


def hidden_distances(frames_B: Tensor, masking: MaskingConfig, loss: MaskedTokenLoss) -> tuple[Tensor, Tensor]:
    """Draw masks for utterances of `frames_B` frames; return the distances (H,) of the tokens that count.

    A distance is a pair, to the nearest visible frames on the left and on the right, in tokens: 1 if the adjacent
    frame is visible, infinite if no frame on that side is visible.
    """
    frames_B = frames_B.repeat(-(-_MASKED_UTTERANCES // len(frames_B)))
    steps = loss.config.combine_time_steps
    n_frames = -(-int(frames_B.max()) // steps) * steps
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mask_BT = draw_mask(frames_B, n_frames, masking)
    place_T = torch.arange(n_frames).double()
    visible_BT = ~mask_BT & (place_T < frames_B[:, None])
    before_BT = torch.where(visible_BT, place_T, -math.inf).cummax(1).values
    after_BT = torch.where(visible_BT, place_T, math.inf).flip(1).cummin(1).values.flip(1)
    beyond_B1 = torch.full((len(frames_B), 1), math.inf).double()
    before_BS = torch.cat([-beyond_B1, before_BT], 1)[:, :-1:steps]  # the last visible frame before each token
    after_BS = torch.cat([after_BT, beyond_B1], 1)[:, steps::steps]
    first_S = place_T[::steps]
    left_BS = 1 + (first_S - before_BS - 1) / steps
    right_BS = 1 + (after_BS - first_S - steps) / steps
    counts_BS = loss.select(mask_BT)
    return left_BS[counts_BS], right_BS[counts_BS]


def explained_by_visible(left_H: Tensor, right_H: Tensor, explained: Callable[[int, int], float]) -> float:
    """Return the share of the hidden targets that the nearest visible tokens explain, mean over hidden tokens.

    `explained` returns it for a pair of distances. Left and right are interchangeable. NaN without hidden tokens.
    """
    pairs_H2 = torch.stack([left_H, right_H], 1).round().clamp_max(_FAR).long().sort(1).values
    pairs, counts = pairs_H2.unique(dim=0, return_counts=True)
    shares = [count * explained(*pair) for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)]
    return sum(shares) / len(left_H) if len(left_H) else math.nan
