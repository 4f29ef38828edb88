"""A tracker on one sqlite table, some ten times as fast as MLflow: a run is a row of JSON."""

import json
import sqlite3
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from digitlab.base.errors import UserError, nearest
from digitlab.records.local import list_artifacts, write_artifacts
from digitlab.records.tracker import LogBatch, NewRun, Registration, RunRow, Tracker, TrackerRefused

STATUS = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED"}  # KILLED else


class PlainTracker(Tracker):
    """Runs in lab/plain.db, in the order of their creation; artifacts in lab/artifacts."""

    identity = "plain"

    def __init__(self, lab: Path) -> None:
        self.folder, self.lock = lab / "artifacts", threading.Lock()
        self.database = sqlite3.connect(
            lab / "plain.db", check_same_thread=False, isolation_level=None
        )
        self.database.execute("PRAGMA journal_mode=WAL")
        table = "(number INTEGER PRIMARY KEY, run_id TEXT UNIQUE, document TEXT)"
        self.database.execute(f"CREATE TABLE IF NOT EXISTS runs {table}")

    def _all(self) -> list[dict[str, Any]]:
        with self.lock:
            rows = self.database.execute("SELECT document FROM runs ORDER BY number").fetchall()
        return [json.loads(text) for (text,) in rows]

    def _read(self, run_id: str) -> dict[str, Any]:
        query = "SELECT document FROM runs WHERE run_id = ?"
        found = self.database.execute(query, [run_id]).fetchone()
        if found is None:
            raise TrackerRefused(f"Run {run_id} does not exist: name another run.")
        return dict(json.loads(found[0]))

    def _change(self, run_id: str, **new: Any) -> None:
        """Replace entries of a run's document; mappings are merged."""
        with self.lock:
            run = self._read(run_id)
            if run["is_deleted"] and "is_deleted" not in new:
                raise TrackerRefused(f"Run {run_id} was deleted: restore it.")
            for key, value in new.items():
                run[key] = run[key] | value if isinstance(value, dict) else value
            query = "UPDATE runs SET document = ? WHERE run_id = ?"
            self.database.execute(query, [json.dumps(run), run_id])

    def create_run(self, run: NewRun, may_exist: bool = False) -> str:
        tags = {**run.tags, "digitlab.record": run.key}
        for known in self._all() if may_exist else []:
            if known["tags"]["digitlab.record"] == run.key:
                return str(known["run_id"])
        if run.parent_run_id:
            tags["mlflow.parentRunId"] = run.parent_run_id
        new = {"run_id": uuid.uuid4().hex, "name": run.name, "status": "RUNNING", "tags": tags}
        new |= {"params": {}, "points": {}, "datasets": {}, "is_deleted": False}
        new |= {"started_ms": run.time_ms, "ended_ms": 0}
        query = "INSERT INTO runs (run_id, document) VALUES (?, ?)"
        with self.lock:
            self.database.execute(query, [new["run_id"], json.dumps(new)])
        return str(new["run_id"])

    def log(self, run_id: str, batch: LogBatch) -> None:
        points = {json.dumps([name, step]): value + 0.0 for name, value, step, _ in batch.metrics}
        used = {str(list(dataset)): list(dataset) for dataset in batch.datasets}
        new = {"params": batch.params, "points": points, "tags": batch.tags, "datasets": used}
        self._change(run_id, **new)

    def upload(self, run_id: str, files: Mapping[str, bytes]) -> None:
        write_artifacts(self.folder / run_id, files)

    def end_run(self, run_id: str, state: str, time_ms: int) -> None:
        is_running = state == "running"
        ended = {} if is_running else {"ended_ms": time_ms}
        self._change(run_id, status=STATUS.get(state, "KILLED"), **ended)

    def find(self, tags: Mapping[str, str]) -> list[RunRow]:
        return self._find(tags, is_deleted=False)

    def find_deleted(self, tags: Mapping[str, str]) -> list[RunRow]:
        return self._find(tags, is_deleted=True)

    def _find(self, tags: Mapping[str, str], is_deleted: bool) -> list[RunRow]:
        runs = [run for run in self._all() if run["is_deleted"] == is_deleted]
        return [_row(run) for run in runs if tags.items() <= run["tags"].items()]

    def get(self, run: str) -> RunRow:
        rows = self.find({})
        for matches in (
            [row for row in rows if row.run_id == run],
            [row for row in rows if row.name == run],
            [row for row in rows if len(run) >= 4 and row.run_id.startswith(run)],
        ):
            if len(matches) == 1:
                return matches[0]
            if matches:
                ids = ", ".join(row.run_id[:8] for row in matches)
                raise UserError(f"{run}: {len(matches)} runs: it must name one. Give an id: {ids}")
        raise UserError(f"{run}: no such run, {nearest(run, {row.name for row in rows})}")

    def is_deleted(self, run_id: str) -> bool:
        try:
            return bool(self._read(run_id)["is_deleted"])
        except TrackerRefused:
            return True

    def history(self, run_id: str) -> list[tuple[str, int, float]]:
        points = self._read(run_id)["points"].items()
        return sorted((*json.loads(key), value) for key, value in points)

    def artifact(self, run_id: str, path: str) -> bytes:
        place = (self.folder / run_id / path).resolve()
        if not place.is_relative_to(self.folder) or not place.is_file():
            raise UserError(f"Run {run_id} has no artifact {path}: it must be recorded.")
        return place.read_bytes()

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        self._change(run_id, tags=dict(tags))

    def delete(self, run_id: str) -> None:
        self._change(run_id, is_deleted=True)

    def restore(self, run_id: str) -> None:
        self._change(run_id, is_deleted=False)

    def files(self, run_id: str) -> list[str]:
        return list_artifacts(self.folder / run_id)

    def register(self, run_id: str, what: Registration) -> None:
        self._change(run_id, tags={f"registered.{what.model}": "champion", **what.tags})

    def owner_of(self, model: str) -> str | None:
        tags = (run["tags"] for run in self._all())
        owners = [t.get("digitlab.study_id", "") for t in tags if f"registered.{model}" in t]
        return next(filter(None, owners), "") if owners else None

    def set_experiment_tags(self, tags: Mapping[str, str]) -> None:
        """Nobody looks at this tracker's pages."""

    def runs_page(self) -> str:
        return ""


def _row(run: dict[str, Any]) -> RunRow:
    points = ((*json.loads(key), value) for key, value in run["points"].items())
    by_step = sorted(points, key=lambda point: point[1])
    metrics = {name: value for name, _, value in by_step}  # the last of each
    held = run["tags"], run["params"], metrics, run["started_ms"], run["ended_ms"]
    return RunRow(run["run_id"], run["name"], run["status"], *held)
