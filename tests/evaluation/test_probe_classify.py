"""The linear probe on problems whose answer is known, and its fairness."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch

from conftest import write_noise_wav
from evaluation.tiny_encoder import tiny_checkpoint
from nestcli import load_audio, load_encoder
from nestcli.cli.app import main
from nestcli.errors import ConfigError, DataError
from nestcli.evaluation.probes import linear
from nestcli.evaluation.probes.classify import POOLS
from nestcli.evaluation.probes.linear import fit, fit_with
from nestcli.evaluation.probes.options import ProbeOptions
from nestcli.evaluation.probes.results import BASELINES, LOG_MEL, PRETRAINED, SYSTEMS, UNTRAINED, Outcome, ProbeResult
from nestcli.evaluation.probes.run import probe
from nestcli.evaluation.probes.splits import splits
from nestcli.evaluation.probes.systems import pooled

# ---- the classifier --------------------------------------------------------------------------------------------


def planted(utterances: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four layers of noise, of other sizes, and five classes that are in layer 2 only."""
    drawn = torch.Generator().manual_seed(seed)
    classes_U = torch.arange(utterances) % 5
    features_ULP = torch.randn(utterances, 4, 8, generator=drawn) * torch.tensor([1.0, 50.0, 0.01, 3.0])[:, None] + 7
    centres_CP = torch.randn(5, 8, generator=torch.Generator().manual_seed(99))
    features_ULP[:, 2] += 0.03 * centres_CP[classes_U]
    return features_ULP, classes_U


def test_the_layer_that_knows_is_found() -> None:
    features_ULP, classes_U = planted(300)
    probe = fit(features_ULP[:200], classes_U[:200], 5, seed=0)
    right = (probe.predict(features_ULP[200:]) == classes_U[200:]).float().mean()
    assert right > 0.95
    assert int(probe.layers_L.argmax()) == 2
    assert float(probe.layers_L.sum()) == pytest.approx(1)


def test_noise_stays_at_chance() -> None:
    features_ULP, classes_U = planted(600)
    features_ULP[:, 2] = torch.randn(600, 8, generator=torch.Generator().manual_seed(5))
    probe = fit(features_ULP[:300], classes_U[:300], 5, seed=0)
    right = (probe.predict(features_ULP[300:]) == classes_U[300:]).float().mean()
    assert abs(float(right) - 0.2) < 3.5 * math.sqrt(0.2 * 0.8 / 300)


def test_it_is_the_minimum_that_a_plain_descent_finds() -> None:
    features_ULP, classes_U = planted(100)
    ours = fit_with(features_ULP, classes_U, 5, 1e-3)
    standard_ULP = (features_ULP - features_ULP.mean(0)) / (features_ULP.std(0, correction=0) + 1e-5) / math.sqrt(8)
    scores, weight, bias = (torch.zeros(shape, requires_grad=True) for shape in ((4,), (5, 8), (5,)))

    def loss_of(layers: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        logits = torch.einsum("ulp,l->up", standard_ULP, layers) @ weight.T + bias
        return torch.nn.functional.cross_entropy(logits, classes_U) + 1e-3 * weight.square().sum()

    optimizer = torch.optim.Adam([scores, weight, bias], lr=0.1)
    for _ in range(1500):
        optimizer.zero_grad()
        (loss_of(scores.softmax(0), weight, bias) + linear._EVEN * scores.square().sum()).backward()
        optimizer.step()
    theirs = float(loss_of(scores.softmax(0), weight, bias).detach())
    assert float(loss_of(ours.layers_L, ours.weight_CP, ours.bias_C)) == pytest.approx(theirs, rel=0.02)
    torch.testing.assert_close(ours.layers_L, scores.softmax(0).detach(), atol=0.03, rtol=0)


def test_the_start_of_a_weaker_penalty_does_not_change_its_minimum() -> None:
    features_ULP, classes_U = planted(100)
    plain = fit_with(features_ULP, classes_U, 5, 1e-4)
    started = fit_with(features_ULP, classes_U, 5, 1e-4, fit_with(features_ULP, classes_U, 5, 1e-2))
    torch.testing.assert_close(started.layers_L, plain.layers_L, atol=0.02, rtol=0)
    assert (started.predict(features_ULP) == plain.predict(features_ULP)).float().mean() > 0.98


def test_shuffled_labels_are_at_chance_and_a_perfect_feature_is_always_right() -> None:
    features_ULP, classes_U = planted(400)
    shuffled_U = classes_U[torch.randperm(400, generator=torch.Generator().manual_seed(8))]
    probe = fit(features_ULP[:200], shuffled_U[:200], 5, seed=0)
    right = float((probe.predict(features_ULP[200:]) == shuffled_U[200:]).float().mean())
    assert abs(right - 0.2) < 3.5 * math.sqrt(0.2 * 0.8 / 200)
    features_ULP[:, 1, 0] = classes_U.float()
    features_ULP[:, 1, 1] = (classes_U.float() - 2).square()
    probe = fit(features_ULP[:200], classes_U[:200], 5, seed=0)
    assert (probe.predict(features_ULP[200:]) == classes_U[200:]).all()


def test_units_and_offsets_of_features_do_not_matter() -> None:
    features_ULP, classes_U = planted(120)
    other_ULP = 1000 * features_ULP - 3
    first, second = (fit_with(each, classes_U, 5, 1e-3).predict(each) for each in (features_ULP, other_ULP))
    assert (first == second).float().mean() > 0.98


def test_what_holds_for_strangers_is_chosen_with_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    features_ULP, classes_U = planted(60)
    groups = [f"g{number // 20}" for number in range(60)]
    heard: list[list[set[int]]] = []

    def scores(*given: Any) -> list[int]:
        heard.append([set(given[-1][start : start + 20].tolist()) for start in (0, 20, 40)])
        return [0] * len(linear.STRENGTHS)

    monkeypatch.setattr(linear, "_scores", scores)
    fit(features_ULP, classes_U, 5, 0, groups)
    assert all(len(folds) == 1 for each in heard for folds in each)
    assert set.union(*heard[0]) == {0, 1, 2}
    heard.clear()
    fit(features_ULP, classes_U, 5, 0, ["g"] * 60)  # one group cannot be held out: parts of it are
    assert all(len(folds) == 3 for each in heard for folds in each)


def test_few_splits_say_little() -> None:
    def result(*leads: float) -> ProbeResult:
        rows = {PRETRAINED: leads, **{name: [0.0] * len(leads) for name in BASELINES}}
        outcomes = tuple(Outcome(name, "mean", tuple(values), ("0",), ((1.0,),)) for name, values in rows.items())
        return ProbeResult("text", "", ("a",), 1, 0, 0.1, outcomes, ())

    assert result(0.5).margins[UNTRAINED] == (0.5, 0.0, False)
    mean, deviation, _ = result(0.1, 0.2, 0.3).margins[LOG_MEL]
    assert (mean, deviation) == (pytest.approx(0.2), pytest.approx(0.1))
    assert not result(0.1, 0.2, 0.31).margins[LOG_MEL][2]
    assert result(0.2, 0.25, 0.3).margins[LOG_MEL][2]
    assert not result(-0.2, -0.2).margins[LOG_MEL][2]


# ---- splits ----------------------------------------------------------------------------------------------------


def test_utterances_of_every_class_are_on_both_sides() -> None:
    labels = [f"s{number % 9}" for number in range(27)]
    found = splits(labels, None, seeds=4)
    assert len(found) == 4
    for each in found:
        assert sorted([*each.train, *each.test]) == list(range(27))
        assert {labels[place] for place in each.test} == {labels[place] for place in each.train} == set(labels)
        assert len(each.test) == 9
    assert any((found[0].test != each.test).any() for each in found[1:])
    assert all((a.test == b.test).all() for a, b in zip(found, splits(labels, None, seeds=4), strict=True))


def test_groups_stay_together() -> None:
    labels, few = [str(n % 10) for n in range(60)], [f"g{n // 20}" for n in range(60)]
    found = splits(labels, few, seeds=5)
    assert [each.left_out for each in found] == ["g0", "g1", "g2"]
    assert [each.seeds for each in found] == [(0, 1, 2, 3, 4)] * 3
    many = [f"g{n // 4}" for n in range(60)]
    assert [each.seeds for each in splits(labels, many, 3)] == [(0,), (1,), (2,)]
    assert [each.seeds for each in splits(labels, None, 3)] == [(0,), (1,), (2,)]
    for each, groups in [*((each, few) for each in found), *((each, many) for each in splits(labels, many, 5))]:
        assert not {groups[place] for place in each.train} & {groups[place] for place in each.test}
        assert sorted([*each.train, *each.test]) == list(range(60))
    with pytest.raises(ConfigError, match="belong to one group"):
        splits(labels, ["g"] * 60, 1)
    with pytest.raises(ConfigError, match="no class has utterances in several groups"):
        splits(few, few, 1)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes that are not trained to the end, for tests of everything around them."""
    monkeypatch.setattr(linear, "_ITERATIONS", 5)


# ---- the whole -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six voices, loud and soft by turns."""
    folder = tmp_path_factory.mktemp("audio")
    rows = []
    for number in range(36):
        path = folder / f"{number}.wav"
        write_noise_wav(path, 1.0 + 0.05 * (number % 5), number)
        row = {"audio_filepath": path.name, "duration": 1.0, "speaker": f"s{number % 6}", "level": "loud"}
        if number % 2:
            samples = load_audio(path).numpy() * 0.01
            sf.write(path, samples, 16_000, subtype="FLOAT")
            row["level"] = "soft"
        rows.append({**row, "level": row["level"], "number": number})
    (folder / "m.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "m.json"


@pytest.mark.usefixtures("hasty")
def test_all_systems_are_asked_alike_and_again_the_same(checkpoint: str, manifest: Path, tmp_path: Path) -> None:
    options = ProbeOptions("level", split="utterance", seeds=2)
    result = probe(str(manifest), checkpoint, tmp_path, options)
    assert result.best(LOG_MEL).mean == 1.0
    assert not result.margins[LOG_MEL][2]  # nothing is clearly better than all right
    assert (result.utterances, result.rejected, result.chance) == (36, 0, 0.5)
    assert sum(map(sum, result.confusion)) == 2 * 12
    assert [(each.name, each.pool) for each in result.outcomes] == [(name, pool) for name in SYSTEMS for pool in POOLS]
    again = probe(str(manifest), checkpoint, tmp_path, options)
    assert again == result


def test_pooling_is_of_valid_frames_of_single_files(checkpoint: str, manifest: Path) -> None:
    encoder = load_encoder(checkpoint)
    with torch.no_grad():
        features_LSM = encoder(load_audio(manifest.parent / "3.wav"), layers=["input", 0, 1]).features[0]
    ours = pooled(features_LSM).numpy()
    plain = features_LSM.numpy()
    np.testing.assert_allclose(ours, np.concatenate([plain.mean(1), plain.std(1)], -1), atol=1e-5)


@pytest.mark.usefixtures("hasty")
def test_labels(checkpoint: str, manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no line has this field\. Fields: level, number, speaker"):
        probe(str(manifest), checkpoint, tmp_path, ProbeOptions("accent"))
    with pytest.raises(DataError, match="0 classes with at least 2 utterances"):
        probe(str(manifest), checkpoint, tmp_path, ProbeOptions("number"))
    with pytest.raises(ConfigError, match="--split town: 36 lines lack this field"):
        probe(str(manifest), checkpoint, tmp_path, ProbeOptions("level", split="town"))


@pytest.mark.usefixtures("hasty")
def test_speakers_are_kept_apart_unless_they_are_asked_for(checkpoint: str, tmp_path: Path, manifest: Path) -> None:
    rows: list[dict[str, Any]] = [json.loads(line) for line in manifest.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["audio_filepath"] = str(manifest.parent / row["audio_filepath"])
        row["word"] = f"w{number // 6 % 2}"
        row["speaker"] = f"s{number % 3}"
    (tmp_path / "m.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = probe(str(tmp_path / "m.json"), checkpoint, tmp_path, ProbeOptions("word", seeds=2))
    assert words.split == "no speaker on both sides"
    assert len(words.outcomes[0].values) == 3  # each speaker is left out once
    assert sum(map(sum, words.confusion)) == 2 * 36  # with two seeds
    speakers = probe(str(tmp_path / "m.json"), checkpoint, tmp_path, ProbeOptions("speaker", seeds=2))
    assert speakers.split == "utterances of every class"
    assert len(speakers.outcomes[0].values) == 2


@pytest.mark.usefixtures("hasty")
def test_seeds_count_where_speakers_are_left_out_in_turn(
    checkpoint: str, tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [json.loads(line) for line in manifest.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["audio_filepath"] = str(manifest.parent / row["audio_filepath"])
        row["word"], row["speaker"] = f"w{number // 6 % 2}", f"s{number % 2}"
    (tmp_path / "m.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls: list[tuple[int, float]] = []

    def fitted(features_ULP: torch.Tensor, classes_U: torch.Tensor, n_classes: int, seed: int, groups: Any) -> Any:
        calls.append((seed, float(features_ULP.sum())))
        return linear.fit(features_ULP, classes_U, n_classes, seed, groups)

    monkeypatch.setattr("nestcli.evaluation.probes.classify.fit", fitted)
    found = probe(str(tmp_path / "m.json"), checkpoint, tmp_path, ProbeOptions("word", seeds=2))
    assert [seed for seed, _ in calls] == 8 * 2 * [0, 1]  # systems with poolings, speakers, seeds
    pretrained, untrained = calls[:4], calls[8:12]
    assert len({total for _, total in pretrained}) == 2, "one encoder, two speakers"
    assert len({total for _, total in untrained}) == 4, "another encoder for each seed"
    assert [len(outcome.values) for outcome in found.outcomes] == [2] * 8
    assert sum(map(sum, found.confusion)) == 2 * 36


@pytest.mark.usefixtures("hasty")
def test_the_command(
    checkpoint: str, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["probe", str(manifest), "--checkpoint", checkpoint, "--label", "speaker", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["nest", *words, "--out", str(tmp_path / "out"), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "out" / "probe.json").read_text())
    assert document["systems"][0]["name"] == "pretrained"
    assert len(document["systems"][0]["accuracy"]["values"]) == 2
    assert document["classes"] == [f"s{number}" for number in range(6)]
    for name in ("confusion.png", "layers.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(sys, "argv", ["nest", *words])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert "most frequent class" in shown
    assert "better than log-mel" in shown
