"""The sections `encoder`, `decoder`, `loss` and `gradients`: each part on the same input, then the whole model.

Axes: B batch, D mel bins, T feature frames, S sub-sampled frames, M model width, N selected tokens, C codes, G books.
"""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nestcli.model.config import EncoderConfig
from nestcli.model.conformer import ConformerEncoder
from nestcli.model.loss import fitted
from nestcli.model.nest import NestModel
from nestcli.parity.context import Context
from nestcli.parity.inputs import TRAIN_SEED, blocks_of, features_of, masked_features
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

FRAMES, LOG_PROBS, LOSS, GRADIENT = 1e-4, 1e-5, 1e-6, 1e-4  # tolerances


# ---- encoder -----------------------------------------------------------------------------------------------------


def encoder_section(context: Context, section: Section) -> None:
    """Compare every layer's output in several settings.

    The settings are evaluation, training with dropout, the attention variant (fused or plain) that the subject does not
    use, and a limited context.
    """
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
        request = {"train": train, "seed": TRAIN_SEED, "changes": changes}
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
    """Return the outputs of the sub-sampling, every layer and the encoder (and running statistics), and the next draw.

    Running statistics are included in training mode.
    """
    encoder = _encoder_with(model, changes).train(train)
    found: dict[str, Tensor] = {}
    hooks: list[tuple[nn.Module, str]] = [(encoder.pre_encode, "pre_encode")]
    hooks += [(layer, f"layers.{number}") for number, layer in enumerate(encoder.layers)]
    for module, name in hooks:
        module.register_forward_hook(_keeper(found, name))
    torch.manual_seed(TRAIN_SEED)
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
    """Compare log-probabilities of the same encoded frames."""
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
    """Compare the loss of the same predictions, and of the whole model, which draws its own masks and tokens."""
    subject = context.subject
    _ = context.built
    section.add(_loss_alone(context))
    for label, train in (("evaluation", False), ("training with dropout", True)):
        theirs = context.nemo.ask("forward", {"train": train, "seed": TRAIN_SEED}, subject.batch)
        model = subject.fresh(train=train)
        torch.manual_seed(TRAIN_SEED)
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
    """Compare the loss of windows with 0, 1, ... 8 masked frames, which tests the selection threshold."""
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
    """Copy the waveforms, as NeMo's behaviour dithers them in place."""
    return tuple(value.clone() for value in waveforms)


# ---- gradients ---------------------------------------------------------------------------------------------------


def gradients_section(context: Context, section: Section) -> None:
    """Compare gradients of every parameter, in training with dropout."""
    subject = context.subject
    _ = context.built
    theirs = context.nemo.ask("gradients", {"seed": TRAIN_SEED}, subject.batch)
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
            rounding = max(rounding, _of_same_terms(name, ours) * GRADIENT / ROUNDINGS)
        check = close_in_norm(name, ours[name], their_gradients[name], GRADIENT, rounding=rounding)
        groups[_group(name)].append(check)
    section.add(*(worst(group, checks, note=_decided_note(group, decided)) for group, checks in groups.items()))


def _of_same_terms(name: str, gradients: dict[str, Tensor]) -> float:
    """Return the gradient norm of the weight beside a bias, 0 without one.

    Both gradients sum the same terms, whose size determines the rounding of a bias gradient that is zero.
    """
    weight = gradients.get(f"{name.removesuffix('bias')}weight") if name.endswith(".bias") else None
    return 0.0 if weight is None else float(weight.norm())


def _loss_and_gradients(model: NestModel, waveforms: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(TRAIN_SEED)
    output = model(*_copies(waveforms))
    output.loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return output.loss.detach(), gradients


@torch.no_grad()
def stirred(model: NestModel) -> NestModel:
    """Change the trained weights in their last bits; the model's new results show the effect of rounding.

    Some gradients are zero in exact arithmetic: those of the keys' biases, which shift all scores of a row equally, and
    those of biases before batch normalisation. Others are almost zero.
    """
    generator = torch.Generator().manual_seed(TRAIN_SEED)
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
