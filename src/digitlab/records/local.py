"""What a lab itself holds of MLflow: the database with its tables, and the artifacts.

Nothing in it is an absolute path, since a lab may be moved. The database names artifacts relative
to the folder that MLflow's server serves them from, which is lab/artifacts.
"""

import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from digitlab.base.errors import UserError
from digitlab.base.files import sync_folder

LOCATION = "mlflow-artifacts:/"  # of the artifacts; MLflow's word for what its server serves

# MLflow takes 3 to 8 s to make its tables, so an installation makes them once, and copies them.
TABLES = Path(sys.prefix) / "share" / "digitlab" / f"mlflow-{version('mlflow')}.db"


def sqlite_uri(lab: Path) -> str:
    """Return the address of the lab's database; a writer waits up to a minute for another."""
    return f"sqlite:///{lab / 'mlflow.db'}?timeout=60"


def prepare_database(lab: Path, make_tables: Callable[[Path], None]) -> None:
    """Make the lab's database where there is none.

    Args:
        make_tables: fills the file of a new one, where the installation keeps no copy.
    """
    path, new = lab / "mlflow.db", lab / "mlflow.db.new"
    if not path.exists():
        # Beside its place: MLflow refuses tables of which a kill has left only some. A journal that
        # was left there would be applied to the new file.
        for left in lab.glob(f"{new.name}*"):
            left.unlink()
        if TABLES.exists():
            shutil.copyfile(TABLES, new)
        else:
            make_tables(new)
        with closing(sqlite3.connect(new)) as database, database:
            database.execute("UPDATE experiments SET artifact_location = ?", [f"{LOCATION}0"])
        new.replace(path)
    with closing(sqlite3.connect(path, timeout=60)) as database:
        # Readers and a writer go on side by side; the file remembers it.
        database.execute("PRAGMA journal_mode=WAL")


def keep_tables(make_tables: Callable[[Path], None]) -> None:
    """Make the tables for labs to come."""
    with tempfile.TemporaryDirectory() as folder:
        prepare_database(Path(folder), make_tables)
        with closing(sqlite3.connect(Path(folder, "mlflow.db"))) as database:
            database.execute("PRAGMA journal_mode=DELETE")  # all of it in the one file
        TABLES.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(folder, "mlflow.db"), new := TABLES.with_suffix(".new"))
        new.replace(TABLES)


def place_of(lab: Path, artifact_uri: str, path: str = "") -> Path:
    """Return where an artifact lies, or all of a run's.

    Raises:
        UserError: it would lie outside, which only a damaged database says.
    """
    folder = (lab / "artifacts").resolve()
    place = (folder / artifact_uri.removeprefix(LOCATION) / path).resolve()
    if not place.is_relative_to(folder):
        raise UserError(f"Artifact {artifact_uri}/{path} is invalid: it must lie in the lab.")
    return place


def write_artifacts(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files such that a power loss afterwards does not undo it."""
    folders = {folder, folder.parent, folder.parent.parent}
    paths = [(folder / name, content) for name, content in files.items()]
    for path, content in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        folders.add(path.parent)
        with open(f"{path}.new", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    for path, _ in paths:
        Path(f"{path}.new").replace(path)
    for changed in folders:
        sync_folder(changed)
