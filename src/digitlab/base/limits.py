"""How much of the machine this process may use: a container or a scheduler may give it less."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")


def usable_cores(root: Path = _ROOT) -> int:
    """Return the number of cores that this process may keep busy, at least 1.

    Args:
        root: of the file system that the control groups' limits are read from.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas: list[float] = [cores or 1]
    for folder in _groups(root, "cpu"):
        # Both in microseconds; version 2 writes `max`, version 1 writes -1 where there is no limit.
        both = _read(folder / "cpu.max").split()
        both = both or [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        with suppress(ValueError):
            quota, period = map(int, both)
            quotas += [quota / period] if quota > 0 and period > 0 else []
    return max(1, math.floor(min(quotas)))


def usable_memory(root: Path = _ROOT) -> int:
    """Return the bytes of memory that this process may use, with all those beside it."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # of version 2, of version 1
            with suppress(ValueError):  # `max`, or no such file
                sizes.append(int(_read(folder / name)))
    return min(sizes)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, of both versions, and of those above.

    A container often sees its own group as the topmost, under the path of another.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controllers and controller)
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            yield top / folder


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
