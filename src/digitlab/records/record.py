"""The record of a run: what it holds from its start to its end, whoever trains it."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from digitlab.config.recorded import config_to_plain, config_to_yaml, flat, result_settings
from digitlab.config.types import Config, DataConfig, EvaluateOn, Pruner, TrackerName
from digitlab.records.checkpoints import CheckpointFolder
from digitlab.records.outbox import Outbox
from digitlab.records.tracker import Dataset, NewRun, NoTracker, Registration, Tracker


@dataclass(frozen=True)
class Identity:
    """What a run is, beside its configuration."""

    name: str
    kind: str  # a value of the tag digitlab.kind
    tags: Mapping[str, str] = field(default_factory=dict)
    parent_run_id: str | None = None  # run id of the study
    overrides: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Records:
    """Where a process records its runs; closes the outbox at the end."""

    tracker: Tracker
    outbox: Outbox

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self.outbox.close()


_PRUNED = (
    "Pruned: stopped early on purpose, since other trials were better at this point. MLflow shows "
    "such a run as killed, in red, since it has no status of its own for it."
)
_SCREENED = (
    "Pruned: stopped early on purpose, as all trials are at first. The best of them are trained to "
    "the end by later trials. MLflow shows such a run as killed, in red, since it has no status of "
    "its own for it."
)


def open_records(config: Config, lab: Path) -> Records:
    """Open the tracker of `config.tracking` and the outbox to it, or raise UserError."""
    tracker = open_tracker(config, lab)
    return Records(tracker, Outbox(lab, tracker))


def open_tracker(config: Config, lab: Path) -> Tracker:
    """Open the tracker of `config.tracking` alone, to read; as `open_records`."""
    if config.tracking.name is TrackerName.none:
        return NoTracker()
    from digitlab.records.mlflow import MlflowTracker  # which takes a second to import

    return MlflowTracker(config.tracking.uri, config.tracking.experiment, lab)


def trial_tags(study_id: str, study: str, number: int, attempt: int) -> dict[str, str]:
    """Return the tags that tie a run to an attempt at a study's trial."""
    return {
        "digitlab.study_id": study_id,
        "digitlab.study": study,
        "digitlab.trial": str(number),
        "digitlab.attempt": str(attempt),
    }


def row_params(config: Config, kind: str) -> dict[str, str]:
    """Return the parameters of a run; settings of the study belong to the study's own run alone."""
    hidden = () if kind == "study" else ("study.", "tracking.", "launcher.")
    leaves = flat(config_to_plain(config))
    return {key: str(value) for key, value in leaves.items() if not key.startswith(hidden)}


def datasets_of(data: DataConfig, sha256: Mapping[str, str]) -> list[Dataset]:
    """Return what a run learned from and what it was measured on; `sha256` is of its files."""
    training = {name: digest for name, digest in sha256.items() if name.startswith("train-")}
    split = [data.validation_images, data.split_seed]
    if data.evaluate_on is EvaluateOn.validation:
        kinds = {"training": [training, split, data.images], "validation": [training, split]}
    else:
        test = {name: digest for name, digest in sha256.items() if name not in training}
        kinds = {"training": [training, data.images], "test": [test]}
    texts = {kind: json.dumps(what, sort_keys=True) for kind, what in kinds.items()}
    return [Dataset(data.name, _sha256(text.encode())[:16], kind) for kind, text in texts.items()]


class RunRecorder:
    """Writes the record of one run.

    What it holds is noted here too, since the seal covers every file and every metric.
    """

    def __init__(self, outbox: Outbox, config: Config, identity: Identity) -> None:
        """Start the record: name, tags, every parameter, config.yaml and environment.json."""
        self.name, self.environment = identity.name, dict(identity.environment)
        self.last_step, self.data = config.trainer.epochs, config.data
        self.last_epoch = 0
        self.is_ended = False
        self._is_screened = config.study.pruner is Pruner.screening
        self._digests: dict[str, str] = {}  # SHA-256 by path of an artifact
        self._logged: dict[tuple[str, int], float] = {}  # by name of a metric, and step
        tags = {
            "digitlab.kind": identity.kind,
            "digitlab.state": "running",
            "digitlab.overrides": json.dumps(list(identity.overrides)),
            "mlflow.source.git.commit": str(self.environment.get("commit", "")),
            **identity.tags,
        }
        params = row_params(config, identity.kind)
        # By which MLflow's pages group runs that differ in their seed alone.
        others = {key: value for key, value in params.items() if key != "trainer.seed"}
        tags["digitlab.configuration"] = _sha256(json.dumps(others).encode())[:8]
        self.tags = {key: value for key, value in tags.items() if value}
        files = {
            "config.yaml": config_to_yaml(config).encode(),
            "environment.json": json.dumps(self.environment).encode(),
        }
        self._digests |= {path: _sha256(content) for path, content in files.items()}
        run = NewRun(identity.name, self.tags, params, identity.parent_run_id)
        self.spool = outbox.open_run(run, files)
        settings = json.dumps(result_settings(config))
        self.checkpoints = CheckpointFolder(outbox.lab, _sha256(settings.encode())[:16])

    def started(self, facts: Mapping[str, float]) -> None:
        self._log(facts, 0)

    def rung(self, rung: float, accuracy: float) -> None:
        """Record the accuracy at a rung, which is a fraction of the schedule."""
        self._log({"rung": rung, "rung_accuracy": accuracy}, round(100 * rung))

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.last_epoch = epoch
        self._log(metrics, epoch)

    def add_files(self, files: Mapping[str, bytes] | Path) -> None:
        """Record artifacts: their contents by path, or all files below a folder."""
        if isinstance(files, Path):
            paths = sorted(path for path in files.rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        self._digests |= {path: _sha256(content) for path, content in files.items()}
        self.spool.add_files(files)

    def finish(
        self,
        metrics: Mapping[str, float],
        files: Mapping[str, bytes],
        environment: Mapping[str, Any] = {},
        data_sha256: Mapping[str, str] = {},
    ) -> None:
        """Record the results and end the run; all of it is on the disk when this returns.

        Args:
            metrics: logged for the last epoch where they are new; where one differs from that
                epoch's, as one more step.
            environment: what the training adds to that of the start.
            data_sha256: digests of the files that the run read.
        """
        whole = self.environment | dict(environment)
        if whole != self.environment:
            files = {**files, "environment.json": json.dumps(whole).encode()}
        self.add_files(files)
        tags = {
            f"digitlab.{name}_sha256": self._digests[f"{name}.safetensors"]
            for name in ("weights", "predictions")
            if f"{name}.safetensors" in files
        }
        if data_sha256:
            tags["digitlab.data_sha256"] = json.dumps(dict(data_sha256))
            self.spool.add_datasets(datasets_of(self.data, data_sha256))
        self.end("finished", metrics=metrics, tags=tags)

    def end(
        self,
        state: str,
        reason: str = "",
        metrics: Mapping[str, float] = {},
        tags: Mapping[str, str] = {},
        registration: Registration | None = None,
    ) -> None:
        """End the run, and seal what it holds if it finished; on the disk when this returns.

        A run that has ended already keeps its state.

        Args:
            registration: what its model is registered as.
        """
        if self.is_ended:
            return
        last = {name: value for (name, _), value in self._logged.items()}
        new = {name: value for name, value in metrics.items() if last.get(name) != value}
        # A fit that stopped early returns to an earlier epoch: one more step shows that.
        is_returned = any((name, self.last_epoch) in self._logged for name in new)
        step = self.last_epoch + 1 if is_returned else self.last_step
        self._note(new, step)
        tags = {**tags, **({"digitlab.reason": reason[:5000]} if reason else {})}
        if state == "pruned":  # MLflow has one word for it and for what was killed
            text = _SCREENED if self._is_screened else _PRUNED
            tags |= {"mlflow.runName": f"{self.name} (pruned)", "mlflow.note.content": text}
        if state == "finished":
            sums = "".join(f"{sha}  {path}\n" for path, sha in sorted(self._digests.items()))
            self.spool.add_files({SUMS: sums.encode()})
            history = ((name, step, value) for (name, step), value in self._logged.items())
            tags["digitlab.seal"] = seal(sums, history, self.tags | tags)
        self.spool.log(new, step, tags)
        if registration is not None:
            self.spool.add_datasets([registration.measured_on])
            self.spool.register(registration)
        self.spool.end(state)
        self.is_ended = True  # also where the disk takes nothing more, and the seal fails
        self.spool.seal()
        if state != "interrupted":  # else the same training may go on
            self.checkpoints.remove()

    def run_id(self, timeout_s: float = 0.0) -> str | None:
        return self.spool.run_id(timeout_s)

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        self._note(metrics, step)
        self.spool.log(metrics, step)

    def _note(self, metrics: Mapping[str, float], step: int) -> None:
        self._logged |= {(name, step): float(value) for name, value in metrics.items()}


SUMS = "SHA256SUMS"  # the artifact that lists the others, as `sha256sum -c` reads it
# The tags that a record's seal covers, beside its files and metrics.
_SEALED = (
    *("kind", "study_id", "study", "trial", "attempt", "seed"),
    *("weights_sha256", "predictions_sha256", "data_sha256"),
)


def seal(sums: str, metrics: Iterable[tuple[str, int, float]], tags: Mapping[str, str]) -> str:
    """Return the SHA-256 over what a finished run's record holds: files, every metric, tags.

    A bit that changes in a store afterwards changes it.
    """
    named = {name: tags.get(f"digitlab.{name}", "") for name in _SEALED}
    values = sorted({(name, step, float(value).hex()) for name, step, value in metrics})
    return _sha256(json.dumps([sums, values, named]).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
