"""The lab: the folder that holds data, records and locks."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the repository: conf/, experiments/, src/


def lab_folder() -> Path:
    """`lab/` in the repository, or where DIGITLAB_HOME points; made if it is not there."""
    folder = Path(os.environ.get("DIGITLAB_HOME") or ROOT / "lab").expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
