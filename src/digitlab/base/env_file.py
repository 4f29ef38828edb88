"""The lab's file `.env`: passwords and addresses that belong in no configuration."""

import os
import stat
import sys
from functools import cache
from pathlib import Path

from digitlab.base.errors import UserError, nearest
from digitlab.base.files import require_file

# Where the stores are, and how they are logged in to; anything else would change a program unseen.
_TRACKING = ("URI", "USERNAME", "PASSWORD", "TOKEN", "INSECURE_TLS", "SERVER_CERT_PATH")
_POSTGRES = ("USER", "PASSWORD", "PASSFILE", "SSLMODE", "SSLROOTCERT", "SSLCERT", "SSLKEY")
_KNOWN = {
    "DIGITLAB_STORAGE",
    *(f"MLFLOW_TRACKING_{name}" for name in (*_TRACKING, "CLIENT_CERT_PATH")),
    *(f"PG{name}" for name in _POSTGRES),
}


def load_env_file(path: Path) -> None:
    """Set the environment variables of the file, where there is one, that are not set.

    Raises:
        UserError: the file cannot be read, or holds another name than those of the stores.
    """
    if not path.exists():
        return
    require_file(path, str(path))
    from dotenv import dotenv_values  # which `digitlab --help` need not wait for

    try:
        values = dotenv_values(path, interpolate=False)  # a password may hold a $
        mode = stat.S_IMODE(path.stat().st_mode)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): it must be a text file. Repair or remove it."
        ) from error
    for name, value in values.items():
        if name not in _KNOWN:
            raise UserError(
                f"{path}: {name} does not belong there, {nearest(name, _KNOWN)} Correct or remove "
                f"it."
            )
        if value is None:
            raise UserError(f"{path}: {name} has no value: a line must be NAME=VALUE. Write one.")
        if "\0" in value:  # which no environment can hold
            raise UserError(
                f"{path}: the value of {name} is invalid: it must hold no zero byte. Correct it."
            )
        os.environ.setdefault(name, value)
    if mode & 0o077:
        _warn(path, mode)


@cache  # once is enough
def _warn(path: Path, mode: int) -> None:
    print(
        f"digitlab: {path} may be read by other users (mode {mode:o}): run `chmod 600 {path}`",
        file=sys.stderr,
    )
