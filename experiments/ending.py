"""How the programs of this folder end on a mistake of their user: in one line."""

import sys
from collections.abc import Callable
from pathlib import Path

from digitlab.base.errors import UserError


def end_plainly(main: Callable[[], None]) -> None:
    """Call `main`; of a UserError print one line, and exit with status 2."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
