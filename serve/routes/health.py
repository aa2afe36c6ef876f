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
    """It can recognise. It goes on doing so while the store does not answer, but learns nothing then."""
    return answer(service.live.snapshot, {"status": "ready", "store": "up" if service.store_is_up else "down"})


@router.get("/metrics", response_class=Response)
def prometheus() -> Response:
    """Requests, latency, batch size, verdicts, scores, gallery, calibration; in Prometheus' text format."""
    return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)
