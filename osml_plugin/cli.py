"""`osml`: the commands, thin over `osml_plugin.commands`; results on standard output, progress and notices on error."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .errors import OsmlError
from .presence import check_file, check_model, check_source

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Open-set recognition: recognise the known, reject and group the unknown, learn new classes without training.",
)


def existing(check: Callable[..., None], *args: str) -> Callable[[Any], Any]:
    """A callback of an option: what it names, where it names something, must pass the `check` of its presence."""

    def checked(value: Any) -> Any:
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                check(one, *args)
        return value

    return checked


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A bundle, as `osml train --out` writes it, or models:/NAME@champion.",
        callback=existing(check_model),
    ),
]
Data = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        help="DIR/<class>/* or DIR/train/<class>/* + DIR/test/<class>/*; a CSV or Parquet manifest "
        "(path,label[,role]); or an embeddings file (.npz, .safetensors).",
        callback=existing(check_source),
    ),
]
Paths = Annotated[
    list[Path],
    typer.Argument(metavar="PATH…", help="Images, folders, or an embeddings file.", callback=existing(check_source)),
]
SplitFile = Annotated[
    Path | None,
    typer.Option(
        "--split",
        metavar="FILE",
        help='JSON {"known": […], "pseudo_unknown": […], "unknown": […]}.',
        callback=existing(check_file, "the split"),
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="A YAML configuration.",
        callback=existing(check_file, "the configuration"),
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read.")]
Trust = Annotated[
    list[str] | None,
    typer.Option("--trust-factory", metavar="PACKAGE.MODULE:FACTORY", help="Trunk code that the bundle may run."),
]


OnRay = Annotated[bool, typer.Option("--ray", help="Work on Ray Data, and write a folder of Parquet files.")]
Address = Annotated[
    str | None, typer.Option(help="With --ray: a running cluster, auto or host:6379.  [default: this machine]")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit()


@app.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(metavar="BUNDLE", help="Where to write the recogniser.")],
    split: SplitFile = None,
    n_known: Annotated[
        int | None, typer.Option(help="How many classes to draw as known, where no split is given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draw and of the training.  [default: 0]")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Share of known items that may be rejected.  [default: 0.05]")
    ] = None,
    config: ConfigFile = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One value of it, such as loss.margin=20.")
    ] = None,
    skip_bad: SkipBad = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle that is there.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …  [default: cuda if there is one]")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a recogniser on known classes and choose its detector and threshold on validation.

    Example: osml train --data photos --n-known 6 --seed 1 --set loss=CosFaceLoss --set training.epochs=20 --out bundle
    """
    from .pipeline import train as run

    result = run(
        data,
        out,
        split=split,
        n_known=n_known,
        seed=seed,
        config=config,
        overrides=overrides or [],
        alpha=alpha,
        skip_bad=skip_bad,
        overwrite=overwrite,
        device=device,
    )
    recognizer = result.recognizer
    best = result.candidates[0] if result.candidates else None
    summary = {
        "bundle": str(result.bundle),
        "split": result.split.to_dict(),
        "n_items": result.n_items,
        "output": result.recognizer.details["output"],
        "detector": {"name": recognizer.detector.name, **recognizer.detector.params},
        "threshold": recognizer.threshold.state(),
        "validation": {"oscr": best.oscr, "auroc": best.auroc} if best else None,
        "guarantee": str(recognizer.guarantee) if recognizer.guarantee is not None else None,
        "skipped": [str(p) for p, _ in result.skipped],
    }
    if recognizer.guarantee is not None and not recognizer.guarantee.possible:
        print(f"osml: warning: {recognizer.guarantee}", file=sys.stderr)
    if as_json:
        print_json(summary)
        return
    print("split      " + json.dumps(summary["split"], ensure_ascii=False))
    print("items      " + ", ".join(f"{n} {role}" for role, n in result.n_items.items()))
    if best:
        print(f"embedding  of the {best.output}")
        print(f"detector   {_call(recognizer.detector)}: validation OSCR {best.oscr:.3f}, AUROC {best.auroc:.3f}")
    else:
        asked = recognizer.details["config"]["detector"]["name"] != "auto"
        why = "as asked" if asked else "the default, as there is no pseudo-unknown class to choose by"
        print(f"detector   {_call(recognizer.detector)}: {why}")
    print(f"threshold  {_call(recognizer.threshold)}: τ = {recognizer.threshold.tau:.4g}")
    if recognizer.guarantee is not None and recognizer.guarantee.possible:
        print(f"promise    {recognizer.guarantee}")
    print(f"bundle     {result.bundle}")


@app.command()
def evaluate(
    model: Model,
    data: Data,
    split: SplitFile = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page with the pictures as well.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Another share of known items that may be rejected than the bundle's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of the grouping.")] = 0,
    skip_bad: SkipBad = False,
    trust_factory: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Test a recogniser on what it has not seen: the known, the unknown, and the grouping of the unknown.

    Example: osml evaluate bundle --data photos --json
    """
    from . import commands

    if report is not None:
        from .report import write_report  # first, so that what it needs is asked for before the work
    result, items = commands.evaluate(
        model, data, split=split, alpha=alpha, skip_bad=skip_bad, factories=trust_factory or (), seed=seed
    )
    if report is not None:
        write_report(report, result, paths=items.paths)
    figures = result.to_dict()
    if as_json:
        print_json(figures)
        return
    parts = {part: figures.pop(part) or {} for part in ("thresholds", "discovery")}
    for name, value in figures.items():
        print(f"{name:22} {figure(value)}")
    for part, values in parts.items():
        for name, value in values.items():
            print(f"{part + '.' + name:22} {figure(value)}")
    if report is not None:
        print(f"{'report':22} {report}")


@app.command()
def predict(
    model: Model,
    paths: Paths,
    skip_bad: SkipBad = False,
    trust_factory: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Say what images are: a known class, or unknown.

    Example: osml predict bundle holiday/*.jpg
    """
    from . import commands

    answer, items = commands.predict(model, paths, skip_bad=skip_bad, factories=trust_factory or ())
    results = []
    for i in range(len(answer)):
        results.append(
            {
                "path": str(items.paths[i]) if items.paths is not None else None,
                "label": answer.names[i],
                "known": answer.names[i] is not None,
                "nearest": answer.nearest[i],
                "score": float(answer.scores[i]),
                "threshold": None if math.isinf(answer.thresholds[i]) else float(answer.thresholds[i]),
                "p_value": float(answer.p_values[i]) if answer.p_values is not None else None,
                "neighbours": [n._asdict() for n in answer.neighbours[i]],
            }
        )
    if as_json:
        print_json({"results": results})
        return
    for i, r in enumerate(results):
        verdict = r["label"] if r["known"] else f"unknown (nearest: {r['nearest']})"
        p = "" if r["p_value"] is None else f"  p {r['p_value']:.3f}"
        print(f"{r['path'] or f'item {i}'}  {verdict}  score {r['score']:.4g}{p}")


@app.command()
def recognize(
    model: Model,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A folder of images; a Parquet file or a folder of them, with a column image, path or embedding; "
            "or what `osml predict` takes.",
            callback=existing(check_source),
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="A .parquet or .csv file; with --ray a folder.")],
    ray: OnRay = False,
    address: Address = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Give images that cannot be read a row with the error.")
    ] = False,
    overwrite: Overwrite = False,
    trust_factory: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Say of millions of items what they are: a table with a row for each.

    Example: osml recognize models:/birds@champion photos --out answers.parquet
    """
    from .bulk import recognize_dataset

    done = recognize_dataset(
        model,
        data,
        out,
        ray=ray,
        address=address,
        skip_bad=skip_bad,
        factories=trust_factory or (),
        overwrite=overwrite,
    )
    if as_json:
        print_json({"n_items": done.n, "n_unknown": done.n_unknown, "n_bad": done.n_bad, "out": str(out)})
        return
    known = done.n - done.n_unknown - done.n_bad
    print(f"{done.n} items: {known} known, {done.n_unknown} unknown, {done.n_bad} unreadable  {out}")


@app.command()
def embed(
    model: Model,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Images, or a manifest; with --ray what `osml recognize` takes.",
            callback=existing(check_source),
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The .npz or .safetensors file to write; with --ray a folder.")
    ],
    ray: OnRay = False,
    address: Address = None,
    skip_bad: SkipBad = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With --ray: replace what is there.")] = False,
    trust_factory: Trust = None,
) -> None:
    """Write the embeddings of images to a file, which every other command takes in place of images.

    Example: osml embed bundle photos --out photos.npz
    """
    if not ray:
        from .commands import embed as run

        if address is not None:
            raise OsmlError(f"address '{address}' is of a Ray cluster, and this is to run without Ray: add --ray")
        n = run(model, data, out, skip_bad=skip_bad, factories=trust_factory or ())
        print(f"{n} embeddings  {out}")
        return
    from .bulk import embed_to_parquet

    done = embed_to_parquet(
        model, data, out, address=address, skip_bad=skip_bad, factories=trust_factory or (), overwrite=overwrite
    )
    unreadable = f", {done.n_bad} unreadable" if done.n_bad else ""
    print(f"{done.n - done.n_bad} embeddings{unreadable}  {out}")


@app.command()
def enroll(
    model: Model,
    paths: Paths,
    name: Annotated[str, typer.Option(help="The class that these are.")],
    skip_bad: SkipBad = False,
    trust_factory: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Teach a recogniser a class from examples, without training; the bundle is changed in place.

    Example: osml enroll bundle --name otter inbox/otter-1.jpg inbox/otter-2.jpg
    """
    from . import commands

    recognizer = commands.enroll(model, name, paths, skip_bad=skip_bad, factories=trust_factory or ())
    gallery = recognizer.gallery
    n = int((gallery.labels == gallery.id_of(name)).sum())
    _print_gallery(recognizer, as_json, f"'{name}' has {n} examples", {"name": name, "n_examples": n})


@app.command()
def forget(
    model: Model,
    name: Annotated[str, typer.Option(help="The class to drop.")],
    trust_factory: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Make a recogniser forget a class; the bundle is changed in place.

    Example: osml forget bundle --name otter
    """
    from . import commands

    recognizer = commands.forget(model, name, factories=trust_factory or ())
    _print_gallery(recognizer, as_json, f"'{name}' is forgotten", {"name": name})


@app.command("detectors")
def list_detectors(as_json: AsJson = False) -> None:
    """List the detectors, what they need, and their parameters.

    Example: osml detectors
    """
    from .detectors import registry

    rows = []
    for name in registry.names():
        cls = registry.get(name)
        what = _first_sentence(cls)
        rows.append({"name": name, "needs": "class weights" if cls.needs_class_weights else "embeddings", "what": what})
        rows[-1]["search_space"] = {k: list(v) for k, v in cls.search_space.items()}
    if as_json:
        print_json({"detectors": rows})
        return
    for r in rows:
        space = "; ".join(f"{k} in {v}" for k, v in r["search_space"].items())
        print(f"{r['name']:21} needs {r['needs']:14} {r['what']}" + (f"  [{space}]" if space else ""))


@app.command("losses")
def list_losses(as_json: AsJson = False) -> None:
    """List the losses and their arguments.

    Example: osml losses
    """
    from . import pml

    rows = [{"name": n, "arguments": list(pml.settable("loss", n))} for n in pml.names("loss")]
    if as_json:
        print_json({"losses": rows})
        return
    for r in rows:
        print(f"{r['name']:36} {', '.join(r['arguments'])}")


def main() -> None:
    """The console script: a user's mistake is one line on standard error and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without τ shows its number
    logging.basicConfig(format="osml: %(message)s", level=logging.WARNING)
    from .cli_discover import app as discover_app
    from .cli_jacobian import app as jacobian_app

    for wing_app in [discover_app, jacobian_app, *(wing.load() for wing in entry_points(group="osml_plugin.commands"))]:
        for ours, theirs in (
            (app.registered_commands, wing_app.registered_commands),
            (app.registered_groups, wing_app.registered_groups),
        ):
            ours += [command for command in theirs if command not in ours]  # once, however often this is called
    run(app)


def needs(extra: str, *packages: str) -> None:
    """Raise OsmlError, naming the extra, where one of these is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise OsmlError(f"this command needs {package}: pip install 'osml-plugin[{extra}]'")


def run(command: Callable[[], Any]) -> None:
    """Run a command; what the user can mend ends it with one line and exit status 2."""
    try:
        command()
    except OsmlError as error:
        print(f"osml: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone: nothing more to say
        sys.exit(1)
    except OSError as error:
        print(f"osml: error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


def print_json(value: dict) -> None:
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _print_gallery(recognizer: Any, as_json: bool, what: str, fields: dict) -> None:
    promise = str(recognizer.guarantee) if recognizer.guarantee is not None else None
    gallery = recognizer.gallery
    if as_json:
        state = {"classes": gallery.class_names, "gallery_version": gallery.version, "guarantee": promise}
        print_json(fields | state | {"threshold": recognizer.threshold.state()["tau"]})
        return
    print(f"{what}; {len(gallery.classes)} classes: {', '.join(gallery.class_names)}")
    if promise:
        print(f"of the classes it was trained on, {promise}")


def figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "–" if value is None else str(value)


def _call(part: Any) -> str:
    return f"{part.name}({', '.join(f'{k}={v}' for k, v in part.params.items())})"


def _first_sentence(cls: type) -> str:
    return " ".join((cls.__doc__ or "").strip().splitlines()[0].split())


if __name__ == "__main__":
    main()
