"""`osml discover`."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from osml_plugin.cli import AsJson, Model, SkipBad, Trust, existing, figure, print_json
from osml_plugin.errors import OsmlError
from osml_plugin.presence import check_file, check_source
from osml_plugin.registry import refusing

if TYPE_CHECKING:
    from osml_plugin.discovery import Identities

app = typer.Typer()

SHOWN = 3
"""Exemplars of a group that the table names."""


@app.command()
def discover(
    model: Model,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Images, with or without class folders; a manifest; or an embeddings file.",
            callback=existing(check_source),
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write discovery.json, a folder a group, and a page to this folder."),
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the files into OUT in place of linking them.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the earlier discovery in OUT.")] = False,
    n_classes: Annotated[int | None, typer.Option(help="How many new classes there are, where known.")] = None,
    method: Annotated[str, typer.Option(help="How to group; a wrong name lists the methods.")] = "auto",
    granularity: Annotated[
        float | None, typer.Option(help="How fine, in the method's terms: near the one that was chosen before.")
    ] = None,
    must_link: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CSV of two files a line: pairs that are of one class.",
            callback=existing(check_file, "the links in"),
        ),
    ] = None,
    cannot_link: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CSV of two files a line: pairs of different classes.",
            callback=existing(check_file, "the links in"),
        ),
    ] = None,
    previous: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="The OUT of an earlier run: groups that continue one keep its number.",
            callback=existing(check_file, "the earlier discovery"),
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Group all items, not only those that are rejected.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of the grouping.")] = 0,
    skip_bad: SkipBad = False,
    trust_factory: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Group what the recogniser rejects into the new classes that it is.

    Example: osml discover bundle inbox --out found
    """
    from . import commands

    if out is not None:
        from .report.discovery import PAGE, check_folder, write_discovery  # what it needs is asked for before the work

        check_folder(out, data, overwrite)
    elif copy or overwrite:
        raise OsmlError(f"--{'copy' if copy else 'overwrite'} is about the folder that is written: name one by --out")
    result = commands.discover(
        model,
        data,
        n_classes=n_classes,
        method=method,
        granularity=granularity,
        must_link=_pairs(must_link),
        cannot_link=_pairs(cannot_link),
        previous=_identities(previous),
        everything=everything,
        seed=seed,
        skip_bad=skip_bad,
        factories=trust_factory or (),
    )
    if out is not None:
        n_absent = write_discovery(out, result, copy=copy, overwrite=overwrite)
        if n_absent:
            print(
                f"osml: warning: {n_absent} of {len(result.items)} files are not there and not in '{out}'",
                file=sys.stderr,
            )
    summary = result.to_dict()
    if as_json:
        print_json(summary)
        return
    low, high = summary["n_classes_interval"]
    fit = f" ({low} to {high} fit about as well)" if low < high else ""
    print(f"{summary['n_items']} items in {summary['n_classes']} groups{fit}; ", end="")
    print(f"{summary['n_recognised']} recognised as known, {len(summary['left_out'])} left out")
    if summary["note"]:
        print(f"nothing is proposed: {summary['note']}")
    elif summary["too_few"]:
        print(f"too few to group: {len(summary['too_few'])} items; {summary['lacking']} more of one class would do")
    if summary["groups"]:
        print(f"{'group':>5} {'items':>7} {'confidence':>10}  exemplars")
    for group, exemplars in zip(summary["groups"], result.groups.exemplars, strict=True):
        shown = "  ".join(result.short_names[i] for i in exemplars[:SHOWN])
        print(f"{group['group']:>5} {group['size']:>7} {group['confidence']:>10.2f}  {shown}")
    for change in summary["changes"]:
        print(f"since the last run: {change}")
    for name, value in (summary["metrics"] or {}).items():
        print(f"{name:18} {figure(value)}")
    if out is not None:
        print(f"{'page':18} {out / PAGE}")


def _pairs(file: Path | None) -> list[list[str]]:
    """The pairs in a CSV file of two columns, without a header."""
    if file is None:
        return []
    with (
        refusing(f"cannot read the links in '{file}'", "give a CSV of two files a line"),
        open(file, newline="", encoding="utf-8-sig") as lines,
    ):
        reader = csv.reader(lines)
        rows = [(reader.line_num, row) for row in reader if row]
    for number, row in rows:
        if len(row) != 2:
            raise OsmlError(
                f"line {number} of '{file}' has {len(row)} fields: expected two files, with a comma between"
            )
    return [[field.strip() for field in row] for _, row in rows]


def _identities(out: Path | None) -> Identities | None:
    """What the run that wrote a folder left to the next."""
    if out is None:
        return None
    from .discovery import Identities
    from .report.discovery import RECORD

    with refusing(f"'{out}' holds no earlier discovery", "name the --out of an earlier run"):
        return Identities.from_dict(json.loads((out / RECORD).read_text(encoding="utf-8"))["identities"])
