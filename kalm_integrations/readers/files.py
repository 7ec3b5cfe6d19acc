"""The files that a path, a folder, a glob or an fsspec address names, and what their paths say."""

from __future__ import annotations

import glob
import gzip
import io
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from kalm_integrations.errors import ConfigurationError

if TYPE_CHECKING:
    import pyarrow as pa

LINES: Final = (".txt",)
DOCUMENTS: Final = (".md", ".markdown", ".rst")
FORMATS: Final = {
    ".parquet": "parquet",
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((*LINES, *DOCUMENTS), "text"),
}
_NULL_PARTITION: Final = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class InputFile:
    """One file.

    Attributes:
        path: Where it is.
        name: Its name in places and manifests, the same from wherever a job is started; valid
            Unicode, whatever the file system holds.
        relative: Its path below the folder that all files share.
        filesystem: fsspec's, of a remote file.
    """

    path: str
    name: str
    relative: str
    filesystem: Any = None

    @property
    def format_suffix(self) -> str:
        """What its format is known by, without ".gz"."""
        return suffix_of(self.path)

    @contextmanager
    def open(self) -> Iterator[io.BufferedReader]:
        """Open it; what is compressed is decompressed."""
        with ExitStack() as stack:
            if self.filesystem is None:
                opened: Any = stack.enter_context(Path(self.path).open("rb"))
            else:
                opened = stack.enter_context(self.filesystem.open(self.path, "rb"))
            if self.path.lower().endswith(".gz"):
                opened = stack.enter_context(gzip.GzipFile(fileobj=opened))
            if not isinstance(opened, io.BufferedReader):
                opened = stack.enter_context(io.BufferedReader(opened))
            yield opened

    def __str__(self) -> str:
        return _shown(self.path)


def suffix_of(path: str) -> str:
    """The suffix that names a file's format, in lower case and without ".gz"."""
    name = PurePosixPath(path.lower())
    inner = PurePosixPath(name.stem).suffix
    return inner if name.suffix == ".gz" and inner and inner != ".parquet" else name.suffix


def find(pattern: str, exclude: Path | None = None) -> tuple[list[InputFile], str]:
    """The files that `pattern` names, in order, and their format.

    Args:
        pattern: Of a folder, all files of the known formats, hidden ones left out.
        exclude: The output of a job, whose own files are left out.

    Raises:
        ConfigurationError: There are none, or of several formats, or of an unknown one.
    """
    if not pattern:
        raise ConfigurationError("INPUT is empty: name the corpus to embed.")
    remote = re.match(r"\w[\w+.-]+://", pattern)
    filesystem, root, paths = _remote(pattern) if remote else (None, *_local(pattern, exclude))
    if not paths:
        if root is None:
            raise ConfigurationError(f"there is no {_shown(pattern)}.")
        raise ConfigurationError(f"{_shown(pattern)} has no {', '.join(FORMATS)}.")
    kinds = {suffix_of(path): FORMATS.get(suffix_of(path)) for path in paths}
    if unknown := sorted(suffix for suffix, kind in kinds.items() if kind is None):
        raise ConfigurationError(
            f"{_shown(pattern)}: files named *{unknown[0]} are none of {', '.join(FORMATS)}."
        )
    if len(set(kinds.values())) > 1:
        raise ConfigurationError(
            f"{_shown(pattern)} has files of several kinds ({', '.join(sorted(kinds))}): name "
            f"those of one, '{pattern.rstrip('/')}/**/*{min(kinds)}' for instance."
        )
    base = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
    relative = [os.path.relpath(path, base).replace(os.sep, "/") for path in paths]
    short = [PurePosixPath(name).name for name in relative]
    names = short if len(set(short)) == len(short) else relative
    files = []
    for path, name in zip(paths, names, strict=True):
        # Partitions count from the folder that was named, which may be above what the files share.
        below = "" if root is None else os.path.relpath(path, root).replace(os.sep, "/")
        files.append(InputFile(path, _shown(name), below, filesystem))
    if len({file.name for file in files}) < len(files):
        raise ConfigurationError(
            f"{_shown(pattern)} has files whose names are the same as text: rename one."
        )
    return files, str(kinds[suffix_of(paths[0])])


def manifest_names(files: list[InputFile]) -> list[str]:
    """Names below the folder that all files share."""
    base = os.path.commonpath([os.path.dirname(file.path) for file in files])  # noqa: PTH120
    return [_shown(os.path.relpath(file.path, base).replace(os.sep, "/")) for file in files]


def partitions(files: list[InputFile]) -> dict[str, tuple[pa.DataType, dict[str, Any]]]:
    """Hive partitions (`year=2024/`): type, and values by file name; whole numbers stay numbers."""
    import pyarrow as pa

    found: dict[str, dict[str, str | None]] = {}
    for file in files:
        for part in PurePosixPath(file.relative).parts[:-1]:
            name, equals, value = part.partition("=")
            if equals and name:
                name, value = (_unquoted(each, file) for each in (name, value))
                found.setdefault(name, {})[file.name] = None if value == _NULL_PARTITION else value
    typed: dict[str, tuple[pa.DataType, dict[str, Any]]] = {}
    for name, values in found.items():
        known = [value for value in values.values() if value is not None]
        whole = all(re.fullmatch(r"0|-?[1-9]\d{0,17}", value) for value in known) and known
        convert = int if whole else str
        kind = pa.int64() if whole else pa.string()
        typed[name] = kind, {f: None if v is None else convert(v) for f, v in values.items()}
    return typed


def _unquoted(text: str, file: InputFile) -> str:
    try:
        return unquote(os.fsencode(text).decode(), errors="strict")
    except UnicodeDecodeError:
        raise ConfigurationError(f"{file}: {_shown(text)!r} is not UTF-8: rename it.") from None


def _local(pattern: str, exclude: Path | None) -> tuple[str | None, list[str]]:
    path = Path(pattern).expanduser()
    root: str | None = None
    if path.is_dir():
        root = str(path.absolute())
        found = (file for file in path.absolute().rglob("*") if not _hidden(file, path.absolute()))
        files = [f for f in found if suffix_of(str(f)) in FORMATS and f.is_file()]
    elif path.is_file():
        files = [path.absolute()]
    else:
        files = [Path(name).absolute() for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207
        files = [file for file in files if file.is_file()]
        fixed = re.split(r"[*?[]", str(path.absolute()))[0]
        root = os.path.dirname(fixed) if files else None  # noqa: PTH120
    if exclude is not None and not path.is_file():
        output = exclude.expanduser().resolve()
        own = {output / name for name in ("shards", "manifest.json", "rejected.parquet")}
        files = [f for f in files if own.isdisjoint((f.resolve(), f.resolve().parent))]
    return root, sorted(map(str, files))


def _remote(pattern: str) -> tuple[Any, str | None, list[str]]:
    try:
        import fsspec
    except ImportError as error:
        raise ConfigurationError(
            f"{pattern} needs fsspec and the package of its storage: pip install fsspec s3fs, "
            "gcsfs or huggingface_hub."
        ) from error
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        if filesystem.isfile(path):
            return filesystem, None, [path]
        is_folder = filesystem.isdir(path)
        found = filesystem.find(path) if is_folder else filesystem.glob(path)
    except (ImportError, ValueError, OSError) as error:
        raise ConfigurationError(f"{pattern}: {error}.") from error
    if not is_folder and not glob.has_magic(path):
        return filesystem, None, []
    root = path.rstrip("/") if is_folder else re.split(r"[*?[]", path)[0].rpartition("/")[0]
    files = [f for f in found if not _hidden(PurePosixPath(f), PurePosixPath(root))]
    if is_folder:
        files = [file for file in files if suffix_of(file) in FORMATS]
    return filesystem, root, sorted(files)


def _hidden(path: Any, root: Any) -> bool:
    return any(part.startswith((".", "_temporary")) for part in path.relative_to(root).parts)


def _shown(name: str) -> str:
    """Valid Unicode: bytes that are none are written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
