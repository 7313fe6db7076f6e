"""The sections from `preprocessor` to `gradients`: every part on the same input, then the whole model.

Axes: B batch, N samples, D mel bins, T feature frames, S sub-sampled frames, M model width, C codes, G codebooks.
"""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nestcli.model.conformer import ConformerEncoder, EncoderConfig
from nestcli.model.features import LogMelPreprocessor
from nestcli.model.loss import fitted
from nestcli.model.masking import MaskingConfig, RandomBlockMasking
from nestcli.model.nest import NestConfig, NestModel
from nestcli.model.quantizer import QuantizerConfig, RandomProjectionQuantizer
from nestcli.parity.context import Context
from nestcli.parity.report import (
    ROUNDINGS,
    Check,
    Section,
    close,
    close_in_norm,
    equal,
    same_elements,
    same_entries,
    worst,
)
from nestcli.parity.subject import Subject

FEATURES, FRAMES, LOG_PROBS, LOSS, GRADIENT = 1e-5, 1e-4, 1e-5, 1e-6, 1e-4  # tolerances
TIE = 1e-6  # margin in a token's dot product below which rounding decides
_TRAIN_SEED, _MASK_SEED = 7, 11


def blocks_of(subject: Subject) -> NestConfig:
    """The blocks of the subject's configuration."""
    return NestConfig.from_config(subject.config)


@torch.no_grad()
def features_of(subject: Subject, which: str) -> tuple[Tensor, Tensor]:
    """Our features (B, D, T) of the clean or noisy audio in evaluation mode, and their lengths (B,)."""
    features_BDT, lengths_B = subject.fresh(train=False).preprocessor(
        subject.batch[which], subject.batch[f"{which}_len"]
    )
    return features_BDT, lengths_B


@torch.no_grad()
def masked_features(subject: Subject) -> tuple[Tensor, Tensor, Tensor]:
    """Our masked noisy features (B, D, T), their lengths (B,) and the mask (B, T)."""
    features_BDT, lengths_B = features_of(subject, "noisy")
    torch.manual_seed(_MASK_SEED)
    masked_BDT, mask_BT = subject.model.mask_processor(features_BDT, lengths_B)
    return masked_BDT, lengths_B, mask_BT


# ---- preprocessor ------------------------------------------------------------------------------------------------


def preprocessor_section(context: Context, section: Section) -> None:
    """Features of the clean audio in both modes, with dither from the same seed in training."""
    subject = context.subject
    _ = context.built
    audio = {"audio": subject.batch["clean"], "audio_len": subject.batch["clean_len"]}
    for label, train in (("evaluation", False), ("training, dithered", True)):
        theirs = context.nemo.ask("features", {"train": train, "seed": _TRAIN_SEED}, audio)
        ours_BDT, lengths_B = _features(subject.fresh(train=train).preprocessor, audio)
        section.add(close(f"features, {label}", ours_BDT, theirs["features"], FEATURES))
        section.add(equal(f"lengths, {label}", lengths_B.tolist(), theirs["lengths"].tolist()))
        if not train:
            section.add(_default_features(subject, audio, theirs["features"]))
            section.pictures = {"ours": ours_BDT[0].numpy(), "NeMo": theirs["features"][0].numpy()}


def _features(preprocessor: LogMelPreprocessor, audio: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(_TRAIN_SEED)
    features_BDT, lengths_B = preprocessor(audio["audio"].clone(), audio["audio_len"])
    return features_BDT, lengths_B


def _default_features(subject: Subject, audio: Mapping[str, Tensor], theirs_BDT: Tensor) -> Check:
    """With our default, bins that never change are zero; every other bin is NeMo's."""
    config = copy.deepcopy(subject.config)
    config.model.preprocessor.nemo_exact = False
    default = LogMelPreprocessor(NestConfig.from_config(config).preprocessor).eval()
    ours_BDT, _ = _features(default, audio)
    changes_BD1 = (ours_BDT != 0).any(2, keepdim=True)
    note = f"{int((~changes_BD1).sum())} bins that never change are left out"
    return close(
        "features, evaluation, with our default for silence", ours_BDT, theirs_BDT * changes_BD1, FEATURES, note=note
    )


# ---- masking -----------------------------------------------------------------------------------------------------


def masking_section(context: Context, section: Section) -> None:
    """Masks from the same seeds for the utterances at hand and for awkward lengths, both modes."""
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
    """Tokens of the clean features on every window that holds audio; the same with four codebooks drawn anew."""
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

    settings = {**vars(config), "num_books": 4 if config.num_books == 1 else 1, "dist_fn": "l2"}
    label = f"books: {settings['num_books']}"
    request = {"quantizer": settings, "seed": _TRAIN_SEED}
    theirs = context.nemo.ask("tokens", request, {"features": features_BDT})
    torch.manual_seed(_TRAIN_SEED)
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
    """How much nearer our code is to a window than NeMo's, as a difference of dot products."""
    item, token, book = place
    unit_E = quantizer.project(features_BDT[item : item + 1])[0, token, book].double()
    codes_CE = quantizer.codebooks[book]
    return abs(float(unit_E @ (codes_CE[ours_BSG[item, token, book]] - codes_CE[theirs_BSG[item, token, book]])))


# ---- encoder -----------------------------------------------------------------------------------------------------


def encoder_section(context: Context, section: Section) -> None:
    """Every layer's output in evaluation and in training with dropout, fused attention, a limited context."""
    subject = context.subject
    _ = context.built
    masked_BDT, lengths_B, _mask_BT = masked_features(subject)
    fused = not blocks_of(subject).encoder.use_pytorch_sdpa
    other = "fused attention" if fused else "plain attention"
    for label, train, changes in (
        ("evaluation", False, {}),
        ("training with dropout", True, {}),
        (f"{other}, evaluation", False, {"use_pytorch_sdpa": fused}),
        (f"{other}, training with dropout", True, {"use_pytorch_sdpa": fused}),
        ("context [12, 6], evaluation", False, {"att_context_size": [12, 6], "att_context_style": "regular"}),
    ):
        request = {"train": train, "seed": _TRAIN_SEED, "changes": changes}
        theirs = context.nemo.ask("encode", request, {"features": masked_BDT, "lengths": lengths_B})
        ours, draw = _encoded(subject.model, masked_BDT, lengths_B, train=train, changes=changes)
        checks = [close(f"{label}: {name}", value, theirs[name], FRAMES) for name, value in ours.items()]
        section.add(*checks)
        section.add(equal(f"{label}: next random draw", draw, theirs.facts["next_draw"]))
        by_layer = [check for check in checks if "layers." in check.name and "running" not in check.name]
        section.curves[label] = [math.inf if check.difference is None else check.difference for check in by_layer]


@torch.no_grad()
def _encoded(
    model: NestModel, features_BDT: Tensor, lengths_B: Tensor, *, train: bool, changes: Mapping[str, Any]
) -> tuple[dict[str, Tensor], float]:
    """Outputs of the sub-sampling, of every layer and of the encoder; running statistics after training."""
    encoder = _encoder_with(model, changes).train(train)
    found: dict[str, Tensor] = {}
    hooks: list[tuple[nn.Module, str]] = [(encoder.pre_encode, "pre_encode")]
    hooks += [(layer, f"layers.{number}") for number, layer in enumerate(encoder.layers)]
    for module, name in hooks:
        module.register_forward_hook(_keeper(found, name))
    torch.manual_seed(_TRAIN_SEED)
    encoded_BSM, encoded_len_B = encoder(features_BDT, lengths_B)
    draw = torch.rand(1).item()
    found |= {"encoded": encoded_BSM.transpose(1, 2), "encoded_len": encoded_len_B}
    if train:
        found |= {name: value for name, value in encoder.state_dict().items() if ".batch_norm.running_" in name}
    return found, draw


def _keeper(found: dict[str, Tensor], name: str) -> Any:
    def keep(_module: object, _inputs: object, output: Any) -> None:
        found[name] = output[0] if isinstance(output, tuple) else output

    return keep


def _encoder_with(model: NestModel, changes: Mapping[str, Any]) -> ConformerEncoder:
    if not changes:
        return copy.deepcopy(model.encoder)
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
    encoder = ConformerEncoder(EncoderConfig(**{**vars(model.encoder.config), **settings}))
    encoder.load_state_dict(model.encoder.state_dict())
    return encoder


# ---- decoder and loss --------------------------------------------------------------------------------------------


def decoder_section(context: Context, section: Section) -> None:
    """Log-probabilities of the same encoded frames."""
    subject = context.subject
    _ = context.built
    encoded_BSM = _our_encoded(subject)
    theirs = context.nemo.ask("decode", {}, {"encoded": encoded_BSM.transpose(1, 2)})
    with torch.no_grad():
        ours = subject.model.decoder.log_probs(encoded_BSM)
    section.add(close("log-probabilities", ours, theirs["log_probs"], LOG_PROBS * max(1.0, float(ours.abs().max()))))


@torch.no_grad()
def _our_encoded(subject: Subject) -> Tensor:
    masked_BDT, lengths_B, _mask_BT = masked_features(subject)
    encoded_BSM: Tensor = subject.fresh(train=False).encoder(masked_BDT, lengths_B)[0]
    return encoded_BSM


def loss_section(context: Context, section: Section) -> None:
    """The loss of the same predictions, and the loss of the whole model, where masks and tokens are its own."""
    subject = context.subject
    _ = context.built
    section.add(_loss_alone(context))
    for label, train in (("evaluation", False), ("training with dropout", True)):
        theirs = context.nemo.ask("forward", {"train": train, "seed": _TRAIN_SEED}, subject.batch)
        model = subject.fresh(train=train)
        torch.manual_seed(_TRAIN_SEED)
        with torch.no_grad():
            output = model(*_copies(subject.waveforms))
        draw = torch.rand(1).item()
        section.add(same_elements(f"mask, {label}", output.mask_BT, theirs["mask"]))
        selected = f"{int(output.selected)} tokens selected"
        section.add(
            close(f"loss, {label}", output.loss, theirs["loss"].reshape(()), LOSS, relative=True, note=selected)
        )
        section.add(equal(f"next random draw, {label}", draw, theirs.facts["next_draw"]))


@torch.no_grad()
def _loss_alone(context: Context) -> Check:
    """With windows of which 0, 1, ... 8 frames are masked, so that the threshold decides."""
    subject = context.subject
    loss, config = subject.model.loss, subject.model.loss.config
    log_probs = subject.model.decoder.log_probs(_our_encoded(subject))
    features_BDT, lengths_B = features_of(subject, "clean")
    tokens = subject.model.quantizer(features_BDT)
    steps, n_tokens = config.combine_time_steps, log_probs.size(1)
    frame_T = torch.arange(n_tokens * steps)
    mask_BT = (frame_T % steps < (frame_T // steps) % (steps + 1)).expand(len(log_probs), -1)
    given = {
        "masks": mask_BT[:, None].expand(-1, features_BDT.size(1), -1).to(torch.uint8),
        "log_probs": log_probs,
        "tokens": tokens,
        "lengths": lengths_B // steps,
    }
    theirs = context.nemo.ask("masked_loss", {}, given)
    selected_BS = loss.select(mask_BT)
    logits_NCG = _with_books(log_probs, 4)[selected_BS]
    tokens_NG = fitted(_with_books(tokens, 3), n_tokens)[selected_BS]
    ours = loss(logits_NCG, tokens_NG)
    note = f"{int(selected_BS.sum())} of {selected_BS.numel()} tokens selected"
    return close("loss of the same predictions", ours, theirs["loss"].reshape(()), LOSS, relative=True, note=note)


def _with_books(values: Tensor, dims: int) -> Tensor:
    return values if values.dim() == dims else values[..., None]


def _copies(waveforms: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """NeMo's behaviour dithers the caller's waveform in place."""
    return tuple(value.clone() for value in waveforms)


# ---- gradients ---------------------------------------------------------------------------------------------------


def gradients_section(context: Context, section: Section) -> None:
    """Gradients of every parameter, in training with dropout."""
    subject = context.subject
    _ = context.built
    theirs = context.nemo.ask("gradients", {"seed": _TRAIN_SEED}, subject.batch)
    their_gradients = theirs.under("gradients.")
    loss, ours = _loss_and_gradients(subject.fresh(train=True), subject.waveforms)
    _, moved = _loss_and_gradients(stirred(subject.fresh(train=True)), subject.waveforms)
    section.add(close("loss", loss, theirs["loss"].reshape(()), LOSS, relative=True))
    names = (dict.fromkeys(sorted(side)) for side in (ours, their_gradients))
    section.add(same_entries("parameters with a gradient", *names))
    groups: dict[str, list[Check]] = defaultdict(list)
    decided = []
    for name in [name for name in ours if name in their_gradients]:
        rounding = float((moved[name] - ours[name]).norm())
        if ROUNDINGS * rounding > GRADIENT * float(ours[name].norm()):
            decided.append(name)
        check = close_in_norm(name, ours[name], their_gradients[name], GRADIENT, rounding=rounding)
        groups[_group(name)].append(check)
    section.add(*(worst(group, checks, note=_decided_note(group, decided)) for group, checks in groups.items()))


def _loss_and_gradients(model: NestModel, waveforms: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(_TRAIN_SEED)
    output = model(*_copies(waveforms))
    output.loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return output.loss.detach(), gradients


@torch.no_grad()
def stirred(model: NestModel) -> NestModel:
    """The model with its trained weights changed in their last bits: what it gives then shows what rounding decides.

    Some gradients are zero in exact arithmetic: those of keys' biases, which move every score of a row alike, and of
    biases before batch normalisation. Others are all but zero.
    """
    generator = torch.Generator().manual_seed(_TRAIN_SEED)
    for value in model.parameters():
        if value.requires_grad:
            value.mul_(1 + 2.0**-23 * torch.randn(value.shape, generator=generator))
    return model


def _decided_note(group: str, decided: list[str]) -> str | None:
    inside = [name for name in decided if _group(name) == group]
    return f"rounding decides {len(inside)}, such as {inside[0]}" if inside else None


def _group(name: str) -> str:
    layer = re.match(r"encoder\.(pre_encode|layers\.\d+)", name)
    return layer[0] if layer else name.split(".")[0]
