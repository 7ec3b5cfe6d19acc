"""OpenTelemetry spans: see docs/monitoring.md. They contain no texts, keys or error messages.

The application configures a provider. Until it does, nothing of OpenTelemetry is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final, Literal

from kalm_integrations.version import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

_OPERATION: Final = "embeddings"
_COMMON: Final = {"gen_ai.operation.name": _OPERATION, "gen_ai.provider.name": "kalm"}


def client_span(model: str) -> AbstractContextManager[Span | None]:
    """The span of a call of the client. It does not become the current span: see `activated`."""
    attributes = {**_COMMON, "gen_ai.request.model": model}
    return _started("CLIENT", f"{_OPERATION} {model}", attributes)


@contextmanager
def server_span(carrier: Mapping[str, str] | None = None) -> Iterator[None]:
    """Trace a request of the service, as the current span while the block runs.

    Args:
        carrier: The caller's trace context; used if there is no current span.
    """
    with _started("SERVER", _OPERATION, _COMMON, carrier) as span, activated(span):
        yield


def activated(span: Span | None) -> AbstractContextManager[object]:
    """Make `span` the current one while the block runs."""
    api = _api()
    if api is None or span is None:
        return nullcontext()
    current: AbstractContextManager[object] = api.use_span(
        span, record_exception=False, set_status_on_exception=False
    )
    return current


def current_span() -> Span | None:
    """The current span, if it is recorded."""
    api = _api()
    span: Span | None = None if api is None else api.get_current_span()
    return span if span is not None and span.is_recording() else None


def trace_context() -> dict[str, str]:
    """The current span's context in W3C's headers; empty without one."""
    carrier: dict[str, str] = {}
    if _api() is not None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        TraceContextTextMapPropagator().inject(carrier)
    return carrier


def error_type(error: Exception) -> str:
    """Our code of an error; the class of a foreign one."""
    return str(getattr(error, "code", "") or type(error).__qualname__)


def _api() -> Any:
    """The module `opentelemetry.trace`, if a provider is configured."""
    api = sys.modules.get("opentelemetry.trace")
    provider = getattr(api, "get_tracer_provider", None)  # absent while another thread imports it
    if provider is None or isinstance(provider(), api.ProxyTracerProvider):  # type: ignore[union-attr]
        return None
    return api


@contextmanager
def _started(
    kind: Literal["CLIENT", "SERVER"],
    name: str,
    attributes: Mapping[str, AttributeValue],
    carrier: Mapping[str, str] | None = None,
) -> Iterator[Span | None]:
    api = _api()
    if api is None:
        yield None
        return
    context = None
    if carrier and not api.get_current_span().get_span_context().is_valid:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract(carrier)
    tracer = api.get_tracer("kalm_integrations", __version__)
    span = tracer.start_span(name, context, api.SpanKind[kind], attributes)
    try:
        yield span
    except Exception as error:
        span.set_attribute("error.type", error_type(error))
        span.set_status(api.StatusCode.ERROR)
        raise
    finally:
        span.end()
