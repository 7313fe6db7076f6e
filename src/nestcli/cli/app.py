"""The Typer application: registers the commands and turns errors into one message and an exit code.

This module imports nothing heavy: the command modules import torch, lightning and lhotse inside the functions that
need them, so that help and shell completion stay fast.
"""

import os
import sys
import traceback
from typing import Annotated

import typer

from nestcli import __version__
from nestcli.cli import (
    augment,
    bench,
    compare,
    console,
    count_params,
    demo,
    doctor,
    export,
    extract,
    prepare_data,
    pretrain,
    probe,
)
from nestcli.cli.paths import PathsCommand
from nestcli.errors import NestError

app = typer.Typer(
    name="nest",
    help="Pretrain speech encoders on unlabelled audio with NEST, a model of NVIDIA NeMo; NeMo is not needed.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nest {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    console.check_ranks()  # `main` handles --debug itself, so that it works anywhere in the call


app.command("prepare-data", cls=PathsCommand)(prepare_data.prepare_data)
app.command("augment", cls=PathsCommand)(augment.augment)
app.command("pretrain", cls=PathsCommand)(pretrain.pretrain)
app.command("count-params", cls=PathsCommand)(count_params.count_params)
app.command("compare", cls=PathsCommand)(compare.compare)
app.command("extract", cls=PathsCommand)(extract.extract)
app.command("probe", cls=PathsCommand)(probe.probe)
app.command("export", cls=PathsCommand)(export.export)
app.command("bench", cls=PathsCommand)(bench.bench)
app.command("doctor", cls=PathsCommand)(doctor.doctor)
app.command("demo", cls=PathsCommand)(demo.demo)


def main() -> None:
    """Entry point of the `nest` script."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        try:
            app(prog_name="nest")
        finally:
            sys.stdout.flush()  # here, because a closed pipe is handled below
    except NestError as error:
        if debug:
            console.trace(traceback.format_exc())
        console.error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.error("stopped by Ctrl-C")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has ended, as in `nest ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            console.trace(traceback.format_exc())
        if isinstance(error, OSError) and error.filename:  # a full disk, missing permissions
            console.error(f"{error.filename}: {error.strerror}. Add --debug for the traceback.")
            sys.exit(1)
        console.error(
            f"internal error, {type(error).__name__}: {error}\nThis is a bug in nest. Add --debug for the traceback."
        )
        sys.exit(1)
