"""Limits of cores and memory, as control groups of both versions state them."""

import os
from pathlib import Path

import pytest

from digitlab.base.limits import usable_cores, usable_memory

CORES = len(os.sched_getaffinity(0))
V1, V2 = "4:memory:/a/b\n1:cpu,cpuacct:/a/b\n0::/\n", "0::/a/b\n"


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, content in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        (V2, {"a/b/cpu.max": "100000 100000"}, 1),
        (V2, {"a/b/cpu.max": "50000 100000"}, 1),  # half a core
        (V2, {"a/b/cpu.max": "max 100000"}, CORES),
        (V2, {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1),  # of a group above
        (V2, {"cpu.max": "100000 100000"}, 1),  # a container that sees its own as the topmost
        (V2, {"a/b/cpu.max": "9900000 100000"}, CORES),  # more than there are
        (V2, {"a/b/cpu.max": "nonsense"}, CORES),
        (V2, {}, CORES),
        ("", {}, CORES),  # no Linux
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "100000", "cpu/a/b/cpu.cfs_period_us": "100000"}, 1),
        (V1, {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "-1", "cpu/a/b/cpu.cfs_period_us": "100000"}, CORES),
    ],
)
def test_quota_of_a_control_group_bounds_the_cores(
    tmp_path: Path, groups: str, files: dict[str, str], cores: int
) -> None:
    files = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    assert usable_cores(machine(tmp_path, groups, files)) == cores


@pytest.mark.parametrize(
    ("groups", "name", "content", "is_limit"),
    [
        (V2, "a/b/memory.max", str(2**20), True),
        (V2, "a/memory.max", str(2**20), True),
        (V2, "a/b/memory.max", "max", False),
        (V1, "memory/a/b/memory.limit_in_bytes", str(2**20), True),
        (V1, "memory/a/b/memory.limit_in_bytes", "9223372036854771712", False),
    ],
)
def test_memory_limit_of_a_control_group_is_what_there_is(
    tmp_path: Path, groups: str, name: str, content: str, is_limit: bool
) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    root = machine(tmp_path, groups, {f"sys/fs/cgroup/{name}": content})
    assert usable_memory(root) == (2**20 if is_limit else whole)
