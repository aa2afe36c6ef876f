"""Checks that what a user names exists; made before anything that takes seconds to import."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import OsmlError

KINDS = (
    "a folder of class folders with images, a .csv or .parquet manifest (path,label[,role]), "
    "or a .npz or .safetensors file of embeddings"
)
MANIFEST = "bundle.json"


def check_source(path: str | Path) -> None:
    """OsmlError where `path` is neither a file nor a folder."""
    if not os.path.exists(path):
        raise OsmlError(f"no file or folder '{path}'; expected {KINDS}")


def check_bundle(path: str | Path) -> None:
    """OsmlError where the folder `path` holds no bundle."""
    if not os.path.exists(os.path.join(path, MANIFEST)):
        raise OsmlError(f"no bundle at '{path}': expected a folder that `osml train --out` wrote")


def check_model(model: str | Path) -> None:
    """OsmlError where `model` is neither a bundle nor the address of a registered model (which is not looked up)."""
    if not is_model_uri(model):
        check_bundle(model)


def check_file(file: str | Path, what: str) -> None:
    """OsmlError where `file` is missing; `what` it is, such as 'the split'."""
    try:
        os.stat(file)
    except OSError as error:
        raise OsmlError(f"cannot read {what} '{file}': {error.strerror}") from error


def is_model_uri(text: str | Path) -> bool:
    """Whether this is the address of a model in MLflow and no path."""
    return str(text).startswith(("models:/", "runs:/"))
