"""Where configurations and recipes stand, and the lab: data, records and locks."""

import os
import re
from pathlib import Path
from urllib.parse import quote

from digitlab.base.env_file import load_env_file
from digitlab.base.errors import UserError
from digitlab.base.files import make_folder

_PACKAGE = Path(__file__).resolve().parents[1]
ROOT = _PACKAGE.parents[1]  # of a checkout: conf/, experiments/, src/
IS_CHECKOUT = (ROOT / "conf/config.yaml").is_file()
CONF = (ROOT if IS_CHECKOUT else _PACKAGE) / "conf"  # a wheel holds a copy in the package
RECIPES = (ROOT if IS_CHECKOUT else _PACKAGE) / "experiments"


def sqlite_address(path: Path) -> str:
    """Return SQLAlchemy's address of a file, which decodes what is quoted.

    It ends a path at '?', and Optuna fills in what stands between braces.
    """
    return f"sqlite:///{re.sub(r'[%?{}]', lambda found: quote(found[0]), str(path))}"


def recipe_folders() -> list[Path]:
    """Return the folders of recipes, the first one with a name wins.

    Where there is no checkout, `./experiments` holds recipes of one's own.
    """
    own = Path.cwd() / "experiments"
    return [RECIPES] if IS_CHECKOUT or not own.is_dir() else [own, RECIPES]


def lab_folder(given: Path | None = None) -> Path:
    """Return the lab: `lab/` in a checkout, else `./lab`; DIGITLAB_HOME, or `given`, moves it.

    The folder is made if it is not there. Its file `.env`, if any, gives environment variables
    that are not set, such as passwords.

    Raises:
        UserError: the folder or its `.env` cannot be used, or this is another checkout's code.
    """
    _refuse_other_checkout()
    home = ROOT if IS_CHECKOUT else Path.cwd()
    place = given or os.environ.get("DIGITLAB_HOME") or home / "lab"
    try:
        folder = Path(place).expanduser().resolve()
        make_folder(folder)
    except (OSError, RuntimeError, ValueError) as error:  # ~ of nobody; a zero byte
        raise UserError(
            f"the lab {place} is invalid: it must be a folder that can be written "
            f"({getattr(error, 'strerror', None) or error}). Name another one."
        ) from error
    load_env_file(folder / ".env")
    return folder


def _refuse_other_checkout() -> None:
    """Refuse to work in another checkout than the one whose code this is.

    A copy of a checkout brings a `.venv` with it whose programs run the original's code.
    """
    for folder in (Path.cwd(), *Path.cwd().parents) if IS_CHECKOUT else ():
        if (folder / "src/digitlab").is_dir() and folder.resolve() != ROOT:
            raise UserError(
                f"{folder} is a copy: this digitlab is installed from {ROOT}, and would work there."
                " Run `make setup` in the copy first."
            )
