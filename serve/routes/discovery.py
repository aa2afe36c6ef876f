"""Group the unknown in the background, and make classes of the groups."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path

from ..schemas import Changed, DiscoveryIn, DiscoveryList, DiscoveryOut, GroupInto, JobId, MembersOf, NewName
from ..service import Service
from ..store import Job, Write
from .common import (
    NOT_FOUND,
    PROBLEMS,
    WRITE_PROBLEMS,
    Limit,
    Served,
    actor_with,
    answer,
    changed,
    known_queries,
    writer_with,
)

router = APIRouter(prefix="/v1/discoveries", tags=["discovery"], dependencies=known_queries)
reads = [Depends(actor_with("enroll"))]
Enroller = Annotated[Write, Depends(writer_with("enroll"))]
GroupNumber = Annotated[int, Path(ge=0, le=2**31 - 1)]


@router.post("", status_code=202, response_model=DiscoveryOut, responses=WRITE_PROBLEMS)
def discover(service: Served, wanted: DiscoveryIn, by: Enroller):
    """Group what is unknown into new classes, in the background: ask for it by its id."""
    snapshot = service.live.snapshot
    _, written = service.write(service.store.start_discovery, by, wanted.model_dump(), snapshot.model)
    return _out(service, written.result["id"], 202)


@router.get("", response_model=DiscoveryList, responses=PROBLEMS, dependencies=reads)
def discoveries(service: Served, limit: Limit = 20):
    """The newest first."""
    rows = [_fields(service, job) for job in service.store.jobs("discovery", limit)]
    versions = {
        "model_version": service.live.snapshot.model,
        "gallery_version": service.live.snapshot.gallery_version,
    }
    return answer(service.live.snapshot, {"discoveries": [versions | row for row in rows]})


@router.get("/{job}", response_model=DiscoveryOut, responses=PROBLEMS | NOT_FOUND, dependencies=reads)
def discovery(service: Served, job: JobId):
    """How far it is, and the groups that it proposes."""
    return _out(service, job)


@router.get("/{job}/groups/{group}", response_model=MembersOf, responses=PROBLEMS | NOT_FOUND, dependencies=reads)
def members(service: Served, job: JobId, group: GroupNumber):
    """All items of a group, the most typical first."""
    found = service.store.group(job, group)
    return answer(service.live.snapshot, {"group": group, "members": list(found.members)})


@router.post("/{job}/groups/{group}/accept", response_model=Changed, responses=WRITE_PROBLEMS | NOT_FOUND)
def accept(service: Served, job: JobId, group: GroupNumber, name: NewName, by: Enroller):
    """Name a group: all its items become examples of that class, at once."""
    return changed(*service.write(service.store.accept_group, by, job, group, name.name))


@router.post("/{job}/groups/{group}/merge", response_model=DiscoveryOut, responses=WRITE_PROBLEMS | NOT_FOUND)
def merge_groups(service: Served, job: JobId, group: GroupNumber, into: GroupInto, by: Enroller):
    """Make a group part of another one; their items come out together in later discoveries, too."""
    service.write(service.store.merge_groups, by, job, group, into.into)
    return _out(service, job)


@router.post("/{job}/groups/{group}/reject", response_model=DiscoveryOut, responses=WRITE_PROBLEMS | NOT_FOUND)
def reject(service: Served, job: JobId, group: GroupNumber, by: Enroller):
    """Say that a group is no class; its items stay unknown, and later discoveries that find it again reject it, too."""
    service.write(service.store.reject_group, by, job, group)
    return _out(service, job)


def _out(service: Service, job: str, status: int = 200):
    return answer(service.live.snapshot, _fields(service, service.store.job(job)), status)


def _fields(service: Service, job: Job) -> dict[str, Any]:
    found = job.result or {}
    groups = service.store.groups(job.id) if job.state == "done" else []
    return {
        "id": job.id,
        "state": job.state,
        "progress": job.progress,
        "error": job.error,
        "created_at": job.created_at.isoformat(),
        "n_items": found.get("n_items"),
        "n_classes": found.get("n_classes"),
        "n_classes_interval": found.get("n_classes_interval"),
        "left_out": found.get("left_out"),
        "too_few": found.get("too_few"),
        "note": found.get("note", ""),
        "changes": found.get("changes", []),
        "groups": [
            {
                "group": g.number,
                "id": g.id,
                "size": len(g.members),
                "confidence": g.confidence,
                "exemplars": list(g.exemplars),
                "state": g.state,
                "name": g.name,
            }
            for g in groups
        ],
    }
