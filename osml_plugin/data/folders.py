"""Folders of images: what in them is taken, what is left out and told, and what is passed over in silence.

This module imports nothing heavy: the workers of a bulk job that list folders are to start at once.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib",
    ".gif", ".tif", ".tiff", ".pbm", ".pgm", ".ppm", ".pnm", ".avif",
})
UNREAD_PICTURES = frozenset({
    ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".psd", ".svg", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw",
    ".orf", ".rw2", ".raf", ".tga", ".ico", ".exr", ".hdr",
})
NOT_OURS = frozenset({
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx", "$recycle.bin",
    "system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "icon\r",
})
"""Names that boxes and systems keep beside pictures: thumbnails, bins, settings. Hidden names are passed over, too."""
# fmt: on


@dataclass
class LeftOut:
    """Files of a source that were not taken: how many by suffix, and of how many in which folder."""

    kinds: Counter[str] = field(default_factory=Counter)
    folders: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Files left out and files that are there, of each folder that has some."""

    def add(self, folder: str, kinds: Counter[str], n_taken: int) -> None:
        if kinds:
            self.kinds += kinds
            left, there = self.folders.get(folder, (0, 0))
            self.folders[folder] = left + kinds.total(), there + kinds.total() + n_taken

    def tell(self, source: str | Path, what: str) -> None:
        """Log one line, if anything was left out. what: "class", or what else the folders are that `add` was given."""
        if not self.kinds:
            return
        name, (left, there) = max(self.folders.items(), key=lambda entry: entry[1][0])
        if len(self.folders) == 1:
            where = f"{left} of {there} files of {what} '{name}'"
        else:
            where = f"{self.kinds.total()} files in '{source}', most of them of {what} '{name}' ({left} of {there}),"
        logger.warning("%s were left out: %s", where.removesuffix(","), in_words(self.kinds))


def in_words(kinds: Counter[str]) -> str:
    """The suffixes that were left out, and what to do about pictures among them."""
    listed = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5)) + (", …" if len(kinds) > 5 else "")
    pictures = any(kind.lower() in UNREAD_PICTURES for kind in kinds)
    return listed + (" (pictures that cannot be read here: convert them to JPEG or PNG)" if pictures else "")


def passed_over(name: str) -> bool:
    """True of files and folders that are hidden, or not of the user's making."""
    return name.startswith(".") or name.lower() in NOT_OURS


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def subfolders(root: Path) -> list[Path]:
    """The folders in a folder, by name, without those that are passed over and links to what holds `root`."""
    if not root.is_dir():
        return []
    inside = [os.path.realpath(root)]
    folders = (f for f in root.iterdir() if f.is_dir() and not passed_over(f.name))
    return sorted((f for f in folders if not (f.is_symlink() and _holds(f, inside))), key=lambda f: f.name)


def images_in(folder: Path, left_out: LeftOut | None = None) -> list[Path]:
    """The image files of one folder, by name; what is in its folders is not looked at."""
    taken, kinds = _sort_out(str(folder), [entry.name for entry in os.scandir(folder) if not entry.is_dir()])
    if left_out is not None:
        left_out.add(folder.name, kinds, len(taken))
    return [folder / name for name in taken]


def images_below(folder: Path, left_out: LeftOut | None = None) -> list[Path]:
    """The image files at any depth, by path; see `walk`."""
    found, kinds = [], Counter()
    for where, taken, others in walk(folder):
        found += [Path(where, name) for name in taken]
        kinds += others
    if left_out is not None:
        left_out.add(folder.name, kinds, len(found))
    return sorted(found, key=Path.as_posix)


def walk(folder: str | Path, also: Collection[str] = ()) -> Iterator[tuple[str, list[str], Counter[str]]]:
    """Each folder below, with the names of the files to take, sorted, and the kinds of those that are left out.

    Links to folders are followed, after all that is not linked. A folder that several paths lead to is met once, and
    links to what holds `folder`, or the link itself, are not followed: no ring of links holds up the walk. also: more
    suffixes to take. Raises OSError for a folder that cannot be listed.
    """
    met, linked, root = set(), [os.fspath(folder)], os.path.realpath(folder)
    while linked:
        for where, folders, files in os.walk(linked.pop(0), onerror=_refuse):
            facts = os.stat(where)
            if (facts.st_dev, facts.st_ino) in met:
                folders.clear()
                continue
            met.add((facts.st_dev, facts.st_ino))
            folders[:] = sorted(name for name in folders if not passed_over(name))
            inside = root, os.path.realpath(where)
            paths = (os.path.join(where, name) for name in folders)
            linked += [path for path in paths if os.path.islink(path) and not _holds(path, inside)]
            yield where, *_sort_out(where, files, also)


def _holds(link: str | Path, folders: Collection[str]) -> bool:
    """True of a link to a folder that one of these is, or lies in."""
    target = os.path.realpath(link)
    return any(os.path.commonpath([target, folder]) == target for folder in folders)


def _refuse(error: OSError) -> None:
    raise error


def _sort_out(where: str, files: list[str], also: Collection[str] = ()) -> tuple[list[str], Counter[str]]:
    taken, kinds = [], Counter()
    for name in sorted(name for name in files if not passed_over(name)):
        suffix = suffix_of(name)
        if suffix not in IMAGE_SUFFIXES and suffix not in also:
            kinds[os.path.splitext(name)[1] or "without a suffix"] += 1
        elif is_special(os.path.join(where, name)):
            kinds["pipe or device"] += 1
        else:
            taken.append(name)
    return taken, kinds


def is_special(path: str | Path) -> bool:
    """True of a pipe, a socket or a device, which might never end; False also of what is not there."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False  # whoever opens it says why
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
