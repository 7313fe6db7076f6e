"""The sections `preprocessor`, `masking` and `quantizer`: the network's inputs and its targets.

Axes: B batch, D mel bins, T feature frames, S tokens, G codebooks, C codes, E code width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nestcli.model.config import MaskingConfig, NestConfig, QuantizerConfig
from nestcli.model.features import LogMelPreprocessor
from nestcli.model.masking import RandomBlockMasking
from nestcli.model.quantizer import RandomProjectionQuantizer
from nestcli.parity.context import Context
from nestcli.parity.report import Check, Section, close, equal, same_elements, worst
from nestcli.parity.subject import Subject

FEATURES = 1e-5  # tolerance
TIE = 1e-6  # if two codes' dot products differ by less, rounding decides between them
TRAIN_SEED, _MASK_SEED = 7, 11


def blocks_of(subject: Subject) -> NestConfig:
    """Return the blocks of the subject's configuration."""
    return NestConfig.from_config(subject.config)


@torch.no_grad()
def features_of(subject: Subject, which: str) -> tuple[Tensor, Tensor]:
    """Return our features (B, D, T) of the clean or noisy audio in evaluation mode, and their lengths (B,)."""
    features_BDT, lengths_B = subject.fresh(train=False).preprocessor(
        subject.batch[which], subject.batch[f"{which}_len"]
    )
    return features_BDT, lengths_B


@torch.no_grad()
def masked_features(subject: Subject) -> tuple[Tensor, Tensor, Tensor]:
    """Return our masked noisy features (B, D, T), their lengths (B,) and the mask (B, T)."""
    features_BDT, lengths_B = features_of(subject, "noisy")
    torch.manual_seed(_MASK_SEED)
    masked_BDT, mask_BT = subject.model.mask_processor(features_BDT, lengths_B)
    return masked_BDT, lengths_B, mask_BT


# ---- preprocessor ------------------------------------------------------------------------------------------------


def preprocessor_section(context: Context, section: Section) -> None:
    """Compare features of the clean audio in both modes, with dither from the same seed in training."""
    subject = context.subject
    _ = context.built
    audio = {"audio": subject.batch["clean"], "audio_len": subject.batch["clean_len"]}
    for label, train in (("evaluation", False), ("training, dithered", True)):
        theirs = context.nemo.ask("features", {"train": train, "seed": TRAIN_SEED}, audio)
        preprocessor = subject.fresh(train=train).preprocessor
        ours_BDT, lengths_B = _features(preprocessor, audio)
        rounding_BD1 = rounding_of_features(preprocessor, audio, ours_BDT)
        section.add(close(f"features, {label}", ours_BDT, theirs["features"], FEATURES, rounding=rounding_BD1))
        section.add(equal(f"lengths, {label}", lengths_B.tolist(), theirs["lengths"].tolist()))
        if not train:
            section.add(_default_features(subject, audio, theirs["features"]))
            section.pictures = {"ours": ours_BDT[0].numpy(), "NeMo": theirs["features"][0].numpy()}


def _features(preprocessor: LogMelPreprocessor, audio: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(TRAIN_SEED)
    features_BDT, lengths_B = preprocessor(audio["audio"].clone(), audio["audio_len"])
    return features_BDT, lengths_B


@torch.no_grad()
def rounding_of_features(preprocessor: LogMelPreprocessor, audio: Mapping[str, Tensor], ours_BDT: Tensor) -> Tensor:
    """Return how far each bin moves (B, D, 1) when the audio changes in its last bits.

    A bin with little energy beside a loud one holds mostly rounding, which differs from processor to processor.
    """
    generator = torch.Generator().manual_seed(TRAIN_SEED)
    moved_BN = audio["audio"] * (1 + 2.0**-23 * torch.randn(audio["audio"].shape, generator=generator))
    moved_BDT, _ = _features(preprocessor, {**audio, "audio": moved_BN})
    return (moved_BDT - ours_BDT).abs().amax(2, keepdim=True)


def _default_features(subject: Subject, audio: Mapping[str, Tensor], theirs_BDT: Tensor) -> Check:
    """Check our default, in which bins that never change are zero and every other bin equals NeMo's."""
    config = copy.deepcopy(subject.config)
    config.model.preprocessor.nemo_exact = False
    default = LogMelPreprocessor(NestConfig.from_config(config).preprocessor).eval()
    ours_BDT, _ = _features(default, audio)
    changes_BD1 = (ours_BDT != 0).any(2, keepdim=True)
    return close(
        "features, evaluation, with our default for silence",
        ours_BDT,
        theirs_BDT * changes_BD1,
        FEATURES,
        rounding=rounding_of_features(default, audio, ours_BDT),
        note=f"{int((~changes_BD1).sum())} bins that never change are left out",
    )


# ---- masking -----------------------------------------------------------------------------------------------------


def masking_section(context: Context, section: Section) -> None:
    """Compare masks from the same seeds, for the subject's utterances and for edge-case lengths, in both modes."""
    masking = blocks_of(context.subject).masking
    lengths = (context.subject.batch["clean_len"] // _hop(context.subject)).tolist()
    for overlap in (True, False):
        label = "overlapping" if overlap else "disjoint"
        cases = list(_mask_cases(masking, overlap, lengths))
        theirs = context.nemo.ask("masks", {"cases": cases})
        masks, draws = zip(*(_mask(case) for case in cases), strict=True)
        checks = [
            same_elements(_mask_name(case), ours_BT, theirs[str(number)])
            for number, (case, ours_BT) in enumerate(zip(cases, masks, strict=True))
        ]
        masked = sum(int(mask_BT.sum()) for mask_BT in masks)
        section.add(worst(f"masks, {label} blocks", checks, note=f"{masked:,} frames masked"))
        section.add(equal(f"next random draw, {label} blocks", list(draws), theirs.facts["next_draws"]))
        section.pictures |= {f"ours, {label}": masks[0].numpy(), f"NeMo, {label}": theirs["0"].numpy()}


def _hop(subject: Subject) -> int:
    return subject.model.preprocessor.config.hop_length


def _mask_cases(masking: MaskingConfig, overlap: bool, lengths: list[int]) -> Iterator[dict[str, Any]]:
    own = {"block_size": masking.block_size, "mask_prob": masking.mask_prob}
    other = {"block_size": 10, "mask_prob": 0.05 if overlap else 0.5}
    awkward = [masking.block_size - 1, masking.block_size, masking.block_size + 1, 1, 400, 416]
    for settings in (own, other):
        for frames in (lengths, awkward):
            for seed in range(5):
                yield {
                    "masking": {**settings, "allow_overlap": overlap},
                    "frames": -(-max(frames) // 16) * 16,
                    "lengths": frames,
                    "seed": seed,
                }


def _mask_name(case: Mapping[str, Any]) -> str:
    masking = case["masking"]
    return f"block {masking['block_size']}, p {masking['mask_prob']}, {case['frames']} frames, seed {case['seed']}"


def _mask(case: Mapping[str, Any]) -> tuple[Tensor, float]:
    masking = RandomBlockMasking(MaskingConfig(feat_in=2, freeze=True, **case["masking"]))
    lengths_B = torch.tensor(case["lengths"])
    torch.manual_seed(case["seed"])
    _, mask_BT = masking(torch.zeros(len(lengths_B), 2, case["frames"]), lengths_B)
    return mask_BT, torch.rand(1).item()


# ---- quantizer ---------------------------------------------------------------------------------------------------


def quantizer_section(context: Context, section: Section) -> None:
    """Compare tokens of the clean features on every window with audio, then again with new codebooks.

    The new quantizer has four codebooks, or one if the subject's has several.
    """
    subject = context.subject
    _ = context.built
    features_BDT, lengths_B = features_of(subject, "clean")
    config = blocks_of(subject).quantizer
    theirs = context.nemo.ask("tokens", {}, {"features": features_BDT})
    section.add(
        _same_tokens(
            f"tokens, books: {config.num_books}", subject.model.quantizer, features_BDT, lengths_B, theirs["tokens"]
        )
    )

    known = {key: value for key, value in vars(config).items() if key != "init"}  # a key of our own
    settings = {**known, "num_books": 4 if config.num_books == 1 else 1, "dist_fn": "l2"}
    label = f"books: {settings['num_books']}"
    request = {"quantizer": settings, "seed": TRAIN_SEED}
    theirs = context.nemo.ask("tokens", request, {"features": features_BDT})
    torch.manual_seed(TRAIN_SEED)
    quantizer = RandomProjectionQuantizer(QuantizerConfig(**settings))
    section.add(close(f"projection from the same seed, {label}", quantizer.proj.weight, theirs["proj"], 1e-6))
    section.add(close(f"codebooks from the same seed, {label}", quantizer.codebooks, theirs["codebooks"], 1e-12))
    quantizer.load_state_dict({"proj.weight": theirs["proj"], "codebooks": theirs["codebooks"]})
    section.add(_same_tokens(f"tokens, {label}", quantizer, features_BDT, lengths_B, theirs["tokens"]))


def _same_tokens(
    name: str, quantizer: RandomProjectionQuantizer, features_BDT: Tensor, lengths_B: Tensor, theirs: Tensor
) -> Check:
    ours = quantizer(features_BDT)
    if ours.shape != theirs.shape:
        return close(name, ours, theirs, 0.0)
    ours_BSG, theirs_BSG = (side if side.dim() == 3 else side[:, :, None] for side in (ours, theirs))
    steps = quantizer.config.combine_time_steps
    holds_audio_BS = torch.arange(ours_BSG.size(1)) * steps < lengths_B[:, None]
    differing = ((ours_BSG != theirs_BSG) & holds_audio_BS[:, :, None]).nonzero()
    n_tokens = int(holds_audio_BS.sum()) * ours_BSG.size(2)
    left_out = f"{n_tokens} tokens; {int((~holds_audio_BS).sum())} windows of padding alone are left out"
    margins = [_margin(quantizer, features_BDT, place, ours_BSG, theirs_BSG) for place in differing.tolist()]
    wrong = [place for place, margin in zip(differing.tolist(), margins, strict=True) if margin > TIE]
    where, note = None, left_out
    if wrong:
        place = tuple(wrong[0])
        where = (
            f"first at (item, token, book) {wrong[0]}: ours {int(ours_BSG[place])}, NeMo's {int(theirs_BSG[place])}; "
            f"{len(wrong)} of {n_tokens} differ"
        )
    elif margins:
        note += f"; rounding decides {len(margins)} ties, margins up to {max(margins):.1e}"
    agreeing = n_tokens - len(wrong)
    return Check(name, not wrong, agreeing, n_tokens, float(len(wrong)), 0.0, where, note)


def _margin(
    quantizer: RandomProjectionQuantizer, features_BDT: Tensor, place: list[int], ours_BSG: Tensor, theirs_BSG: Tensor
) -> float:
    """Return how much closer our code is to a window than NeMo's, as a difference of dot products."""
    item, token, book = place
    unit_E = quantizer.project(features_BDT[item : item + 1])[0, token, book].double()
    codes_CE = quantizer.codebooks[book]
    return abs(float(unit_E @ (codes_CE[ours_BSG[item, token, book]] - codes_CE[theirs_BSG[item, token, book]])))
