"""The surroundings of a container's process: its files, its environment, its namespaces."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from modal_proto import api_pb2

LAUNCHER = (Path(__file__).parent / "launcher.py").read_text()
MARK = "MODAL_EMULATOR_CONTAINER"
"""Names the container in the environment of all its processes, however far they have wandered."""


@dataclass(frozen=True)
class Sandbox:
    """`directory` holds everything of one container; `directory/rootfs` stands for its `/`."""

    directory: Path
    python: Path
    mounts: Mapping[str, Path]
    read_only: Set[str]
    isolated: bool

    @property
    def rootfs(self) -> Path:
        return self.directory / "rootfs"

    @property
    def home(self) -> Path:
        return Path("/root") if self.isolated else self.rootfs / "root"

    @property
    def arguments_path(self) -> Path:
        return self.directory / "container-arguments.bin"

    @property
    def restore_path(self) -> Path:
        return self.directory / "restore-state.json"

    @property
    def environ_path(self) -> Path:
        return self.directory / "spec-environ"

    @property
    def gpu_path(self) -> Path:
        return self.directory / "gpu-checkpoint"

    @property
    def log_path(self) -> Path:
        return self.directory / "log.txt"

    def link_mounts(self) -> None:
        """Without namespaces, a mount is a link below `rootfs`; under /root that is below HOME."""
        for mount_path, source in self.mounts.items():
            link = self.rootfs / mount_path.lstrip("/")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source)

    def environment(
        self,
        *,
        arguments: api_pb2.ContainerArguments,
        server_url: str,
        search_path: list[str],
        layers: list[Mapping[str, str]],
    ) -> dict[str, str]:
        """What Modal sets, then each of `layers` in turn: image, secrets, and so on."""
        task_id = arguments.task_id
        result = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "HOME": str(self.home),
            "HOSTNAME": hostname(task_id),
            "PYTHONPATH": os.pathsep.join([str(self.home), *search_path]),
            "PYTHONUNBUFFERED": "1",
            "MODAL_SERVER_URL": server_url,
            "MODAL_TASK_ID": task_id,
            "MODAL_IS_REMOTE": "1",
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(self.arguments_path),
            "MODAL_RESTORE_STATE_PATH": str(self.restore_path),
            "MODAL_ENVIRONMENT": arguments.environment_name,
            "MODAL_IMAGE_ID": arguments.function_def.image_id,
            "MODAL_CLOUD_PROVIDER": "CLOUD_PROVIDER_EMULATED",
            "MODAL_REGION": "local",
            "MODAL_EMULATOR_ROOTFS": "/" if self.isolated else str(self.rootfs),
            MARK: self.directory.name,
        }
        if arguments.function_def.is_checkpointing_function:
            result["MODAL_ENABLE_SNAP_RESTORE"] = "1"
        for layer in layers:
            result |= layer
        return result

    def command(self, lifeline: int) -> list[str]:
        """`lifeline` is a pipe that is open for as long as the emulator lives."""
        python = [
            *(str(self.python), "-c", LAUNCHER),
            *(str(self.environ_path), str(self.gpu_path), str(lifeline)),
        ]
        if not self.isolated:
            return python
        return [
            *("unshare", "--mount", "--uts", "--propagation", "private"),
            *("sh", "-ec", self._script(), "sh", *python),
        ]

    def _script(self) -> str:
        """A writable copy of the whole file system, kept in memory, with what is mounted in place.

        An overlay over `/` does not show what is mounted below it, so those mounts are repeated.
        """
        scratch, directory = self.directory / "scratch", self.directory
        scratch.mkdir()
        lines = [
            "mounts=$(cut -d' ' -f2 /proc/self/mounts | sort -u)",
            f"mount -t tmpfs tmpfs {scratch}",
            f"cd {scratch} && mkdir upper work merged",
            f"cp -a {self.rootfs}/. upper/",
            "mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work merged",
            'for at in $mounts; do [ "$at" = / ] || mount --bind "$at" "merged$at"; done',
            f"mount --bind {directory} merged{directory}",
        ]
        for mount_path, source in self.mounts.items():
            target = shlex.quote(f"merged{mount_path}")
            lines.append(f"mkdir -p {target} && mount --bind {shlex.quote(str(source))} {target}")
            if mount_path in self.read_only:
                lines.append(f"mount -o remount,bind,ro {target}")
        lines += [
            'echo "$HOSTNAME" > /proc/sys/kernel/hostname',
            """exec chroot merged sh -ec 'cd /root && exec "$@"' sh "$@" """,
        ]
        return "\n".join(lines)


def hostname(task_id: str) -> str:
    return f"modal-{task_id}"


def marked_processes(container: str) -> list[int]:
    """All processes of a container, also those that left its process group. Linux only."""
    needle = f"{MARK}={container}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if needle in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def isolation_works() -> bool:
    """Whether this user, on this machine, may have `isolated` containers."""
    command = ["unshare", "--mount", "--uts", "true"]
    return sys.platform == "linux" and subprocess.run(command, check=False).returncode == 0
