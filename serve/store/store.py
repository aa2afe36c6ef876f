"""The store: all its parts on one database."""

from __future__ import annotations

from pathlib import Path

from .database import Database
from .gallery import Gallery
from .jobs import Jobs
from .keys import Keys
from .models import Models
from .proposals import Proposals
from .unknowns import Unknowns


class Store(Gallery, Unknowns, Jobs, Proposals, Models, Keys):
    """What was learned while serving. Every method is one short transaction; a write that has returned is on disk.

    Made by any number of processes on the same `url` (see `Database`), and used by any number of threads.
    Any method raises `StoreUnavailable`, in about five seconds, where the database does not answer, and `StoreFull`
    where a write finds no room; the next call tries again. Texts that UTF-8 cannot hold are an `OsmlError`.
    """

    def __init__(self, url: str) -> None:
        super().__init__(Database(url))

    def close(self) -> None:
        """The last one to close a SQLite file leaves it in one piece, without a log beside it."""
        self._database.close()

    @property
    def file(self) -> Path | None:
        """Of SQLite; None: it is in PostgreSQL."""
        return self._database.file

    def is_read_only(self) -> bool:
        """Whether it can be read and, for now, not be written."""
        return self._database.is_read_only()

    def copy_to(self, file: Path) -> None:
        """Write what is in it at this moment, of SQLite, into a new file; others go on reading and writing it."""
        self._database.copy_to(file)

    def reserve_room(self) -> None:
        """Keep room on the disk for writes that make room, where it was spent and there is some again."""
        self._database.reserve_room()
