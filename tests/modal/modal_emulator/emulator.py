"""The emulator as tests hold it: synchronous, in a background thread, cleaned up when closed."""

import asyncio
import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import modal
import pytest
from aiohttp import web
from modal_proto import api_pb2

from .cloud import Cloud
from .container import Container
from .images import Image
from .model import App, Function
from .options import Options
from .recorder import Fault

T = TypeVar("T")


class Emulator:
    """A local Modal: `with Emulator() as emulator: emulator.deploy("app.py")`.

    Functions are named as Modal names them, a class being one function: "square", "Embedder". With
    several apps of the same function name, say which: "my-app/square".
    """

    def __init__(self, **options: Any) -> None:
        self.options = Options(**options)
        # Short, because the paths of unix sockets are limited to some hundred characters.
        self.directory = Path(tempfile.mkdtemp(prefix="modal-"))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="modal-emulator", daemon=True
        )
        self._thread.start()
        self._closed = False
        try:
            self.cloud = self._run(self._start())
        except BaseException:
            self._end_thread()
            raise
        atexit.register(self.close)

    async def _start(self) -> Cloud:
        cloud = Cloud(self.directory, self.options)
        try:
            await cloud.start()
        except BaseException:
            await cloud.close()
            raise
        return cloud

    def _run(self, work: Coroutine[Any, Any, T], timeout: float = 60.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def close(self) -> None:
        """Ends containers, servers and thread, removes all files; raises what went wrong inside."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            self._run(self.cloud.close())
        finally:
            self._end_thread()
        if self.cloud.errors:
            raise ExceptionGroup("inside the Modal emulator", _exceptions(self.cloud.errors))

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
        shutil.rmtree(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- the client's side ---------------------------------------------------------------------
    @property
    def client_env(self) -> dict[str, str]:
        """What makes a Modal client, in any process, talk to this emulator."""
        token_id, token_secret = self.options.credentials
        return {
            "MODAL_SERVER_URL": self.cloud.server_url,
            "MODAL_TOKEN_ID": token_id,
            "MODAL_TOKEN_SECRET": token_secret,
            "MODAL_CONFIG_PATH": str(self.directory / "modal.toml"),
        }

    @contextmanager
    def client(self, credentials: tuple[str, str] | None = None) -> Iterator[modal.Client]:
        """A real client in this process, whatever the environment says."""
        with modal.Client(
            self.cloud.server_url,
            api_pb2.CLIENT_TYPE_CLIENT,
            credentials or self.options.credentials,
        ) as client:
            yield client

    @contextmanager
    def in_this_process(self, patch: pytest.MonkeyPatch) -> Iterator[modal.Client]:
        """Code that reads its credentials from the environment talks to the emulator, until
        `patch` is undone."""
        for name, value in self.client_env.items():
            patch.setenv(name, value)
        with self.client() as client:
            modal.Client._set_env_client(client)
            try:
                yield client
            finally:
                modal.Client._set_env_client(None)

    def cli(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        check: bool = True,
        timeout: float = 120.0,
    ) -> subprocess.CompletedProcess[str]:
        """Runs the real `modal` command."""
        around = {n: v for n, v in os.environ.items() if not n.startswith("MODAL_")}
        done = subprocess.run(
            [sys.executable, "-m", "modal", *arguments],
            env={**around, **self.client_env, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"modal {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
        return done

    def deploy(
        self, target: str | Path, *arguments: str, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """`modal deploy`: of a file, or of "a.dotted.module". Options are those of `cli`."""
        module = ["-m"] if isinstance(target, str) and not target.endswith(".py") else []
        return self.cli("deploy", *module, str(target), *arguments, **options)

    # -- what there is -------------------------------------------------------------------------
    def function(self, name: str) -> Function:
        """The latest deployed function of that name: its definition and its request."""
        app_name, _, function_name = name.rpartition("/")
        wanted = {function_name, f"{function_name}.*"}
        for function in reversed(self.cloud.functions.values()):
            if not function.created or function.base_id or function.name not in wanted:
                continue
            if not app_name or self.cloud.apps[function.app_id].name == app_name:
                return function
        known = sorted({f.name for f in self.cloud.functions.values() if f.created})
        raise LookupError(f"no function {name!r} among {known}")

    @property
    def created(self) -> list[api_pb2.FunctionCreateRequest]:
        """Every FunctionCreate request, in order."""
        return self.cloud.created

    def image(self, name: str) -> Image:
        """What the image of a function declares."""
        return self.cloud.images.image(self.function(name).definition.image_id)

    def files(self, name: str) -> dict[str, bytes]:
        """The local files that a function's containers get, by their path there."""
        definition, images = self.function(name).definition, self.cloud.images
        found = images.local_files(definition.image_id, definition.mount_ids)
        return {str(path): images.files[file.sha256_hex] for path, file in found}

    def web_url(self, name: str, method: str = "") -> str:
        """The address of a web endpoint: of a function, or of a class's method."""
        return self.function(name).web_urls[method]

    def containers(self, name: str) -> list[Container]:
        """All containers ever started for a function and its bound variants, oldest first."""
        base = self.function(name).function_id
        return [
            container
            for pool in list(self.cloud.pools.values())
            if base in (pool.function.function_id, pool.function.base_id)
            for container in list(pool.history)
        ]

    def starts(self, name: str) -> int:
        return len(self.containers(name))

    def running(self, name: str) -> list[Container]:
        """Those that are ready and neither gone nor going."""
        return [
            c
            for c in self.containers(name)
            if c.ready.is_set() and not c.gone.is_set() and not c.stopping
        ]

    def logs(self, name: str) -> str:
        return "".join(container.log for container in self.containers(name))

    @property
    def unimplemented(self) -> Mapping[str, int]:
        """RPCs that the emulator refused because it does not know them."""
        return self.cloud.recorder.unimplemented

    def volume(self, name: str, environment: str = "main") -> Path:
        """The directory with a volume's committed files. A test may write there, whole files."""
        return self.cloud.volumes.volumes[self.cloud.volumes.ids[environment, name]].directory

    def bucket(self, name: str) -> Path:
        """The directory that stands for a bucket, for `modal.CloudBucketMount`."""
        directory = self.cloud.bucket_directory(name)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def commit_in_background(self, name: str) -> None:
        """What Modal does every few seconds, at no moment of the container's choice; here only
        when a test says so: the running containers of a function commit all their volumes."""
        for container in self.running(name):
            self._run(container.mounts.commit_all())

    # -- what a test does to it ----------------------------------------------------------------
    @contextmanager
    def changed(self, **options: Any) -> Iterator[None]:
        """Other options, for as long as the block lasts."""
        before = {name: getattr(self.options, name) for name in options}
        try:
            for name, value in options.items():
                setattr(self.options, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self.options, name, value)

    def inject(self, rpc: str, fault: Fault, times: int = 1) -> None:
        """Lets the next requests of an RPC, from clients and containers alike, meet a fault."""
        self.cloud.recorder.faults[rpc].extend([fault] * times)

    def refuse_web(
        self, status: int, times: int = 1, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answers the next web requests with `status`, before anything else but the 401."""
        for _ in range(times):
            self.cloud.web.refusals.append(web.Response(status=status, headers=headers))

    def set_secret(self, name: str, values: Mapping[str, str], environment: str = "main") -> None:
        """Creates or changes a named secret; containers see it from their next start or restore."""
        known = self.cloud.secret_ids
        secret_id = known.setdefault((environment, name), f"st-{environment}-{name}")
        self.cloud.secrets[secret_id] = dict(values)

    def kill(self, name: str) -> Container:
        """SIGKILLs, with all its processes, the oldest running container of a function."""
        container = self.running(name)[0]
        self._run(container.kill())
        return container

    def stop_app(self, name: str, environment: str = "main") -> None:
        app = self.cloud.deployed_app(name, environment)
        if app is None:
            raise LookupError(f"no deployed app {name!r}")
        self._run(self._stop(app), timeout=self.options.stop_grace + 30)

    async def _stop(self, app: App) -> None:
        await self.cloud.stop_app(app)

    @contextmanager
    def holding_restores(self) -> Iterator[None]:
        """Containers that reach their checkpoint stay there until the block ends."""
        self._loop.call_soon_threadsafe(self.cloud.restores_allowed.clear)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self.cloud.restores_allowed.set)

    def held(self, name: str) -> list[Container]:
        """Containers that are between their checkpoint and their restore."""
        return [
            c
            for c in self.containers(name)
            if "checkpoint" in c.events and "restore" not in c.events
        ]

    def wait(self, condition: Callable[[], T], timeout: float = 20.0) -> T:
        """What `condition` returns, once that is true."""
        deadline = time.monotonic() + timeout
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError("the emulator did not come to that state")
            time.sleep(0.01)
        return found


def _exceptions(errors: list[BaseException]) -> list[Exception]:
    return [e if isinstance(e, Exception) else RuntimeError(repr(e)) for e in errors]
