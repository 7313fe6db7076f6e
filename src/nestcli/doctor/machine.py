"""Facts from the operating system and the container: cores, memory, limits, file systems, NVIDIA hardware."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 1 << 60  # bytes; version 1 of cgroups reports a huge number for "no limit"
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # PCI vendor, and PCI class of graphics cards


def processor_quota(root: Path = Path("/")) -> float | None:
    """Return the CPU time that a container may use, in cores; None without a limit."""
    quotas = []
    for folder in _groups(root, "cpu"):
        both = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        if len(both) == 2 and both[0].isdecimal() and int(both[1]) > 0:
            quotas.append(int(both[0]) / int(both[1]))
    return min(quotas, default=None)


def memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """Return total and available memory in bytes, within the container's limit; None if the system does not tell."""
    text = _text(root / "proc/meminfo")
    table = {name: int(count) * 1024 for name, count in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    if "MemTotal" not in table:
        return None
    total, available = table["MemTotal"], table.get("MemAvailable", table.get("MemFree", 0))
    for folder in _groups(root, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if limit is not None and used is not None and limit < _NO_LIMIT:
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", _text(folder / "memory.stat"), re.MULTILINE)
            total = min(total, limit)
            available = min(available, max(0, limit - used + (int(cached[1]) if cached else 0)))
    return total, available


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process' control groups, of version 1 or 2, from the innermost to the outermost."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            top = root / "sys/fs/cgroup"
        elif controller in names.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = top / path.lstrip("/")
        yield from (each for each in (folder, *folder.parents) if each == top or top in each.parents)


def nvidia_driver(root: Path = Path("/")) -> str | None:
    """Return the version of NVIDIA's kernel driver, None if it is not loaded."""
    match = re.search(r"Kernel Module[^\d]*([\d.]+)", _text(root / "proc/driver/nvidia/version"))
    if match:
        return match[1]
    others = ("dev/nvidiactl", "usr/lib/wsl/lib/libcuda.so.1")  # the latter is Windows' driver, in WSL
    return "of unknown version" if any((root / name).exists() for name in others) else None


def nvidia_cards(root: Path = Path("/")) -> int:
    """Count NVIDIA's graphics cards on the PCI bus, with or without a driver."""
    devices = root / "sys/bus/pci/devices"
    folders = devices.iterdir() if devices.is_dir() else ()
    return sum(
        _text(each / "vendor").strip() == _NVIDIA and _text(each / "class").startswith(_DISPLAY) for each in folders
    )


@dataclass(frozen=True)
class Mount:
    """A file system: its kind, such as ext4, and its options."""

    kind: str
    options: frozenset[str]


def mount_of(path: Path, root: Path = Path("/")) -> Mount | None:
    """Return the file system that a path is on; None if the system does not tell."""
    best, found = -1, None
    for line in _text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 6 or not kind:
            continue
        point = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), fields[4]))
        if (path == point or point in path.parents) and len(point.parts) >= best:
            best, found = len(point.parts), Mount(kind[0], frozenset(fields[5].split(",")))
    return found


def open_files() -> int:
    """Return the maximum number of open files per process."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _NO_LIMIT if soft == resource.RLIM_INFINITY else soft


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None
