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
        self.last = ""  # name of the newest that this object has kept or given

    def add(self, content: bytes) -> None:
        """Keep a checkpoint on the disk. Where that fails the training goes on without it."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            files = self._files()
            number = int(files[-1].name.partition("-")[0]) + 1 if files else 1
            self.last = f"{number:06d}-{_digest(content)}"
            write_synced(self.folder / self.last, content)
            for path in files[: 1 - _KEPT]:
                path.unlink()

    def latest(self) -> bytes | None:
        """Return the last checkpoint that is whole, if there is any."""
        for path in reversed(self._files()):
            with suppress(OSError):
                content = path.read_bytes()
                if path.name.endswith(_digest(content)):
                    self.last = path.name
                    return content
                path.unlink()  # it is damaged, and of no use
        return None

    def remove(self) -> None:
        """Remove what this object has kept or given, and older ones.

        Newer ones are of another process, which trains the same.
        """
        with suppress(OSError):
            for path in self._files():
                if path.name <= self.last:
                    path.unlink()
            if self.last and not self._files():  # with what a write may have left
                shutil.rmtree(self.folder)

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*") if _NAME.fullmatch(path.name))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
