"""`osml serve`, `osml backup`, `osml keys`."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.request import ProxyHandler, build_opener

import typer

from osml_plugin.cli import AsJson, ConfigFile, existing, needs, print_json
from osml_plugin.errors import OsmlError
from osml_plugin.presence import check_model

if TYPE_CHECKING:
    from .settings import ServeConfig

app = typer.Typer()
keys = typer.Typer(no_args_is_help=True, help="API keys of an endpoint: add, list, revoke.")
app.add_typer(keys, name="keys")

Home = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of store, models and audit log.  [default: osml-serve]")
]
Database = Annotated[
    str | None, typer.Option(metavar="URL", help="postgresql://… or sqlite:///FILE.  [default: SQLite in --home]")
]


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="models:/NAME@champion, or a bundle.  [default: what it served last]",
            callback=existing(check_model),
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; others than loopback need keys.")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes any free one.  [default: 8000]")] = None,
    replicas: Annotated[int | None, typer.Option(help="Processes that answer.  [default: 1]")] = None,
    database: Database = None,
    home: Home = None,
    alpha: Annotated[
        float | None, typer.Option(help="Share of known items that may be rejected.  [default: the bundle's]")
    ] = None,
    follow: Annotated[
        bool | None, typer.Option("--follow", help="Go over to another version when the alias does.")
    ] = None,
    root_path: Annotated[
        str | None, typer.Option(metavar="PATH", help="Path under which a proxy shows it, such as /vision.")
    ] = None,
    config: ConfigFile = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One value of it, such as unknowns.days=7.")
    ] = None,
) -> None:
    """Serve a recogniser over HTTP, where it learns new classes while it runs; Ctrl-C stops it.

    Example: osml serve models:/birds@champion --port 8000
    """
    needs("serve", "ray", "fastapi", "sqlalchemy", "alembic", "prometheus_client")
    settings = _settings(
        config,
        overrides,
        model=model,
        host=host,
        port=port,
        replicas=replicas,
        database=database,
        home=home,
        alpha=alpha,
        follow=follow,
        root_path=root_path,
    )
    from .server import is_open, running

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    began = time.monotonic()
    try:
        with running(settings, told=lambda step: _say(f"{time.monotonic() - began:3.0f} s  {step}")) as address:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            key = "" if is_open(settings) else "-H 'Authorization: Bearer KEY' "
            address += settings.root_path
            print(f"serving    {address}    docs {address}/docs    metrics {address}/metrics")
            print(f"store      {_where(settings)}")
            for line in _warnings(address):
                print(f"warning    {line}")
            if key:
                print("keys       every request needs one: osml keys add NAME --scope recognize")
            else:
                through = ", and all whom a proxy on it lets in" if settings.root_path else ""
                print(
                    f"keys       none, so it is for this machine alone{through}: osml keys add NAME --scope recognize"
                )
            print(f"try        curl {key}-F files=@image.jpg {address}/v1/recognize")
            print("stop       Ctrl-C", flush=True)
            stop.wait()
            _say("stopping")
    except KeyboardInterrupt:
        _say("stopped")
        raise typer.Exit(130) from None


@app.command()
def backup(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is not there yet.")],
    database: Database = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Copy what an endpoint has learned, its models included, while it runs or not.

    The copy is a home: osml serve --home DIR goes on from it.

    Example: osml backup backups/monday
    """
    needs("serve", "sqlalchemy", "alembic")
    config = _there(database, home)
    from .backup import back_up

    found = back_up(config, out)
    if as_json:
        print_json({"backup": str(out)} | found)
        return
    print(
        f"backup     {out}: model {found['model'] or 'none'}, {found['n_classes']} classes, {found['n_examples']} "
        f"examples, {found['n_unknowns']} unknown items, {found['bytes']:,} bytes; checked"
    )
    print(f"restore    osml serve --home {out}    (or a copy of it)")


@keys.command()
def add(
    name: Annotated[str, typer.Argument(help="What the key is for; the audit log names it.")],
    scope: Annotated[list[str], typer.Option(help="recognize, enroll, or admin (which holds the others); repeatable.")],
    database: Database = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, once: only its hash is stored.

    Example: osml keys add camera-1 --scope recognize
    """
    from .keys import make_key

    plain, record = make_key(name, scope)
    with _store(database, home, new=True) as store:
        store.add_key(record)
    _audit(home).write("command line", "add key", name, scopes=list(record.scopes))
    if as_json:
        print_json({"name": name, "scopes": list(record.scopes), "key": plain})
        return
    print(plain)
    _say("keep it now, it is not shown again; a running endpoint knows it within a second")


@keys.command("list")
def list_keys(database: Database = None, home: Home = None, as_json: AsJson = False) -> None:
    """List the keys, never what they are.

    Example: osml keys list
    """
    with _store(database, home) as store:
        rows = [
            {
                "name": k.name,
                "scopes": list(k.scopes),
                "created_at": k.created_at.isoformat(timespec="seconds"),
                "revoked_at": k.revoked_at.isoformat(timespec="seconds") if k.revoked_at else None,
            }
            for k in store.keys()  # noqa: SIM118 - a store is not a dict
        ]
    if as_json:
        print_json({"keys": rows})
        return
    if not rows:
        print("no keys")
    for row in rows:
        end = f"  revoked {row['revoked_at']}" if row["revoked_at"] else ""
        print(f"{row['name']:24} {','.join(row['scopes']):28} {row['created_at']}{end}")


@keys.command()
def revoke(name: Annotated[str, typer.Argument()], database: Database = None, home: Home = None) -> None:
    """Take a key back; a running endpoint refuses it within a second.

    Example: osml keys revoke camera-1
    """
    with _store(database, home) as store:
        if not store.revoke_key(name):
            records = store.keys()
            there = ", ".join(k.name for k in records if k.revoked_at is None) or "none"
            raise OsmlError(f"there is no key '{name}'; there are: {there}")
    _audit(home).write("command line", "revoke key", name)
    print(f"revoked {name}")


def _settings(file: Path | None, overrides: list[str] | None, **flags: Any) -> ServeConfig:
    from osml_plugin.schema import apply_override, checked, read_yaml

    from .settings import ServeConfig

    values = read_yaml(file) if file is not None else {}
    for override in overrides or []:
        apply_override(values, override, ServeConfig)
    values |= {name: value for name, value in flags.items() if value is not None}
    return checked(values, ServeConfig)


def _there(database: str | None, home: Path | None, new: bool = False) -> ServeConfig:
    """Where an endpoint is, or, if `new`, is to be."""
    config = _settings(None, None, database=database, home=home)
    if config.database_url.startswith("sqlite:///") and not new:
        file = Path(config.database_url.removeprefix("sqlite:///"))
        if not file.exists():
            raise OsmlError(f"there is no store in '{file.parent}': name the --home, or the --database, of an endpoint")
    return config


def _store(database: str | None, home: Path | None, new: bool = False) -> Any:
    needs("serve", "sqlalchemy", "alembic")
    from .store import Store, StoreUnavailable

    config = _there(database, home, new)
    config.home.mkdir(parents=True, exist_ok=True)
    try:
        return closing(Store(config.database_url))
    except StoreUnavailable as error:
        raise OsmlError(str(error)) from error


def _audit(home: Path | None) -> Any:
    from .audit import audit_of

    return audit_of(_settings(None, None, home=home))


def _warnings(address: str) -> list[str]:
    """What the endpoint says of its threshold; its answer is not worth more than a moment."""
    with suppress(OSError, ValueError, KeyError):
        opener = build_opener(ProxyHandler({}))  # an address of this machine needs none of the environment's proxies
        with opener.open(f"{address}/readyz", timeout=5) as answer:
            return json.load(answer)["warnings"]
    return []


def _say(text: str) -> None:
    print(f"osml: {text}", file=sys.stderr, flush=True)


def _where(config: ServeConfig) -> str:
    from .store import shown

    return shown(config.database_url)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
