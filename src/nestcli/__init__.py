"""Self-supervised speech pretraining with NEST: the same model as NVIDIA NeMo 3.0.0, without NeMo.

from nestcli import load_audio, load_encoder

encoder = load_encoder("nest.nemo")
features, lengths = encoder(load_audio("speech.wav"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestcli.evaluation.loading import load_audio, load_encoder
    from nestcli.model.speech_encoder import Encoded, SpeechEncoder

__version__ = "0.1.0"
__all__ = ["Encoded", "SpeechEncoder", "__version__", "load_audio", "load_encoder"]

# The module that defines each name. torch is loaded when one of them is first used.
_ROOMS = {
    "load_audio": "nestcli.evaluation.loading",
    "load_encoder": "nestcli.evaluation.loading",
    "Encoded": "nestcli.model.speech_encoder",
    "SpeechEncoder": "nestcli.model.speech_encoder",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | _ROOMS.keys())
