"""The command `digitlab`, and `python -m digitlab`."""

import gc
import sys

from digitlab.base.stop import end_imports_quietly

# New objects between two collections of garbage. Python's 700 make it search the modules that are
# being imported hundreds of times, an eighth of the time that a command takes to start.
_COLLECT_EVERY = 50_000


def main() -> int:
    """Run the command line; returns the exit status."""
    end_imports_quietly()
    gc.set_threshold(_COLLECT_EVERY)
    from digitlab.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
