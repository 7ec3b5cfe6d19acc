"""The store that volumes' contents travel through: blocks of 8 MiB, by URL."""

import base64
import hashlib
from pathlib import Path

from aiohttp import web

from .tokens import new_id

BLOCK_SIZE = 8 * 1024 * 1024


class BlockStore:
    """Zeros at the end of a block do not travel; the client adds them again."""

    def __init__(self) -> None:
        self.blocks: dict[str, bytes] = {}
        self.base_url = ""
        self._downloads: dict[str, tuple[Path, int, int]] = {}

    def application(self) -> web.Application:
        application = web.Application(client_max_size=2 * BLOCK_SIZE)
        application.router.add_put("/block/{digest}", self._put)
        application.router.add_get("/range/{id}", self._get)
        return application

    def upload_url(self, digest: str) -> str:
        return f"{self.base_url}/block/{digest}"

    def download_urls(self, path: Path, start: int, length: int) -> list[str]:
        """One for each block that a range of a file touches."""
        urls, position, end = [], start, start + length
        while position < end:
            stop = min((position // BLOCK_SIZE + 1) * BLOCK_SIZE, end)
            range_id = new_id("rg")
            self._downloads[range_id] = (path, position, stop)
            urls.append(f"{self.base_url}/range/{range_id}")
            position = stop
        return urls

    async def _put(self, request: web.Request) -> web.Response:
        data, digest = await request.read(), request.match_info["digest"]
        if hashlib.sha256(data).hexdigest() != digest:
            return web.Response(status=400, text="sha256 mismatch")
        self.blocks[digest] = data
        return web.Response(body=f"have {digest}".encode())

    async def _get(self, request: web.Request) -> web.Response:
        if request.match_info["id"] not in self._downloads:
            return web.Response(status=404)
        path, start, stop = self._downloads[request.match_info["id"]]
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start).rstrip(b"\0")
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        return web.Response(body=data, headers={"Repr-Digest": f"sha-256=:{digest}:"})
