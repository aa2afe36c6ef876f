"""What the endpoint does, without HTTP and without Ray: recognise, learn, forget, and follow the store."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from osml_plugin import OpenSetRecognizer
from osml_plugin.errors import OsmlError
from osml_plugin.recognizer import Recognition
from osml_plugin.thresholds import DriftWatch

from . import metrics
from .audit import Audit, audit_of
from .batcher import Batcher
from .embedder import Embedder, embed_together
from .images import BadImage, decode, pixels_of
from .keys import KeyRing, keys_required
from .live import Live, Snapshot
from .settings import ServeConfig
from .shelf import Address, Shelf
from .store import NewItem, Observation, StaleModel, Store, StoreUnavailable, Write, Written, new_id, shown
from .vectors import VECTOR, packed

logger = logging.getLogger("osml.serve")

POLL = 0.2
"""Seconds between looks at the store: a write is on every replica within one, the time to fit included."""
SMALL = 100_000
"""Bytes of images below which decoding takes less time than handing it to a thread."""
INLINE = 1_000_000
"""Pixels of a request up to which the same holds."""
WRITABLE_S = 1.0
"""Seconds between looks at whether the store can be written."""
RETRY_S = 60.0
"""Seconds after which a model version that could not be prepared is tried again, where the alias is followed."""
WATCHED = 1000
"""Items between two looks at whether the calibration still holds."""

RemoteEmbed = Callable[[str, Tensor], Awaitable[Tensor]]
"""Model version and images `(N, C, H, W)` in, embeddings `(N, D)` out, by another process."""


@dataclass(frozen=True)
class Item:
    """One image or embedding of a request."""

    content: bytes | None
    """What was sent, for another model to embed; None: an embedding, which no other can."""
    media_type: str
    input: Tensor
    """The decoded image `(C, H, W)`, or the vector."""


@dataclass(frozen=True)
class Question:
    """What one request asks; it is answered by one snapshot from beginning to end."""

    snapshot: Snapshot
    items: Sequence[Item]
    neighbours: int | None
    """References to name for each item; None: embeddings are wanted, and no recognition."""


@dataclass(frozen=True)
class Reply:
    """Embeddings `(N, D)`, and what the items are."""

    embeddings: Tensor
    results: list[dict[str, Any]]


class Service:
    """One replica."""

    def __init__(self, config: ServeConfig, *, embed: RemoteEmbed | None = None, name: str = "local"):
        self.config, self.name = config, name
        self.store = Store(config.database_url)
        self.shelf = Shelf(config.home, config.trust_factories)
        self.audit = audit_of(config)
        ask(self.store, self.shelf, config, self.audit)
        self.live = Live(self.store, self.shelf)
        self._remote = embed
        self._embedders: dict[str, Embedder] = {}
        self._torch = ThreadPoolExecutor(1, thread_name_prefix="torch")
        self._writers = ThreadPoolExecutor(4, thread_name_prefix="writer")
        self._batches = Batcher(
            self._answer, config.batching.size, config.batching.wait_ms / 1000, metrics.batch_size.observe
        )
        self._observations = Batcher(self._observe, 256)
        self._unknown_share = metrics.Share()
        self._drift: DriftWatch | None = None
        self._calibrated: tuple | None = None
        self._since = 0
        self._keys_version = -1
        self.store_is_up = True
        """Whether the store answered when it was last asked."""
        self.store_is_read_only = False
        self._asked_writable = -math.inf
        self._preparing: str | None = None
        self._unloadable: str | None = None
        self.keyring = KeyRing((), required=True)
        self._look()
        self._stop = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="follow-store", daemon=True)
        self._poller.start()
        logger.info("replica %s answers from model %s", name, self.live.snapshot.model)

    def close(self) -> None:
        logger.info("replica %s stops", self.name)
        self._stop.set()
        self._poller.join(timeout=5)
        self._torch.shutdown(wait=False)
        self._writers.shutdown(wait=True)
        self.store.close()

    def check(self) -> None:
        """Raise where this replica should be replaced."""
        if not self._poller.is_alive():
            raise RuntimeError("this replica does not follow the store any more")

    # Which model ------------------------------------------------------------------------------------------

    def configure(self, config: ServeConfig) -> None:
        """Take another configuration; model and rate have effect if this one asks for others than the one before."""
        self.config = config
        ask(self.store, self.shelf, config, self.audit)

    def change_model(self, by: Write, address: Address, asked: dict[str, Any] | None = None) -> Written:
        """Go over to another model version: at once, or when all that was enrolled has been embedded by it."""
        return change_model(self.store, self.shelf, by, address, asked)

    # Recognition ------------------------------------------------------------------------------------------

    async def items(
        self, contents: Sequence[bytes], vectors: Sequence[Sequence[float]] | None
    ) -> tuple[Snapshot, list[Item]]:
        """The inputs of a request, checked and decoded for the model that is active now."""
        snapshot = self.live.snapshot
        if vectors is not None:
            return snapshot, _vectors(snapshot.recognizer, vectors)
        form = snapshot.recognizer.preprocessing
        if form is None:
            raise OsmlError("this model takes embeddings, not images: send JSON with 'embeddings'")

        def decoded() -> list[Item]:
            items = []
            for i, content in enumerate(contents):
                try:
                    pixels, media_type = decode(content, form, self.config.limits)
                except BadImage as error:
                    raise BadImage(f"image {i}: {error}" if len(contents) > 1 else str(error)) from None
                items.append(Item(content, media_type, pixels))
            return items

        if sum(map(len, contents)) < SMALL and sum(map(pixels_of, contents)) < INLINE:
            return snapshot, decoded()
        return snapshot, await asyncio.to_thread(self._bounded, contents, decoded)

    def _bounded(self, contents: Sequence[bytes], decoded: Callable[[], list[Item]]) -> list[Item]:
        """Few bytes can be many pixels: what a request costs is known before it is paid."""
        most = self.config.limits.request_pixels
        if sum(map(pixels_of, contents)) > most:
            raise OsmlError(f"the images of one request are more than {most:,} pixels in all: send fewer at once")
        return decoded()

    async def embed(self, snapshot: Snapshot, items: Sequence[Item]) -> Tensor:
        """Embeddings `(N, D)`."""
        return (await self._batches(Question(snapshot, items, None))).embeddings

    async def recognize(
        self, snapshot: Snapshot, items: Sequence[Item], *, neighbours: int, remember: bool
    ) -> list[dict[str, Any]]:
        """A result for each item; the unknown ones are remembered."""
        reply = await self._batches(Question(snapshot, items, neighbours))
        self._count(snapshot, reply.results)
        if remember and self.config.unknowns.keep:
            unknown = [i for i, r in enumerate(reply.results) if not r["known"]]
            if unknown:
                await self._remember(snapshot, items, reply, unknown)
        return reply.results

    async def _remember(self, snapshot: Snapshot, items: Sequence[Item], reply: Reply, unknown: list[int]) -> None:
        """Where the store does not take them, the answer is still an answer, without observation ids."""
        observations = []
        for i in unknown:
            result = reply.results[i]
            item = NewItem(reply.embeddings[i].numpy(), items[i].content, items[i].media_type)
            observations.append(
                Observation(new_id(), item, snapshot.model, result["score"], result["nearest"], result["p_value"])
            )
        try:
            await self._observations(observations)
        except StoreUnavailable as error:
            metrics.not_remembered.inc(len(unknown))
            logger.warning("%d unknown items are not remembered: %s", len(unknown), error)
            return
        for i, observation in zip(unknown, observations, strict=True):
            reply.results[i]["observation_id"] = observation.id

    async def _observe(self, batches: Sequence[list[Observation]]) -> list[None]:
        together = [observation for batch in batches for observation in batch]
        await asyncio.get_running_loop().run_in_executor(self._writers, self.store.observe, together)
        return [None] * len(batches)

    async def _answer(self, questions: Sequence[Question]) -> list[Reply]:
        """All questions that came together; those of one snapshot share the forward pass and the search."""
        replies: list[Reply | None] = [None] * len(questions)
        for snapshot in {id(q.snapshot): q.snapshot for q in questions}.values():
            places = [i for i, q in enumerate(questions) if q.snapshot is snapshot]
            for i, reply in zip(places, await self._of_one(snapshot, [questions[i] for i in places]), strict=True):
                replies[i] = reply
        return replies

    async def _of_one(self, snapshot: Snapshot, questions: Sequence[Question]) -> list[Reply]:
        parts = [torch.stack([item.input for item in q.items]) for q in questions]
        images = _images(parts)
        if self._remote is not None and images:
            together = await self._remote(snapshot.model, torch.cat([parts[i] for i in images]))
            for i, embeddings in zip(images, together.split([len(parts[i]) for i in images]), strict=True):
                parts[i] = embeddings
        return await asyncio.get_running_loop().run_in_executor(self._torch, self._replies, snapshot, questions, parts)

    def _replies(self, snapshot: Snapshot, questions: Sequence[Question], parts: list[Tensor]) -> list[Reply]:
        recognizer, images = snapshot.recognizer, _images(parts)
        if images:
            together = embed_together(self._embedder(snapshot), [parts[i] for i in images])
            for i, embeddings in zip(images, together, strict=True):
                parts[i] = embeddings
        elif recognizer.preprocessing is None:
            sizes = [len(part) for part in parts]
            parts = list(recognizer.embed(torch.cat(parts)).split(sizes))
        replies = [Reply(part, []) for part in parts]
        asking = [i for i, q in enumerate(questions) if q.neighbours is not None]
        if asking:
            wanted = max(questions[i].neighbours for i in asking)
            found = results(recognizer.recognize(torch.cat([parts[i] for i in asking]), neighbours=wanted))
            for i in asking:
                mine, found = found[: len(parts[i])], found[len(parts[i]) :]
                for result in mine:
                    result["neighbours"] = result["neighbours"][: questions[i].neighbours]
                replies[i] = Reply(parts[i], mine)
        return replies

    def _embedder(self, snapshot: Snapshot) -> Embedder:
        if snapshot.model not in self._embedders:
            self._embedders = {snapshot.model: Embedder(snapshot.recognizer)} | dict(list(self._embedders.items())[:1])
        return self._embedders[snapshot.model]

    def _count(self, snapshot: Snapshot, found: Sequence[dict[str, Any]]) -> None:
        unknown = [not r["known"] for r in found]
        metrics.items.labels("unknown").inc(sum(unknown))
        metrics.items.labels("known").inc(len(found) - sum(unknown))
        metrics.unknown_rate.set(self._unknown_share.add(unknown))
        spread = snapshot.spread
        for r in found:
            if r["threshold"] is not None:
                metrics.scores.observe((r["score"] - r["threshold"]) / spread)
        alpha = snapshot.recognizer.kept_rate
        if alpha is None or found[0]["p_value"] is None:
            return
        calibrated = (snapshot.model, alpha, len(snapshot.recognizer.calibration_scores))
        if self._calibrated != calibrated:
            self._drift, self._calibrated = DriftWatch(alpha, n_calibration=calibrated[2]), calibrated
        self._drift.add([r["p_value"] for r in found])
        self._since += len(found)
        if self._since < WATCHED:
            return  # one window, one verdict: asked again and again it would raise more false alarms than it says
        self._since, drift = 0, self._drift.drift()
        if drift is not None:
            metrics.known_rejected.set(drift.known_rejected)
            metrics.calibration_stale.set(drift.stale)

    # Learning ---------------------------------------------------------------------------------------------

    async def enroll(
        self, by: Write, name: str, contents: Sequence[bytes], vectors: Sequence[Sequence[float]] | None
    ) -> tuple[Snapshot, Written]:
        """Examples of a class; committed, and known to this replica, when this returns."""
        while True:
            snapshot, items = await self.items(contents, vectors)
            embeddings = (await self.embed(snapshot, items)).numpy()
            new = [NewItem(row, item.content, item.media_type) for row, item in zip(embeddings, items, strict=True)]
            try:
                return await self.written(self.store.enroll, by, name, new, snapshot.model)
            except StaleModel:  # another model became the active one meanwhile
                await asyncio.to_thread(self.live.catch_up)

    async def written(self, verb: Callable[..., Written], by: Write, *args: Any) -> tuple[Snapshot, Written]:
        """Do a write of the store, audit it, and let this replica take it in. A client that hangs up does not stop it:
        what has begun in its thread goes on to its end."""
        return await asyncio.shield(
            asyncio.get_running_loop().run_in_executor(self._writers, self.write, verb, by, *args)
        )

    def write(self, verb: Callable[..., Written], by: Write, *args: Any) -> tuple[Snapshot, Written]:
        written = verb(by, *args)
        if not written.replayed:
            self.audit.write(
                by.actor,
                verb.__name__,
                next((a for a in args if isinstance(a, str)), ""),
                **written.result,
                gallery_version=written.gallery_version,
                key=by.key,
            )
        try:
            return self.live.catch_up(written.gallery_version), written
        except StoreUnavailable:
            pass  # it is committed; this replica learns of it when the store is back
        except Exception:
            logger.exception("a committed write could not be taken in")
        return self.live.snapshot, written

    # Following the store ----------------------------------------------------------------------------------

    def _poll(self) -> None:
        failed = None
        while not self._stop.wait(POLL):
            try:
                self._look()
                failed = None
            except StoreUnavailable as error:
                if self.store_is_up:
                    logger.error("the store does not answer: %s", error)
                self.store_is_up = False
                metrics.store_up.set(0)
            except Exception as error:
                if repr(error) != failed:  # it is tried again, and said once
                    logger.exception("a change of the store could not be taken in")
                failed = repr(error)

    def _look(self) -> None:
        state = self.store.state()
        if not self.store_is_up:
            logger.warning("the store answers again")
        self.store_is_up = True
        metrics.store_up.set(1)
        if time.monotonic() - self._asked_writable > WRITABLE_S:
            read_only, self._asked_writable = self.store.is_read_only(), time.monotonic()
            if read_only != self.store_is_read_only:
                logger.warning("the store %s", "is read-only" if read_only else "can be written again")
            self.store_is_read_only = read_only
        if state.keys_version != self._keys_version:
            keys = self.store.keys()
            self.keyring = KeyRing(keys, required=keys_required(self.config.host_is_loopback, keys))
            self._keys_version = state.keys_version
        if state.pending not in (None, state.model, self._preparing):
            # Loading takes seconds, and keys and gallery are to be followed meanwhile.
            self._preparing = state.pending
            threading.Thread(target=self._prepare, args=(state.pending,), name="prepare", daemon=True).start()
        snapshot = self.live.snapshot
        if (state.gallery_version, state.model) != (snapshot.gallery_version, snapshot.model):
            before, snapshot = snapshot, self.live.catch_up()
            if snapshot.model != before.model:
                logger.info("replica %s goes over from model %s to %s", self.name, before.model, snapshot.model)
        self._tell(snapshot)

    def _prepare(self, model: str) -> None:
        try:
            self.shelf.load(model)
        except Exception as error:
            if repr(error) != self._unloadable:  # it is tried again, and said once
                logger.warning("model %s cannot be loaded yet: %s", model, error)
            self._unloadable, self._preparing = repr(error), None

    def _tell(self, snapshot: Snapshot) -> None:
        metrics.references.set(len(snapshot.recognizer.gallery))
        metrics.classes.set(len(snapshot.recognizer.gallery.classes))
        metrics.gallery_version.labels(self.name).set(snapshot.gallery_version)
        metrics.alpha.set(snapshot.recognizer.kept_rate or math.nan)


def ask(store: Store, shelf: Shelf, config: ServeConfig, audit: Audit, *, anew: bool = False) -> None:
    """Have the configured model and rate take effect, if the configuration did not ask for them before: what was
    changed by hand since stays. Replicas that start ask, too; `anew` is for a person who does: then the alias, or the
    folder, is looked at again.

    Raises:
        OsmlError: for a model that is not there, and where there is none at all.
    """
    asked = store.state().asked
    if config.model is not None and (anew or config.follow or asked.get("model") != config.model):
        address = shelf.resolve(config.model)
        now = {"model": config.model, "version": address.version}
        if now != {name: asked.get(name) for name in now} or _failed(store, address.version, RETRY_S * (not anew)):
            written = change_model(store, shelf, Write("configuration"), address, now)
            audit.write("configuration", "ask_model", address.version, **written.result)
    if config.alpha is not None and asked.get("alpha") != config.alpha:
        store.set_alpha(Write("configuration"), config.alpha, {"alpha": config.alpha})
        audit.write("configuration", "set_alpha", "", alpha=config.alpha)
    if store.state().model is None:
        raise OsmlError(
            "there is nothing to serve: name a bundle or models:/NAME@champion; the store "
            f"'{shown(config.database_url)}' has no model yet"
        )


def _failed(store: Store, version: str, since_s: float) -> bool:
    """Whether the last preparation of this version failed, so many seconds ago at least: a disk that was full or a
    registry that was away need not be so for ever."""
    last = next((job for job in store.jobs("model", 20) if job.args.get("version") == version), None)
    if last is None or last.state != "failed" or last.error == "superseded":
        return False
    return (datetime.now(UTC) - last.finished_at).total_seconds() >= since_s


def change_model(
    store: Store, shelf: Shelf, by: Write, address: Address, asked: dict[str, Any] | None = None
) -> Written:
    return store.ask_model(by, address.version, address.source, shelf.class_names(address.version), asked)


def results(found: Recognition) -> list[dict[str, Any]]:
    """A recognition as plain JSON, an object for each item."""
    return [
        {
            "label": found.names[i],
            "known": found.names[i] is not None,
            "nearest": found.nearest[i],
            "score": float(found.scores[i]),
            "threshold": float(found.thresholds[i]) if math.isfinite(found.thresholds[i]) else None,
            "p_value": None if found.p_values is None else float(found.p_values[i]),
            "neighbours": [n._asdict() for n in found.neighbours[i]] if found.neighbours else [],
            "observation_id": None,
        }
        for i in range(len(found))
    ]


def fingerprint(*parts: str | bytes) -> str:
    """Of a request, so that a key used twice for different ones is noticed."""
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _images(parts: Sequence[Tensor]) -> list[int]:
    """The places of those that are images, not embeddings."""
    return [i for i, part in enumerate(parts) if part.ndim == 4]


def input_width(recognizer: OpenSetRecognizer) -> int:
    """Of the vectors that this model takes."""
    if recognizer.preprocessing is None and recognizer.model is not None:
        return recognizer.details["input"]["size"]
    return recognizer.gallery.embeddings.shape[1]


def _vectors(recognizer: OpenSetRecognizer, vectors: Sequence[Sequence[float]]) -> list[Item]:
    rows = torch.tensor(vectors, dtype=torch.float32)
    width = input_width(recognizer)
    if rows.shape[1] != width:
        raise OsmlError(f"embeddings are {rows.shape[1]} wide, but this model takes {width} numbers for each item")
    if not bool((rows != 0).any(dim=1).all()):
        raise OsmlError("an embedding is all zeros, which has no direction: leave it out")
    # An embedding that stands in for an image cannot be embedded by another model, a network's input can.
    kept = recognizer.preprocessing is None
    return [Item(packed(row.numpy()) if kept else None, VECTOR, row) for row in rows]
