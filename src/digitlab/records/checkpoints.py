"""The checkpoints of trainings that are under way: files in the lab, gone when a training ends."""

import hashlib
import re
import shutil
from contextlib import suppress
from pathlib import Path

from digitlab.base.files import write_synced

_NAME = re.compile("[0-9]{6}-[0-9a-f]{64}")  # number and SHA-256
_KEPT = 2  # the older one is for a disk that gives the newer back damaged


class CheckpointFolder:
    """The last checkpoints of one configuration's training, whichever run made them."""

    def __init__(self, lab: Path, key: str) -> None:
        """Args: key: of the configuration; a training of the same one finds them."""
        self.folder = lab / "checkpoints" / key
        self.is_used = False

    def add(self, content: bytes) -> None:
        """Keep a checkpoint on the disk. Where that fails the training goes on without it."""
        self.is_used = True
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            files = self._files()
            number = int(files[-1].name.partition("-")[0]) + 1 if files else 1
            write_synced(self.folder / f"{number:06d}-{_digest(content)}", content)
            for path in files[: 1 - _KEPT]:
                path.unlink()

    def latest(self) -> bytes | None:
        """Return the last checkpoint that is whole, if there is any."""
        for path in reversed(self._files()):
            with suppress(OSError):
                content = path.read_bytes()
                if path.name.endswith(_digest(content)):
                    self.is_used = True
                    return content
        return None

    def remove(self) -> None:
        """Remove what this object has kept or given; others may still train the same."""
        if self.is_used:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*") if _NAME.fullmatch(path.name))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
