"""Ray, quietly: a cluster that was named, or one on this machine. Ray is imported when it is asked for."""

from __future__ import annotations

import logging
import os
import socket

from .errors import OsmlError


def connect(address: str | None) -> None:
    """Be a driver of the cluster at `address` (`auto`, `host:6379`); None starts one on this machine.

    Raises:
        OsmlError: where Ray is not installed, and where the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise OsmlError("this needs Ray, which is not installed: pip install 'osml-plugin[serve]'") from error
    if address is not None and address.startswith("ray://"):
        raise OsmlError(
            f"address '{address}' is a Ray client's, and this runs on a machine of the cluster: submit it with "
            "'ray job submit', or name host:6379"
        )
    try:
        host, colon, port = (address or "").rpartition(":")
        if colon:  # Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(
            address=address or "local",
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray raises many kinds
        what = f"the Ray cluster '{address}' does not answer" if address else "Ray cannot be started here"
        raise OsmlError(f"{what} ({' '.join(str(error).split())[:300]}): look at 'ray status' on its head") from error
