"""Which model answers, at which rate; and others."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException

from osml_plugin.errors import OsmlError
from osml_plugin.thresholds import guarantee
from osml_plugin.thresholds.base import written

from ..schemas import AlphaIn, Changed, History, ModelChange, ModelOut, ReloadIn
from ..shelf import Address
from ..store import Write
from .common import PROBLEMS, WRITE_PROBLEMS, Served, actor_with, answer, changed, known_queries, writer_with

router = APIRouter(prefix="/v1/model", tags=["model"], dependencies=known_queries)
reads = [Depends(actor_with("recognize"))]
Admin = Annotated[Write, Depends(writer_with("admin"))]


@router.get("", response_model=ModelOut, responses=PROBLEMS, dependencies=reads)
def model(service: Served):
    """The model that answers now."""
    snapshot = service.live.snapshot
    recognizer, progress = snapshot.recognizer, None
    state = service.store.state()
    if state.pending is not None:
        jobs = [job for job in service.store.jobs("model", 20) if job.args.get("version") == state.pending]
        progress = jobs[0].progress if jobs else None
    return answer(
        snapshot,
        {
            "source": next((m.source for m in service.store.models() if m.version == snapshot.model), snapshot.model),
            "pending": state.pending,
            "pending_progress": progress,
            "alpha": recognizer.kept_rate,
            "threshold": written(recognizer.threshold.tau),
            "thresholds": {name: written(tau) for name, tau in recognizer.class_thresholds.items()},
            "detector": recognizer.detector.name,
            "guarantee": str(recognizer.guarantee) if recognizer.guarantee is not None else None,
            "rejection": snapshot.rejection,
            "warnings": snapshot.warnings,
            "input": "embeddings" if recognizer.preprocessing is None else "images",
            "width": recognizer.gallery.embeddings.shape[1],
            "n_classes": len(recognizer.gallery.classes),
            "n_references": len(recognizer.gallery),
        },
    )


@router.get("/history", response_model=History, responses=PROBLEMS, dependencies=reads)
def history(service: Served):
    """All model versions that this endpoint has had, the newest first."""
    rows = [
        {
            "model_version": m.version,
            "source": m.source,
            "activated_at": m.activated_at.isoformat() if m.activated_at else None,
            "active": m.active,
        }
        for m in service.store.models()
    ]
    return answer(service.live.snapshot, {"models": rows})


@router.post("/reload", status_code=202, response_model=ModelChange, responses=WRITE_PROBLEMS)
def reload(service: Served, wanted: ReloadIn, by: Admin):
    """Go over to the version that the configured alias names now, or to a version by its number. What was enrolled
    is embedded by it first; until then the present one answers."""
    configured = service.config.model
    if configured is None:
        raise HTTPException(
            409, "this endpoint was started without a model to reload: start it with models:/NAME@alias"
        )
    if wanted.version is not None:
        if not configured.startswith("models:/"):
            raise HTTPException(409, "this endpoint serves a bundle's folder, which has no numbered versions")
        configured = f"models:/{configured[len('models:/') :].split('@')[0].split('/')[0]}/{wanted.version}"
    return _gone_over(service, by, service.shelf.resolve(configured))


@router.post("/rollback", status_code=202, response_model=ModelChange, responses=WRITE_PROBLEMS)
def rollback(service: Served, by: Admin):
    """Go back to the version before."""
    before = service.store.previous_model()
    if before is None:
        raise HTTPException(409, "there is no model version before the present one")
    return _gone_over(service, by, Address(before.version, before.source))


@router.put("/alpha", response_model=Changed, responses=WRITE_PROBLEMS)
def set_alpha(service: Served, wanted: AlphaIn, by: Admin):
    """Choose another share of known items that may be rejected."""
    recognizer = service.live.snapshot.recognizer
    if not recognizer.has_scores:
        raise HTTPException(409, "this model has no calibration items to fit another rate on: train it with some")
    # The rate of the enrolled examples counts only where all classes of the training are forgotten.
    n = len(recognizer.calibration_scores) or len(recognizer.enrolled_scores)
    promised = guarantee(n, wanted.alpha)
    if not promised.possible:
        raise HTTPException(409, str(promised))
    return changed(*service.write(service.store.set_alpha, by, wanted.alpha))


def _gone_over(service: Served, by: Write, address: Address):
    try:
        snapshot, written = service.write(service.change_model, by, address)
    except OsmlError as error:
        raise HTTPException(409, str(error)) from error
    return answer(snapshot, written.result, 202)
