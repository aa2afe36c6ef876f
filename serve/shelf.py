"""Model versions on this machine's disk, and loaded."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from osml_plugin.bundle import MANIFEST, bundle_lock, load_bundle, read_manifest
from osml_plugin.errors import OsmlError
from osml_plugin.presence import is_model_uri
from osml_plugin.recognizer import OpenSetRecognizer
from osml_plugin.tracking import download_bundle, resolve_model

BUNDLE = "bundle/"
"""Versions of bundles that come from a folder begin so, and go on with their checksum."""
LOADED = 2
"""Versions that are held in memory: the one that answers, and the one that is being prepared."""


@dataclass(frozen=True)
class Address:
    """A concrete model version: it never changes what it is."""

    version: str
    """'birds/7' of the registry, or 'bundle/1a2b3c4d5e6f' of a folder."""
    source: str
    """What was asked for, without an alias."""


class Shelf:
    """Finds, downloads and loads model versions; each lies in a folder of `home/models`, so that a replica that
    starts again needs neither the registry nor the folder that the bundle came from."""

    def __init__(self, home: Path, factories: Sequence[str] = ()):
        self.folder = home / "models"
        self.factories = tuple(factories)
        self._loaded: OrderedDict[str, OpenSetRecognizer] = OrderedDict()
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}

    def resolve(self, model: str) -> Address:
        """The concrete version that `models:/NAME@alias`, `models:/NAME/7` or a bundle's folder is now, brought here.

        Raises:
            OsmlError: where there is no such model, or it is damaged.
        """
        if is_model_uri(model):
            name, number = resolve_model(model)
            address = Address(f"{name}/{number}", f"models:/{name}/{number}")
            self._bring(address.version)
            return address
        with bundle_lock(model):
            manifest = read_manifest(model)
            version = BUNDLE + manifest.sha256[:12]
            if not self._place(version).exists():
                self._copy(Path(model), version)
        return Address(version, str(Path(model).name))

    def load(self, version: str) -> OpenSetRecognizer:
        """The recognizer of a version; whoever gets it does not change it."""
        with self._lock:
            turn = self._turns.setdefault(version, threading.Lock())
        with turn:  # others that are loaded can be had meanwhile
            with self._lock:
                found = self._loaded.get(version)
            if found is None:
                found = load_bundle(self._bring(version), factories=self.factories)
            with self._lock:
                self._loaded[version] = found
                self._loaded.move_to_end(version)
                while len(self._loaded) > LOADED:
                    self._loaded.popitem(last=False)
            return found

    def class_names(self, version: str) -> list[str]:
        """Of the bundle."""
        return list(dict.fromkeys(read_manifest(self._bring(version)).classes.values()))

    def _place(self, version: str) -> Path:
        return self.folder / quote(version, safe="@ ").replace("%2F", "@", 1)

    def _bring(self, version: str) -> Path:
        place = self._place(version)
        if not place.exists():
            if version.startswith(BUNDLE):
                raise OsmlError(
                    f"model '{version}' came from a folder and is not in '{self.folder}': serve the bundle again, or "
                    "register it so that every machine can download it"
                )
            self._copy(download_bundle(f"models:/{version}"), version)
        return place

    def _copy(self, bundle: Path, version: str) -> None:
        """In one step: another process may do the same."""
        room = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            room = Path(tempfile.mkdtemp(prefix=".", dir=self.folder))
            for name in (MANIFEST, *read_manifest(bundle).file_names):
                shutil.copyfile(bundle / name, room / name)
            os.rename(room, self._place(version))
        except OSError as error:
            if not self._place(version).exists():
                raise OsmlError(f"cannot keep the model in '{self.folder}': {error.strerror or error}") from error
        finally:
            if room is not None:
                shutil.rmtree(room, ignore_errors=True)
