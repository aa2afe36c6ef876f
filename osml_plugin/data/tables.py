"""Tables of text: CSV files by Python's own reader, Parquet files by pandas."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

from ..errors import OsmlError

LONGEST_CELL = 131_072
"""Characters of a cell of a CSV file; a longer one is a quotation mark that nobody closed."""


def read_table(file: Path) -> dict[str, list[str]]:
    """The columns of a `.csv` or `.parquet` file by name, all as strings; empty cells are ''. Raises OsmlError."""
    return _read_csv(file) if file.suffix.lower() == ".csv" else _read_parquet(file)


def _read_csv(file: Path) -> dict[str, list[str]]:
    # Lines end where files end them; str.splitlines would cut at U+2028 and form feeds inside a cell, too.
    reader = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
    header, rows = None, []
    try:
        for cells in reader:
            if not cells:
                continue
            if any(len(cell) > LONGEST_CELL for cell in cells):
                raise csv.Error("field larger than field limit")
            if header is None:
                header = _header(cells, file)
            else:
                rows.append(_fitted(cells, header, reader.line_num, file))
    except csv.Error as error:
        raise _unreadable(file, f"line {reader.line_num}: {_reason(error)}") from error
    if header is None:
        raise _unreadable(file, "it is empty; expected path,label[,role] in its first line")
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def _text(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, str(error.strerror)) from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _unreadable(file, "it is UTF-16; save it as UTF-8 (in Excel: 'CSV UTF-8')")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise _unreadable(file, f"line {line} is not UTF-8; save it as UTF-8 (in Excel: 'CSV UTF-8')") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise _unreadable(file, f"line {line} holds a NUL character; it is damaged, or no text file")
    return text


def _header(cells: list[str], file: Path) -> list[str]:
    """The names of the columns, without empty ones at the end."""
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(cells) == 1 and separator in cells[0]:
            raise _unreadable(file, f"its cells are separated by {name}; save it with commas")
    while cells and not cells[-1].strip():
        cells = cells[:-1]
    for name, times in Counter(cells).items():
        if times > 1:
            raise _unreadable(file, f"it has {times} columns '{name}'; rename or drop one")
    return cells


def _fitted(cells: list[str], header: list[str], line: int, file: Path) -> list[str]:
    """The cells of a row, as many as there are columns."""
    beyond = cells[len(header) :]
    if len(cells) < len(header) or any(cell.strip() for cell in beyond):
        raise _unreadable(
            file,
            f"line {line} has {len(cells)} cells, but the header {len(header)}; put a cell with a comma in quotation "
            'marks ("a, b"), and leave no cell out',
        )
    return cells[: len(header)]


def _reason(error: csv.Error) -> str:
    text = str(error)
    if "field limit" in text:
        return f"a cell is longer than {LONGEST_CELL:,} characters; look for a quotation mark that is not closed"
    if "unexpected end" in text:
        return "a quotation mark is not closed before the end of the file; close it"
    if "expected after" in text:
        return f'{text}; write a quotation mark inside a cell twice ("")'
    return text


def _read_parquet(file: Path) -> dict[str, list[str]]:
    try:
        import pandas as pd

        table = pd.read_parquet(file)
        # Integers are stored as floats where another row is empty, or was once.
        for name in table.select_dtypes("floating"):
            values = table[name].dropna()
            if ((values % 1 == 0) & (values.abs() < 2**53)).all():
                table[name] = table[name].astype("Int64")
        table = table.astype(object)
        table = table.where(table.notna(), "").astype(str)
    except ImportError as error:
        raise OsmlError(f"reading '{file}' needs pandas and pyarrow: pip install 'osml-plugin[manifest]'") from error
    except (ValueError, OSError) as error:
        raise _unreadable(file, " ".join(str(error).split()) or type(error).__name__) from error
    return {str(name): table[name].tolist() for name in table.columns}


def _unreadable(file: Path, reason: str) -> OsmlError:
    return OsmlError(f"cannot read the manifest '{file}': {reason}")
