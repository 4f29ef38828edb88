"""The lab: the folder that holds data, records and locks."""

import os
from pathlib import Path

from digitlab.base.errors import UserError

ROOT = Path(__file__).resolve().parents[3]  # the repository: conf/, experiments/, src/


def lab_folder() -> Path:
    """`lab/` in the repository, or where DIGITLAB_HOME points; made if it is not there.

    Its file `.env`, if any, gives environment variables that are not set: passwords, say.
    """
    folder = Path(os.environ.get("DIGITLAB_HOME") or ROOT / "lab").expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"DIGITLAB_HOME={folder}: cannot be the lab ({error.strerror}): "
            "name a folder that can be written"
        ) from error
    if (folder / ".env").exists():
        from dotenv import load_dotenv  # which `digitlab --help` need not wait for

        load_dotenv(folder / ".env")
    return folder
