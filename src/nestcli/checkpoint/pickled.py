"""Check a pickle of tensors opcode by opcode, before PyTorch runs any of it.

PyTorch calls only functions that it allows. But it does not notice a key of a few hundred bytes that takes practically
forever to hash: a tuple of twice the tuple of twice the tuple ... by references inside the pickle.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Collection
from typing import Any

from nestcli.errors import CheckpointError

# Everything that a state dict needs. PyTorch allows more (bytearray, sparse tensors), which could demand any memory.
_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)"
    r"|torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
_CALLING = frozenset(("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"))
_MOST_OPCODES = 500_000  # the largest preset needs 130,000, optimiser included
_LARGEST_TUPLES = 1 << 20  # items of all tuples; nested tuples count once for each occurrence
_MARK = -1


def check_pickle(table: bytes, source: str, also: Collection[str] = ()) -> None:
    """Refuse names other than those of tensors and ordered dictionaries, and exponentially large tuples; run nothing.

    `also` are further names that the pickle may hold. Raises CheckpointError, and ValueError if `table` is not a valid
    pickle.
    """
    sizes = _Sizes(source)
    for number, (opcode, argument, _) in enumerate(pickletools.genops(table)):
        name = opcode.name
        if number > _MOST_OPCODES:
            raise CheckpointError(f"{source}: the weights' table of tensors has an implausible size. Refused.")
        if name in _CALLING and not (name == "GLOBAL" and (_GLOBALS.fullmatch(str(argument)) or argument in also)):
            named = f" ({str(argument)[:100]!r})" if argument is not None else ""
            raise CheckpointError(f"{source}: the weights name code to call{named}. Refused.")
        sizes.follow(opcode, argument)


class _Sizes:
    """The pickle's stack, with the number of items in place of each tuple and 1 in place of everything else.

    Only tuples are counted, as they are the only containers that can be keys.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._stack: list[int] = []
        self._memo: dict[int, int] = {}
        self._seen = 0

    def follow(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        name, stack = opcode.name, self._stack
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if argument is None else int(argument)] = self._top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._push(self._memo.get(int(argument), 1))
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "DUP":
            self._push(self._top())
        else:
            taken = self._taken(opcode)
            for _ in opcode.stack_after:
                self._push(1 + sum(taken) if "TUPLE" in name else 1)

    def _top(self) -> int:
        return max(1, self._stack[-1]) if self._stack else 1

    def _push(self, size: int) -> None:
        self._seen += size - 1
        if self._seen > _LARGEST_TUPLES:
            raise CheckpointError(f"{self._source}: the weights hold tuples that grow without limit. Refused.")
        self._stack.append(size)

    def _taken(self, opcode: pickletools.OpcodeInfo) -> list[int]:
        """Pop what an opcode takes from the stack, by pickletools' table: a few items, or all down to the last mark."""
        stack, before = self._stack, opcode.stack_before
        taken = []
        if pickletools.markobject in before or (opcode.name == "POP" and stack[-1:] == [_MARK]):
            while stack and (size := stack.pop()) != _MARK:
                taken.append(size)
            before = before[: before.index(pickletools.markobject)] if pickletools.markobject in before else []
        for _ in before[: len(stack)]:
            taken.append(stack.pop())
        return taken
