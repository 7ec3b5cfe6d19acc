"""A real Jupyter kernel, where an event loop is always running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import AsyncKernelManager
from programs import LIMIT, PREAMBLE, Service


class Notebook:
    def __init__(self, kernel: AsyncKernelManager, client: Any) -> None:
        self._kernel = kernel
        self._client = client

    async def run(self, cell: str) -> str:
        """A cell's output: its last expression, or the name of its error."""
        outputs: list[str] = []

        def collect(message: Any) -> None:
            content = message["content"]
            if message["msg_type"] == "execute_result":
                outputs.append(content["data"]["text/plain"])
            elif message["msg_type"] == "error":
                outputs.append(content["ename"])
            elif message["msg_type"] == "stream":
                outputs.append(content["text"])

        await self._client.execute_interactive(cell, output_hook=collect, timeout=LIMIT)
        return " ".join(outputs)

    async def interrupt(self, service: Service) -> None:
        """The stop button, once the service has the request."""
        await until(lambda: bool(service.waiting))
        await self._kernel.interrupt_kernel()


@asynccontextmanager
async def notebook(
    service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Notebook]:
    """A kernel with a client; at the end it must shut down and leave no connection."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("IPYTHONDIR", str(folder))
    for name, value in service.environment.items():
        monkeypatch.setenv(name, value)
    with (folder / "stderr").open("w") as stderr:
        kernel = AsyncKernelManager(shutdown_wait_time=LIMIT)
        await kernel.start_kernel(stderr=stderr)
        try:
            client = kernel.client()
            client.start_channels()
            await client.wait_for_ready(timeout=LIMIT)
            opened = Notebook(kernel, client)
            assert await opened.run(PREAMBLE) == ""
            yield opened
            client.stop_channels()
            await asyncio.wait_for(kernel.shutdown_kernel(), LIMIT / 2)
            assert not await kernel.is_alive()
            await asyncio.to_thread(service.assert_left_alone)
        finally:
            await kernel.shutdown_kernel(now=True)


async def until(condition: Any) -> None:
    async with asyncio.timeout(LIMIT):
        while not condition():
            await asyncio.sleep(0.02)


async def test_cells_may_block_await_be_interrupted_and_be_shut_down(
    http: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with notebook(http, tmp_path, monkeypatch) as cells:
        assert (
            await cells.run("right(0), asyncio.get_running_loop().is_running()") == "(True, True)"
        )
        assert await cells.run("is_of((await client.aembed(['text 1'])).vectors[0], 1)") == "True"
        for framework in ("kalm_integrations", "kalm_integrations.llama_index"):
            await cells.run(f"from {framework} import KalmModalEmbeddings as Adapter")
            await cells.run("adapter = Adapter()")
            query = "embed_query" if framework == "kalm_integrations" else "get_query_embedding"
            assert await cells.run(f"is_of(adapter.{query}('text 2'), 2)") == "True"
            assert await cells.run(f"is_of(await adapter.a{query}('text 3'), 3)") == "True"

        stopped = asyncio.create_task(cells.interrupt(http))
        assert await cells.run("client.embed(['never'])") == "KeyboardInterrupt"
        await stopped
        await until(lambda: not http.waiting)
        assert await cells.run("right(4), await asyncio.to_thread(right, 5)") == "(True, True)"
        assert await cells.run("threads().count('kalm-io')") == "1"
        assert "Traceback" not in (tmp_path / "stderr").read_text()

        # The kernel shuts down during these calls.
        await cells.run("task = asyncio.ensure_future(client.aembed(['never']))")
        await cells.run(
            "threading.Thread(target=client.embed, args=(['never'],), daemon=True).start()"
        )
        await until(lambda: len(http.waiting) == 2)
