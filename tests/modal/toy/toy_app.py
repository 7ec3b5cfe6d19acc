"""A small app shaped like a service: a class with a snapshot, methods and a web door; functions."""

import asyncio
import os
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import modal

app = modal.App("toy")
image = (
    modal.Image.debian_slim(python_version="3.12")
    .pip_install("aiohttp>=3.12", "numpy")
    .env({"TOY_FLAG": "from image"})
)
volume = modal.Volume.from_name("toy-volume", create_if_missing=True)


class ToyError(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code = code


def seen() -> dict[str, Any]:
    return {
        "task_id": os.environ["MODAL_TASK_ID"],
        "secret": os.environ.get("TOY_SECRET"),
        "dropped": os.environ.get("TOY_DROPPED"),
        "region": os.environ["MODAL_REGION"],
        "hostname": os.environ["HOSTNAME"],
        "pid": os.getpid(),
    }


@app.cls(
    image=image,
    gpu="H100",
    volumes={"/root/data": volume},
    secrets=[modal.Secret.from_name("toy-secret")],
    enable_memory_snapshot=True,
    experimental_options={"enable_gpu_snapshot": True},
    max_containers=1,
    scaledown_window=60,
    timeout=20,
    startup_timeout=30,
)
@modal.concurrent(max_inputs=8)
class Toy:
    @modal.enter(snap=True)
    def load(self) -> None:
        self.log = [("snap", seen())]
        self.lock = threading.Lock()
        self.active = self.peak = 0

    @modal.enter(snap=False)
    def wake(self) -> None:
        self.log.append(("restored", seen()))

    @modal.exit()
    def bye(self) -> None:
        print("exit hook ran")

    @modal.method()
    def echo(self, value: Any = None) -> Any:
        return value

    @modal.method()
    def life(self) -> list[tuple[str, dict[str, Any]]]:
        return self.log

    @modal.method()
    def surroundings(self) -> dict[str, Any]:
        return {
            "flag": os.environ.get("TOY_FLAG"),
            "remote": os.environ.get("MODAL_IS_REMOTE"),
            "token": os.environ.get("MODAL_TOKEN_ID"),
            "file": __file__,
            "cwd": str(Path.cwd()),
            "hostname": socket.gethostname(),
        }

    @modal.method()
    def fail(self, code: int) -> None:
        raise ToyError(code, "as asked")

    @modal.method()
    def work(self, seconds: float) -> int:
        with self.lock:
            self.active += 1
            self.peak = max(self.peak, self.active)
        time.sleep(seconds)
        with self.lock:
            self.active -= 1
        return self.peak

    @modal.method()
    def count(self, n: int) -> Iterator[int]:
        yield from range(n)

    @modal.method()
    def spawn_children(self) -> list[int]:
        """One in the container's session, one that has left it."""
        sleep = ["sleep", "600"]
        near = subprocess.Popen(sleep)
        far = subprocess.Popen(sleep, start_new_session=True)
        return [os.getpid(), near.pid, far.pid]

    @modal.method()
    def write(self, name: str, text: str) -> str:
        path = Path.home() / "data" / name
        path.write_text(text)
        volume.commit()
        return path.read_text()

    @modal.asgi_app(requires_proxy_auth=True)
    def web(self) -> Callable[..., Awaitable[None]]:
        return asgi


async def asgi(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """/echo returns the body, /slow waits, /stream sends three parts, /hang waits for the end."""
    if scope["type"] != "http":
        return
    message = await receive()
    body, path = message["body"], scope["path"]
    if path == "/slow":
        await asyncio.sleep(float(scope["query_string"] or b"1"))
    if path == "/hang":
        message = await receive()
        print("hung up:", message["type"], flush=True)
        return
    headers = [(b"content-type", b"application/octet-stream"), (b"x-task", task().encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if path == "/stream":
        async for part in parts():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    else:
        await send({"type": "http.response.body", "body": body})


async def parts() -> AsyncIterator[bytes]:
    for number in range(3):
        yield b"part %d\n" % number
        await asyncio.sleep(0.1)


def task() -> str:
    return os.environ["MODAL_TASK_ID"]


@app.function(image=image, max_containers=2)
def square(x: int) -> int:
    return x * x


@app.function(image=image, timeout=1, startup_timeout=30)
def sleepy(seconds: float) -> str:
    time.sleep(seconds)
    return "awake"
