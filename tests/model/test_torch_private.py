"""PyTorch's private names: each is still there, and they are used in one file only."""

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from nestcli.model import torch_private
from nestcli.model.torch_private import NAMES, SEEN_IN

ROOM = Path(torch_private.__file__).parent
PUBLIC = {"__init__", "__version__"}


def found(name: str) -> Any:
    """The object of a dotted name; modules on the way are imported."""
    head, *rest = name.split(".")
    value, path = importlib.import_module(head), head
    for part in rest:
        path = f"{path}.{part}"
        value = getattr(value, part) if hasattr(value, part) else importlib.import_module(path)
    return value


def private_names(source: str) -> set[str]:
    """Attributes, imports and overridden methods of a module that begin with one underscore and are torch's."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names if alias.name.startswith("torch")]
        elif isinstance(node, ast.Attribute):
            dotted = [ast.unparse(node)]
        elif isinstance(node, ast.FunctionDef) and hasattr(torch.nn.Module, node.name):
            dotted = [f"torch.nn.Module.{node.name}"]
        else:
            continue
        names |= {name for name in dotted if name.startswith("torch.") and is_private(name)}
    return names


def is_private(name: str) -> bool:
    parts = name.split(".")
    return name.startswith("torch.ops.aten.") or any(part.startswith("_") and part not in PUBLIC for part in parts)


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_still_there(name: str) -> None:
    try:
        found(name)
    except (ImportError, AttributeError):
        pytest.fail(
            f"PyTorch {torch.__version__} has no {name}, which {SEEN_IN} had. nestcli/model/torch_private.py uses it "
            f"({NAMES[name]}): use its successor there, or do without."
        )


def test_a_name_that_is_gone_is_noticed() -> None:
    for name in ("torch._functorch.config.no_such_setting", "torch._no_such_room.thing"):
        with pytest.raises((ImportError, AttributeError)):
            found(name)


def test_private_names_are_used_in_one_file() -> None:
    """`torch._functorch.config` is a step on the way to its setting."""
    used = {path.name: private_names(path.read_text(encoding="utf-8")) for path in ROOM.glob("*.py")}
    here = used.pop("torch_private.py")
    assert {name: names for name, names in used.items() if names} == {}
    assert here <= {*NAMES, *(name.rpartition(".")[0] for name in NAMES)}
    assert "torch._dynamo.maybe_mark_dynamic" in here  # the search finds something
    assert private_names("from torch.nn.modules.batchnorm import _BatchNorm\nx = torch._C._y(1)") == {
        "torch.nn.modules.batchnorm._BatchNorm", "torch._C._y", "torch._C",
    }  # fmt: skip
