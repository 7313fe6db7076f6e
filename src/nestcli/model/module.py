"""The LightningModule: one optimiser step and one validation of NEST."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from omegaconf import DictConfig
from torch import Tensor

from nestcli.config import resolved, seed_of
from nestcli.model.config import EncoderConfig, NestConfig
from nestcli.model.conformer import ConformerEncoder
from nestcli.model.count import check_memory
from nestcli.model.nemo_encoder import NemoEncoder
from nestcli.model.nest import NestModel, NestOutput
from nestcli.model.optim import build_optimizer, build_schedule

CONFIG_KEY = "nest_config"
_ENCODERS: dict[str, Callable[[EncoderConfig], Any]] = {"nest": ConformerEncoder, "nemo": NemoEncoder}
_TRAIN, _VALIDATION = 0, 1


class Batch(Protocol):
    """What a loader hands over: waveforms (B, N) and their lengths (B,) in samples."""

    audio: Tensor
    audio_len: Tensor
    noisy_audio: Tensor
    noisy_audio_len: Tensor
    counts: bool


class NestModule(LightningModule):
    """NEST for Lightning. In checkpoints the weights have NeMo's names, without a prefix of ours.

    Dither, masks and dropout of a batch are drawn from a generator seeded by (seed, phase, number of the batch), so
    that a resumed run continues with the same numbers, validation is the same at every call, and neither depends on
    the number of processes that share the batches.
    """

    def __init__(self, config: DictConfig) -> None:
        super().__init__()
        self.config = config
        self.seed = seed_of(config)
        torch.manual_seed(self.seed)
        nest = NestConfig.from_config(config)
        check_memory(nest)
        self.model = NestModel(nest, _ENCODERS[nest.encoder.backend])
        if str(config.trainer.precision) == "bf16-true":
            self.model.use_half(torch.bfloat16)
        self._validation = torch.zeros(4, dtype=torch.float64)
        self.step_loss = torch.zeros(())  # of the newest batch of training

    def configure_model(self) -> None:
        """Share the weights out over the processes, where the strategy is FSDP2."""
        if self._device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            mesh = self._device_mesh["data_parallel"]
            for part in self.model.parts_in_fp32():  # the weights that are sharded together are of one type
                fully_shard(part, mesh=mesh)
            for layer in self.model.encoder.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def forward(self, batch: Batch) -> NestOutput:
        output: NestOutput = self.model(batch.audio, batch.audio_len, batch.noisy_audio, batch.noisy_audio_len)
        return output

    # ---- training ----

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        self._seed_draws(_TRAIN, self.trainer.fit_loop.epoch_loop.total_batch_idx)
        output = self(batch)
        self.log("train_loss", output.loss.detach())
        self.log("masked_accuracy", _share(output.correct, output.selected))
        # Numbers would be sent to the device, and the step would wait for it.
        self.log("learning_rate", torch.tensor(self.learning_rate))
        self.log("global_step", torch.tensor(float(self.trainer.global_step)))
        self.step_loss = output.loss.detach()
        return output._asdict()

    @property
    def learning_rate(self) -> float:
        """The rate of the coming optimiser step."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return float(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build_optimizer(self.model, self.config)
        schedule = build_schedule(optimizer, self.config, int(self.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """As Lightning does it, but the gradients' memory is free for the next forward pass."""
        super().optimizer_step(*arguments, **options)
        for parameter in self.parameters():
            parameter.grad = None

    # ---- validation: the mean over all selected tokens; batches without one do not count ----

    def on_validation_epoch_start(self) -> None:
        self._validation = torch.zeros(4, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        self._seed_draws(_VALIDATION, batch_idx)
        output = self(batch)
        self._count(output, batch)
        return {"tokens_NG": output.tokens_NG}

    def _count(self, output: NestOutput, batch: Batch) -> None:
        if not batch.counts:
            return
        if self.model.loss.config.nemo_exact:  # NeMo's mean over batches, whatever their size, NaN and all
            row: list[Tensor | float] = [output.loss, output.correct / output.selected, 1.0, 1.0]
        else:
            row = [output.loss * output.selected, output.correct, output.selected, output.selected]
        self._validation += torch.tensor([float(value) for value in row], dtype=torch.float64).to(self._validation)

    def on_validation_epoch_end(self) -> None:
        total = self.trainer.strategy.reduce(self._validation, reduce_op="sum")
        loss, correct, loss_weight, weight = total.tolist() if isinstance(total, Tensor) else total
        if loss_weight > 0:
            self.log("val_loss", loss / loss_weight, sync_dist=True)  # the same on every rank already
            self.log("val_masked_accuracy", correct / weight, sync_dist=True)
        else:
            self.log("val_loss", float("nan"), sync_dist=True)

    def _seed_draws(self, phase: int, own_batch: int) -> None:
        batch = own_batch * self.trainer.world_size + self.global_rank  # among those of all processes
        mixed = torch.Generator().manual_seed(self.seed)
        key = torch.randint(2**31, (1,), generator=mixed).item()
        torch.manual_seed((int(key) << 31) ^ (batch << 12) ^ phase)

    # ---- checkpoints: NeMo's names, and the configuration as plain data ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {_bare(name): value for name, value in checkpoint["state_dict"].items()}
        checkpoint[CONFIG_KEY] = resolved(self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state: Mapping[str, Tensor] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"model.{_bare(name)}": value for name, value in state.items()}


def _bare(name: str) -> str:
    return name.removeprefix("model.")


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part.float() / whole.clamp_min(1)
