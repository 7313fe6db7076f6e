"""The probe: softmax weights over layers and a linear classifier on pooled features, trained together.

Axes: U utterances, L layers, P pooled numbers of a layer, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = (1e-2, 1e-3, 1e-4, 1e-5)  # factors of the classifier's squared weights, added to the mean cross-entropy
_EVEN = 1e-2  # factor of the layers' squared scores; without it, the first steps settle on one layer
_ITERATIONS = 60
_CHANGE = 1e-5  # of the loss or the weights, below which a minimum counts as found
_FOLDS = 3


@dataclass(frozen=True)
class Probe:
    """A trained probe; it standardises features by the mean and deviation of its training features."""

    mean_LP: Tensor
    deviation_LP: Tensor
    layers_L: Tensor  # weights of the layers, which add up to 1
    weight_CP: Tensor
    bias_C: Tensor
    strength: float

    def predict(self, features_ULP: Tensor) -> Tensor:
        """Return the most likely class of each utterance (U,)."""
        logits_UC = _mixed(self._standard(features_ULP), self.layers_L) @ self.weight_CP.T + self.bias_C
        return logits_UC.argmax(1)

    def _standard(self, features_ULP: Tensor) -> Tensor:
        return _standardised(features_ULP, self.mean_LP, self.deviation_LP)


def fit(
    features_ULP: Tensor, classes_U: Tensor, n_classes: int, seed: int, groups: Sequence[str] | None = None
) -> Probe:
    """Train a probe; choose the strength of its weight penalty by cross-validation on the same utterances.

    With two or more `groups`, no group is in several folds: a probe that will be tested on unseen groups is also
    selected on unseen groups.
    """
    alone = groups is None or len(set(groups)) < 2
    folds = _folds(classes_U.numpy(), seed) if alone else _folds_of_groups(groups or (), seed)
    right = _scores(features_ULP, classes_U, n_classes, torch.from_numpy(folds))
    strength = STRENGTHS[max(range(len(STRENGTHS)), key=right.__getitem__)]
    return fit_with(features_ULP, classes_U, n_classes, strength)


def _scores(features_ULP: Tensor, classes_U: Tensor, n_classes: int, fold_of: Tensor) -> list[int]:
    """Return for each strength how many utterances are right if a probe trained without them predicts them.

    The minimum for one strength is the start for the next, weaker one.
    """
    right = [0] * len(STRENGTHS)
    for fold in range(_FOLDS):
        kept, asked = fold_of != fold, fold_of == fold
        if not (kept.any() and asked.any()):
            continue
        probe = None
        train_ULP, train_U, test_ULP = features_ULP[kept], classes_U[kept], features_ULP[asked]
        for place, strength in enumerate(STRENGTHS):
            probe = fit_with(train_ULP, train_U, n_classes, strength, probe)
            right[place] += int((probe.predict(test_ULP) == classes_U[asked]).sum())
    return right


def _folds(classes_U: np.ndarray, seed: int) -> np.ndarray:
    """Return a fold for each utterance; the utterances of a class are dealt out in turn."""
    rng = np.random.default_rng(seed)
    folds = np.zeros(len(classes_U), np.int64)
    start = 0
    for label in np.unique(classes_U):
        places = rng.permutation(np.flatnonzero(classes_U == label))
        folds[places] = (start + np.arange(len(places))) % _FOLDS
        start += len(places)
    return folds


def _folds_of_groups(groups: Sequence[str], seed: int) -> np.ndarray:
    """Return a fold for each utterance, the same for all of a group; the groups are dealt out in turn."""
    names, place_U = np.unique(np.asarray(groups), return_inverse=True)
    fold_of_name = np.random.default_rng(seed).permutation(len(names)) % _FOLDS
    return fold_of_name[place_U]


def fit_with(
    features_ULP: Tensor, classes_U: Tensor, n_classes: int, strength: float, start: Probe | None = None
) -> Probe:
    """Minimise cross-entropy + strength x squared weights by full-batch L-BFGS, starting from zero or from a probe.

    `start` must be of the same training utterances.
    """
    mean_LP, deviation_LP = features_ULP.mean(0), features_ULP.std(0, correction=0) + 1e-5
    n_layers, width = mean_LP.shape
    standard_LUP = _standardised(features_ULP, mean_LP, deviation_LP).transpose(0, 1).contiguous()
    flat_LX = standard_LUP.view(n_layers, -1)  # a plain matrix: mixing layers is one product, without copies
    if start is None:
        scores_L, weight_CP, bias_C = torch.zeros(n_layers), torch.zeros(n_classes, width), torch.zeros(n_classes)
    else:
        scores_L, weight_CP, bias_C = start.layers_L.log(), start.weight_CP.clone(), start.bias_C.clone()
        scores_L -= scores_L.mean()  # the minimum of the penalty among scores with the same weights
    parameters = [each.requires_grad_() for each in (scores_L, weight_CP, bias_C)]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=_ITERATIONS, tolerance_grad=1e-6, tolerance_change=_CHANGE, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        mixed_UP = (scores_L.softmax(0) @ flat_LX).view(-1, width)
        loss = F.cross_entropy(mixed_UP @ weight_CP.T + bias_C, classes_U) + strength * weight_CP.square().sum()
        loss = loss + _EVEN * scores_L.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        return loss.item()

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch gives it no types
    return Probe(mean_LP, deviation_LP, scores_L.detach().softmax(0), weight_CP.detach(), bias_C.detach(), strength)


def _standardised(features_ULP: Tensor, mean_LP: Tensor, deviation_LP: Tensor) -> Tensor:
    """Scale each feature to zero mean and unit deviation, then utterances to a squared length of about 1."""
    return (features_ULP - mean_LP) / deviation_LP / math.sqrt(features_ULP.size(-1))


def _mixed(features_ULP: Tensor, layers_L: Tensor) -> Tensor:
    mixed_UP: Tensor = torch.tensordot(features_ULP, layers_L, dims=([1], [0]))
    return mixed_UP
