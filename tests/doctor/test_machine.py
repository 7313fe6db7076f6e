"""Facts that the container and the kernel report, from planted files."""

from pathlib import Path

import pytest

from nestcli.doctor import machine
from nestcli.jobs.cores import available_cores

MEMINFO = "MemTotal:       1000000 kB\nMemFree:          100000 kB\nMemAvailable:   800000 kB\n"


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_container_of_the_second_kind(tmp_path: Path) -> None:
    root = plant(tmp_path, {
        "proc/self/cgroup": "0::/jobs/one\n",
        "proc/meminfo": MEMINFO,
        "sys/fs/cgroup/jobs/one/cpu.max": "max 100000\n",
        "sys/fs/cgroup/jobs/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/jobs/one/memory.max": "512000000\n",
        "sys/fs/cgroup/jobs/one/memory.current": "400000000\n",
        "sys/fs/cgroup/jobs/one/memory.stat": "anon 1\ninactive_file 100000000\n",
    })  # fmt: skip
    assert machine.processor_quota(root) == 1.5
    assert machine.memory(root) == (512_000_000, 212_000_000)


def test_a_container_of_the_first_kind(tmp_path: Path) -> None:
    root = plant(tmp_path, {
        "proc/self/cgroup": "4:memory:/job\n2:cpu,cpuacct:/job\n",
        "proc/meminfo": MEMINFO,
        "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "200000\n",
        "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "5\n",
    })  # fmt: skip
    assert machine.processor_quota(root) == 2.0
    assert machine.memory(root) == (1_024_000_000, 819_200_000)


def test_no_container_and_no_linux(tmp_path: Path) -> None:
    assert machine.processor_quota(tmp_path) is None
    assert machine.memory(tmp_path) is None
    assert machine.nvidia_driver(tmp_path) is None
    assert machine.nvidia_cards(tmp_path) == 0
    assert machine.mount_of(Path("/"), tmp_path) is None


def test_nvidia(tmp_path: Path) -> None:
    root = plant(tmp_path, {
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n",
        "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
        "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n",
        "sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n",
        "sys/bus/pci/devices/0000:01:00.1/class": "0x040300\n",
    })  # fmt: skip
    assert machine.nvidia_driver(root) == "550.54.15"
    assert machine.nvidia_cards(root) == 1, "its sound device is not a graphics card"


def test_nvidia_under_wsl(tmp_path: Path) -> None:
    assert machine.nvidia_driver(plant(tmp_path, {"dev/dxg": ""})) is None, "every GPU has that there"
    assert machine.nvidia_driver(plant(tmp_path, {"usr/lib/wsl/lib/libcuda.so.1": ""})) == "of unknown version"


@pytest.mark.parametrize(
    ("path", "kind"), [("/home/a", "nfs4"), ("/home", "nfs4"), ("/homes", "ext4"), ("/my data/x", "vfat")]
)
def test_mounts(tmp_path: Path, path: str, kind: str) -> None:
    root = plant(tmp_path, {
        "proc/self/mountinfo": "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "30 22 0:40 / /home rw,noexec shared:2 - nfs4 server:/home rw\n"
        "31 22 0:41 / /my\\040data rw - vfat /dev/sdb1 rw\n",
    })  # fmt: skip
    mount = machine.mount_of(Path(path), root)
    assert mount is not None
    assert mount.kind == kind
    assert ("noexec" in mount.options) == (kind == "nfs4")


def test_this_machine() -> None:
    assert available_cores() >= 1
    assert machine.open_files() > 0
