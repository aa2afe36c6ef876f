"""A discovery on disk: a record of it, a folder a group, and one self-contained page to look at."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..commands import DiscoverResult
from ..errors import OsmlError
from ..metrics.discovery import LEFT_OUT
from . import pictures
from .evaluation import EXEMPLARS, MEANING, SHOWN_GROUPS
from .page import Page

FORMAT = "osml-discovery"
RECORD, PAGE, GROUPS, ASIDE = "discovery.json", "index.html", "groups", "left_out"

GLANCE = 120
"""Groups up to which the page shows an exemplar of each."""
LEAST_SURE = 6
NAMED = 3
"""Files that a row of a table names."""
SHOWN_CLASSES = 10
"""Known classes of what was left out that the page shows."""


# --- the folder ------------------------------------------------------------------------------------------


def check_folder(out: Path, source: Path, overwrite: bool) -> None:
    """Raise OsmlError where `write_discovery` may not write: `out` holds anything but an earlier discovery that is to
    be replaced, lies inside the data or around them, or has no folder to be in."""
    real = Path(os.path.realpath(out))
    if real.is_relative_to(os.path.realpath(source)):
        raise OsmlError(
            f"'{out}' is in '{source}', where it would be taken for data the next time: choose another --out"
        )
    if Path(os.path.realpath(source)).is_relative_to(real):
        raise OsmlError(f"'{source}' is in '{out}', which would be replaced with it: choose another --out")
    if real.is_dir() and any(real.iterdir()):
        if not overwrite:
            raise OsmlError(f"'{out}' is not empty: choose another --out, or pass --overwrite to replace a discovery")
        if (foreign := _foreign(real)) is not None:
            raise OsmlError(
                f"'{out}' holds '{foreign}', which no discovery wrote: move it away, or choose another --out"
            )
    elif real.exists() and not real.is_dir():
        raise OsmlError(f"'{out}' is a file: choose another --out")
    if not real.parent.is_dir():
        raise OsmlError(f"cannot write '{out}': no folder '{real.parent}'; make it first")
    if not os.access(real.parent, os.W_OK):
        raise OsmlError(f"cannot write '{out}': folder '{real.parent}' cannot be written; choose another --out")


def write_discovery(out: Path, result: DiscoverResult, *, copy: bool = False, overwrite: bool = False) -> int:
    """Write `discovery.json`, `groups/<group>/*`, `left_out/*` and `index.html` into the folder `out`: all or nothing.

    Files are linked, or copied with `copy`, under names of their own; a name that is taken in its group gets a number.
    The record is `DiscoverResult.to_dict()`, `tree` (as `Tree.to_dict`; its groups are numbered by size), `identities`
    (what the next run goes on from), and `files`: the image of each file in the folders. It tells which files of the
    folder are a discovery's: with `overwrite` nothing else is ever replaced.

    Returns:
        How many items have a file that is not there (those of an embeddings file may be elsewhere): these are in no
        folder.

    Raises:
        OsmlError: as `check_folder`, and where something cannot be written.
    """
    check_folder(out, result.source, overwrite)
    real = Path(os.path.realpath(out))
    aside, old = (real.with_name(f".{real.name}.{os.getpid()}.{kind}") for kind in ("part", "old"))
    try:
        aside.mkdir()
        files = _place(result, aside, copy)
        record = {
            "format": FORMAT,
            "version": 1,
            **result.to_dict(),
            "tree": result.groups.tree.to_dict(),
            "files": files,
            "identities": result.update.identities.to_dict(),
        }
        text = json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False)
        # A file name that is no UTF-8 reaches Python with lone surrogates; as escapes they are JSON, too.
        (aside / RECORD).write_text(text, encoding="utf-8", errors="backslashreplace")
        make_page(result).write(aside / PAGE)
        if real.exists():
            os.rename(real, old)
        try:
            os.rename(aside, real)
        except BaseException:
            if old.exists():
                os.rename(old, real)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, shutil.Error) as error:
        reason = error.strerror or " ".join(str(error).split())
        hint = "choose another --out" if copy else "choose another --out, or --copy where links are not possible"
        raise OsmlError(f"cannot write '{out}': {reason}; {hint}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return 0 if result.items.paths is None else len(result.items) - len(files)


def _place(result: DiscoverResult, folder: Path, copy: bool) -> dict[str, str]:
    """Give each file its place in the folder of its group; returns which file is where."""
    files: dict[str, str] = {}
    taken: dict[int, Counter[str]] = {}
    digits = max(2, len(str(max(result.ids, default=0))))
    work = zip(result.items.paths or (), result.groups.labels.tolist(), strict=result.items.paths is not None)
    bar = tqdm(work, "copying" if copy else "linking", len(result.items), delay=2, unit=" files", leave=False)
    for path, group in bar:
        source = os.path.abspath(path)
        if not os.path.isfile(source):
            continue
        inside = ASIDE if group == LEFT_OUT else f"{GROUPS}/{result.ids[group]:0{digits}}"
        if group not in taken:
            (folder / inside).mkdir(parents=True)
        name = _free_name(os.path.basename(source), taken.setdefault(group, Counter()))
        (shutil.copy2 if copy else os.symlink)(source, folder / inside / name)
        files[f"{inside}/{name}"] = source
    return files


def _free_name(name: str, taken: Counter[str]) -> str:
    """`name`, or where it is taken `name (2)`, …; names that differ in case only are one to some file systems."""
    stem, suffix = os.path.splitext(name)
    free, key = name, name.casefold()
    while free.casefold() in taken:
        taken[key] += 1
        free = f"{stem} ({taken[key]}){suffix}"
    taken[free.casefold()] = 1
    return free


def _foreign(folder: Path) -> str | None:
    """The first file in a folder that the discovery recorded there did not write; None if it wrote all of them."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        ours = {RECORD, PAGE, *record["files"]} if record["format"] == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    for where, folders, names in os.walk(folder):
        inside = Path(where).relative_to(folder)
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        for name in sorted([*names, *links]):
            if (inside / name).as_posix() not in ours:
                return (inside / name).as_posix()
    return None


# --- the page --------------------------------------------------------------------------------------------


def make_page(result: DiscoverResult) -> Page:
    """The page of a discovery."""
    page = Page(f"New classes in {result.source.name}", summary(result), result.rendering)
    for part in tqdm((_glance, _map, _tree, _groups, _left_out, _figures), desc="page", unit="part"):
        part(page, result)
    return page


def summary(result: DiscoverResult) -> str:
    """What was grouped and what came out, in a few sentences."""
    found, n = result.groups, len(result.items)
    low, high = found.n_classes_interval
    n_left_out = len(result.members(LEFT_OUT))
    if found.n_classes:
        fit = "" if low == high else f" ({low} to {high} fit about as well)"
        text = f"{n - n_left_out:,} items are proposed as {_count(found.n_classes, 'new class', 'new classes')}{fit}."
    else:
        text = f"No new class is proposed: {found.note}."
    if n_left_out:
        text += f" {n_left_out:,} of the {n:,} items were left out."
    if found.n_classes and found.too_few.any():
        n_few = np.count_nonzero(found.too_few)
        text += f" {n_few:,} of these are too few to group: {found.lacking} more of one class would do."
    if found.n_classes:
        text += f" How fine a class is comes from: {found.granularity_source}."
    if result.n_recognised:
        text += f" {result.n_recognised:,} items more were recognised as known and not looked at."
    return text


def _glance(page: Page, result: DiscoverResult) -> None:
    found = result.groups
    if result.items.paths is None or not found.n_classes:
        return
    cards = []
    for group, exemplars in enumerate(tqdm(found.exemplars[:GLANCE], "thumbnails", delay=2, leave=False)):
        size, confidence = _size_and_confidence(result, group)
        cards.append(
            (
                result.items.paths[exemplars[0]],
                f"Group {result.ids[group]}\n{size:,} items\nconfidence {confidence:.2f}",
            )
        )
    note = "Of each group its most typical item, how many items it has, and how steady it is."
    if found.n_classes > GLANCE:
        note += f" The {GLANCE} largest of {found.n_classes} groups."
    page.add_images("At a glance", [("", cards)], note)


def _map(page: Page, result: DiscoverResult) -> None:
    numbers = np.append(result.update.ids, LEFT_OUT)[result.groups.labels]
    figure = pictures.group_map(result.embeddings.numpy(), numbers, result.references.numpy())
    note = (
        "Near in the map is near in the embedding; distances between islands mean little. A dot is an item in the "
        "colour of its group, and a number stands at the middle of a group; colours repeat. Grey: known items of the "
        "gallery; crosses: items left out."
    )
    if len(result.items) > pictures.MAP_GROUPED:
        note += f" {pictures.MAP_GROUPED:,} of {len(result.items):,} items, drawn at random."
    page.add_figure("Map of the embedding", figure, note)


def _tree(page: Page, result: DiscoverResult) -> None:
    figure = pictures.group_tree(result.groups.tree, result.ids)
    if figure is not None:
        note = "Groups that meet far to the right are linked most: look there for two that are one class."
        page.add_figure("Tree of the groups", figure, note)


def _groups(page: Page, result: DiscoverResult) -> None:
    found = result.groups
    if not found.n_classes:
        return
    shown = min(found.n_classes, SHOWN_GROUPS) if result.items.paths is not None else 0
    if shown:
        note = "The most typical items of each, and those that are least sure to belong: a good group has both alike."
        page.add_chapter("Groups", note)
        for group in tqdm(range(shown), "thumbnails", delay=2, leave=False):
            _add_group(page, result, group)
    if found.n_classes == shown:
        return
    rows = []
    for group in range(shown, found.n_classes):
        typical = ", ".join(result.short_names[i] for i in found.exemplars[group][:NAMED])
        rows.append((result.ids[group], *_size_and_confidence(result, group), _nearest(result, group), typical))
    note = (
        ""
        if shown
        else "The data are embeddings without images, so there are no thumbnails: items are numbered from 0."
    )
    header = ("group", "items", "confidence", "nearest known class", "most typical items")
    page.add_table("Smaller groups" if shown else "Groups", header, rows, note)


def _add_group(page: Page, result: DiscoverResult, group: int) -> None:
    members, exemplars = result.members(group), result.groups.exemplars[group]
    others = np.setdiff1d(members, exemplars)
    least = others[np.argsort(result.groups.confidence[others], kind="stable")[:LEAST_SURE]]
    rows = [("Most typical", [(result.items.paths[i], result.short_names[i]) for i in exemplars])]
    if len(least):
        captions = (f"{result.groups.confidence[i]:.2f} sure\n{result.short_names[i]}" for i in least)
        rows.append(("Least sure", list(zip((result.items.paths[i] for i in least), captions, strict=True))))
    size, confidence = _size_and_confidence(result, group)
    note = f"{size:,} items, {size / len(result.items):.0%} of all; confidence {confidence:.2f}. "
    note += f"Nearest known class: {_nearest(result, group)}."
    page.add_images(f"Group {result.ids[group]}", rows, note)


def _left_out(page: Page, result: DiscoverResult) -> None:
    found, members = result.groups, result.members(LEFT_OUT)
    if not len(members):
        return
    classes = Counter(found.known_class[members]).most_common()
    note = (
        "They lie among items of a class that is there already: a known one, and they were probably rejected wrongly, "
        "or one that was held out of training to choose by (pseudo-unknown). "
        "Items in no class lie apart from all of them."
    )
    if len(classes) > SHOWN_CLASSES:
        note += f" The {SHOWN_CLASSES} most frequent of {len(classes)} classes are shown."
    rows, cards = [], []
    for known, n in classes[:SHOWN_CLASSES]:
        where = f"among items of {known}"
        if known is None:
            where = "in no class: noise, or too few to group"
        of = [i for i in members if found.known_class[i] == known]
        surest = sorted(of, key=lambda i: -found.confidence[i])[:EXEMPLARS]
        rows.append((where, n, ", ".join(result.short_names[i] for i in surest[:NAMED])))
        if result.items.paths is not None:
            shown = [(result.items.paths[i], result.short_names[i]) for i in surest]
            cards.append((f"{_count(n, 'item', 'items')} {where}", shown))
    if cards:
        page.add_chapter("Left out")
        page.add_images(f"{_count(len(members), 'item', 'items')} in no group", cards, note)
    else:
        page.add_table("Left out", ("where", "items", "some of them"), rows, note)


def _figures(page: Page, result: DiscoverResult) -> None:
    found = result.groups
    page.add_chapter("Figures")
    low, high = found.n_classes_interval
    rows = [
        ("new classes", found.n_classes, "Groups proposed as classes, the largest first."),
        ("from … to", f"{low} … {high}", "Numbers of classes that fit the evidence about as well."),
        ("method", result.method, "How items were grouped, as asked for; auto: what does best over many data sets."),
        ("granularity", found.granularity, "How fine the grouping is, in the method's terms; higher is finer."),
        ("from", found.granularity_source, "What the granularity comes from."),
        ("items grouped", len(result.items), "Those that were rejected, or all where that was asked for."),
        (
            "left out",
            len(result.members(LEFT_OUT)),
            "Of these, items among known ones, too few to group, or taken for noise.",
        ),
        ("recognised", result.n_recognised, "Items taken for known ones; they were not grouped."),
    ]
    page.add_table("How it was grouped", ("figure", "value", "in plain words"), rows)
    if result.metrics is not None:
        rows = [(name, value, MEANING[name]) for name, value in result.metrics.to_dict().items()]
        note = "The data come with labels; the grouping did not see them."
        page.add_table("Against the labels of the data", ("figure", "value", "in plain words"), rows, note)


def _size_and_confidence(result: DiscoverResult, group: int) -> tuple[int, float]:
    return len(result.members(group)), float(result.groups.group_confidence[group])


def _nearest(result: DiscoverResult, group: int) -> str:
    members = result.members(group)
    name, n = result.nearest_known(members)[0]
    return f"{name} ({n / len(members):.0%} of its items)"


def _count(n: int, one: str, many: str) -> str:
    return f"{n:,} {one if n == 1 else many}"
