"""A part to a shard, with the engine beside it."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from kalm_integrations.bulk.embedding import Send, Sender
from kalm_integrations.bulk.manifest import Job
from kalm_integrations.bulk.parts import Part
from kalm_integrations.bulk.shards import ShardBuilder
from kalm_integrations.config import ClientConfig
from kalm_integrations.session import CallSettings, Session
from kalm_integrations.transports.in_process import InProcessTransport
from modal_backend.service import EmbeddingService

_FOREVER: Final = 86_400.0
"""Seconds for a request: how long a shard may take is for Modal's own limit."""


async def embed_part(service: EmbeddingService, job: Job, part: Part) -> ShardBuilder:
    """Embed a part with the service in this process, as a local job does with any service.

    Raises:
        InvalidInputError: With on_error="fail", texts that cannot be embedded, by their places.
        KalmError: The engine failed, or gave what is no vector of the job's.
    """
    identity = job.vector_identity
    builder = ShardBuilder(part, job, identity.dimensions or service.dimensions[0])
    config = ClientConfig(
        backend="modal",
        timeout=_FOREVER,
        max_retries=2,
        model=identity.space.model,
        expected_identity=identity.space,
        dimensions=identity.dimensions or None,
        vector_dtype=job.vector_dtype,
        truncate=job.truncate,
    )
    transport = InProcessTransport(service)
    call = CallSettings(role="document", timeout=_FOREVER, skip_invalid=True)

    def sending(**changed: Any) -> Send:
        session = Session(config.model_copy(update=changed), transport)
        return lambda batch: session.send(batch, call)

    sender = Sender(config, identity.document_template, sending)
    batches = await asyncio.to_thread(sender.batches, builder.own_texts())
    sent = [asyncio.ensure_future(sender.send(batch)) for batch in batches]
    try:
        for results in asyncio.as_completed(sent):
            builder.add(await results)
    finally:
        for each in sent:
            each.cancel()
        await asyncio.gather(*sent, return_exceptions=True)
    builder.check()
    return builder
