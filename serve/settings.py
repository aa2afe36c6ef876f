"""What can be set about an endpoint: by flags of `osml serve`, in a YAML file, and as arguments in `serve.yaml`."""

from __future__ import annotations

import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from osml_plugin.schema import Section

from .prefix import OWN

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class Limits(Section):
    """What one request may ask for, and how many at once."""

    body_bytes: Count = 32 * 2**20
    image_bytes: Count = 16 * 2**20
    """Of one image file."""
    images: Count = 64
    """Images or embeddings in one request."""
    pixels: Count = 32_000_000
    """Of one image, counted before it is decoded."""
    request_pixels: Count = 256_000_000
    """Of all images of a request together."""
    frames: Count = 1
    """Of one image: animations are refused."""
    waiting: Count = 256
    """Requests that one replica takes at once; beyond it the answer is 503 with Retry-After."""


class Unknowns(Section):
    """How long, and how many of, the rejected are remembered."""

    keep: Annotated[int, Field(ge=0)] = 10_000
    """The newest so many; 0 remembers none."""
    days: Annotated[float, Field(gt=0)] = 30


class Batching(Section):
    """How images of different requests share a forward pass."""

    size: Count = 64
    """Requests that share one forward pass at most."""
    wait_ms: Annotated[float, Field(ge=0)] = 0
    """How long a batch that is not full waits for more. At 0 a batch takes what came while the last one ran."""


class ServeConfig(Section):
    """One endpoint."""

    model: str | None = None
    """models:/NAME@alias, models:/NAME/7, or a bundle's folder. None: what the store has as its active model."""
    tracking: str | None = None
    """Where MLflow's registry is; None: MLFLOW_TRACKING_URI."""
    home: Path = Path("osml-serve")
    """The folder of the SQLite store, the downloaded models and the audit log."""
    database: str | None = None
    """sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME; None: the environment's OSML_DATABASE, where a password
    is seen by fewer, else sqlite:///HOME/store.db."""
    host: str | None = None
    """The address that it listens on; for `osml serve` 127.0.0.1 where None. Loopback lets this machine in without a
    key as long as there are none. Where Serve was started by other means, it is said in Serve's own http_options, and
    None here means that others may reach it: every request needs a key."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0: any free one."""
    replicas: Count = 1
    max_replicas: Count | None = None
    """Above `replicas`: the number of replicas follows the load."""
    embedders: Annotated[int, Field(ge=0)] = 0
    """0: each replica embeds in its own process, without a hop. Above: so many deployments of the network apart from
    the replicas, which then only decode, search and decide."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """For each process that embeds."""
    follow: bool = False
    """Go over to another version when the alias of `model` does."""
    alpha: Annotated[float, Field(ge=1e-6, lt=1)] | None = None
    """The share of known items that may be rejected; None: what the store or the bundle says."""
    root_path: str = ""
    """The path under which clients see the endpoint where a proxy stands before it, such as /vision; whether the proxy
    takes it away before it passes a request on, or leaves it there."""
    cors: list[str] = []
    """Origins whose pages may call this endpoint; none unless named."""
    trust_factories: list[str] = []
    """Trunk factories (package.module:factory) that bundles may call."""
    limits: Limits = Limits()
    unknowns: Unknowns = Unknowns()
    batching: Batching = Batching()
    proxy: Literal["haproxy", "python"] = "haproxy"
    """What stands before the replicas; HAProxy answers several times as many requests."""

    @field_validator("host")
    @classmethod
    def _address(cls, host: str | None) -> str | None:
        if host not in (None, "localhost"):
            ip_address(host)  # ValueError says what is wrong
        return host

    @field_validator("root_path")
    @classmethod
    def _prefix(cls, path: str) -> str:
        if "://" in path:
            raise ValueError(f"'{path}' is an address: expected the path behind the host alone, such as /vision")
        parts = path.strip("/").split("/") if path.strip("/") else []
        for part in parts:
            if not re.fullmatch(r"[A-Za-z0-9._~-]+", part) or set(part) == {"."}:
                raise ValueError(f"{path!r} is no path: expected letters, digits and -._~ between slashes, as /vision")
        if parts and parts[0] in OWN:
            raise ValueError(f"/{parts[0]} is a path of the endpoint itself: put another one in front, as /vision")
        return "".join(f"/{part}" for part in parts)

    @field_validator("cors")
    @classmethod
    def _origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ValueError(f"'{origin}' is no origin: expected https://HOST[:PORT]")
        return origins

    @property
    def host_is_loopback(self) -> bool:
        return self.host is not None and (self.host == "localhost" or ip_address(self.host).is_loopback)

    @property
    def metrics(self) -> Path:
        """The folder in which the replicas of one machine count together."""
        return self.home.resolve() / "metrics"

    @property
    def database_url(self) -> str:
        return self.database or os.environ.get("OSML_DATABASE") or f"sqlite:///{self.home.resolve()}/store.db"
