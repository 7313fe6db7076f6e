"""What may not stand in src/: whatever runs code or unpacks files out of what a stranger wrote.

`python .ci/gate.py [FOLDER]` prints every place and ends with 1 if there is one. An exception is a line of ALLOWED.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

# (file below src/nestcli, what): why it is no danger there.
ALLOWED = {
    ("parity/worker.py", "OmegaConf.load"): "NeMo's own file, in NeMo's own environment",
    ("__init__.py", "import_module of what is not written here"): "of a table of our own rooms",
    ("doctor/child.py", "import_module of what is not written here"): "of the packages that nest itself names",
    ("interpreter.py", "a Python that imports from the current folder"): "takes that folder out of the path first",
    ("jobs/pool.py", "pickle.loads"): "between this process and its own workers, over a socket that nobody else has",
    ("jobs/pool.py", "import pickle"): "the same",
    ("data/loader/worker.py", "pickle.loads"): "what it has just packed itself, to see whether an error can be sent",
    ("data/loader/worker.py", "import pickle"): "the same",
    ("__main__.py", "os.execv"): "the same interpreter with the same words, in UTF-8 mode",
    ("checkpoint/weights.py", "import pickle"): "for the name of its error alone",
    ("checkpoint/pickled.py", "import pickletools"): "reads opcodes, runs none",
}
_CALLS = {
    "yaml.unsafe_load_all", "yaml.full_load_all", "OmegaConf.load", "torch.jit.load", "torch.hub.load", "onnx.load",
    "os.startfile", "pty.spawn", "os.posix_spawn", "os.posix_spawnp", "runpy.run_path", "runpy.run_module",
    "pandas.read_pickle", "pd.read_pickle",
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "marshal.loads", "shelve.open", "dill.load", "dill.loads",
    "joblib.load", "subprocess.getoutput", "subprocess.getstatusoutput", "shutil.unpack_archive", "tempfile.mktemp",
}  # fmt: skip
_METHODS = {"extractall", "extract_all"}
_MODULES = {"pickle", "pickletools", "marshal", "shelve", "dill", "joblib", "cloudpickle", "hydra", "webbrowser", "imp"}
_FAMILIES = ("os.exec", "os.spawn")
_STARTS = {f"subprocess.{name}" for name in ("run", "call", "check_call", "check_output", "Popen")}


def faults(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything in a module's source that is not to be there."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, f"import {each.name}") for each in node.names if _module(each.name) in _MODULES)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and _module(node.module or "") in _MODULES:
            yield node.lineno, f"import {node.module}"
        elif isinstance(node, ast.ImportFrom):
            called = (f"{node.module}.{each.name}" for each in node.names)
            yield from ((node.lineno, f"import {name}") for name in called if _forbidden(name))
        elif isinstance(node, ast.Call):
            yield from _call(node)
        elif isinstance(node, ast.List) and [ast.unparse(each) for each in node.elts[:1]] == ["sys.executable"]:
            yield from ((node.lineno, "a Python that imports from the current folder") for _ in [0] if _looks(node))


def _looks(command: ast.List) -> bool:
    """Whether a command has Python look for modules in the current folder first."""
    return any(isinstance(each, ast.Constant) and each.value in ("-c", "-m") for each in command.elts)


def _forbidden(name: str) -> bool:
    return name in _CALLS or name.startswith(_FAMILIES)


def _module(name: str) -> str:
    return name.partition(".")[0]


def _call(node: ast.Call) -> Iterator[tuple[int, str]]:
    name = ast.unparse(node.func)
    given = {word.arg: word.value for word in node.keywords}
    if _forbidden(name) or name.rpartition(".")[2] in _METHODS:
        yield node.lineno, name
    first = node.args[0] if node.args else given.get("args")
    if name.rpartition(".")[2] == "import_module" and not isinstance(first, ast.Constant):
        yield node.lineno, "import_module of what is not written here"
    if name in _STARTS and isinstance(first, ast.Constant | ast.JoinedStr | ast.BinOp):
        yield node.lineno, f"{name} of one text: give a list of words"
    if any(word.startswith("trust_remote_code") for word in given if word):
        yield node.lineno, "trust_remote_code"
    if "shell" in given and not _is(given["shell"], False):
        yield node.lineno, "shell=True"
    if name in ("torch.load", "load_from_checkpoint") and not _is(given.get("weights_only"), True):
        yield node.lineno, f"{name} without weights_only=True"
    if name in ("np.load", "numpy.load") and not _is(given.get("allow_pickle"), False):
        yield node.lineno, f"{name} without allow_pickle=False"
    if name.endswith(".extract") and "tar" in name.lower():
        yield node.lineno, name
    if "Loader" in given and "Safe" not in ast.unparse(given["Loader"]) and ast.unparse(given["Loader"]) != "_LOADER":
        yield node.lineno, f"{name} with {ast.unparse(given['Loader'])}"


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def main(root: Path) -> int:
    found, used = [], set()
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root).as_posix()
        for line, what in faults(path.read_text(encoding="utf-8")):
            if (place, what) in ALLOWED:
                used.add((place, what))
            else:
                found.append(f"{path}:{line}: {what}")
    found += [
        f".ci/gate.py: {place}: {what} is allowed, and is not there any more" for place, what in ALLOWED.keys() - used
    ]
    print("\n".join(found) if found else "gate: nothing in src/ runs or unpacks what a stranger wrote")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(Path(*sys.argv[1:] or [Path(__file__).parents[1] / "src" / "nestcli"])))
