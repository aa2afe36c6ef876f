"""Ray for one sweep: the cluster that was named, or one on this machine, which ends with it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from osml_plugin.errors import OsmlError
from osml_plugin.ray_cluster import connect

from .settings import Resources

logger = logging.getLogger(__name__)


@contextmanager
def ray_session(address: str | None, resources: Resources) -> Iterator[None]:
    """Ray while it lasts; one that runs already in this process is used, and left running.

    Raises:
        OsmlError: for a cluster that does not answer, and for one on which no trial would ever fit.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # there is a table of our own
    ours = not ray.is_initialized()
    if ours:
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # trials that fail are named at the end
        connect(address)
    try:
        _check_fits(address, resources)
        yield
    finally:
        if ours:
            ray.shutdown()


def _check_fits(address: str | None, resources: Resources) -> None:
    """This machine never grows; a cluster may, and is waited for."""
    there = ray.cluster_resources()
    for kind, each in (("CPU", resources.cpu), ("GPU", resources.gpu)):
        wanted = each * resources.workers
        if wanted <= there.get(kind, 0):
            continue
        problem = f"a trial wants {wanted:g} {kind}, and there are {there.get(kind, 0):g}"
        if address is None:
            lower = f"resources.{kind.lower()}" + (" or resources.workers" if resources.workers > 1 else "")
            raise OsmlError(f"{problem} on this machine: lower {lower}, or name a cluster")
        logger.warning("%s in the cluster '%s': trials wait until there are more", problem, address)
