"""What a bulk job reads and writes: folders of images, Parquet datasets, what `open_items` takes; as tables of items.

A source is a list of parts. The column `INPUT` of their tables holds what is embedded, and its type says what that is:
text is a file, bytes are an encoded image, a list is an embedding. The other columns are written with the answer.

This module imports no torch, nor anything that does: the workers that read and write are to start at once.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from .errors import OsmlError

CHUNK = 1024
"""Rows of a table."""
BLOCK = 32 * 2**20
"""Bytes of a Parquet file that are read together."""
INPUT = "osml.input"
KINDS = "a folder of images, a Parquet file or a folder of them, or what `osml predict` takes"


@dataclass(frozen=True)
class Rows:
    """Items that are here: names of files, or embeddings."""

    table: pa.Table

    @property
    def n(self) -> int:
        return len(self.table)

    def tables(self) -> Iterator[pa.Table]:
        yield self.table


@dataclass(frozen=True)
class RowGroup:
    """Items that are read from a Parquet file when they are wanted, some tens of megabytes at a time."""

    file: str
    number: int
    n: int
    size: int
    """Bytes of it, unpacked."""
    columns: pa.Schema
    """Of all files of the source."""
    given: str
    """The column that is embedded."""
    names: dict[str, str]
    """The columns that are passed through, and what they are called in the answer."""
    first: int
    """The number of the first item."""

    def tables(self) -> Iterator[pa.Table]:
        first, wanted = self.first, [*dict.fromkeys([self.given, *self.names])]
        rows = max(1, min(CHUNK, BLOCK * self.n // max(self.size, 1)))
        try:
            # The buffer has it read page by page: a row group may be gigabytes of images.
            with pq.ParquetFile(self.file, pre_buffer=False, buffer_size=2**20) as file:
                for batch in file.iter_batches(rows, row_groups=[self.number], columns=wanted, use_threads=False):
                    columns = {name: self._column(batch, name) for name in wanted}
                    table = {INPUT: self._input(columns[self.given])}
                    if "path" not in self.names:
                        table["item"] = np.arange(first, first + len(batch))
                    yield pa.table(table | {name: columns[column] for column, name in self.names.items()})
                    first += len(batch)
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise OsmlError(
                f"row group {self.number} of '{self.file}' cannot be read ({reason}): write it again"
            ) from error

    def _column(self, batch: pa.RecordBatch, name: str) -> pa.Array:
        kind = self.columns.field(name).type
        return batch[name].cast(kind) if name in batch.schema.names else pa.nulls(len(batch), kind)

    def _input(self, values: pa.Array) -> pa.Array:
        if self.given == "path":
            folder = os.path.dirname(self.file)
            return pa.array([path and os.path.join(folder, path) for path in values.to_pylist()], pa.string())
        return values.field("bytes") if pa.types.is_struct(values.type) else values


@dataclass(frozen=True)
class Source:
    """N items, in parts that can be read one by one and anywhere."""

    parts: list[Rows] | list[RowGroup]
    of_embeddings: bool

    @property
    def n(self) -> int:
        return sum(part.n for part in self.parts)


def open_source(data: Path, taken: Collection[str]) -> Source:
    """What `data` holds. `taken` are names of columns of the answer: the data's own are called `given_<name>`."""
    if data.is_dir():
        images, tables = _walk(data)
        if images and tables:
            raise OsmlError(f"'{data}' holds images and Parquet files such as '{tables[0]}': name one of the two")
        if not images and not tables:
            raise OsmlError(f"'{data}' holds neither images nor Parquet files; expected {KINDS}")
        return _open_parquet(tables, taken) if tables else Source(images, False)
    if data.suffix.lower() == ".parquet" and data.is_file():
        return _open_parquet([data], taken)
    from .data import open_items

    items = open_items(data, labelled=False)
    n, of_embeddings = len(items), items.embeddings is not None
    columns = {INPUT: list(items.embeddings) if of_embeddings else [os.path.abspath(path) for path in items.paths]}
    columns |= {"item": np.arange(n)} if items.paths is None else {"path": [str(path) for path in items.paths]}
    if items.labels is not None:
        columns[_names(["label"], taken)["label"]] = items.labels
    table = pa.table(columns)
    return Source([Rows(table.slice(start, CHUNK)) for start in range(0, n, CHUNK)], of_embeddings)


def _walk(folder: Path) -> tuple[list[Rows], list[Path]]:
    """The images below a folder, and the Parquet files, by name; see `data.folders.walk`."""
    from .data.folders import LeftOut, suffix_of, walk

    images, tables, names, left_out = [], [], [], LeftOut()

    def add() -> None:
        try:
            images.append(Rows(pa.table({INPUT: [os.path.abspath(name) for name in names], "path": names})))
        except UnicodeEncodeError as error:
            raise OsmlError(f"a file has the name {error.object!r}, which is no text: rename it in UTF-8") from error
        names.clear()

    for where, taken, others in tqdm(walk(folder, also=(".parquet",)), desc="listing folders", delay=2, leave=False):
        left_out.add(where, others, len(taken))
        for name in taken:
            if suffix_of(name) == ".parquet":
                tables.append(Path(where, name))
                continue
            names.append(os.path.join(where, name))
            if len(names) == CHUNK:
                add()
    if names:
        add()
    left_out.tell(folder, "folder")
    return images, tables


def _open_parquet(files: list[Path], taken: Collection[str]) -> Source:
    from .registry import refusing

    where = f"'{files[0]}'" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    with refusing(f"cannot read {where}", "expected Parquet files with the same columns"):
        footers = [pq.read_metadata(file) for file in files]
        columns = pa.unify_schemas([f.schema.to_arrow_schema() for f in footers], promote_options="permissive")
    given = next((name for name in ("embedding", "image", "path") if name in columns.names), None)
    if given is None:
        there = ", ".join(columns.names) or "none"
        raise OsmlError(f"{where} has no column 'embedding', 'image' or 'path'; it has {there}")
    if not _fits(given, columns.field(given).type):
        expected = {"embedding": "lists of floats", "image": "the bytes of image files", "path": "text"}[given]
        raise OsmlError(f"column '{given}' of {where} holds {columns.field(given).type}; expected {expected}")
    names = _names([name for name in columns.names if name not in ("embedding", "image")], taken)
    parts, first = [], 0
    for file, footer in zip(files, footers, strict=True):
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            n, size = group.num_rows, group.total_byte_size
            if n:
                parts.append(RowGroup(str(file.absolute()), number, n, size, columns, given, names, first))
            first += n
    if not parts:
        raise OsmlError(f"{where} has no rows; expected one an item")
    if given == "path":  # such files are small, and their row groups hold many: cut finer
        return Source([Rows(table) for part in parts for table in part.tables()], False)
    return Source(parts, given == "embedding")


def _fits(given: str, kind: pa.DataType) -> bool:
    is_a = pa.types
    if given == "path":
        return is_a.is_string(kind) or is_a.is_large_string(kind)
    if given == "image":
        if is_a.is_struct(kind) and kind.get_field_index("bytes") >= 0:  # as Hugging Face's datasets keep them
            kind = kind.field("bytes").type
        return is_a.is_binary(kind) or is_a.is_large_binary(kind)
    is_list = is_a.is_list(kind) or is_a.is_large_list(kind) or is_a.is_fixed_size_list(kind)
    return is_list and is_a.is_floating(kind.value_type)


def _names(columns: list[str], taken: Collection[str]) -> dict[str, str]:
    """What the data's own columns are called in the answer, `path` first."""
    columns = sorted(columns, key=lambda name: name != "path")
    names = {name: f"given_{name}" if name in taken else name for name in columns}
    if len(set(names.values())) < len(columns):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise OsmlError(f"the data have two columns for '{twice}' of the answer: rename one of them")
    return names


# --- answers ---------------------------------------------------------------------------------------------

Counts = tuple[int, int, int]
"""Rows, rejected ones, unreadable ones."""


def counts(rows: pa.Table) -> Counts:
    known = rows["known"].to_pylist() if "known" in rows.column_names else []
    return len(rows), known.count(False), len(rows) - rows["error"].null_count


def write_part(rows: pa.Table, *, folder: Path) -> pa.Table:
    """A file of its own each time: of a task that is done twice, one is left out. Gives its name and counts."""
    name = f"{uuid4().hex}.parquet"
    pq.write_table(rows, folder / name)
    return pa.table({"file": [name], "counts": [counts(rows)]})


def number_parts(folder: Path, written: list[str]) -> None:
    """Number the files that count, and remove others."""
    for number, name in enumerate(written):
        if not (folder / name).exists():
            raise OsmlError(f"answers of another machine are not in '{folder.parent}': name a folder that all share")
        os.rename(folder / name, folder / f"part-{number:05}.parquet")
    for file in folder.iterdir():
        if not file.name.startswith("part-"):
            file.unlink()
