"""What a sweep was asked for, kept in its folder: all that a resume needs beside the data and Ray's own files.

Data and store are written down twice, absolutely and relative to the sweep's folder, so that a project can be moved.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from osml_plugin.errors import OsmlError
from osml_plugin.schema import checked
from osml_plugin.tracking import given_uri
from osml_plugin.tracking_file import sqlite_file, with_sqlite_file

from .settings import SweepConfig

ASKED = "sweep.json"


@dataclass(frozen=True)
class Asked:
    """The data, the settings, and where the runs and the winner go."""

    id: str
    data: str
    split: dict[str, list[str]]
    settings: SweepConfig
    skip_bad: bool
    register: str | None
    tracking_uri: str
    data_fingerprint: str
    folder: str = ""
    """Where the sweep's folder was."""
    relative: dict[str, str] = field(default_factory=dict)
    """From there: `data`, and `store` where it is a file."""

    def write(self, out: Path) -> None:
        relative = {"data": _from(out, self.data)}
        if (store := sqlite_file(self.tracking_uri)) is not None:
            relative["store"] = _from(out, store)
        values = self.__dict__ | {"settings": self.settings.model_dump(mode="json", exclude_unset=True)}
        values |= {"folder": str(out.resolve()), "relative": relative}
        write_json(out / ASKED, values)
        os.chmod(out / ASKED, 0o600)  # the store's address may hold a password

    @classmethod
    def read(cls, out: Path) -> Asked:
        file = out / ASKED
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(**values | {"settings": checked(values["settings"], SweepConfig)})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise OsmlError(f"'{file}' is no sweep that can be resumed ({error}): start a new one") from error

    def places(self, out: Path) -> list[str]:
        """Where the data may be: as they lay to the sweep's folder, and where they were."""
        beside = [os.path.normpath(out.resolve() / self.relative["data"])] if "data" in self.relative else []
        return list(dict.fromkeys([*beside, self.data]))

    def again(self, out: Path, data: str | Path | None, settings: SweepConfig | None, register: str | None) -> Asked:
        """The same for a resume, in `out` as it lies now. What may change is where things are, where the work is done
        and what the winner is called; OsmlError for anything else that was said differently this time."""
        address = self.settings.address
        if settings is not None:
            address = settings.address or address
            before, now = (_flat(s.model_dump(mode="json", exclude={"address"})) for s in (self.settings, settings))
            for key in sorted(before.keys() | now.keys()):
                if before.get(key) != now.get(key):
                    raise OsmlError(
                        f"the sweep in '{out}' was asked with {key} = {before.get(key)}, not {now.get(key)}: resume it "
                        "without that, or start a new one with another --out"
                    )
        changed: dict[str, Any] = {"settings": self.settings.model_copy(update={"address": address})}
        if data is not None:
            changed |= {"data": str(Path(data).resolve()), "relative": {}}
        if self._is_copy(out):
            changed["id"] = uuid.uuid4().hex[:12]  # else it would take the runs of the other for its own
        uri = given_uri() or self._store(out)
        return replace(self, **changed, register=register or self.register, tracking_uri=uri)

    def _is_copy(self, out: Path) -> bool:
        """Whether the sweep in `out` is still where this one was copied from."""
        if self.folder in ("", str(out.resolve())):
            return False
        try:
            same = Asked.read(Path(self.folder)).id == self.id
        except OsmlError:
            return False
        if same and self.settings.storage is not None:
            raise OsmlError(
                f"'{out}' is a copy of '{self.folder}', whose trials are in '{self.settings.storage}': resume that one"
            )
        return same

    def _store(self, out: Path) -> str:
        """The store's address: a file beside the sweep, as it lay when it began, before one that is where it was."""
        file = sqlite_file(self.tracking_uri)
        if file is None or "store" not in self.relative:
            return self.tracking_uri
        beside = Path(os.path.normpath(out.resolve() / self.relative["store"]))
        return with_sqlite_file(self.tracking_uri, beside) if beside.is_file() else self.tracking_uri


@contextmanager
def sweep_lock(out: Path) -> Iterator[None]:
    """Held while a sweep runs. Raises OsmlError where another process holds it: two would do everything twice."""
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OsmlError(f"'{out}' is being swept by another process: wait for it, or end it first") from None
    except OSError as error:
        raise OsmlError(f"cannot write in '{out}': {error.strerror or error}; choose another --out") from error
    try:
        yield
    finally:
        lock.release()


def how_to_resume(out: Path) -> str:
    """The command."""
    return f"osml tune --out {shlex.quote(str(out))} --resume"


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """While a sweep in `out` writes: a disk that is full, or lost, is one OsmlError that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"the disk is full{f': {error.filename}' if error.filename else ''}" if full else str(error)
        raise OsmlError(
            f"the sweep in '{out}' has stopped, and what was done is kept ({reason}): "
            f"{'make room' if full else 'mend that'}, and {how_to_resume(out)} goes on"
        ) from error


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Whole, or not at all."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        aside.write_text(json.dumps(values, indent=1, ensure_ascii=False, default=float), encoding="utf-8")
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def _from(folder: Path, place: str | Path) -> str:
    return os.path.relpath(os.path.realpath(place), folder.resolve())


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {before + key: value}
    return found
