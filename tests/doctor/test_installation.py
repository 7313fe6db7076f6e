"""Versions, ranges, imports: what is wrong with an installation is found, with its remedy."""

from pathlib import Path

import pytest

import nestcli
from nestcli.doctor import installation
from nestcli.doctor.installation import (
    copies_check,
    dependencies_checks,
    dependency_check,
    extras_checks,
    nest_check,
    presets_check,
    python_check,
    script_check,
    trials,
)
from nestcli.doctor.requirements import Requirement, is_in_range, parsed, requirements_of
from nestcli.doctor.trials import Answer

FINE = Answer({"file": "/env/lib/torch/__init__.py"})


@pytest.mark.parametrize(
    ("version", "wanted", "expected"),
    [
        ("2.13.0+cpu", ">=2.10", True),
        ("2.10", ">=2.10.0", True),
        ("2.9.1", ">=2.10", False),
        ("2.10.0a0+git1", ">=2.10", False),
        ("0.28.0", ">=0.20.1,<0.29", True),
        ("0.29.0", "<0.29,>=0.20.1", False),
        ("2.6.6.post1", ">=2.6.6", True),
        ("1.0", "", True),
        ("1.0", "!=1.0.0", False),
    ],
)
def test_ranges(version: str, wanted: str, expected: bool) -> None:
    assert is_in_range(version, wanted) is expected


def test_requirements_as_they_stand_in_metadata() -> None:
    assert parsed(["typer<0.29,>=0.20.1", "urllib3", 'moto[s3]>=5; extra == "dev"']) == [
        Requirement("typer", "<0.29,>=0.20.1"),
        Requirement("urllib3", ""),
        Requirement("moto", ">=5", "dev"),
    ]
    assert requirements_of("no-such-distribution") is None


def test_the_order_of_imports_names_every_package_that_is_needed() -> None:
    assert {each.name for each in requirements_of("nestcli") or [] if not each.extra} <= set(installation._CORE)


def test_a_package_that_is_fine() -> None:
    check = dependency_check(Requirement("torch", ">=2.10"), "2.13.0", FINE, has_nemo=False, home=Path("/env/lib"))
    assert (check.state, check.found) == ("ok", "2.13.0")


@pytest.mark.parametrize(
    ("name", "version", "answer", "has_nemo", "state", "found", "remedy"),
    [
        ("torch", None, Answer(), False, "problem", "not installed", 'pip install "torch<2.14,>=2.10"'),
        ("torch", "2.9.0", FINE, False, "problem", "weights_only=True can be bypassed", "torch<2.14,>=2.10"),
        ("torch", "2.9.0", FINE, True, "problem", "2.9.0 is not <2.14,>=2.10", 'install "torch<2.14,>=2.10"'),
        ("lightning", "2.6.3", FINE, False, "problem", "malicious", "Replace it at once"),
        ("lightning", "2.6.2", FINE, True, "problem", "malicious", "Replace it at once"),
        ("lightning", "2.6.5", FINE, False, "problem", "runs code from", 'pip install "lightning<2.7,>=2.6.6"'),
        ("lightning", "2.7.0", FINE, False, "problem", "2.7.0 is not <2.7,>=2.6.6: nest uses private", "<2.7,>=2.6.6"),
        ("torch", "2.14.0+cpu", FINE, False, "problem", "2.14.0+cpu is not <2.14,>=2.10: nest uses private", "<2.14"),
        ("lightning", "2.4.0", FINE, True, "note", "2.4.0 is not <2.7,>=2.6.6", "NeMo pins it"),
        ("omegaconf", "2.3.0", FINE, True, "note", "2.3.0 is not >=2.4.0", "NeMo pins it"),
        ("torch", "2.13.0", Answer(error="OSError: libgomp"), False, "problem", "libgomp", "--force-reinstall"),
        ("torch", "2.13.0", Answer({"file": "/home/x/torch.py"}), False, "note", "/home/x/torch.py", "PYTHONPATH"),
    ],
)  # fmt: skip
def test_a_package_that_is_not(
    name: str, version: str | None, answer: Answer, has_nemo: bool, state: str, found: str, remedy: str
) -> None:
    wanted = Requirement(name, {"torch": "<2.14,>=2.10", "lightning": "<2.7,>=2.6.6", "omegaconf": ">=2.4.0"}[name])
    check = dependency_check(wanted, version, answer, has_nemo=has_nemo, home=Path("/env/lib"))
    assert check.state == state
    assert found in check.found
    assert remedy in check.remedy


def test_a_malicious_release_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "import:lightning.pytorch" in trials()
    monkeypatch.setattr(installation, "installed_version", lambda name: "2.6.2")
    assert "import:lightning.pytorch" not in trials()
    assert "import:torch" in trials()


def test_the_first_package_that_fails_is_the_cause() -> None:
    error = Answer(error="ImportError: libtorch_cpu.so")
    answers = {"import:torch": error, "import:lightning.pytorch": error}
    checks = {check.name: check for check in dependencies_checks(answers)}
    assert "--force-reinstall torch" in checks["torch"].remedy
    assert checks["lightning"].remedy == "Fix torch first: its import fails in the same way."


def test_extras() -> None:
    needed = parsed(["s3fs>=2024.6; extra == 's3'", "wandb; extra == 'wandb'", "h5py>=3.11; extra == 'hdf5'"])
    checks = list(extras_checks(needed, {"s3fs": "2026.9", "h5py": "3.1"}))
    assert [(check.name, check.state) for check in checks] == [
        ("extra hdf5", "note"),
        ("extras", "ok"),
        ("extras not here", "ok"),
    ]
    assert checks[0].remedy == 'pip install "nestcli[hdf5]"'
    assert "s3 (data on S3)" in checks[1].found
    assert 'pip install "nestcli[wandb]"' in checks[2].found


def test_a_source_tree_that_pip_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    package = tmp_path / "src" / "nestcli"
    assert nest_check(package, nestcli.__version__, None).state == "ok"
    assert "pip install -e" in nest_check(package, None, None).remedy
    assert nest_check(package, "0.0.1", None).remedy == "Reinstall it: pip install ."
    other = nest_check(package, nestcli.__version__, "/elsewhere")
    assert (other.state, "/elsewhere" in other.found, "PYTHONPATH" in other.remedy) == ("note", True, True)
    assert "installed in /site" in nest_check(Path("/site/nestcli"), nestcli.__version__, None).found


def test_several_copies(tmp_path: Path) -> None:
    for name in ("a", "b", "presets only"):
        (tmp_path / name / "nestcli").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / name / "nestcli" / "__init__.py").touch()
    running = tmp_path / "a" / "nestcli"
    path = [str(tmp_path / name) for name in ("a", "b", "presets only")]
    (check,) = copies_check(running, path)
    assert check.state == "note"
    assert str(tmp_path / "b" / "nestcli") in check.found
    assert "pip uninstall nestcli" in check.remedy
    assert not list(copies_check(running, [path[0], path[2]]))


def test_a_nest_of_another_environment(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "nest").touch()
    (check,) = script_check(str(tmp_path / "theirs" / "nest"), tmp_path / "ours")
    assert check.state == "note"
    assert "Activate" in check.remedy
    assert not list(script_check(str(tmp_path / "ours" / "nest"), tmp_path / "ours"))
    assert not list(script_check(None, tmp_path / "ours"))


def test_python() -> None:
    assert python_check((3, 10, 0), "python", "posix").state == "ok"
    assert "3.10 or later" in python_check((3, 9, 18), "python", "posix").remedy
    assert "WSL" in python_check((3, 12, 0), "python", "nt").remedy


def test_presets_that_are_missing() -> None:
    check = presets_check(Answer(error="ConfigError: no such file"))
    assert check.state == "problem"
    assert "pip install ." in check.remedy
