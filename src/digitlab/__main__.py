"""The command `digitlab`, and `python -m digitlab`."""

import gc
import sys

from digitlab.base.stop import end_imports_quietly

# New objects between two collections of garbage. Python's own number, 700, makes it search through
# all that is being imported hundreds of times: an eighth of the time that most commands take.
_COLLECTION_INTERVAL = 10_000


def main() -> int:
    """Run the command line; returns the exit status."""
    end_imports_quietly()
    gc.set_threshold(_COLLECTION_INTERVAL)
    from digitlab.cli import main as run

    try:
        return run()
    finally:
        # Or Python searches all objects for garbage once more before the process ends, which takes
        # another fifth of the time. The system frees them anyway. Where training has imported
        # triton the search stays: triton prints a list of what was not freed.
        if "triton" not in sys.modules:
            gc.freeze()


if __name__ == "__main__":
    sys.exit(main())
