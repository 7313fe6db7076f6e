"""Tables in terminals of any width."""

import pytest

from nestcli.cli import console

COLUMNS = ["preset", ">parameters", ">share", "remark"]
ROWS = [
    ["xlarge", "615,844,944", "57.6%", "the largest but one of the presets, with 24 layers"],
    ["small", "1", "", ""],
]


def test_numbers_are_not_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (30, 45, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        console.table("Sizes", COLUMNS, ROWS)
        printed = capsys.readouterr().out
        assert "615,844,944" in printed
        assert "57.6%" in printed
        assert "xlarge" in printed
    monkeypatch.setenv("COLUMNS", "30")
    console.table("Sizes", COLUMNS, ROWS)
    assert capsys.readouterr().out == (
        "Sizes\nxlarge\n  parameters: 615,844,944\n  share: 57.6%\n"
        "  remark: the largest but one of the presets, with 24 layers\nsmall\n  parameters: 1\n"
    )


def test_rows_may_be_short(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for width in ("10", "80"):
        monkeypatch.setenv("COLUMNS", width)
        console.table("Sizes", COLUMNS, [["small"], []])
        assert "small" in capsys.readouterr().out
