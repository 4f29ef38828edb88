"""What a lab itself holds of MLflow: the database with its tables, and the artifacts.

Nothing in it is an absolute path, since a lab may be moved. The database names artifacts relative
to the folder that MLflow's server serves them from, which is lab/artifacts.
"""

import shutil
import sqlite3
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from digitlab.base.errors import UserError
from digitlab.base.files import sync
from digitlab.base.paths import sqlite_address
from digitlab.records.tracker import TrackerRefused

LOCATION = "mlflow-artifacts:/"  # of the artifacts; MLflow's word for what its server serves

# MLflow takes 3 to 8 s to make its tables, so an installation makes them once, and copies them.
TABLES = Path(sys.prefix) / "share" / "digitlab" / f"mlflow-{version('mlflow')}.db"


def sqlite_uri(lab: Path) -> str:
    """Return the address of the lab's database; a writer waits up to a minute for another."""
    return f"{sqlite_address(lab / 'mlflow.db')}?timeout=60"


def prepare_database(lab: Path, make_tables: Callable[[Path], None]) -> None:
    """Make the lab's database where there is none, by `make_tables` if no copy is kept."""
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
        # Or a power loss leaves the name of a database, and an empty file.
        sync(new)
        new.replace(path)
        sync(lab)
    with closing(sqlite3.connect(path, timeout=60)) as database:
        # Readers and a writer go on side by side; the file remembers it.
        database.execute("PRAGMA journal_mode=WAL")


def place_of(lab: Path, artifact_uri: str, path: str = "") -> Path:
    """Return where an artifact, or all of a run's, lies; UserError if outside of the lab."""
    folder = (lab / "artifacts").resolve()
    place = (folder / artifact_uri.removeprefix(LOCATION) / path).resolve()
    if not place.is_relative_to(folder):
        raise UserError(f"Artifact {artifact_uri}/{path} is invalid: it must lie in the lab.")
    return place


def write_artifacts(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files as a whole each; the outbox syncs them before it lets go of its own copy.

    Raises:
        TrackerRefused: a name that leads out of the folder.
    """
    for name, content in files.items():
        path = folder / name
        if ".." in path.parts or not path.is_relative_to(folder) or path == folder:
            rule = "it must be the path of a file within its run"
            raise TrackerRefused(f"Artifact {name} is invalid: {rule}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")
        new.write_bytes(content)
        new.replace(path)


def list_artifacts(folder: Path) -> list[str]:
    """Return the paths of the files below a run's folder, sorted."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)
