"""Options of a probe."""

from __future__ import annotations

from dataclasses import dataclass

from nestcli.errors import ConfigError

CLASSIFY, CTC, VERIFY, ABX = "classify", "ctc", "verify", "abx"
TASKS = (CLASSIFY, CTC, VERIFY, ABX)
_LABELS = {CTC: "text", VERIFY: "speaker"}  # without --label
_SEEDS = {CLASSIFY: 5, CTC: 3, VERIFY: 5, ABX: 5}  # without --seeds
SNR = 5.0  # dB, without --snr


@dataclass(frozen=True)
class ProbeOptions:
    """Options of a probe: `label` is the field to predict, empty for the task's usual one.

    `split` is auto, utterance, or the name of a field whose values must stay on one side of the split. `noise` is a
    manifest of noise to mix in, `snr` dB below the speech. `seeds` of 0 means the task's usual number.
    """

    label: str = ""
    split: str = "auto"
    seeds: int = 0
    min_count: int = 2
    device: str = "auto"
    precision: str = "fp32"
    batch_duration: float = 120.0
    max_duration: float = 240.0
    task: str = CLASSIFY
    noise: str | None = None
    snr: float | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"--task {self.task}: use one of {', '.join(TASKS)}.")
        if self.seeds < 0 or self.min_count < 2:
            raise ConfigError("--seeds must be 1 or more, --min-count 2 or more.")
        if not (self.label or self.task in _LABELS):
            raise ConfigError(f"--task {self.task} needs --label: the field to ask for, such as speaker or word.")
        if self.snr is not None and self.noise is None:
            raise ConfigError("--snr needs --noise: a manifest of noise.")
        if self.snr is not None and not -200 <= self.snr <= 200:
            raise ConfigError(f"--snr {self.snr}: must be from -200 to 200 dB.")
        object.__setattr__(self, "label", self.label or _LABELS.get(self.task, ""))
        object.__setattr__(self, "seeds", self.seeds or _SEEDS[self.task])
        if self.noise is not None and self.snr is None:
            object.__setattr__(self, "snr", SNR)
