"""What a sweep was asked for, kept in its folder: all that a resume needs beside the data and Ray's own files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from osml_plugin.errors import OsmlError
from osml_plugin.schema import checked

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

    def write(self, out: Path) -> None:
        values = self.__dict__ | {"settings": self.settings.model_dump(mode="json", exclude_unset=True)}
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

    def again(self, out: Path, data: str | Path | None, settings: SweepConfig | None, register: str | None) -> Asked:
        """The same for a resume. What may change is where the work is done and what the winner is called; OsmlError for
        anything else that was said differently this time."""
        if data is not None and str(Path(data).resolve()) != self.data:
            raise OsmlError(
                f"the sweep in '{out}' is on '{self.data}', not on '{data}': leave out --data, or start anew"
            )
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
        uri = os.environ.get("MLFLOW_TRACKING_URI") or self.tracking_uri
        settings = self.settings.model_copy(update={"address": address})
        return replace(self, settings=settings, register=register or self.register, tracking_uri=uri)


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


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Whole, or not at all."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.part")
    aside.write_text(json.dumps(values, indent=1, ensure_ascii=False, default=float), encoding="utf-8")
    os.replace(aside, file)


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {before + key: value}
    return found
