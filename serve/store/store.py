"""The store: all its parts on one database."""

from __future__ import annotations

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
        self._database.close()
