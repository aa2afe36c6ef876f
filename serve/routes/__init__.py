"""The HTTP verbs, by subject; each does no more than translate between HTTP and the service."""

from . import classes, discovery, health, model, recognition, unknowns

ROUTERS = (
    recognition.router,
    classes.router,
    unknowns.router,
    discovery.router,
    model.router,
    health.router,
)
