"""The unit of work: the texts of one part to their vectors, here and in a container alike."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kalm_integrations import prompts
from kalm_integrations.batching import Batch, plan
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import (
    AuthenticationError,
    CanaryFailedError,
    DeadlineExceededError,
    IdentityMismatchError,
    InvalidText,
    KalmError,
    NotFoundError,
    PermissionDeniedError,
)
from kalm_integrations.result import EmbeddedBatch, Usage

Send = Callable[[Batch], Awaitable[EmbeddedBatch]]
_SUSPICIOUS: Final = 16
"""If none of so many texts can be embedded, the service is to blame: it embeds the probe alone."""
PROBE: Final = "Does the service embed a plain text?"
_CONCERNS_SERVICE: Final = (
    AuthenticationError,
    CanaryFailedError,
    DeadlineExceededError,
    IdentityMismatchError,
    NotFoundError,
    PermissionDeniedError,
)


@dataclass(frozen=True, slots=True)
class Result:
    """Vectors of some rows of a part, or why they have none; and whether these texts were cut."""

    batch: EmbeddedBatch
    truncated: bool = False


class Sender:
    """Sends batches to a service, and finds out which text a failure is due to.

    Args:
        config: Of the client.
        template: What documents are set into.
        sending: A function that embeds a batch, with some options of the client changed; texts that
            are refused are in `rejected`.
        patience: Options with which the service is waited for while it fails.
    """

    def __init__(
        self, config: ClientConfig, template: str, sending: Callable[..., Send], **patience: Any
    ) -> None:
        cut = config.truncate == "end"
        self._send = sending(truncate="error") if cut else sending()
        self._send_cut = sending() if cut else None
        self._wait = sending(**patience)
        self._template, self._limits = template, config.request_limits
        self._slots = asyncio.Semaphore(config.max_concurrency)
        self.stopped = False
        """Whether nothing more is sent; what is under way is still answered, and taken."""

    def batches(self, texts: list[tuple[int, str]]) -> list[Batch]:
        """The requests for the texts of a part; always the same for the same texts."""
        return list(plan(texts, self._template, self._limits))

    async def send(self, batch: Batch) -> list[Result]:
        """Embed one batch. A text that the service refuses or fails on is in `rejected`.

        Raises:
            KalmError: The service fails for any text.
        """
        async with self._slots:
            if self.stopped:
                return []
            whole = await self._isolated(self._send, batch)
            results = [Result(whole)]
            if self._send_cut is not None and whole.rejected:
                # Whatever is refused whole and embedded when cut was too long.
                refused = {bad.index for bad in whole.rejected}
                results = [Result(EmbeddedBatch(whole.indices, whole.packed, whole.usage))]
                fine = [n for n, places in enumerate(batch.positions) if places[0] not in refused]
                cut = await self._isolated(self._send_cut, batch.without(fine))
                results.append(Result(cut, truncated=True))
            return results

    async def _isolated(self, send: Send, batch: Batch) -> EmbeddedBatch:
        """Embed `batch`, less the texts that make the service fail."""
        for _ in range(2):
            try:
                return await send(batch)
            except KalmError as error:
                if isinstance(error, _CONCERNS_SERVICE):
                    raise
                failure = error
            await self._probe(failure)
        if len(batch) == 1:
            reason = f"makes the service fail: {failure.message}"
            rejected = tuple(batch.locate([InvalidText(0, reason)]))
            nothing = np.empty((0, 0), dtype=np.float16)
            return EmbeddedBatch(np.empty(0, dtype=np.int64), nothing, Usage(), rejected)
        first, second = batch.halves()
        joined = await self._isolated(send, first)
        joined = joined.joined(await self._isolated(send, second))
        if not len(joined) and len(batch) >= _SUSPICIOUS:
            raise failure
        return joined

    async def _probe(self, failure: KalmError) -> None:
        """Wait until the service embeds a plain text.

        Raises:
            KalmError: `failure`: it does not.
        """
        try:
            probe = await self._wait(Batch([prompts.apply(self._template, PROBE)], [[0]]))
        except KalmError as error:
            raise failure from error
        if not len(probe):
            raise failure
