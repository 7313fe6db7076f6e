"""Task `ctc`: transcribe with one linear layer on weighted frozen layers, trained by CTC; symbol error rate.

A frame of the encoder is longer than many sounds, so the layer emits several symbols for each frame. Log-mel frames are
stacked to the encoder's frames, so that every system has as many chances to emit.

Axes: B batch, L layers, S frames, M width, K symbols of a frame, T = S K emissions, V symbols and the blank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nestcli.errors import DataError
from nestcli.evaluation.probes.asked import Asked, labelled
from nestcli.evaluation.probes.options import ProbeOptions
from nestcli.evaluation.probes.results import SYSTEMS, Outcome, ProbeResult
from nestcli.evaluation.probes.splits import Split, splits
from nestcli.evaluation.probes.systems import Systems, frames

EMISSION_SECONDS = 0.04  # 25 a second, twice the phones of quick speech
MOST_SYMBOLS = 5_000
BATCH, STEPS, EPOCHS = 16, 1_200, 10  # at least so many steps and epochs
LEARNING_RATE, WEIGHT_DECAY = 2e-2, 1.0  # strong: an hour of labelled speech is little for a linear layer
_BLANK = 0


def ask(systems: Systems, options: ProbeOptions) -> ProbeResult:
    """Transcribe the utterances of unseen speakers; the result counts wrong symbols per symbol of the true text."""
    asked = labelled(systems.manifest, options)
    _plans(asked, options)
    asked = systems.begin(asked, frames, by_frame=True)
    plans = _plans(asked, options)
    texts, unit = symbols_of(options.label, asked.labels)
    alphabet = sorted({symbol for text in texts for symbol in text})
    if len(alphabet) > MOST_SYMBOLS:
        raise DataError(f"--label {options.label} has {len(alphabet):,} different symbols, more than {MOST_SYMBOLS:,}.")
    number = {symbol: place for place, symbol in enumerate(alphabet, 1)}
    targets = [torch.tensor([number[symbol] for symbol in text]) for text in texts]
    per_frame = max(1, round(systems.encoder.frame_seconds / EMISSION_SECONDS))
    values: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in SYSTEMS}
    for name in SYSTEMS:
        for turn, plan in enumerate(plans):
            seed = plan.seeds[turn % len(plan.seeds)]
            heard = systems.of(name, seed)
            values[name].append(_errors(heard, targets, plan, per_frame, len(alphabet) + 1, seed))
    return ProbeResult(
        label=options.label,
        split=asked.split,
        classes=tuple(alphabet),
        utterances=len(asked.labels),
        rejected=systems.rejected,
        chance=None,
        outcomes=tuple(
            Outcome(
                name, "frames", tuple(rate for rate, _ in found), systems.layers(name),
                tuple(tuple(weights.tolist()) for _, weights in found),
            )
            for name, found in values.items()
        ),
        notes=asked.notes,
        task=options.task,
        measure=f"{unit} error rate",
    )  # fmt: skip


def _plans(asked: Asked, options: ProbeOptions) -> list[Split]:
    return splits([""] * len(asked.labels), asked.groups, options.seeds)


def symbols_of(label: str, texts: Sequence[str]) -> tuple[list[list[str]], str]:
    """Return the symbols of each text and their name: the letters of the field `text`, what spaces separate elsewhere.

    Letters are in lower case; white space counts as one space.
    """
    if label == "text":
        return [list(" ".join(text.split()).casefold()) for text in texts], "character"
    return [text.split() for text in texts], label.removesuffix("s")


# ---- one system, one split -----------------------------------------------------------------------------------------


class Transcriber(nn.Module):
    """Softmax weights over layers, and a linear layer that emits K symbols for each frame."""

    def __init__(self, training: Sequence[Tensor], per_frame: int, n_symbols: int) -> None:
        super().__init__()
        n_layers, _, width = training[0].shape
        total, squares, count = torch.zeros(n_layers, width), torch.zeros(n_layers, width), 0
        for each in training:
            total += each.float().sum(1)
            squares += each.float().square().sum(1)
            count += each.size(1)
        mean_LM = total / count
        self.mean_LM = mean_LM[:, None]
        self.deviation_LM = (squares / count - mean_LM.square()).clamp_min(0).sqrt()[:, None] + 1e-5
        self.scores_L = nn.Parameter(torch.zeros(n_layers))
        self.linear = nn.Linear(width, per_frame * n_symbols)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.per_frame, self.n_symbols = per_frame, n_symbols

    def standardised(self, frames_LSM: Tensor) -> Tensor:
        return (frames_LSM.float() - self.mean_LM) / self.deviation_LM

    def forward(self, frames_LBSM: Tensor) -> Tensor:
        """Return log-probabilities (B, T, V) of standardised frames (L, B, S, M)."""
        mixed_BSM = torch.tensordot(self.scores_L.softmax(0), frames_LBSM, dims=1)
        logits_BSX: Tensor = self.linear(mixed_BSM)
        n_items, n_frames, _ = logits_BSX.shape
        return logits_BSX.view(n_items, n_frames * self.per_frame, self.n_symbols).log_softmax(-1)


def _errors(
    heard: Sequence[Tensor], targets: Sequence[Tensor], plan: Split, per_frame: int, n_symbols: int, seed: int
) -> tuple[float, Tensor]:
    """Return the error rate on the tested utterances, and the layer weights."""
    train = [int(place) for place in plan.train]
    model = Transcriber([heard[place] for place in train], per_frame, n_symbols)
    _train(model, [heard[place] for place in train], [targets[place] for place in train], seed)
    wrong = total = 0
    with torch.inference_mode():
        for place in plan.test.tolist():
            best_T = model(model.standardised(heard[place])[:, None])[0].argmax(-1)
            wrong += edit_distance(collapsed(best_T.tolist()), targets[place].tolist())
            total += len(targets[place])
    return wrong / max(1, total), model.scores_L.detach().softmax(0)


@dataclass(frozen=True)
class _Batch:
    frames_LBSM: Tensor
    lengths_B: Tensor  # emissions
    targets: Tensor  # of all items, one after the other
    target_lengths_B: Tensor


def _train(model: Transcriber, heard: Sequence[Tensor], targets: Sequence[Tensor], seed: int) -> None:
    """Minimise the CTC loss; utterances of similar length form a batch, and batches come in random order."""
    order = sorted(range(len(heard)), key=lambda place: heard[place].size(1))
    batches = []
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        padded_BSLM = pad_sequence([model.standardised(heard[place]).transpose(0, 1) for place in chosen], True)
        batches.append(
            _Batch(
                padded_BSLM.permute(2, 0, 1, 3).contiguous(),
                torch.tensor([heard[place].size(1) * model.per_frame for place in chosen]),
                torch.cat([targets[place] for place in chosen]),
                torch.tensor([len(targets[place]) for place in chosen]),
            )
        )
    epochs = max(EPOCHS, -(-STEPS // len(batches)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * len(batches))
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        for place in rng.permutation(len(batches)):
            batch = batches[place]
            log_probs_TBV = model(batch.frames_LBSM).transpose(0, 1)
            loss = F.ctc_loss(
                log_probs_TBV, batch.targets, batch.lengths_B, batch.target_lengths_B, _BLANK, zero_infinity=True
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            optimizer.step()
            schedule.step()


def collapsed(emitted: Sequence[int]) -> list[int]:
    """Return what a greedy path says: repetitions count once, blanks do not count."""
    return [
        symbol for before, symbol in zip([_BLANK, *emitted], emitted, strict=False) if symbol not in (before, _BLANK)
    ]


def edit_distance(given: Sequence[int], wanted: Sequence[int]) -> int:
    """Return the least number of insertions, deletions and substitutions between two sequences."""
    row = list(range(len(wanted) + 1))
    for place, symbol in enumerate(given, 1):
        corner, row[0] = row[0], place
        for column, other in enumerate(wanted, 1):
            corner, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, corner + (symbol != other))
    return row[-1]
