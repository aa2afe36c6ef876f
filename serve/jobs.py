"""Work in the background: groups of the unknown, and the embeddings of another model version. Jobs are claimed in the
store, for a while; whoever dies with one leaves it to another replica."""

from __future__ import annotations

import logging
import threading
import time

import numpy as np
import torch

from osml_plugin import OpenSetRecognizer
from osml_plugin.discovery import confirmed
from osml_plugin.errors import OsmlError
from osml_plugin.presence import is_model_uri

from .embedder import Embedder
from .images import BadImage, decode
from .service import Service, input_width
from .store import Group, Job, StoreUnavailable
from .vectors import unpacked

logger = logging.getLogger("osml.serve")

LEASE = 15.0
"""Seconds after which a job whose worker says nothing is another's."""
AT_ONCE = 128
"""Images that are embedded between two words to the store."""
GROUPED = 50_000
"""The newest unknown items that a discovery looks at."""
EVERY = {"jobs": 0.5, "retention": 30.0, "alias": 5.0}
"""Seconds between looks."""


class LostLease(Exception):
    """The job is another's by now, or was given up."""


class Jobs:
    """One thread of a replica."""

    def __init__(self, service: Service):
        self._service, self._store = service, service.store
        self._worker = f"{service.name}/{id(self):x}"
        self._last = dict.fromkeys(EVERY, 0.0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            for kind, what in (("jobs", self._next), ("retention", self._look_after), ("alias", self._follow)):
                if time.monotonic() - self._last[kind] < EVERY[kind]:
                    continue
                try:
                    what()
                except StoreUnavailable:
                    pass  # the service says so
                except OsmlError as error:
                    logger.warning("%s", error)
                except Exception:
                    logger.exception("a background task failed")
                self._last[kind] = time.monotonic()

    def _follow(self) -> None:
        config = self._service.config
        if config.follow and config.model is not None and is_model_uri(config.model):
            self._service.configure(config)

    def _next(self) -> None:
        job = self._store.claim_job(self._worker, LEASE)
        if job is None:
            return
        work = {"discovery": self._discover, "model": self._prepare}[job.kind]
        try:
            with Lease(self._store, job, self._worker) as lease:
                work(job, lease)
        except LostLease:
            logger.info("job %s is another's by now", job.id)
        except StoreUnavailable:
            raise
        except Exception as error:
            if not isinstance(error, OsmlError):
                logger.exception("job %s failed", job.id)
            self._store.fail_job(job.id, self._worker, " ".join(str(error).split())[:500] or type(error).__name__)

    # Discovery --------------------------------------------------------------------------------------------

    def _discover(self, job: Job, lease: Lease) -> None:
        snapshot = self._service.live.snapshot
        ids, embeddings = self._store.unknown_embeddings(snapshot.model, GROUPED)
        result = {
            "n_items": len(ids),
            "n_classes": 0,
            "n_classes_interval": [0, 0],
            "left_out": 0,
            "too_few": 0,
            "note": "",
        }
        groups: list[Group] = []
        if len(ids):
            wanted = job.args["n_classes"]
            if wanted is not None and wanted > len(ids):
                raise OsmlError(f"there are {len(ids)} unknown items, which cannot be {wanted} classes")
            links = self._store.links()
            found = snapshot.recognizer.group(
                torch.from_numpy(embeddings),
                n_classes=wanted,
                must_link=confirmed([links.get(id) for id in ids])[0],
                seed=job.args["seed"],
                progress=lease.at,
            )
            result |= {
                "n_classes": found.n_classes,
                "n_classes_interval": list(found.n_classes_interval),
                "left_out": int((found.labels < 0).sum()),
                "too_few": int(found.too_few.sum()),
                "note": found.note,
            }
            for number in range(found.n_classes):
                inside = np.flatnonzero(found.labels == number)
                exemplars = list(found.exemplars[number])
                rest = sorted(set(inside.tolist()) - set(exemplars), key=lambda i: -found.confidence[i])
                groups.append(
                    Group(
                        number,
                        float(found.confidence[inside].mean()),
                        members=tuple(ids[i] for i in [*exemplars, *rest]),
                        exemplars=tuple(ids[i] for i in exemplars),
                    )
                )
        if not self._store.finish_discovery(job.id, self._worker, groups, result):
            raise LostLease

    # Another model ----------------------------------------------------------------------------------------

    def _prepare(self, job: Job, lease: Lease) -> None:
        """Embed by the new model all that was sent, what comes meanwhile too, then go over to it."""
        version = job.args["version"]
        total, done = max(1, self._store.count_without_embedding(version)), 0
        while True:
            embedded = self._embed_missing(version)
            if embedded:
                done += embedded
                lease.at(min(1.0, done / total))
            elif self._store.finish_model(job.id, version):
                self._service.audit.write("configuration", "activate_model", version, job=job.id)
                return
            elif not self._store.renew(job.id, self._worker, 1.0, LEASE):
                raise LostLease

    def _embed_missing(self, version: str) -> int:
        """Embed some of the items that this model has not embedded; how many they were."""
        batch = self._store.without_embedding(version, AT_ONCE)
        if not batch:
            return 0
        recognizer = self._service.shelf.load(version)
        inputs, ids, found = [], [], {}
        for item, content in batch:
            try:
                inputs.append(self._input(content, recognizer))
                ids.append(item)
            except BadImage as error:
                found[item] = None
                logger.warning("item %s is not known to model %s: %s", item, version, error)
        if ids:
            embed = Embedder(recognizer) if recognizer.preprocessing is not None else recognizer.embed
            found |= dict(zip(ids, embed(torch.stack(inputs)).numpy(), strict=True))
        self._store.add_embeddings(version, found)
        return len(batch)

    def _look_after(self) -> None:
        self._store.reserve_room()
        kept = self._service.config.unknowns
        self._store.prune_unknowns(kept.keep, kept.days)
        # Those that a replica was still rejecting by the model before, when the present one took over.
        self._embed_missing(self._service.live.snapshot.model)

    def _input(self, content: bytes, recognizer: OpenSetRecognizer) -> torch.Tensor:
        """What the model takes: a decoded image, or a vector. Raises `BadImage` for the other of the two."""
        if recognizer.preprocessing is not None:
            return decode(content, recognizer.preprocessing, self._service.config.limits)[0]
        width = input_width(recognizer)
        if len(content) != 4 * width:
            raise BadImage(f"it is no vector of {width} numbers, which is what this model takes")
        return torch.from_numpy(unpacked(content))


class Lease:
    """Tells the store now and then, from a thread of its own, that the job is being worked on."""

    def __init__(self, store, job: Job, worker: str):
        self._store, self._job, self._worker = store, job, worker
        self._progress, self._lost = job.progress, False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def at(self, progress: float) -> None:
        """So far, 0 to 1. Raises LostLease where it is no use to go on."""
        self._progress = progress
        if self._lost:
            raise LostLease

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._done.wait(0.5):
            try:
                if not self._store.renew(self._job.id, self._worker, self._progress, LEASE):
                    self._lost = True
                    return
            except StoreUnavailable:
                pass  # it may come back before the lease ends
