"""Containers that fail in every way a test wants to see."""

import os
import time
from pathlib import Path

import modal

app = modal.App("failing")
image = modal.Image.debian_slim()
notes = modal.Volume.from_name("failing-notes", create_if_missing=True)
NOTES = Path.home() / "notes"


@app.cls(image=image, max_containers=1)
class ExitsInEnter:
    @modal.enter()
    def load(self) -> None:
        os._exit(3)

    @modal.method()
    def ping(self) -> str:
        return "pong"


@app.cls(image=image, volumes={"/root/notes": notes}, max_containers=1)
@modal.concurrent(max_inputs=4)
class Dies:
    @modal.method()
    def note(self, key: str, seconds: float) -> int:
        """Notes that it runs, works for a while, and returns the process that finished it."""
        (NOTES / key).touch()
        notes.commit()
        time.sleep(seconds)
        return os.getpid()


@app.function(image=image)
def broken() -> None:
    """Fails when called; nothing wrong with its container."""
    raise ValueError("as asked")
