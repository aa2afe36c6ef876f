"""A recognizer on disk: `bundle.json` and safetensors, no pickle. Loading runs nothing that the bundle contains."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load, save
from torch import Tensor

from . import detectors, thresholds
from .config import make_config
from .errors import OsmlError
from .gallery import Gallery
from .preprocessing import Preprocessing
from .recognizer import LabelledEmbeddings, OpenSetRecognizer
from .training import build_model

FORMAT = "osml-bundle"
VERSION = 1
MANIFEST = "bundle.json"


def save_bundle(recognizer: OpenSetRecognizer, path: str | Path) -> None:
    """Write a recognizer to the folder `path`: a new one, or in place of the bundle that is there.

    Tensors go to files named after their content and `bundle.json` is exchanged last, in one step: whoever reads
    the folder, and whatever is interrupted, finds the old bundle or the new one, whole.
    """
    path = Path(path)
    if path.exists() and not (path / MANIFEST).is_file():
        raise OsmlError(f"'{path}' exists and is no bundle: choose another place, or remove it")
    files = {"gallery": save(_gallery_tensors(recognizer))}
    if recognizer.model is not None:
        if "config" not in recognizer.details:
            raise OsmlError(
                "this recognizer's model is your own module, which a bundle cannot hold: train with osml_plugin.train "
                "and trunk 'package.module:factory', or set recognizer.model = None to keep the rest"
            )
        files["model"] = save({k: v.contiguous() for k, v in recognizer.model.state_dict().items()})
    names = {kind: f"{kind}-{_sha256(content)[:16]}.safetensors" for kind, content in files.items()}
    manifest = _manifest(recognizer)
    manifest["files"] = {kind: {"name": names[kind], "sha256": _sha256(content)} for kind, content in files.items()}
    manifest["sha256"] = _manifest_sha256(manifest)
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)

    new = not path.exists()
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp") if new else path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for kind, content in files.items():
            if new or not (folder / names[kind]).exists():
                _write(folder / names[kind], content)
        _write(folder / MANIFEST, text.encode())
        if new:
            os.rename(folder, path)
    except BaseException:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    for old in path.glob("*.safetensors"):
        if old.name not in names.values():
            old.unlink(missing_ok=True)


def load_bundle(path: str | Path, *, factories: Sequence[str] = ()) -> OpenSetRecognizer:
    """The recognizer that a folder holds.

    Args:
        factories: trunk factories (`package.module:factory`) that this bundle may call; none unless named.

    Raises:
        OsmlError: where there is no bundle, for one of another version, and for one with a changed byte.
    """
    path = Path(path)
    manifest = read_manifest(path)
    tensors = {kind: _load_tensors(path, entry) for kind, entry in manifest["files"].items()}
    part = manifest["detector"]
    recognizer = OpenSetRecognizer(
        detector=detectors.create(part["name"], **part["params"]),
        threshold=thresholds.Threshold.from_state(manifest["threshold"]),
        alpha=manifest["alpha"],
    )
    recognizer.details = manifest["details"]
    if manifest["preprocessing"] is not None:
        recognizer.preprocessing = Preprocessing(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in manifest["preprocessing"].items()}
        )
    if "model" in tensors:
        config = make_config(manifest["details"]["config"])
        config = config.model_copy(update={"model": config.model.model_copy(update={"weights": None})})
        model = build_model(config, **manifest["details"]["input"], factories=factories)
        model.load_state_dict(tensors["model"])
        model.output = manifest["details"]["output"]
        recognizer.model = model.eval()
    gallery = tensors["gallery"]
    recognizer.gallery = Gallery(
        embeddings=gallery["embeddings"],
        labels=gallery["labels"],
        classes={int(i): name for i, name in manifest["classes"].items()},
        enrolled=gallery["enrolled"].bool(),
        version=manifest["gallery_version"],
    )
    recognizer.class_weights = gallery.get("class_weights")
    recognizer.proxy_ids = manifest["proxy_ids"]
    recognizer.calibration = _held_out(gallery, "calibration", manifest["held_out_names"])
    recognizer.validation = _held_out(gallery, "validation", manifest["held_out_names"])
    recognizer.refit()
    return recognizer


def read_manifest(path: str | Path) -> dict[str, Any]:
    """`bundle.json`, checked: its format, its version and its own checksum."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise OsmlError(f"no bundle at '{path}': expected a folder that `osml train --out` wrote") from error
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{MANIFEST} cannot be read") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(path, f"{MANIFEST} is not of the format '{FORMAT}'")
    if manifest.get("sha256") != _manifest_sha256(manifest):
        raise _damaged(path, f"{MANIFEST} does not match its checksum")
    if manifest.get("version") != VERSION:
        raise OsmlError(
            f"bundle '{path}' has version {manifest.get('version')}, and this osml-plugin reads version {VERSION}: "
            "install the osml-plugin that wrote it, or train again"
        )
    return manifest


def bundle_lock(path: str | Path) -> FileLock:
    """Held while a bundle is read, changed and written back, so that two changes at once are both kept."""
    path = Path(path).resolve()
    return FileLock(path.with_name(f".{path.name}.lock"))


def _manifest(recognizer: OpenSetRecognizer) -> dict[str, Any]:
    preprocessing = recognizer.preprocessing
    held_out = {"calibration": recognizer.calibration, "validation": recognizer.validation}
    return {
        "format": FORMAT,
        "version": VERSION,
        "classes": {str(i): name for i, name in sorted(recognizer.gallery.classes.items())},
        "gallery_version": recognizer.gallery.version,
        "detector": {"name": recognizer.detector.name, "params": recognizer.detector.params},
        "threshold": recognizer.threshold.state(),
        "alpha": recognizer.alpha,
        "proxy_ids": recognizer.proxy_ids,
        "preprocessing": None if preprocessing is None else vars(preprocessing),
        "held_out_names": {k: sorted(set(h.names)) for k, h in held_out.items() if h is not None},
        "details": recognizer.details,
    }


def _gallery_tensors(recognizer: OpenSetRecognizer) -> dict[str, Tensor]:
    gallery = recognizer.gallery
    tensors = {
        "embeddings": gallery.embeddings,
        "labels": gallery.labels,
        "enrolled": gallery.enrolled.to(torch.uint8),
    }
    if recognizer.class_weights is not None:
        tensors["class_weights"] = recognizer.class_weights
    for kind in ("calibration", "validation"):
        held = getattr(recognizer, kind)
        if held is not None:
            code = {name: i for i, name in enumerate(sorted(set(held.names)))}
            tensors[f"{kind}_embeddings"] = held.embeddings
            tensors[f"{kind}_names"] = torch.tensor([code[n] for n in held.names], dtype=torch.int64)
    return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}


def _held_out(tensors: dict[str, Tensor], kind: str, names: dict[str, list[str]]) -> LabelledEmbeddings | None:
    if kind not in names:
        return None
    codes = tensors[f"{kind}_names"].tolist()
    return LabelledEmbeddings(tensors[f"{kind}_embeddings"], tuple(names[kind][c] for c in codes))


def _load_tensors(path: Path, entry: dict[str, str]) -> dict[str, Tensor]:
    name = entry["name"]
    if Path(name).name != name:
        raise _damaged(path, f"its file '{name}' lies outside of it")
    try:
        content = (path / name).read_bytes()
    except OSError as error:
        raise _damaged(path, f"{name} cannot be read ({error.strerror})") from error
    if _sha256(content) != entry["sha256"]:
        raise _damaged(path, f"{name} does not match its checksum")
    return load(content)


def _damaged(path: Path, what: str) -> OsmlError:
    return OsmlError(f"bundle '{path}' is damaged: {what}; restore it from a copy, or train again")


def _write(file: Path, content: bytes) -> None:
    """The whole file or none of it, and on the disk before anything refers to it."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(aside, file)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    return _sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
