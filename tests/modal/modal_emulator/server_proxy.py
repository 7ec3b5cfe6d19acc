"""`@app.server`: plain HTTP, forwarded to the port that the container listens on."""

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web

if TYPE_CHECKING:
    from .pool import Pool


async def forward(
    request: web.Request, pool: "Pool", headers: Iterable[tuple[str, str]]
) -> web.StreamResponse:
    """One local container only, since all containers share the host's ports."""
    config = pool.definition.http_config
    passed = [(name, value) for name, value in headers if name.lower() != "host"]
    body = await request.read()
    url = f"http://127.0.0.1:{config.port}{request.path_qs}"
    try:
        async with asyncio.timeout(config.startup_timeout or 30):
            await pool.live[0].ready.wait()
    except (TimeoutError, IndexError):
        return web.Response(status=503, text="modal-http: no container is ready")
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        for _ in range(200):
            try:
                upstream = await session.request(
                    request.method, url, headers=passed, data=body, allow_redirects=False
                )
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.05)
                continue
            async with upstream:
                return await _relay(request, upstream)
    return web.Response(status=503, text="modal-http: nothing listens on the port")


async def _relay(request: web.Request, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=upstream.status)
    for name, value in upstream.headers.items():
        if name.lower() not in ("transfer-encoding", "connection"):
            response.headers.add(name, value)
    await response.prepare(request)
    async for data in upstream.content.iter_any():
        await response.write(data)
    await response.write_eof()
    return response
