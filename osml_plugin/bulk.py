"""Recognise or embed millions of items offline: in this process, or on Ray Data with the same recognizer.

source → tables of items → decoded → answered → written. Of the whole, only names of files are ever held.
"""

from __future__ import annotations

import io
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .bundle import load_bundle, save_bundle
from .commands import open_recognizer
from .data import read_image
from .errors import OsmlError
from .recognizer import OpenSetRecognizer
from .registry import refusing

try:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq
except ImportError as error:
    raise OsmlError("this needs pyarrow, which is not installed: pip install 'osml-plugin[manifest]'") from error

from .bulk_tables import CHUNK, INPUT, Counts, RowGroup, Source, counts, number_parts, open_source, write_part

ROW_GROUP = 64 * CHUNK
BLOCK = 32 * 2**20
"""Bytes of a Parquet file's rows that one Ray worker gets at once."""
MAX_FILE = 20 * CHUNK
"""Rows of a file in a folder of answers, at most; it has at least a chunk."""


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
    run = partial(_on_ray, address=address, factories=factories) if ray else _here
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
    run = partial(_on_ray, address=address, factories=factories)
    return _run(run, EMBED, model, data, out, True, skip_bad, factories, overwrite, progress)


# --- what is asked of each item --------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """The columns of an answer, and what fills them from a recognizer and its inputs."""

    columns: pa.Schema
    answer: Callable[[OpenSetRecognizer, Any], pa.Table]
    title: str


def _recognized(recognizer: OpenSetRecognizer, inputs: Any) -> pa.Table:
    found = recognizer.predict(inputs, neighbours=0)
    n, tau = len(found), found.threshold
    columns = {
        "label": found.names,
        "known": [name is not None for name in found.names],
        "nearest": found.nearest,
        "score": found.scores.astype(np.float64),
        "threshold": [None if math.isinf(tau) else tau] * n,
        "p_value": [None] * n if found.p_values is None else found.p_values,
    }
    return pa.table(columns, RECOGNIZE.columns)


def _embedded(recognizer: OpenSetRecognizer, inputs: Any) -> pa.Table:
    embeddings = recognizer.embed(inputs).numpy()
    return pa.table({"embedding": list(embeddings)}, EMBED.columns)


RECOGNIZE = Question(
    pa.schema(
        {
            "label": pa.string(),
            "known": pa.bool_(),
            "nearest": pa.string(),
            "score": pa.float64(),
            "threshold": pa.float64(),
            "p_value": pa.float64(),
        }
    ),
    _recognized,
    "recognising",
)
EMBED = Question(pa.schema({"embedding": pa.list_(pa.float32())}), _embedded, "embedding")


@dataclass(frozen=True)
class Work:
    """What is done with a table of items, here or on any machine."""

    question: Question
    form: tuple[int, ...]
    """Shape of one item as the recognizer takes it: uint8 pixels `(C, H, W)`, or an embedding `(D,)`."""
    skip_bad: bool

    def decode(self, table: pa.Table, each: Callable = map) -> pa.Table:
        """`INPUT` becomes the bytes of what the recognizer takes, null where the new column `error` has a reason."""
        values = table[INPUT].to_numpy(zero_copy_only=False)
        contents, errors = zip(*each(partial(_content, form=self.form), values), strict=True)
        bad = next((row for row, reason in enumerate(errors) if reason is not None), None)
        if bad is not None and not self.skip_bad:
            name = table["path"][bad] if "path" in table.column_names else f"item {table['item'][bad]}"
            raise OsmlError(f"cannot read '{name}': {errors[bad]}; remove it or pass --skip-bad")
        table = table.set_column(0, INPUT, pa.array(contents, pa.large_binary()))
        return table.append_column("error", pa.array(errors, pa.string()))

    def answer(self, recognizer: OpenSetRecognizer, table: pa.Table) -> pa.Table:
        """The rows of a decoded table, as they are written."""
        good = table["error"].is_null().to_numpy()
        found = self.question.columns.empty_table()
        if good.any():
            content = bytearray().join(table[INPUT].drop_null().to_pylist())
            of_images = len(self.form) == 3
            inputs = np.frombuffer(content, np.uint8 if of_images else np.float32).reshape(-1, *self.form)
            found = self.question.answer(recognizer, torch.from_numpy(inputs) if of_images else inputs)
        found = found.take(pa.array(np.cumsum(good) - 1, mask=~good))
        rows = {name: table[name] for name in table.column_names if name not in (INPUT, "error")}
        return pa.table(rows | {name: found[name] for name in found.column_names} | {"error": table["error"]})


def _content(value: str | bytes | np.ndarray | None, form: tuple[int, ...]) -> tuple[bytes | None, str | None]:
    """The bytes of pixels or of an embedding, or the reason why there are none."""
    if value is None:
        return None, "the cell is empty"
    if isinstance(value, str | bytes):
        file, name = (value, value) if isinstance(value, str) else (io.BytesIO(value), "")
        try:
            return read_image(file, *form[:2]).numpy().tobytes(), None
        except OsmlError as error:
            return None, str(error).removeprefix(f"cannot read the image '{name}': ")
    vector = np.asarray(value, dtype=np.float32)
    if vector.shape != form:
        return None, f"the embedding is {len(vector)} wide; expected {form[0]}"
    if not np.isfinite(vector).all():
        return None, "the embedding holds NaN or infinity"
    return vector.tobytes(), None


def _form(recognizer: OpenSetRecognizer, source: Source) -> tuple[int, ...]:
    images = recognizer.preprocessing
    if not source.of_embeddings:
        if images is None:
            raise OsmlError("this recognizer takes embeddings, not images: give it a file or a column of embeddings")
        return images.channels, images.size, images.size
    if recognizer.model is not None and images is None:
        return (recognizer.details["input"]["size"],)
    return (recognizer.gallery.embeddings.shape[1],)


# --- from data to a file ---------------------------------------------------------------------------------


def _run(run, question, model, data, out, folder, skip_bad, factories, overwrite, progress) -> BulkResult:
    out, data = Path(out).absolute(), Path(data)
    if out.resolve() == data.resolve():
        raise OsmlError(f"'{data}' is the data: choose another place for the answers")
    with _aside(out, folder, overwrite) as aside:
        recognizer = open_recognizer(model, factories)
        source = open_source(data, [*question.columns.names, "item", "error", INPUT])
        work = Work(question, _form(recognizer, source), skip_bad)
        bar = tqdm(total=source.n, desc=question.title, unit=" items", delay=1, disable=not progress)
        totals = np.zeros(3, dtype=int)
        with bar, closing(run(recognizer, source, work, aside)) as steps:
            for counts in steps:
                totals += counts
                bar.update(counts[0])
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
        os.replace(aside, out)
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


# --- on Ray Data -----------------------------------------------------------------------------------------


def _on_ray(
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
            blocks = max(n_chunks, len(source.parts))
            rows = ray.data.read_datasource(
                _datasource(source), num_cpus=0, concurrency=max(1, cpus), override_num_blocks=blocks
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
            _start(ray, address)
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


def _start(ray: Any, address: str | None) -> None:
    if address is not None and address.startswith("ray://"):
        raise OsmlError(
            f"address '{address}' is a Ray client's, and this runs on a machine of the cluster: submit it with "
            "'ray job submit', or name host:6379"
        )
    try:
        # Ray's C++ part complains of what Ray Data does by design, and says so when it is told to be quiet.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        with _no_stderr():
            ray.init(
                address=address or "local",
                include_dashboard=False if address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:  # Ray raises many kinds
        what = f"the Ray cluster '{address}' does not answer" if address else "Ray cannot be started here"
        raise OsmlError(f"{what} ({' '.join(str(error).split())[:300]}): look at 'ray status' on its head") from error


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
    if isinstance(cause, OsmlError | OSError):
        cause.__notes__ = []  # on how to have Ray try again
        return cause
    if cause is not None:
        return error
    return OsmlError(f"Ray could not go on: {' '.join(str(error).split())[:300]}")
