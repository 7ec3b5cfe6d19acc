"""Images and mounts: never built, but read, and their files given to containers."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from modal_proto import api_pb2

_PYTHON_IMAGE = re.compile(r"FROM (?:\S*/)?python:(\d+\.\d+)", re.IGNORECASE)
_PYTHON_MOUNT = re.compile(r"python-build-standalone\.[^.]+\.(\d+\.\d+)")
# Options of `pip install` and `uv pip install` whose value is a word of its own.
_VALUE_OPTIONS = {
    *("-r", "--requirement", "-c", "--constraint", "-f", "--find-links", "-i", "--index-url"),
    *("--extra-index-url", "--python", "--override", "--index-strategy", "--torch-backend"),
}


@dataclass(frozen=True)
class Layer:
    proto: api_pb2.Image
    builder_version: str


@dataclass(frozen=True)
class Image:
    """What an image declares, all its layers in order, base first."""

    image_id: str
    layers: tuple[Layer, ...]
    context_mounts: Mapping[str, str]

    @property
    def commands(self) -> list[str]:
        """Dockerfile lines; each layer opens with its own `FROM`."""
        return [line for layer in self.layers for line in layer.proto.dockerfile_commands]

    @property
    def env(self) -> dict[str, str]:
        """Variables set by `ENV` lines. PATH is left out: it names places inside the image."""
        found: dict[str, str] = {}
        for line in self.commands:
            if line.upper().startswith("ENV "):
                for word in shlex.split(line[4:]):
                    name, _, value = word.partition("=")
                    found[name] = value
        found.pop("PATH", None)
        return found

    @property
    def python_version(self) -> str | None:
        """ "3.12": of the base image, or of the Python that `add_python` brings; the later wins."""
        version = None
        for layer in self.layers:
            for line in layer.proto.dockerfile_commands:
                if match := _PYTHON_IMAGE.match(line):
                    version = match[1]
            name = self.context_mounts.get(layer.proto.context_mount_id, "")
            if match := _PYTHON_MOUNT.search(name):
                version = match[1]
        return version

    @property
    def installs(self) -> list[list[str]]:
        """The arguments of every `pip install` and `uv pip install`, in order, options included."""
        return [words for line in self.commands if (words := _install_arguments(line)) is not None]

    @property
    def packages(self) -> list[str]:
        """The requirements named in those commands, without options and requirement files."""
        return [word for words in self.installs for word in _requirements(words)]

    @property
    def context_files(self) -> dict[str, bytes]:
        """Files sent with the image itself, such as requirement files, by their name there."""
        return {
            file.filename: file.data for layer in self.layers for file in layer.proto.context_files
        }


def _install_arguments(line: str) -> list[str] | None:
    if not line.upper().startswith("RUN "):
        return None
    words = shlex.split(line[4:])
    for at in range(len(words) - 1):
        if words[at : at + 2] == ["pip", "install"]:
            return words[at + 2 :]
    return None


def _requirements(words: Sequence[str]) -> Iterator[str]:
    remaining = iter(words)
    for word in remaining:
        if word in _VALUE_OPTIONS:
            next(remaining, None)
        elif not word.startswith("-"):
            yield word


class ImageStore:
    def __init__(self) -> None:
        self.requests: dict[str, api_pb2.ImageGetOrCreateRequest] = {}
        self.mounts: dict[str, list[api_pb2.MountFile]] = {}
        self.mount_names: dict[str, str] = {}
        self.files: dict[str, bytes] = {}

    def image(self, image_id: str) -> Image:
        return Image(image_id, tuple(self._layers(image_id)), self.mount_names)

    def _layers(self, image_id: str) -> Iterator[Layer]:
        request = self.requests[image_id]
        for base in request.image.base_images:
            yield from self._layers(base.image_id)
        yield Layer(request.image, request.builder_version)

    def local_files(
        self, image_id: str, mount_ids: Sequence[str]
    ) -> Iterator[tuple[PurePosixPath, api_pb2.MountFile]]:
        """All local files of an image and of mounts, and where they belong; later ones win.

        Files of the platform's own mounts (the client, Python builds) are unknown and left out:
        the container's interpreter brings them.
        """
        for layer in self.image(image_id).layers:
            for line in layer.proto.dockerfile_commands:
                words = shlex.split(line) if line.upper().startswith("COPY ") else []
                if len(words) == 3 and not words[1].startswith("--"):
                    yield from self._copied(layer.proto.context_mount_id, words[1], words[2])
        for mount_id in mount_ids:
            yield from self._copied(mount_id, "/", "/")

    def _copied(
        self, mount_id: str, source: str, target: str
    ) -> Iterator[tuple[PurePosixPath, api_pb2.MountFile]]:
        base, to = PurePosixPath("/", source), PurePosixPath("/", target)
        for file in self.mounts.get(mount_id, []):
            path = PurePosixPath("/", file.filename)
            if file.sha256_hex in self.files and path.is_relative_to(base):
                into = path == base and target.endswith("/")
                yield to / (path.name if into else path.relative_to(base)), file

    def materialise(self, image_id: str, mount_ids: Sequence[str], root: Path) -> None:
        """Writes those files below `root`, which stands for `/`."""
        for place, file in self.local_files(image_id, mount_ids):
            written = root / place.relative_to("/")
            written.parent.mkdir(parents=True, exist_ok=True)
            written.write_bytes(self.files[file.sha256_hex])
            if file.mode:
                written.chmod(file.mode & 0o777 | 0o400)
