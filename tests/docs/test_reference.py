"""docs/cli.md is what the code says, and the code says something of every option."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from docs.pages import ROOT
from nestcli.cli import reference
from nestcli.cli.app import app

HEAVY = ("torch", "lightning", "lhotse", "numpy", "soundfile", "omegaconf")


def test_the_page_is_up_to_date() -> None:
    written = (ROOT / "docs" / "cli.md").read_text()
    assert written == reference.reference(), "docs/cli.md is not what the commands are: make docs-cli"


def test_the_page_depends_on_the_code_alone_and_is_made_without_the_heavy_libraries() -> None:
    """The page does not depend on the terminal's width or on variables that options read."""
    code = (
        "import sys; from nestcli.cli import reference; reference.main()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    environment = {**os.environ, "COLUMNS": "40", "NEST_NEMO_PYTHON": "/some/python"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == reference.reference()
    assert done.stderr.strip() == "[]"


def test_every_option_has_a_help_text() -> None:
    assert reference.undescribed() == []


def test_a_missing_help_text_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def bare(where: str, count: int = 1) -> None: ...

    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))
    app.command("bare")(bare)
    assert reference.undescribed() == ["bare", "bare where", "bare --count N"]
    page = reference.reference()
    assert "## nest bare" in page
    assert "| `--count N` |  | `1` |" in page


def test_every_command_and_option_is_in_the_page() -> None:
    page = reference.reference()
    for command in app.registered_commands:
        section = re.search(rf"^## nest {command.name}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        assert section is not None
        assert "| option | | default |" in section.group(1)
        assert command.callback is not None
        assert (command.callback.__doc__ or "").partition("\n")[0] in section.group(1)
    assert page.count("| `--json` |") == 9
    assert "| `--out DIR` | Folder for the manifests. | required |" in page
    assert r"'/(\[^/\]+)/\[^/\]+$'" in page, "brackets that Markdown would read"
