"""A function over many files, in threads: reading and decoding release Python's lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")

CHUNK = 32


def in_threads(function: Callable[[T], R], things: Sequence[T], what: str, progress: bool = True) -> list[R]:
    """`[function(t) for t in things]` in threads; a progress bar on stderr once it has taken two seconds."""
    with ThreadPool() as pool:
        done = pool.imap(function, things, chunksize=CHUNK)
        return list(tqdm(done, total=len(things), desc=what, delay=2, disable=not progress))
