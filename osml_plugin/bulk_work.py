"""What a bulk job asks of each item, and how a table of items is decoded and answered, here or on any machine."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from .bulk_tables import INPUT
from .checks import LARGEST
from .data import Rendering, read_image
from .errors import OsmlError
from .recognizer import OpenSetRecognizer


@dataclass(frozen=True)
class Question:
    """The columns of an answer, and what fills them from a recognizer and its inputs."""

    columns: pa.Schema
    answer: Callable[[OpenSetRecognizer, Any], pa.Table]
    title: str


def _recognized(recognizer: OpenSetRecognizer, inputs: Any) -> pa.Table:
    found = recognizer.predict(inputs, neighbours=0)
    n = len(found)
    columns = {
        "label": found.names,
        "known": [name is not None for name in found.names],
        "nearest": found.nearest,
        "score": found.scores.astype(np.float64),
        "threshold": [None if math.isinf(tau) else tau for tau in found.thresholds.tolist()],
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
    rendering: Rendering

    def decode(self, table: pa.Table, each: Callable = map) -> pa.Table:
        """`INPUT` becomes the bytes of what the recognizer takes, null where the new column `error` has a reason."""
        values = table[INPUT].to_numpy(zero_copy_only=False)
        contents, errors = zip(*each(partial(_content, form=self.form, rendering=self.rendering), values), strict=True)
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


def _content(
    value: str | bytes | np.ndarray | None, form: tuple[int, ...], rendering: Rendering
) -> tuple[bytes | None, str | None]:
    """The bytes of pixels or of an embedding, or the reason why there are none."""
    if value is None:
        return None, "the cell is empty"
    if isinstance(value, str | bytes):
        file, name = (value, value) if isinstance(value, str) else (io.BytesIO(value), "")
        try:
            return read_image(file, *form[:2], rendering).numpy().tobytes(), None
        except OsmlError as error:
            return None, str(error).removeprefix(f"cannot read the image '{name}': ")
    vector = np.asarray(value, dtype=np.float64)
    if vector.shape != form:
        return None, f"the embedding is {len(vector)} wide; expected {form[0]}"
    if not np.isfinite(vector).all():
        return None, "the embedding holds NaN or infinity"
    if (np.abs(vector) > LARGEST).any():
        return None, f"the embedding holds a number beyond {LARGEST:.0e}"
    return vector.astype(np.float32).tobytes(), None
