"""The classes and their examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from osml_plugin.errors import OsmlError, unknown_name
from osml_plugin.names import canonical, class_name, further_names

from .errors import Conflict, NotThere, StaleModel
from .ledger import Change, Ledger, batches, from_blob, new_id, now, read_state, to_blob
from .records import Changes, Example, ItemChange, NewItem, Write, Written
from .tables import embeddings, images, items, models, trained_classes


class Gallery(Ledger):
    """Enrolment, renaming, forgetting. The current classes are those of the active bundle, under the names that they
    were given since, and those that have examples.

    Names may come in any Unicode form, and are stored in the canonical one. A new class must have a name that a class
    may have, and that looks like no other: `OsmlError`.
    """

    def classes(self) -> dict[str, int]:
        """The current names, sorted, and how many examples each has (none: references of the bundle only)."""
        with self._database.read() as connection:
            model = read_state(connection).model
            counted = select(items.c.name, func.count()).where(items.c.state == "example").group_by(items.c.name)
            enrolled = dict(connection.execute(counted).all())
            return {name: enrolled.get(name, 0) for name in sorted(bundle_names(connection, model) | enrolled.keys())}

    def examples(self, name: str, limit: int, after: str | None = None) -> tuple[list[Example], str | None]:
        """Examples of a class, the oldest first, from behind `after`; and what to give as `after` for more."""
        name = canonical(name)
        with self._database.read() as connection:
            _require(_current_names(connection, read_state(connection).model), name)
            query = select(items.c.id, items.c.created_at, items.c.has_image).where(*_examples_of(name))
            if after is not None:
                query = query.where(items.c.id > after)
            found = [Example(*row) for row in connection.execute(query.order_by(items.c.id).limit(limit + 1))]
        return found[:limit], found[limit - 1].id if len(found) > limit else None

    def changes_since(self, version: int, model: str) -> Changes:
        """State, renamings and all items changed after `version`, at one moment. Up to version 0: every example.

        A replica at `version` that was filled by the same `model` is at `Changes.state` when it has applied them.
        """
        joined = items.outerjoin(embeddings, (embeddings.c.item_id == items.c.id) & (embeddings.c.model == model))
        query = select(items.c.id, items.c.name, embeddings.c.vector).select_from(joined)
        query = query.where(items.c.version > version)
        if version <= 0:
            query = query.where(items.c.state == "example")
        with self._database.read() as connection:
            state = read_state(connection)
            trained = dict(connection.execute(select(trained_classes)).all())
            # By pieces: PostgreSQL ends a statement that runs long, and its whole answer would be here twice.
            rows = connection.execute(query, execution_options={"yield_per": 5000})
            found = tuple(
                ItemChange(id, name, from_blob(blob) if name is not None and blob else None) for id, name, blob in rows
            )
        return Changes(state, trained, found)

    def enroll(self, by: Write, name: str, new: Sequence[NewItem], model: str) -> Written:
        """Examples of a class, new or not, embedded by `model`. Result: name, n_examples, example_ids.

        Raises `StaleModel` where `model` is not the active one.
        """

        def change(this: Change) -> dict:
            if this.state.model != model:
                raise StaleModel(f"embedded by model '{model}', but '{this.state.model}' is active: embed again")
            if not new:
                raise OsmlError("nothing to enroll: expected one example or more")
            ids, of = [new_id() for _ in new], _further(this, name)
            columns = {"state": "example", "name": of, "version": this.next_version()}
            insert_items(this.connection, model, [(id, item, columns) for id, item in zip(ids, new, strict=True)])
            return {"name": of, "n_examples": len(ids), "example_ids": ids}

        return self._write(by, "enroll", name, change)

    def enroll_observations(self, by: Write, name: str, ids: Sequence[str]) -> Written:
        """Unknown items become examples of a class. Result: name, n_examples, example_ids.

        Raises `NotThere` where one is not in the unknown pool, `StaleModel` where one has no embedding by the active
        model yet, `OsmlError` where one cannot get any, as it came without an image.
        """

        def change(this: Change) -> dict:
            unique = require_unknown(this.connection, ids)
            if out := without_embedding_for_ever(this, unique):
                raise OsmlError(
                    f"item '{out[0]}' is an embedding by another model than the active '{this.state.model}', and has "
                    "no image: expected items with images; recognize it again to enroll it"
                )
            return become_examples(this, name, unique)

        return self._write(by, "enroll", name, change)

    def rename(self, by: Write, old: str, new: str) -> Written:
        """Result: name, n_examples. Raises `NotThere`; `Conflict` where `new` is taken (`merge` joins classes)."""
        old, new = canonical(old), class_name(new)

        def change(this: Change) -> dict:
            names = _current_names(this.connection, this.state.model)
            _require(names, old)
            if new in names:
                raise Conflict(f"there is a class '{new}' already: choose another name, or merge '{old}' into it")
            further_names([new], names - {old})
            return {"name": new, "n_examples": _give_name(this, old, new)}

        return self._write(by, "rename", old, change)

    def merge(self, by: Write, source: str, into: str) -> Written:
        """All of `source` becomes `into`. Result: name, n_examples (those moved). Raises `NotThere`, `Conflict`."""
        source, into = canonical(source), canonical(into)

        def change(this: Change) -> dict:
            names = _current_names(this.connection, this.state.model)
            _require(names, source)
            _require(names, into)
            if source == into:
                raise Conflict(f"class '{source}' cannot be merged into itself: name another one")
            _require_two(recognized_names(this.connection, this.state.model) - {source})
            return {"name": into, "n_examples": _give_name(this, source, into)}

        return self._write(by, "merge", source, change)

    def forget(self, by: Write, name: str) -> Written:
        """A class and all its examples go; references of the bundle never come back. Result: name, n_examples.

        Raises `NotThere`, and `Conflict` where fewer than two classes would remain.
        """
        name = canonical(name)

        def change(this: Change) -> dict:
            names = _current_names(this.connection, this.state.model)
            _require(names, name)
            _require_two(recognized_names(this.connection, this.state.model) - {name})
            return {"name": name, "n_examples": _give_name(this, name, None)}

        return self._write(by, "forget", name, change, frees=True)

    def remove_example(self, by: Write, name: str, id: str) -> Written:
        """Result: name, n_examples, example_ids. Raises `NotThere`, and `Conflict` as `forget` does."""
        name = canonical(name)

        def change(this: Change) -> dict:
            one = [*_examples_of(name), items.c.id == id]
            _require(_current_names(this.connection, this.state.model), name)
            if not _update_examples(this, one, None):
                raise NotThere(f"class '{name}' has no example '{id}': list its examples")
            _require_two(recognized_names(this.connection, this.state.model))
            return {"name": name, "n_examples": 1, "example_ids": [id]}

        return self._write(by, "remove example", name, change, frees=True)

    def set_alpha(self, by: Write, alpha: float | None, asked: Mapping[str, Any] | None = None) -> Written:
        """The share of known items that may be rejected; None: the bundle's own threshold. Result: alpha."""

        def change(this: Change) -> dict:
            this.note(asked)
            this.next_version(alpha=alpha)
            return {"alpha": alpha}

        return self._write(by, "alpha", None, change)


def is_image(media_type: str | None) -> bool:
    """And not a vector, which is kept as bytes as well."""
    return media_type is not None and media_type.startswith("image/")


def insert_items(connection: Connection, model: str, new: Sequence[tuple[str, NewItem, dict]]) -> None:
    """Items with their ids and the columns that are theirs, embedded by `model`."""
    if not new:
        return
    at = now()
    rows = [
        {"id": id, "created_at": at, "has_image": is_image(item.media_type), **columns} for id, item, columns in new
    ]
    vectors = [{"item_id": id, "model": model, "vector": to_blob(item.embedding)} for id, item, _ in new]
    pictures = [
        {"item_id": id, "media_type": item.media_type, "data": item.content}
        for id, item, _ in new
        if item.content is not None
    ]
    for table, values in ((items, rows), (embeddings, vectors), (images, pictures)):
        if values:
            connection.execute(insert(table), values)


def require_unknown(connection: Connection, ids: Sequence[str]) -> list[str]:
    """`ids`, each once; `NotThere` where one is not in the unknown pool."""
    unique = list(dict.fromkeys(ids))
    if not unique:
        raise OsmlError("no item was named: expected the ids of one unknown item or more")
    for batch in batches(unique):
        there = select(items.c.id).where(items.c.id.in_(batch), items.c.state == "unknown")
        if missing := set(batch) - set(connection.scalars(there)):
            raise NotThere(f"no unknown item '{min(missing)}': it was discarded, enrolled, or never seen")
    return unique


def without_embedding_for_ever(this: Change, ids: Sequence[str]) -> list[str]:
    """Those that the active model has not embedded and, for want of an image, never will.

    Raises `StaleModel` where one only waits for it.
    """
    never = []
    for batch in batches(ids):
        by_model = select(embeddings.c.item_id).where(embeddings.c.model == this.state.model)
        sent = items.c.id.in_(select(images.c.item_id))
        query = select(items.c.id, sent).where(items.c.id.in_(batch), items.c.id.not_in(by_model))
        for id, can_be in this.connection.execute(query):
            if can_be:
                raise StaleModel(f"item '{id}' was not embedded by the active model '{this.state.model}': embed it")
            never.append(id)
    return never


def become_examples(this: Change, name: str, ids: Sequence[str]) -> dict:
    name, version = _further(this, name), this.next_version()
    for batch in batches(ids):
        chosen = update(items).where(items.c.id.in_(batch))
        this.connection.execute(chosen.values(state="example", name=name, version=version))
    return {"name": name, "n_examples": len(ids), "example_ids": list(ids)}


def _examples_of(name: str) -> list:
    return [items.c.state == "example", items.c.version.is_not(None), items.c.name == name]


def bundle_names(connection: Connection, model: str | None) -> set[str]:
    bundle = connection.scalar(select(models.c.classes).where(models.c.version == model)) or []
    renamed = dict(connection.execute(select(trained_classes)).all())
    return {renamed.get(name, name) for name in bundle} - {None}


def _current_names(connection: Connection, model: str | None) -> set[str]:
    with_examples = select(items.c.name).where(items.c.state == "example", items.c.version.is_not(None)).distinct()
    return bundle_names(connection, model) | set(connection.scalars(with_examples))


def recognized_names(connection: Connection, model: str | None) -> set[str]:
    """Of the current names, those that a replica with this model recognizes: classes whose examples all came without an
    image, under another model, are none of these."""
    by_model = select(embeddings.c.item_id).where(embeddings.c.model == model, embeddings.c.vector != b"")
    embedded = select(items.c.name).where(items.c.state == "example", items.c.id.in_(by_model)).distinct()
    return bundle_names(connection, model) | set(connection.scalars(embedded))


def _further(this: Change, name: str) -> str:
    return further_names([name], _current_names(this.connection, this.state.model))[0]


def _require(names: set[str], name: str) -> None:
    if name not in names:
        raise NotThere(str(unknown_name("class", name, names)))


def _require_two(names: set[str]) -> None:
    if len(names) < 2:
        raise Conflict("fewer than two classes would remain: enroll another one before")


def _give_name(this: Change, old: str, new: str | None) -> int:
    """Renames a class in the bundles and in the examples; None: it is forgotten. How many examples that were."""
    # In all bundles, so that a version that is being prepared, or gone back to, has the same names.
    renamed = set(this.connection.scalars(select(trained_classes.c.name)))
    this.connection.execute(update(trained_classes).where(trained_classes.c.current == old).values(current=new))
    if old not in renamed and any(old in classes for classes in this.connection.scalars(select(models.c.classes))):
        this.connection.execute(insert(trained_classes), {"name": old, "current": new})
    return _update_examples(this, _examples_of(old), new)


def _update_examples(this: Change, which: list, name: str | None) -> int:
    version = this.next_version()
    if name is not None:
        return this.connection.execute(update(items).where(*which).values(name=name, version=version)).rowcount
    chosen = select(items.c.id).where(*which)
    for table in (embeddings, images):
        this.connection.execute(delete(table).where(table.c.item_id.in_(chosen)))
    gone = update(items).where(*which).values(state="gone", name=None, version=version, has_image=False)
    return this.connection.execute(gone).rowcount
