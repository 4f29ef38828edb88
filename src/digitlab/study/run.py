"""One run: trained, recorded, and told on the terminal where it is a run alone."""

import hashlib
import json
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

import safetensors.torch

from digitlab.base.environment import describe_environment
from digitlab.base.errors import UserError
from digitlab.config.compose import Composed
from digitlab.config.types import Config
from digitlab.records.mlflow import RunRecord, Tracking, open_tracking
from digitlab.records.record import Identity, begin_record, seal, stage, sum_files
from digitlab.training.fit import Fit, Watch, fit, one_of_each
from digitlab.training.pictures import draw_confusions, draw_film


class Ended(Exception):
    """Raised by a watch to end a run; `state` is pruned, interrupted or failed."""

    def __init__(self, state: str, reason: str = "") -> None:
        super().__init__(reason)
        self.state = state


class Broken(RuntimeError):
    """Something that runs are recorded in does not work: no fault of the configuration."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended; `metrics` are the last of each name."""

    state: str  # finished, pruned, interrupted or failed
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    weights_sha256: str = ""
    run_id: str | None = None
    error: Exception | None = None
    record: RunRecord | None = None


def perform(
    config: Config,
    identity: Identity,
    tracking: Tracking,
    lab: Path,
    watch: Watch,
    rungs: list[float] | None = None,
) -> Outcome:
    """Train `config` and record it; what goes wrong in training is the outcome, not raised.

    Raises:
        UserError, OSError, Broken: data or stores cannot be used: no other run would fare better.
    """
    record = begin_record(tracking, config, identity)
    begun = time.perf_counter()
    told = _Told(record, watch)
    state, reason, error = "finished", "", None
    tags: dict[str, str] = {}
    try:
        fitted = fit(config, lab, told, rungs)
        told.metrics |= fitted.metrics
        sums, tags = _keep(config, identity, fitted, record, lab)
    except Ended as end:
        state, reason = end.state, str(end)
    except (UserError, OSError, Broken, KeyboardInterrupt):
        record.end("interrupted")
        raise
    except Exception as exception:  # noqa: BLE001  a failed run is a result, with its reason
        state, error = "failed", exception
        reason = f"{type(exception).__name__}: {exception}"
    told.metrics["seconds"] = time.perf_counter() - begun
    final = {k: v for k, v in told.metrics.items() if k.startswith("test_") or k == "seconds"}
    told.logged += [(name, config.trainer.epochs, value) for name, value in final.items()]
    if state == "finished":
        known = {"digitlab.kind": identity.kind, **identity.tags, **tags}
        tags["digitlab.seal"] = seal(sums, told.logged, known)
    else:
        tags = {"digitlab.reason": reason[:5000]}
    record.log(final, config.trainer.epochs, tags)
    record.end(state)
    digest = tags.get("digitlab.weights_sha256", "")
    return Outcome(state, reason, told.metrics, digest, record.run_id, error, record)


def _keep(
    config: Config, identity: Identity, fitted: Fit, record: RunRecord, lab: Path
) -> tuple[str, dict[str, str]]:
    """Record configuration, weights, predictions and pictures; returns their list and tags."""
    environment = {**identity.environment, "numerics": fitted.numerics}
    folder = stage(lab, config, replace(identity, environment=environment))
    weights = safetensors.torch.save(fitted.weights)
    (folder / "weights.safetensors").write_bytes(weights)
    guesses, labels = fitted.logits.argmax(1).byte(), fitted.labels.byte()
    predictions = safetensors.torch.save(
        {"predictions": guesses, "labels": labels, "logits": fitted.logits}
    )
    (folder / "predictions.safetensors").write_bytes(predictions)
    (folder / "pictures").mkdir()
    draw_confusions(fitted.logits, fitted.labels, fitted.images, folder / "pictures")
    if fitted.film:
        shown = one_of_each(fitted.labels)
        draw_film(fitted.film, fitted.images[shown], fitted.labels[shown], folder / "pictures")
    sums = sum_files(folder)
    record.keep(folder)
    return sums, {
        "digitlab.weights_sha256": hashlib.sha256(weights).hexdigest(),
        "digitlab.predictions_sha256": hashlib.sha256(predictions).hexdigest(),
        "digitlab.data_sha256": json.dumps(fitted.data_sha256),
    }


class _Told(Watch):
    """Writes what a run tells into its record, and passes it on."""

    def __init__(self, record: RunRecord, watch: Watch) -> None:
        self.record, self.watch = record, watch
        self.metrics: dict[str, float] = {}
        self.logged: list[tuple[str, int, float]] = []  # name, step, value

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logged += [(name, step, value) for name, value in metrics.items()]
        self.record.log(metrics, step)

    def begin(self, facts: Mapping[str, float]) -> None:
        self.metrics |= facts
        self._log(facts, 0)
        self.watch.begin(facts)

    def batch(self, done: float) -> None:
        self.metrics["done"] = done
        self.watch.batch(done)

    def rung(self, rung: float, accuracy: float) -> None:
        metrics = {"rung": rung, "rung_accuracy": accuracy}
        self.metrics |= metrics
        self._log(metrics, round(100 * rung))
        self.watch.rung(rung, accuracy)

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.metrics |= metrics
        self._log(metrics, epoch)
        self.watch.epoch(epoch, metrics)


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
