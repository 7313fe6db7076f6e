"""Task `classify`: a linear classifier of utterances, on pooled features.

Axes: U utterances, L layers, P pooled numbers of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nestcli.evaluation.probes.asked import of_classes
from nestcli.evaluation.probes.linear import fit
from nestcli.evaluation.probes.options import ProbeOptions
from nestcli.evaluation.probes.results import ACCURACY, PRETRAINED, SYSTEMS, UNTRAINED, Outcome, ProbeResult
from nestcli.evaluation.probes.splits import Split, splits
from nestcli.evaluation.probes.systems import Systems, pooled

POOLS = ("mean", "mean+std")


def ask(systems: Systems, options: ProbeOptions, names: Sequence[str] = SYSTEMS) -> ProbeResult:
    """Predict the label of unseen utterances, or of utterances of unseen speakers, from each of the named systems."""
    asked = of_classes(systems.manifest, options)
    splits(asked.labels, asked.groups, options.seeds)  # raises what is wrong before anything is computed
    asked = systems.begin(asked, pooled)
    plans = splits(asked.labels, asked.groups, options.seeds)
    classes = sorted(set(asked.labels))
    classes_U = torch.tensor([classes.index(label) for label in asked.labels])
    outcomes, answers = [], {}
    for name in names:
        seeds = range(options.seeds) if name == UNTRAINED else (0,)
        of_seed = [torch.stack(systems.of(name, seed)) for seed in seeds]
        for pool in POOLS:
            found = [_over_seeds(of_seed, pool, classes_U, plan, len(classes), asked.groups) for plan in plans]
            answers[name, pool] = [answer for _, _, answer in found]
            weights = tuple(tuple(each.tolist()) for _, each, _ in found)
            values = tuple(accuracy for accuracy, _, _ in found)
            outcomes.append(Outcome(name, pool, values, systems.layers(name), weights))
    tested = np.concatenate([np.tile(plan.test, len(plan.seeds)) for plan in plans])
    best = max((each for each in outcomes if each.name == PRETRAINED), key=lambda each: each.mean)
    confusion = np.zeros((len(classes), len(classes)), int)
    answered = torch.cat(answers[best.name, best.pool]).numpy()
    np.add.at(confusion, (classes_U.numpy()[tested], answered), 1)
    return ProbeResult(
        label=options.label,
        split=asked.split,
        classes=tuple(classes),
        utterances=len(asked.labels),
        rejected=systems.rejected,
        chance=float(np.mean([_chance(classes_U, plan) for plan in plans])),
        outcomes=tuple(outcomes),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        notes=asked.notes,
        measure=ACCURACY,
    )


def _over_seeds(
    of_seed: Sequence[Tensor], pool: str, classes_U: Tensor, plan: Split, n_classes: int, groups: Sequence[str] | None
) -> tuple[float, Tensor, Tensor]:
    """Return accuracy and layer weights of one split, means over its seeds, and the predictions of all seeds."""
    train, test = torch.from_numpy(plan.train), torch.from_numpy(plan.test)
    together = None if groups is None else [groups[place] for place in plan.train]
    accuracies, weights, answers = [], [], []
    for seed in plan.seeds:
        features_ULP = of_seed[seed % len(of_seed)]
        if pool == "mean":
            features_ULP = features_ULP[..., : features_ULP.size(-1) // 2]
        trained = fit(features_ULP[train], classes_U[train], n_classes, seed, together)
        answered_U = trained.predict(features_ULP[test])
        accuracies.append(float((answered_U == classes_U[test]).float().mean()))
        weights.append(trained.layers_L)
        answers.append(answered_U)
    return float(np.mean(accuracies)), torch.stack(weights).mean(0), torch.cat(answers)


def _chance(classes_U: Tensor, plan: Split) -> float:
    """Return the accuracy of always predicting the most frequent class of the training side."""
    most = classes_U[torch.from_numpy(plan.train)].mode().values
    return float((classes_U[torch.from_numpy(plan.test)] == most).float().mean())
