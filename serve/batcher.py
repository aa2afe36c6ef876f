"""Calls that come at the same time share one run."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batcher(Generic[Item, Answer]):
    """Runs batches one after another; a batch takes what has come while the one before it ran.

    A lone call therefore never waits, and the busier it is the larger the batches are. (`serve.batch` does the same,
    but works inside a Ray Serve replica only, and this endpoint is tested without Ray as well.)

    Args:
        run: answers a batch, one answer for each item, in order.
        size: items of a batch at most.
        wait: seconds that a batch which is not full waits for more.
        observe: told the size of each batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Answer]]],
        size: int,
        wait: float = 0,
        observe: Callable[[int], None] = lambda n: None,
    ):
        self._run, self._size, self._wait, self._observe = run, size, wait, observe
        self._waiting: deque[tuple[Item, asyncio.Future]] = deque()
        self._worker: asyncio.Task | None = None

    async def __call__(self, item: Item) -> Answer:
        """The answer to one item; an exception of the batch is raised to each of its calls."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((item, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        while self._waiting:
            if self._wait and len(self._waiting) < self._size:
                await asyncio.sleep(self._wait)
            batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
            batch = [(item, answer) for item, answer in batch if not answer.done()]  # others have hung up
            if not batch:
                continue
            self._observe(len(batch))
            try:
                answers = await self._run([item for item, _ in batch])
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), value in zip(batch, answers, strict=True):
                if not answer.done():
                    answer.set_result(value)
