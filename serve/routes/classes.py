"""Classes: list, teach, rename, merge, forget."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Request
from starlette.convertors import StringConvertor, register_url_convertor

from osml_plugin.names import canonical, shown

from ..schemas import Changed, Classes, ClassName, CurrentName, Examples, ExamplesOf, Into, ItemId, NewName
from ..service import fingerprint
from ..store import Write
from .common import (
    BODY_PROBLEMS,
    NOT_FOUND,
    PROBLEMS,
    WRITE_PROBLEMS,
    After,
    IdempotencyKey,
    Limit,
    Served,
    actor_with,
    answer,
    changed,
    items_of,
    known_queries,
    writer_with,
)
from .recognition import either

router = APIRouter(prefix="/v1/classes", tags=["classes"], dependencies=known_queries)


class _Name(StringConvertor):
    """A name in an address: it may have slashes, which come as they are or as %2F."""

    regex = "(?s:.+)"


class _Id(StringConvertor):
    """An id in an address, behind a name: 'birds/examples/robin' is a name alone."""

    regex = "[0-9a-f]{32}"


register_url_convertor("name", _Name())
register_url_convertor("id", _Id())
Enroller = Annotated[Write, Depends(writer_with("enroll"))]

_OTHER_ADDRESSES = re.compile(r"(?s).+/(?:(?P<examples>examples)|(?P<item>examples/[0-9a-f]{32})|(?P<merge>merge))")
_ALLOWED = {"examples": "GET, POST", "item": "DELETE", "merge": "POST"}


def class_address(request: Request, service: Served, _: Enroller) -> None:
    """405 for a method that another address of a class does not take, unless a class is called like that address."""
    name = canonical(request.path_params["name"])
    other = _OTHER_ADDRESSES.fullmatch(name)
    if other and name not in service.live.snapshot.recognizer.class_names:
        headers = {"Allow": _ALLOWED[other.lastgroup]}
        raise HTTPException(
            405, f"no class is called {shown(name)}, and this address takes {headers['Allow']}", headers
        )


of_class = [Depends(class_address)]


@router.get("", response_model=Classes, responses=PROBLEMS, dependencies=[Depends(actor_with("recognize"))])
def classes(service: Served):
    """All classes that are known now."""
    snapshot = service.live.snapshot
    gallery = snapshot.recognizer.gallery
    enrolled, in_all = Counter(gallery.labels[gallery.enrolled].tolist()), Counter(gallery.labels.tolist())
    rows = [
        {"name": name, "trained": in_all[i] - enrolled[i], "enrolled": enrolled[i]}
        for i, name in sorted(gallery.classes.items(), key=lambda c: c[1])
    ]
    return answer(snapshot, {"classes": rows})


@router.get(
    "/{name:name}/examples",
    response_model=ExamplesOf,
    responses=PROBLEMS | NOT_FOUND,
    dependencies=[Depends(actor_with("enroll"))],
)
def examples(service: Served, name: CurrentName, limit: Limit = 100, after: After = None):
    """The enrolled examples of a class."""
    rows, following = service.store.examples(name, limit, after)
    found = [{"id": e.id, "has_image": e.has_image, "created_at": e.created_at.isoformat()} for e in rows]
    return answer(service.live.snapshot, {"name": name, "examples": found, "next": following})


@router.post(
    "/{name:name}/examples",
    status_code=201,
    response_model=Changed,
    responses=WRITE_PROBLEMS | BODY_PROBLEMS | NOT_FOUND,
    openapi_extra=either(Examples),
)
async def enroll(
    request: Request,
    service: Served,
    name: ClassName,
    actor: Annotated[str, Depends(actor_with("enroll"))],
    idempotency_key: IdempotencyKey = None,
):
    """Teach a class, or more of one, without training. It is recognised from the answer on."""
    contents, vectors, body = await items_of(request, service, Examples)
    ids = getattr(body, "observation_ids", None) or []
    said = fingerprint("enroll", name, *contents, repr(vectors), *ids)
    by = Write(actor, idempotency_key, said)
    if ids:
        if contents or vectors:
            raise HTTPException(422, "send images, embeddings, or observation_ids: one of them")
        snapshot, written = await service.written(service.store.enroll_observations, by, name, ids)
    else:
        snapshot, written = await service.enroll(by, name, contents, vectors)
    return changed(snapshot, written, 201)


@router.delete("/{name:name}/examples/{item:id}", response_model=Changed, responses=WRITE_PROBLEMS | NOT_FOUND)
def remove_example(service: Served, name: CurrentName, item: ItemId, by: Enroller):
    """Take one example out of a class."""
    return changed(*service.write(service.store.remove_example, by, name, item))


@router.post("/{name:name}/merge", response_model=Changed, responses=WRITE_PROBLEMS | NOT_FOUND)
def merge(service: Served, name: CurrentName, into: Into, by: Enroller):
    """Make a class part of another one."""
    return changed(*service.write(service.store.merge, by, name, into.into))


@router.patch("/{name:name}", response_model=Changed, responses=WRITE_PROBLEMS | NOT_FOUND, dependencies=of_class)
def rename(service: Served, name: CurrentName, new: NewName, by: Enroller):
    """Give a class another name."""
    return changed(*service.write(service.store.rename, by, name, new.name))


@router.delete("/{name:name}", response_model=Changed, responses=WRITE_PROBLEMS | NOT_FOUND, dependencies=of_class)
def forget(service: Served, name: CurrentName, by: Enroller):
    """Drop a class and all its examples; what belongs to it is unknown from now on."""
    return changed(*service.write(service.store.forget, by, name))
