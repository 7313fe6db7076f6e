"""The guided tour: a synthetic corpus, manifests, noisy copies, a short pretraining, a comparison with NeMo, a probe,
and a page with the results.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from omegaconf import DictConfig

from nestcli.augment.noisy_copy import CopyOptions
from nestcli.augment.preview import draw_previews
from nestcli.augment.run import AugmentOptions, augment
from nestcli.checkpoint.encoder import read_encoder
from nestcli.checkpoint.load import packaged_encoder
from nestcli.config import load_training_config, section
from nestcli.data.mixing import AugmentationConfig
from nestcli.demo.corpus import make_corpus
from nestcli.demo.page import write_results
from nestcli.demo.pictures import draw_batch, draw_loss_curve
from nestcli.demo.results import COMPARISON, Learned, Results
from nestcli.demo.synthesis import variants
from nestcli.errors import ConfigError, RunFailedError
from nestcli.evaluation.inputs import read_inputs
from nestcli.evaluation.probes import classify
from nestcli.evaluation.probes.options import ProbeOptions
from nestcli.evaluation.probes.pictures import draw_confusion, draw_layers
from nestcli.evaluation.probes.results import PRETRAINED, Outcome, ProbeResult
from nestcli.evaluation.probes.run import probe
from nestcli.evaluation.probes.systems import Systems
from nestcli.parity.compare import Request, compare
from nestcli.parity.nemo import RecordedNemo
from nestcli.parity.page import write_page
from nestcli.parity.report import Report
from nestcli.prepare.pipeline import PrepareOptions, prepare
from nestcli.prepare.summary import PrepareSummary
from nestcli.training.monitor.metrics import Reporter
from nestcli.training.run import Pretraining, RunResult

SEED = 7
MINUTES_OF_SPEECH = 12.0
PREVIEWS = 2  # pictures of noisy copies
_PROBE = ProbeOptions("speaker", seeds=3, device="cpu")  # 3 splits, and 3 untrained encoders
# A few minutes of synthetic speech are little data: tokens of 40 ms give twice as many targets, and the lower learning
# rate avoids a collapse.
FOR_LITTLE_SPEECH = (
    "model.encoder.subsampling_factor=4", "model.preprocessor.normalize=all_features", "model.optim.lr=0.15",
)  # fmt: skip
FALLEN = 0.93  # the final loss must be below this share of a uniform guess' loss


class Guide(Protocol):
    """Shows the progress of the tour to the user."""

    def chapter(self, title: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def display(self) -> Reporter: ...


def take_tour(out: Path, overrides: list[str], guide: Guide, *, minutes: float = MINUTES_OF_SPEECH) -> Results:
    """Make speech and noise, prepare and mix them, pretrain the demo preset, compare, probe, and write the results.

    Continues an interrupted tour. Raises RunFailedError if the loss did not clearly fall, or something differs from
    NeMo.
    """
    variants()  # raises before anything is written if espeak-ng is missing
    packaged_encoder()  # the same for the encoder in the package
    guide.chapter("1  Making speech with 18 synthetic voices, and noise")
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
    config = load_training_config("demo", [*_data_overrides(out, speech, noise), *FOR_LITTLE_SPEECH, *overrides])
    guide.chapter("3  Mixing noise into the validation set, as training does with half of its speech")
    noisy = _noisy_copies(out, config, speech, noise, guide)
    guide.chapter("4  Pretraining the demo preset")
    run = Pretraining(config, guide.display())
    result = run.fit()
    learned = _learned(out, config, result)
    guide.chapter("5  Comparing the model with facts recorded from NeMo")
    report = _compared(out, config, guide)
    guide.chapter("6  Probing the encoder for speakers, and the reference encoder that comes with nest")
    probed = _probed(out, speech, result, guide)
    reference = _reference(out, speech, guide)
    guide.chapter("7  Drawing the results")
    results = Results(corpus, speech, noisy, result, learned, report, probed, reference, out)
    _draw(run, results)
    write_results(results.page, results)
    return results


def _learned(out: Path, config: DictConfig, run: RunResult) -> Learned:
    """Draw the loss curve. Raises RunFailedError if the loss did not clearly fall."""
    lines = _lines(run.metrics)
    last = lines[-5:]

    def late(name: str) -> float:
        return float(np.mean([line[name] for line in last if line.get(name) is not None] or [math.nan]))

    learned = Learned(
        even_loss=math.log(config.model.num_classes),
        frequency_loss=late("unigram_loss"),
        frequency_accuracy=late("unigram_accuracy"),
        last_loss=late("train_loss"),
        last_accuracy=late("masked_accuracy"),
        curve=out / "loss.png",
    )
    validated = [line for line in lines if "val_loss" in line]
    draw_loss_curve(
        learned.curve,
        [line["step"] for line in lines],
        [line["train_loss"] for line in lines],
        [line["masked_accuracy"] for line in lines],
        [line["step"] for line in validated],
        [line["val_loss"] for line in validated],
        even_loss=learned.even_loss,
        frequency_loss=learned.frequency_loss,
    )
    if learned.last_loss > FALLEN * learned.even_loss:
        raise RunFailedError(
            f"the loss ended at {learned.last_loss:.2f}; a uniform guess has {learned.even_loss:.2f}. It should have "
            f"fallen below {FALLEN:.0%} of that. {learned.curve} shows the curve."
        )
    return learned


def _noisy_copies(
    out: Path, config: DictConfig, speech: PrepareSummary, noise: PrepareSummary, guide: Guide
) -> tuple[Path, ...]:
    rate = int(config.model.sample_rate)
    mixing = replace(section(AugmentationConfig, config, "model.train_ds.batch_augmentor"), prob=1.0)
    options = AugmentOptions(CopyOptions(mixing, one_stretch=False, seed=SEED, sample_rate=rate))
    made = augment(str(speech.manifests["val"]), str(noise.manifests["train"]), out / "noisy", options, guide.progress)
    if made.manifest is None:
        return ()
    return tuple(draw_previews(Path(made.manifest), out / "noisy" / "preview", PREVIEWS, rate))


def _compared(out: Path, config: DictConfig, guide: Guide) -> Report:
    """Compare with the recorded NeMo and write the page. Raises RunFailedError if something differs."""
    nemo, page = RecordedNemo(), out / COMPARISON
    try:
        report = compare(Request("demo", config), nemo, lambda number, total, name: guide.progress(number, total))
    finally:
        nemo.close()
    write_page(report, page)
    if not report.passed:
        raise RunFailedError(f"on this machine the model differs from NeMo's: {page} shows where.")
    return report


def _probed(out: Path, speech: PrepareSummary, run: RunResult, guide: Guide) -> ProbeResult:
    """Probe the encoder for speakers on the training speech: pretraining does not use the speaker labels."""
    checkpoint = run.best or run.last
    if checkpoint is None:
        raise ConfigError("the demo needs a checkpoint to probe: set exp_manager.create_checkpoint_callback=true.")
    given = str(speech.manifests["train"])
    return probe(given, str(checkpoint), out / "probe", _PROBE, lambda done, total, _: guide.progress(done, total))


def _reference(out: Path, speech: PrepareSummary, guide: Guide) -> Outcome:
    """Ask the encoder in the package the same question on the same utterances."""
    manifest = read_inputs(str(speech.manifests["train"]), out / "probe").manifest
    stored = read_encoder(packaged_encoder())
    systems = Systems(stored, manifest, _PROBE, lambda done, total, _: guide.progress(done, total))
    return classify.ask(systems, _PROBE, (PRETRAINED,)).best(PRETRAINED)


def _data_overrides(out: Path, speech: PrepareSummary, noise: PrepareSummary) -> list[str]:
    return [
        f"model.train_ds.manifest_filepath={speech.manifests['train']}",
        f"model.validation_ds.manifest_filepath={speech.manifests['val']}",
        f"model.train_ds.noise_manifest={noise.manifests['train']}",
        f"model.validation_ds.noise_manifest={noise.manifests['train']}",
        f"exp_manager.exp_dir={out}",
        "exp_manager.name=run",
        "trainer.accelerator=cpu",  # the same results everywhere, and only one process that makes the corpus
        "trainer.devices=1",
    ]


def _lines(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def _draw(run: Pretraining, results: Results) -> None:
    model = run.module.model.cpu().eval()
    clean_BDT, noisy_BDT, masked_BDT, frames, item = _features_of_a_mixed_item(run, model)
    hop = model.preprocessor.config.hop_length / run.data.sample_rate
    draw_batch(
        results.spectrograms,
        clean_BDT[item, :, :frames].numpy(),
        noisy_BDT[item, :, :frames].numpy(),
        masked_BDT[item, :, :frames].numpy(),
        hop_seconds=hop,
        title="Clean features, and the noisy and masked features that the model receives",
    )
    confusion, layers = results.pictures
    confusion.parent.mkdir(exist_ok=True)
    draw_confusion(confusion, results.probe)
    draw_layers(layers, results.probe)


@torch.no_grad()
def _features_of_a_mixed_item(run: Pretraining, model: Any) -> tuple[Any, Any, Any, int, int]:
    """Return clean, noisy and masked features of a training batch, the frames and the index of its noisiest item."""
    batch = run.data.train_batch(0, 0)
    torch.manual_seed(SEED)
    clean_BDT, frames_B = model.preprocessor(batch.audio, batch.audio_len)
    noisy_BDT, _ = model.preprocessor(batch.noisy_audio, batch.noisy_audio_len)
    masked_BDT, _ = model.mask_processor(noisy_BDT, frames_B)
    item = int(((batch.noisy_audio - batch.audio) ** 2).sum(1).argmax())
    return clean_BDT, noisy_BDT, masked_BDT, int(frames_B[item]), item
