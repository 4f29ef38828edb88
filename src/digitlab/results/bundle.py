"""A study in one file: a ZIP of what Optuna and MLflow hold of it, for another lab to import.

Members are not compressed, so that none is larger than the file, and none is written anywhere by
its name: they are read from the archive, checked, and given to the tracker.
"""

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from digitlab.base.errors import UserError, first_line
from digitlab.base.files import require_file
from digitlab.records.tracker import NoTracker, RunRow, StoredNumber

_FORMAT, _INDEX = 1, "bundle.json"
_STRICT = ConfigDict(extra="forbid")
_Step = Annotated[int, Field(ge=0, lt=2**31)]  # Optuna's column on a server has 32 bits


@dataclass(config=_STRICT)
class RunPart:
    """A run: what its tracker's row holds, every metric, and the SHA-256 of each file."""

    run_id: str
    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    started_ms: StoredNumber
    ended_ms: StoredNumber
    history: list[tuple[str, StoredNumber, float]]
    files: dict[str, str]

    def row(self) -> RunRow:
        return RunRow(
            self.run_id, self.name, self.status, self.tags, self.params, self.metrics,
            self.started_ms, self.ended_ms,
        )  # fmt: skip


@dataclass(config=_STRICT)
class TrialPart:
    """A trial of Optuna's, in plain values."""

    state: str
    values: list[float] | None
    params: dict[str, Any]
    distributions: dict[str, str]
    intermediate_values: dict[_Step, float]
    user_attrs: dict[str, Any]
    system_attrs: dict[str, Any]
    started: datetime | None
    completed: datetime | None

    @classmethod
    def of(cls, trial: FrozenTrial) -> "TrialPart":
        kinds = {key: distribution_to_json(one) for key, one in trial.distributions.items()}
        return cls(
            trial.state.name, trial.values, trial.params, kinds, trial.intermediate_values,
            trial.user_attrs, trial.system_attrs, trial.datetime_start, trial.datetime_complete,
        )  # fmt: skip

    def trial(self, objectives: int) -> FrozenTrial:
        """Return it as Optuna's; ValueError if it is none, or not of so many objectives."""
        if self.values is not None and len(self.values) != objectives:
            raise ValueError(f"a trial has {len(self.values)} values, of {objectives} objectives")
        try:
            kinds = {key: json_to_distribution(text) for key, text in self.distributions.items()}
            trial = create_trial(
                state=TrialState[self.state], values=self.values, params=self.params,
                distributions=kinds, intermediate_values=self.intermediate_values,
                user_attrs=self.user_attrs, system_attrs=self.system_attrs,
            )  # fmt: skip
        except (TypeError, AttributeError) as error:  # of Optuna's own, for other kinds of values
            raise ValueError(f"a trial is not as Optuna has it: {error}") from error
        trial.datetime_start, trial.datetime_complete = self.started, self.completed
        return trial


def _check_notes(notes: dict[str, Any]) -> dict[str, Any]:
    """Return a study's notes; ValueError if what an import reads of them has another form."""
    champion, fingerprint = notes.get("champion", {}), notes.get("fingerprint", {})
    if not isinstance(champion, dict) or not isinstance(fingerprint, dict):
        raise ValueError("the study's champion or fingerprint is noted in another form")
    overrides = notes.get("overrides", [])
    if not isinstance(overrides, list):
        raise ValueError("the study's overrides are noted in another form")
    texts = [*overrides, *(notes.get(key) for key in ("config", "study_id"))]
    # A champion that no tracker has recorded has no run of its own.
    texts += [place["run_id"] for place in (notes, champion) if place.get("run_id") is not None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("the study's configuration or an id is noted in another form")
    return notes


@dataclass(config=_STRICT)
class Index:
    """What a bundle holds."""

    format: int
    study: str
    notes: Annotated[dict[str, Any], AfterValidator(_check_notes)]
    trials: list[TrialPart]
    runs: list[RunPart]


_INDEXES = TypeAdapter(Index)


def write_bundle(
    file: zipfile.ZipFile, index: Index, contents: Iterator[tuple[str, str, bytes]]
) -> None:
    """Write the files (run id, path, content) of a study, then its index with their digests."""
    digests: dict[str, dict[str, str]] = {}
    for run_id, path, content in contents:
        file.writestr(f"{run_id}/{path}", content)
        digests.setdefault(run_id, {})[path] = hashlib.sha256(content).hexdigest()
    for run in index.runs:
        run.files = digests.get(run.run_id, {})
    file.writestr(_INDEX, _INDEXES.dump_json(index))


class Bundle(NoTracker):
    """The runs of a bundle, to be read as those of a tracker are."""

    def __init__(self, path: Path, file: zipfile.ZipFile) -> None:
        """Read the index; ValueError if it is none, or names a file outside of its run."""
        self.path, self.file = path, file
        self.index = _INDEXES.validate_json(self._read(_INDEX))
        if self.index.format != _FORMAT:
            raise ValueError(f"format {self.index.format} is not {_FORMAT}")
        self.parts = {run.run_id: run for run in self.index.runs}
        for run in self.index.runs:
            for name in (run.run_id, *run.files):
                parts = PurePosixPath(name).parts
                if not parts or name.startswith("/") or ".." in parts or "\\" in name:
                    raise ValueError(f"{name!r} is no path of a file within a run")

    def find(self, tags: Mapping[str, str]) -> list[RunRow]:
        rows = (run.row() for run in self.index.runs)
        return [row for row in rows if tags.items() <= row.tags.items()]

    def get(self, run: str) -> RunRow:
        return self.parts[run].row()

    def history(self, run_id: str) -> list[tuple[str, int, float]]:
        return self.parts[run_id].history

    def files(self, run_id: str) -> list[str]:
        return sorted(self.parts[run_id].files)

    def artifact(self, run_id: str, path: str) -> bytes:
        digest = self.parts[run_id].files.get(path)
        if digest is None:  # as a tracker raises it
            raise UserError(f"run {run_id} has no file {path}: it was not exported.")
        content = self._read(f"{run_id}/{path}")
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{path} of run {run_id} is not the file that was exported")
        return content

    def _read(self, name: str) -> bytes:
        if self.file.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed, which no export does")
        return self.file.read(name)


@contextmanager
def opened_bundle(path: Path) -> Iterator[Bundle]:
    """Open a bundle; whatever is wrong with its index is a UserError, on one line."""
    require_file(path, str(path))
    with ExitStack() as opened:
        with refuse_bundle(path):
            file = opened.enter_context(zipfile.ZipFile(path))
            bundle = Bundle(path, file)
        yield bundle


@contextmanager
def refuse_bundle(path: Path) -> Iterator[None]:
    """Read a bundle: what is wrong with it becomes a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): it must be a file. Name another."
        ) from error
    except ValidationError as error:
        raise _refusal(path, f"{_INDEX} is not its index") from error
    except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError) as error:
        raise _refusal(path, first_line(error)) from error


def _refusal(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} cannot be imported: {reason}. It must be as `digitlab export` wrote it. Copy it "
        "again, or export the study again."
    )
