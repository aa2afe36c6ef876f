"""A bulk job on Ray Data. Ray is imported by the functions that need it: it takes seconds, and it is an extra."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from .bulk_tables import BLOCK, CHUNK, Counts, RowGroup, Source, number_parts, write_part
from .bulk_work import Work
from .bundle import load_bundle, save_bundle
from .errors import OsmlError
from .ray_cluster import connect
from .recognizer import OpenSetRecognizer

MAX_FILE = 20 * CHUNK
"""Rows of a file in a folder of answers, at most; it has at least a chunk, unless there are no more."""


def run_on_ray(
    recognizer: OpenSetRecognizer,
    source: Source,
    work: Work,
    folder: Path,
    *,
    address: str | None,
    factories: Sequence[str],
) -> Iterator[Counts]:
    """On Ray, to a folder of files. On processors a worker decodes and embeds; for GPUs, processors decode."""
    with _ray_session(address) as ray:
        model = ray.put(_bundle_files(recognizer))  # once: each machine fetches it from there
        there = ray.cluster_resources()
        cpus, gpus = (int(there.get(kind, 0)) for kind in ("CPU", "GPU"))
        n_chunks = math.ceil(source.n / CHUNK)
        tables = {"batch_format": "pyarrow", "batch_size": CHUNK}
        # Reading and writing ask for no processor, as the workers have them all.
        if isinstance(source.parts[0], RowGroup):
            readers = min(max(1, cpus), len(source.parts))
            blocks = max(n_chunks, len(source.parts))
            rows = ray.data.read_datasource(
                _datasource(source), num_cpus=0, concurrency=readers, override_num_blocks=blocks
            )
        else:
            rows = ray.data.from_arrow([part.table for part in source.parts])
        if gpus:
            rows = rows.map_batches(work.decode, num_cpus=1, **tables)
        rows = rows.map_batches(
            _Worker,
            fn_constructor_args=(model, work, factories),
            compute=ray.data.ActorPoolStrategy(size=min(gpus or max(1, cpus), n_chunks)),
            num_cpus=0 if gpus else 1,
            num_gpus=1 if gpus else 0,
            **tables,
        )
        size = min(max(source.n // 100, CHUNK), MAX_FILE)
        write = partial(write_part, folder=folder)
        written = []
        for file in rows.map_batches(write, batch_format="pyarrow", batch_size=size, num_cpus=0).iter_rows():
            written.append(file["file"])
            yield tuple(file["counts"])
    number_parts(folder, written)


class _Worker:
    """An actor: the recognizer, loaded once."""

    def __init__(self, model: Any, work: Work, factories: Sequence[str]):
        import ray

        self.work = work
        with tempfile.TemporaryDirectory() as folder:
            for name, content in ray.get(model).items():
                Path(folder, name).write_bytes(content)
            self.recognizer = load_bundle(folder, factories=factories)

    def __call__(self, table: pa.Table) -> pa.Table:
        if "error" not in table.column_names:
            table = self.work.decode(table)
        return self.work.answer(self.recognizer, table)


def _bundle_files(recognizer: OpenSetRecognizer) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        save_bundle(recognizer, Path(folder, "bundle"))
        return {file.name: file.read_bytes() for file in Path(folder, "bundle").iterdir()}


def _datasource(source: Source) -> Any:
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Parts(Datasource):
        def get_name(self) -> str:
            return "Items"

        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
            return [ReadTask(part.tables, BlockMetadata(part.n, None, None, None)) for part in source.parts]

    return Parts()


@contextmanager
def _ray_session(address: str | None) -> Iterator[Any]:
    """Ray, quiet, while it lasts; one that runs already in this process is used, and left running."""
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        import ray.data
    except ImportError as error:
        raise OsmlError("this needs Ray, which is not installed: pip install 'osml-plugin[serve]'") from error
    loggers = {logging.getLogger("ray"): logging.ERROR, logging.getLogger("ray.data"): logging.CRITICAL}
    levels = [logger.level for logger in loggers]
    for logger, level in loggers.items():
        logger.setLevel(level)
    ours = not ray.is_initialized()
    try:
        if ours:
            # Ray's C++ part complains of what Ray Data does by design, and says so when it is told to be quiet.
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
            with _no_stderr():
                connect(address)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a copy touches what is deprecated
            context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False  # there is a bar of our own
        context.target_max_block_size = BLOCK
        context.raise_original_map_exception = True
        with ray.data.DataContext.current(context):
            yield ray
    except ray.exceptions.RayError as error:
        raise _reason(error) from None
    finally:
        if ours:
            ray.shutdown()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _no_stderr() -> Iterator[None]:
    """For code that is not Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _reason(error: Exception) -> Exception:
    """What can be mended, without all that Ray wraps around it; an error of this package's own as it is."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, OsmlError):
        return OsmlError(str(cause).partition("\n")[0])  # Ray adds how to have it try again
    if isinstance(cause, OSError):
        return cause
    if cause is not None:
        return error
    return OsmlError(f"Ray could not go on: {' '.join(str(error).split())[:300]}")
