"""Work that nobody waits for: spawned, retried, cancelled, left to go on."""

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
    async def leave(self, number: int) -> Done:
        await modal.experimental.stop_fetching_inputs.aio()
        return done(number)
