"""A recognizer on disk: `bundle.json` and safetensors, no pickle. Loading runs nothing that the bundle contains."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from filelock import FileLock
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors.torch import load, save
from torch import Tensor

from . import detectors, thresholds
from .config import make_config
from .data.likeness import SeenItems
from .data.pixels import DEEP, parse_color
from .errors import OsmlError
from .gallery import Gallery
from .known_items import LabelledEmbeddings
from .names import canonical
from .network import build_model
from .preprocessing import Preprocessing
from .presence import MANIFEST, check_bundle
from .recognizer import OpenSetRecognizer, measured_radius

FORMAT = "osml-bundle"
VERSION = 1
READS = 5  # of a bundle that is exchanged while it is read


# --- the manifest ----------------------------------------------------------------------------------------


_Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _File(_Strict):
    name: Annotated[str, Field(pattern=r"^(gallery|model)-[0-9a-f]{16}\.safetensors$")]
    sha256: str


class _Part(_Strict):
    name: str
    params: dict[str, Any]


class _Threshold(_Part):
    tau: float | None
    taus: dict[_Count, float | None] = {}
    pooled: list[_Count] = []


class _Input(_Strict):
    channels: _Count
    size: Annotated[int, Field(gt=0)]


class _Details(BaseModel):
    """What the plugin reads of a recognizer's details; they may hold more."""

    seen: list[Annotated[int, Field(ge=0, lt=2**64)]] = []
    split: dict[str, list[str]] = {}


class _ModelDetails(_Details):
    """What a model is built from."""

    config: dict[str, Any]
    input: _Input
    output: Literal["embedder", "trunk"]


_Name = Annotated[str, AfterValidator(canonical)]  # until 0.1.0 a name was written as it came


class Manifest(_Strict):
    """`bundle.json`. Names of classes are canonical, and two forms of one name may be two of its classes."""

    format: Literal["osml-bundle"]
    version: Literal[1]
    classes: dict[_Count, _Name]
    next_id: _Count
    gallery_version: _Count
    detector: _Part
    threshold: _Threshold
    alpha: float
    proxy_ids: list[int]
    preprocessing: Preprocessing | None
    held_out_names: dict[Literal["calibration", "validation"], list[_Name]]
    copy_radius: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """None: written by 0.1.0, which did not measure it."""
    details: dict[str, Any]
    files: dict[Literal["gallery", "model"], _File]
    sha256: str

    @field_validator("preprocessing", mode="before")
    @classmethod
    def _as_it_was_trained(cls, made: Any) -> Any:
        """A bundle without a ground was trained on images whose transparency was dropped."""
        return {"background": None, **made} if isinstance(made, dict) else made

    @field_validator("preprocessing")
    @classmethod
    def _fits_images(cls, made: Preprocessing | None) -> Preprocessing | None:
        if made and (made.size <= 0 or made.channels not in (1, 3)):
            raise ValueError("expected a size above 0 and 1 or 3 channels")
        if made and not len(made.mean) == len(made.std) == made.channels:
            raise ValueError("expected a mean and a std for each channel")
        if made and not 8 <= made.bit_depth <= DEEP:
            raise ValueError("expected a bit depth of 8 to 16")
        if made and made.background is not None:
            parse_color(made.background)
        return made

    @property
    def file_names(self) -> set[str]:
        return {file.name for file in self.files.values()}


# --- writing ---------------------------------------------------------------------------------------------


def save_bundle(recognizer: OpenSetRecognizer, path: str | Path) -> None:
    """Write a recognizer to the folder `path`: a new one, or in place of the bundle that is there.

    Tensors go to files named after their content and `bundle.json` is exchanged last, in one step: whoever reads
    the folder, and whatever is interrupted, finds the old bundle or the new one, whole. Files in the folder that are
    not the bundle's stay.

    Raises:
        OsmlError: for a place that is taken or cannot be written, which is left as it was; for a model that a bundle
            cannot hold.
    """
    path = Path(path)
    tensors = {"gallery": save(_gallery_tensors(recognizer))}
    if recognizer.model is not None:
        if "config" not in recognizer.details:
            raise OsmlError(
                "this recognizer's model is your own module, which a bundle cannot hold: train with osml_plugin.train "
                "and trunk 'package.module:factory', or set recognizer.model = None to keep the rest"
            )
        tensors["model"] = save({k: v.contiguous() for k, v in recognizer.model.state_dict().items()})
    names = {kind: f"{kind}-{_sha256(content)[:16]}.safetensors" for kind, content in tensors.items()}
    manifest = _manifest(recognizer)
    manifest["files"] = {kind: {"name": names[kind], "sha256": _sha256(content)} for kind, content in tensors.items()}
    manifest["sha256"] = _manifest_sha256(manifest)
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)

    with _room(path) as room:
        files = {names[kind]: content for kind, content in tensors.items() if not _holds(path / names[kind], content)}
        files[MANIFEST] = text.encode()  # the last
        for name, content in files.items():
            _write(room / name, content)
        if not path.exists():
            os.rename(room, path)
        else:
            ours = _file_names(path) | set(names.values())
            try:
                for name in files:
                    os.replace(room / name, path / name)
            finally:
                _remove_unnamed(path, ours)


def check_writable(path: str | Path) -> None:
    """Raise the OsmlError that `save_bundle` would raise for this place; nothing is left there."""
    with _room(Path(path)):
        pass


@contextmanager
def _room(path: Path) -> Iterator[Path]:
    """A folder to write in before anything at `path` changes: beside it, or inside where it is a bundle. It goes
    again, and so do parents that were made for it and stayed empty. Raises OsmlError for any OSError inside."""
    made = []
    room = None
    try:
        if path.exists() and not (path / MANIFEST).is_file():
            raise OsmlError(f"'{path}' exists and is no bundle: choose another place, or remove it")
        for parent in reversed([p for p in path.parents if not p.exists()]):
            parent.mkdir(exist_ok=True)
            made.append(parent)
        aside = f".{path.name}.{os.getpid()}.tmp"
        room = path / aside if path.exists() else path.with_name(aside)
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir()
        yield room
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise OsmlError(f"cannot write the bundle '{path}': {reason}; choose another place") from error
    finally:
        if room is not None:
            shutil.rmtree(room, ignore_errors=True)
        with suppress(OSError):  # a parent that holds something, such as the bundle, stays
            for parent in reversed(made):
                parent.rmdir()


def _holds(file: Path, content: bytes) -> bool:
    return file.is_file() and file.read_bytes() == content


def _write(file: Path, content: bytes) -> None:
    """On the disk before anything refers to it."""
    with open(file, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _file_names(path: Path) -> set[str]:
    """The tensor files of the bundle that is there; none where it is damaged."""
    try:
        return read_manifest(path).file_names
    except OsmlError:
        return set()


def _remove_unnamed(path: Path, names: set[str]) -> None:
    """Of these files, those that the bundle does not name; none where it cannot be read."""
    with suppress(OsmlError, OSError):
        for name in names - read_manifest(path).file_names:
            (path / name).unlink(missing_ok=True)


@contextmanager
def bundle_lock(path: str | Path) -> Iterator[None]:
    """Held while a bundle is read, changed and written back, so that two changes at once are both kept.

    The lock is a file of this user's in the folder for temporary files. Raises OsmlError where there is no bundle.
    """
    read_manifest(path)
    user = os.getuid() if hasattr(os, "getuid") else ""
    name = f"osml-{user}-{_sha256(os.fsencode(Path(path).resolve()))[:32]}.lock"
    lock = FileLock(Path(tempfile.gettempdir()) / name)
    try:
        lock.acquire()
    except OSError as error:
        reason = error.strerror or error
        raise OsmlError(f"cannot lock the bundle '{path}' with '{lock.lock_file}': {reason}") from error
    try:
        yield
    finally:
        lock.release()


# --- reading ---------------------------------------------------------------------------------------------


def load_bundle(path: str | Path, *, factories: Sequence[str] = ()) -> OpenSetRecognizer:
    """The recognizer that a folder holds.

    Args:
        factories: trunk factories (`package.module:factory`) that this bundle may call; none unless named.

    Raises:
        OsmlError: where there is no bundle, for one of another version, and for one with a changed byte.
    """
    path = Path(path)
    manifest, tensors = _read(path)
    try:
        return _recognizer(manifest, tensors, factories)
    except OsmlError:
        raise
    except Exception as error:  # what fits its checksum may still be wrong in any way
        raise _damaged(path, f"it cannot be put together ({_first_line(error)})") from error


def read_manifest(path: str | Path) -> Manifest:
    """`bundle.json`, checked: its format, its version, its own checksum, and its fields."""
    path = Path(path)
    check_bundle(path)
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"{MANIFEST} cannot be read") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(path, f"{MANIFEST} is not of the format '{FORMAT}'")
    if manifest.get("version") != VERSION:
        raise OsmlError(
            f"bundle '{path}' has version {manifest.get('version')!r}, and this osml-plugin reads version {VERSION}: "
            "install the osml-plugin that wrote it, or train again"
        )
    try:
        if manifest.get("sha256") != _manifest_sha256(manifest):
            raise _damaged(path, f"{MANIFEST} does not match its checksum")
        checked = Manifest.model_validate(manifest)
        if "gallery" not in checked.files:
            raise _damaged(path, f"{MANIFEST} names no gallery")
        (_ModelDetails if "model" in checked.files else _Details).model_validate(checked.details)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _damaged(path, f"{MANIFEST} is wrong at {where!r}: {first['msg']}") from error
    except RecursionError as error:
        raise _damaged(path, f"{MANIFEST} cannot be read") from error
    return checked


def _read(path: Path) -> tuple[Manifest, dict[str, dict[str, Tensor]]]:
    """The manifest and the tensors that it names; read again where a writer has exchanged them in between."""
    manifest = read_manifest(path)
    for left in reversed(range(READS)):
        try:
            return manifest, {kind: _load_tensors(path, file) for kind, file in manifest.files.items()}
        except OsmlError:
            before, manifest = manifest, read_manifest(path)
            if manifest == before or not left:
                raise


def _recognizer(
    manifest: Manifest, tensors: dict[str, dict[str, Tensor]], factories: Sequence[str]
) -> OpenSetRecognizer:
    recognizer = OpenSetRecognizer(
        detector=detectors.create(manifest.detector.name, **manifest.detector.params),
        threshold=thresholds.Threshold.from_state(manifest.threshold.model_dump(exclude_unset=True)),
        alpha=manifest.alpha,
        preprocessing=manifest.preprocessing,
    )
    recognizer.details = manifest.details
    if "model" in tensors:
        # The loss and what else made it were checked by the training; to check them is to import all of PML.
        stored = {part: values for part, values in manifest.details["config"].items() if part in ("model", "training")}
        config = make_config(stored)
        config = config.model_copy(update={"model": config.model.model_copy(update={"weights": None})})
        model = build_model(config, **manifest.details["input"], factories=factories)
        model.load_state_dict(tensors["model"])
        model.output = manifest.details["output"]
        recognizer.model = model.eval()
    gallery = tensors["gallery"]
    if not set(gallery["labels"].tolist()) <= set(manifest.classes):
        raise ValueError("the gallery holds classes without a name")
    if not len(gallery["labels"]) == len(gallery["embeddings"]) == len(gallery["enrolled"]):
        raise ValueError("the gallery's tensors are not of one length")
    first: dict[str, int] = {}
    one = {i: first.setdefault(name, i) for i, name in sorted(manifest.classes.items())}
    recognizer.gallery = Gallery(
        embeddings=gallery["embeddings"],
        labels=_relabeled(gallery["labels"], one),
        classes={i: name for name, i in first.items()},
        enrolled=gallery["enrolled"].bool(),
        version=manifest.gallery_version,
        next_id=manifest.next_id,
    )
    recognizer.class_weights, recognizer.proxy_ids = _joined(gallery.get("class_weights"), manifest.proxy_ids, one)
    recognizer.calibration = _held_out(gallery, "calibration", manifest.held_out_names)
    recognizer.validation = _held_out(gallery, "validation", manifest.held_out_names)
    if "seen_signatures" in gallery:
        recognizer.seen = SeenItems(gallery["seen_signatures"].numpy(), gallery["seen_radii"].numpy())
        if recognizer.seen.signatures.shape[:1] != recognizer.seen.radii.shape:
            raise ValueError("the seen items have not one radius each")
    recognizer.copy_radius = _measured(recognizer) if manifest.copy_radius is None else manifest.copy_radius
    if "promised_scores" in gallery:
        recognizer.promised = gallery["promised_scores"].numpy(), gallery["promised_nearest"].numpy()
    recognizer.refit()
    return recognizer


def _measured(recognizer: OpenSetRecognizer) -> float:
    """Radius of near-copies among the references of the training."""
    gallery = recognizer.gallery
    trained = (~gallery.enrolled).nonzero()[:, 0]
    names = tuple(gallery.classes[i] for i in gallery.labels[trained].tolist())
    return measured_radius(LabelledEmbeddings(gallery.embeddings[trained], names)) if names else 0.0


def _relabeled(labels: Tensor, one: dict[int, int]) -> Tensor:
    """Class ids `(R,)` with two forms of one name as one class: `one` is the id of each."""
    for i, of in one.items():
        if i != of:
            labels = labels.where(labels != i, of)
    return labels


def _joined(weights: Tensor | None, ids: list[int], one: dict[int, int]) -> tuple[Tensor | None, list[int]]:
    """Proxies `(C, P, D)` and their class ids, the proxies of two forms of one name together. All classes have as many:
    of the others some stand twice, which changes nothing, since a class is as near as the nearest of its proxies."""
    places: dict[int, list[int]] = {}
    for place, i in enumerate(ids):
        places.setdefault(one.get(i, i), []).append(place)
    if weights is None or len(places) == len(ids):
        return weights, list(places)
    most = max(map(len, places.values()))
    rows = [torch.cat([weights[of[k % len(of)]] for k in range(most)]) for of in places.values()]
    return torch.stack(rows), list(places)


def _load_tensors(path: Path, file: _File) -> dict[str, Tensor]:
    try:
        content = (path / file.name).read_bytes()
    except OSError as error:
        raise _damaged(path, f"{file.name} cannot be read ({error.strerror})") from error
    if _sha256(content) != file.sha256:
        raise _damaged(path, f"{file.name} does not match its checksum")
    try:
        return load(content)
    except Exception as error:  # safetensors has its own, and torch others
        raise _damaged(path, f"{file.name} holds no tensors ({_first_line(error)})") from error


def _damaged(path: Path, what: str) -> OsmlError:
    return OsmlError(f"bundle '{path}' is damaged: {what}; restore it from a copy, or train again")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


# --- both ------------------------------------------------------------------------------------------------


def _manifest(recognizer: OpenSetRecognizer) -> dict[str, Any]:
    preprocessing = recognizer.preprocessing
    held_out = {"calibration": recognizer.calibration, "validation": recognizer.validation}
    return {
        "format": FORMAT,
        "version": VERSION,
        "classes": {str(i): name for i, name in sorted(recognizer.gallery.classes.items())},
        "next_id": recognizer.gallery.next_id,
        "gallery_version": recognizer.gallery.version,
        "detector": {"name": recognizer.detector.name, "params": recognizer.detector.params},
        "threshold": recognizer.threshold.state(),
        "alpha": recognizer.alpha,
        "proxy_ids": recognizer.proxy_ids,
        "preprocessing": None if preprocessing is None else vars(preprocessing),
        "held_out_names": {k: sorted(set(h.names)) for k, h in held_out.items() if h is not None},
        "copy_radius": recognizer.copy_radius,
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
    if recognizer.seen is not None:
        tensors["seen_signatures"] = torch.from_numpy(recognizer.seen.signatures)
        tensors["seen_radii"] = torch.from_numpy(recognizer.seen.radii)
    for kind in ("calibration", "validation"):
        held = getattr(recognizer, kind)
        if held is not None:
            code = {name: i for i, name in enumerate(sorted(set(held.names)))}
            tensors[f"{kind}_embeddings"] = held.embeddings
            tensors[f"{kind}_names"] = torch.tensor([code[n] for n in held.names], dtype=torch.int64)
    if recognizer.n_left is not None:  # they cannot be computed from what is left
        scores, nearest = recognizer.promised
        tensors["promised_scores"], tensors["promised_nearest"] = torch.tensor(scores), torch.tensor(nearest)
    return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}


def _held_out(tensors: dict[str, Tensor], kind: str, names: dict[str, list[str]]) -> LabelledEmbeddings | None:
    if kind not in names:
        return None
    codes = tensors[f"{kind}_names"].tolist()
    return LabelledEmbeddings(tensors[f"{kind}_embeddings"], tuple(names[kind][c] for c in codes))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    return _sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
