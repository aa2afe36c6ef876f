"""Ray for one sweep: the cluster that was named, or one on this machine, which ends with it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from osml_plugin.errors import OsmlError

from .settings import Resources

logger = logging.getLogger(__name__)


@contextmanager
def ray_session(address: str | None, resources: Resources) -> Iterator[None]:
    """Ray while it lasts; one that runs already in this process is used, and left running.

    Raises:
        OsmlError: for a cluster that does not answer, and for one on which no trial would ever fit.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # there is a table of our own
    ours = not ray.is_initialized()
    if ours:
        if address is not None and address.startswith("ray://"):
            raise OsmlError(
                f"address '{address}' is a Ray client's: a sweep runs on a machine of the cluster; submit it with "
                "'ray job submit', or name host:6379"
            )
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # trials that fail are named at the end
        try:
            ray.init(
                address=address or "local",
                include_dashboard=False if address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # Ray raises many kinds
            reason = " ".join(str(error).split())[:300]
            what = f"the Ray cluster '{address}' does not answer" if address else "Ray cannot be started here"
            raise OsmlError(f"{what} ({reason}): look at 'ray status' on its head") from error
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
