"""Room on the store's disk that is kept for writes that make room: on a full disk, too, a class can be forgotten."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

RESERVED = 8 * 2**20
"""Bytes. Forgetting writes pages of the index, hardly of the images: 2,000 examples took 2 MiB."""


class Reserve:
    """A file of nothing beside the store. It is taken away when a write needs its room, and made again when there is
    room for it and as much besides."""

    def __init__(self, file: Path, size: int = RESERVED) -> None:
        self._file, self._size = file, size

    def fill(self) -> None:
        """Make the file, if it is not there and the disk has the room. Without it all else works as well."""
        with suppress(OSError):
            there = os.statvfs(self._file.parent)
            if self._file.exists() or there.f_bavail * there.f_frsize < 2 * self._size:
                return
            number, name = tempfile.mkstemp(prefix=f".{self._file.name}.", dir=self._file.parent)
            try:
                os.posix_fallocate(number, 0, self._size)
                os.replace(name, self._file)
            except OSError:
                os.unlink(name)
            finally:
                os.close(number)

    def spend(self) -> bool:
        """Give its room back; False where it is spent already."""
        try:
            self._file.unlink()
        except OSError:
            return False
        return True
