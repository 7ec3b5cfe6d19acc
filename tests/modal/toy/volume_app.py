"""Functions that read and write volumes and buckets, and commit and reload only when told to."""

import os
from pathlib import Path
from typing import Any

import modal

app = modal.App("volumes")
image = modal.Image.debian_slim()
first = modal.Volume.from_name("volumes-first", create_if_missing=True)
second = modal.Volume.from_name("volumes-second", create_if_missing=True, version=2)
VOLUMES = {"first": first, "second": second}
MOUNTS: dict[str, modal.Volume] = {"/root/first": first, "/root/second": second}


def run(steps: list[tuple[str, ...]]) -> list[Any]:
    """Does one thing after another; paths are relative to /root."""
    opened, answers = [], []
    for what, name, *rest in steps:
        path, answer = Path.home() / name, None
        if what == "write":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(rest[0])
        elif what == "read":
            answer = path.read_text() if path.exists() else None
        elif what == "list":
            answer = sorted(str(p.relative_to(path)) for p in path.rglob("*"))
        elif what == "open":
            opened.append(path.open())
        elif what == "enter":
            os.chdir(path)
        elif what == "commit":
            VOLUMES[name].commit()
        elif what == "reload":
            VOLUMES[name].reload()
        answers.append(answer)
    for file in opened:
        file.close()
    os.chdir(Path.home())
    return answers


@app.function(image=image, volumes=MOUNTS, max_containers=1)
def one(steps: list[tuple[str, ...]]) -> list[Any]:
    return run(steps)


@app.function(image=image, volumes=MOUNTS, max_containers=1)
def other(steps: list[tuple[str, ...]]) -> list[Any]:
    return run(steps)


@app.cls(image=image, volumes={"/root/first": first}, max_containers=1)
class Leaves:
    """Does not commit: that is left to its end."""

    @modal.method()
    def write(self, name: str, text: str) -> None:
        (Path.home() / "first" / name).write_text(text)

    @modal.exit()
    def bye(self) -> None:
        (Path.home() / "first" / "written-at-exit").write_text("bye")
