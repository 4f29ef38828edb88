"""Named points in the life of a trial and its record, where tests inject faults.

Nothing happens at them unless a test installs a hook, or DIGITLAB_FAULTS names a Python file for
the processes that a test starts; the file defines `hook(name: str) -> None`.
"""

import os
import runpy
from collections.abc import Callable
from functools import cache

hook: Callable[[str], None] | None = None


def point(name: str) -> None:
    """Let a test fail, kill or delay this process at the named point."""
    installed = hook or _hook_of_environment()
    if installed is not None:
        installed(name)


@cache
def _hook_of_environment() -> Callable[[str], None] | None:
    path = os.environ.get("DIGITLAB_FAULTS")
    if not path:
        return None
    loaded: Callable[[str], None] = runpy.run_path(path)["hook"]
    return loaded
