"""Whether the server answers, its counts, its version: for load balancers, Prometheus and people."""

import threading
import time

from flask import Blueprint, Response
from msgspec import Struct

from jaxserve import __version__
from jaxserve.engine.request import EngineDead
from jaxserve.serve import body
from jaxserve.serve.openapi import Operation
from jaxserve.serve.service import Service

STALL = 90.0  # seconds without a step, while requests run, after which the engine is said to hang
METRICS = "text/plain; version=0.0.4; charset=utf-8"


class Status(Struct):
    """status: "ready", "draining" (it shuts down), "stalled" (it hangs) or "dead" (it is started again, or ends)."""

    status: str


class Version(Struct):
    """The version of jaxserve."""

    version: str


class Load(Struct):
    """Requests inside: those that run and those that wait."""

    server_load: int
    running: int
    waiting: int


OPERATIONS = (
    Operation("get", "/health", "Whether the engine answers", "server", answer=Status, public=True, errors=(503,)),
    Operation("get", "/ready", "Whether new requests are taken", "server", answer=Status, errors=(503,)),
    Operation("get", "/version", "The version", "server", answer=Version),
    Operation("get", "/load", "How much there is to do", "server", answer=Load, errors=(503,)),
    Operation("get", "/metrics", "Counts for Prometheus", "server", kind="text/plain", errors=(404, 503)),
)


def blueprint(service: Service) -> Blueprint:
    """The routes, for one model."""
    routes = Blueprint("health", __name__)
    pulse = Pulse(service.engine)

    @routes.get("/health")
    def health():
        state = pulse.state()
        return body.send({"status": state}, 200 if state == "ready" else 503)

    @routes.get("/ready")
    def ready():
        state = pulse.state()
        return body.send({"status": state}, 200 if state == "ready" else 503)

    @routes.get("/version")
    def version():
        return body.send({"version": __version__})

    @routes.get("/load")
    def load():
        counts = service.engine.stats()
        running, waiting = int(counts["running"]), int(counts.get("waiting", 0))
        return body.send({"server_load": running + waiting, "running": running, "waiting": waiting})

    @routes.get("/metrics")
    def metrics():
        return Response(service.engine.metrics(), content_type=METRICS)

    return routes


class Pulse:
    """Notices an engine that has requests and makes no steps, from what it tells each time somebody asks."""

    def __init__(self, engine):
        self._engine = engine
        self._lock = threading.Lock()
        self._steps, self._since = -1.0, 0.0

    def state(self) -> str:
        """One of Status's words."""
        state = self._engine.state
        if state != "ready":
            return state
        try:
            counts = self._engine.stats()
        except EngineDead:
            state = self._engine.state
            return "dead" if state == "ready" else state
        now, steps = time.monotonic(), counts.get("steps", 0)
        with self._lock:
            if steps != self._steps or not counts["running"]:
                self._steps, self._since = steps, now
            return "stalled" if now - self._since > STALL else "ready"
