"""A container's private copy of a volume, synchronised where Modal synchronises.

What the container writes is the volume's after a push (`commit()`, or the container's end), and
what others committed is the container's after a pull (its start, or `reload()`). Last write wins,
per file; deletions count as writes.
"""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stamp:
    """What tells one state of a path from the next."""

    kind: str
    size: int = 0
    mtime_ns: int = 0
    inode: int = 0
    target: str = ""


Tree = dict[str, Stamp]


def scan(root: Path) -> Tree:
    """Everything below a directory, parents first; what vanishes meanwhile is left out."""
    found: Tree = {}
    waiting = [root]
    while waiting:
        try:
            entries = sorted(os.scandir(waiting.pop()), key=lambda e: e.name)
        except OSError:
            continue
        for entry in entries:
            path = Path(entry.path)
            with contextlib.suppress(OSError):
                found[str(path.relative_to(root))] = stamp = _stamp(path)
                if stamp.kind == "directory":
                    waiting.append(path)
    return found


def _stamp(path: Path) -> Stamp:
    state = path.lstat()
    if stat.S_ISDIR(state.st_mode):
        return Stamp("directory")
    if stat.S_ISLNK(state.st_mode):
        return Stamp("link", target=str(path.readlink()))
    return Stamp("file", state.st_size, state.st_mtime_ns, state.st_ino)


def place(source: Path, target: Path, staging: Path) -> None:
    """Copies a file, link or directory entry; a reader sees the old one or the new one."""
    if source.is_dir() and not source.is_symlink():
        if target.is_symlink() or target.is_file():
            target.unlink()
        target.mkdir(parents=True, exist_ok=True)
        return
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging.mkdir(parents=True, exist_ok=True)
    waiting = Path(tempfile.mkdtemp(dir=staging)) / "file"
    shutil.copy2(source, waiting, follow_symlinks=False)
    waiting.replace(target)
    waiting.parent.rmdir()


def remove(target: Path) -> None:
    """Removes a path, a directory only if nothing is in it."""
    with contextlib.suppress(OSError):
        if target.is_dir() and not target.is_symlink():
            target.rmdir()
        else:
            target.unlink()


class WorkingCopy:
    def __init__(self, volume: Path, directory: Path) -> None:
        self.volume, self.directory = volume, directory
        self._ours: Tree = {}
        self._theirs: Tree = {}
        self.directory.mkdir(parents=True)

    def pull(self) -> None:
        """What others committed comes in; what was changed here and is not committed stays."""
        theirs, ours = scan(self.volume), scan(self.directory)
        for path, stamp in theirs.items():
            if self._theirs.get(path) != stamp and ours.get(path) == self._ours.get(path):
                self._copy(path, self.volume, self.directory)
                self._theirs[path] = stamp
        for path in sorted(self._theirs.keys() - theirs.keys(), reverse=True):
            if ours.get(path) == self._ours.get(path):
                remove(self.directory / path)
                self._ours.pop(path, None)
            del self._theirs[path]

    def push(self) -> None:
        ours = scan(self.directory)
        for path, stamp in ours.items():
            if self._ours.get(path) != stamp:
                self._copy(path, self.directory, self.volume)
                self._ours[path] = stamp
        for path in sorted(self._ours.keys() - ours.keys(), reverse=True):
            remove(self.volume / path)
            self._theirs.pop(path, None)
            del self._ours[path]

    def _copy(self, path: str, source: Path, target: Path) -> None:
        # A file that vanishes while it is copied is seen as gone the next time.
        with contextlib.suppress(FileNotFoundError):
            place(source / path, target / path, self.directory.parent / "staging")
            mirror = self._ours if target == self.directory else self._theirs
            mirror[path] = _stamp(target / path)

    def opened_by(self, pids: Iterable[int]) -> str | None:
        """A path in here that one of these processes has open, or works in."""
        inodes = {
            (state.st_dev, state.st_ino): path
            for path in [".", *scan(self.directory)]
            if (state := _state(self.directory / path)) is not None
        }
        for pid in pids:
            for opened in [Path(f"/proc/{pid}/cwd"), *_listed(Path(f"/proc/{pid}/fd"))]:
                state = _state(opened, follow=True)
                if state is not None and (state.st_dev, state.st_ino) in inodes:
                    return inodes[state.st_dev, state.st_ino]
                with contextlib.suppress(OSError):  # deleted, and still open
                    name = str(opened.readlink()).removesuffix(" (deleted)")
                    if Path(name).is_relative_to(self.directory):
                        return str(Path(name).relative_to(self.directory))
        return None


def _state(path: Path, *, follow: bool = False) -> os.stat_result | None:
    try:
        return path.stat() if follow else path.lstat()
    except OSError:
        return None


def _listed(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []
