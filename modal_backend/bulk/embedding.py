"""One shard's texts through the service beside it: planned, sent and verified as any client's.

`Session` is the client's own way to send; here it goes to the service in the same process and on
the same loop.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import numpy as np

from kalm_integrations.batching import plan
from kalm_integrations.bulk.manifest import Job
from kalm_integrations.bulk.parts import Part
from kalm_integrations.bulk.shards import Filling
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import BadRowsError, InvalidInputError, InvalidText
from kalm_integrations.identity import VectorIdentity
from kalm_integrations.result import EmbeddedBatch
from kalm_integrations.session import CallSettings, Session
from kalm_integrations.transports.in_process import InProcessTransport
from modal_backend.service import EmbeddingService

_FOREVER: Final = 86_400.0
"""Seconds for a request: how long a shard may take is for Modal's own limit."""


async def embed(service: EmbeddingService, job: Job, number: int, part: Part) -> Filling:
    """Embed a shard's texts, each distinct one once.

    Raises:
        InvalidInputError: Texts that only the model refuses, named by their place, where the
            job's on_error is "fail".
        KalmError: The engine failed, or gave what is no vector of the job's.
    """
    identity = VectorIdentity.from_dict(job.identity)
    settings = _settings(job, identity)
    filling = Filling(
        number=number,
        start=number * job.shard_rows,
        places=part.places,
        vectors=np.full(
            (len(part.places), identity.dimensions or service.dimensions[0]),
            np.nan,
            dtype=job.vector_dtype,
        ),
        left=len(part.texts),
        reasons=dict(part.reasons),
    )
    session = Session(settings, InProcessTransport(service))
    call = CallSettings(role="document", timeout=_FOREVER, skip_invalid=job.on_error != "fail")
    batches = plan(part.texts, identity.document_template, settings.request_limits)
    sending = [asyncio.ensure_future(session.send(batch, call)) for batch in batches]
    try:
        for sent in asyncio.as_completed(sending):
            _take(filling, await sent)
    except InvalidInputError as error:
        places = [
            InvalidText(bad.index, f"({part.places[bad.index]}) {bad.reason}")
            for bad in error.invalid
        ]
        raise (BadRowsError.of(places) if places else error) from error
    finally:
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
    return filling


def _take(filling: Filling, batch: EmbeddedBatch) -> None:
    for bad in batch.rejected:
        filling.reasons[bad.index] = bad.reason
    batch.write_into(filling.vectors)
    filling.left -= len(batch) + len(batch.rejected)
    filling.tokens += batch.usage.tokens
    filling.requests += batch.usage.requests


def _settings(job: Job, identity: VectorIdentity) -> ClientConfig:
    asked: dict[str, Any] = {
        "model": identity.space.model,
        "expected_identity": identity.space,
        "dimensions": identity.dimensions or None,
        "truncate": job.truncate,
        "vector_dtype": job.vector_dtype,
    }
    return ClientConfig(backend="modal", timeout=_FOREVER, max_retries=2, **asked)
