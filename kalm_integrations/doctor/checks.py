"""What a check is, and how one is made: bounded in time, skipped where it cannot tell anything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, Self

from kalm_integrations.errors import (
    AuthenticationError,
    ConnectionFailedError,
    DeadlineExceededError,
    IdentityMismatchError,
    KalmError,
    NotDeployedError,
    TransportError,
)

if TYPE_CHECKING:
    from kalm_integrations.client import KalmClient
    from kalm_integrations.config import ClientConfig
    from kalm_integrations.identity import SpaceIdentity
    from kalm_integrations.protocol import ServiceWarning

Status = Literal["ok", "warn", "fail", "skipped"]

LIMIT: Final = 10.0
"""Seconds that a check may take when nothing is to be woken."""

KEYS: Final = (
    "Set KALM_API_KEY to the key that the service was started with; where Modal guards the "
    "HTTP endpoint, KALM_MODAL_KEY and KALM_MODAL_SECRET to a token of "
    "modal.com/settings/proxy-auth-tokens."
)
NOT_DEPLOYED: Final = (
    "Run `kalm deploy`, or correct KALM_APP_NAME, KALM_CLASS_NAME and KALM_ENVIRONMENT_NAME."
)
_BUG: Final = "This is a bug, here or in the service: please report it with this line."
_REMEDIES: Final[dict[type[BaseException], str]] = {
    AuthenticationError: KEYS,
    NotDeployedError: NOT_DEPLOYED,
    ImportError: "Install what is missing; see packages, above.",
    ModuleNotFoundError: "Install what is missing; see packages, above.",
    TransportError: _BUG,
}
"""Where the error's own speaks of arguments, or there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check found, and what to do about it."""

    name: str = ""
    status: Status
    detail: str
    remedy: str = ""
    seconds: float = 0.0

    @classmethod
    def ok(cls, detail: str) -> Self:
        """As it should be."""
        return cls(status="ok", detail=detail)

    @classmethod
    def warn(cls, detail: str, remedy: str) -> Self:
        """An application works, but somebody should look."""
        return cls(status="warn", detail=detail, remedy=remedy)

    @classmethod
    def fail(cls, detail: str, remedy: str) -> Self:
        """An application fails."""
        return cls(status="fail", detail=detail, remedy=remedy)


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    Attributes:
        name: In the report.
        look: Returns what it found; a `KalmError` that it raises is a failure. Runs on a thread
            of its own, which is left alone when its time is over.
        needs: Names of checks that must not have failed or been skipped.
        wakes: Whether it may start a container.
        silence: What to do when there is no answer.
    """

    name: str
    look: Callable[[Patient], Finding]
    needs: tuple[str, ...] = ()
    wakes: bool = False
    silence: str = "Check the network between here and there, then try again."


@dataclass
class Patient:
    """What is known so far. Checks fill it for those that follow.

    Attributes:
        wake: Whether containers may be started.
        reference: Whether the reference texts are wanted.
        configured: The settings, once they are known to be good.
        on_modal: Whether the service scales to zero, so that any request costs money.
        tags: What Modal keeps with the deployed app.
        url: Where the service is, if over HTTP.
        client: What an application would make.
        first: Seconds to the service's first answer.
        mismatch: Why the service's identity is not the expected one.
        served: The identity that the service reports; None if it reports none.
        warnings: What else it reports.
    """

    wake: bool
    reference: bool = False
    configured: ClientConfig | None = None
    on_modal: bool = False
    tags: Mapping[str, str] | None = None
    url: str = ""
    client: KalmClient | None = None
    first: float = 0.0
    mismatch: IdentityMismatchError | None = None
    served: SpaceIdentity | None = None
    warnings: tuple[ServiceWarning, ...] = ()

    @property
    def settings(self) -> ClientConfig:
        """For checks that come after theirs."""
        assert self.configured is not None
        return self.configured

    @property
    def embeds(self) -> KalmClient:
        """For checks that come after the first answer."""
        assert self.client is not None
        return self.client

    @property
    def limit(self) -> float:
        """Seconds that a check may wait for the service."""
        from kalm_integrations.options import STARTUP_TIMEOUT

        timeout = self.settings.timeout
        if not self.wake:
            return min(timeout, LIMIT)
        chosen = "timeout" in self.settings.model_fields_set or not self.on_modal
        return timeout if chosen else max(timeout, STARTUP_TIMEOUT)


def skipped(check: Check, patient: Patient, before: Mapping[str, Finding]) -> Finding | None:
    """Why `check` is not made; None if it is to be made."""
    for need in check.needs:
        if before[need].status in ("fail", "skipped"):
            return Finding(name=check.name, status="skipped", detail=f"needs: {need}")
    if check.wakes and patient.on_modal and not patient.wake:
        detail = "would start a container, which costs money; --wake does it"
        return Finding(name=check.name, status="skipped", detail=detail)
    return None


def made(check: Check, patient: Patient) -> Finding:
    """What `check` finds, in the time that it has."""
    started = time.monotonic()
    limit = patient.limit if check.wakes else LIMIT
    found: Future[Finding] = Future()

    def look() -> None:
        try:
            found.set_result(check.look(patient))
        except BaseException as error:  # noqa: BLE001 (read on the other thread)
            found.set_exception(error)

    threading.Thread(target=look, name="kalm-doctor", daemon=True).start()
    try:
        error = found.exception(limit + 1)  # what has a limit of its own tells more
        finding = found.result() if error is None else _failure(error, check)
    except TimeoutError:
        finding = Finding.fail(f"no answer within {limit:g} s", check.silence)
    seconds = round(time.monotonic() - started, 3)
    return replace(finding, name=check.name, seconds=seconds)


def _failure(error: BaseException, check: Check) -> Finding:
    what = error.message if isinstance(error, KalmError) else f"{type(error).__name__}: {error}"
    if isinstance(error, ConnectionFailedError | DeadlineExceededError):
        return Finding.fail(what, check.silence)
    own = error.remedy if isinstance(error, KalmError) else _BUG
    return Finding.fail(what, _REMEDIES.get(type(error), own))
