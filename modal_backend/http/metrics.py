"""Prometheus metrics of a service."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from modal_backend.service import EmbeddingService

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """Each service has its own registry, so that two services in one process stay apart.

    Args:
        service: Its admission control and warnings are exported.
        phases: Seconds of each phase of the start; read whenever the metrics are.
    """

    def __init__(self, service: EmbeddingService, phases: Mapping[str, float]) -> None:
        self._service = service
        self._phases = phases
        self._registry = CollectorRegistry()
        counter = partial(Counter, registry=self._registry)
        gauge = partial(Gauge, registry=self._registry)

        self.requests = counter("kalm_requests", "Requests by error code, or ok", ["code"])
        self.texts = counter("kalm_texts", "Embedded texts", ["role"])
        self.tokens = counter("kalm_tokens", "Tokens of embedded texts", ["role"])
        self.key_requests = counter("kalm_key_requests", "Requests by named key", ["key", "code"])
        self.key_tokens = counter("kalm_key_tokens", "Computed tokens by named key", ["key"])
        self.seconds = Histogram(
            "kalm_request_seconds",
            "From a request's header to its response",
            ["role"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        admission = service.admission
        texts = gauge("kalm_texts_in_progress", "Texts queued or being computed", ["role"])
        wait = gauge("kalm_estimated_wait_seconds", "Estimated wait of a new request", ["role"])
        for role in admission.texts_in_progress:
            texts.labels(role).set_function(partial(admission.texts_in_progress.__getitem__, role))
            wait.labels(role).set_function(partial(admission.wait, role))
        gauge(
            "kalm_engine_tokens_per_second",
            "Speed that admission has learnt from completed work; 0 before there was any",
        ).set_function(lambda: admission.speed.tokens_per_second or 0.0)
        self._starts = gauge("kalm_start_seconds", "Phases of this container's start", ["phase"])
        self._warnings = gauge(
            "kalm_warning", "1 for each warning that an operator has to fix", ["code"]
        )

    def render(self) -> bytes:
        """All metrics in Prometheus's text format."""
        for phase, seconds in self._phases.items():
            self._starts.labels(phase).set(seconds)
        self._warnings.clear()
        for warning in self._service.warnings:
            self._warnings.labels(warning.code).set(1)
        return generate_latest(self._registry)
