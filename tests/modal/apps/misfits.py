"""Deployments that a client may meet and cannot use, one class each."""

import time
from typing import Any

import modal

app = modal.App("misfits")
image = modal.Image.debian_slim()


@app.cls(image=image, max_containers=1)
class Older:
    """A version without the packed method."""

    @modal.method()
    def embed(self, sentences: list[str]) -> list[list[float]]:
        return [[1.0] for _ in sentences]


@app.cls(image=image, max_containers=1)
class CannotStart:
    @modal.enter()
    def load(self) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    @modal.method()
    def embed_packed(self, request: dict[str, Any]) -> dict[str, Any]:
        return {}

    @modal.method()
    def describe(self) -> dict[str, Any]:
        return {}


@app.cls(image=image, max_containers=1, timeout=1, startup_timeout=60)
class TooSlow:
    @modal.method()
    def embed_packed(self, request: dict[str, Any]) -> dict[str, Any]:
        time.sleep(60)
        return {}

    @modal.method()
    def describe(self) -> dict[str, Any]:
        return self.embed_packed.local({})


@app.cls(image=image, max_containers=1)
class Strange:
    """Answers with the text that it was sent."""

    @modal.method()
    def embed_packed(self, request: dict[str, Any]) -> Any:
        return eval(request["texts"][0])

    @modal.method()
    def describe(self) -> dict[str, Any]:
        return {"identity": {"model": "m"}}
