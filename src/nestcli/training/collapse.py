"""When a run has collapsed, and in which words that is said."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

# What the words below stand for. Measured examples: docs/health.md
_FEW_CODES = 0.01  # perplexity of the predictions over that of the targets, both less 1
_FLAT_RANK = 1.5  # effective rank
_NO_BETTER = 0.98  # loss over that of the unigram baseline, for a run with one of the signs above
_LONG = 2.0  # warm-ups after which a loss above the baseline is a sign by itself
_KEYS = ("train_loss", "unigram_loss", "predicted_perplexity", "target_perplexity", "effective_rank")
_ADVICE = (
    "Lower model.optim.lr or lengthen model.optim.sched.warmup_steps, set trainer.gradient_clip_val=1.0, and start "
    "again under another exp_manager.name, or from a checkpoint of before (init_from_ptl_ckpt). See docs/health.md."
)


class CollapseWatch:
    """Looks at the logged lines after the warm-up; a verdict takes `patience` of them in a row."""

    def __init__(self, patience: int, warmup_steps: int, n_codes: int) -> None:
        self.patience, self.warmup_steps, self.n_codes = patience, warmup_steps, n_codes
        self.collapsed = False
        self._lines: list[dict[str, float]] = []

    def look(self, step: int, line: Mapping[str, Any]) -> str | None:
        """Take in a logged line. A message where the run has collapsed since the last one, or recovered."""
        values = {key: float(line[key]) for key in _KEYS}
        if step <= self.warmup_steps or not all(map(math.isfinite, values.values())):
            return None  # a step that was skipped says nothing about the run
        self._lines = [*self._lines, {"step": float(step), **values}][-self.patience :]
        signs = self._signs() if len(self._lines) == self.patience else []
        was, self.collapsed = self.collapsed, bool(signs)
        if self.collapsed and not was:
            return (
                f"step {step}: the run has collapsed: {'; '.join(signs)}, for {self.patience} logged lines. {_ADVICE}"
            )
        return f"step {step}: the run has recovered from its collapse." if was and not self.collapsed else None

    def state_dict(self) -> dict[str, Any]:
        return {"collapsed": self.collapsed, "lines": [dict(line) for line in self._lines]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.collapsed, self._lines = bool(state["collapsed"]), [dict(line) for line in state["lines"]]

    def _signs(self) -> list[str]:
        mean = {key: sum(line[key] for line in self._lines) / len(self._lines) for key in _KEYS}
        loss = f"loss {mean['train_loss']:.3f}, guessing by frequency gives {mean['unigram_loss']:.3f}"
        codes = (
            f"predictions spread over {mean['predicted_perplexity']:.1f} of {self.n_codes} codes, "
            f"targets over {mean['target_perplexity']:.1f}"
        )
        rank = f"the encoder's output has an effective rank of {mean['effective_rank']:.2f}"
        few = self._always(lambda line: line["predicted_perplexity"] - 1 < _FEW_CODES * (line["target_perplexity"] - 1))
        flat = self._always(lambda line: line["effective_rank"] < _FLAT_RANK)
        ratio = mean["train_loss"] / mean["unigram_loss"] if mean["unigram_loss"] > 0 else 0.0
        if (few or flat) and ratio > _NO_BETTER:
            return [*([codes] if few else []), *([rank] if flat else []), loss]
        late = self._lines[0]["step"] > _LONG * self.warmup_steps
        return [f"{loss}, long after the warm-up", codes, rank] if late and ratio > 1 else []

    def _always(self, sign: Callable[[dict[str, float]], bool]) -> bool:
        return all(sign(line) for line in self._lines)
