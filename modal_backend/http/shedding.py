"""Refuse requests unread when the server cannot even read them all in time.

Admission control refuses a request once it is parsed. At several times the capacity, parsing what
is refused anyway takes the time in which the engine should be given work, and requests wait before
they are read. Refused here, a request takes half the time.
"""

from __future__ import annotations

from collections.abc import Callable

from kalm_integrations.errors import ServiceUnavailableError
from modal_backend.admission import Admission, retry_after
from modal_backend.http.responses import ErrorResponse

_TOLERANCE = 0.1
"""By how much the wait may differ from what the response says; making one takes time."""


class Shedding:
    """Decides whether requests are refused unread.

    It begins when the server is behind while admission control refuses requests, and lasts until
    queries are admitted again.

    Args:
        admission: Admission control.
        behind: Whether requests wait before the server reads them.
    """

    def __init__(self, admission: Admission, behind: Callable[[], bool]) -> None:
        self._admission = admission
        self._behind = behind
        self._response: ErrorResponse | None = None
        self._wait = 0.0

    def response(self) -> ErrorResponse | None:
        """The response to a request that is refused unread; None if it is to be read."""
        behind = self._behind()
        if self._response is None and not behind:
            return None
        wait = self._admission.reopens_in("query")
        if wait <= 0 and behind:
            wait = self._admission.reopens_in("document")
        if wait <= 0:
            self._response = None
        elif self._response is None or abs(self._wait - wait) > _TOLERANCE * wait:
            self._wait = wait
            error = ServiceUnavailableError(
                "more requests arrive than can be served.", retry_after(wait)
            )
            self._response = ErrorResponse(error)
        return self._response
