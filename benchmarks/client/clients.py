"""Every client that is compared, as its users would use it: 64 texts a request, as many requests at
a time as it makes by itself, an API key.

`CLIENTS[name](url)` opens one and gives two functions: of many texts, and of one query.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from server import DIMENSIONS, MODEL

BATCH = 64
CONCURRENCY = 16
KEY = "benchmark"
Embed = tuple[Callable[[list[str]], Any], Callable[[str], Any]]


def batches(texts: list[str]) -> list[list[str]]:
    """In parts of `BATCH`."""
    return [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]


# --- the floor


def raw_socket(url: str) -> Embed:
    """Bytes from a blocking socket into the array's memory. Nothing is parsed, nothing checked."""
    host, port = url.removeprefix("http://").split(":")
    connections = [socket.create_connection((host, int(port))) for _ in range(2)]

    def receive(connection: socket.socket, number: int, into: memoryview) -> None:
        body = b"%d" % number
        connection.sendall(
            b"POST /raw HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        received = connection.recv(65_536)
        while (end := received.find(b"\r\n\r\n") + 4) < 4:
            received += connection.recv(65_536)
        done = len(received) - end
        into[:done] = received[end:]
        while done < len(into):
            done += connection.recv_into(into[done:])

    def many(texts: list[str]) -> Any:
        vectors = np.empty((len(texts), DIMENSIONS), dtype=np.float32)
        starts = iter(range(0, len(texts), BATCH))

        def work(connection: socket.socket) -> None:
            for start in starts:
                part = vectors[start : start + BATCH]
                receive(connection, len(part), memoryview(part).cast("B"))

        threads = [threading.Thread(target=work, args=(one,)) for one in connections]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return vectors

    def one(_: str) -> Any:
        vector = np.empty(DIMENSIONS, dtype=np.float32)
        receive(connections[0], 1, memoryview(vector).cast("B"))
        return vector

    return many, one


# --- HTTP libraries by themselves: float32, nothing else, 16 at a time; no vectors are checked


def _gathered(post: Callable[[bytes], Any], texts: list[str]) -> Any:
    """All batches through an asynchronous `post`, into one array."""
    vectors = np.empty((len(texts), DIMENSIONS), dtype=np.float32)

    async def gather() -> Any:
        slots = asyncio.Semaphore(CONCURRENCY)

        async def part(start: int) -> None:
            rows = vectors[start : start + BATCH]
            async with slots:
                body = await post(b"%d" % len(rows))
            rows[:] = np.frombuffer(body, dtype=np.float32).reshape(rows.shape)

        await asyncio.gather(*(part(start) for start in range(0, len(texts), BATCH)))
        return vectors

    return gather()


def bare_aiohttp(url: str) -> Embed:
    """aiohttp, on a loop of its own."""
    import aiohttp

    loop = asyncio.new_event_loop()

    async def open_session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), auto_decompress=False, trust_env=False
        )

    session = loop.run_until_complete(open_session())

    async def post(body: bytes) -> bytes:
        async with session.post(f"{url}/raw", data=body) as response:
            return await response.read()

    def one(_: str) -> Any:
        return np.frombuffer(loop.run_until_complete(post(b"1")), dtype=np.float32)

    return lambda texts: loop.run_until_complete(_gathered(post, texts)), one


def aiohttp_query(url: str) -> Callable[[str], bytes]:
    """The request that our client makes of a query, and its answer, unread: aiohttp alone."""
    import aiohttp

    from kalm_integrations.codec import MEDIA_TYPE

    loop = asyncio.new_event_loop()

    async def open_session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), auto_decompress=False, trust_env=False
        )

    session = loop.run_until_complete(open_session())
    headers = {
        "Authorization": f"Bearer {KEY}",
        "Accept": MEDIA_TYPE,
        "Content-Type": "application/json",
    }
    fields = {"model": MODEL, "embed_dtype": "float16", "priority": "query", "truncate": "error"}

    async def post(text: str) -> bytes:
        body = json.dumps({**fields, "input": [text]}).encode()
        async with session.post(f"{url}/v1/embeddings", data=body, headers=headers) as response:
            return await response.read()

    return lambda text: loop.run_until_complete(post(text))


def bare_httpx2(url: str) -> Embed:
    """httpx2, on a loop of its own."""
    import httpx2

    loop = asyncio.new_event_loop()
    client = httpx2.AsyncClient(timeout=60, trust_env=False)

    async def post(body: bytes) -> bytes:
        return (await client.post(f"{url}/raw", content=body)).content

    def one(_: str) -> Any:
        return np.frombuffer(loop.run_until_complete(post(b"1")), dtype=np.float32)

    return lambda texts: loop.run_until_complete(_gathered(post, texts)), one


def bare_pyreqwest(url: str) -> Embed:
    """Pyreqwest (Rust), on a loop of its own."""
    from pyreqwest.client import ClientBuilder

    loop = asyncio.new_event_loop()
    client = ClientBuilder().build()

    async def post(body: bytes) -> Any:
        response = await client.post(f"{url}/raw").body_bytes(body).build().send()
        return await response.bytes()

    def one(_: str) -> Any:
        return np.frombuffer(loop.run_until_complete(post(b"1")), dtype=np.float32)

    return lambda texts: loop.run_until_complete(_gathered(post, texts)), one


def bare_urllib3(url: str) -> Embed:
    """urllib3, in as many threads as there are requests at a time."""
    from concurrent.futures import ThreadPoolExecutor

    import urllib3

    pool = urllib3.PoolManager(maxsize=CONCURRENCY)
    threads = ThreadPoolExecutor(CONCURRENCY)

    def post(body: bytes) -> bytes:
        return pool.request("POST", f"{url}/raw", body=body).data

    def many(texts: list[str]) -> Any:
        vectors = np.empty((len(texts), DIMENSIONS), dtype=np.float32)

        def part(start: int) -> None:
            rows = vectors[start : start + BATCH]
            body = post(b"%d" % len(rows))
            rows[:] = np.frombuffer(body, dtype=np.float32).reshape(rows.shape)

        list(threads.map(part, range(0, len(texts), BATCH)))
        return vectors

    return many, lambda _: np.frombuffer(post(b"1"), dtype=np.float32)


# --- ours


def _ours(url: str, **options: Any) -> dict[str, Any]:
    return {
        "backend": "http", "base_url": url, "api_key": KEY, "model": MODEL, "batch_size": BATCH,
        "document_instruction": None, "query_instruction": None, **options,
    }  # fmt: skip


def kalm_client(url: str, **options: Any) -> Embed:
    """`KalmClient`, to float32 arrays."""
    from kalm_integrations import KalmClient

    client = KalmClient(**_ours(url, **options))
    return (
        lambda texts: client.embed(texts).vectors,
        lambda text: client.embed([text], role="query").vectors[0],
    )


def kalm_langchain(url: str, **options: Any) -> Embed:
    """Our adapter for LangChain."""
    from kalm_integrations.langchain import KalmModalEmbeddings

    embeddings = KalmModalEmbeddings(**_ours(url, **options))
    return embeddings.embed_documents, embeddings.embed_query


def kalm_llama_index(url: str, **options: Any) -> Embed:
    """Our adapter for LlamaIndex."""
    from kalm_integrations.llama_index import KalmModalEmbeddings

    embeddings = KalmModalEmbeddings(**_ours(url, **options))
    return embeddings.get_text_embedding_batch, embeddings.get_query_embedding


def _float32(opened: Callable[..., Embed]) -> Callable[[str], Embed]:
    return lambda url: opened(url, vector_dtype="float32")


# --- peers


def openai_client(url: str) -> Embed:
    """openai: base64, decoded by numpy into lists; its users send batches one by one."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY)

    def part(texts: list[str]) -> list[list[float]]:
        answer = client.embeddings.create(model=MODEL, input=texts)
        return [item.embedding for item in answer.data]

    def many(texts: list[str]) -> list[list[float]]:
        return list(itertools.chain.from_iterable(map(part, batches(texts))))

    return many, lambda text: part([text])[0]


def langchain_openai(url: str) -> Embed:
    """LangChain's OpenAIEmbeddings, as a server that is not OpenAI's needs it."""
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(
        model=MODEL,
        base_url=f"{url}/v1",
        api_key=KEY,  # type: ignore[arg-type]
        chunk_size=BATCH,
        check_embedding_ctx_length=False,
    )
    return embeddings.embed_documents, embeddings.embed_query


def llama_index_openai_like(url: str) -> Embed:
    """LlamaIndex's OpenAILikeEmbedding."""
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    embeddings = OpenAILikeEmbedding(
        model_name=MODEL, api_base=f"{url}/v1", api_key=KEY, embed_batch_size=BATCH
    )
    return embeddings.get_text_embedding_batch, embeddings.get_query_embedding


def llama_index_tei(url: str) -> Embed:
    """LlamaIndex's client of Text Embeddings Inference."""
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    embeddings = TextEmbeddingsInference(
        model_name=MODEL,
        base_url=url,
        auth_token=f"Bearer {KEY}",
        embed_batch_size=BATCH,
        query_instruction="",
        text_instruction="",
    )
    return embeddings.get_text_embedding_batch, embeddings.get_query_embedding


def infinity(url: str) -> Embed:
    """infinity_client, batch by batch."""
    from infinity_client import Client
    from infinity_client.api.default import embeddings
    from infinity_client.models import OpenAIEmbeddingInputText

    client = Client(base_url=url)

    def part(texts: list[str]) -> list[list[float]]:
        body = OpenAIEmbeddingInputText(input_=texts, model=MODEL)
        return [item.embedding for item in embeddings.sync(client=client, body=body).data]

    def many(texts: list[str]) -> list[list[float]]:
        return list(itertools.chain.from_iterable(map(part, batches(texts))))

    return many, lambda text: part([text])[0]


def _baseten(url: str) -> Callable[[list[str]], Any]:
    from baseten_performance_client import PerformanceClient, RequestProcessingPreference

    client = PerformanceClient(base_url=url, api_key=KEY)
    preference = RequestProcessingPreference(
        batch_size=BATCH, max_concurrent_requests=CONCURRENCY, timeout_s=360
    )
    return lambda texts: client.embed(texts, model=MODEL, preference=preference)


def baseten_numpy(url: str) -> Embed:
    """baseten_performance_client (Rust), to float32 arrays."""
    embed = _baseten(url)
    return lambda texts: embed(texts).numpy(), lambda text: embed([text]).numpy()[0]


def baseten_lists(url: str) -> Embed:
    """baseten_performance_client (Rust), to lists."""
    embed = _baseten(url)
    return (
        lambda texts: [item.embedding for item in embed(texts).data],
        lambda text: embed([text]).data[0].embedding,
    )


def json_numbers(url: str) -> Embed:
    """What everybody can write: urllib3 and `json.loads` of numbers."""
    import urllib3

    pool = urllib3.PoolManager()

    def part(texts: list[str]) -> list[list[float]]:
        body = json.dumps({"model": MODEL, "input": texts})
        answer = pool.request("POST", f"{url}/v1/embeddings", body=body)
        return [item["embedding"] for item in json.loads(answer.data)["data"]]

    def many(texts: list[str]) -> list[list[float]]:
        return list(itertools.chain.from_iterable(map(part, batches(texts))))

    return many, lambda text: part([text])[0]


FLOOR = "raw socket, float32"
CLIENTS: dict[str, Callable[[str], Embed]] = {
    FLOOR: raw_socket,
    "aiohttp, float32 bytes": bare_aiohttp,
    "httpx2, float32 bytes": bare_httpx2,
    "pyreqwest, float32 bytes": bare_pyreqwest,
    "urllib3, float32 bytes": bare_urllib3,
    "KalmClient": kalm_client,
    "KalmClient, float32": _float32(kalm_client),
    "baseten-performance-client": baseten_numpy,
    "KalmModalEmbeddings, LangChain": kalm_langchain,
    "KalmModalEmbeddings, LangChain, float32": _float32(kalm_langchain),
    "KalmModalEmbeddings, LlamaIndex": kalm_llama_index,
    "KalmModalEmbeddings, LlamaIndex, float32": _float32(kalm_llama_index),
    "openai": openai_client,
    "baseten-performance-client, lists": baseten_lists,
    "LlamaIndex OpenAILikeEmbedding": llama_index_openai_like,
    "LangChain OpenAIEmbeddings": langchain_openai,
    "infinity_client": infinity,
    "LlamaIndex TextEmbeddingsInference": llama_index_tei,
    "urllib3 and json": json_numbers,
}
PACKAGES = (
    *("kalm-integrations", "aiohttp", "numpy", "httpx2", "urllib3", "pyreqwest", "openai"),
    *("langchain-core", "langchain-openai", "llama-index-core", "baseten-performance-client"),
    *("llama-index-embeddings-openai-like", "infinity-client"),
    "llama-index-embeddings-text-embeddings-inference",
)
