"""Where histories keep Optuna's studies: sqlite in the lab, or memory, which is twice as fast."""

import json
import pickle
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from enumeration import digest_of
from optuna.storages import InMemoryStorage

from digitlab.study import storage
from digitlab.study.mirror import RESULT

Stored = tuple[str, dict[str, Any]]  # of a trial: Optuna's name of its state, and its result


class OnDisk:
    """The storage as it is."""

    def install(self, patch: pytest.MonkeyPatch) -> None: ...

    def copy(self, lab: Path, to: Path) -> None:
        """Copy a lab: this is what a kill leaves."""
        shutil.copytree(lab, to, symlinks=True)

    def forget(self, folder: Path) -> None:
        """Remove a lab, or a folder of labs."""
        shutil.rmtree(folder, ignore_errors=True)

    def digest(self, lab: Path) -> str:
        """Return one of all that a lab holds."""
        return digest_of(lab)

    def trials(self, lab: Path) -> list[Stored]:
        """Return the trials of a lab, by number."""
        query = f"""SELECT state, value_json FROM trials LEFT JOIN trial_user_attributes AS held
            ON held.trial_id = trials.trial_id AND key = '{RESULT}' ORDER BY number"""
        with closing(sqlite3.connect(lab / "optuna.db")) as database:
            rows = database.execute(query).fetchall()
        return [(state, json.loads(text or "{}")) for state, text in rows]


class InMemory(OnDisk):
    """One storage for each lab, which a copy of the lab has a copy of."""

    def __init__(self) -> None:
        self.kept: dict[Path, _Storage] = {}

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(storage, "_open_sqlite", lambda path: self._open(path.parent))

    def _open(self, lab: Path) -> "_Storage":
        return self.kept.setdefault(lab, _Storage())

    def copy(self, lab: Path, to: Path) -> None:
        super().copy(lab, to)
        self.kept[to] = pickle.loads(pickle.dumps(self._open(lab)))

    def forget(self, folder: Path) -> None:
        super().forget(folder)
        kept = self.kept.items()
        self.kept = {lab: held for lab, held in kept if folder not in (lab, lab.parent)}

    def digest(self, lab: Path) -> str:
        return super().digest(lab) + pickle.dumps(self._open(lab)).hex()

    def trials(self, lab: Path) -> list[Stored]:
        kept = self._open(lab)
        try:
            study_id = kept.get_study_id_from_name("smoke")
        except KeyError:  # it was killed before it had one
            return []
        found = kept.get_all_trials(study_id, deepcopy=False)
        return [(trial.state.name, trial.user_attrs.get(RESULT, {})) for trial in found]


class _Storage(InMemoryStorage):
    """Holds what it is given as JSON, as a database does."""

    engine = SimpleNamespace(dialect=SimpleNamespace(name="sqlite"))

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        super().set_study_user_attr(study_id, key, json.loads(json.dumps(value)))

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        super().set_trial_user_attr(trial_id, key, json.loads(json.dumps(value)))

    def remove_session(self) -> None: ...
