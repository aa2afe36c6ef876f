"""Recognise or embed millions of items offline: in this process, or on Ray Data with the same recognizer.

source → tables of items → decoded → answered → written. Of the whole, only names of files are ever held.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .commands import open_recognizer
from .errors import OsmlError
from .preprocessing import rendering_of
from .recognizer import OpenSetRecognizer
from .registry import refusing

try:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq
except ImportError as error:
    raise OsmlError("this needs pyarrow, which is not installed: pip install 'osml-plugin[manifest]'") from error

from .bulk_tables import CHUNK, INPUT, Counts, Source, counts, open_source
from .bulk_work import EMBED, RECOGNIZE, Work

ROW_GROUP = 64 * CHUNK


@dataclass(frozen=True)
class BulkResult:
    """What became of N items."""

    n: int
    n_unknown: int
    """Rejected ones; 0 where nothing was to be recognised."""
    n_bad: int
    """Those that cannot be read: their rows have the reason in `error`, and no answer."""
    out: Path


def recognize_dataset(
    model: str | Path | OpenSetRecognizer,
    data: str | Path,
    out: str | Path,
    *,
    ray: bool = False,
    address: str | None = None,
    skip_bad: bool = False,
    factories: Sequence[str] = (),
    overwrite: bool = False,
    progress: bool = True,
) -> BulkResult:
    """Write a row for each item: path (or item, its number from 0), label (null = unknown), known, nearest, score
    (higher = more unknown), threshold (unknown iff score > threshold; null = nothing is rejected), p_value, error.

    Args:
        model: a bundle, a registered model (`models:/NAME@champion`), or a recognizer.
        data: a folder of images, at any depth; a Parquet file or a folder of them, with a column `embedding` (lists of
            floats), `image` (encoded) or `path` (relative to the file), the first of these that is there; or what
            `predict` takes. Other columns are passed through; one named as a column of the answer is there becomes
            `given_<name>`.
        out: a `.parquet` or `.csv` file, in the order of the data; with `ray` a folder of Parquet files, in any order.
            It appears when it is whole.
        ray: work on Ray Data: on all GPUs, or on all processors where there is none. Data and `out` must be in reach
            of every machine; the model is sent to them.
        address: a running cluster; without it Ray is started on this machine, and ended.
        skip_bad: what cannot be read gets a row with the reason, in place of raising it.
        factories: trunk factories (`package.module:factory`) that the bundle may call.

    Raises:
        OsmlError: for an image that cannot be read, unless `skip_bad`; for data that hold nothing that this recognizer
            takes; for an `out` that is there, unless `overwrite`; for a cluster that does not answer. Nothing is then
            written.
    """
    if address is not None and not ray:
        raise OsmlError(f"address '{address}' is of a Ray cluster, and this is to run without Ray: add --ray")
    if ray and Path(out).suffix.lower() == ".csv":
        raise OsmlError(f"with --ray '{out}' becomes a folder of Parquet files: choose a name without .csv")
    if not ray and Path(out).suffix.lower() not in (".parquet", ".csv"):
        raise OsmlError(f"cannot write answers to '{out}'; expected a name ending in .parquet or .csv, or --ray")
    run = _on_ray(address, factories) if ray else _here
    return _run(run, RECOGNIZE, model, data, out, ray, skip_bad, factories, overwrite, progress)


def embed_to_parquet(
    model: str | Path | OpenSetRecognizer,
    data: str | Path,
    out: str | Path,
    *,
    address: str | None = None,
    skip_bad: bool = False,
    factories: Sequence[str] = (),
    overwrite: bool = False,
    progress: bool = True,
) -> BulkResult:
    """Write path (or item), embedding and error of each item to a folder of Parquet files, on Ray Data.

    Arguments and errors are those of `recognize_dataset`, which takes this folder as data.
    """
    run = _on_ray(address, factories)
    return _run(run, EMBED, model, data, out, True, skip_bad, factories, overwrite, progress)


def _on_ray(address: str | None, factories: Sequence[str]) -> Callable[..., Iterator[Counts]]:
    from .bulk_ray import run_on_ray

    return partial(run_on_ray, address=address, factories=factories)


def _run(run, question, model, data, out, folder, skip_bad, factories, overwrite, progress) -> BulkResult:
    out, data = Path(out).absolute(), Path(data)
    if out.resolve() == data.resolve():
        raise OsmlError(f"'{data}' is the data: choose another place for the answers")
    with _aside(out, folder, overwrite) as aside:
        recognizer = open_recognizer(model, factories)
        source = open_source(data, [*question.columns.names, "item", "error", INPUT])
        work = Work(question, _form(recognizer, source), skip_bad, rendering_of(recognizer.preprocessing))
        # Ray takes a while until the first are done: it is to be seen that something is going on.
        delay = 0 if folder else 1
        bar = tqdm(total=source.n, desc=question.title, unit=" items", delay=delay, disable=not progress)
        totals = np.zeros(3, dtype=int)
        with bar, closing(run(recognizer, source, work, aside)) as steps:
            for done in steps:
                totals += done
                bar.update(done[0])
        if totals[0] != source.n:
            raise OsmlError(
                f"{source.n} items were read and {totals[0]} answered: the data changed meanwhile; try again"
            )
    return BulkResult(*totals.tolist(), out)


@contextmanager
def _aside(out: Path, folder: bool, overwrite: bool) -> Iterator[Path]:
    """A place beside `out` to write to, which takes its place at the end, or is removed."""
    if out.exists():
        if not overwrite:
            raise OsmlError(f"'{out}' is there already: choose another place, or pass --overwrite")
        if out.is_dir() != folder or (folder and any(file.suffix != ".parquet" for file in out.iterdir())):
            raise OsmlError(f"'{out}' is not what this command writes: choose another place, or remove it")
    if not out.parent.is_dir():
        raise OsmlError(f"cannot write '{out}': no folder '{out.parent}'; make it first")
    aside, old = (out.with_name(f".{out.stem}.{os.getpid()}.{kind}{out.suffix}") for kind in ("part", "old"))
    try:
        if folder:
            aside.mkdir()
        yield aside
        if folder and out.exists():
            os.rename(out, old)
        try:
            os.replace(aside, out)
        except BaseException:
            if old.exists():
                os.rename(old, out)
            raise
    finally:
        for left in (aside, old):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _here(recognizer: OpenSetRecognizer, source: Source, work: Work, file: Path) -> Iterator[Counts]:
    """In this process, to a file; images are decoded in threads."""
    writer, waiting = None, []

    def write() -> None:
        with refusing(f"cannot write '{file.suffix}' of these columns", "name a .parquet file, or drop the column"):
            writer.write_table(pa.concat_tables(waiting))
        waiting.clear()

    with ThreadPool() as pool, ExitStack() as stack:
        for table in chain.from_iterable(part.tables() for part in source.parts):
            rows = work.answer(recognizer, work.decode(table, pool.map))
            if writer is None:
                make = pyarrow.csv.CSVWriter if file.suffix.lower() == ".csv" else pq.ParquetWriter
                writer = stack.enter_context(make(file, rows.schema))
            waiting.append(rows)
            if sum(map(len, waiting)) >= ROW_GROUP:
                write()
            yield counts(rows)
        if waiting:
            write()


def _form(recognizer: OpenSetRecognizer, source: Source) -> tuple[int, ...]:
    images = recognizer.preprocessing
    if not source.of_embeddings:
        if images is None:
            raise OsmlError("this recognizer takes embeddings, not images: give it a file or a column of embeddings")
        return images.channels, images.size, images.size
    if recognizer.model is not None and images is None:
        return (recognizer.details["input"]["size"],)
    return (recognizer.gallery.embeddings.shape[1],)
