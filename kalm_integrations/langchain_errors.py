"""Errors of the LangChain adapter: each is one of ours and one of LangChain's.

Code that handles `langchain_core.exceptions.ModelRateLimitError` of any provider handles ours, and
code that handles `kalm_integrations.errors.RateLimitError` still does. Each class here has the name
of ours; this module exists so that importing `kalm_integrations.errors` needs no LangChain.
"""

from __future__ import annotations

from typing import Final

from langchain_core import exceptions

from kalm_integrations import errors
from kalm_integrations.errors import subclasses

FAMILY: Final[dict[type[errors.KalmError], str]] = {
    errors.InputTooLongError: "ContextOverflowError",
    errors.InvalidInputError: "ModelInvalidRequestError",
    errors.ConfigurationError: "ModelInvalidRequestError",
    errors.RequestTooLargeError: "ModelInvalidRequestError",
    errors.AuthenticationError: "ModelAuthenticationError",
    errors.PermissionDeniedError: "ModelPermissionDeniedError",
    errors.NotFoundError: "ModelNotFoundError",
    errors.RateLimitError: "ModelRateLimitError",
    errors.ConnectionFailedError: "ModelConnectionError",
    errors.DeadlineExceededError: "ModelTimeoutError",
    errors.ServiceUnavailableError: "ModelAPIError",
    errors.KalmError: "ModelError",
}
"""Our class → LangChain's. A class that is not here has its nearest base's."""


def _both(ours: type[errors.KalmError]) -> type[errors.KalmError]:
    name = next(FAMILY[base] for base in ours.__mro__ if base in FAMILY)
    theirs = getattr(exceptions, name, None)  # older versions of langchain-core lack them
    if theirs is None:
        return ours
    return type(ours.__name__, (ours, theirs), {"__module__": __name__, "__doc__": ours.__doc__})


_BOTH: Final = {ours: _both(ours) for ours in subclasses(errors.KalmError)}
globals().update({both.__name__: both for both in _BOTH.values()})  # where pickle looks


class _RaisedAsLangChains:
    """Makes a `KalmError` that leaves a block an error of LangChain too."""

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, errors.KalmError):
            both = _BOTH.get(type(error), type(error))
            raised = both.__new__(both, *error.args)
            raised.__dict__.update(error.__dict__)
            raise raised.with_traceback(error.__traceback__) from error.__cause__


raised_as_langchains: Final = _RaisedAsLangChains()
