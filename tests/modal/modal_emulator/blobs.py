"""The object store behind values too large to travel inline (2 MiB; 8 KiB for spawned calls)."""

import collections
import hashlib

from aiohttp import web


class BlobStore:
    """`stats` counts puts, gets and their bytes, so that tests can tell which path a value took."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.stats: collections.Counter[str] = collections.Counter()
        self.base_url = ""

    def application(self) -> web.Application:
        application = web.Application(client_max_size=1 << 32)
        application.router.add_put("/blob/{id}", self._put)
        application.router.add_get("/blob/{id}", self._get)
        return application

    def url(self, blob_id: str) -> str:
        return f"{self.base_url}/blob/{blob_id}"

    def put(self, blob_id: str, data: bytes) -> None:
        self.data[blob_id] = data
        self.stats["puts"] += 1
        self.stats["put_bytes"] += len(data)

    def get(self, blob_id: str) -> bytes:
        data = self.data[blob_id]
        self.stats["gets"] += 1
        self.stats["get_bytes"] += len(data)
        return data

    async def _put(self, request: web.Request) -> web.Response:
        data = await request.read()
        self.put(request.match_info["id"], data)
        # The client compares this with what it sent.
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return web.Response(headers={"ETag": f'"{digest}"'})

    async def _get(self, request: web.Request) -> web.Response:
        try:
            return web.Response(body=self.get(request.match_info["id"]))
        except KeyError:
            return web.Response(status=404)
