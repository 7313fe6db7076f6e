"""The tables and pictures of the reference run are made from its stored results, and these are complete."""

import json
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from docs.pages import ROOT
from docs.scripts import script

results = script("results")


@pytest.mark.parametrize("page", results.PAGES)
def test_a_page_holds_the_tables_that_the_stored_results_give(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert results.filled(text, results.PAGES[page]) == text, "run `make results`"


def test_the_pictures_are_those_of_the_stored_results(tmp_path: Path) -> None:
    results.draw(tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert len(drawn) == 3
    for name in drawn:
        ours, kept = (matplotlib.image.imread(folder / name) for folder in (tmp_path, ROOT / "docs" / "images"))
        assert ours.shape == kept.shape
        assert np.abs(ours - kept).mean() < 0.005, f"{name}: run `make results`"


def test_every_question_was_asked_in_quiet_and_in_noise() -> None:
    for question in results.QUESTIONS:
        for place in results.PLACES:
            document = json.loads((results.STORED / "reference" / f"{question}-{place}.json").read_text("utf-8"))
            assert {each["name"] for each in document["systems"]} == {"pretrained", *results.BASELINES}
            assert not {"manifest", "checkpoint"} & document.keys()


def test_results_of_a_new_run_are_stored_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "STORED", tmp_path / "stored")
    for run in results.RUNS:
        (tmp_path / "out" / run / "NAME").mkdir(parents=True)
        shutil.copy(ROOT / "docs" / "results" / run / "metrics.jsonl", tmp_path / "out" / run / "NAME")
    document = json.loads((ROOT / "docs" / "results" / "reference" / "words-quiet.json").read_text("utf-8"))
    for system in document["systems"]:
        system.update(mean=0.5, deviation=0.25)
    for question in results.QUESTIONS:
        for place in results.PLACES:
            folder = tmp_path / "out" / "probes" / "reference" / f"{question}-{place}"
            folder.mkdir(parents=True)
            (folder / "probe.json").write_text(json.dumps({**document, "manifest": "/a", "checkpoint": "/b"}))
    results.store(tmp_path / "out")
    assert "/a" not in (tmp_path / "stored" / "reference" / "words-quiet.json").read_text("utf-8")
    rows = list(results.probes_table())
    assert len(rows) == 2 + len(results.QUESTIONS) * len(results.PLACES)
    assert rows[2].count("50.0% ± 25.0") == 4  # the control was not asked


def test_a_page_without_marks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="marks <!-- runs"):
        results.filled("# A page", ["runs"])
