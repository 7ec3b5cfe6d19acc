"""What a service counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One registry a service, so that two in one process do not mix."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "kalm_requests", "Requests by their end", ["code"], registry=self._registry
        )
        self.texts = Counter("kalm_texts", "Texts embedded", ["role"], registry=self._registry)
        self.tokens = Counter("kalm_tokens", "Tokens read", ["role"], registry=self._registry)
        self.seconds = Histogram(
            "kalm_request_seconds",
            "From the whole request to the answer",
            ["role"],
            buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120),
            registry=self._registry,
        )
        self.in_progress = Gauge(
            "kalm_texts_in_progress", "Texts queued or computed", ["role"], registry=self._registry
        )
        self.wait = Gauge(
            "kalm_estimated_wait_seconds",
            "Estimated wait of a new request",
            ["role"],
            registry=self._registry,
        )
        self.speed = Gauge(
            "kalm_engine_tokens_per_second",
            "Speed that admission has learnt from completed work; 0 before there was any",
            registry=self._registry,
        )
        self.phases = Gauge(
            "kalm_start_seconds",
            "Phases of this container's start",
            ["phase"],
            registry=self._registry,
        )

        self._warnings = Gauge(
            "kalm_warning",
            "1 for each warning of the service that an operator has to fix",
            ["code"],
            registry=self._registry,
        )

    def warn(self, codes: Iterable[str]) -> None:
        """Show these warnings, and no others."""
        self._warnings.clear()
        for code in codes:
            self._warnings.labels(code).set(1)

    def render(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)
