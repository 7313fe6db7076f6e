"""NeMo there, old, broken or missing; variables that surprise."""

import os
import sys
from pathlib import Path

import pytest

from nestcli import config
from nestcli.doctor import nemo
from nestcli.doctor.environment import (
    cache_check,
    encoding_check,
    environment_checks,
    jail_check,
    other_environment_check,
    plain_checks,
    pythonpath_check,
    slurm_check,
    temporary_check,
    threads_check,
    torchrun_check,
)
from nestcli.doctor.nemo import elsewhere_check, here_check, nemo_checks
from nestcli.doctor.report import Check


def plant_nemo(folder: Path, version: str, encoder: str = "") -> Path:
    modules = folder / "nemo" / "collections" / "asr" / "modules"
    modules.mkdir(parents=True)
    for each in (modules, *list(modules.parents)[:3]):
        (each / "__init__.py").touch()
    (modules / "conformer_encoder.py").write_text(encoder)
    metadata = folder / f"nemo_toolkit-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nemo_toolkit\nVersion: {version}\n")
    return folder


def test_the_variable_is_the_one_that_training_reads() -> None:
    assert nemo.NEMO_VARIABLE == config.NEMO_VARIABLE


def test_nemo_is_not_needed() -> None:
    check = here_check("")
    assert check.state == "ok"
    assert "nemo_toolkit[asr]==3.0.0" in check.found


def test_nemo_is_asked_for_and_missing() -> None:
    (check,) = nemo_checks({"USE_NEMO_CONFORMER": "True"}, None)
    assert check.state == "problem"
    assert "not installed" in check.found
    assert "Unset USE_NEMO_CONFORMER" in check.remedy
    assert here_check("maybe").state == "problem"


def test_nemo_in_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(plant_nemo(tmp_path, "3.0.0")))
    assert here_check("").found == "3.0.0, not imported"
    assert here_check("1").found == "3.0.0, its encoder was imported"


def test_nemo_is_damaged_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(plant_nemo(tmp_path, "2.4.0", "raise ImportError('no hydra')")))
    old = here_check("")
    assert (old.state, "==3.0.0" in old.remedy) == ("note", True)
    broken = here_check("true")
    assert broken.state == "problem"
    assert "no hydra" in broken.found


def test_nemo_of_another_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = list(nemo_checks({"NEST_NEMO_PYTHON": "/nowhere/python"}, None))[1:]
    assert (check.name, check.state) == ("$NEST_NEMO_PYTHON", "problem")
    assert "To create one" in check.remedy
    assert "-m pip install" in elsewhere_check(sys.executable, "--nemo-python").remedy
    assert "path of a Python" in elsewhere_check("/bin/false", "--nemo-python").remedy
    link = tmp_path / "python"  # another path, so that it is another environment's
    link.symlink_to(sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(plant_nemo(tmp_path, "3.0.0")))
    assert elsewhere_check(str(link), "--nemo-python").state == "ok"


@pytest.mark.parametrize(
    ("value", "found"),
    [("64", "64 threads on 4 cores"), ("1", "1 of 4 cores"), ("many", "not a number"), ("0", "not a number")],
)
def test_threads(value: str, found: str) -> None:
    (check,) = threads_check({"OMP_NUM_THREADS": value}, 4)
    assert check.state == "note"
    assert found in check.found
    assert "nset it" in check.remedy


def test_threads_that_are_fine() -> None:
    assert not list(threads_check({"OMP_NUM_THREADS": "4,2"}, 4))
    assert not list(threads_check({"OMP_NUM_THREADS": "1"}, 1))


def test_variables_that_slow_a_run() -> None:
    (check,) = plain_checks({"CUDA_LAUNCH_BLOCKING": "1", "NVIDIA_TF32_OVERRIDE": "0"})
    assert check.name == "CUDA_LAUNCH_BLOCKING"
    assert "Unset" in check.remedy


def test_a_pythonpath_that_hides_something(tmp_path: Path) -> None:
    assert not list(pythonpath_check({"PYTHONPATH": f"{tmp_path}:/nowhere:"}))
    (tmp_path / "torch.py").touch()
    (tmp_path / "random").mkdir()
    (tmp_path / "random" / "__init__.py").touch()
    (tmp_path / "numpy").mkdir()
    (check,) = pythonpath_check({"PYTHONPATH": str(tmp_path)})
    assert check.found.endswith("installed random, torch")
    assert "Unset PYTHONPATH" in check.remedy


def test_another_environment_is_active() -> None:
    (check,) = other_environment_check({"VIRTUAL_ENV": "/other"}, sys.prefix)
    assert "deactivate" in check.remedy
    assert not list(other_environment_check({"VIRTUAL_ENV": sys.prefix}, sys.prefix))


def test_ranks_without_torchrun() -> None:
    (check,) = torchrun_check({"RANK": "1", "WORLD_SIZE": "4"})
    assert check.remedy == "Run: unset RANK WORLD_SIZE"
    assert not list(torchrun_check({"RANK": "1", "TORCHELASTIC_RUN_ID": "x"}))


@pytest.mark.parametrize(
    ("environ", "surprises"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "4"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7"}, False),
    ],
)
def test_slurm(environ: dict[str, str], surprises: bool) -> None:
    checks = list(slurm_check(environ))
    assert bool(checks) is surprises
    assert all("SLURM_JOB_NAME=bash" in check.remedy for check in checks)


def test_a_jail(tmp_path: Path) -> None:
    assert not list(jail_check({}))
    (check,) = jail_check({"NEST_JAIL": f"{tmp_path}:/gone"})
    assert (check.state, check.found) == ("problem", "folder not found: /gone")
    (check,) = jail_check({"NEST_JAIL": str(tmp_path)})
    assert check.state == "note"


def test_the_cache_of_remote_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(cache_check({"NEST_CACHE": str(tmp_path / "cache")}))
    monkeypatch.setenv("NEST_CACHE_GB", "much")
    (check,) = cache_check({"NEST_CACHE": str(tmp_path), "NEST_CACHE_GB": "much"})
    assert (check.name, check.state) == ("NEST_CACHE_GB", "problem")


def test_a_tmpdir_that_is_gone(tmp_path: Path) -> None:
    (check,) = temporary_check({"TMPDIR": "/gone"})
    assert "Create that folder" in check.remedy
    assert not list(temporary_check({"TMPDIR": str(tmp_path)}))


def test_encodings() -> None:
    assert encoding_check({"output": "UTF-8", "text files": "utf8"}).state == "ok"
    check = encoding_check({"output": "ANSI_X3.4-1968"})
    assert (check.state, "LC_ALL=C.UTF-8" in check.remedy) == ("note", True)


def test_nothing_that_surprises() -> None:
    quiet = {"PATH": os.environ["PATH"], "NEST_CACHE": "/tmp"}
    checks: list[Check] = list(environment_checks(quiet))
    assert checks[0].found == "none with an unexpected effect"
    assert [check.name for check in checks] == ["variables", "locale"]
