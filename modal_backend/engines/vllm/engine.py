"""The vLLM engine: a front-end in this process and an engine core in another one.

Every text is a request of its own, so that texts of all callers are computed together. Works on one
event loop, the one in which `load` was awaited (benchmarks/gpu/NOTES.md).
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from copy import copy
from functools import partial
from typing import Any, Final

import numpy as np

from kalm_integrations.errors import (
    ContainerFailedError,
    EngineLoadError,
    KalmError,
    ServiceUnavailableError,
    TransportError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import profile_of
from kalm_integrations.prompts import Role
from kalm_integrations.protocol import Truncate
from modal_backend.engines import base
from modal_backend.engines.base import LIVENESS_SECONDS, PRIORITY, EngineOutput, Progress
from modal_backend.engines.vllm import process
from modal_backend.engines.vllm.config import VLLMOptions, check, dimensions_of, identity_of
from modal_backend.engines.vllm.tokenizer import CHUNK_TEXTS, Tokenizer
from modal_backend.weights import Weights

log = logging.getLogger(__name__)

_INSPECT_SECONDS: Final = 60.0


class VLLMEngine:
    """A loaded model; see `Engine`. Use `load` to create it."""

    def __init__(self, llm: Any, guard: process.CoreGuard, identity: SpaceIdentity) -> None:
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        self.identity = identity
        self.dimensions = dimensions_of(llm.model_config, identity.model)
        self.max_tokens = int(llm.model_config.max_model_len)
        self.query_template = profile_of(identity.model).query_template
        self._llm = llm
        self._can_sleep: bool = llm.model_config.enable_sleep_mode
        self._asleep = self._closed = False
        self._calls: set[asyncio.Task[Any]] = set()
        self._closing_error: Callable[[], KalmError] = base.stopping_error
        self._tokenizer = Tokenizer(llm.get_tokenizer(), self.max_tokens)
        self._guard = guard
        self._cores = process.cores(llm)
        self._numbers = itertools.count()
        self._params = _pooling_params()
        self._input = tokens_input
        self._dead_error = EngineDeadError

    @classmethod
    async def load(cls, weights: Weights, options: VLLMOptions) -> VLLMEngine:
        """Load a model and check it. Blocks the event loop.

        Args:
            weights: The model, from `modal_backend.weights.locate`.
            options: How it is run.

        Raises:
            EngineLoadError: vLLM could not load the model, or did not load it as requested.
        """
        process.set_environment()
        profile = profile_of(weights.name)
        if profile.dtype and options.dtype not in ("auto", profile.dtype):
            raise EngineLoadError(
                f"dtype={options.dtype!r}: {weights.name} is run in {profile.dtype}; "
                "in another type its vectors would be in another space."
            )
        llm, guard, limit = None, process.CoreGuard(), process.StartLimit()
        try:
            with guard.marking(), limit:
                llm, arguments = process.start(weights, options)
            if limit.expired:  # just as it became ready
                raise TimeoutError
            async with asyncio.timeout(_INSPECT_SECONDS):  # vLLM forgets calls to a dead core
                (inspected,) = await llm.collective_rpc("inspect_model")
            log.info("vLLM loaded %s: %s", weights.name, inspected)
            identity = identity_of(weights, inspected)
            check(llm.vllm_config, identity, options, arguments)
            return cls(llm, guard, identity)
        except BaseException as error:
            if llm is None:
                number = process.signal_in(error)
            else:
                number = process.signal_of(process.cores(llm))
                await process.shut_down(llm)
            guard.finish()
            if isinstance(error, EngineLoadError):  # the loaded model differs from the request
                error.permanent = True
            if isinstance(error, KalmError) or not isinstance(error, Exception):
                raise
            if not limit.expired and number is not None:
                reason = process.core_failure(number)
            elif limit.expired or isinstance(error, TimeoutError):
                reason = limit.reason()
            else:
                reason = f"{type(error).__name__}: {error}."
            raise EngineLoadError(f"vLLM could not load {weights.folder}: {reason}") from error
        finally:
            llm = None  # imports keep this frame alive, and it would keep a closed engine

    async def embed(
        self,
        texts: Sequence[str],
        *,
        role: Role,
        truncate: Truncate,
        deadline: float | None,
        progress: Progress = base.no_progress,
    ) -> EngineOutput:
        """See `Engine.embed`."""
        self._check_usable()
        call = asyncio.current_task()
        assert call is not None
        self._calls.add(call)
        try:
            async with base.within(deadline):
                ids, counts = await self._tokenizer.tokenize(texts, PRIORITY[role], truncate)
                vectors = await self._compute(ids, PRIORITY[role], progress)
        except asyncio.CancelledError:
            if not self._closed:
                raise
            call.uncancel()
            raise self._closing_error() from None
        finally:
            self._calls.discard(call)
        truncated = tuple(base.over_limit(counts, self.max_tokens))
        return EngineOutput(vectors, sum(map(len, ids)), truncated)

    async def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """See `Engine.count_tokens`."""
        self._check_usable()
        return (await self._tokenizer.tokenize(texts, PRIORITY["document"], "end"))[1]

    async def warm_up(self) -> None:
        """Embed a short text, one of more than a step, and a full step of documents, so that
        everything is compiled and allocated. Then exclude the objects in memory from Python's
        garbage collection: it took half a second, in which no caller was answered."""
        self._check_usable()
        step = self._llm.vllm_config.scheduler_config.max_num_batched_tokens
        long = "warm up " * min(self.max_tokens, step + 1)
        batch = [f"warm up {number} " * 8 for number in range(512)]
        for texts in (["warm up"], [long], batch):
            for role in PRIORITY:
                await self.embed(texts, role=role, truncate="end", deadline=None)
        gc.collect()
        gc.freeze()

    async def died(self) -> KalmError:
        """Wait until the engine core has died; return the error for later callers."""
        # A flag that vLLM sets from a thread.
        while self._closed or not self._llm.errored:  # noqa: ASYNC110
            await asyncio.sleep(LIVENESS_SECONDS)
        return self._core_error()

    async def sleep(self) -> None:
        """Finish requests in progress, move the weights into host memory and drop the KV cache
        (vLLM's level 1). Moves nothing on a CPU, where vLLM has no sleep mode."""
        self._check_alive()
        if self._asleep:
            return
        self._asleep = True
        if self._calls:  # texts that vLLM does not have yet would wait for `wake`
            await asyncio.wait(self._calls)
        if not self._can_sleep:
            log.warning("this platform has no sleep mode: the engine stays as it is")
            return
        await self._wait_for(self._llm.collective_rpc("free_host_copies"))
        await self._wait_for(self._llm.sleep(level=1, mode="wait"))

    async def wake(self) -> None:
        """Undo `sleep`."""
        self._check_alive()
        if self._asleep and self._can_sleep:
            await self._wait_for(self._llm.collective_rpc("keep_host_copies"))
            await self._wait_for(self._llm.wake_up())
        self._asleep = False

    async def close(self) -> None:
        """End the engine core. Calls in progress fail."""
        if self._closed:
            return
        self._closed = True
        if self._llm.errored:
            self._closing_error = partial(copy, self._core_error())  # before it is killed here
        for call in self._calls:
            call.cancel()
        self._tokenizer.close()
        try:
            await process.shut_down(self._llm)
        finally:
            self._guard.finish(self._cores)
            self._llm = None
            gc.unfreeze()

    async def _compute(
        self, token_ids: list[list[int]], priority: int, progress: Progress
    ) -> np.ndarray[Any, Any]:
        progress(0)
        vectors = np.empty((len(token_ids), self.dimensions[0]), dtype=np.float32)
        # Not `AsyncLLM.encode`, which needs a task for each text: at 1,500 short texts a second
        # the CPU is the limit. vLLM keeps the outputs until they are fetched.
        requests: list[Any] = []
        failure: BaseException | None = None
        try:
            for number, tokens in enumerate(token_ids, 1):
                name, prompt = f"kalm-{next(self._numbers)}", self._input(tokens)
                requests.append(
                    await self._llm.add_request(name, prompt, self._params, priority=priority)
                )
                if number % CHUNK_TEXTS == 0:
                    await asyncio.sleep(0)
            for number, request in enumerate(requests):
                output = (await request.get()).outputs.data.numpy()
                base.check_shape(output, vectors[number].shape)
                vectors[number] = output
                progress(number + 1)
        except BaseException as error:  # noqa: BLE001 (raised below)
            failure = error
            if not self._closed:
                with suppress(self._dead_error):  # a dead core has nothing left to drop
                    await self._llm.abort([each.request_id for each in requests], internal=True)
        if failure is not None:
            # Outside of `except`, and without vLLM's frames, so that callers see none of them.
            raise self._translate(failure).with_traceback(None)
        return vectors

    async def _wait_for(self, call: Awaitable[Any]) -> None:
        """Wait for vLLM, which never answers if its core dies meanwhile."""
        response = asyncio.ensure_future(call)
        try:
            while not response.done():
                await asyncio.wait((response,), timeout=LIVENESS_SECONDS)
                if not response.done():
                    self._check_alive()
        finally:
            response.cancel()
        if (error := response.exception()) is not None:
            raise self._translate(error)

    def _check_usable(self) -> None:
        self._check_alive()
        if self._asleep:
            raise ServiceUnavailableError("the engine is asleep.", retry_after=1.0)

    def _check_alive(self) -> None:
        if self._closed:
            raise EngineLoadError("the engine is closed.")
        if self._llm.errored:
            raise self._core_error()

    def _core_error(self) -> KalmError:
        return ContainerFailedError(process.core_failure(process.signal_of(self._cores)))

    def _translate(self, error: BaseException) -> BaseException:
        """Replace vLLM's errors: callers do not have its classes, and all requests share one
        instance."""
        if isinstance(error, KalmError) or not isinstance(error, Exception):
            return error
        if isinstance(error, self._dead_error) or isinstance(error.__cause__, self._dead_error):
            return self._core_error()
        log.error("vLLM failed", exc_info=error)
        return TransportError(f"vLLM failed: {type(error).__name__}: {error}.")


def _pooling_params() -> Any:
    """The parameters of every request."""
    from vllm.pooling_params import PoolingParams

    class Shared(PoolingParams):  # type: ignore[misc]
        """Without vLLM's deep copy for each text, which costs as much as tokenizing a short one.
        Nothing changes them here, and the core has its own."""

        def clone(self) -> PoolingParams:
            return self

    # Without a task vLLM returns a vector for each token. Normalization has to be requested, or
    # the configuration decides.
    return Shared(task="embed", use_activation=True)
