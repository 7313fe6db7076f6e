"""The classes that a configuration may name, as a table of strings. A `_target_` is never imported."""

from __future__ import annotations

# NeMo's public names and ours: the kind of each, and the keys under which each kind is allowed.
_NEMO = "nemo.collections.asr"
_SSL = f"{_NEMO}.modules.ssl_modules"
CLASSES = {
    "preprocessor": (
        "AudioToMelSpectrogramPreprocessor",
        [f"{_NEMO}.modules", f"{_NEMO}.modules.audio_preprocessing"],
    ),
    "spec_augment": ("SpectrogramAugmentation", [f"{_NEMO}.modules", f"{_NEMO}.modules.audio_preprocessing"]),
    "masking": ("RandomBlockMasking", [f"{_NEMO}.modules", _SSL, f"{_SSL}.masking"]),
    "quantizer": ("RandomProjectionVectorQuantizer", [f"{_NEMO}.modules", _SSL, f"{_SSL}.quantizers"]),
    "encoder": ("ConformerEncoder", [f"{_NEMO}.modules", f"{_NEMO}.modules.conformer_encoder"]),
    "decoder": ("MultiSoftmaxDecoder", [f"{_NEMO}.modules", _SSL, f"{_SSL}.multi_softmax_decoder"]),
    "loss": ("MultiMLMLoss", [f"{_NEMO}.losses", f"{_NEMO}.losses.ssl_losses.mlm"]),
    "multi_speaker_noise": (
        "MultiSpeakerNoiseAugmentation",
        [_SSL, f"{_NEMO}.modules", f"{_SSL}.augmentation"],
    ),
    "speaker_noise": ("SpeakerNoiseAugmentation", [_SSL, f"{_NEMO}.modules", f"{_SSL}.augmentation"]),
}
TARGETS = {
    f"{package}.{name}": kind for kind, (name, packages) in CLASSES.items() for package in [*packages, "nestcli"]
}
PLACES = {
    **{f"model.{kind}": {kind} for kind in list(CLASSES)[:7]},
    "model.train_ds.batch_augmentor": {"multi_speaker_noise", "speaker_noise"},
    "model.validation_ds.batch_augmentor": {"multi_speaker_noise", "speaker_noise"},
}


def nemo_target(name: str) -> str:
    """Return the name under which NeMo imports a class of `TARGETS`. NeMo's own names stay unchanged."""
    class_name, packages = CLASSES[TARGETS[name]]
    return name if name.startswith(f"{_NEMO}.") else f"{packages[0]}.{class_name}"
