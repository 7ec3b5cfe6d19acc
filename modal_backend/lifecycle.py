"""The life cycle of one container: load, check, sleep; (snapshot;) wake, check, serve.

Nothing here raises: Modal restarts a container that fails to start without end, and each start is
billed. A container whose engine cannot be trusted serves the reason as data instead.

Modal captures a snapshot whenever the hook before it returns, even if there is no engine. Raising
or never returning would prevent that, but ends in the restart loop. So such a snapshot is accepted,
and every start from it reports it (`snapshot_without_engine`) until a redeployment discards it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from copy import copy

import numpy as np

from kalm_integrations.errors import CanaryFailedError, EngineLoadError, KalmError
from kalm_integrations.protocol import ServiceWarning
from modal_backend import canary
from modal_backend.engines.base import Engine
from modal_backend.engines.failed import FailedEngine
from modal_backend.service import EmbeddingService
from modal_backend.settings import LOAD_ATTEMPTS, CanaryMode, Snapshot

log = logging.getLogger(__name__)

REPLACEMENT_DELAY = 300.0
"""Seconds for which an unhealthy container answers before it requests a replacement. Limits the
billed starts, however many calls arrive."""


class Lifecycle:
    """Keeps a trusted engine in `service`, or the reason why there is none.

    Args:
        load: Loads the engine afresh.
        snapshot: What is captured between `prepare` and `resume`: nothing, the running engine, or
            the sleeping engine.
        canary_mode: "refuse" discards an engine that fails the canary; "warn" serves it and
            reports the failure.
        attempt_timeout: Seconds that one load may take, including warm-up, canary and sleep. A
            start has time for `LOAD_ATTEMPTS` of them and makes no more; a load that may exceed the
            time is not started.
    """

    def __init__(
        self,
        load: Callable[[], Awaitable[Engine]],
        snapshot: Snapshot,
        *,
        canary_mode: CanaryMode = "refuse",
        attempt_timeout: float = math.inf,
    ) -> None:
        self._load = load
        self._snapshot = snapshot
        self._canary_mode = canary_mode
        self._attempt_timeout = attempt_timeout
        self._start = time.monotonic()
        self._loads = 0  # since then
        self._loaded_at = time.time()
        self._vectors: canary.Vectors | None = None
        self.service = EmbeddingService(FailedEngine(EngineLoadError("nothing is loaded yet.")))
        self.phases: dict[str, float] = {}
        """Seconds of each phase, in order."""
        self.restored = False
        """Whether this is another container than the one that `prepare` ran in."""
        self.engine_age = 0.0
        """Seconds from the end of the load to the start of this container: the age of the snapshot
        after a restore, and 0 if the engine was loaded in this start."""

    @property
    def failure(self) -> KalmError | None:
        """Why the container is unhealthy, or None."""
        return self.service.failure

    @property
    def trusted(self) -> bool:
        """Whether there is an engine that passed the canary."""
        codes = [warning.code for warning in self.service.warnings]
        return self.failure is None and "canary_failed" not in codes

    async def prepare(self) -> None:
        """Before the snapshot: load and check the engine, then put it to sleep. Retried once if
        time allows, since every later start would find no engine in the snapshot."""
        await self._attempt(self._load_and_sleep)
        if self.failure is not None and self._may_load_again():
            await self._attempt(self._load_and_sleep)
        if self.failure is not None and self._snapshot != "off":
            self._warn(
                "snapshot_without_engine",
                "the snapshot contains no engine, so every start loads the model afresh, which "
                f"takes minutes: {self.failure.message} Fix that, then run `kalm deploy` again, "
                "which discards the snapshots.",
            )

    async def resume(self, *, restored: bool = False) -> None:
        """After the snapshot: wake and check the engine. If that fails, or if there is none, load
        it afresh, at most once.

        Args:
            restored: Whether this is another container than the one that `prepare` ran in. It has
                the time and the loads of a whole start.
        """
        self.restored = restored
        self.engine_age = max(0.0, time.time() - self._loaded_at)
        if restored:
            self._start, self._loads = time.monotonic(), 0
            for warning in self.service.warnings:
                log.error("%s: %s", warning.code, warning.message)
        prepared = self.failure is None
        if prepared and self._snapshot != "off":
            await self._attempt(self._wake)
            if self.failure is not None:
                self._warn(
                    "restore_failed",
                    "the engine did not survive the snapshot, and the model has to be loaded "
                    f"afresh, which takes minutes: {self.failure.message}",
                )
        # A restored container may find what was missing in the first one, for instance the weights.
        if self.failure is not None and (restored or self._may_load_again()):
            await self._attempt(self._load_and_check)
        if self.failure is not None:
            log.error("this container serves nothing: %s", self.failure)

    async def watch(self, request_replacement: Callable[[], Awaitable[None]]) -> None:
        """Request another container: when the engine dies, or after `REPLACEMENT_DELAY` if no
        engine can be trusted.

        Args:
            request_replacement: Makes Modal send later calls to another container.
        """
        delay = REPLACEMENT_DELAY
        if self.failure is None:
            failure = await self.service.engine.died()
            log.error("%s Calls fail with this error until another container takes over.", failure)
            await self._discard(failure)
            delay = 0.0
        while True:
            await asyncio.sleep(delay)
            try:
                return await request_replacement()
            except Exception:
                log.exception("the request for a replacement failed; it is repeated")
                delay = REPLACEMENT_DELAY

    async def close(self) -> None:
        """Free the engine."""
        await self.service.close()

    def _may_load_again(self) -> bool:
        """Whether another load may help and ends before Modal kills the container."""
        if isinstance(self.failure, EngineLoadError) and self.failure.permanent:
            log.error("the model is not loaded again: it would fail in the same way")
            return False
        if self._loads >= LOAD_ATTEMPTS:
            log.error("the model is not loaded again: this start has tried %d times", self._loads)
            return False
        left = LOAD_ATTEMPTS * self._attempt_timeout - (time.monotonic() - self._start)
        if left < self._attempt_timeout:
            log.error(
                "the model is not loaded again: a load may take %.0f s, and %.0f s are left of "
                "this start; `kalm deploy --startup-timeout` allows more",
                self._attempt_timeout,
                max(left, 0.0),
            )
            return False
        return True

    async def _attempt(self, step: Callable[[], Awaitable[None]]) -> None:
        """Run a step of the start. If it fails, the service serves its error, not the engine."""
        try:
            await step()
        except Exception as error:
            log.exception("an engine that is not trusted is discarded")
            if not isinstance(error, KalmError):
                error = EngineLoadError(f"the engine failed: {type(error).__name__}: {error}.")
            await self._discard(error)

    async def _discard(self, failure: KalmError) -> None:
        # A copy has no traceback, whose frames would keep the engine in memory.
        discarded, self.service.engine = self.service.engine, FailedEngine(copy(failure))
        self._clear_warning("canary_failed")  # the engine is not served any more
        await _close(discarded)

    async def _load_and_sleep(self) -> None:
        await self._load_and_check()
        if self._snapshot == "asleep":
            with self._phase("sleep"):
                await self.service.engine.sleep()

    async def _load_and_check(self) -> None:
        self._loads += 1
        with self._phase("load"):
            engine = await self._load()
        self._loaded_at, self.engine_age = time.time(), 0.0
        try:
            with self._phase("warm_up"):
                await engine.warm_up()
            with self._phase("canary"):
                self._vectors = await self._check(engine, None)
        except BaseException:
            await _close(engine)
            raise
        self.service.engine = engine

    async def _wake(self) -> None:
        if self._snapshot == "asleep":
            with self._phase("wake"):
                await self.service.engine.wake()
        with self._phase("canary_after"):
            vectors = await self._check(self.service.engine, self._vectors)
        if self._vectors is None or vectors is None or np.array_equal(vectors, self._vectors):
            return
        log.warning("vectors after the snapshot are close to those before, but not bit-equal")

    async def _check(self, engine: Engine, before: canary.Vectors | None) -> canary.Vectors | None:
        """Run the canary and return its vectors; None if it failed and the engine still serves.

        Raises:
            CanaryFailedError: The vectors are wrong, and `canary_mode` is "refuse".
        """
        self._clear_warning("canary_failed")
        try:
            return await canary.check(engine, before)
        except CanaryFailedError as error:
            if self._canary_mode == "refuse":
                raise
            self._warn(
                "canary_failed",
                "the service's own check found its vectors wrong, and it serves them because of "
                f"--canary warn: {error.message}",
            )
            return None

    def _warn(self, code: str, message: str) -> None:
        self._clear_warning(code)
        self.service.warnings += (ServiceWarning(code, message),)
        log.error("%s: %s", code, message)

    def _clear_warning(self, code: str) -> None:
        self.service.warnings = tuple(w for w in self.service.warnings if w.code != code)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        log.info("phase %s begins", name)
        start = time.perf_counter()
        try:
            yield
        finally:
            while name in self.phases:  # repeated after a failure
                name += "_again"
            self.phases[name] = seconds = time.perf_counter() - start
            log.info("phase %s took %.2f s", name, seconds)


async def _close(engine: Engine) -> None:
    try:
        await engine.close()
    except Exception:
        log.exception("an engine did not close")
