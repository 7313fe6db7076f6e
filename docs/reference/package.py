"""Put a trained reference encoder into the package: its weights in half precision, and its model card.

python docs/reference/package.py RUN PROBES [--checkpoint FILE] [--step N] [--out DIR]

RUN is the folder of an experiment (checkpoints/*.nemo, metrics.jsonl), or a folder that holds one. PROBES holds
folders that `nest probe --out` wrote, named QUESTION-quiet and QUESTION-noise. docs/reference/run.py writes both:
OUT/reference and OUT/probes/reference. A run keeps its best model as .nemo: the card's figures are those of the
logged step with the lowest validation loss. For another checkpoint, give it and its step.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nestcli import load_encoder
from nestcli.checkpoint.load import load_checkpoint
from nestcli.checkpoint.safetensors_file import write_safetensors
from nestcli.config import leaves, resolved
from nestcli.errors import NestError
from nestcli.files import write_text
from nestcli.model.count import count_parameters

ROOM = Path(__file__).parents[2] / "src" / "nestcli" / "reference"
MOST_BYTES = 8_000_000
LICENCE = "CC-BY-SA-4.0"
SYSTEMS = ("pretrained", "untrained", "log-mel", "log-mel-normalised")
# Source and version, content, hours, licence: the groups of the pretraining corpus, by licence.
SOURCES = (
    ("speechocean762, github.com/jimbozhang/speechocean762 @613968e", "English sentences, 150 Mandarin speakers, "
     "adults and children", 2.63, "free for commercial and non-commercial use; Apache-2.0 on Hugging Face"),
    ("Kerstin, github.com/rhasspy/dataset-voice-kerstin @f731271", "German sentences, one speaker", 1.76, "CC0-1.0"),
    ("GCompris voices, github.com/gcompris/GCompris-voices @c0e8a743", "instructions, words and letters: those files "
     "that are in the public domain", 0.52, "public domain"),
    ("GCompris voices, the same version", "files of Smart4Kids.com and www.art4apps.org", 0.35, "CC BY-SA"),
    ("audio-cmn, github.com/hugolpz/audio-cmn @ff9ed3d0", "Mandarin words and syllables, Yue Tan (Shtooka) and Chen "
     "Wang", 1.90, "CC BY-SA"),
    ("Debian asterisk-core-sounds-en-g722, -es-g722, -fr-g722 1.6.1", "English, Spanish and French telephone prompts, "
     "Allison Smith and June Wallack, Digium", 1.29, "CC BY-SA 3.0"),
    ("Debian asterisk-core-sounds-it-g722, -ru-g722 1.6.1", "Italian and Russian telephone prompts, Carlo Flora and "
     "Maxim Topal (ivrvoice.ru)", 0.76, "CC BY 3.0"),
    ("Debian asterisk-prompt-it-menardi-wav", "Italian telephone prompts, recorded by Marco Menardi and Paola Dal Zot, "
     "www.voip.ammdomus.it", 0.39, "CC BY-SA 3.0 IT"),
    ("Debian asterisk-prompt-fr-armelle", "French telephone prompts, Armelle Desjardins, © 2006 Michel Gutierrez",
     0.29, "BSD-like"),
    ("Debian gcin-voice 20170223", "Mandarin syllables, ChionMeilin, voice Chu Lo", 0.10, "CC BY 3.0"),
)  # fmt: skip

CARD = """\
# The reference encoder

A small NEST speech encoder, trained with `docs/reference/run.py` (the preset `reference`). It comes with nest:

```python
import torch
from nestcli import load_audio, load_encoder

encoder = load_encoder("reference")
with torch.no_grad():
    features, lengths = encoder(load_audio("speech.wav"))  # (1, frames, {width}), a frame every {frame_ms:.0f} ms
```

`nest extract` and `nest probe` take `--checkpoint reference`, `nest export reference` writes it for other tools, and
`nest pretrain reference init_from_nemo_model=reference ...` continues its training: the file holds the decoder and the
quantizer too.

| | |
| --- | --- |
| encoder | {encoder:,} parameters: {layers} layers of width {width}, frames of {frame_ms:.0f} ms |
| whole model | {total:,} parameters, with decoder and frozen quantizer ({books} codebooks of {codes} codes) |
| file | {megabytes:.1f} MB; weights in fp16, statistics of batch norm, mel filters and codes in fp32; read as fp32 |
| training | {step:,} steps, {heard:.1f} hours heard |
| validation loss | {val_loss:.3f} nats, {below:.3f} below guessing by frequency ({val_unigram_loss:.3f}) |
| masked tokens correct | {val_masked_accuracy:.1%} in validation; guessing by frequency: {val_unigram_accuracy:.1%} |
| health | {collapse} in {logged:,} logged steps; {bad_steps} steps skipped; effective rank {effective_rank:.0f} of \
{width}; predictions use {predicted_perplexity:.0f} codes (targets: {target_perplexity:.0f}) |

## Probes

The mean over splits of what a simple probe makes of frozen features, ± the deviation between splits, in percent.
*Untrained* is the same encoder with random weights, *log-mel* its input before normalisation. Noise is mixed in at the
level that the table gives. No recording or speaker of the probes is in the training data.

{probes}

## Data

{hours:.1f} hours of recorded speech, mostly short prompts and single words; a part of the speakers is kept for
validation.

{sources}

Noise that was mixed in: 10 minutes of ESC-10 (rain, clocks, helicopters; github.com/karoldvl/ESC-10), 2 minutes of
Blanket (github.com/rafaelmardojai/blanket) and a kitchen of Picovoice's speech-to-intent-benchmark (Apache-2.0). The
first two are CC0, in the public domain, or CC BY 3.0: delphidebrain, dobroide, doxent, gezortenplotz, Goup_1, gpenn76,
jesabat, joedeshon, lonemonk, massenbachhausen, opticalnoise, OwlStorm, SDLx, Setuniman, spaceemotion, Tewkesound,
Toby_Crane.

## Limits

The encoder is small and has heard little speech, mostly read, from few speakers of each language. Use it to try nest,
to test a pipeline, or as a start for a run of your own. Do not expect the quality of speech recognition that encoders
trained on thousands of hours give. It has not been tested for fairness between groups of speakers.

## Licence

**The weights in `encoder.safetensors` are under Creative Commons Attribution-ShareAlike 4.0 ({licence},
https://creativecommons.org/licenses/by-sa/4.0/). The code of nest keeps its own licence, Apache-2.0.**

All sources allow redistribution and derived works. Whether trained weights are a derived work of recordings is not
settled; here they are treated as one, under the strictest licence among the sources. CC BY-SA 3.0 lets a derived work
be under its version 4.0. The other licences ask for the credit that the table above gives. Recordings under the GPL and
the GFDL were left out (`--without 'GPL|GFDL'`), as these licences ask for something else. If you pass on the weights,
or an encoder that you trained further from them, use the same licence and keep the table. Features that the encoder
computes from your audio are not covered.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("probes", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--step", type=int)
    parser.add_argument("--out", type=Path, default=ROOM)
    given = parser.parse_args()
    try:
        package(given.run, given.probes, given.out, given.checkpoint, given.step)
    except NestError as error:
        sys.exit(str(error))


def package(run: Path, probes: Path, out: Path, checkpoint: Path | None = None, step: int | None = None) -> None:
    """Write encoder.safetensors and README.md into `out`. Raises NestError."""
    run = only(run, "metrics.jsonl").parent
    checkpoint = checkpoint or only(run / "checkpoints", "*.nemo")
    loaded = load_checkpoint(checkpoint)
    weights = out / "encoder.safetensors"
    facts = {**figures(run / "metrics.jsonl", step), **sizes(loaded.config), "probes": probe_table(probes)}
    write_safetensors(weights, without_surroundings(loaded.config), loaded.state_dict, half=True)
    size = weights.stat().st_size
    if size > MOST_BYTES:
        weights.unlink()
        raise NestError(f"{checkpoint} has {size:,} bytes in half precision; the package takes {MOST_BYTES:,}.")
    rows = [(source, what, f"{hours:.2f}", licence) for source, what, hours, licence in SOURCES]
    facts |= {"sources": table(("source", "content", "hours", "licence"), rows), "licence": LICENCE,
              "hours": sum(hours for _, _, hours, _ in SOURCES), "megabytes": size / 1e6}  # fmt: skip
    write_text(out / "README.md", [CARD.format_map(facts)])
    print(f"{checkpoint}, step {facts['step']:,}: {size:,} bytes; {difference(checkpoint, weights)}")


def only(folder: Path, pattern: str) -> Path:
    """Return the one file of this name in a folder or directly below it. Raises NestError."""
    found = sorted(folder.glob(pattern)) or sorted(folder.glob(f"*/{pattern}"))
    if len(found) != 1:
        raise NestError(f"{folder} holds {len(found)} files {pattern}, and must hold one. Name the folder of one run.")
    return found[0]


def without_surroundings(config: DictConfig) -> DictConfig:
    """Return the configuration without the paths and the compiler of the machine that trained."""
    for key, value in leaves(resolved(config)):
        if "/" in str(value):
            OmegaConf.update(config, key, None)
    config.model.encoder.pop("compile", None)
    return config


def figures(metrics: Path, step: int | None) -> dict[str, Any]:
    """Return the figures of the validated step, by default the one with the lowest validation loss."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    validated = [line for line in lines if line.get("val_loss") is not None and step in (None, line["step"])]
    if not validated:
        raise NestError(f"{metrics} has no validation{'' if step is None else f' at step {step}'}.")
    line = min(validated, key=lambda each: each["val_loss"])
    until = [each for each in lines if each["step"] <= line["step"]]
    collapsed = sum(bool(each["collapsed"]) for each in until)
    return {
        **line, "heard": line["audio_hours"], "below": line["val_unigram_loss"] - line["val_loss"],
        "logged": len(until), "collapse": f"collapse reported {collapsed} times" if collapsed else "no collapse",
    }  # fmt: skip


def sizes(config: DictConfig) -> dict[str, Any]:
    model, counted = config.model, count_parameters(config)
    return {
        "encoder": sum(counted.to_depth(1)["encoder"]), "total": counted.total, "layers": model.encoder.n_layers,
        "width": model.encoder.d_model, "books": model.num_books, "codes": model.num_classes,
        "frame_ms": 1000 * model.encoder.subsampling_factor * model.preprocessor.window_stride,
    }  # fmt: skip


def probe_table(probes: Path) -> str:
    """Return a table of all probes: the best pooling of each system. Raises NestError if there is none."""
    paths = sorted(probes.glob("*/probe.json"), key=lambda path: path.parent.name.replace("-quiet", "-"))
    if not paths:
        raise NestError(f"{probes} holds no */probe.json: run `nest probe ... --out {probes}/words-quiet`.")
    rows = []
    for path in paths:
        found = json.loads(path.read_text(encoding="utf-8"))
        noise = f"noise, {found['noise']['snr']:g} dB" if found["noise"] else "quiet"
        better = "higher" if found["measure"] == "accuracy" else "lower"
        rows.append((path.parent.name.rpartition("-")[0], noise, f"{found['measure']} ({better} is better)",
                     f"{found['utterances']:,}", *(value(found, name) for name in SYSTEMS)))  # fmt: skip
    names = ("pretrained", "untrained", "log-mel", "normalised log-mel")
    return table(("question", "audio", "measure", "utterances", *names), rows)


def value(found: Mapping[str, Any], system: str) -> str:
    choose = max if found["measure"] == "accuracy" else min
    best = choose((each for each in found["systems"] if each["name"] == system), key=lambda each: each["mean"])
    return f"{100 * best['mean']:.1f} ± {100 * best['deviation']:.1f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def difference(checkpoint: Path, weights: Path) -> str:
    """Return a sentence about the difference that half precision makes to the features of four seconds of noise."""
    audio_N = 0.1 * torch.randn(64_000, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = (load_encoder(path)(audio_N).features for path in (checkpoint, weights))
    share = float((after - before).square().mean().sqrt() / before.std())
    return f"half precision changes features by {share:.2%} of their deviation"


if __name__ == "__main__":
    main()
