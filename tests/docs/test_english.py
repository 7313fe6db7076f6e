"""The English check of `make check` finds each thing that it forbids, and passes plain English."""

import runpy
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[2] / ".ci" / "english.py"
ENGLISH = runpy.run_path(str(CHECK), run_name="english")

BAD = [
    "x: this is no list",
    "x: these\nare no numbers",
    "There is no such layer.",
    "Raises ValueError for one that there is not.",
    "Runs where there is none.",
    "A run that goes on.",
    "Raise max_steps to go on.",
    "It shall not pass.",
    "What Lightning counts, put right",
    "The cheapest rest is made anew.",
    "This is to be a number.",
    "Memory to be had",
    "Look who ended it.",
    "The newest checkpoint is of before.",
    "The whole way on made speech",
    "More samples cut off at full scale",
    "Mend its permissions.",
    "A run that was broken off",
    "Files that have rotted",
    "The folder is there already.",
    "A page with what came of every step",
    "Tokens that are others than ours",
    "A check that can be got round",
]
GOOD = """\
The value must be a list. There is no GPU here, and the run is no longer active. The run continues at step 9.
It is not better and no worse than before. The amendment is recommended. Marshall reads the whole file.
Turn the flag on and go; ongoing work is to blame. Loading goes from left to right.
"""


def phrases(findings: object) -> list[str]:
    return [phrase for _, phrase, _ in findings]  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", BAD)
def test_a_banned_phrase_is_found_wherever_prose_stands(text: str) -> None:
    sources = [f'"""Return x.\n\n{text}\n"""', "x = 1  # " + text.replace("\n", "\n# "), f"raise E({text!r})"]
    sources += ["def f():\n    # " + text.replace("\n", "\n    # ") + "\n    return 1", f"e = f'{{x}} ' {text!r}"]
    for source in sources:
        assert len(phrases(ENGLISH["in_python"](source))) == 1, source
    assert len(phrases(ENGLISH["in_markdown"](text))) == 1


def test_every_phrase_has_an_example() -> None:
    unused = [pattern.pattern for pattern, _ in ENGLISH["_COMPILED"] if not any(pattern.search(text) for text in BAD)]
    assert not unused


@pytest.mark.parametrize("word", sorted(ENGLISH["FIRST_WORDS"]))
def test_a_docstring_that_begins_as_a_fragment_is_found(word: str) -> None:
    text = f"{word.capitalize()} a value of the function"
    for source in (f'"""{text}."""', f'def f():\n    """{text}."""', f'class A:\n    """{text}."""'):
        assert phrases(ENGLISH["in_python"](source)) == [f"{word.capitalize()} ..."]
    assert not phrases(ENGLISH["in_python"](f"x = '{text}'  # {text}"))


def test_plain_english_passes() -> None:
    source = f'"""Return a mask.\n\n{GOOD}"""\nx = {GOOD!r}\n' + "".join(f"# {line}\n" for line in GOOD.splitlines())
    assert not phrases(ENGLISH["in_python"](source))
    assert not phrases(ENGLISH["in_markdown"](GOOD))
    for first in ("In-place addition.", "Whatever the width, return it.", "Island of tests.", "Return what is given."):
        assert not phrases(ENGLISH["in_python"](f'"""{first}"""'))


def test_code_is_not_prose() -> None:
    assert not phrases(ENGLISH["in_python"]('"""Run `go on` and ``shall``."""\nshall = 1  # noqa: S1 that go on'))
    text = "`is no x`\n```\nshall\n```\n"
    assert not phrases(ENGLISH["in_markdown"](text))
    assert phrases(ENGLISH["in_markdown"](f"{text}shall")) == ["shall"]


def test_the_line_is_that_of_the_phrase() -> None:
    assert [each.line for each in ENGLISH["in_python"]('x = 1\n"""a"""\n\n# one\n# is\n# no x\n')] == [5]
    assert [each.line for each in ENGLISH["in_python"]('"""Return x.\n\nIt goes\non.\n"""\n')] == [3]
    assert [each.line for each in ENGLISH["in_markdown"]("```\na\n```\n\nIt shall.\n")] == [5]


def test_old_entries_of_the_log_stay_as_they_are() -> None:
    log = "# Log\n\n## 2026-11-23 Old\n\nIt shall.\n\n## 2099-01-01 New\n\nIt goes on.\n"
    assert phrases(ENGLISH["in_markdown"](log, is_log=True)) == ["goes on"]
    assert sorted(phrases(ENGLISH["in_markdown"](log))) == ["goes on", "shall"]


def test_the_script_names_file_line_phrase_and_a_better_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "src/nestcli/new/a.py": '"""Whether it works."""\n', "docs/new.md": "x\n\nIt shall.\n", "README.md": "Fine.\n",
        "docs/decisions/1.md": "It shall.\n",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    check = ENGLISH["main"]
    monkeypatch.setitem(check.__globals__, "ALLOWED", {("README.md", "shall"): "gone"})
    assert check(tmp_path) == 1
    assert capsys.readouterr().out.splitlines() == [
        "src/nestcli/new/a.py:1: 'Whether ...'. Better: 'Return True if ...'",
        "docs/new.md:3: 'shall'. Better: 'must', 'should' or 'will'",
        ".ci/english.py: README.md: 'shall' is allowed, but it no longer occurs",
    ]
    monkeypatch.setitem(check.__globals__, "ALLOWED", {("docs/new.md", "shall"): "quoted"})
    (tmp_path / "src/nestcli/new/a.py").write_text('"""Return True if it works."""\n', encoding="utf-8")
    assert check(tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "english: clean"


def test_the_project_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert ENGLISH["main"](CHECK.parents[1]) == 0, capsys.readouterr().out
