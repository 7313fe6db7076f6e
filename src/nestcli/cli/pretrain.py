"""`nest pretrain`: train a NEST model."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Annotated

import typer

from nestcli.cli import console

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from nestcli.training.run import DryRun, Pretraining, RunPlan, RunResult
    from nestcli.training.target_check import TargetCheck

_PATIENCE, _PATIENCE_DRY_RUN = 3.0, 60.0  # seconds for reading a sample of the data


def pretrain(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [key=value ...]",
            help="A preset (small, medium, large, xlarge, xxlarge, demo), a YAML file, or a .ckpt or .nemo file that "
            "contains a configuration; then overrides, e.g. model.train_ds.manifest_filepath=train.json "
            "trainer.max_steps=1000. To start from existing weights, set init_from_ptl_ckpt=FILE or "
            "init_from_nemo=FILE.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check configuration, data and devices, and try the largest batch; do not train."
        ),
    ] = False,
) -> None:
    """Pretrain a NEST encoder, or resume a run.

    If the experiment's folder already contains a run, the command resumes that run from its newest checkpoint.
    """
    waits = not console.is_first_process()
    if waits:  # a terminal sends Ctrl-C to all processes; the first process stops the others
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    from nestcli.cli.named import read_config

    config = read_config(words or [], training=True).config
    _check_names(config)
    console.note("loading ...")

    from nestcli.training.run import Pretraining

    run = Pretraining(config, console.TrainingDisplay(bar=config.trainer.enable_progress_bar is not False))
    if waits and console.is_first_process():  # the rank variables were left over from another program
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if dry_run:
        targets = run.check_targets(_PATIENCE_DRY_RUN, remote=True)
        _show_dry_run(run.dry_run(), targets)
        return
    plan = run.plan
    _show_plan(plan)
    if plan.steps is not None and plan.resumes_at >= plan.steps:
        if console.is_first_process():
            run.remove_leftovers()
        console.note(
            f"This run is complete: {plan.resumes_at} of {plan.steps} steps. Raise trainer.max_steps to continue it."
        )
        return
    _show_targets(run.check_targets(_PATIENCE))
    _train(run)


def _check_names(config: DictConfig) -> None:
    """Raise what the model's blocks and the names of manifests tell without PyTorch, which takes seconds to load.

    The run checks all of it again, and much more.
    """
    from nestcli.data.corpus import wants_validation
    from nestcli.data.preflight import check_names
    from nestcli.model.config import NestConfig

    NestConfig.from_config(config)
    check_names(config, "model.train_ds")
    if wants_validation(config):
        check_names(config, "model.validation_ds")


def _train(run: Pretraining) -> None:
    from nestcli.training.launcher import is_launched
    from nestcli.training.signals import StoppedError, requeue

    try:
        _show_result(run.fit())
    except StoppedError as stopped:
        console.note(f"\n{stopped}")
        if stopped.signum == signal.SIGUSR1 and console.is_first_process():  # Slurm sends it before the time limit
            requeue(console.note)
        raise typer.Exit(0 if is_launched() else stopped.exit_code) from None
    except KeyboardInterrupt:
        console.note("\nstopped by Ctrl-C; the same command continues from the newest checkpoint, if there is one")
        raise typer.Exit(130) from None


def _show_plan(plan: RunPlan) -> None:
    hours = f"{plan.train_seconds / 3600:.2f} h"
    console.note(f"model      {plan.parameters:,} parameters on {plan.device}")
    if plan.encoder == "nemo":
        console.note("encoder    NeMo's own ConformerEncoder")
    left_out = f"; {plan.train_left_out:,} too short or too long" if plan.train_left_out else ""
    console.note(
        f"train      {plan.train_utterances:,} utterances, {hours}{left_out}; {plan.noise_clips:,} noise files"
    )
    console.note(f"validation {plan.val_utterances:,} utterances, {plan.val_seconds / 3600:.2f} h")
    console.note(f"folder     {plan.folder}")
    if plan.resumes:
        console.note(f"resumes    {plan.resumes.name} at step {plan.resumes_at:,}")
    for line in plan.initial_weights:
        console.note(f"weights    {line}")
    if plan.ignored_key:
        console.note(f"weights    those of the resumed run; {plan.ignored_key} is ignored")


def _show_dry_run(trial: DryRun, targets: TargetCheck | None) -> None:
    _show_plan(trial.plan)
    console.note(
        f"batch      {trial.batch_seconds:.1f} s of audio, {trial.masked_share:.0%} of the frames masked, "
        f"loss {trial.loss:.3f}, gradient norm {trial.gradient_norm:.3g}"
    )
    console.note(f"padding    {trial.padding:.1%} of the batches of an epoch")
    if trial.peak_gpu_bytes is not None:
        console.note(f"GPU memory {trial.peak_gpu_bytes / 2**30:.1f} GiB at the peak")
    _show_targets(targets)
    console.note("Everything is ready: remove --dry-run to train.")


def _show_targets(check: TargetCheck | None) -> None:
    if check is None or not console.is_first_process():
        return
    found = check.statistics
    books = f" ({found.n_books} codebooks)" if found.n_books > 1 else ""
    dead = f"{found.dead_codes:,.0f}" if found.dead_codes >= 0 else "unknown: too few tokens"
    distance = f"{found.nearest_visible:.1f} tokens" if found.nearest_visible > 0 else "unknown"
    rows = [
        ("codes in use (perplexity)", f"{found.perplexity:,.0f} of {found.n_codes:,}{books}"),
        ("codes without a token", dead),
        ("loss of guessing by frequency", f"{found.unigram_loss:.2f} nats"),
        ("same token after a shift of 5 ms", _share(found.stable_after_shift)),
        ("same token with white noise at 20 dB", _share(found.stable_with_noise)),
        ("explained by tokens 1, 2, 3 away", ", ".join(map(_share, found.explained))),
        ("hidden token to visible frames", distance),
        ("explained by visible frames", _share(found.explained_by_visible)),
    ]
    tokens = f"{found.tokens:,} tokens of {found.token_seconds * 1000:.0f} ms"
    title = f"targets: {tokens}, {found.seconds:,.0f} s of training audio"
    console.table(title, ("measure", ">value"), rows, to_stderr=True)
    console.note(check.judgement)


def _share(value: float) -> str:
    return f"{value:.0%}" if value >= 0 else "unknown"


def _show_result(result: RunResult) -> None:
    console.note(f"\ntrained to step {result.step:,}")
    if result.val_loss is not None:
        accuracy = "" if result.val_accuracy is None else f", masked-token accuracy {result.val_accuracy:.1%}"
        console.note(f"validation loss {result.val_loss:.3f}{accuracy}")
    if result.skipped:
        console.note(f"skipped  {result.skipped:,} utterances that could not be read")
    files = {"best": result.best, "last": result.last, "nemo": result.nemo, "metrics": result.metrics}
    for label, path in files.items():
        if path is not None:
            console.note(f"{label:8} {path}")
    console.note(f"curves   tensorboard --logdir {result.folder}")
