"""The life of one container: load, prove, sleep; (snapshot;) wake, prove, serve.

Nothing here raises: a container that fails to start is started again without end, and each start
is paid. One that cannot be trusted serves its failure instead, as data.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import numpy as np

from kalm_integrations.errors import EngineLoadError, KalmError
from modal_backend import canary
from modal_backend.engines import Engine
from modal_backend.engines.out_of_order import OutOfOrderEngine
from modal_backend.service import EmbeddingService
from modal_backend.settings import Snapshot

log = logging.getLogger(__name__)

REPLACED_AFTER = 300.0
"""Seconds that an unhealthy container answers before it gives way to another: at worst that many
starts are paid, however many calls come."""


class Life:
    """Keeps a trusted engine in `service`, or the reason why there is none.

    Args:
        load: Loads the engine afresh.
        snapshot: What is done between `prepare` and `resume`: no snapshot, one of the engine as
            it runs, or one of the engine asleep.
    """

    def __init__(self, load: Callable[[], Awaitable[Engine]], snapshot: Snapshot) -> None:
        self._load = load
        self._snapshot = snapshot
        self._proof: canary.Vectors | None = None
        self.service = EmbeddingService(OutOfOrderEngine(EngineLoadError("nothing is loaded yet.")))
        self.phases: dict[str, float] = {}
        """Seconds that each phase took, in order."""

    @property
    def failure(self) -> KalmError | None:
        """Why nothing is served; None when all is well."""
        return self.service.failure

    async def prepare(self) -> None:
        """Before the snapshot: load, prove, keep the proof, put the engine to sleep."""
        async with _Attempt(self):
            self.service.engine = await self._loaded()
            if self._snapshot == "asleep":
                with self._phase("sleep"):
                    await self.service.engine.sleep()

    async def resume(self) -> None:
        """After the snapshot: wake, prove. Where anything failed, once more afresh."""
        if self.failure is not None:
            await self._afresh()
            return
        if self._snapshot == "off":
            return
        try:
            if self._snapshot == "asleep":
                with self._phase("wake"):
                    await self.service.engine.wake()
            with self._phase("canary_after"):
                proof = await canary.prove(self.service.engine, self._proof)
        except Exception as error:  # noqa: BLE001 (whatever it is, a fresh engine may lack it)
            log.error("the restored engine is not trusted (%s): loading afresh", error)
            await self._afresh()
            return
        if self._proof is not None and not np.array_equal(proof, self._proof):
            log.warning("vectors after the snapshot are close to those before, but not bit-equal")

    async def retire(self, stop_fetching: Callable[[], Awaitable[None]]) -> None:
        """Of an unhealthy container: answer for a while, then give way to another."""
        if self.failure is not None:
            await asyncio.sleep(REPLACED_AFTER)
            await stop_fetching()

    async def close(self) -> None:
        """Free the engine."""
        await self.service.close()

    async def _afresh(self) -> None:
        await self.service.engine.close()
        async with _Attempt(self):
            self.service.engine = await self._loaded()

    async def _loaded(self) -> Engine:
        with self._phase("load"):
            engine = await self._load()
        try:
            with self._phase("canary"):
                self._proof = await canary.prove(engine)
        except BaseException:
            await engine.close()
            raise
        return engine

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            # A second time, after a failure, is a phase of its own.
            name = name if name not in self.phases else f"{name}_again"
            self.phases[name] = seconds = time.perf_counter() - start
            log.info("phase %s took %.2f s", name, seconds)


class _Attempt:
    """A block whose failure puts the service out of order instead of being raised."""

    def __init__(self, life: Life) -> None:
        self._life = life

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        log.error("this container serves nothing: %s", error, exc_info=error)
        if not isinstance(error, KalmError):
            failure = EngineLoadError(f"the engine failed: {type(error).__name__}: {error}.")
            failure.__cause__ = error
            error = failure
        self._life.service.engine = OutOfOrderEngine(error)
        return True
