"""The command `digitlab`, and `python -m digitlab`."""

import sys

from digitlab.base.stop import end_imports_quietly


def main() -> int:
    """Run the command line; returns the exit status."""
    end_imports_quietly()
    from digitlab.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
