"""What a check is, and how one runs: bounded in time, skipped where it cannot tell anything."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from pydantic import BaseModel

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
    from kalm_integrations.protocol import ServiceDescription

Status = Literal["ok", "warn", "fail", "skipped"]

LIMIT: Final = 10.0
"""Seconds that a check may take when no container has to start."""

KEYS: Final = (
    "Set KALM_API_KEY to the key that the service was started with; where Modal guards the "
    "HTTP endpoint, KALM_MODAL_KEY and KALM_MODAL_SECRET to a token of "
    "modal.com/settings/proxy-auth-tokens."
)
NOT_DEPLOYED: Final = (
    "Run `kalm deploy`, or correct KALM_APP_NAME, KALM_CLASS_NAME and KALM_ENVIRONMENT_NAME."
)
_BUG: Final = "This is a bug, here or in the service: please report it with this line."
_INSTALL: Final = "Install what is missing; see packages, above."
_REMEDIES: Final[dict[type[BaseException], str]] = {
    AuthenticationError: KEYS,
    NotDeployedError: NOT_DEPLOYED,
    ImportError: _INSTALL,
    ModuleNotFoundError: _INSTALL,
    TransportError: _BUG,
}
"""For errors whose own remedy speaks of Python arguments, or that have none."""
_SECRETS: Final = (
    "KALM_API_KEY",
    "KALM_MODAL_KEY",
    "KALM_MODAL_SECRET",
    "MODAL_TOKEN_ID",
    "MODAL_TOKEN_SECRET",
)


class Finding(BaseModel, frozen=True):
    """The result of one check; `remedy` is empty if there is nothing to do."""

    name: str = ""
    status: Status
    detail: str
    remedy: str = ""
    seconds: float = 0.0


Result = str | Finding
"""What a check returns; a text is a finding that all is in order."""


def warn(detail: str, remedy: str) -> Finding:
    """An application works, but somebody should look."""
    return Finding(status="warn", detail=detail, remedy=remedy)


def fail(detail: str, remedy: str) -> Finding:
    """An application fails."""
    return Finding(status="fail", detail=detail, remedy=remedy)


def skipped(detail: str) -> Finding:
    """Not checked."""
    return Finding(status="skipped", detail=detail)


@dataclass(frozen=True, slots=True)
class Check:
    """One check: a `KalmError` that `look` raises is a failure.

    It runs if none of `needs` failed or was skipped, on its own thread, which is abandoned when
    its time is over. `wakes`: it may start a container. `no_answer` is the remedy then.
    """

    name: str
    look: Callable[[DoctorContext], Result]
    needs: tuple[str, ...] = ()
    wakes: bool = False
    no_answer: str = "Check the network between here and there, then try again."


@dataclass
class DoctorContext:
    """What may be done, and what is known so far; checks fill it for those that follow."""

    wake: bool  # containers may be started
    reference: bool = False  # embed the reference texts
    arguments: dict[str, Any] = field(default_factory=dict)  # of the client, besides variables
    config: ClientConfig | None = None  # once it is valid
    scales_to_zero: bool = False  # any request may start a container, which is billed
    tags: Mapping[str, str] | None = None  # that Modal keeps with the deployed app
    url: str = ""  # of the service, if over HTTP
    client: KalmClient | None = None
    first_answer: float = 0.0  # seconds
    mismatch: IdentityMismatchError | None = None
    description: ServiceDescription | None = None

    @property
    def settings(self) -> ClientConfig:
        """The client's settings, for checks that run after theirs."""
        assert self.config is not None
        return self.config

    @property
    def connected(self) -> KalmClient:
        """The client, for checks that run after the first answer."""
        assert self.client is not None
        return self.client

    @property
    def limit(self) -> float:
        """Seconds that a check may wait for the service."""
        from kalm_integrations.options import STARTUP_TIMEOUT

        timeout = self.settings.timeout
        if not self.wake:
            return min(timeout, LIMIT)
        chosen = "timeout" in self.settings.model_fields_set or not self.scales_to_zero
        return timeout if chosen else max(timeout, STARTUP_TIMEOUT)


def skip(check: Check, context: DoctorContext, before: Mapping[str, Finding]) -> Finding | None:
    """Why `check` cannot run; None if it can."""
    for need in check.needs:
        if before[need].status in ("fail", "skipped"):
            return skipped(f"needs: {need}")
    if check.wakes and context.scales_to_zero and not context.wake:
        return skipped("would start a container, which costs money; --wake does it")
    return None


def run_check(check: Check, context: DoctorContext) -> Finding:
    """Run `check` within its time."""
    limit = context.limit if check.wakes else LIMIT
    future: Future[Result] = Future()

    def look() -> None:
        try:
            future.set_result(check.look(context))
        except BaseException as error:  # noqa: BLE001 (read on the other thread)
            future.set_exception(error)

    started = time.monotonic()
    threading.Thread(target=look, name="kalm-doctor", daemon=True).start()
    try:
        # A limit inside the check expires first, and its error tells more.
        error = future.exception(limit + 1)
        result = future.result() if error is None else _failure(error, check)
    except TimeoutError:
        result = fail(f"no answer within {limit:g} s", check.no_answer)
    finding = Finding(status="ok", detail=result) if isinstance(result, str) else result
    seconds = round(time.monotonic() - started, 3)
    return finding.model_copy(update={"name": check.name, "seconds": seconds})


def _failure(error: BaseException, check: Check) -> Finding:
    message = error.message if isinstance(error, KalmError) else f"{type(error).__name__}: {error}"
    if isinstance(error, ConnectionFailedError | DeadlineExceededError):
        return fail(message, check.no_answer)
    own = error.remedy if isinstance(error, KalmError) else _BUG
    return fail(message, _REMEDIES.get(type(error), own))


def redact(text: str) -> str:
    """`text` without secrets, whoever wrote it, and without control characters.

    Servers repeat wrong keys, and libraries show URLs. A secret that could be an ordinary word or
    number stays: without it, the report could not be read.
    """
    proxies = (urlsplit(proxy).password or "" for proxy in getproxies().values())
    secrets = {*(os.environ.get(name, "").strip() for name in _SECRETS), *proxies}
    for secret in sorted(filter(is_redacted, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in "\n".join(lines))


def is_redacted(secret: str) -> bool:
    """Whether `secret` can be told from a word and from a number."""
    mixed = not (secret.isalpha() or secret.isdecimal())
    return len(secret) >= 16 or (len(secret) >= 6 and mixed and bool(re.search(r"\w", secret)))
