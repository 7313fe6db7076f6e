"""What every section of a comparison is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from omegaconf import DictConfig

from nestcli.parity.nemo import Answer, Nemo
from nestcli.parity.subject import SEED, Subject


@dataclass
class Context:
    """Our side, NeMo's side, and the configuration that the user asked about.

    With a recording the subject is the recorded small model, whatever the user asked about.
    """

    make_subject: Callable[[], Subject]
    nemo: Nemo
    name: str
    config: DictConfig
    augmentation_batches: int
    augmentation_samples: int

    @cached_property
    def subject(self) -> Subject:
        """Our model and the batch."""
        return self.make_subject()

    @cached_property
    def built(self) -> Answer:
        """NeMo's model of the same configuration: its initial weights' checksums. It has the subject's weights then."""
        built = self.nemo.ask("build", {"model": self.subject.nemo_model, "seed": SEED})
        self.nemo.ask("load", {}, dict(self.subject.model.state_dict()))
        return built
