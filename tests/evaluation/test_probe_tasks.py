"""The probes that transcribe, verify and compare: on problems whose answer is known, and as a user runs them."""

import itertools
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import write_noise_wav
from evaluation.tiny_encoder import tiny_checkpoint
from nestcli.checkpoint.encoder import read_encoder
from nestcli.errors import ConfigError, DataError
from nestcli.evaluation.inputs import read_inputs
from nestcli.evaluation.probes import abx, ctc
from nestcli.evaluation.probes.abx import distances, drawn_triples, warped
from nestcli.evaluation.probes.asked import labelled
from nestcli.evaluation.probes.ctc import collapsed, edit_distance, symbols_of
from nestcli.evaluation.probes.layer_choice import halves, judged
from nestcli.evaluation.probes.options import ProbeOptions
from nestcli.evaluation.probes.results import (
    BASELINES,
    LOG_MEL,
    NORMALISED,
    PRETRAINED,
    SYSTEMS,
    UNTRAINED,
    Outcome,
    ProbeResult,
)
from nestcli.evaluation.probes.run import probe
from nestcli.evaluation.probes.splits import splits
from nestcli.evaluation.probes.systems import Systems, frames, stacked
from nestcli.evaluation.probes.verify import equal_error_rate, pair_scores


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six speakers say four words, twice each."""
    folder = tmp_path_factory.mktemp("audio")
    rows = []
    for number, (speaker, word, _) in enumerate(itertools.product(range(6), range(4), range(2))):
        write_noise_wav(folder / f"{number}.wav", 1.0 + 0.05 * (number % 5), number)
        row = {"audio_filepath": f"{number}.wav", "duration": 1.0, "speaker": f"s{speaker}", "word": f"w{word}"}
        rows.append({**row, "text": "ab c" if word % 2 else "B a", "phones": "AA B" if word % 2 else "B AA K"})
    (folder / "m.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "m.json"


# ---- transcribe ------------------------------------------------------------------------------------------------------


@cache
def slow_distance(given: str, wanted: str) -> int:
    if not given or not wanted:
        return len(given) + len(wanted)
    same = given[-1] == wanted[-1]
    return min(
        slow_distance(given[:-1], wanted) + 1,
        slow_distance(given, wanted[:-1]) + 1,
        slow_distance(given[:-1], wanted[:-1]) + (not same),
    )


def test_edit_distance_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        given, wanted = ("".join(rng.choice(list("abc"), rng.integers(0, 7))) for _ in range(2))
        assert edit_distance([*map(ord, given)], [*map(ord, wanted)]) == slow_distance(given, wanted)


def test_a_greedy_path_is_collapsed() -> None:
    assert collapsed([0, 3, 3, 0, 3, 2, 2, 0, 0, 1]) == [3, 3, 2, 1]
    assert collapsed([]) == collapsed([0, 0]) == []
    assert collapsed([5]) == [5]


def test_symbols_are_letters_of_the_text_and_items_of_other_fields() -> None:
    assert symbols_of("text", ["One  two", "数字"]) == ([list("one two"), list("数字")], "character")
    assert symbols_of("phones", ["AH0 K", "S"]) == ([["AH0", "K"], ["S"]], "phone")


def spoken(utterances: int, *, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Frames of two layers; layer 1 shows the symbols 1 to 4 one after the other, with silence between."""
    drawn = torch.Generator().manual_seed(seed)
    heard, texts = [], []
    for _ in range(utterances):
        text = torch.randint(1, 5, (6,), generator=drawn)
        frames_LSM = 0.1 * torch.randn(2, 13, 8, generator=drawn)
        frames_LSM[1, torch.arange(1, 13, 2), text] += 3
        heard.append(frames_LSM.half())
        texts.append(text)
    return heard, texts


def test_what_is_plainly_there_is_transcribed_without_an_error_and_shuffled_texts_are_not() -> None:
    heard, texts = spoken(90)
    (plan,) = splits([""] * 90, [f"s{n // 5}" for n in range(90)], 1)
    rate, weights_L = ctc._errors(heard, texts, plan, 2, 5, seed=0)
    assert rate == 0
    assert float(weights_L[1]) > 0.5
    order = np.random.default_rng(1).permutation(90)
    rate, _ = ctc._errors(heard, [texts[place] for place in order], plan, 2, 5, seed=0)
    assert rate > 0.5


def test_a_frame_can_emit_several_symbols() -> None:
    """One frame for two symbols: without several emissions a frame, half of them would be lost."""
    drawn = torch.Generator().manual_seed(5)
    texts = [torch.randint(1, 4, (8,), generator=drawn) for _ in range(60)]
    heard = []
    for text in texts:
        frames_LSM = torch.zeros(1, 4, 8)
        frames_LSM[0, range(4), text[::2]] = 3
        frames_LSM[0, range(4), 4 + text[1::2]] = 3
        heard.append(frames_LSM.half())
    (plan,) = splits([""] * 60, [f"s{n // 4}" for n in range(60)], 1)
    assert ctc._errors(heard, texts, plan, 4, 4, seed=0)[0] < 0.1
    assert ctc._errors(heard, texts, plan, 1, 4, seed=0)[0] >= 0.5


# ---- verify ----------------------------------------------------------------------------------------------------------


def test_equal_error_rate_on_known_scores() -> None:
    def rate(same: list[float], different: list[float]) -> float:
        scores = np.array([*same, *different], np.float32)
        return equal_error_rate(scores, np.arange(len(scores)) < len(same))

    assert rate([0.9, 0.8], [0.1, 0.2, 0.3]) == 0
    assert rate([0.1, 0.2], [0.8, 0.9]) == 1
    assert rate([0.5] * 3, [0.5] * 9) == pytest.approx(0.5)
    assert rate([0.9, 0.8, 0.7, 0.2], [0.75, 0.1, 0.1, 0.1]) == pytest.approx(0.25)
    rng = np.random.default_rng(0)
    same, different = rng.normal(1, 1, 20_000), rng.normal(-1, 1, 40_000)
    assert rate([*same], [*different]) == pytest.approx(0.5 * math.erfc(1 / math.sqrt(2)), abs=0.005)
    with pytest.raises(DataError, match="no pair of utterances has different speakers"):
        rate([0.1, 0.2], [])


def test_voices_that_are_plainly_there_are_verified_and_shuffled_speakers_are_not() -> None:
    speakers = np.repeat(np.arange(20), 10)
    drawn = torch.Generator().manual_seed(0)
    voices = torch.randn(20, 64, generator=drawn)
    features_VP = voices[torch.from_numpy(speakers)] + 0.1 * torch.randn(200, 64, generator=drawn) + 50
    assert equal_error_rate(*pair_scores(features_VP, speakers)) == 0
    shuffled = np.random.default_rng(0).permutation(speakers)
    assert equal_error_rate(*pair_scores(features_VP, shuffled)) == pytest.approx(0.5, abs=0.05)


def test_one_half_of_the_speakers_chooses_the_layer_and_the_other_is_measured() -> None:
    groups = [f"s{n % 7}" for n in range(70)]
    asked = []

    def errors(places: Any, layers: Any, seed: int) -> list[float]:
        asked.append(({groups[place] for place in places}, list(layers), seed))
        return [0.4, 0.1, 0.3][layers[0] :][: len(layers)]

    assert judged(errors, 3, groups, 5) == (0.1, (0.0, 1.0, 0.0))
    (first, every, _), (second, chosen, _) = asked
    assert (every, chosen) == ([0, 1, 2], [1])
    assert not first & second
    assert len(first | second) == 7
    assert any(
        (halves(groups, 0)[0] != halves(groups, seed)[0]).any()
        for seed in (1, 2)
        if len(halves(groups, seed)[0]) == len(halves(groups, 0)[0])
    )
    with pytest.raises(DataError, match="3 speakers are too few"):
        halves(["a", "b", "c"], 0)


# ---- compare ---------------------------------------------------------------------------------------------------------


def slow_warping(costs_SR: np.ndarray) -> float:
    height, width = costs_SR.shape
    best: dict[tuple[int, int], tuple[float, int]] = {(-1, -1): (0.0, 0)}
    for s, r in itertools.product(range(height), range(width)):
        before = [best[place] for place in ((s - 1, r - 1), (s - 1, r), (s, r - 1)) if place in best]
        total, steps = min(before)
        best[s, r] = (total + float(costs_SR[s, r]), steps + 1)
    total, steps = best[height - 1, width - 1]
    return total / steps


def test_warping_finds_the_path_of_a_plain_search() -> None:
    costs_KSR = torch.rand(7, 9, 6, generator=torch.Generator().manual_seed(2))
    ends = [(9, 6), (1, 1), (9, 1), (1, 6), (4, 6), (7, 3), (2, 2)]
    wanted = [slow_warping(costs[:s, :r].numpy()) for costs, (s, r) in zip(costs_KSR, ends, strict=True)]
    np.testing.assert_allclose(warped(costs_KSR, ends).numpy(), wanted, rtol=1e-5)


def test_a_token_is_closest_to_itself_at_any_tempo() -> None:
    drawn = torch.Generator().manual_seed(1)
    one, other = (torch.randn(2, 12, 8, generator=drawn).half() for _ in range(2))
    tokens = [one, one.repeat_interleave(2, 1), other]
    found_KL = distances(tokens, [(0, 1), (0, 2), (1, 2)], [0, 1])
    assert (found_KL[0] < 0.02).all()
    assert (found_KL[1:] > 0.1).all()
    torch.testing.assert_close(distances(tokens, [(2, 1)], [1]), distances(tokens, [(1, 2)], [1]))


def test_triples_cross_speakers_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abx, "TRIPLES", 300)
    labels, speakers = (
        [f"{kind}{n}" for n in numbers] for kind, numbers in (("w", np.arange(60) % 5), ("s", np.arange(60) // 5 % 4))
    )
    found = drawn_triples(np.arange(60), labels, speakers, seed=0)
    assert len(found) == 300
    for a, b, x in found:
        assert labels[a] == labels[x] != labels[b]
        assert speakers[a] == speakers[b] != speakers[x]
    assert found == drawn_triples(np.arange(60), labels, speakers, seed=0)
    with pytest.raises(DataError, match="no two speakers share a label"):
        drawn_triples(np.arange(60), speakers, speakers, seed=0)


def test_words_that_are_plainly_there_are_told_apart_and_noise_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abx, "TRIPLES", 400)
    drawn = torch.Generator().manual_seed(0)
    words = torch.randn(5, 10, 16, generator=drawn)
    labels, speakers = [f"w{n % 5}" for n in range(80)], [f"s{n // 10}" for n in range(80)]
    tokens = [
        torch.stack(
            [torch.randn(10, 16, generator=drawn), words[n % 5] + 0.2 * torch.randn(10, 16, generator=drawn)]
        ).half()
        for n in range(80)
    ]
    noise, word = abx._errors(tokens, labels, speakers)(np.arange(80), [0, 1], 0)
    assert word == 0
    assert noise == pytest.approx(0.5, abs=0.1)


# ---- all -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctc, "EPOCHS", 1)
    monkeypatch.setattr(ctc, "STEPS", 2)
    monkeypatch.setattr(abx, "TRIPLES", 20)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("task", "label", "measure"),
    [
        ("ctc", "", "character error rate"),
        ("ctc", "phones", "phone error rate"),
        ("verify", "", "equal error rate"),
        ("abx", "word", "ABX error rate"),
    ],
)
def test_every_task_asks_all_systems_and_again_the_same(
    checkpoint: str, manifest: Path, tmp_path: Path, task: str, label: str, measure: str
) -> None:
    options = ProbeOptions(label, task=task, seeds=2, noise=str(manifest), snr=5)
    result = probe(str(manifest), checkpoint, tmp_path, options)
    assert (result.task, result.measure, result.utterances, result.rejected) == (task, measure, 48, 0)
    assert {each.name for each in result.outcomes} == set(SYSTEMS)
    for each in result.outcomes:
        assert len(each.values) == (6 if task == "ctc" else 2)  # few speakers are left out one by one
        for weights in each.layer_weights:
            assert sum(weights) == pytest.approx(1, abs=1e-3)
    assert set(result.margins) == set(BASELINES)
    assert probe(str(manifest), checkpoint, tmp_path, options) == result
    assert probe(str(manifest), checkpoint, tmp_path, ProbeOptions(label, task=task, seeds=2)) != result


def test_an_error_rate_leads_where_it_is_lower() -> None:
    rates = {PRETRAINED: (0.2, 0.22, 0.21), UNTRAINED: (0.4, 0.42, 0.4), LOG_MEL: (0.1,) * 3, NORMALISED: (0.22,) * 3}
    outcomes = [Outcome(name, pool, values, ("0",), ((1.0,),)) for name, values in rates.items() for pool in ("a", "b")]
    outcomes.append(Outcome(PRETRAINED, "worse", (0.9,) * 3, ("0",), ((1.0,),)))
    result = ProbeResult("x", "", ("a",), 1, 0, 0.5, tuple(outcomes), measure="equal error rate")
    assert result.best(PRETRAINED).mean == pytest.approx(0.21)
    assert result.margins[UNTRAINED].lead == pytest.approx(0.19667, abs=1e-4)
    assert [result.margins[name].clear for name in BASELINES] == [True, False, False]
    assert result.margins[LOG_MEL].lead < 0


def test_log_mel_is_normalised_as_the_encoder_receives_it_and_stacked(checkpoint: str, manifest: Path) -> None:
    options = ProbeOptions(task="ctc")
    systems = Systems(
        read_encoder(checkpoint), read_inputs(str(manifest), manifest.parent).manifest, options, lambda *_: None
    )
    asked = systems.begin(labelled(systems.manifest, options), lambda frames_LSM: frames_LSM, by_frame=False)
    raw, normalised = (systems.of(name)[3] for name in (LOG_MEL, NORMALISED))
    assert raw.shape == normalised.shape == (1, raw.size(1), 80)
    torch.testing.assert_close(normalised.mean(1), torch.zeros(1, 80), atol=1e-4, rtol=0)
    expected = (raw - raw.mean(1, keepdim=True)) / (raw.std(1, keepdim=True) + 1e-5)
    torch.testing.assert_close(normalised, expected, atol=1e-3, rtol=1e-3)
    assert len(asked.lines) == 48
    assert [each.size(1) for each in systems.of(PRETRAINED)] == [-(-each.size(1) // 8) for each in systems.of(LOG_MEL)]
    joined = stacked(raw, 8)
    assert joined.shape == (1, -(-raw.size(1) // 8), 640)
    torch.testing.assert_close(joined[0, 1, :160], raw[0, 8:10].flatten())
    assert (joined[0, -1].view(8, 80)[raw.size(1) % 8 or 8 :] == 0).all()


def test_features_are_those_of_the_encoder_on_its_own(checkpoint: str, manifest: Path) -> None:
    options = ProbeOptions(task="ctc")
    stored = read_encoder(checkpoint)
    systems = Systems(stored, read_inputs(str(manifest), manifest.parent).manifest, options, lambda *_: None)
    systems.begin(labelled(systems.manifest, options), frames, by_frame=True)
    heard = systems.of(PRETRAINED)[5]
    from nestcli import load_audio

    with torch.inference_mode():
        plain = stored.build()(load_audio(manifest.parent / "5.wav"), layers=["input", 0, 1]).features[0]
    torch.testing.assert_close(heard.float(), plain, atol=5e-3, rtol=5e-3)


def test_noise_is_the_same_for_all_and_has_the_level_asked_for(checkpoint: str, manifest: Path) -> None:
    options = ProbeOptions(task="ctc", noise=str(manifest), snr=5)
    systems = Systems(
        read_encoder(checkpoint), read_inputs(str(manifest), manifest.parent).manifest, options, lambda *_: None
    )
    change = systems.walk.change
    assert change is not None
    clean = np.random.default_rng(0).normal(0, 0.05, 16_000).astype(np.float32)
    noisy = change(clean)
    np.testing.assert_array_equal(noisy, change(clean))
    added = noisy - clean
    ratio = 10 * math.log10(float(np.square(clean).mean() / np.square(added).mean()))
    assert ratio == pytest.approx(5, abs=0.05)


def test_options_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="--task guess: use one of classify, ctc, verify, abx"):
        ProbeOptions("x", task="guess")
    with pytest.raises(ConfigError, match="--task abx needs --label"):
        ProbeOptions(task="abx")
    with pytest.raises(ConfigError, match="--snr needs --noise"):
        ProbeOptions("x", snr=3)
    with pytest.raises(ConfigError, match="--snr 900"):
        ProbeOptions("x", noise="n.json", snr=900)
    assert (ProbeOptions(task="ctc").label, ProbeOptions(task="verify").label) == ("text", "speaker")
    assert (ProbeOptions("x").seeds, ProbeOptions(task="ctc").seeds, ProbeOptions("x", seeds=9).seeds) == (5, 3, 9)
