"""For load balancers and Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST

from .. import metrics
from .common import Served, answer

router = APIRouter(tags=["health"])


@router.get("/", include_in_schema=False)
async def root(request: Request) -> RedirectResponse:
    """Who opens the address in a browser sees what there is."""
    return RedirectResponse(request.scope.get("root_path", "") + "/docs")


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process is alive."""
    return {"status": "alive"}


@router.get("/readyz")
async def readyz(service: Served):
    """It can recognise. It goes on doing so while the store does not answer or is read-only, but learns nothing then.

    `rejection`: on; kept, where too few calibration items are left for the rate and the last threshold that they could
    promise stays; off, where nothing is rejected. `warnings` says more."""
    snapshot, store = service.live.snapshot, "up"
    if service.store_is_read_only:
        store = "read-only"
    if not service.store_is_up:
        store = "down"
    state = {"status": "ready", "store": store, "rejection": snapshot.rejection, "warnings": snapshot.warnings}
    return answer(snapshot, state)


@router.get("/metrics", response_class=Response)
def prometheus() -> Response:
    """Requests, latency, batch size, verdicts, scores, gallery, calibration; in Prometheus' text format."""
    return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)
