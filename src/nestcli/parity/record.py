"""Record a live NeMo's answers, for comparisons without NeMo.

    python -m nestcli.parity.record NEMO_PYTHON [FOLDER]

Writes subject.safetensors (the small model's weights and the audio), answers.safetensors and answers.json. The other
facts in that folder, config.json and presets.json, are NeMo's nest_fast-conformer.yaml and the table at its top, which
NeMo's wheel does not contain.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from nestcli.config import load_config
from nestcli.parity.compare import RECORDED_MODEL, Request, compare
from nestcli.parity.nemo import FACTS, BridgedNemo, RecordingNemo
from nestcli.parity.report import Report
from nestcli.parity.subject import made_audio, make_batch, make_subject

_SECONDS = (2.1, 1.7, 1.2)


def record(python: str, folder: Path) -> Report:
    """Write the recording and return the comparison that it came from."""
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config("small", RECORDED_MODEL)
    batch = make_batch(made_audio(int(config.model.sample_rate), _SECONDS))
    subject = make_subject("the recorded model", config, None, batch)
    state = {f"state.{name}": value.contiguous() for name, value in subject.model.state_dict().items()}
    save_file({**state, **batch}, folder / "subject.safetensors")
    nemo = RecordingNemo(BridgedNemo(python))
    try:
        report = compare(Request("small", load_config("small")), nemo)
    finally:
        nemo.close()
    save_file(nemo.tensors, folder / "answers.safetensors")
    rows = (f"{json.dumps(key)}: {json.dumps(facts, separators=(',', ':'))}" for key, facts in nemo.facts.items())
    (folder / "answers.json").write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors makes files that only their owner can read
    return report


if __name__ == "__main__":
    found = record(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else FACTS)
    print(json.dumps(found.to_json(), indent=1))  # noqa: T201  # a developer's script
    sys.exit(0 if found.passed else 1)
