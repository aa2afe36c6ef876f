"""What Prometheus is told. With several replicas on a machine they share files, so that any of them answers for all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from prometheus_client.registry import REGISTRY

SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""The folder of these files; prometheus_client reads the variable when it is imported."""

if SHARED in os.environ:  # a metric opens its file when it is made
    Path(os.environ[SHARED]).mkdir(parents=True, exist_ok=True)

requests = Counter("osml_requests", "Requests answered.", ["method", "route", "status"])
latency = Histogram(
    "osml_request_seconds",
    "Time from the first byte of a request to the last of its answer.",
    ["route"],
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)
batch_size = Histogram("osml_batch_size", "Requests that shared a forward pass.", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
items = Counter("osml_items", "Items recognised.", ["verdict"])
not_remembered = Counter("osml_unknowns_not_remembered", "Unknown items that the store could not take.")
scores = Histogram(
    "osml_score_above_threshold",
    "Unknown score minus threshold, in standard deviations of known items' scores: above 0 is unknown.",
    buckets=(-5, -4, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 5, 10),
)
unknown_rate = Gauge(
    "osml_unknown_rate", "Share of the last 1,000 items that were unknown.", multiprocess_mode="mostrecent"
)
references = Gauge("osml_gallery_references", "References in the gallery.", multiprocess_mode="mostrecent")
classes = Gauge("osml_gallery_classes", "Classes in the gallery.", multiprocess_mode="mostrecent")
gallery_version = Gauge("osml_gallery_version", "Version of the gallery.", ["replica"], multiprocess_mode="mostrecent")
alpha = Gauge("osml_alpha", "Share of known items that may be rejected, as chosen.", multiprocess_mode="mostrecent")
known_rejected = Gauge(
    "osml_known_rejected_estimate",
    "Share of known items rejected, estimated from the p-values in use; compare with osml_alpha.",
    multiprocess_mode="mostrecent",
)
calibration_stale = Gauge(
    "osml_calibration_stale", "1 where that estimate is above alpha beyond doubt.", multiprocess_mode="mostrecent"
)
store_up = Gauge("osml_store_up", "1 where the store answers.", multiprocess_mode="mostrecent")

if SHARED in os.environ:
    # They are written through memory, where the lack of a page on a full disk is the end of the process (SIGBUS): have
    # all of their pages now.
    for file in Path(os.environ[SHARED]).glob(f"*_{os.getpid()}.db"):
        with file.open("r+b") as opened:
            content = opened.read()
            opened.seek(0)
            opened.write(content)


def clear(folder: Path) -> None:
    """Without what an earlier server counted."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.db"):
        old.unlink()


def page() -> bytes:
    """All of it in Prometheus' text format."""
    if SHARED not in os.environ:
        return generate_latest(REGISTRY)
    together = CollectorRegistry()
    multiprocess.MultiProcessCollector(together)
    return generate_latest(together)


class Share:
    """The share of the last items that were unknown."""

    def __init__(self, size: int = 1000):
        self._size, self._last = size, []

    def add(self, unknown: Sequence[bool]) -> float:
        self._last = (self._last + [bool(u) for u in unknown])[-self._size :]
        return sum(self._last) / len(self._last)
