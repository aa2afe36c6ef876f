"""What the tests of serving share: a small recogniser of digits, its images, and a service over HTTP without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.testclient import TestClient

from osml_plugin import train
from osml_plugin.data import Split
from osml_plugin.serve.application import make_app
from osml_plugin.serve.client import Client
from osml_plugin.serve.jobs import Jobs
from osml_plugin.serve.service import Service
from osml_plugin.serve.settings import ServeConfig

SPLIT = Split(("0", "1", "2", "3"), ("4", "5"), ("6", "7", "8", "9"))


def make_bundle(data: Path, out: Path, *, seed: int = 0, **changes) -> Path:
    """A recogniser of the digits 0 to 3, trained for seconds."""
    overrides = [
        "training.epochs=6",
        "training.batch_size=64",
        "model.embedding_size=32",
        *changes.get("overrides", ()),
    ]
    train(data, out, split=SPLIT, seed=seed, overrides=overrides, progress=False)
    return out


def images_of(data: Path, digit: str, first: int = 0, last: int = 40) -> list[Path]:
    return sorted((data / digit).glob("*.png"))[first:last]


@contextmanager
def served(config: ServeConfig, *, jobs: bool = True) -> Iterator[tuple[Service, Client]]:
    """The whole application in this process, behind its own middleware."""
    service = Service(config.model_copy(update={"host": config.host or "127.0.0.1"}))
    background = Jobs(service) if jobs else None
    try:
        with TestClient(make_app(service), base_url="http://127.0.0.1", client=("127.0.0.1", 50000)) as http:
            yield service, Client(http=http, retries=0)
    finally:
        if background is not None:
            background.close()
        service.close()


def until(condition: Callable[[], object], timeout: float = 20) -> None:
    """Wait for something that another thread or process does."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
