"""One container: a real `modal._container_entrypoint` process, from its start to its end."""

import asyncio
import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from modal_proto import api_pb2

from .endpoint import Endpoint
from .model import Result
from .mounts import Mounts
from .sandbox import Sandbox, hostname, marked_processes
from .tokens import new_id

if TYPE_CHECKING:
    from .pool import Pool

SNAPSHOT_RESTORE_FAILED = 222  # the runtime's exit status for: start me again, without a snapshot


class Container:
    """Runs in a session of its own; when its main process ends, whatever it left is killed.

    Task-level RPCs carry no task id, so each container has a socket, and with it a service, of its
    own. A memory snapshot keeps the process: at the checkpoint its socket is closed for good, and
    it is restored under a new task id, behind a new socket, with the environment that a container
    started at that moment would get.
    """

    def __init__(self, pool: "Pool") -> None:
        self.pool, self.cloud = pool, pool.cloud
        self.name = new_id("co")
        self.task_id = new_id("ta")
        self.task_ids = [self.task_id]
        self.events: dict[str, float] = {}
        self.ready = asyncio.Event()
        self.gone = asyncio.Event()
        self._spawned = asyncio.Event()
        self.stopping = False
        self.cancellations: asyncio.Queue[list[str]] = asyncio.Queue()
        self.idle_since = time.monotonic()
        self.failure: api_pb2.GenericResult | None = None
        self.definition = api_pb2.Function()
        self.definition.CopyFrom(pool.definition)
        self.checkpoint_id = ""
        if self.definition.checkpointing_enabled and self.cloud.options.snapshots:
            self.checkpoint_id = new_id("ch") if pool.snapshot_usable else ""
        directory = self.cloud.directory / self.name
        self.mounts = Mounts(self.cloud, self.definition, directory / "mounts")
        self.sandbox = Sandbox(
            directory=directory,
            python=self.cloud.options.container_python,
            mounts=self.mounts.places,
            read_only=self.mounts.read_only,
            isolated=self.cloud.options.isolated,
        )
        self._process: asyncio.subprocess.Process | None = None
        self._server: Endpoint | None = None
        self._gpu: int | None = None
        self._lifeline: int | None = None
        self._startup_watch: asyncio.Task[None] | None = None

    def mark(self, event: str) -> None:
        self.events[event] = time.monotonic()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        return None if self._process is None else self._process.returncode

    @property
    def log(self) -> str:
        path = self.sandbox.log_path
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def failed_to_start(self) -> bool:
        return not self.ready.is_set() and not self.stopping

    @property
    def startup_result(self) -> api_pb2.GenericResult:
        """What became of a start that failed: the exception that ended it, if one was reported."""
        if self.failure is not None:
            return self.failure
        message = f"Container exited with status {self.exit_status} during startup"
        return Result(status=Result.GENERIC_STATUS_INIT_FAILURE, exception=message)

    # -- start ---------------------------------------------------------------------------------
    async def start(self) -> None:
        try:
            await self._start()
        except BaseException:
            await self._release()
            raise
        finally:
            self._spawned.set()

    async def _start(self) -> None:
        sandbox = self.sandbox
        (sandbox.rootfs / "root").mkdir(parents=True)
        self.cloud.images.materialise(
            self.definition.image_id, self.definition.mount_ids, sandbox.rootfs
        )
        await self.mounts.fill()
        if not sandbox.isolated:
            sandbox.link_mounts()
        sandbox.arguments_path.write_bytes(self._arguments().SerializeToString())
        # Reading this blocks until the restore; held open for writing, opening it does not.
        os.mkfifo(sandbox.gpu_path)
        self._gpu = os.open(sandbox.gpu_path, os.O_RDWR | os.O_NONBLOCK)
        environment = self._environment(await self._serve("0"))
        self._write_spec_environ(environment)
        inherited, self._lifeline = os.pipe()
        with sandbox.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *sandbox.command(inherited),
                cwd=sandbox.rootfs / "root",
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[inherited],
            )
        os.close(inherited)
        self.mark("start")
        self.pool.history.append(self)
        self.cloud.spawn(self._watch_exit(self._process))
        self._startup_watch = self.cloud.spawn(self._watch_startup())

    async def _serve(self, name: str) -> str:
        path = self.sandbox.directory / f"s{name}"
        self._server = Endpoint(self.cloud.container_service(self))
        await self._server.start(path=str(path))
        return f"unix://{path}"

    def _arguments(self) -> api_pb2.ContainerArguments:
        function = self.pool.function
        result = api_pb2.ContainerArguments(
            task_id=self.task_id,
            function_id=function.function_id,
            app_id=function.app_id,
            function_def=self.definition,
            environment_name=self.cloud.apps[function.app_id].environment,
            serialized_params=function.serialized_params,
            checkpoint_id=self.checkpoint_id,
            app_layout=self.cloud.layout(function.app_id),
        )
        definition = result.function_def
        definition.is_checkpointing_function = bool(self.checkpoint_id)
        # The client sends only the option; the server makes the flag of it.
        asked = definition.experimental_options.get("enable_gpu_snapshot") == "True"
        definition._experimental_enable_gpu_snapshot = asked and bool(self.checkpoint_id)
        return result

    def _environment(self, server_url: str) -> dict[str, str]:
        options, arguments = self.cloud.options, self._arguments()
        return self.sandbox.environment(
            arguments=arguments,
            server_url=server_url,
            search_path=[str(path) for path in options.container_path],
            layers=[
                self.cloud.images.image(self.definition.image_id).env,
                *[self.cloud.secrets[i] for i in self.definition.secret_ids],
                options.container_env,
            ],
        )

    def _write_spec_environ(self, environment: dict[str, str]) -> None:
        text = "".join(f"{name}={value}\0" for name, value in environment.items())
        self.sandbox.environ_path.write_text(text)

    async def _watch_startup(self) -> None:
        limit = self.definition.startup_timeout_secs or self.definition.timeout_secs or 300
        try:
            async with asyncio.timeout(limit):
                await self.ready.wait()
        except TimeoutError:
            self.mark("startup-timeout")
            await self.kill()

    def on_ready(self) -> None:
        if not self.ready.is_set():
            self.ready.set()
            self.idle_since = time.monotonic()
            self.mark("ready")
            self.pool.on_ready()

    # -- snapshot ------------------------------------------------------------------------------
    async def restore(self) -> None:
        """What happens between the checkpoint request and the restored process."""
        self.mark("checkpoint")
        options, old = self.cloud.options, self._server
        await asyncio.sleep(options.snapshot_seconds)
        await self.cloud.restores_allowed.wait()
        await self.mounts.fill()
        self.task_id = new_id("ta")
        self.task_ids.append(self.task_id)
        url = await self._serve("1")
        if old is not None:
            await old.hang_up()
        self._write_spec_environ(self._environment(url) | dict(options.restore_env))
        if self.sandbox.isolated:
            await self._rename_host()
        assert self._gpu is not None
        os.write(self._gpu, options.gpu_restore.encode())
        state = {
            "task_id": self.task_id,
            "function_id": self.pool.function.function_id,
            "server_url": url,
        }
        waiting = self.sandbox.restore_path.with_suffix(".tmp")
        waiting.write_text(json.dumps(state))
        waiting.rename(self.sandbox.restore_path)
        self.mark("restore")

    async def _rename_host(self) -> None:
        script = f"echo {hostname(self.task_id)} > /proc/sys/kernel/hostname"
        renaming = await asyncio.create_subprocess_exec(
            *("nsenter", f"--uts=/proc/{self.pid}/ns/uts", "sh", "-ec", script)
        )
        await renaming.wait()

    # -- end -----------------------------------------------------------------------------------
    async def stop(self, grace: float) -> None:
        """Interrupts the main process, so that exit hooks run; kills what is left after `grace`."""
        self.stopping = True
        self.pool.wake()
        await self._spawned.wait()
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(grace):
                await self.gone.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """Kills the whole container at once and waits until it is gone."""
        await self._spawned.wait()
        if self.gone.is_set():
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        await self.gone.wait()

    async def _watch_exit(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        self._sweep()
        self.mark("exit")
        if process.returncode == SNAPSHOT_RESTORE_FAILED:
            self.pool.snapshot_usable = False
        self.mounts.clear()
        await self._release()
        await self.pool.on_exit(self)

    async def _release(self) -> None:
        if self._server is not None:
            await self._server.hang_up()
        for descriptor in (self._gpu, self._lifeline):
            if descriptor is not None:
                os.close(descriptor)
        self._gpu = self._lifeline = None
        if self._startup_watch is not None and self._startup_watch is not asyncio.current_task():
            self._startup_watch.cancel()
        self.gone.set()

    def _sweep(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        for pid in marked_processes(self.name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def root(self) -> Path:
        """The directory that the container knows as /root."""
        return self.sandbox.rootfs / "root"
