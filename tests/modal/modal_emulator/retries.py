"""Retries of spawned inputs: they are the server's business, those of other calls the client's."""

from modal_proto import api_pb2

from .model import Input, Result

_FAILED = (Result.GENERIC_STATUS_FAILURE, Result.GENERIC_STATUS_TIMEOUT)
_ASYNCHRONOUS = (
    api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC,
    api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC_LEGACY,
)


def pause_before_retry(
    entry: Input, result: api_pb2.GenericResult, policy: api_pb2.FunctionRetryPolicy
) -> float | None:
    """Seconds until the attempt that follows this result; None if the result is the last word."""
    if (
        entry.call.invocation not in _ASYNCHRONOUS
        or entry.cancelled
        or result.status not in _FAILED
        or entry.retry_count >= policy.retries
    ):
        return None
    pause = policy.initial_delay_ms * policy.backoff_coefficient**entry.retry_count
    return min(pause, policy.max_delay_ms or pause) / 1000
