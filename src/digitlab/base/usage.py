"""What a piece of work takes of the machine: processor time and memory of this process."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

# Metrics of a run that no two runs share.
MACHINE_METRICS = (
    *("seconds", "images_per_second", "cpu_seconds", "peak_memory_mb"),
    *("resumed_at_step", "resumed_at_seconds"),  # of a run that went on from a checkpoint
)
_PROC = Path("/proc/self")


class ProcessUsage:
    """Measures from its creation on."""

    def __init__(self) -> None:
        with suppress(OSError):  # Linux alone can forget an earlier peak
            (_PROC / "clear_refs").write_text("5")  # proc(5): resets VmHWM
        self._cpu_s = _cpu_seconds()

    def metrics(self) -> dict[str, float]:
        """Return seconds of all processor cores together, and the largest memory in megabytes."""
        return {"cpu_seconds": _cpu_seconds() - self._cpu_s, "peak_memory_mb": _peak_mb()}


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _peak_mb() -> float:
    with suppress(OSError, ValueError, StopIteration):
        lines = (_PROC / "status").read_text().splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
        return int(kilobytes) / 1e3 * 1.024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3 * 1.024
