"""A small app shaped like a service: a class with a snapshot, methods and a web door; functions."""

import os
import subprocess
import threading
import time
from typing import Any

import modal

app = modal.App("toy")
image = (
    modal.Image.debian_slim(python_version="3.12")
    .pip_install("aiohttp>=3.12", "numpy")
    .env({"TOY_FLAG": "from image"})
)
volume = modal.Volume.from_name("toy-volume", create_if_missing=True)


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
    def life(self) -> list[tuple[str, dict[str, Any]]]:
        return self.log

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
    def spawn_children(self) -> list[int]:
        """One in the container's session, one that has left it."""
        sleep = ["sleep", "600"]
        near = subprocess.Popen(sleep)
        far = subprocess.Popen(sleep, start_new_session=True)
        return [os.getpid(), near.pid, far.pid]
