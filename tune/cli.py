"""`osml tune`, `osml promote`, `osml rollback`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from osml_plugin.cli import AsJson, Data, SkipBad, SplitFile, existing, figure, needs, print_json
from osml_plugin.presence import check_file, check_source

app = typer.Typer()

Registered = Annotated[
    str, typer.Argument(metavar="NAME", help="The registered model, as `osml tune --register` said.")
]


@app.command()
def tune(
    out: Annotated[Path, typer.Option(metavar="SWEEP", help="The sweep's folder; the winner is SWEEP/best.")],
    data: Data = None,
    split: SplitFile = None,
    n_known: Annotated[
        int | None, typer.Option(help="How many classes to draw as known, where no split is given.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(metavar="NAME", help="The loss to search, with its default space.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="A YAML file: space, search, resources, …",
            callback=existing(check_file, "the configuration"),
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One value of the training, such as training.epochs=20."),
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="How many trials.  [default: 20]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of draws, search and training.  [default: 0]")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Share of known items that may be rejected.  [default: 0.05]")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster: auto, or host:6379.  [default: this machine]")
    ] = None,
    register: Annotated[
        str | None, typer.Option(metavar="NAME", help="Register the winner under this name, as its challenger.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep that is there; else begin.")] = False,
    skip_bad: SkipBad = False,
    as_json: AsJson = False,
) -> None:
    """Search loss, margin, scale, detector and threshold in many trials, and make the best recogniser.

    Example: osml tune --data photos --n-known 6 --loss ArcFaceLoss --trials 20 --out sweep --register birds
    """
    needs("tune", "ray", "optuna", "mlflow", "matplotlib")
    from .sweeping import Interrupted, sweep

    try:
        result = sweep(
            data,
            out,
            split=split,
            n_known=n_known,
            loss=loss,
            config=config,
            overrides=overrides or [],
            trials=trials,
            seed=seed,
            alpha=alpha,
            address=address,
            register=register,
            resume=resume,
            skip_bad=skip_bad,
        )
    except Interrupted as error:
        print(f"osml: {error}", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print_json(result)
        return _end(result, register)
    best, validation, test = result["best"], result["validation"], result["test"]
    print(
        f"trials      {result['trials']}: {result['finished']} finished, {result['stopped']} stopped early, "
        f"{result['failed']} failed"
    )
    for number, error in result["failures"].items():
        print(f"            trial {number} failed: {error}")
    print(f"best        trial {best['trial']}, epoch {best['epoch']}")
    for name, value in best["params"].items():
        print(f"            {name} = {figure(value)}")
    chosen = best["chosen"]
    print(f"detector    {_called(chosen['detector'], chosen['params'])} on the output of the {chosen['output']}")
    print(f"threshold   {_called(chosen['threshold']['name'], chosen['threshold']['params'])}")
    for title, figures in (("validation", validation), ("test", test)):
        if figures:
            shown = ("oscr", "auroc", "known_rejected", "unknown_rejected", "macro_f1")
            print(f"{title:11} " + ", ".join(f"{name} {figure(figures[name])}" for name in shown))
    if result["registered"]:
        print(f"registered  {result['registered']} version {result['model_version']}, as challenger")
    print(f"bundle      {result['bundle']}")
    print(f"page        {result['report']}")
    print(f"runs        {_how_to_look(result['tracking_uri'])}")
    _end(result, register)


@app.command()
def promote(
    name: Registered,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The data of the sweep.  [default: where they were]",
            callback=existing(check_source),
        ),
    ] = None,
    version: Annotated[int | None, typer.Option(help="Another version than the challenger.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Promote without comparing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make the challenger champion, if it beats the present one on the same validation data.

    Example: osml promote birds
    """
    needs("tune", "mlflow")
    from .promotion import promote as run

    done = run(name, data=data, version=version, force=force)
    if as_json:
        print_json(vars(done))
        return
    print(f"{name} version {done.version} {'is champion' if done.promoted else 'stays challenger'}: {done.reason}")


@app.command()
def rollback(name: Registered, as_json: AsJson = False) -> None:
    """Make the champion before the present one champion again.

    Example: osml rollback birds
    """
    needs("tune", "mlflow")
    from .promotion import rollback as run

    version = run(name)
    if as_json:
        print_json({"name": name, "champion": version})
        return
    print(f"{name} version {version} is champion again")


def _end(result: dict, register: str | None) -> None:
    """Exit status 1 where the winner was to be registered, and the store was away."""
    if register is not None and result["model_version"] is None:
        raise typer.Exit(1)


def _called(name: str, params: dict) -> str:
    return f"{name}({', '.join(f'{k}={v}' for k, v in params.items())})"


def _how_to_look(uri: str) -> str:
    return f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite:") else uri
