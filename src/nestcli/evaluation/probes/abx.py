"""Task `abx`: is a token closer to another speaker's token of the same label than to one of another label?

A and B are tokens of two labels by one speaker, X is a token of A's label by another speaker; nothing is trained. The
distance of two tokens is the mean angle between their frames along the best alignment (dynamic time warping).
Source: Schatz et al. 2013, "Evaluating speech features with the minimal-pair ABX task".

Axes: L layers, K pairs of tokens, S and R frames of the two tokens, M width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from nestcli.errors import ConfigError, DataError
from nestcli.evaluation.probes.asked import of_classes
from nestcli.evaluation.probes.layer_choice import Errors, halves, judged, reported
from nestcli.evaluation.probes.options import ProbeOptions
from nestcli.evaluation.probes.results import SYSTEMS, Outcome, ProbeResult
from nestcli.evaluation.probes.splits import Indices
from nestcli.evaluation.probes.systems import Systems, frames

MEASURE = "ABX error rate"
TRIPLES = 2_000  # drawn for each half of the speakers and each seed
_PAIRS_AT_ONCE = 1_000
_Triple = tuple[int, int, int]  # the utterances A, B and X


def ask(systems: Systems, options: ProbeOptions) -> ProbeResult:
    """Return the share of triples in which X is closer to B than to A; equal distances count one half."""
    key = "speaker" if options.split == "auto" else options.split
    asked = of_classes(systems.manifest, options)
    speakers = _speakers(systems, asked.lines, key)
    halves(speakers, 0)
    asked = systems.begin(asked, frames, by_frame=True)
    speakers = _speakers(systems, list(range(len(asked.lines))), key)
    outcomes = []
    for name in SYSTEMS:
        found = [
            judged(_errors(systems.of(name, seed), asked.labels, speakers), len(systems.layers(name)), speakers, seed)
            for seed in range(options.seeds)
        ]
        values, weights = zip(*found, strict=True)
        outcomes.append(Outcome(name, "frames", values, systems.layers(name), weights))
    return reported(systems, options, asked, outcomes, MEASURE, key)


def _speakers(systems: Systems, lines: Sequence[int], key: str) -> list[str]:
    values = [systems.manifest.row(line).get(key) for line in lines]
    if any(value in (None, "") for value in values):
        raise ConfigError(f"--task abx compares speakers, and some lines have no {key}. --split names another field.")
    return [str(value) for value in values]


def _errors(tokens: Sequence[Tensor], labels: Sequence[str], speakers: Sequence[str]) -> Errors:
    def errors(places: Indices, layers: Sequence[int], seed: int) -> list[float]:
        triples = drawn_triples(places, labels, speakers, seed)
        to_a = distances(tokens, [(x, a) for a, _, x in triples], layers)
        to_b = distances(tokens, [(x, b) for _, b, x in triples], layers)
        wrong = (to_a > to_b).float() + 0.5 * (to_a == to_b).float()
        return [float(each) for each in wrong.mean(0)]

    return errors


def drawn_triples(places: Indices, labels: Sequence[str], speakers: Sequence[str], seed: int) -> list[_Triple]:
    """Draw triples: a pair of labels and a pair of speakers with equal chances, then tokens of these.

    Raises DataError if no speaker has two labels of which another speaker has one.
    """
    tokens: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place in places.tolist():
        tokens[labels[place], speakers[place]].append(place)
    of_label: dict[str, list[str]] = defaultdict(list)
    for label, speaker in sorted(tokens):
        of_label[label].append(speaker)
    rng = np.random.default_rng(seed)
    names = sorted(of_label)
    found: list[_Triple] = []
    for _ in range(20 * TRIPLES):  # some draws name a speaker without the label
        first, second = rng.choice(len(names), 2, replace=len(names) < 2)
        both = sorted(set(of_label[names[first]]) & set(of_label[names[second]]))
        if first == second or not both:
            continue
        speaker = both[rng.integers(len(both))]
        others = [each for each in of_label[names[first]] if each != speaker]
        if not others:
            continue
        other = others[rng.integers(len(others))]
        a, b, x = ((names[first], speaker), (names[second], speaker), (names[first], other))
        found.append(tuple(tokens[each][rng.integers(len(tokens[each]))] for each in (a, b, x)))  # type: ignore[arg-type]
        if len(found) == TRIPLES:
            break
    if not found:
        raise DataError("no two speakers share a label of which one has another label as well: --task abx needs that.")
    return found


def distances(tokens: Sequence[Tensor], pairs: Sequence[tuple[int, int]], layers: Sequence[int]) -> Tensor:
    """Return the distance of each pair of tokens in each of the layers, (K, layers); a token is (L, S, M)."""
    lengths = [len(tokens[a][0]) * len(tokens[b][0]) for a, b in pairs]
    order = np.argsort(lengths, kind="stable")  # pairs of similar length are padded least
    found = torch.empty(len(pairs), len(layers))
    for start in range(0, len(order), _PAIRS_AT_ONCE):
        chosen = order[start : start + _PAIRS_AT_ONCE]
        lefts, rights = ([tokens[pairs[place][side]] for place in chosen] for side in (0, 1))
        ends = [(len(a[0]), len(b[0])) for a, b in zip(lefts, rights, strict=True)]
        for column, layer in enumerate(layers):
            angles_KSR = _angles(_padded(lefts, layer), _padded(rights, layer))
            found[torch.from_numpy(chosen), column] = warped(angles_KSR, ends)
    return found


def _padded(tokens: Sequence[Tensor], layer: int) -> Tensor:
    longest = max(len(each[layer]) for each in tokens)
    padded_KSM = torch.stack([pad(each[layer], (0, 0, 0, longest - len(each[layer]))) for each in tokens])
    return normalize(padded_KSM.float(), dim=-1)


def _angles(left_KSM: Tensor, right_KRM: Tensor) -> Tensor:
    return torch.bmm(left_KSM, right_KRM.transpose(1, 2)).clamp(-1, 1).acos() / torch.pi


def warped(costs_KSR: Tensor, ends: Sequence[tuple[int, int]]) -> Tensor:
    """Return the mean cost along the cheapest monotonous path from the first frames to the `ends`: (K, S, R) to (K,).

    All pairs advance together, one anti-diagonal at a time. On diagonal d, row s stands for column d - s.
    """
    n_pairs, height, width = costs_KSR.shape
    diagonals, rows = torch.arange(height + width - 1)[:, None], torch.arange(height)[None]
    inside = (diagonals >= rows) & (diagonals - rows < width)
    columns = (diagonals - rows).clamp(0, width - 1)
    slanted_DKS = costs_KSR[:, rows, columns].permute(1, 0, 2).masked_fill(~inside[:, None], torch.inf).contiguous()
    last_rows, last_columns = (torch.tensor([end[side] for end in ends]) - 1 for side in (0, 1))
    found = torch.empty(n_pairs)
    # The cheapest sum, and the frames on its path, at each row of the last two diagonals; place 0 is outside.
    sums, counts = (torch.full((2, n_pairs, height + 1), value) for value in (torch.inf, 0.0))
    sums[0, :, 0] = 0
    for diagonal, costs_KS in enumerate(slanted_DKS):
        steps = torch.stack([sums[0, :, :-1], sums[1, :, :-1], sums[1, :, 1:]])  # both, the left token, the right one
        least, step = steps.min(0)
        before = torch.stack([counts[0, :, :-1], counts[1, :, :-1], counts[1, :, 1:]]).gather(0, step[None])[0]
        sums, counts = sums.roll(-1, 0), counts.roll(-1, 0)
        sums[1, :, 0] = torch.inf
        sums[1, :, 1:], counts[1, :, 1:] = least + costs_KS, before + 1
        if len(ended := torch.nonzero(last_rows + last_columns == diagonal)[:, 0]):
            row = last_rows[ended] + 1
            found[ended] = sums[1, ended, row] / counts[1, ended, row]
    return found
