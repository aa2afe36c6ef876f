"""Opening what a user has: folders of images, a manifest, a file of embeddings."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from ..checks import check_embeddings
from ..errors import OsmlError
from ..names import item_labels
from ..presence import KINDS, check_source
from .folders import (
    IMAGE_SUFFIXES,
    UNREAD_PICTURES,
    LeftOut,
    images_below,
    images_in,
    in_words,
    is_special,
    subfolders,
)
from .items import ROLES, Items
from .tables import read_table


def open_items(path: str | Path, *, labelled: bool = True) -> Items:
    """What `path` holds; its kind is told from the path itself.

    - `DIR/<class>/*`: images; the folder is the class, nested folders belong to it.
    - `DIR/train/<class>/*` and `DIR/test/<class>/*`: the same with the roles 'train' and 'test'. Other parts that
      hold class folders (`DIR/val/<class>/*`) are refused, and never taken for classes.
    - `.csv`, `.parquet`: a manifest with columns `path,label[,role]`; paths are relative to its folder.
    - `.npz`, `.safetensors`: `embeddings` (N, D), `labels`, optional `roles` and `paths`
      (for safetensors: integer `labels`, and JSON lists `class_names`, `roles`, `paths` in the metadata).

    `labelled=False` also takes what has no labels: images at any depth of a folder, one image, a manifest or
    embeddings without them; labels that are there are kept. Items of folders are sorted by path; those of
    files keep their order. Linked folders are followed. Hidden files and the thumbnails, bins and settings that boxes
    and systems keep beside pictures are passed over; other files that are no images are left out, and one line is
    logged that says how many. Raises `OsmlError`.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    check_source(path)
    if path.is_dir():
        return _open_folder(path, labelled)
    if is_special(path):
        raise OsmlError(f"'{path}' is no regular file; expected {KINDS}")
    if suffix in (".csv", ".parquet"):
        return _open_manifest(path, labelled)
    if suffix in (".npz", ".safetensors"):
        return _open_embeddings(path, labelled)
    if suffix in UNREAD_PICTURES:
        raise OsmlError(f"'{path}' is a picture that cannot be read here: convert it to JPEG or PNG")
    if suffix not in IMAGE_SUFFIXES:
        raise OsmlError(f"cannot tell what '{path}' holds from its suffix '{path.suffix}'; expected {KINDS}")
    if labelled:
        raise OsmlError(f"'{path}' is one image without a class; expected {KINDS}")
    return Items(None, (path,), None, None)


# --- folders ---------------------------------------------------------------------------------------------


def _open_folder(root: Path, labelled: bool) -> Items:
    left_out = LeftOut()
    try:
        items = _open_classes(root, left_out, labelled)
    except OsmlError:
        if labelled:
            raise
        # An inbox: images and folders in any order, which are no classes.
        left_out = LeftOut()
        images = images_below(root, left_out)
        if not images:
            raise OsmlError(_no_images(f"folder '{root}'", left_out)) from None
        items = Items(None, tuple(images), None, None)
    left_out.tell(root, "folder" if items.labels is None else "class")
    return items


def _open_classes(root: Path, left_out: LeftOut, labelled: bool) -> Items:
    folders, beside = subfolders(root), LeftOut()
    images = images_in(root, beside)
    if not folders:
        if not images:
            raise OsmlError(_no_images(f"folder '{root}'", beside))
        raise OsmlError(f"folder '{root}' holds images but no class folders; expected {KINDS}")
    if images:
        raise OsmlError(
            f"folder '{root}' holds both class folders and images such as '{images[0].name}'; "
            "move the images into a class folder or elsewhere"
        )
    if any(kind.lower() in UNREAD_PICTURES for kind in beside.kinds):  # others are notes about the data
        left_out.add(root.name, beside.kinds, 0)
    if all(subfolders(root / role) for role in ("train", "test")):
        for folder in folders:
            if folder.name not in ("train", "test") and images_below(folder):
                raise OsmlError(
                    f"folder '{root}' holds images in '{folder.name}' beside 'train' and 'test'; move it "
                    "elsewhere, or name every file and its role in a manifest (path,label,role)"
                )
        train, test = (_class_folders(root / role, left_out, labelled) for role in ("train", "test"))
        roles = ["train"] * len(train) + ["test"] * len(test)
        return _items(root, [*train, *test], tuple(roles))
    parts = [f.name for f in folders if f.name.lower() in _PARTS and subfolders(f) and not images_in(f)]
    if parts:
        raise OsmlError(
            f"folder '{root}' holds folders in {_listing(parts)}: expected DIR/train/<class>/* and DIR/test/<class>/*, "
            "both; name them so, or name every file and its role in a manifest (path,label,role)"
        )
    return _items(root, _class_folders(root, left_out, labelled), None)


def _items(root: Path, pairs: list[tuple[str, Path]], roles: tuple[str, ...] | None) -> Items:
    if not pairs:
        raise OsmlError(f"folder '{root}' holds no images; expected {KINDS}")
    return Items(*zip(*pairs, strict=True), None, roles)


_PARTS = ("train", "val", "valid", "validation", "test")


def _class_folders(root: Path, left_out: LeftOut, labelled: bool) -> list[tuple[str, Path]]:
    """(class, image) pairs. Raises `OsmlError` for a class without images, where labels are needed."""
    pairs = []
    for folder in tqdm(subfolders(root), desc="listing folders", delay=2):
        of_class = LeftOut()
        found = images_below(folder, of_class)
        if not found and labelled:
            raise OsmlError(_no_images(f"class folder '{folder}'", of_class))
        left_out.add(folder.name, of_class.kinds, len(found))
        pairs += [(folder.name, image) for image in found]
    return pairs


def _no_images(what: str, left_out: LeftOut) -> str:
    if left_out.kinds:
        there = f"no images, but {left_out.kinds.total()} other files: {in_words(left_out.kinds)}"
        return f"{what} holds {there}; remove it or add images"
    return f"{what} holds no images; expected {', '.join(sorted(IMAGE_SUFFIXES))}: remove it or add images"


# --- manifests -------------------------------------------------------------------------------------------


def _open_manifest(file: Path, labelled: bool) -> Items:
    columns = read_table(file)
    needed = ("path", "label") if labelled else ("path",)
    if missing := [name for name in needed if name not in columns]:
        raise OsmlError(
            f"manifest '{file}' has no column '{missing[0]}'; it has {_listing(columns)}, expected path,label[,role] "
            "in its first line"
        )
    if "role" not in columns and (wrong := [c for c in columns if c.lower() in ("role", "roles", "split")]):
        raise OsmlError(f"manifest '{file}' has a column '{wrong[0]}' but none 'role'; rename or drop it")
    if not columns["path"]:
        raise OsmlError(f"manifest '{file}' has no rows; expected one an image")
    for name in ("path", "label", "role"):
        if "" in columns.get(name, ()):
            row = columns[name].index("") + 1
            raise OsmlError(f"manifest '{file}' has no {name} in row {row}; fill it in or drop the row")
    paths = tuple(file.parent / path for path in columns["path"])
    absent = [path for path in tqdm(paths, desc="looking for files", delay=2) if not path.is_file()]
    if absent:
        raise OsmlError(
            f"manifest '{file}' names {len(absent)} of {len(paths)} files that are not there, the first is "
            f"'{absent[0]}'; paths are relative to the manifest's folder"
            + (", and written with / in place of \\" if "\\" in absent[0].name else "")
        )
    labels, roles = columns.get("label"), columns.get("role")
    return Items(labels and tuple(labels), paths, None, roles and _checked_roles(roles, file))


# --- embeddings ------------------------------------------------------------------------------------------


def _open_embeddings(file: Path, labelled: bool) -> Items:
    arrays = (_read_npz if file.suffix.lower() == ".npz" else _read_safetensors)(file)
    if "embeddings" not in arrays:
        raise OsmlError(
            f"'{file}' has no array 'embeddings'; it has {_listing(arrays)}; save it under that name, such as "
            "np.savez(file, embeddings=…, labels=…)"
        )
    if labelled and "labels" not in arrays:
        raise OsmlError(f"'{file}' has no 'labels'; it has {_listing(arrays)}, expected one label a row")
    embeddings = _checked_embeddings(arrays["embeddings"], f"embeddings in '{file}'")
    for name in ("labels", "roles", "paths"):
        if name in arrays and arrays[name].shape != (len(embeddings),):
            raise OsmlError(
                f"'{name}' in '{file}' has shape {arrays[name].shape}; expected ({len(embeddings)},), one a row"
            )
    labels, roles, paths = (
        _strings(arrays[name], f"'{name}' in '{file}'") if name in arrays else None
        for name in ("labels", "roles", "paths")
    )
    folder = os.path.realpath(file.parent)
    return Items(
        labels and tuple(labels),
        paths and tuple(Path(os.path.normpath(os.path.join(folder, path))) for path in paths),
        embeddings,
        roles and _checked_roles(roles, file),
    )


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive by name; those that are none of `_ARRAYS` are not read, and None."""
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no archive of arrays, or is cut off; write it by np.savez(file, embeddings=…)")
        with np.load(file, allow_pickle=False) as archive:
            return {name: _member(archive, name) if name in _ARRAYS else None for name in archive.files}
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise OsmlError(f"cannot read '{file}' as .npz: {_one_line(error)}") from error


def _member(archive: Any, name: str) -> np.ndarray:
    try:
        return archive[name]
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        raise ValueError(
            f"'{name}' is an array of Python objects, which are never unpickled; save it as text or numbers, such as "
            "np.array(values, dtype=str)"
        ) from error


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(file, framework="pt") as archive:
            names = archive.keys()
            tensors = {name: archive.get_tensor(name) for name in names if name in _ARRAYS}
            metadata = archive.metadata() or {}
        lists = {name: np.array(json.loads(metadata[name])) for name in _LISTS if name in metadata}
    except (SafetensorError, OSError, ValueError) as error:
        raise OsmlError(f"cannot read '{file}' as .safetensors: {_one_line(error)}") from error
    arrays = {name: None for name in names}
    arrays |= {name: (t.float() if t.dtype in _NOT_IN_NUMPY else t).numpy() for name, t in tensors.items()}
    names = lists.pop("class_names", None)
    if names is not None and "labels" in arrays:
        labels = arrays["labels"]
        if labels.dtype.kind not in "iu" or not np.isin(labels, np.arange(names.size)).all():
            raise OsmlError(f"'labels' in '{file}' are no indices into its {names.size} class_names")
        arrays["labels"] = names[labels]
    return arrays | lists


_ARRAYS = ("embeddings", "labels", "roles", "paths")
_LISTS = ("class_names", "roles", "paths")
_NOT_IN_NUMPY = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def write_embeddings(
    path: str | Path,
    embeddings: np.ndarray | torch.Tensor,
    labels: Sequence[str] | Sequence[int] | None,
    paths: Sequence[str | Path] | None = None,
    *,
    roles: Sequence[str] | None = None,
) -> None:
    """Write a `.npz` or `.safetensors` file that `open_items` reads back; all of it or nothing.

    embeddings: `(N, D)`, finite; written as float32. labels: class names, or integers, which become their
    decimal string; None if there are none. paths: the image of each row, kept relative to the file's folder.
    roles: the data role of each row. Raises `OsmlError`, also where the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".npz", ".safetensors"):
        raise OsmlError(f"cannot write embeddings to '{path}'; expected a name ending in .npz or .safetensors")
    if not path.parent.is_dir():
        raise OsmlError(f"cannot write '{path}': no folder '{path.parent}'; make it first")
    if isinstance(embeddings, torch.Tensor):
        embeddings = embeddings.detach().float().cpu().numpy()
    embeddings = _checked_embeddings(np.asarray(embeddings), "embeddings")
    columns: dict[str, list[str]] = {}
    if labels is not None:
        columns["labels"] = list(item_labels(_strings(np.asarray(labels), "labels")))
    if paths is not None:
        folder = os.path.realpath(path.parent)
        columns["paths"] = [Path(os.path.relpath(os.path.abspath(p), folder)).as_posix() for p in paths]
    if roles is not None:
        columns["roles"] = list(_checked_roles(roles, path))
    for name, values in columns.items():
        if len(values) != len(embeddings):
            raise OsmlError(f"{len(values)} {name} for {len(embeddings)} embeddings; expected one a row")
    write = _write_npz if path.suffix.lower() == ".npz" else _write_safetensors
    try:
        _write_aside(path, lambda aside: write(aside, embeddings, columns))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or _one_line(error)
        raise OsmlError(f"cannot write embeddings to '{path}': {reason}; choose another place") from error


def _write_npz(file: Path, embeddings: np.ndarray, columns: dict[str, list[str]]) -> None:
    with open(file, "wb") as stream:
        np.savez(stream, embeddings=embeddings, **{name: np.array(v, dtype=np.str_) for name, v in columns.items()})


def _write_safetensors(file: Path, embeddings: np.ndarray, columns: dict[str, list[str]]) -> None:
    tensors = {"embeddings": torch.from_numpy(embeddings)}
    lists = dict(columns)
    if "labels" in lists:
        names, indices = np.unique(np.array(lists.pop("labels"), dtype=np.str_), return_inverse=True)
        tensors["labels"] = torch.from_numpy(indices.astype(np.int64))
        lists["class_names"] = names.tolist()
    safetensors.torch.save_file(tensors, file, {name: json.dumps(values) for name, values in lists.items()})


def _write_aside(path: Path, write: Callable[[Path], None]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


# --- checks ----------------------------------------------------------------------------------------------


def _checked_embeddings(array: np.ndarray, what: str) -> np.ndarray:
    """`(N, D)` float32, finite, N and D at least 1."""
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind != "f":
        raise OsmlError(f"{what}: shape {array.shape} of {array.dtype}; expected (N, D) floating point")
    return np.ascontiguousarray(check_embeddings(array, what).numpy())


def _strings(array: np.ndarray, what: str) -> list[str]:
    if array.dtype.kind not in "iuU":
        raise OsmlError(f"{what}: type {array.dtype}; expected strings or integers")
    return [str(value) for value in array.tolist()]


def _checked_roles(roles: Sequence[str], file: Path) -> tuple[str, ...]:
    for row, role in enumerate(roles, start=1):
        if role not in ROLES:
            raise OsmlError(f"role '{role}' in row {row} of '{file}'; expected one of {', '.join(ROLES)}")
    return tuple(roles)


def _listing(names) -> str:
    return ", ".join(f"'{name}'" for name in names) or "nothing"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
