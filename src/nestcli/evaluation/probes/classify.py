"""Linear probe of frozen features, with an untrained encoder and log-mel statistics as baselines.

Axes: B batch, N samples, U utterances, L layers, S frames, D mel bins, M model width, P pooled numbers of a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestcli.checkpoint.encoder import StoredEncoder, fresh_encoder, read_encoder
from nestcli.data.manifest import Manifest
from nestcli.errors import ConfigError, DataError
from nestcli.evaluation.inputs import read_inputs
from nestcli.evaluation.probes.linear import fit
from nestcli.evaluation.probes.splits import Split, splits
from nestcli.evaluation.walk import Walk, chosen_device
from nestcli.model.features import preemphasised
from nestcli.model.speech_encoder import Layer, SpeechEncoder

PRETRAINED, UNTRAINED, LOG_MEL = "pretrained", "untrained", "log-mel"
POOLS = ("mean", "mean+std")
MOST_CLASSES = 2_000

Embed = Callable[[Tensor, Tensor], list[Tensor]]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ProbeOptions:
    """Options of a probe: `label` is the field to predict.

    `split` is auto, utterance, or the name of a field whose values must stay on one side of the split.
    """

    label: str
    split: str = "auto"
    seeds: int = 5
    min_count: int = 2
    device: str = "auto"
    precision: str = "fp32"
    batch_duration: float = 120.0
    max_duration: float = 240.0

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.min_count < 2:
            raise ConfigError("--seeds must be 1 or more, --min-count 2 or more.")


@dataclass(frozen=True)
class Outcome:
    """Results of one system with one pooling: accuracy and layer weights for each split.

    For a split with several seeds, these are means over the seeds.
    """

    name: str
    pool: str
    accuracies: tuple[float, ...]
    layers: tuple[str, ...]
    layer_weights: tuple[tuple[float, ...], ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))

    @property
    def deviation(self) -> float:
        return _deviation(self.accuracies)


@dataclass(frozen=True)
class ProbeResult:
    """Result of a probe; `confusion` counts (true, predicted) classes of the best pretrained row over all splits."""

    label: str
    split: str
    classes: tuple[str, ...]
    utterances: int
    rejected: int
    chance: float
    outcomes: tuple[Outcome, ...]
    confusion: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = field(default=())

    def best(self, name: str) -> Outcome:
        """Return the outcome of a system with its best pooling."""
        return max((each for each in self.outcomes if each.name == name), key=lambda each: each.mean)

    @property
    def margins(self) -> dict[str, tuple[float, float, bool]]:
        """The lead over each baseline, its standard deviation over splits, and True if it exceeds two of them.

        With a single split the deviation is unknown, and the last value is False.
        """
        found, ours = {}, self.best(PRETRAINED)
        for name in (UNTRAINED, LOG_MEL):
            leads = np.array(ours.accuracies) - np.array(self.best(name).accuracies)
            mean, deviation = float(leads.mean()), _deviation(leads)
            found[name] = (mean, deviation, len(leads) > 1 and mean > 2 * deviation and mean > 0)
        return found


def _deviation(values: Sequence[float] | np.ndarray) -> float:
    """Return the sample standard deviation (divisor N - 1), 0 for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def probe(
    given: str, checkpoint: str, out: Path, options: ProbeOptions, progress: Progress = lambda done, total, doing: None
) -> ProbeResult:
    """Probe a checkpoint on a manifest whose lines have the field `options.label`.

    `out` receives the list of files if `given` is not a manifest. Raises ConfigError, DataError and CheckpointError.
    """
    stored = read_encoder(checkpoint)
    device = chosen_device(options.device)
    manifest = read_inputs(given, out).manifest
    asked = _asked(manifest, options)
    plans = splits(asked.labels, asked.groups, options.seeds)
    encoder = stored.build().to(device)
    pooled = _Pooled(manifest.select(asked.lines), _walk(encoder, options, device), progress)
    trained = pooled.of(encoder, PRETRAINED)
    rows = {PRETRAINED: [trained] * options.seeds, LOG_MEL: [pooled.of_log_mel(encoder)] * options.seeds}
    rows[UNTRAINED] = [pooled.of(_untrained(stored, seed).to(device), UNTRAINED) for seed in range(options.seeds)]
    keep = pooled.good()
    asked, plans = asked.kept(keep), _without(plans, keep)
    return _judged(options, asked, plans, rows, keep, len(keep) - int(keep.sum()))


def _untrained(stored: StoredEncoder, seed: int) -> SpeechEncoder:
    torch.manual_seed(1_000 + seed)
    return fresh_encoder(stored.config).eval()


def _walk(encoder: SpeechEncoder, options: ProbeOptions, device: torch.device) -> Walk:
    hop = encoder.preprocessor.config.hop_length
    return Walk(
        encoder.sample_rate, device, options.precision, options.batch_duration, options.max_duration, shortest=hop
    )


# ---- what is asked ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """The lines that take part, their labels, and the groups that must stay together, if any."""

    lines: list[int]
    labels: list[str]
    groups: list[str] | None
    split: str
    notes: tuple[str, ...]

    def kept(self, keep: np.ndarray) -> _Asked:
        places = np.flatnonzero(keep)
        groups = None if self.groups is None else [self.groups[place] for place in places]
        lines, labels = [self.lines[place] for place in places], [self.labels[place] for place in places]
        return _Asked(lines, labels, groups, self.split, self.notes)


_SPEAKERS = (
    " Prepare again with nest prepare-data --speaker-pattern, such as '([^/]+)/[^/]+$' for the folder above each file."
)


def _asked(manifest: Manifest, options: ProbeOptions) -> _Asked:
    rows = [manifest.row(line) for line in range(len(manifest))]
    lines = [line for line, row in enumerate(rows) if row.get(options.label) not in (None, "")]
    if not lines:
        known = sorted({key for row in rows for key in row} - {"audio_filepath", "duration", "offset"})
        fields, remedy = ", ".join(known) or "none", _SPEAKERS if options.label == "speaker" else ""
        raise ConfigError(f"--label {options.label}: no line has this field. Fields: {fields}.{remedy}")
    counts = Counter(str(rows[line][options.label]) for line in lines)
    wanted = {label for label, count in counts.items() if count >= options.min_count}
    if len(wanted) < 2 or len(wanted) > MOST_CLASSES:
        raise DataError(
            f"--label {options.label} has {len(wanted):,} classes with at least {options.min_count} utterances; "
            f"a probe needs 2 to {MOST_CLASSES:,}."
        )
    notes = []
    if left := len(counts) - len(wanted):
        notes.append(f"{left:,} of {len(counts):,} classes have fewer than {options.min_count} utterances: left out")
    if unlabelled := len(rows) - len(lines):
        notes.append(f"{unlabelled:,} of {len(rows):,} lines have no {options.label}: left out")
    lines = [line for line in lines if str(rows[line][options.label]) in wanted]
    labels = [str(rows[line][options.label]) for line in lines]
    groups, split, why = _groups([rows[line] for line in lines], labels, options)
    return _Asked(lines, labels, groups, split, (*notes, *why))


def _groups(
    rows: Sequence[dict[str, Any]], labels: Sequence[str], options: ProbeOptions
) -> tuple[list[str] | None, str, list[str]]:
    """Return the groups that must not be on both sides, a description of the split, and notes.

    With `auto`, groups are speakers, unless the label is the speaker, a line has no speaker, or every class has only
    one.
    """
    key = options.split
    if key == "utterance" or (key == "auto" and options.label == "speaker"):
        return None, "utterances of every class", []
    key = "speaker" if key == "auto" else key
    values = [row.get(key) for row in rows]
    if any(value in (None, "") for value in values):
        if options.split == "auto":
            return (
                None,
                "utterances of every class",
                ["not every line names its speaker: speakers may be on both sides"],
            )
        raise ConfigError(f"--split {key}: {sum(value in (None, '') for value in values):,} lines lack this field.")
    groups = [str(value) for value in values]
    alone = all(len({g for g, each in zip(groups, labels, strict=True) if each == label}) == 1 for label in set(labels))
    if alone and options.split == "auto":
        return (
            None,
            "utterances of every class",
            [f"every {options.label} has one {key} only: speakers are on both sides"],
        )
    return groups, f"no {key} on both sides", []


# ---- features --------------------------------------------------------------------------------------------------


class _Pooled:
    """Mean and deviation over the valid frames of each utterance: (U, L, 2 M) for each system."""

    def __init__(self, manifest: Manifest, walk: Walk, progress: Progress) -> None:
        self.manifest, self.walk, self.progress = manifest, walk, progress
        self.bad: set[int] = set()

    def of(self, encoder: SpeechEncoder, doing: str) -> Tensor:
        layers: list[Layer] = ["input", *range(encoder.n_layers)]

        def embed(audio_BN: Tensor, lengths_B: Tensor) -> list[Tensor]:
            encoded = encoder(audio_BN, lengths_B, layers=layers)
            return [pooled(each[:, :n]) for each, n in zip(encoded.features, encoded.lengths, strict=True)]

        return self._through(embed, doing)

    def of_log_mel(self, encoder: SpeechEncoder) -> Tensor:
        """Return log-mel energies before normalisation (which the encoder never sees), as one layer."""
        filterbank, hop = encoder.preprocessor.featurizer, encoder.preprocessor.config.hop_length

        def embed(audio_BN: Tensor, lengths_B: Tensor) -> list[Tensor]:
            with torch.autocast(audio_BN.device.type, enabled=False):
                log_mel_BDT = filterbank(preemphasised(audio_BN, lengths_B))
            frames_B = lengths_B // hop
            return [pooled(each[:, :n].T[None]) for each, n in zip(log_mel_BDT, frames_B, strict=True)]

        return self._through(embed, LOG_MEL)

    def good(self) -> np.ndarray:
        """Return True for each utterance that could be read."""
        keep = np.ones(len(self.manifest), bool)
        keep[list(self.bad)] = False
        return keep

    def _through(self, embed: Embed, doing: str) -> Tensor:
        found: dict[int, Tensor] = {}
        done = 0
        for batch in self.walk.through(self.manifest, self.walk.batches(self.manifest.durations), embed):
            for each in batch:
                if each.features is None:
                    self.bad.add(each.index)
                else:
                    found[each.index] = each.features.float().cpu()
            done += len(batch)
            self.progress(done, len(self.manifest), doing)
        if not found:
            raise DataError("none of the utterances could be read; run nest prepare-data to see why.")
        like = next(iter(found.values()))
        return torch.stack([found.get(index, torch.zeros_like(like)) for index in range(len(self.manifest))]).clone()


def pooled(features_LSM: Tensor) -> Tensor:
    """Return mean and deviation over frames, concatenated: (L, S, M) to (L, 2 M)."""
    return torch.cat([features_LSM.mean(1), features_LSM.std(1, correction=0)], -1)


# ---- judging ---------------------------------------------------------------------------------------------------


def _without(plans: Sequence[Split], keep: np.ndarray) -> list[Split]:
    """Return the splits without dropped utterances, with places that count only the kept ones."""
    place = np.cumsum(keep) - 1
    return [
        replace(each, train=place[each.train[keep[each.train]]], test=place[each.test[keep[each.test]]])
        for each in plans
    ]


def _judged(
    options: ProbeOptions,
    asked: _Asked,
    plans: Sequence[Split],
    rows: dict[str, list[Tensor]],
    keep: np.ndarray,
    rejected: int,
) -> ProbeResult:
    names = sorted(set(asked.labels))
    classes_U = torch.tensor([names.index(label) for label in asked.labels])
    kept = torch.from_numpy(np.flatnonzero(keep))
    outcomes, answers = [], {}
    for name in (PRETRAINED, UNTRAINED, LOG_MEL):
        for pool in POOLS:
            found = []
            for plan in plans:
                of_seeds = []
                for seed in plan.seeds:
                    features_ULP = rows[name][seed][kept]
                    asked_for = features_ULP[..., : features_ULP.size(-1) // 2] if pool == "mean" else features_ULP
                    of_seeds.append(_asked_once(asked_for, classes_U, plan, len(names), seed, asked.groups))
                accuracies, weights_L, answered_by_seed = zip(*of_seeds, strict=True)
                found.append((float(np.mean(accuracies)), torch.stack(weights_L).mean(0), torch.cat(answered_by_seed)))
            answers[name, pool] = [answer for _, _, answer in found]
            layers = ("log-mel",) if name == LOG_MEL else ("input", *map(str, range(found[0][1].numel() - 1)))
            weights = tuple(tuple(each.tolist()) for _, each, _ in found)
            outcomes.append(Outcome(name, pool, tuple(accuracy for accuracy, _, _ in found), layers, weights))
    tested = np.concatenate([np.tile(plan.test, len(plan.seeds)) for plan in plans])
    chance = float(np.mean([_chance(classes_U, plan) for plan in plans]))
    best = max((each for each in outcomes if each.name == PRETRAINED), key=lambda each: each.mean)
    confusion = np.zeros((len(names), len(names)), int)
    answered = torch.cat(answers[best.name, best.pool]).numpy()
    np.add.at(confusion, (classes_U.numpy()[tested], answered), 1)
    return ProbeResult(
        label=options.label,
        split=asked.split,
        classes=tuple(names),
        utterances=len(asked.labels),
        rejected=rejected,
        chance=chance,
        outcomes=tuple(outcomes),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        notes=asked.notes,
    )


def _asked_once(
    features_ULP: Tensor, classes_U: Tensor, plan: Split, n_classes: int, seed: int, groups: Sequence[str] | None
) -> tuple[float, Tensor, Tensor]:
    """Train a probe on one side of a split, test it on the other; return accuracy, layer weights and predictions."""
    train, test = torch.from_numpy(plan.train), torch.from_numpy(plan.test)
    together = None if groups is None else [groups[place] for place in plan.train]
    trained = fit(features_ULP[train], classes_U[train], n_classes, seed, together)
    answers = trained.predict(features_ULP[test])
    return float((answers == classes_U[test]).float().mean()), trained.layers_L, answers


def _chance(classes_U: Tensor, plan: Split) -> float:
    """Return the accuracy of always predicting the most frequent class of the training side."""
    most = classes_U[torch.from_numpy(plan.train)].mode().values
    return float((classes_U[torch.from_numpy(plan.test)] == most).float().mean())
