"""The life cycle of one container: load, prove, sleep; (snapshot;) wake, prove, serve.

Nothing here raises: Modal starts a container that fails to start again without end, and each start
is billed. A container whose engine cannot be trusted serves its failure instead, as data.

A snapshot without an engine: Modal captures one whenever the hook before it returns. A hook that
raises or never returns prevents it, but both end in the restart loop above; there is no public way
to return and decline. So the snapshot is accepted, and the service reports it at every start from
it (`snapshot_without_engine`) until somebody redeploys, which discards all snapshots.
"""

from __future__ import annotations

import asyncio
import logging
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

REPLACED_AFTER = 300.0
"""Seconds that an unhealthy container answers before it requests its replacement. This bounds the
starts that are billed, however many calls arrive."""


class Lifecycle:
    """Keeps a trusted engine in `service`, or the reason why there is none.

    Args:
        load: Loads the engine afresh.
        snapshot: What happens between `prepare` and `resume`: no snapshot, one of the engine as
            it runs, or one of the sleeping engine.
        canary_mode: "refuse" discards an engine that fails the canary; "warn" serves it and
            reports the failure.
        attempt_timeout: Seconds that one load may take, with warm-up, canary and sleep; None is
            no limit. A start has time for `LOAD_ATTEMPTS` of them: a load that may not end in
            that time is not begun.
    """

    def __init__(
        self,
        load: Callable[[], Awaitable[Engine]],
        snapshot: Snapshot,
        *,
        canary_mode: CanaryMode = "refuse",
        attempt_timeout: float | None = None,
    ) -> None:
        self._load = load
        self._snapshot = snapshot
        self._canary_mode = canary_mode
        self._attempt_timeout = attempt_timeout
        self._start = time.monotonic()
        self._proof: canary.Vectors | None = None
        self.service = EmbeddingService(FailedEngine(EngineLoadError("nothing is loaded yet.")))
        self.phases: dict[str, float] = {}
        """Seconds that each phase took, in order."""
        self.restored = False
        """Whether this container has another id than the one that `prepare` ran in."""
        self.engine_age = 0.0
        """Seconds from the end of the load to the start of this container: of a restored one the
        age of its snapshot, and 0 if the engine was loaded in this start."""
        self._loaded_at = time.time()

    @property
    def failure(self) -> KalmError | None:
        """Why nothing is served; None when all is well."""
        return self.service.failure

    @property
    def trusted(self) -> bool:
        """Whether there is an engine, and it passed the canary."""
        return self.failure is None and not self._warns("canary_failed")

    async def prepare(self) -> None:
        """Before the snapshot: load, prove, keep the proof, put the engine to sleep. After a
        failure, once more if time allows: every later start would find no engine in the
        snapshot."""
        await self._attempt(self._loaded_to_sleep)
        if self.failure is not None and self._may_load_again():
            await self._attempt(self._loaded_to_sleep)
        if self.failure is not None and self._snapshot != "off":
            self._warn(
                "snapshot_without_engine",
                "the snapshot contains no engine, so every start loads the model afresh, which "
                f"takes minutes: {self.failure.message} Fix that, then run `kalm deploy` again, "
                "which discards the snapshots.",
            )

    async def resume(self, *, restored: bool = False) -> None:
        """After the snapshot: wake, prove. After a failure, load afresh once.

        Args:
            restored: Whether this is another container than the one that `prepare` ran in. It has
                the whole time of a start.
        """
        self.restored = restored
        self.engine_age = max(0.0, time.time() - self._loaded_at)
        if restored:
            self._start = time.monotonic()
            for warning in self.service.warnings:
                log.error("%s: %s", warning.code, warning.message)
        prepared = self.failure is None
        if prepared and self._snapshot != "off":
            await self._attempt(self._woken)
            if self.failure is not None:
                self._warn(
                    "restore_failed",
                    "the engine did not survive the snapshot, and the model has to be loaded "
                    f"afresh, which takes minutes: {self.failure.message}",
                )
        # Another container may find what the first one missed, for instance the weights.
        if self.failure is not None and (restored or self._may_load_again()):
            await self._attempt(self._loaded)
        if self.failure is not None:
            log.error("this container serves nothing: %s", self.failure)

    async def watch(self, request_replacement: Callable[[], Awaitable[None]]) -> None:
        """Wait until the engine dies, then have another container take over: at once after a
        death, after `REPLACED_AFTER` where no engine could be trusted.

        Args:
            request_replacement: Has Modal send later calls to another container.
        """
        delay = REPLACED_AFTER
        if self.failure is None:
            failure = await self.service.engine.died()
            log.error("%s Callers are told so until another one has taken over.", failure)
            await self._discard(failure)
            delay = 0.0
        while True:
            await asyncio.sleep(delay)
            try:
                await request_replacement()
            except Exception:
                log.exception("the request for a replacement failed; it is repeated")
                delay = REPLACED_AFTER
            else:
                return

    async def close(self) -> None:
        """Free the engine."""
        await self.service.close()

    def _may_load_again(self) -> bool:
        """Whether another load can help, and ends before Modal kills the container."""
        if isinstance(self.failure, EngineLoadError) and self.failure.permanent:
            log.error("the model is not loaded again: it would fail in the same way")
            return False
        if self._attempt_timeout is None:
            return True
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

    async def _attempt(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work`. Its failure discards the engine and is what the service answers."""
        try:
            await work()
        except Exception as error:
            log.exception("an engine that is not trusted is discarded")
            if not isinstance(error, KalmError):
                error = EngineLoadError(f"the engine failed: {type(error).__name__}: {error}.")
            await self._discard(error)

    async def _discard(self, failure: KalmError) -> None:
        # A copy has no traceback, whose frames would keep the engine in memory.
        failed, self.service.engine = self.service.engine, FailedEngine(copy(failure))
        self._forget("canary_failed")  # it is not served any more
        await _close(failed)

    async def _loaded_to_sleep(self) -> None:
        await self._loaded()
        if self._snapshot == "asleep":
            with self._phase("sleep"):
                await self.service.engine.sleep()

    async def _loaded(self) -> None:
        with self._phase("load"):
            engine = await self._load()
        self._loaded_at, self.engine_age = time.time(), 0.0
        try:
            with self._phase("warm_up"):
                await engine.warm_up()
            with self._phase("canary"):
                self._proof = await self._prove(engine, None)
        except BaseException:
            await _close(engine)
            raise
        self.service.engine = engine

    async def _woken(self) -> None:
        if self._snapshot == "asleep":
            with self._phase("wake"):
                await self.service.engine.wake()
        with self._phase("canary_after"):
            proof = await self._prove(self.service.engine, self._proof)
        if self._proof is None or proof is None or np.array_equal(proof, self._proof):
            return
        log.warning("vectors after the snapshot are close to those before, but not bit-equal")

    async def _prove(self, engine: Engine, before: canary.Vectors | None) -> canary.Vectors | None:
        """The canary's vectors; None where it failed and the engine is served anyway.

        Raises:
            CanaryFailedError: The vectors are wrong, and `canary_mode` is "refuse".
        """
        self._forget("canary_failed")
        try:
            return await canary.prove(engine, before)
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
        self._forget(code)
        self.service.warnings += (ServiceWarning(code, message),)
        log.error("%s: %s", code, message)

    def _forget(self, code: str) -> None:
        self.service.warnings = tuple(w for w in self.service.warnings if w.code != code)

    def _warns(self, code: str) -> bool:
        return any(warning.code == code for warning in self.service.warnings)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        log.info("phase %s begins", name)
        start = time.perf_counter()
        try:
            yield
        finally:
            while name in self.phases:  # again, after a failure: a phase of its own
                name += "_again"
            self.phases[name] = seconds = time.perf_counter() - start
            log.info("phase %s took %.2f s", name, seconds)


async def _close(engine: Engine) -> None:
    try:
        await engine.close()
    except Exception:
        log.exception("an engine did not close")
