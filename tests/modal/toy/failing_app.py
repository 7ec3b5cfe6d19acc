"""Containers that fail in every way a test wants to see."""

import os
import time
from pathlib import Path

import modal

app = modal.App("failing")
image = modal.Image.debian_slim()
notes = modal.Volume.from_name("failing-notes", create_if_missing=True)
NOTES = Path.home() / "notes"


def first_time(key: str) -> bool:
    note = NOTES / key
    seen = note.exists()
    note.touch()
    notes.commit()
    return not seen


@app.cls(image=image, volumes={"/root/notes": notes}, max_containers=1)
class RaisesInEnter:
    @modal.enter()
    def load(self) -> None:
        if not (NOTES / "healed").exists():
            raise RuntimeError("cannot load")

    @modal.method()
    def ping(self) -> str:
        return "pong"


@app.cls(image=image, max_containers=1)
class ExitsInEnter:
    @modal.enter()
    def load(self) -> None:
        os._exit(3)

    @modal.method()
    def ping(self) -> str:
        return "pong"


@app.cls(image=image, startup_timeout=1, max_containers=1)
class HangsInEnter:
    @modal.enter()
    def load(self) -> None:
        time.sleep(60)

    @modal.method()
    def ping(self) -> str:
        return "pong"


@app.cls(image=image, volumes={"/root/notes": notes}, max_containers=1)
@modal.concurrent(max_inputs=4)
class Dies:
    @modal.method()
    def die(self) -> None:
        os._exit(13)

    @modal.method()
    def note(self, key: str, seconds: float) -> int:
        """Notes that it runs, works for a while, and returns the process that finished it."""
        (NOTES / key).touch()
        notes.commit()
        time.sleep(seconds)
        return os.getpid()

    @modal.method()
    async def leave(self) -> int:
        """Asks for no more inputs: this call ends here, the next one in another container."""
        await modal.experimental.stop_fetching_inputs.aio()
        return os.getpid()


@app.function(
    image=image,
    volumes={"/root/notes": notes},
    retries=modal.Retries(max_retries=2, initial_delay=0.0),
)
def flaky(key: str) -> str:
    if first_time(key):
        raise ValueError("the first attempt fails")
    return "second attempt"


@app.function(image=image)
def broken() -> None:
    """Fails when called; nothing wrong with its container."""
    raise ValueError("as asked")
