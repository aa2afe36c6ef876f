"""The Ray Serve deployments: shells around `Service` and `Embedder`, and the builder that `serve.yaml` names."""

# No `from __future__ import annotations` here: Ray reads the type of `build`'s argument to make it from a YAML file's.

import asyncio
import logging
import os
from typing import Any

import numpy as np
import ray
import torch
from ray import serve
from ray.serve import Application
from ray.serve._private import replica
from ray.serve.config import AutoscalingConfig
from ray.serve.handle import DeploymentHandle

from osml_plugin.errors import OsmlError

from .application import make_app
from .batcher import Batcher
from .embedder import Embedder, embed_together
from .jobs import Jobs
from .metrics import SHARED
from .service import Service
from .settings import ServeConfig
from .shelf import Shelf

BUSY = 64
"""Requests under way in a replica at which another one is wanted, where their number follows the load."""


@serve.deployment(name="Embedder")
class EmbedderDeployment:
    """The network in processes of its own, on GPUs where there are some."""

    def __init__(self, config: ServeConfig):
        _set_up(config)
        self._shelf = Shelf(config.home, config.trust_factories)
        self._batching = config.batching
        self._embedders: dict[str, tuple[Embedder, Batcher]] = {}

    async def embed(self, model: str, images: np.ndarray) -> np.ndarray:
        """Embeddings `(N, D)` of uint8 images `(N, C, H, W)`."""
        if model not in self._embedders:
            embedder = Embedder(await asyncio.to_thread(self._shelf.load, model))

            async def together(requests):
                return embed_together(embedder, requests)

            batches = Batcher(together, self._batching.size, self._batching.wait_ms / 1000)
            # The active one, and the one before or after it.
            self._embedders = dict(list(self._embedders.items())[-1:]) | {model: (embedder, batches)}
        return (await self._embedders[model][1](torch.from_numpy(images))).numpy()


@serve.deployment(name="Endpoint")
@serve.ingress()
class Endpoint:
    """HTTP in, HTTP out: decodes, embeds (or has it done), searches, decides, and follows the store."""

    def __init__(self, config: ServeConfig, embedder: DeploymentHandle | None = None):
        _set_up(config)
        _check_store_reaches(config)
        self._config = config

        async def embed(model: str, images: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(await embedder.embed.remote(model, images.numpy()))

        name = serve.get_replica_context().replica_id.unique_id
        self.service = Service(config, embed=embed if embedder is not None else None, name=name)
        self.jobs = Jobs(self.service)

    def __serve_build_asgi_app__(self) -> Any:
        return make_app(self.service)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Another rate, of a `serve deploy` that changes only `user_config`: no process starts again."""
        unknown = set(user_config) - {"alpha", "follow"}
        if unknown:
            raise OsmlError(f"user_config holds {', '.join(sorted(unknown))}: expected alpha and follow")
        self.service.configure(ServeConfig.model_validate(self._config.model_dump() | user_config))

    def check_health(self) -> None:
        self.service.check()


def build(args: ServeConfig) -> Application:
    """The application, as `serve deploy` and `osml serve` run it."""
    config = args
    endpoint = Endpoint.options(
        # What waits beyond it is refused by the endpoint itself, before its body is read.
        max_ongoing_requests=config.limits.waiting + 64,
        ray_actor_options={
            "num_cpus": 0,
            "num_gpus": 0 if config.embedders else config.gpus,
            "runtime_env": {"env_vars": {SHARED: str(config.metrics)}},  # read when prometheus_client is imported
        },
        health_check_period_s=5,
        graceful_shutdown_timeout_s=15,
        **_number(config),
    )
    if not config.embedders:
        return endpoint.bind(config)
    embedder = EmbedderDeployment.options(
        num_replicas=config.embedders,
        max_ongoing_requests=4 * config.batching.size,
        ray_actor_options={"num_cpus": 0, "num_gpus": config.gpus},
    )
    return endpoint.bind(config, embedder.bind(config))


def _number(config: ServeConfig) -> dict[str, Any]:
    most = config.max_replicas or config.replicas
    if most < config.replicas:
        raise OsmlError(f"max_replicas is {most}, but there are {config.replicas} replicas to begin with: raise it")
    if most == config.replicas:
        return {"num_replicas": config.replicas}
    follow = AutoscalingConfig(min_replicas=config.replicas, max_replicas=most, target_ongoing_requests=BUSY)
    return {"autoscaling_config": follow}


def _set_up(config: ServeConfig) -> None:
    _stay_on_loopback()
    config.metrics.mkdir(parents=True, exist_ok=True)
    os.close(os.open(config.home / "serve.log", os.O_CREAT | os.O_APPEND, 0o600))
    handler = logging.FileHandler(config.home / "serve.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every odd body
    for name in ("osml.serve", "osml.audit"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    if config.tracking is not None:
        os.environ["MLFLOW_TRACKING_URI"] = config.tracking


def _stay_on_loopback() -> None:
    """Where Ray's node is 127.0.0.1 (`osml serve`), the replica's port for other replicas is on loopback as well: Serve
    would open it on every interface."""
    if ray.util.get_node_ip_address() == "127.0.0.1":
        listen = replica.add_port_to_grpc_server
        replica.add_port_to_grpc_server = lambda server, address: listen(server, address.replace("[::]", "127.0.0.1"))


def _check_store_reaches(config: ServeConfig) -> None:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if config.database_url.startswith("sqlite") and len(nodes) > 1:
        raise OsmlError(
            f"this cluster has {len(nodes)} nodes, and a SQLite store is on one machine: replicas on the others would "
            "not see it; set database to postgresql://USER:PASSWORD@HOST/NAME"
        )
