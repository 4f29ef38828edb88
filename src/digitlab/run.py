"""One run: train a configuration and record what came of it."""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch

from digitlab.config import Config
from digitlab.errors import UserError
from digitlab.pictures import draw_confusions
from digitlab.record import Identity, begin_record, stage
from digitlab.tracking import RunRecord, Tracking
from digitlab.training import Fit, Watch, fit


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
    state, reason, error, digest = "finished", "", None, ""
    try:
        fitted = fit(config, lab, told, rungs)
        told.metrics |= fitted.metrics
        digest = _keep(config, identity, fitted, record, lab)
    except Ended as end:
        state, reason = end.state, str(end)
    except (UserError, OSError, Broken, KeyboardInterrupt):
        record.end("interrupted")
        raise
    except Exception as exception:  # noqa: BLE001  a failed run is a result, with its reason
        state, error = "failed", exception
        reason = f"{type(exception).__name__}: {exception}"
    told.metrics["seconds"] = time.perf_counter() - begun
    if state != "finished":
        record.log(tags={"digitlab.reason": reason[:5000]})
    final = {k: v for k, v in told.metrics.items() if k.startswith("test_") or k == "seconds"}
    record.log(final, step=config.trainer.epochs)
    record.end(state)
    return Outcome(state, reason, told.metrics, digest, record.run_id, error)


def _keep(config: Config, identity: Identity, fitted: Fit, record: RunRecord, lab: Path) -> str:
    """Record configuration, weights, predictions and pictures; returns the weights' SHA-256."""
    folder = stage(lab, config, identity)
    weights = safetensors.torch.save(fitted.weights)
    (folder / "weights.safetensors").write_bytes(weights)
    guesses = fitted.logits.argmax(1).byte()
    predictions = safetensors.torch.save({"predictions": guesses, "logits": fitted.logits})
    (folder / "predictions.safetensors").write_bytes(predictions)
    (folder / "pictures").mkdir()
    draw_confusions(fitted.logits, fitted.labels, fitted.images, folder / "pictures")
    record.keep(folder)
    tags = {
        "digitlab.weights_sha256": hashlib.sha256(weights).hexdigest(),
        "digitlab.predictions_sha256": hashlib.sha256(predictions).hexdigest(),
        "digitlab.data_sha256": json.dumps(fitted.data_sha256),
    }
    record.log(tags=tags)
    return tags["digitlab.weights_sha256"]


class _Told(Watch):
    """Writes what a run tells into its record, and passes it on."""

    def __init__(self, record: RunRecord, watch: Watch) -> None:
        self.record, self.watch = record, watch
        self.metrics: dict[str, float] = {}

    def begin(self, facts: Mapping[str, float]) -> None:
        self.metrics |= facts
        self.record.log(facts)
        self.watch.begin(facts)

    def batch(self, done: float) -> None:
        self.metrics["done"] = done
        self.watch.batch(done)

    def rung(self, rung: float, accuracy: float) -> None:
        self.metrics |= {"rung": rung, "rung_accuracy": accuracy}
        self.record.log({"rung": rung, "rung_accuracy": accuracy}, step=round(100 * rung))
        self.watch.rung(rung, accuracy)

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.metrics |= metrics
        self.record.log(metrics, step=epoch)
        self.watch.epoch(epoch, metrics)
