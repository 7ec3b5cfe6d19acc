"""The vLLM engine: KaLM on a GPU, or any embedding model that vLLM runs, also on a CPU.

vLLM 0.32's `AsyncLLM`: a front-end in this process, its engine core in another one. Every text is
a request of its own, so that all callers' texts are computed together; queries go first.

Runs on one event loop, the one that `load` was awaited in (docs/gpu.md says what was seen).
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
    DeadlineExceededError,
    EngineLoadError,
    InputTooLongError,
    InvalidText,
    KalmError,
    ServiceUnavailableError,
    TransportError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import profile_of
from kalm_integrations.prompts import Role
from kalm_integrations.protocol import Truncate
from modal_backend.engines.base import EngineOutput, Progress, check_shape, no_progress
from modal_backend.engines.compute_thread import ComputeThread
from modal_backend.engines.priority_lock import PRIORITY, PriorityLock, chunks
from modal_backend.engines.vllm import process
from modal_backend.engines.vllm.config import VLLMOptions, check, dimensions_of, identity_of
from modal_backend.engines.vllm.tokenizer import Tokenizer
from modal_backend.weights import Weights, locate

log = logging.getLogger(__name__)

# Texts that are tokenized, or handed to vLLM, in one go: what the event loop, and a query that
# has just come, may have to wait for.
_CHUNK_TEXTS: Final = 64
_CHUNK_TOKENS: Final = 16_384
_DEAD_CHECK: Final = 0.25
_INSPECT_SECONDS: Final = 60.0


class VLLMEngine:
    """A loaded model. Made by `load`.

    Attributes:
        identity: Read off the loaded model.
        dimensions: Native first, then MRL's.
        max_tokens: Longest text, special tokens included.
        query_template: The model card's.
    """

    def __init__(
        self,
        llm: Any,
        guard: process.CoreGuard,
        identity: SpaceIdentity,
        dimensions: tuple[int, ...],
        can_sleep: bool,
    ) -> None:
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        self.identity = identity
        self.dimensions = dimensions
        self.max_tokens = int(llm.model_config.max_model_len)
        self.query_template = profile_of(identity.model).query_template
        self._llm = llm
        self._can_sleep = can_sleep
        self._asleep = self._closed = False
        self._calls: set[asyncio.Task[Any]] = set()
        self._ending: Callable[[], KalmError] = _stopping
        self._tokenizer = Tokenizer(llm.get_tokenizer(), self.max_tokens)
        self._guard = guard
        self._cores = process.cores(llm)
        self._lock = PriorityLock()
        self._worker = ComputeThread("kalm-tokenizer")
        self._numbers = itertools.count()
        self._params = _params()
        self._input = tokens_input
        self._dead_error = EngineDeadError

    @classmethod
    async def load_by_name(
        cls, model: str, revision: str | None = None, options: VLLMOptions | None = None
    ) -> VLLMEngine:
        """`load`, of a folder or of a repository in the Hugging Face cache.

        Args:
            model: See `modal_backend.weights.locate`.
            revision: See there.
            options: How it is run.

        Raises:
            EngineLoadError: As `load`; or it is not on this machine.
        """
        process.set_environment()
        try:
            weights = await asyncio.to_thread(locate, model, revision)
        except EngineLoadError as error:
            # A mounted volume stays as it was when the container started.
            error.permanent = isinstance(error.__cause__, FileNotFoundError)
            raise
        return await cls.load(weights, options)

    @classmethod
    async def load(cls, weights: Weights, options: VLLMOptions | None = None) -> VLLMEngine:
        """Load a model and check what vLLM made of it. The event loop stands still meanwhile.

        Args:
            weights: The model, from `modal_backend.weights.locate`.
            options: How it is run.

        Raises:
            EngineLoadError: vLLM is missing, could not load the model, or loaded something else
                than it was told to.
        """
        options = options or VLLMOptions()
        process.set_environment()
        try:
            import vllm.engine.arg_utils  # noqa: F401
        except ImportError as error:
            raise EngineLoadError(
                f"vLLM is not installed ({error}): pip install 'vllm==0.32.0' on a machine with "
                "an NVIDIA GPU, or take the embedded engine."
            ) from error
        profile = profile_of(weights.name)
        if profile.dtype and options.dtype not in ("auto", profile.dtype):
            raise EngineLoadError(
                f"dtype={options.dtype!r}: {weights.name} is run in {profile.dtype}; "
                "in another type its vectors would be of another space."
            )
        llm, guard, limit = None, process.CoreGuard(), process.StartLimit()
        try:
            with guard.marking(), limit:
                llm, asked = process.start(weights, options)
            if limit.expired:  # just as it became ready
                raise TimeoutError
            async with asyncio.timeout(_INSPECT_SECONDS):  # vLLM forgets calls to a dead core
                (inspected,) = await llm.collective_rpc("inspect_model")
            log.info("vLLM loaded %s: %s", weights.name, inspected)
            identity = identity_of(weights, inspected)
            check(llm.vllm_config, identity, options, asked)
            dimensions = dimensions_of(llm.model_config, weights.name)
            return cls(llm, guard, identity, dimensions, asked["enable_sleep_mode"])
        except BaseException as error:
            if llm is None:
                number = process.signal_in(error)
            else:
                number = process.signal_of(process.cores(llm))
                await process.shut_down(llm)
            guard.finish()
            if isinstance(error, EngineLoadError):  # what is loaded is not what was requested
                error.permanent = True
            if isinstance(error, KalmError) or not isinstance(error, Exception):
                raise
            reason = f"{type(error).__name__}: {error}."
            if limit.expired:
                reason = limit.reason()
            elif number is not None:
                reason = process.core_failure(number)
            elif isinstance(error, TimeoutError):
                reason = limit.reason()
            raise EngineLoadError(f"vLLM could not load {weights.folder}: {reason}") from error
        finally:
            # Imports keep this frame alive, and it would keep a closed engine in memory.
            llm = None

    async def embed(
        self,
        texts: Sequence[str],
        *,
        role: Role,
        truncate: Truncate,
        deadline: float | None,
        progress: Progress = no_progress,
    ) -> EngineOutput:
        """See `Engine.embed`."""
        self._check_usable()
        call = asyncio.current_task()
        assert call is not None
        self._calls.add(call)
        try:
            async with asyncio.timeout_at(deadline) as limit:
                ids = await self._tokenized(texts, role, truncate)
                vectors = await self._vectors(ids, PRIORITY[role], progress)
        except TimeoutError:
            if limit.expired():
                raise DeadlineExceededError(
                    "the deadline passed before all was embedded."
                ) from None
            raise
        except asyncio.CancelledError:
            if not self._closed:
                raise
            call.uncancel()
            raise self._ending() from None
        finally:
            self._calls.discard(call)
        return EngineOutput(vectors, sum(map(len, ids)))

    async def warm_up(self) -> None:
        """Embed a short text, one of more than a step, and a full step of documents: what is
        compiled or allocated at first use is there before the first caller. What is in memory then
        stays, so Python's collector is told to leave it alone: looking through it took half a
        second, in which no caller was answered."""
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
        """Wait until the engine core has died; what callers are to be told then."""
        # A flag that vLLM sets from a thread.
        while self._closed or not self._llm.errored:  # noqa: ASYNC110
            await asyncio.sleep(_DEAD_CHECK)
        return self._core_died()

    async def sleep(self) -> None:
        """Move the weights into host memory, drop the KV cache (vLLM's level 1). Requests in
        progress finish first. Nothing on a CPU, where vLLM has no sleep mode."""
        self._check_alive()
        if self._asleep:
            return
        self._asleep = True
        if self._calls:  # those texts of theirs that vLLM does not have yet would wait for `wake`
            await asyncio.wait(self._calls)
        if not self._can_sleep:
            log.warning("this platform has no sleep mode: the engine stays as it is")
            return
        await self._answered(self._llm.collective_rpc("free_host_copies"))
        await self._answered(self._llm.sleep(level=1, mode="wait"))

    async def wake(self) -> None:
        """Be ready again."""
        self._check_alive()
        if self._asleep and self._can_sleep:
            await self._answered(self._llm.collective_rpc("keep_host_copies"))
            await self._answered(self._llm.wake_up())
        self._asleep = False

    async def close(self) -> None:
        """End the engine core. Calls in progress fail."""
        if self._closed:
            return
        self._closed = True
        if self._llm.errored:
            self._ending = partial(copy, self._core_died())  # before it is killed here
        for call in self._calls:
            call.cancel()
        self._worker.stop()
        try:
            await process.shut_down(self._llm)
        finally:
            self._guard.finish(self._cores)
            self._llm = None
            gc.unfreeze()

    async def _tokenized(
        self, texts: Sequence[str], role: Role, truncate: Truncate
    ) -> list[list[int]]:
        place = self._lock.place(PRIORITY[role])
        ids: list[list[int]] = []
        too_long: list[InvalidText] = []
        for start, chunk in chunks(texts, max_texts=_CHUNK_TEXTS, max_tokens=_CHUNK_TOKENS):
            async with self._lock.hold(place):
                more, long = await self._worker.run(self._tokenizer.encode, chunk, truncate, start)
            ids += more
            too_long += long
        if too_long:
            raise InputTooLongError.of(too_long)
        return ids

    async def _vectors(
        self, ids: list[list[int]], priority: int, progress: Progress
    ) -> np.ndarray[Any, Any]:
        progress(0)
        vectors = np.empty((len(ids), self.dimensions[0]), dtype=np.float32)
        # Not `AsyncLLM.encode`: that needs a task for each text, and CPUs have short ones to carry
        # at 1,500 a second. vLLM keeps what is there until it is asked for.
        requests: list[Any] = []
        failure: BaseException | None = None
        try:
            for number, tokens in enumerate(ids, 1):
                requests.append(await self._request(tokens, priority))
                if number % _CHUNK_TEXTS == 0:
                    await asyncio.sleep(0)
            for number, request in enumerate(requests):
                output = (await request.get()).outputs.data.numpy()
                check_shape(output, vectors[number].shape)
                vectors[number] = output
                progress(number + 1)
        except BaseException as error:  # noqa: BLE001 (raised below)
            failure = error
            if not self._closed:
                with suppress(self._dead_error):  # a dead core has nothing left to drop
                    await self._llm.abort([each.request_id for each in requests], internal=True)
        if failure is not None:
            # Out here, or vLLM's exceptions would be its context; nor are its frames for callers.
            raise self._translation(failure).with_traceback(None)
        return vectors

    async def _request(self, tokens: list[int], priority: int) -> Any:
        """Hand a text to vLLM; where its answer will be."""
        request_id = f"kalm-{next(self._numbers)}"
        prompt = self._input(tokens)
        return await self._llm.add_request(request_id, prompt, self._params, priority=priority)

    async def _answered(self, work: Awaitable[Any]) -> None:
        """Wait for vLLM's answer; it never comes from a core that dies meanwhile."""
        answer = asyncio.ensure_future(work)
        try:
            while not answer.done():
                await asyncio.wait((answer,), timeout=_DEAD_CHECK)
                if not answer.done():
                    self._check_alive()
        finally:
            answer.cancel()
        if (error := answer.exception()) is not None:
            raise self._translation(error)

    def _check_alive(self) -> None:
        if self._closed:
            raise EngineLoadError("the engine is closed.")
        if self._llm.errored:
            raise self._core_died()

    def _core_died(self) -> KalmError:
        return ContainerFailedError(process.core_failure(process.signal_of(self._cores)))

    def _translation(self, error: BaseException) -> BaseException:
        """What callers see of an error of vLLM's: its classes mean nothing to them, and one
        instance of it is shared by all requests."""
        if isinstance(error, KalmError) or not isinstance(error, Exception):
            return error
        if isinstance(error, self._dead_error) or isinstance(error.__cause__, self._dead_error):
            return self._core_died()
        log.error("vLLM failed", exc_info=error)
        return TransportError(f"vLLM failed: {type(error).__name__}: {error}.")

    def _check_usable(self) -> None:
        self._check_alive()
        if self._asleep:
            raise ServiceUnavailableError("the engine is asleep.", retry_after=1.0)


def _params() -> Any:
    """What every request asks for."""
    from vllm.pooling_params import PoolingParams

    class Shared(PoolingParams):  # type: ignore[misc]
        """vLLM would make a deep copy for each text, which costs as much as tokenizing a short one
        does. Nothing changes them here, and the core gets its own."""

        def clone(self) -> PoolingParams:
            return self

    # Without a task, token vectors come back instead of one vector for each text. Whether they
    # are normalized is each request's to say; left out, it is the configuration's.
    return Shared(task="embed", use_activation=True)


def _stopping() -> KalmError:
    return ServiceUnavailableError("the service is stopping.", retry_after=1.0)
