"""The guided tour: a corpus made on the spot, manifests, a short pretraining, pictures of what happened."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from omegaconf import DictConfig

from nestcli.config import load_training_config
from nestcli.data.prepare import PrepareOptions, PrepareSummary, prepare
from nestcli.demo.corpus import CorpusSummary, make_corpus
from nestcli.demo.pictures import draw_batch, draw_loss_curve
from nestcli.errors import RunFailedError
from nestcli.training.metrics import Reporter
from nestcli.training.run import Pretraining, RunResult

SEED = 7
MINUTES_OF_SPEECH = 12.0
FALLEN = 0.93  # the loss at the end, as a share of a guess's, that counts as clearly fallen


class Guide(Protocol):
    """Tells the person at the terminal what is going on."""

    def chapter(self, title: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def display(self) -> Reporter: ...


@dataclass(frozen=True)
class Results:
    """Where everything is, and how far the loss fell."""

    corpus: CorpusSummary
    speech: PrepareSummary
    run: RunResult
    guess_loss: float  # of a uniform guess: the logarithm of the number of codes
    guess_accuracy: float
    last_loss: float  # mean over the last lines of metrics.jsonl
    last_accuracy: float
    loss_curve: Path
    spectrograms: Path


def take_tour(out: Path, overrides: list[str], guide: Guide, *, minutes: float = MINUTES_OF_SPEECH) -> Results:
    """Make speech and noise, prepare them, pretrain the demo preset, draw. Continues a tour that was broken off.

    Raises RunFailedError if the loss did not clearly fall.
    """
    guide.chapter("1  Making speech of 18 synthetic voices, and noise")
    corpus = make_corpus(out / "audio", minutes=minutes, seed=SEED, progress=guide.progress)
    guide.chapter("2  Preparing manifests")
    by_folder = r"([^/\\]+)[/\\][^/\\]+$"
    speech = prepare(
        [corpus.speech],
        out / "speech",
        PrepareOptions(val_fraction=0.1, speaker_pattern=by_folder),
        guide.progress,
    )
    noise = prepare([corpus.noise], out / "noise", PrepareOptions(kind="noise"), guide.progress)
    config = load_training_config("demo", [*_data_overrides(out, speech, noise), *overrides])
    guide.chapter("3  Pretraining the demo preset")
    run = Pretraining(config, guide.display())
    result = run.fit()
    guide.chapter("4  Drawing")
    results = _results(out, config, corpus, speech, result)
    _draw(run, results)
    if results.last_loss > FALLEN * results.guess_loss:
        raise RunFailedError(
            f"the loss ended at {results.last_loss:.2f}; a guess has {results.guess_loss:.2f}. It should have "
            f"fallen below {FALLEN:.0%} of that. The curve is in {results.loss_curve}."
        )
    return results


def _data_overrides(out: Path, speech: PrepareSummary, noise: PrepareSummary) -> list[str]:
    return [
        f"model.train_ds.manifest_filepath={speech.manifests['train']}",
        f"model.validation_ds.manifest_filepath={speech.manifests['val']}",
        f"model.train_ds.noise_manifest={noise.manifests['train']}",
        f"model.validation_ds.noise_manifest={noise.manifests['train']}",
        f"exp_manager.exp_dir={out}",
        "exp_manager.name=run",
        "trainer.accelerator=cpu",  # the same everywhere, and never several processes making one corpus
        "trainer.devices=1",
    ]


def _results(out: Path, config: DictConfig, corpus: CorpusSummary, speech: PrepareSummary, run: RunResult) -> Results:
    last = _lines(run.metrics)[-5:]
    return Results(
        corpus=corpus,
        speech=speech,
        run=run,
        guess_loss=math.log(config.model.num_classes),
        guess_accuracy=1 / config.model.num_classes,
        last_loss=float(np.mean([line["train_loss"] for line in last])),
        last_accuracy=float(np.mean([line["masked_accuracy"] for line in last])),
        loss_curve=out / "loss.png",
        spectrograms=out / "spectrograms.png",
    )


def _lines(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def _draw(run: Pretraining, results: Results) -> None:
    lines = _lines(results.run.metrics)
    validated = [line for line in lines if "val_loss" in line]
    draw_loss_curve(
        results.loss_curve,
        [line["step"] for line in lines],
        [line["train_loss"] for line in lines],
        [line["masked_accuracy"] for line in lines],
        [line["step"] for line in validated],
        [line["val_loss"] for line in validated],
        chance_loss=results.guess_loss,
    )
    model = run.module.model.cpu().eval()
    clean_BDT, noisy_BDT, masked_BDT, frames, item = _features_of_a_mixed_item(run, model)
    hop = model.preprocessor.config.hop_length / run.data.sample_rate
    draw_batch(
        results.spectrograms,
        clean_BDT[item, :, :frames].numpy(),
        noisy_BDT[item, :, :frames].numpy(),
        masked_BDT[item, :, :frames].numpy(),
        hop_seconds=hop,
        title="What the model hears, and what it must predict from it",
    )


@torch.no_grad()
def _features_of_a_mixed_item(run: Pretraining, model: Any) -> tuple[Any, Any, Any, int, int]:
    """Clean, noisy and masked features of a training batch, and the item in it that was mixed the most."""
    batch = run.data.train_batch(0, 0)
    torch.manual_seed(SEED)
    clean_BDT, frames_B = model.preprocessor(batch.audio, batch.audio_len)
    noisy_BDT, _ = model.preprocessor(batch.noisy_audio, batch.noisy_audio_len)
    masked_BDT, _ = model.mask_processor(noisy_BDT, frames_B)
    item = int(((batch.noisy_audio - batch.audio) ** 2).sum(1).argmax())
    return clean_BDT, noisy_BDT, masked_BDT, int(frames_B[item]), item
