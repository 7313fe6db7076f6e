"""`nest augment`: mix noise and other speakers into a corpus and write the result."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nestcli.cli import console
from nestcli.cli.options import AsJson, Patience, Strict
from nestcli.errors import ConfigError, RunFailedError

if TYPE_CHECKING:
    from nestcli.augment.run import AugmentOptions, AugmentSummary

_BLOCK = "model.train_ds.batch_augmentor"


def augment(
    speech: Annotated[str, typer.Option("--speech", metavar="MANIFEST", help="Utterances to augment.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the noisy audio and its manifest.")],
    noise: Annotated[
        str | None,
        typer.Option("--noise", metavar="MANIFEST", help="Noise clips. Default: mix in other speakers only."),
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value ...]",
            help="Augmentation settings, such as prob=0.5 (share of the utterances that are changed) or max_r_noise=10 "
            "(highest speech-to-noise ratio in dB). docs/augmentation.md lists all of them.",
            show_default=False,
        ),
    ] = None,
    copies: Annotated[
        int, typer.Option("--copies", metavar="N", min=1, max=1000, help="Noisy copies of each utterance.")
    ] = 1,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, max=2**63 - 1, help="Seed of all random draws.")
    ] = 0,
    preview: Annotated[
        int,
        typer.Option(
            "--preview", metavar="N", min=0, max=10_000, help="Draw pictures of the first N augmented utterances."
        ),
    ] = 0,
    sample_rate: Annotated[
        int, typer.Option("--sample-rate", metavar="HZ", min=1000, max=192_000, help="Sample rate of the output.")
    ] = 16000,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", metavar="N", min=1, max=1024, help="Worker processes. Default: one per core."),
    ] = None,
    patience: Patience = 120.0,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Mix noise and other speakers into speech files.

    DIR/manifest.json records for each utterance what was mixed in, where, and how loud. `nest pretrain` applies the
    same mixing during training; keys and defaults are those of model.train_ds.batch_augmentor.
    """
    from dataclasses import asdict, replace

    from nestcli.augment.run import augment as write

    options = replace(_options(words or [], copies, seed, sample_rate, jobs), patience=patience)
    with console.progress("mixing") as advance:
        summary = write(speech, noise, out, options, advance)
    pictures = _previews(summary, out, preview, sample_rate)
    if as_json:
        console.emit_json({**asdict(summary), "pictures": pictures})
    else:
        _show(summary, out, pictures)
    bad = summary.rejected + summary.noise_rejected
    if not summary.written or (strict and bad):
        why = " (--strict)" if summary.written else "; no utterance is left"
        raise RunFailedError(f"{bad} inputs were rejected{why}; see {out / 'rejected.jsonl'}")


def _options(words: list[str], copies: int, seed: int, sample_rate: int, jobs: int | None) -> AugmentOptions:
    from dataclasses import fields

    from nestcli.augment.noisy_copy import CopyOptions
    from nestcli.augment.run import AugmentOptions
    from nestcli.config import BASE, load_config, section
    from nestcli.data.mixing import AugmentationConfig
    from nestcli.targets import TARGETS

    _check_keys(words, ["_target_", *(field.name for field in fields(AugmentationConfig))])
    try:
        config = load_config(BASE, [f"{_BLOCK}.{word}" for word in words])
        mixing = section(AugmentationConfig, config, _BLOCK)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{_BLOCK}.", "")) from None
    kind = TARGETS[config.model.train_ds.batch_augmentor["_target_"]]
    copy = CopyOptions(mixing, one_stretch=kind == "speaker_noise", seed=seed, sample_rate=sample_rate)
    return AugmentOptions(copy, copies, jobs)


def _check_keys(words: list[str], known: list[str]) -> None:
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} must be key=value: an augmentation setting, such as prob=1.0")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}."
            raise ConfigError(f"unknown augmentation setting {key}. {hint}")


def _previews(summary: AugmentSummary, out: Path, count: int, sample_rate: int) -> list[str]:
    if not count or summary.manifest is None:
        return []
    from nestcli.augment.preview import draw_previews

    drawn = draw_previews(Path(summary.manifest), out / "preview", count, sample_rate, console.note)
    return [str(path) for path in drawn]


def _show(summary: AugmentSummary, out: Path, pictures: list[str]) -> None:
    rows = [("written", f"{summary.written:,}"), ("hours", f"{summary.hours:,.2f}")]
    named = {"noise": "  with noise", "speech": "  with other speakers", "none": "  unchanged"}
    rows += [(label, f"{summary.modes[mode]:,}") for mode, label in named.items() if mode in summary.modes]
    if summary.rejected:
        rows.append(("rejected", f"{summary.rejected:,}"))
        rows.extend((f"  {reason}", f"{count:,}") for reason, count in summary.reasons.items())
    if summary.noise_rejected:
        rows.append(("unreadable noise files", f"{summary.noise_rejected:,}"))
    console.table("", [f"noisy speech in {out}", ">"], rows)
    if summary.rejected or summary.noise_rejected:
        console.note(f"{out / 'rejected.jsonl'} gives the reason for each rejected input.")
    if pictures:
        console.note(f"pictures: {pictures[0]} ... {pictures[-1]}" if len(pictures) > 1 else f"picture: {pictures[0]}")
    if summary.manifest:
        console.note(f"{summary.manifest} records what was mixed in, where, and how loud.")
