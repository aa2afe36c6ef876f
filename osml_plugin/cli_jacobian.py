"""`osml jacobian`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from osml_plugin.cli import AsJson, Data, Model, SkipBad, SplitFile, Trust, figure, print_json

app = typer.Typer()

COLUMNS = ("epoch", "known", "unknown", "difference", "auroc", "jacobian_auroc", "davies_bouldin")


@app.command()
def jacobian(
    model: Model,
    data: Data,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write jacobian.json and the pictures to this folder.")
    ] = None,
    split: SplitFile = None,
    projections: Annotated[
        int | None, typer.Option(help="Estimate the norm from so many random projections.  [default: exact]")
    ] = None,
    before_norm: Annotated[
        bool, typer.Option("--before-norm", help="Of the embedding before it is brought to unit norm.")
    ] = False,
    max_items: Annotated[int, typer.Option(min=1, help="Known items to look at, and as many unknown ones.")] = 500,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of the draws.")] = 0,
    skip_bad: SkipBad = False,
    trust_factory: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Show how strongly the embedding answers to known and to unknown inputs, over the checkpoints of the training.

    A training keeps checkpoints with --set training.checkpoints=1. Diagnostics only: the unknown items are those of
    the data, and nothing may be chosen by them.

    Example: osml jacobian bundle --data photos --out diagnostics
    """
    from . import commands

    if out is not None:
        from .report.jacobian import check_folder, write_jacobian  # first, so that what fails does so before the work

        check_folder(out)
    found = commands.jacobian(
        model,
        data,
        split=split,
        n_projections=projections,
        before_norm=before_norm,
        max_items=max_items,
        seed=seed,
        skip_bad=skip_bad,
        factories=trust_factory or (),
    )
    if found.networks[0].epoch is None:
        print(
            "osml: no checkpoints beside this bundle (training.checkpoints=1 keeps them): its final model alone",
            file=sys.stderr,
        )
    if out is not None:
        write_jacobian(out, found)
    if as_json:
        print_json(found.to_dict())
        return
    print("  ".join(f"{name:>14}" for name in COLUMNS))
    for network in found.networks:
        row = network.to_dict() | {"epoch": "final" if network.epoch is None else network.epoch}
        print("  ".join(f"{figure(row[name]):>14}" for name in COLUMNS))
    print(f"correlation of difference and auroc: Pearson {figure(found.pearson)}, Spearman {figure(found.spearman)}")
    if out is not None:
        print(f"{'pictures':22} {out}")
