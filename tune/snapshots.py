"""Ray's snapshots of a search: kept whole while the sweep runs, and put back, in the right place, for a resume.

Ray copies its snapshots to the storage file by file. A disk that is full cuts them off, and a sweep that is killed in
the middle has new and old ones side by side. And they name the storage absolutely, so that trials that are drawn after
the sweep's folder was renamed would look for it where it was.
"""

from __future__ import annotations

import json
import os
import pickle
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileSystem
from ray import cloudpickle
from ray.tune.utils.serialization import TuneFunctionDecoder

FILE = "search.zip"
KINDS = ("experiment_state-", "basic-variant-state-", "search_gen_state-", "searcher-state-")
"""How the names of Ray's files begin; the session's time follows."""
TUNER = "tuner.pkl"
SHARE = 0.1
"""Of the time at most that keeping snapshots takes."""


class Snapshots:
    """The latest snapshot in one file, which is written whole or not at all.

    Args:
        file: the file.
    """

    def __init__(self, file: Path):
        self.file = file
        self._taken, self._next = 0, 0.0

    def keep(self, staging: str | Path, now: bool = False) -> None:
        """Keep what Ray last wrote to its own folder `staging`, unless that was a moment ago. Raises OSError where
        there is no room."""
        if time.monotonic() < self._next and not now:
            return
        newest = _newest({entry.name: entry.stat().st_mtime_ns for entry in _files(staging)})
        if not newest.get(KINDS[0]) or (latest := Path(staging, newest[KINDS[0]]).stat().st_mtime_ns) == self._taken:
            return
        began = time.monotonic()
        aside = self.file.with_name(f".{self.file.name}.{os.getpid()}.part")
        try:
            with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as room:
                for name in newest.values():
                    room.write(Path(staging, name), name)
            os.replace(aside, self.file)
        finally:
            aside.unlink(missing_ok=True)
        done = time.monotonic()
        self._taken, self._next = latest, done + (done - began) / SHARE


def put_back(file: Path, path: str) -> bool:
    """Make the experiment's folder (or s3://… address) `path` one that Ray can go on with from where it lies now.

    Args:
        file: where `Snapshots` kept the latest one; without it, the latest in `path` is taken.

    Returns:
        False where there is nothing that Ray could go on with: the sweep had not begun.
    """
    filesystem, folder = FileSystem.from_uri(path)
    there = {f.base_name: f for f in filesystem.get_file_info(FileSelector(folder, allow_not_found=True)) if f.is_file}

    def read(name: str) -> bytes:
        with filesystem.open_input_file(f"{folder}/{name}") as source:
            return source.readall()

    if TUNER not in there or not _is_whole(TUNER, read(TUNER)):
        return False
    if file.is_file():
        with zipfile.ZipFile(file) as kept:
            states = {name: kept.read(name) for name in kept.namelist()}
    else:
        whole = {
            name: f.mtime_ns for name, f in there.items() if name.startswith(KINDS) and _is_whole(name, read(name))
        }
        states = {name: read(name) for name in _newest(whole).values()}
    if not any(name.startswith(KINDS[0]) for name in states):
        return False
    for name in there:
        if name.startswith(KINDS):
            filesystem.delete_file(f"{folder}/{name}")
    for name, content in states.items():
        with filesystem.open_output_stream(f"{folder}/{name}") as out:
            out.write(_moved(name, content, filesystem, folder))
        if name.startswith(KINDS[0]):
            for checkpoint in _checkpoints(content):
                # Ray wants the folder to be there, even of one that was replaced since: a trial takes the next one.
                filesystem.create_dir(f"{folder}/{checkpoint}", recursive=True)
    return True


def _files(folder: str | Path) -> list[os.DirEntry]:
    try:
        return [entry for entry in os.scandir(folder) if entry.is_file()]
    except FileNotFoundError:
        return []


def _newest(times: Mapping[str, int]) -> dict[str, str]:
    """The latest file of each kind, of their times by name."""
    found = {}
    for name in sorted(times, key=lambda name: (times[name], name)):
        found |= {kind: name for kind in KINDS if name.startswith(kind)}
    return found


def _is_whole(name: str, content: bytes) -> bool:
    try:
        json.loads(content) if name.startswith(KINDS[0]) else cloudpickle.loads(content)
    except (ValueError, EOFError, pickle.UnpicklingError):
        return False
    return True


def _checkpoints(content: bytes) -> Iterator[str]:
    """The folders from which trials go on, in that of the experiment."""
    for _, metadata in json.loads(content)["trial_data"]:
        manager = json.loads(metadata, cls=TuneFunctionDecoder, allow_cloudpickle=True)["checkpoint_manager"]
        if manager.latest_checkpoint_result is not None:
            yield "/".join(manager.latest_checkpoint_result.checkpoint.path.split("/")[-2:])


def _moved(name: str, content: bytes, filesystem: FileSystem, folder: str) -> bytes:
    """The state of a search whose further trials lie in `folder`. (Ray itself moves the trials that there are.)"""
    if not name.startswith(KINDS[1:3]):
        return content
    state = cloudpickle.loads(content)
    for spec in _specs(state):
        storage = spec["storage"]
        storage.storage_filesystem = filesystem
        storage.storage_fs_path, _, storage.experiment_dir_name = folder.rpartition("/")
    return cloudpickle.dumps(state)


def _specs(state: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What a search makes its further trials of."""
    if "experiment" in state:
        yield state["experiment"].spec
    for iterator in state.get("_iterators", []):
        yield iterator.unresolved_spec
        for _, spec in iterator.variants.iterable if iterator.variants else []:
            yield spec
