"""Work that nobody waits for: spawned, retried, cancelled, left to go on."""

import asyncio
import collections
import os
import time
from pathlib import Path

import modal
import modal.experimental

app = modal.App("jobs")
image = modal.Image.debian_slim().env({"JOB_VERSION": os.environ.get("JOB_VERSION", "1")})
secret = modal.Secret.from_name("job-secret")
Done = tuple[int, str, int]


def done(number: int) -> Done:
    return number, os.environ["JOB_VERSION"], os.getpid()


@app.cls(
    image=image,
    secrets=[secret],
    max_containers=1,
    retries=modal.Retries(max_retries=2, initial_delay=0.2, backoff_coefficient=3.0),
)
@modal.concurrent(max_inputs=2)
class Worker:
    @modal.enter()
    def load(self) -> None:
        self.attempts: collections.Counter[int] = collections.Counter()

    @modal.method()
    def work(self, number: int, seconds: float = 0.0, until: str = "") -> Done:
        """Takes some seconds, and as long as a file is not there."""
        print(f"begun {number}", flush=True)
        time.sleep(seconds)
        while until and not Path(until).exists():
            time.sleep(0.05)
        print(f"ended {number}", flush=True)
        return done(number)

    @modal.method()
    def fails(self, number: int, times: int) -> int:
        """Fails that often, then returns how many attempts it took."""
        self.attempts[number] += 1
        print(f"attempt {number} {time.time()}", flush=True)
        if self.attempts[number] <= times:
            raise ValueError(f"failure {self.attempts[number]}")
        return self.attempts[number]

    @modal.method()
    async def stumbles(self, number: int) -> None:
        """Fails when it is cancelled."""
        print(f"begun {number}", flush=True)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ValueError("while ending") from None

    @modal.method()
    async def leave(self, number: int) -> Done:
        await modal.experimental.stop_fetching_inputs.aio()
        return done(number)

    @modal.method()
    def secret(self) -> str | None:
        return os.environ.get("JOB_SECRET")


@app.function(image=image, timeout=1, startup_timeout=30, retries=1, max_containers=1)
def slow_once(marker: str) -> str:
    """Too slow the first time that anybody sees the marker."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return "in time"
    time.sleep(30)
    return "never"


@app.function(image=image, max_containers=1)
def start(numbers: list[int]) -> tuple[str, str]:
    """Spawns, as a laptop would, from inside a container: by class and by function."""
    worker = modal.Cls.from_name("jobs", "Worker")()
    spawned = worker.work.experimental_spawn_map(numbers)
    alone = modal.Function.from_name("jobs", "alone").spawn(len(numbers))
    return spawned.object_id, alone.object_id


@app.function(image=image, max_containers=1)
def alone(number: int) -> int:
    return number * 2
