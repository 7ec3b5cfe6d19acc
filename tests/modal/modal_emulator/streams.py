"""Reading the data streams of a call: request and response bodies, generators' items."""

import asyncio
from collections.abc import AsyncIterator

from modal_proto import api_pb2

from .model import Call


async def follow(
    call: Call, chunks: list[api_pb2.DataChunk], last_index: int
) -> AsyncIterator[api_pb2.DataChunk]:
    """The chunks past `last_index`, as they come, until the call has its result."""
    seen = 0
    while True:
        while seen < len(chunks):
            chunk, seen = chunks[seen], seen + 1
            if chunk.index > last_index:
                yield chunk
        async with call.changed:
            if seen < len(chunks):
                continue
            if call.closed:
                return
            try:
                async with asyncio.timeout(5):
                    await call.changed.wait()
            except TimeoutError:
                continue
