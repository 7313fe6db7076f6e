"""Numbers on the command line: every option has its bounds, and what is beyond them is named."""

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from nestcli.cli.app import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # the root is a group
NEEDED = {
    "augment": ["--speech", "s.json", "--out", "o"],
    "extract": ["in.json", "--checkpoint", "c.nemo", "--out", "o"],
    "probe": ["m.json", "--checkpoint", "c.nemo", "--label", "speaker"],
}
CHECKED_LATER = {"prepare-data"}  # by prepare/options.py


def numbers() -> Iterator[tuple[str, Any]]:
    for name, command in COMMANDS.items():
        for option in command.params:
            if option.type.name.startswith(("int", "float")) and name not in CHECKED_LATER:
                yield name, option


def test_every_number_has_both_bounds() -> None:
    found = list(numbers())
    assert {name for name, _ in found} >= {"augment", "bench", "count-params", "demo", "extract", "probe"}
    assert [
        f"{name} {option.opts[0]}"
        for name, option in found
        if getattr(option.type, "min", None) is None or getattr(option.type, "max", None) is None
    ] == []


@pytest.mark.parametrize(("command", "option"), list(numbers()))
def test_a_number_out_of_its_bounds_is_refused(command: str, option: Any) -> None:
    kind = option.type
    beyond = [f"{kind.max * 10}", f"{kind.min - 1}", "x", "", "1e999"]
    if kind.name.startswith("float"):
        beyond += ["nan", "inf", "-inf"]
    for value in beyond:
        words = [command, *NEEDED.get(command, []), f"{option.opts[0]}={value}"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2, (words, result.output)
        assert option.opts[0] in result.output
