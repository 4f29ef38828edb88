"""Hostile records: files of runs, the outbox, bundles, names in stores."""

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import safetensors.torch
import torch
from hostile import Reader
from hostile_settings import called
from mutate import TEXTS, VALUES, archive, damaged, damaged_archive, damaged_json
from optuna.trial import create_trial
from samples import copy_digits, stop_in_the_middle

from digitlab.base.errors import UserError
from digitlab.config.compose import compose
from digitlab.config.recorded import config_to_yaml
from digitlab.config.types import Config
from digitlab.digits.predict import UncalibratedReader
from digitlab.digits.prepare import Prepared
from digitlab.networks.table import build_network
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.outbox import Outbox
from digitlab.records.reader import (
    damage,
    load_network,
    over_seeds,
    recorded_config,
    recorded_data,
    recorded_environment,
    recorded_guesses,
    recorded_logits,
)
from digitlab.records.record import SUMS, row_params, seal
from digitlab.records.spool import encode
from digitlab.records.tracker import LogBatch, NewRun, NoTracker, RunRow
from digitlab.results.exchange import export_study, import_study
from digitlab.study.storage import open_storage, study_names

METADATA = {"layout": "channels_last", "format": "1"}


@cache
def tiny() -> Config:
    return compose("train", ["experiments=smoke", "model.widths=[2]", "model.hidden=4"])[0].config


@cache
def whole_run() -> tuple[RunRow, dict[str, bytes]]:
    """Return a run's row and its files, sealed as a recorder does it."""
    answers = {name: torch.zeros(5, dtype=torch.uint8) for name in ("predictions", "labels")}
    answers |= {"logits": torch.zeros(5, 10)}
    environment = {"libraries": {"torch": "1"}, "untracked": {}, "numerics": {}, "commit": "c0"}
    files = {
        "weights.safetensors": safetensors.torch.save(
            build_network(tiny().model).state_dict(), METADATA
        ),
        "predictions.safetensors": safetensors.torch.save(answers),
        "config.yaml": config_to_yaml(tiny()).encode(),
        "environment.json": json.dumps(environment).encode(),
    }
    sums = "".join(f"{_sha256(files[path])}  {path}\n" for path in sorted(files))
    files[SUMS] = sums.encode()
    tags = {"digitlab.kind": "train", "digitlab.state": "finished", "digitlab.study": "s"}
    tags |= {f"digitlab.{name}_sha256": _sha256(files[f"{name}.safetensors"])
             for name in ("weights", "predictions")}  # fmt: skip
    tags["digitlab.data_sha256"] = json.dumps({"train-images-idx3-ubyte": "0" * 64})
    tags["digitlab.seal"] = seal(sums, [("val_accuracy", 1, 0.5)], tags)
    params = row_params(tiny(), "train")
    return RunRow("0123", "run", "FINISHED", tags, params, {"val_accuracy": 0.5}, 1, 2), files


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Stored(NoTracker):
    """A tracker with one run, whatever is in it."""

    def __init__(self, row: RunRow, files: Mapping[str, bytes]) -> None:
        self.row, self.content = row, files

    def artifact(self, run_id: str, path: str) -> bytes:
        if path not in self.content:
            raise UserError(f"Run {run_id} has no artifact {path}.")
        return self.content[path]

    def history(self, run_id: str) -> list[tuple[str, int, float]]:
        return [("val_accuracy", 1, value) for value in self.row.metrics.values()]

    def find(self, tags: Any) -> list[RunRow]:
        return [self.row]


class _Tensors(Reader):
    """Safetensors files whose digest is right: length of the header, header, numbers."""

    file: str

    def corpus(self) -> Sequence[bytes]:
        good = whole_run()[1][self.file]
        end = 8 + int.from_bytes(good[:8], "little")
        lengths = [
            struct.pack("<Q", number) for number in (0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1)
        ]
        nothing = [
            b"",
            b"{}",
            struct.pack("<Q", 2) + b"{}",
            struct.pack("<Q", 100_001) + b"[" * 10**5,
        ]
        wrong = [good[:end] + struct.pack("<f", number) * ((len(good) - end) // 4)
                 for number in (math.nan, math.inf, -math.inf, 3e38, 1e-45)]  # fmt: skip
        return [good, *(length + good[8:] for length in lengths), *nothing, *wrong, good + bytes(9)]

    def draw(self, chance: Random) -> bytes:
        good = whole_run()[1][self.file]
        if chance.random() < 0.4:
            return damaged(good, [good], chance)
        end = 8 + int.from_bytes(good[:8], "little")
        header = damaged_json(json.loads(good[8:end]), chance)
        return struct.pack("<Q", len(header)) + header + good[end:]

    def held(self, given: bytes) -> Stored:
        row, files = whole_run()
        digest = {f"digitlab.{self.file.partition('.')[0]}_sha256": _sha256(given)}
        return Stored(replace(row, tags=row.tags | digest), {**files, self.file: given})


class Weights(_Tensors):
    """Weights, and what a network with them reads in an image."""

    file = "weights.safetensors"

    def read(self, given: bytes) -> None:
        held = self.held(given)
        network = load_network(held, held.row, tiny())
        reader = UncalibratedReader(network, tiny(), self.folder)
        [answer] = reader.answer([("", Prepared(np.full((28, 28), 99, np.uint8)))])
        assert answer.probability is not None
        assert 0 <= answer.probability <= 1, answer.probability
        json.dumps(answer.probabilities, allow_nan=False)


class Predictions(_Tensors):
    """What a run answered on the images that it was measured on."""

    file = "predictions.safetensors"

    def read(self, given: bytes) -> None:
        held = self.held(given)
        guesses, labels = recorded_guesses(held, held.row)
        (guesses == labels).mean()
        recorded_logits(held, held.row, 5)


class RunFiles(Reader):
    """The other files of a run, its tags, parameters and metrics."""

    def corpus(self) -> Sequence[Any]:
        return [whole_run()]

    def draw(self, chance: Random) -> Any:
        row, files = whole_run()
        files = dict(files)
        kind = chance.randrange(5)
        if kind == 0:
            files[SUMS] = damaged(files[SUMS], list(files.values())[1:4], chance)
            history = [("val_accuracy", 1, 0.5)]
            found = seal(files[SUMS].decode(errors="replace"), history, row.tags)
            return replace(row, tags=row.tags | {"digitlab.seal": found}), files
        if kind == 1:
            tag = chance.choice([*row.tags])
            value = damaged_json(json.loads(row.tags["digitlab.data_sha256"]), chance)
            text = chance.choice((value.decode(errors="replace"), *TEXTS))
            return replace(row, tags=row.tags | {tag: text}), files
        if kind == 2:
            metric = chance.choice([v for v in VALUES if type(v) in (int, float)] + [math.nan])
            params = row.params | {chance.choice([*row.params, "x"]): chance.choice(TEXTS)}
            name = chance.choice(("val_accuracy", *TEXTS))
            return replace(row, params=params, metrics={name: float(metric)}), files
        files["environment.json"] = damaged_json(json.loads(files["environment.json"]), chance)
        return row, files

    def read(self, given: Any) -> None:
        held = Stored(*given)
        recorded_environment(held, held.row)
        recorded_data(held.row)
        damage(held, held.row)
        over_seeds(held, held.row)
        recorded_config(held, held.row)


class Spools(Reader):
    """What a process that has ended left in the outbox, and how MLflow takes that."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.lab = folder / "spools"
        self.lab.mkdir(exist_ok=True)
        self.tracker = MlflowTracker(None, "digitlab", self.lab)
        self.count = 0

    def operations(self) -> list[dict[str, Any]]:
        run = {"name": "run", "tags": {"digitlab.kind": "train"}, "params": {"a": "b"}}
        run |= {"parent_run_id": None, "key": "0" * 32, "time_ms": 1_700_000_000_000}
        found = [
            {"do": "create", "run": run, "files": {"config.yaml": "a: b\n"}},
            {"do": "log", "metrics": {"loss": 0.5}, "step": 1, "tags": {"colour": "red"}},
            {"do": "datasets", "datasets": [["mnist", "0123", "training"]]},
            {"do": "files", "files": {"pictures/a.png": "abc", "b": ""}},
            {"do": "end", "state": "finished", "tags": {"digitlab.state": "finished"}},
        ]
        return [{**what, "time_ms": 1_700_000_000_000 + at} for at, what in enumerate(found)]

    def corpus(self) -> Sequence[Any]:
        good, session = self.spool(self.operations()), self.session()
        resumed = {"do": "resume", "run_id": "0" * 32, "study_id": "s", "time_ms": 1}
        return [(good, session), (b"", session), (b"\n", session), (good, b""), (good, b"[]"),
                (good[:-1], session), (self.spool([resumed]), session),
                (self.spool(self.operations()[1:]), session)]  # fmt: skip

    def session(self) -> bytes:
        return json.dumps({"tracker": self.tracker.identity}).encode()

    def spool(self, operations: Any) -> bytes:
        content = b""
        for what in operations:
            files = what.get("files", {}) if isinstance(what, dict) else {}
            files = {path: str(text).encode(errors="replace") for path, text in files.items()} \
                if isinstance(files, dict) else {}  # fmt: skip
            rest = {k: v for k, v in what.items() if k != "files"} if isinstance(what, dict) else {}
            content += encode(rest, files)
        return content

    def draw(self, chance: Random) -> Any:
        good, kind = self.spool(self.operations()), chance.randrange(10)
        if kind == 0:
            return good, damaged_json({"tracker": self.tracker.identity}, chance)
        if kind < 3:
            return damaged(good, [good], chance), self.session()
        changed: Any = None
        while not isinstance(changed, list):
            text = damaged_json(self.operations(), chance).decode(errors="replace")
            try:
                changed = json.loads(text)
            except (ValueError, RecursionError):
                continue
        return self.spool(changed), self.session()

    def read(self, given: Any) -> None:
        spool, session = given
        self.count += 1
        shutil.rmtree(self.lab / "outbox", ignore_errors=True)
        folder = self.lab / "outbox" / f"{self.count:x}-1"
        folder.mkdir(parents=True)
        key = f"{self.count:032x}".encode()
        (folder / "000001-run.run").write_bytes(spool.replace(b"0" * 32, key))
        (folder / "session.json").write_bytes(session)
        outbox = Outbox(self.lab, self.tracker)
        try:
            outbox.held_elsewhere("s")
            outbox.adopt()
            outbox.flush(15)
            outbox.check()
            assert not outbox.pending(), f"neither sent nor refused: {outbox.problem}"
        finally:
            outbox._stop(5)
            outbox._sessions.close()


class Bundles(Reader):
    """A study in a file, as `digitlab import` reads it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.place, self.count = folder / "bundle.zip", 0
        if not self.place.exists():
            lab = copy_digits(folder / "exported")
            stop_in_the_middle(lab)
            export_study("stopped", self.place, lab, [])

    def corpus(self) -> Sequence[bytes]:
        good = self.place.read_bytes()
        return [good, b"", archive([]), archive([("bundle.json", b"[" * 10**6)]),
                archive([("bundle.json", b" " * 2**28)], 8),
                archive([("bundle.json", b"{}")] * 2), good[:-30], good + good]  # fmt: skip

    def draw(self, chance: Random) -> bytes:
        good, kind = self.known[0], chance.randrange(5)
        if kind == 0:
            return damaged(good, [good], chance)
        if kind == 1:
            return damaged_archive(good, chance)
        members = _members(good)
        content = damaged_json(json.loads(members["bundle.json"]), chance)
        return archive([*((k, v) for k, v in members.items() if k != "bundle.json"),
                        ("bundle.json", content)])  # fmt: skip

    def read(self, given: bytes) -> None:
        lab = self.folder / f"imported-{self.count}"
        path = self.folder / "given.zip"
        path.write_bytes(given)
        try:
            import_study(path, lab, [])
        except UserError:
            if (lab / "optuna.db").exists():
                assert study_names(open_storage(lab)) == [], "half a study is left"
            if (lab / "mlflow.db").exists():
                self._leave(lab)
            raise
        except BaseException:
            self._leave(lab)
            raise
        self._leave(lab)

    def _leave(self, lab: Path) -> None:
        """Go on in another lab: MLflow keeps this one open."""
        assert not list(self.folder.rglob("escaped"))
        shutil.rmtree(lab, ignore_errors=True)
        self.count += 1


def _members(content: bytes) -> dict[str, bytes]:
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {name: file.read(name) for name in file.namelist()}


class Names(Reader):
    """Runs and studies of other programs in the lab's stores, listed and looked at."""

    commands = ("runs", "runs --csv", "studies", "studies --json", "show {run}", "show {study}",
                "best {study}", "compare {run} {run}", "runs --study {study}")  # fmt: skip

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import os

        self.lab = folder / "names"
        self.lab.mkdir(exist_ok=True)
        os.environ["DIGITLAB_HOME"] = str(self.lab)
        self.tracker = MlflowTracker(None, "digitlab", self.lab)
        self.storage = open_storage(self.lab)

    def corpus(self) -> Sequence[Any]:
        row = whole_run()[0]
        good = {"name": row.name, "study": "s", "tags": row.tags, "params": row.params}
        good |= {
            "metrics": row.metrics,
            "files": {"config.yaml": whole_run()[1]["config.yaml"].decode()},
        }
        own = {"study_id": "0" * 32, "config": config_to_yaml(tiny()), "run_id": "0123"}
        own |= {
            "champion": {
                "test_accuracy": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 2},
                "values": {},
                "trial": 0,
            },
            "seconds": 1.5,
        }
        trial = {"params": {"a": 1.0}, "value": 0.5, "user_attrs": {"curve": [0.5], "metrics": {}}}
        good |= {"notes": own, "trial": trial}
        names = [{**good, "name": text, "study": text} for text in TEXTS]
        return [good, {**good, "notes": {}}, *names]

    def draw(self, chance: Random) -> Any:
        good = dict(self.known[0])
        if chance.random() < 0.4:
            good["name"], good["study"] = chance.choice(TEXTS), chance.choice(TEXTS)
        part = chance.choice(("notes", "notes", "trial", "tags", "params", "metrics", "files"))
        try:
            changed = json.loads(damaged_json(good[part], chance))
        except (ValueError, RecursionError):
            changed = {}
        words = chance.sample(sorted(self.commands), 2)
        return {**good, part: changed if isinstance(changed, dict) else {"x": changed}, "do": words}

    def read(self, given: Any) -> None:
        for study in self.storage.get_all_studies():
            self.storage.delete_study(self.storage.get_study_id_from_name(study.study_name))
        for row in self.tracker.find({}):
            self.tracker.delete(row.run_id)
        name, study = given["name"], given["study"]
        try:
            self._write(given)
        except Exception as error:  # of MLflow or Optuna, for what no program could store
            raise UserError(f"the store itself takes no such thing: {error!r:.200}") from error
        refused = []
        for words in given.get("do", self.commands):
            try:
                called(*(word.format(run=name, study=study) for word in words.split()))
            except UserError as error:
                refused.append(str(error))
        if refused:
            raise UserError(refused[0])

    def _write(self, given: Any) -> None:
        from optuna.study import StudyDirection

        run_id = self.tracker.create_run(NewRun(given["name"], given["tags"], given["params"]))
        metrics = [(key, value, 1, 1) for key, value in given["metrics"].items()]
        self.tracker.log(
            run_id, LogBatch({str(k): str(v) for k, v in given["params"].items()}, metrics)
        )
        self.tracker.upload(
            run_id,
            {
                k: str(v).encode(errors="replace")
                for k, v in given["files"].items()
                if ".." not in k
            },
        )
        self.tracker.end_run(run_id, "finished", 5)
        study = self.storage.create_new_study([StudyDirection.MAXIMIZE], given["study"])
        for key, value in given["notes"].items():
            self.storage.set_study_user_attr(study, key, value)
        trial = given["trial"]
        attributes = trial.get("user_attrs")
        made = create_trial(value=trial.get("value"), user_attrs=attributes)
        self.storage.create_new_trial(study, template_trial=made)
