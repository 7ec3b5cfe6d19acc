"""A job's folder, wherever one stands: a mounted Volume in a container, Modal's API elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from kalm_integrations.bulk.manifest import replace_file


class Store(Protocol):
    """Files by their path within the job's folder."""

    def names(self, folder: str) -> dict[str, tuple[int, int]]:
        """What a folder has: names with size and time of change; nothing where there is none."""
        ...

    def read(self, path: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: There is none.
        """
        ...

    def write(self, files: Mapping[str, bytes | Path]) -> None:
        """Write files, of their content or of a local file's. Seen by others on return."""
        ...


class FolderStore:
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self, folder: str) -> dict[str, tuple[int, int]]:
        try:
            found = [(path, path.stat()) for path in (self.folder / folder).iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {path.name: (stat.st_size, stat.st_mtime_ns) for path, stat in found}

    def read(self, path: str) -> bytes:
        return (self.folder / path).read_bytes()

    def write(self, files: Mapping[str, bytes | Path]) -> None:
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content if isinstance(content, bytes) else content.read_bytes())
