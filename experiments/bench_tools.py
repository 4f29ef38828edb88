"""What the parts of the bench share: figures, labs of their own, whole processes."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from digitlab.base.errors import UserError
from digitlab.base.paths import lab_folder

PROGRAM = str(Path(sys.executable).with_name("digitlab"))
# Over what a recipe or an environment may name: the stores of the lab.
OWN_STORES = ("study.storage=null", "tracking.uri=null")


@dataclass(frozen=True)
class Figure:
    """One line of the table: n values, and the bar that their median is compared with."""

    name: str
    unit: str
    values: list[float]
    least: float | None = None  # the bar: at least this
    most: float | None = None  # or at most this

    def row(self) -> list[str]:
        low, middle, high = (quantile(self.values, share) for share in (0.25, 0.5, 0.75))
        spread = f"{min(self.values):.3g} to {max(self.values):.3g}"
        bar, verdict = "", ""
        if self.least is not None:
            bar, verdict = f">= {self.least:g}", _verdict(low >= self.least, high < self.least)
        if self.most is not None:
            bar, verdict = f"<= {self.most:g}", _verdict(high <= self.most, low > self.most)
        number = str(len(self.values))
        return [self.name, f"{middle:.3g}", spread, number, self.unit, bar, verdict]


def quantile(values: list[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def _verdict(met: bool, missed: bool) -> str:
    """Name the side of the bar on which the middle half of the values lies."""
    return "met" if met else "not met" if missed else "not decided"


def leave_stores() -> Path:
    """Return the lab, and drop what names a person's stores, which children would inherit."""
    before = dict(os.environ)
    lab = lab_folder()  # which reads its .env
    os.environ.clear()
    private = ("DIGITLAB_", "MLFLOW_")
    os.environ.update({k: v for k, v in before.items() if not k.startswith(private)})
    return lab


@contextmanager
def own_lab(lab: Path) -> Iterator[Path]:
    """An empty lab on the same disk, with the same data."""
    (lab / "data").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=lab) as folder:
        (Path(folder) / "data").symlink_to((lab / "data").resolve())
        yield Path(folder)


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def run(command: list[str], lab: Path) -> str:
    """Return what a program prints that works in `lab`."""
    place = os.environ | {"DIGITLAB_HOME": str(lab), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=place, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise UserError(f"{' '.join(command)}: {reason}")
    return done.stdout
