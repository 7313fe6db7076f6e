"""The gate of `make check` sees each thing that it forbids, and passes what is fine."""

import runpy
from pathlib import Path

import pytest

GATE = Path(__file__).parents[2] / ".ci" / "gate.py"


@pytest.mark.parametrize(
    "line",
    [
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=wanted)",
        "import pickle",
        "from pickle import loads",
        "import cloudpickle",
        "eval('1')",
        "exec(text)",
        "os.system('ls')",
        "tar.extractall(folder)",
        "tarfile.open(path).extract('a')",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.FullLoader)",
        "yaml.parse(text, Loader=yaml.UnsafeLoader)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=wanted)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.full_load_all(text)",
        "OmegaConf.load(path)",
        "os.execvp(name, words)",
        "os.spawnl(os.P_WAIT, name)",
        "os.posix_spawn(name, words, {})",
        "from os import system",
        "from subprocess import getoutput",
        "import webbrowser",
        "tempfile.mktemp()",
        "importlib.import_module(name)",
        "import_module(f'nestcli.{name}')",
        "runpy.run_path(path)",
        "torch.jit.load(path)",
        "subprocess.run('ls')",
        "subprocess.run(f'ls {path}')",
        "subprocess.Popen(args='ls ' + path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run([sys.executable, '-c', code])",
        "command = [sys.executable, '-m', 'nestcli']",
    ],
)
def test_what_is_forbidden_is_seen(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = runpy.run_path(str(GATE))
    assert list(gate["faults"](f"x = 1\n{line}\n"))
    (tmp_path / "module.py").write_text(f"x = 1\n{line}\n")
    assert gate["main"](tmp_path) == 1
    assert "module.py:2:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, map_location='cpu', weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "model.eval()",
        "yaml.parse(text, Loader=yaml.SafeLoader)",
        "re.compile('x')",
        "subprocess.run(['ls'])",
        "subprocess.run(command)",
        "import_module('ray')",
        "subprocess.run([sys.executable, script])",
        "os.execute",
    ],
)
def test_what_is_fine_passes(line: str) -> None:
    assert not list(runpy.run_path(str(GATE))["faults"](line))


def test_the_source_passes() -> None:
    gate = runpy.run_path(str(GATE))
    assert gate["main"](GATE.parents[1] / "src" / "nestcli") == 0
