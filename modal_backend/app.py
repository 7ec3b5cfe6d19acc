"""The Modal app, and nothing else: what runs where. Deploy it with `kalm deploy`."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import modal
import modal.experimental
from pydantic import SecretStr

from kalm_integrations.bulk.on_modal import worker_pool
from modal_backend import compile_cache, rpc
from modal_backend.engines.base import Engine
from modal_backend.engines.vllm.process import READY_TIMEOUT
from modal_backend.image import HF_VOLUME, JIT_VOLUME, image_of
from modal_backend.lifecycle import Lifecycle
from modal_backend.settings import DeploySettings
from modal_backend.tags import tags_of
from modal_backend.vllm_serve import STOCK_PORT, stock_command

settings = DeploySettings()
app = modal.App(settings.app_name, tags=tags_of(settings))
image = image_of(settings)

hf_secrets = [modal.Secret.from_name(settings.hf_secret)] if settings.hf_secret else []
api_key_secrets = (
    [modal.Secret.from_name(settings.api_key_secret, required_keys=["KALM_API_KEY"])]
    if settings.needs_bearer
    else []
)
bulk_volume = modal.Volume.from_name(settings.bulk_volume, create_if_missing=True, version=2)
jit_volume = modal.Volume.from_name(settings.jit_cache_volume, create_if_missing=True)
volumes: dict[str | PurePosixPath, modal.Volume | modal.CloudBucketMount] = (
    {
        HF_VOLUME: modal.Volume.from_name(settings.hf_cache_volume, create_if_missing=True),
        JIT_VOLUME: jit_volume,
    }
    if settings.on_gpu
    else {}
)

# A list of one would be sent as ranked choices; a string is the form documented for snapshots.
gpu: str | list[str] | None = None
if settings.on_gpu:
    gpu = settings.gpu[0] if len(settings.gpu) == 1 else list(settings.gpu)
snapshot_options: dict[str, Any] = {}
if settings.snapshot != "off":
    snapshot_options["enable_memory_snapshot"] = True
    if settings.on_gpu:
        snapshot_options["experimental_options"] = {"enable_gpu_snapshot": True}
if settings.on_gpu and not modal.is_local():  # read where vLLM is imported, later
    os.environ.setdefault(READY_TIMEOUT, str(settings.engine_ready_timeout))

# Modal takes snap=True only where there is a snapshot.
before_snapshot: Callable[[Any], Any] = (
    modal.enter(snap=True) if settings.snapshot != "off" else lambda hook: hook
)


class EngineContainer:
    """A container with an engine that can be trusted; what it is used for, its classes say."""

    @before_snapshot
    async def prepare(self) -> None:
        """Before the snapshot: everything that a restored container shall not do again."""
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        self.lifecycle = Lifecycle(
            _load,
            settings.snapshot,
            canary_mode=settings.canary,
            attempt_timeout=settings.attempt_timeout,
        )
        self.prepared_by = os.environ.get("MODAL_TASK_ID")
        if settings.on_gpu:
            await asyncio.to_thread(compile_cache.fetch)
        await self.lifecycle.prepare()
        # Not those of an engine that is not trusted: a wrong kernel would come back for ever.
        if (
            settings.on_gpu
            and self.lifecycle.trusted
            and await asyncio.to_thread(compile_cache.store)
        ):
            await jit_volume.commit.aio()  # type: ignore[no-untyped-call]
        self.prepared()

    @modal.enter(snap=False)
    async def resume(self) -> None:
        """After it."""
        if settings.snapshot == "off":
            await self.prepare()
        # Modal gives a restored container another id.
        await self.lifecycle.resume(restored=os.environ.get("MODAL_TASK_ID") != self.prepared_by)
        self.resumed()
        self.watching = asyncio.create_task(
            self.lifecycle.watch(modal.experimental.stop_fetching_inputs.aio)
        )

    @modal.exit()
    async def close(self) -> None:
        """Free the engine."""
        self.watching.cancel()
        await self.lifecycle.close()

    def prepared(self) -> None:
        """The engine is loaded; what is set up here lies in the snapshot."""

    def resumed(self) -> None:
        """The engine is awake, or out of order."""


@app.cls(
    image=image,
    gpu=gpu,
    cpu=settings.cpu,
    memory=settings.memory_mib,
    volumes=volumes,
    secrets=api_key_secrets,
    region=settings.region,
    min_containers=settings.min_containers,
    max_containers=settings.max_containers,
    scaledown_window=settings.scaledown_window,
    timeout=settings.timeout,
    startup_timeout=settings.startup_timeout,
    **snapshot_options,
)
@modal.concurrent(max_inputs=settings.concurrency, target_inputs=settings.concurrency // 2)
class VLLMEmbeddingSnapshot(EngineContainer):
    """One loaded engine behind two doors.

    All methods are async and run on one loop: a sync one would run in a thread, and cancelling
    it would kill the container.
    """

    def prepared(self) -> None:
        """Build the doors."""
        from modal_backend.http.app import create_app
        from modal_backend.http.middleware import BearerKeys

        self.keys = BearerKeys([] if settings.needs_bearer else None)
        self.door = create_app(
            self.lifecycle.service,
            keys=self.keys,
            max_inside=settings.http_concurrency,
            phases=self.lifecycle.phases,
        )

    def resumed(self) -> None:
        """Read secrets now: those read before the snapshot would be frozen in it."""
        if settings.needs_bearer:
            # A Secret that has lost its key keeps everybody out; raising here would start another
            # container, and another.
            self.keys.accept([SecretStr(os.environ.get("KALM_API_KEY", ""))])

    @modal.method()
    async def embed(self, sentences: list[str]) -> list[list[float]]:
        """Vectors as lists of floats; no instruction is added."""
        return await rpc.embed(self.lifecycle.service, sentences)

    @modal.method()
    async def embed_with_metadata(self, sentences: list[str]) -> list[dict[str, Any]]:
        """One {"text", "embedding", "dimension"} for each sentence."""
        return await rpc.embed_with_metadata(self.lifecycle.service, sentences)

    @modal.method()
    async def embed_packed(self, request: dict[str, Any]) -> dict[str, Any]:
        """What `KalmClient` calls: packed vectors, or an error as data."""
        return await rpc.embed_packed(self.lifecycle.service, request)

    @modal.method()
    async def describe(self) -> dict[str, Any]:
        """Identity, limits, version, warnings, and seconds of each phase of the start."""
        lifecycle = self.lifecycle
        return rpc.describe(
            lifecycle.service,
            lifecycle.phases,
            restored=lifecycle.restored,
            engine_age=lifecycle.engine_age,
        )

    @modal.asgi_app(requires_proxy_auth=settings.auth != "bearer-public")
    def http(self) -> Any:
        """The OpenAI-compatible door."""
        return self.door


@app.cls(
    image=image,
    gpu=gpu,
    cpu=settings.cpu,
    memory=settings.memory_mib,
    volumes={**volumes, worker_pool.VOLUME: bulk_volume},
    region=settings.region,
    max_containers=worker_pool.MAX_CONTAINERS,
    scaledown_window=worker_pool.SCALEDOWN_WINDOW,
    timeout=worker_pool.TIMEOUT,
    startup_timeout=settings.startup_timeout,
    retries=modal.Retries(max_retries=10, initial_delay=1.0),  # the worker itself gives up sooner
    **snapshot_options,
)
# One shard is read and written while the other is embedded; a container each comes first.
@modal.concurrent(max_inputs=2, target_inputs=1)
class VLLMBulkEmbedding(EngineContainer):
    """Shards of bulk jobs, in a pool of their own: queries to the service wait for none of them.

    All jobs share one configuration, and so its snapshots: `with_options` would make a variant for
    each set of arguments. A job sets the limit of containers through the autoscaler; the worker
    itself limits a shard's time.
    """

    def resumed(self) -> None:
        """Take note of who this container is: it may be another than before the snapshot."""
        from modal_backend.bulk.worker import Container, Worker

        self.worker = Worker(
            _BulkVolume(),
            Path.home() / PurePosixPath(worker_pool.VOLUME).name,
            self.lifecycle.service,
            Container(
                id=os.environ.get("MODAL_TASK_ID", ""),
                started=time.time(),
                gpu=",".join(settings.gpu) if settings.on_gpu else "",
                dollars_per_second=settings.dollars_per_hour / 3600,
                failure=self.lifecycle.failure,
            ),
            modal.experimental.stop_fetching_inputs.aio,
        )

    @modal.method()
    async def embed_shard(self, job: str, run: str, number: int) -> str:
        """Embed a shard of a job, for one of its runs; what became of it."""
        return await self.worker.embed_shard(job, run, number)


class _BulkVolume:
    async def reload(self) -> None:
        await bulk_volume.reload.aio()  # type: ignore[no-untyped-call]

    async def commit(self) -> None:
        await bulk_volume.commit.aio()  # type: ignore[no-untyped-call]


@app.function(
    image=image,
    cpu=2.0,
    memory=4096,
    volumes={worker_pool.VOLUME: bulk_volume},
    timeout=86_400,
    retries=2,
)
def prepare_bulk(asked: dict[str, Any]) -> dict[str, Any]:
    """Split a job's input that lies on Modal or in a bucket, and send its shards; see
    `modal_backend.bulk.prepare`. Whoever calls it has the input mounted."""
    from modal_backend.bulk.prepare import prepare

    home = Path.home()
    bulk_volume.reload()  # a warm container has what was there when it started
    if asked["volume"] is not None:
        environment = asked["environment"]
        modal.Volume.from_name(asked["volume"], environment_name=environment).reload()
    return prepare(
        asked,
        volume=home / PurePosixPath(worker_pool.VOLUME).name,
        mounted=home / PurePosixPath(worker_pool.INPUT).name,
        commit=bulk_volume.commit,
    )


async def _load() -> Engine:
    """The engine of this deployment."""
    return await settings.engine_type.load(settings.engine_options)


if settings.on_gpu:

    @app.function(
        image=image,
        volumes=volumes,
        secrets=hf_secrets,
        cpu=4.0,
        memory=16 * 1024,
        timeout=2 * 3600,  # 23.5 GB at 3.3 MB/s
    )
    def download_model_weights() -> None:
        """Put the weights into their volume, with progress: once, before the first start.

        `modal run -m modal_backend.app::download_model_weights`. 23.5 GB; needs no GPU.
        """
        from modal_backend.download import download

        download(settings.model, settings.revision)

    @app.function(
        image=image,
        gpu=gpu,
        cpu=settings.cpu,
        memory=settings.memory_mib,
        volumes=volumes,
        secrets=hf_secrets,
        region=settings.region,
        max_containers=1,
        scaledown_window=settings.scaledown_window,
        timeout=settings.timeout,
        startup_timeout=settings.startup_timeout,
    )
    @modal.concurrent(max_inputs=settings.concurrency)
    # Never without a proxy token: vLLM guards some of its routes only, whatever key it is given.
    @modal.web_server(
        STOCK_PORT, startup_timeout=settings.startup_timeout, requires_proxy_auth=True
    )
    def serve_http() -> None:
        """A stock `vllm serve`, for who wants its whole surface: a container of its own, without
        identity, priorities, canary or snapshot."""
        subprocess.Popen(stock_command(settings))  # noqa: S603


@app.local_entrypoint()
def main() -> None:
    """`modal run -m modal_backend.app`: prove the deployment, and print what it does."""
    from modal_backend.smoke_test import prove

    prove(settings)
