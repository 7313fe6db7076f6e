"""Help and completion start without the heavy libraries, and mistakes end in one message and exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "lightning", "lhotse", "numpy", "soundfile", "omegaconf", "pydantic", "matplotlib")


def nest(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nestcli.__main__ import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "COLUMNS": "200"})


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        *([name, "--help"] for name in ("prepare-data", "pretrain", "count-params", "export", "doctor", "demo")),
    ],
)
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom nestcli.cli.app import app\n"
        f"try:\n    app({words!r}, prog_name='nest')\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: nest")
    assert done.stderr.strip() == "[]"


def test_completion_loads_nothing_heavy() -> None:
    environment = {**os.environ, "_NEST_COMPLETE": "complete_bash", "COMP_WORDS": "nest pre", "COMP_CWORD": "1"}
    code = f"import sys, atexit\natexit.register(lambda: print([n for n in {HEAVY!r} if n in sys.modules], file=sys.stderr))\nfrom nestcli.cli.app import main\nmain()"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert {"prepare-data", "pretrain"} <= set(done.stdout.split())
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["small"], "model.train_ds.manifest_filepath is not set"),
        (["small", "model.train_ds.manifest_filepath=gone.json"], "manifest gone.json: No such file or directory"),
        (["small", "model.train_ds.manifest_filepath=[here.json,gone_OP_0..1_CL_.json]"], "manifest gone0.json"),
        (["small", "model.train_ds.manifest_filepath=here.json"], "model.validation_ds.manifest_filepath is not set"),
        (
            [
                "small",
                "model.train_ds.manifest_filepath=here.json",
                "model.validation_ds=null",
                "model.train_ds.noise_manifest=gone.json",
            ],
            "manifest gone.json",
        ),
        (["small", "model.encoder.d_model=175"], "model.encoder.d_model: 175 must be even"),
    ],
)
def test_what_names_tell_is_told_before_pytorch_is_loaded(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "here.json").write_text("{}\n")
    code = (
        "import sys, atexit\nfrom nestcli.cli.app import main\n"
        f"atexit.register(lambda: print([n for n in ('torch', 'lightning', 'lhotse') if n in sys.modules]))\n"
        f"sys.argv = ['nest', 'pretrain', *{words!r}]\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain", "smal"], "error: 'smal' is not a configuration. Did you mean 'small'?"),
        (["pretrain", "small", "model.encoder.n_layer=4"], "Did you mean model.encoder.n_layers?"),
        (["pretrain", "small"], "model.train_ds.manifest_filepath is not set"),
        (["count-params", "gone.ckpt"], "error: gone.ckpt: no such checkpoint."),
        (["count-params", "small", "--all"], "remove 'small'"),
        (["prepare-data", "nowhere", "--out", "out"], "nowhere"),
        (["pretrain", "small", "model.train_ds.manifest_filepath=gone.json"], "gone.json"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(words: list[str], message: str, tmp_path: Path) -> None:
    done = nest(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir()), "something was written"


def test_debug_shows_the_traceback_wherever_it_stands() -> None:
    done = nest("pretrain", "smal", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_version() -> None:
    from nestcli import __version__

    assert nest("--version").stdout.strip() == f"nest {__version__}"


def test_count_params_as_json() -> None:
    done = nest("count-params", "small", "model.encoder.n_layers=1", "--json")
    document = json.loads(done.stdout)
    assert document.keys() >= {"config", "total", "trainable", "frozen", "modules", "nemo", "memory", "flops"}
    assert document["total"] == document["trainable"] + document["frozen"] == sum(document["modules"].values())
    assert document["nemo"] == {"version": "3.0.0", "total": document["total"], "difference": 0}


def test_count_params_of_every_preset() -> None:
    document = json.loads(nest("count-params", "--all", "--json").stdout)
    totals = {count["config"]: count["total"] for count in document}
    assert totals["xxlarge"] == 1_069_081_680
    assert all(count["nemo"]["difference"] == 0 for count in document)


def test_ctrl_c_while_the_application_is_imported_is_one_line() -> None:
    code = (
        "import sys\nclass Stopped:\n    def find_spec(self, name, *_):\n        if name == 'typer':\n"
        "            raise KeyboardInterrupt\nsys.meta_path.insert(0, Stopped())\n"
        "from nestcli.__main__ import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "error: stopped by Ctrl-C\n")
