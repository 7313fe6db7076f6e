"""The context that every section of a comparison receives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from omegaconf import DictConfig

from nestcli.parity.nemo import Answer, Nemo
from nestcli.parity.subject import SEED, Subject


@dataclass
class Context:
    """Our side, NeMo's side, and the configuration that the user requested.

    With a recording, the subject is always the recorded small model.
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
        """Checksums of the initial weights of NeMo's model. The first access builds it from the same configuration.

        Afterwards NeMo's model has the subject's weights.
        """
        built = self.nemo.ask("build", {"model": self.subject.nemo_model, "seed": SEED})
        self.nemo.ask("load", {}, dict(self.subject.model.state_dict()))
        return built
