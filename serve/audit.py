"""Who changed what: one JSON line for every write."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from osml_plugin.errors import OsmlError

from .settings import ServeConfig

logger = logging.getLogger("osml.audit")


class Audit:
    """Appends to `file`, which only its owner may read, and to the logger "osml.audit"; without a file to that alone.

    Each line is one `os.write` at the end of the file, opened anew: replicas may share it, and it may be rotated.
    Raises `OsmlError` where the file cannot be opened at the start.
    """

    def __init__(self, file: Path | None):
        self.file = file
        self._torn = False
        if file is not None:
            try:
                os.close(_opened(file))
            except OSError as error:
                raise OsmlError(f"cannot write the audit log '{file}': {error.strerror}") from error

    def write(self, actor: str, action: str, subject: str, **details) -> None:
        """Record a write that was acknowledged; `details` holds the versions of model and gallery, and what else tells
        what was done. Never raises for a file that fails: the line is then in the log, as an error."""
        record = {"time": datetime.now(UTC).isoformat(), "actor": actor, "action": action, "subject": subject}
        # ASCII JSON escapes line breaks and all other control characters: no name can forge a line.
        line = json.dumps({**record, "details": details}, default=str)
        try:
            if self.file is not None:
                self._append(line)
        except OSError as error:
            logger.error("the audit log '%s' cannot be written (%s): %s", self.file, error.strerror, line)
        else:
            logger.info(line)

    def _append(self, line: str) -> None:
        content = f"{line}\n".encode("ascii")
        if self._torn:  # the disk was full in the middle of a line: this one is to stand alone
            content = b"\n" + content
        file = _opened(self.file)
        try:
            written = os.write(file, content)
        finally:
            os.close(file)
        self._torn = written < len(content)
        if self._torn:
            raise OSError(0, f"only {written} of {len(content)} bytes were written")


def _opened(file: Path) -> int:
    return os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def audit_of(config: ServeConfig) -> Audit:
    """The one of an endpoint."""
    config.home.mkdir(parents=True, exist_ok=True)
    return Audit(config.home / "audit.jsonl")
