"""NEST for Lightning: training steps, validation, and checkpoints with NeMo's names."""

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
from nestcli.model.nemo_encoder import NemoEncoder
from nestcli.model.nest import NestModel, NestOutput, check_memory
from nestcli.model.optim import build_optimizer, build_schedule

CONFIG_KEY = "nest_config"
_ENCODERS: dict[str, Callable[[EncoderConfig], Any]] = {"nest": ConformerEncoder, "nemo": NemoEncoder}
_TRAIN, _VALIDATION = 0, 1


class Batch(Protocol):
    """A batch from the loader: waveforms (B, N) and their lengths (B,) in samples."""

    audio: Tensor
    audio_len: Tensor
    noisy_audio: Tensor
    noisy_audio_len: Tensor
    counts: bool


class NestModule(LightningModule):
    """NEST as a LightningModule.

    A generator seeded by (seed, phase, number of the batch) draws the dither, masks and dropout of a batch. So a
    resumed run repeats the draws, every validation uses the same ones, and neither depends on how many processes
    share the batches.
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
        self.step_loss = torch.zeros(())  # of the latest training batch

    def configure_model(self) -> None:
        """Shard the weights over the processes if the strategy is FSDP2."""
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            if self.trainer.strategy.root_device.type == "cuda" and self.config.trainer.sync_batchnorm:
                torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)  # as Lightning does for DDP
            mesh = self.device_mesh["data_parallel"]
            for part in self.model.parts_in_fp32():  # weights that are sharded together must have one type
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
        # Tensors: Lightning would copy numbers to the device, and the step would wait for the copy.
        self.log("learning_rate", torch.tensor(self.learning_rate))
        self.log("global_step", torch.tensor(float(self.trainer.global_step)))
        self.step_loss = output.loss.detach()
        return output._asdict()

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next optimiser step."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return float(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build_optimizer(self.model, self.config)
        schedule = build_schedule(optimizer, self.config, int(self.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Take Lightning's step, then free the gradients' memory for the next forward pass."""
        super().optimizer_step(*arguments, **options)
        for parameter in self.parameters():
            parameter.grad = None

    # ---- validation: the mean over all selected tokens ----

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
        if self.model.loss.config.nemo_exact:  # NeMo's mean over batches of any size, NaN included
            one = torch.ones_like(output.loss)
            row = [output.loss, output.correct / output.selected, one, one]
        else:
            row = [output.loss * output.selected, output.correct, output.selected, output.selected]
        self._validation += torch.stack([value.detach().double() for value in row])

    def on_validation_epoch_end(self) -> None:
        total = self.trainer.strategy.reduce(self._validation, reduce_op="sum")
        loss, correct, loss_weight, weight = total.tolist() if isinstance(total, Tensor) else total
        if loss_weight > 0:
            self.log("val_loss", loss / loss_weight, sync_dist=True)  # already the same on every rank
            self.log("val_masked_accuracy", correct / weight, sync_dist=True)
        else:
            self.log("val_loss", float("nan"), sync_dist=True)

    def _seed_draws(self, phase: int, own_batch: int) -> None:
        batch = own_batch * self.trainer.world_size + self.global_rank  # counted over all processes
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
