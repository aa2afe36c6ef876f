"""A bundle as an MLflow model. MLflow copies this file beside the bundle and runs it when the model is loaded (models
from code), so nothing is pickled; it is imported by nobody else."""

from __future__ import annotations

import base64
import binascii
import io

import mlflow
import numpy as np
import pandas as pd
import torch
from PIL import Image

from osml_plugin.bundle import load_bundle
from osml_plugin.data import read_image

FORMATS = ("JPEG", "PNG", "WEBP")


class Recognizer(mlflow.pyfunc.PythonModel):
    """Images or embeddings in, a data frame out: label (None = unknown), known, nearest, score (higher = more unknown),
    threshold (unknown iff score > threshold), p_value (None without calibration items)."""

    _skip_type_hint_validation = True  # MLflow asks for type hints, and refuses them beside a tensor signature

    def load_context(self, context):
        factories = (context.model_config or {}).get("factories", [])
        self.recognizer = load_bundle(context.artifacts["bundle"], factories=factories)

    def predict(self, context, model_input, params=None):
        """Of a data frame with a column `image` of encoded images (bytes, or base64 text), or of embeddings `(N, D)`.

        Raises ValueError naming the row that is no JPEG, PNG or WEBP image.
        """
        if self.recognizer.preprocessing is None:
            inputs = np.asarray(model_input, dtype=np.float32)
        else:
            inputs = self._pixels(model_input)
        found = self.recognizer.predict(inputs, neighbours=0)
        return pd.DataFrame(
            {
                "label": pd.Series(found.names, dtype=object),
                "known": [name is not None for name in found.names],
                "nearest": found.nearest,
                "score": found.scores.astype(np.float64),
                "threshold": found.thresholds,
                "p_value": np.nan if found.p_values is None else found.p_values,
            }
        )

    def _pixels(self, table):
        """uint8 `(N, C, H, W)`, as the network takes them."""
        if not isinstance(table, pd.DataFrame) or "image" not in table:
            raise ValueError("expected a data frame with a column 'image' of encoded images")
        form = self.recognizer.preprocessing.form
        rows = [_decoded(row, image, form) for row, image in enumerate(table["image"])]
        return torch.stack(rows) if rows else torch.empty(0, form[0], form[1], form[1], dtype=torch.uint8)


def _decoded(row, image, form):
    try:
        content = base64.b64decode(image, validate=True) if isinstance(image, str) else bytes(image)
        with Image.open(io.BytesIO(content), formats=FORMATS):
            pass  # others are refused before anything is decoded
        return read_image(io.BytesIO(content), *form)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"row {row}: the bytes are no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from error
    except (TypeError, binascii.Error) as error:
        raise ValueError(f"row {row}: expected the bytes of an image file, or the same in base64") from error
    except Exception as error:  # Pillow's decoders raise whatever they stumble on
        raise ValueError(f"row {row}: {error}") from error


mlflow.models.set_model(Recognizer())
