"""A server that answers every client's way of asking at once, with vectors made beforehand.

    python benchmarks/client/server.py PORT [LATENCY_MS]

What is measured against it is the client. The i-th text of a request gets row i of `rows()`,
whatever it says, so that whoever mixes up rows is found out.

| request | answer |
|---|---|
| POST /v1/embeddings, Accept: safetensors | ours: packed, float16 or float32 |
| POST /v1/embeddings, /embeddings | OpenAI's JSON: base64, or numbers |
| POST /embed | TEI's JSON: lists of numbers |
| POST /raw | float32, nothing else |
| GET /v1/models | the model, with its identity |
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import orjson

from kalm_integrations import models
from kalm_integrations.codec import MEDIA_TYPE, packed_parts
from kalm_integrations.protocol import EmbedRequest, EmbedResponse, VectorDtype
from kalm_integrations.result import Usage
from modal_backend.http.responses import embeddings_json

DIMENSIONS = 3840
MODEL = models.KALM.space.model


@cache
def rows() -> np.ndarray[Any, np.dtype[np.float32]]:
    """128 unit vectors that float16 holds exactly, but for the last steps of their length."""
    made = np.random.default_rng(0).standard_normal((128, DIMENSIONS), dtype=np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return made.astype(np.float16).astype(np.float32)


@cache
def prepared(texts: int, dtype: VectorDtype = "float32") -> EmbedResponse:
    """The vectors of so many texts."""
    return EmbedResponse(
        vectors=np.resize(rows(), (texts, DIMENSIONS)).astype(dtype),
        identity=models.KALM.space,
        usage=Usage(tokens=texts, requests=1),
    )


def packed(fields: dict[str, Any]) -> bytes:
    """The whole answer of our server, with the digest of its request."""
    request = EmbedRequest(
        texts=fields["input"],
        role=fields["priority"],
        dimensions=fields.get("dimensions"),
        truncate=fields["truncate"],
    )
    answer = replace(prepared(len(request.texts), fields["embed_dtype"]), digest=request.digest())
    return whole(MEDIA_TYPE.encode(), b"".join(packed_parts(answer)))


@cache
def answer(kind: str, texts: int) -> bytes:
    """The whole answer of any other kind."""
    vectors = prepared(texts).vectors
    if kind == "raw":
        return whole(b"application/octet-stream", vectors.tobytes())
    if kind == "tei":
        numbers = orjson.dumps(vectors, option=orjson.OPT_SERIALIZE_NUMPY)
        return whole(b"application/json", numbers)
    return whole(b"application/json", b"".join(embeddings_json(prepared(texts), kind)))


def whole(media_type: bytes, body: bytes) -> bytes:
    """Head and body."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
    return head % (media_type, len(body)) + body


@cache
def description() -> bytes:
    """The answer to GET /v1/models."""
    space = models.KALM.space
    model = {"id": MODEL, "object": "model", "identity": space.to_dict()}
    return whole(b"application/json", orjson.dumps({"object": "list", "data": [model]}))


def respond(head: bytes, body: bytes) -> bytes:
    """What a request gets."""
    path = head.split(b" ", 2)[1]
    if path == b"/v1/models":
        return description()
    if path == b"/raw":
        return answer("raw", int(body))
    fields = orjson.loads(body)
    if path == b"/embed":
        return answer("tei", len(fields["inputs"]))
    texts = 1 if isinstance(fields["input"], str) else len(fields["input"])
    if MEDIA_TYPE.encode() in head:
        return packed(fields)
    return answer(fields.get("encoding_format", "float"), texts)


class Connection(asyncio.Protocol):
    """One connection, with one request at a time on it."""

    connections = 0

    def __init__(self, latency: float) -> None:
        self._latency = latency
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        Connection.connections += 1

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        head = bytes(self._received[:end])
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-len")]
        length = int(lengths[0].partition(b":")[2]) if lengths else 0
        if len(self._received) < end + length:
            return
        body = bytes(self._received[end : end + length])
        del self._received[: end + length]
        if head.startswith(b"GET /connections "):
            number = b"%d" % Connection.connections
            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(number)
            self._transport.write(head + number)
        elif self._latency:
            asyncio.get_running_loop().call_later(
                self._latency, self._transport.write, respond(head, body)
            )
        else:
            self._transport.write(respond(head, body))


async def serve(port: int, latency: float) -> None:
    """Until the process is ended."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(latency), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2]) / 1000 if len(sys.argv) > 2 else 0.0))
