"""Task `verify`: do two utterances have the same speaker? Cosine of pooled features, without any training.

Axes: U utterances, V utterances of a half, L layers, P pooled numbers of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from nestcli.errors import DataError
from nestcli.evaluation.probes.asked import of_classes
from nestcli.evaluation.probes.layer_choice import Errors, halves, judged, reported
from nestcli.evaluation.probes.options import ProbeOptions
from nestcli.evaluation.probes.results import SYSTEMS, UNTRAINED, Outcome, ProbeResult
from nestcli.evaluation.probes.splits import Indices
from nestcli.evaluation.probes.systems import Systems, pooled

POOLS = ("mean", "mean+std")
MEASURE = "equal error rate"
MOST_UTTERANCES = 3_000  # of a half: 4.5 million pairs


def ask(systems: Systems, options: ProbeOptions) -> ProbeResult:
    """Return the equal error rate over all pairs of utterances of the speakers that did not choose the layer."""
    asked = of_classes(systems.manifest, options)
    halves(asked.labels, 0)  # raises before anything is computed
    asked = systems.begin(asked, pooled)
    outcomes = []
    for name in SYSTEMS:
        of_seed = [
            torch.stack(systems.of(name, seed)) for seed in (range(options.seeds) if name == UNTRAINED else (0,))
        ]
        for pool in POOLS:
            found = [
                judged(
                    _errors(of_seed[seed % len(of_seed)], pool, asked.labels),
                    len(systems.layers(name)),
                    asked.labels,
                    seed,
                )
                for seed in range(options.seeds)
            ]
            values, weights = zip(*found, strict=True)
            outcomes.append(Outcome(name, pool, values, systems.layers(name), weights))
    return reported(systems, options, asked, outcomes, MEASURE, options.label)


def _errors(features_ULP: Tensor, pool: str, labels: Sequence[str]) -> Errors:
    names = sorted(set(labels))
    speakers_U = np.array([names.index(label) for label in labels])
    if pool == "mean":
        features_ULP = features_ULP[..., : features_ULP.size(-1) // 2]

    def errors(places: Indices, layers: Sequence[int], seed: int) -> list[float]:
        if len(places) > MOST_UTTERANCES:
            places = np.sort(np.random.default_rng(seed).choice(places, MOST_UTTERANCES, replace=False))
        chosen_VLP = features_ULP[torch.from_numpy(places)]
        return [equal_error_rate(*pair_scores(chosen_VLP[:, layer], speakers_U[places])) for layer in layers]

    return errors


def pair_scores(
    features_VP: Tensor, speakers_V: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Return the cosine of each pair of utterances, and True for pairs of one speaker.

    Each feature is first scaled to mean 0 and deviation 1 over the utterances, without knowledge of the speakers.
    """
    scaled_VP = (features_VP - features_VP.mean(0)) / (features_VP.std(0, correction=0) + 1e-5)
    unit_VP = normalize(scaled_VP, dim=1)
    first, second = np.triu_indices(len(speakers_V), 1)
    cosines_VV = (unit_VP @ unit_VP.T).numpy()
    return cosines_VV[first, second], speakers_V[first] == speakers_V[second]


def equal_error_rate(scores: npt.NDArray[np.float32], same: npt.NDArray[np.bool_]) -> float:
    """Return the error rate where as large a share of true pairs is rejected as of false pairs is accepted.

    Pairs with equal scores are on one side of every threshold; between two thresholds, the rates are interpolated.
    """
    if same.all() or not same.any():
        raise DataError(f"no pair of utterances has {'different speakers' if same.all() else 'one speaker'}.")
    order = np.argsort(-scores, kind="stable")
    last_of_equals = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    accepted = np.concatenate([[0], np.cumsum(same[order])[last_of_equals]])
    wrongly = np.concatenate([[0], np.cumsum(~same[order])[last_of_equals]])
    rejected_share, accepted_share = 1 - accepted / same.sum(), wrongly / (~same).sum()
    place = int(np.argmax(accepted_share >= rejected_share))
    gap = rejected_share - accepted_share  # falls from 1 to -1
    share = gap[place - 1] / (gap[place - 1] - gap[place])
    return float(accepted_share[place - 1] + share * (accepted_share[place] - accepted_share[place - 1]))
