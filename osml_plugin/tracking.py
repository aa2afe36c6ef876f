"""MLflow: where runs and models are stored, and bundles as registered models.

MLflow is imported by the functions that need it: it takes seconds, and it is an extra.
"""

from __future__ import annotations

import atexit
import io
import json
import logging
import math
import os
import re
import shutil
import sqlite3
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from .bundle import MANIFEST, Manifest, bundle_lock, read_manifest
from .errors import OsmlError, unknown_name
from .tracking_file import bring_home, check_sqlite_file, sqlite_file, with_sqlite_file
from .tracking_names import model_name, registered

logger = logging.getLogger(__name__)

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
MAX_TAG = 5_000
"""Characters that a tag of a model version may have in every MLflow store."""


# --- the store -------------------------------------------------------------------------------------------


_left = {"uri": ""}
"""The default that MLflow was given last; it leaves it in the environment, for other processes."""


def given_uri() -> str | None:
    """MLFLOW_TRACKING_URI as the user set it; None where nobody did."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return None if uri == _left["uri"] else uri or None


def tracking_uri() -> str:
    """Where runs and models are stored: MLFLOW_TRACKING_URI, else the SQLite file `mlflow.db` in the working folder.

    A SQLite file is named absolutely. MLflow is told; its registry follows unless it has an address of its own.
    """
    mlflow, given = _mlflow(), given_uri()
    uri = given or "sqlite:///mlflow.db"
    if (file := sqlite_file(uri)) is not None:
        uri = with_sqlite_file(uri, os.path.abspath(file))
    mlflow.set_tracking_uri(uri)
    if given is None:
        _left["uri"] = uri
    return uri


def check_tracking(uri: str, timeout: float = 8, make: bool = True) -> None:
    """Raise one OsmlError, within `timeout` seconds and a little, unless the store answers.

    Args:
        make: make a SQLite store that is not there yet, which takes longer; False where it is only read.

    A SQLite store that was moved, its artifacts beside it, is told where they are now.
    """
    _mlflow()
    if re.match("[a-z]*", uri)[0] not in SCHEMES:
        raise _unreachable(uri, "no such kind of store")
    local = uri.startswith("sqlite:")
    if (file := sqlite_file(uri)) is not None:
        try:
            check_sqlite_file(file, make)
            bring_home(file)
        except (OSError, sqlite3.Error) as error:
            raise _unreachable(uri, getattr(error, "strerror", None) or str(error)) from error
    failed: list[Exception] = []
    probe = threading.Thread(target=_probe, args=(uri, failed), daemon=True)
    # In a thread: neither name resolution nor a server that sends a byte now and then keeps to a timeout. That of the
    # call is longer, so that it is always this one that says so.
    with mlflow_calls(uri, retries=0, timeout=2 * timeout):
        probe.start()
        probe.join(None if local else timeout)
    if probe.is_alive():
        raise _unreachable(uri, f"no answer within {timeout:g} seconds")
    if failed:
        raise _unreachable(uri, _one_line(failed[0])) from failed[0]


def _probe(uri: str, failed: list[Exception]) -> None:
    from mlflow import MlflowClient

    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # a driver that is not installed, a scheme that nobody knows
        failed.append(error)


def _unreachable(uri: str, reason: str) -> OsmlError:
    return OsmlError(
        f"cannot reach the tracking store '{shown(uri)}': {reason}; set MLFLOW_TRACKING_URI to http://HOST:PORT of a "
        "running `mlflow server` or to sqlite:///FILE"
    )


def shown(uri: str) -> str:
    """Without a password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _mlflow() -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        import mlflow
    except ImportError as error:
        raise OsmlError("this needs MLflow, which is not installed: pip install 'osml-plugin[mlflow]'") from error
    return mlflow


@contextmanager
def mlflow_calls(uri: str, *, retries: int = 2, timeout: float = 15) -> Iterator[None]:
    """Calls of MLflow: quiet, and with few retries, since its own go on for minutes. Its errors, and those of the
    network and the disk, become one OsmlError."""
    from mlflow.exceptions import MlflowException

    settings = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(math.ceil(timeout)),
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    before = {name: os.environ.get(name) for name in settings}
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [log.level for log in loggers]
    os.environ.update(settings)
    for log in loggers:
        log.setLevel(logging.CRITICAL)  # whatever it logs as an error it raises as well
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except OsmlError:
        raise
    except (MlflowException, OSError) as error:
        raise OsmlError(f"MLflow at '{shown(uri)}': {_one_line(error)}") from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _one_line(error: Exception) -> str:
    """The first sentence, or the reason of the operating system or of SQLite, which MLflow buries in pages."""
    text = shown(" ".join(str(error).split())) or type(error).__name__
    reason = re.search(r"(?:\[Errno -?\d+\]|\(sqlite3\.\w+\)) ([^'\")\[]+\b)", text)
    return reason[1] if reason else re.split(r"(?<=\.) ", text)[0][:300]


# --- bundles as models -----------------------------------------------------------------------------------


def log_bundle(
    bundle: str | Path, *, run_id: str, register: str | None = None, tags: Mapping[str, str] | None = None
) -> tuple[str, int | None]:
    """Log a bundle as an MLflow model of a run, from code and without pickle, and register it.

    Args:
        register: the name to register it under; its version gets `tags`, those that `version_tags` gives, and the
            alias 'challenger'.

    Returns:
        the model's address, and its version if it was registered.

    Raises:
        OsmlError: where there is no whole bundle, and where MLflow refuses or does not answer.
    """
    bundle = Path(bundle)
    register = None if register is None else model_name(register)
    uri = tracking_uri()
    check_tracking(uri)
    import mlflow
    from mlflow.models import Model

    with tempfile.TemporaryDirectory() as room, mlflow_calls(uri, timeout=120):
        copy = Path(room, "bundle")
        manifest = _copy(bundle, copy)
        width = _width(copy, manifest)
        client = mlflow.MlflowClient()
        if register is not None:
            _make_registered_model(client, register)
        # Left to itself MLflow takes the experiment that is active, not the run's.
        experiment = client.get_run(run_id).info.experiment_id
        model = client.create_logged_model(experiment, name="model", source_run_id=run_id)
        logged = Model.log(
            None,
            mlflow.pyfunc,
            name="model",
            run_id=run_id,
            model_id=model.model_id,
            python_model=str(Path(__file__).with_name("mlflow_model.py")),
            artifacts={"bundle": str(copy)},
            # What a trunk of the user's own may be made by is said by whoever loads the model.
            model_config={"factories": []},
            pip_requirements=_requirements(),
            **_interface(manifest, width),
        )
        if register is None:
            return logged.model_uri, None
        # By hand: MLflow's own way prints, and shows the version for a while without its tags.
        made = client.create_model_version(
            register,
            f"models:/{logged.model_id}",
            run_id,
            tags={**version_tags(manifest, width), **(tags or {})},
            model_id=logged.model_id,
        )
        client.set_registered_model_alias(register, "challenger", made.version)
        return f"models:/{register}/{made.version}", int(made.version)


def _make_registered_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def version_tags(manifest: Manifest, width: int) -> dict[str, str]:
    """The tags of a model version: threshold, detector, alpha, dimension (width of the embeddings), classes (JSON;
    only how many where the names are too long for a tag), data (the fingerprint of what it was trained on)."""
    names = json.dumps(list(manifest.classes.values()), ensure_ascii=False)
    tags = {
        "threshold": str(manifest.threshold.tau),
        "detector": manifest.detector.name,
        "alpha": str(manifest.alpha),
        "dimension": str(width),
        "classes": names if len(names) <= MAX_TAG else str(len(manifest.classes)),
    }
    data = manifest.details.get("provenance", {}).get("data")
    return tags if data is None else {**tags, "data": str(data)}


def _copy(bundle: Path, to: Path) -> Manifest:
    """The files of the bundle and no others, all of one state and as they were written."""
    to.mkdir()
    with bundle_lock(bundle):
        manifest = read_manifest(bundle)
        for name in (MANIFEST, *manifest.file_names):
            shutil.copyfile(bundle / name, to / name)
    for file in manifest.files.values():
        if sha256((to / file.name).read_bytes()).hexdigest() != file.sha256:
            raise OsmlError(f"bundle '{bundle}' is damaged: {file.name} does not match its checksum; train again")
    return manifest


def _width(bundle: Path, manifest: Manifest) -> int:
    with safe_open(bundle / manifest.files["gallery"].name, "np") as gallery:
        return gallery.get_slice("embeddings").get_shape()[1]


def _interface(manifest: Manifest, width: int) -> dict[str, Any]:
    """What the model takes and gives, and an example of an input."""
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec
    from PIL import Image

    form = manifest.preprocessing
    if form is None:
        width = manifest.details["input"]["size"] if "model" in manifest.files else width
        takes = Schema([TensorSpec(np.dtype(np.float32), (-1, width))])
        example = np.full((1, width), width**-0.5, dtype=np.float32)
    else:
        takes = Schema([ColSpec("binary", "image")])
        png = io.BytesIO()
        Image.new("L" if form.channels == 1 else "RGB", (form.size, form.size)).save(png, "PNG")
        example = pd.DataFrame({"image": [png.getvalue()]})
    gives = Schema(
        [
            ColSpec("string", "label", required=False),
            ColSpec("boolean", "known"),
            ColSpec("string", "nearest"),
            ColSpec("double", "score"),
            ColSpec("double", "threshold"),
            ColSpec("double", "p_value", required=False),
        ]
    )
    return {"signature": ModelSignature(takes, gives), "input_example": example}


def _requirements() -> list[str]:
    """This package and what it needs, at their installed versions."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    needed = [Requirement(line) for line in requires("osml-plugin") or []]
    names = [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    # A local version such as 2.15.0+cpu is on no index.
    return [f"{name}=={Version(version(name)).public}" for name in ("osml-plugin", *names)]


# --- models as bundles -----------------------------------------------------------------------------------


_downloads: dict[tuple[str, str], Path] = {}


def download_bundle(uri: str) -> Path:
    """The bundle of a model: `models:/NAME@alias`, `models:/NAME/7` or `runs:/ID/model`. Downloaded once a process.

    Raises:
        OsmlError: for a name, alias or version that does not exist, naming those that do; for a model without a bundle.
    """
    is_registered = registered(uri) is not None  # a name that cannot be is refused before the store is looked at
    if re.fullmatch(r"models:/(?!m-)[^/@]*@?", uri):
        raise _no_address(uri)
    store = tracking_uri()
    check_tracking(store, make=False)
    import mlflow

    with mlflow_calls(store, timeout=120):
        if is_registered:
            name, number = resolve_model(uri)
            uri = f"models:/{name}/{number}"
        if (store, uri) not in _downloads:
            here = tempfile.mkdtemp(prefix="osml-")
            atexit.register(shutil.rmtree, here, ignore_errors=True)
            model = Path(mlflow.artifacts.download_artifacts(uri, dst_path=here))
            found = sorted(model.glob(f"artifacts/*/{MANIFEST}"))
            if not found:
                raise OsmlError(f"'{uri}' holds no bundle: expected a model that `osml tune --register` logged")
            _downloads[store, uri] = found[0].parent
        return _downloads[store, uri]


def resolve_model(uri: str) -> tuple[str, int]:
    """Name and version of a registered model, `models:/NAME@alias` or `models:/NAME/7`.

    Raises:
        OsmlError: for another address, and as `find_version`.
    """
    named = registered(uri)
    if not named:
        raise _no_address(uri)
    store = tracking_uri()
    check_tracking(store, make=False)
    name, alias, number = named
    with mlflow_calls(store):
        return name, int(find_version(name, alias=alias, version=number).version)


def _no_address(uri: str) -> OsmlError:
    return OsmlError(f"'{uri}' names no registered model: expected models:/NAME@alias or models:/NAME/7")


def find_version(name: str, *, alias: str | None = None, version: int | str | None = None) -> Any:
    """The MLflow ModelVersion of a registered model that has this alias or number.

    Raises:
        OsmlError: for a name, alias or version that does not exist, naming those that do.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient()
    try:
        if alias is not None:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, str(version))
    except MlflowException as error:
        models = [model.name for model in pages(client.search_registered_models)]
        if not models:
            raise OsmlError("no model is registered here: register one with `osml tune --register NAME`") from error
        if name not in models:
            raise unknown_name("registered model", name, models) from error
        if alias is not None:
            there = sorted(client.get_registered_model(name).aliases)
            if alias in there:
                raise
            raise OsmlError(f"model '{name}' has no alias '{alias}'; it has {', '.join(there) or 'none'}") from error
        numbers = sorted(int(v.version) for v in pages(client.search_model_versions, filter_string=f"name='{name}'"))
        if str(version) in map(str, numbers):
            raise
        raise OsmlError(
            f"model '{name}' has no version {version}; it has {', '.join(map(str, numbers)) or 'none'}"
        ) from error


def pages(search: Any, **query: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(**query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
