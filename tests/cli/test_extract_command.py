"""`nest extract` as it is typed."""

import json
import sys
from pathlib import Path

import pytest
import torch

from conftest import write_noise_wav
from nestcli.checkpoint.nemo import write_nemo
from nestcli.cli.app import main
from nestcli.config import load_config
from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel

TINY = ["model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=1", "model.num_classes=32"]


def nest(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["nest", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_extract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("small", TINY)
    torch.manual_seed(0)
    write_nemo(tmp_path / "a.nemo", config, NestModel(NestConfig.from_config(config)).state_dict())
    write_noise_wav(tmp_path / "audio" / "a.wav", 1.0, 1)
    (tmp_path / "audio" / "b.wav").write_bytes(b"nothing")
    monkeypatch.chdir(tmp_path)
    words = ["extract", "audio", "--checkpoint", "a.nemo", "--out", "out"]
    assert nest(monkeypatch, *words, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["utterances"] == document["rejected"] == 1
    assert (document["layers"], document["dim"], document["seconds"]) == ([0], 16, 1.0)
    assert nest(monkeypatch, *words, "--strict") == 1
    shown = capsys.readouterr()
    assert "nothing to do" in shown.err
    assert "rejected  1, with reasons in out/rejected.jsonl" in shown.out
    assert nest(monkeypatch, *words, "--layers", "7") == 2
    assert "layer 7 does not exist" in capsys.readouterr().err
    assert nest(monkeypatch, "extract", "nowhere", "--checkpoint", "a.nemo", "--out", "out2") == 2
    assert "nowhere" in capsys.readouterr().err
