"""MLflow: where runs and models are stored, bundles as registered models, and the runs of a sweep.

MLflow is imported by the functions that need it: it takes seconds, and it is an extra.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import posixpath
import re
import shutil
import sqlite3
import tempfile
import threading
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

from .bundle import MANIFEST, Manifest, load_tensor_shape, read_manifest
from .errors import OsmlError, unknown_name

log = logging.getLogger(__name__)


# --- the store -------------------------------------------------------------------------------------------


def tracking_uri() -> str:
    """Where runs and models are stored: MLFLOW_TRACKING_URI, else the SQLite file `mlflow.db` in the working folder.

    A relative SQLite file is made absolute. MLflow is told, and its registry follows unless it has an address of its own.
    """
    mlflow = _mlflow()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        file, mark, query = uri.removeprefix("sqlite:///").partition("?")
        uri = f"sqlite:///{os.path.abspath(file)}{mark}{query}"
    mlflow.set_tracking_uri(uri)
    return uri
