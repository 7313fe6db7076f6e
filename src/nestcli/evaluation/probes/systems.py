"""The systems that a probe compares: the pretrained encoder, an untrained one, log-mel, and normalised log-mel.

Axes: B batch, N samples, L layers, S frames, D mel bins, T feature frames, M width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from nestcli.checkpoint.encoder import StoredEncoder, fresh_encoder
from nestcli.data.manifest import Manifest
from nestcli.data.manifest_scan import read_manifests
from nestcli.data.utterance_audio import NoisePool
from nestcli.errors import DataError
from nestcli.evaluation.probes.asked import Asked
from nestcli.evaluation.probes.noise import AddedNoise
from nestcli.evaluation.probes.options import SNR, ProbeOptions
from nestcli.evaluation.probes.results import LOG_MEL, NORMALISED, PRETRAINED, UNTRAINED
from nestcli.evaluation.walk import Walk, chosen_device
from nestcli.model.features import preemphasised
from nestcli.model.speech_encoder import Layer, SpeechEncoder

Progress = Callable[[int, int, str], None]
Reduce: TypeAlias = Callable[[Tensor], Tensor]  # what a task keeps of an utterance's frames (L, S, M)


class Systems:
    """Computes what a task keeps of each utterance, system by system.

    Audio is read and turned into features once; features are kept in memory, 230 MB for an hour with 80 mel bins. The
    untrained encoder has the same configuration and freshly drawn weights, different for each seed.
    """

    def __init__(self, stored: StoredEncoder, manifest: Manifest, options: ProbeOptions, progress: Progress) -> None:
        self.stored, self.manifest, self.progress = stored, manifest, progress
        self.device = chosen_device(options.device)
        self.encoder = stored.build().to(self.device)
        self.walk = Walk(
            self.encoder.sample_rate,
            self.device,
            options.precision,
            options.batch_duration,
            options.max_duration,
            shortest=self.encoder.preprocessor.config.hop_length,
            change=_noise(options, self.encoder.sample_rate),
        )
        self.rejected = 0
        self._reduce: Reduce = pooled
        self._stack = 1
        self._log_mel: list[Tensor] = []  # of each utterance, (T, D)
        self._normalised: list[Tensor] = []
        self._known: dict[str, list[Tensor]] = {}

    def begin(self, asked: Asked, reduce: Reduce, *, by_frame: bool = False) -> Asked:
        """Read the lines; return what remains without those that cannot be read.

        With `by_frame`, frames of log-mel are stacked to the length of the encoder's frames. Raises DataError if
        nothing can be read.
        """
        self._reduce = reduce
        self._stack = self.encoder.encoder.config.subsampling_factor if by_frame else 1
        manifest = self.manifest.select(asked.lines)
        found: list[Tensor | None] = [None] * len(manifest)
        done = 0
        for batch in self.walk.through(manifest, self.walk.batches(manifest.durations), self._heard):
            for each in batch:
                found[each.index] = each.features
            done += len(batch)
            self.progress(done, len(manifest), "reading")
        keep = np.array([each is not None for each in found], bool)
        self.rejected = len(keep) - int(keep.sum())
        remaining = asked.kept(keep)
        self.manifest = self.manifest.select(remaining.lines)
        self._log_mel = [each[0] for each in found if each is not None]
        self._normalised = [each[1] for each in found if each is not None]
        return remaining

    def of(self, name: str, seed: int = 0) -> list[Tensor]:
        """Return what is kept of each utterance."""
        if name == UNTRAINED:
            return self._encoded(self._untrained(seed), name)
        if name not in self._known:
            if name == PRETRAINED:
                self._known[name] = self._encoded(self.encoder, name)
            else:
                features = self._log_mel if name == LOG_MEL else self._normalised
                self._known[name] = [self._reduce(stacked(each[None], self._stack)) for each in features]
        return self._known[name]

    def layers(self, name: str) -> tuple[str, ...]:
        """Return the names of a system's layers."""
        return (name,) if name in (LOG_MEL, NORMALISED) else ("input", *map(str, range(self.encoder.n_layers)))

    def _untrained(self, seed: int) -> SpeechEncoder:
        torch.manual_seed(1_000 + seed)
        return fresh_encoder(self.stored.config).eval().to(self.device)

    def _heard(self, audio_BN: Tensor, lengths_B: Tensor) -> list[Tensor]:
        """Return log-mel energies before normalisation, and the features that the encoder receives: (2, T, D)."""
        preprocessor = self.encoder.preprocessor
        features_BDT, frames_B = preprocessor(audio_BN, lengths_B)
        with torch.autocast(audio_BN.device.type, enabled=False):
            log_mel_BDT = preprocessor.featurizer(preemphasised(audio_BN, lengths_B))
        both = zip(log_mel_BDT, features_BDT, frames_B, strict=True)
        return [torch.stack([raw[:, :n].T, normalised[:, :n].T]).float().cpu() for raw, normalised, n in both]

    def _encoded(self, encoder: SpeechEncoder, doing: str) -> list[Tensor]:
        layers: list[Layer] = ["input", *range(encoder.n_layers)]
        found: dict[int, Tensor] = {}
        hop_seconds = encoder.preprocessor.config.window_stride
        durations = np.array([len(each) * hop_seconds for each in self._normalised])
        for batch in self.walk.batches(durations):
            chosen = [self._normalised[place] for place in batch]
            features_BTD = pad_sequence(chosen, batch_first=True).to(self.device)
            frames_B = torch.tensor([len(each) for each in chosen], device=self.device)
            with torch.inference_mode(), self.walk.autocast():
                encoded = encoder.encode_features(features_BTD.transpose(1, 2), frames_B, layers=layers)
            for place, each, length in zip(batch, encoded.features, encoded.lengths, strict=True):
                found[int(place)] = self._reduce(each[:, :length].float()).cpu()
            self.progress(len(found), len(durations), doing)
        return [found[place] for place in range(len(durations))]


def pooled(frames_LSM: Tensor) -> Tensor:
    """Return mean and deviation over frames, concatenated: (L, S, M) to (L, 2 M)."""
    return torch.cat([frames_LSM.mean(1), frames_LSM.std(1, correction=0)], -1)


def frames(frames_LSM: Tensor) -> Tensor:
    """Return all frames in half precision, which halves the memory: (L, S, M)."""
    return frames_LSM.clamp(-6e4, 6e4).half()


def stacked(frames_LTM: Tensor, factor: int) -> Tensor:
    """Join each `factor` consecutive frames to one; zeros complete the last: (L, T, M) to (L, S, factor M)."""
    n_layers, length, width = frames_LTM.shape
    whole = -(-length // factor) * factor
    return pad(frames_LTM, (0, 0, 0, whole - length)).reshape(n_layers, whole // factor, factor * width)


def _noise(options: ProbeOptions, sample_rate: int) -> AddedNoise | None:
    if options.noise is None:
        return None
    manifest = read_manifests([options.noise], require_duration=False)
    if not len(manifest):
        raise DataError(f"--noise {options.noise} has no lines.")
    return AddedNoise(NoisePool(manifest, sample_rate), SNR if options.snr is None else options.snr)
