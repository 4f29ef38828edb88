"""`digitlab train`: one run, told on the terminal."""

import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from digitlab.compose import Composed
from digitlab.config import Config
from digitlab.environment import describe_environment
from digitlab.record import Identity
from digitlab.run import Ended, perform
from digitlab.tracking import open_tracking
from digitlab.training import Watch


def train(composed: Composed, lab: Path, tags: Mapping[str, str] | None = None) -> int:
    """Train one configuration and record it, with tags beside; returns the exit status.

    Raises:
        UserError: data or stores cannot be used.
    """
    config = composed.config
    tracking = open_tracking(config, lab)
    name = f"{config.study.name}-seed-{config.trainer.seed}"
    environment = describe_environment()
    identity = Identity(name, "train", tags or {}, None, composed.overrides, environment)
    with Spoken(config) as watch:
        outcome = perform(config, identity, tracking, lab, watch)
    said = f"run {outcome.run_id} ({name})" if outcome.run_id else "run"
    if outcome.state != "finished":
        print(f"{said} {outcome.state}: {outcome.reason}")
        return 130 if outcome.state == "interrupted" else 1
    kind = "test" if "test_accuracy" in outcome.metrics else "val"
    accuracy = outcome.metrics[f"{kind}_accuracy"]
    print(f"{said}: {kind}_accuracy {accuracy:.2%} in {outcome.metrics['seconds']:.1f} s")
    return 0


class Spoken(Watch):
    """Prints a line an epoch; ends the run at the next batch after Ctrl-C."""

    def __init__(self, config: Config) -> None:
        self.epochs = config.trainer.epochs
        self.stopped = False

    def __enter__(self) -> "Spoken":
        self.before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def _stop(self, *_: int | FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def batch(self, done: float) -> None:
        if self.stopped:
            raise Ended("interrupted", "it was stopped")

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        told = [
            f"{name} {metrics[name]:.4f}" for name in sorted(metrics) if name != "images_per_second"
        ]
        print(f"epoch {epoch}/{self.epochs}  " + "  ".join(told), flush=True)
