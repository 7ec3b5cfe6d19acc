"""The Modal app: its classes and functions. Deploy it with `kalm deploy`."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import modal
import modal.experimental
from pydantic import SecretStr

from kalm_integrations.bulk.on_modal import worker_pool
from modal_backend import compile_cache, rpc
from modal_backend.engines.vllm.process import READY_TIMEOUT
from modal_backend.image import HF_VOLUME, JIT_VOLUME, image_of
from modal_backend.lifecycle import Lifecycle
from modal_backend.settings import DeploySettings
from modal_backend.tags import tags_of
from modal_backend.vllm_serve import PORT, vllm_serve_command

settings = DeploySettings()
app = modal.App(settings.app_name, tags=tags_of(settings))
image = image_of(settings)

hf_secrets = [modal.Secret.from_name(settings.hf_secret)] if settings.hf_secret else []
api_key = modal.Secret.from_name(settings.api_key_secret, required_keys=["KALM_API_KEY"])
api_key_secrets = [api_key] if settings.needs_bearer else []
bulk_volume = modal.Volume.from_name(settings.bulk_volume, create_if_missing=True, version=2)
jit_volume = modal.Volume.from_name(settings.jit_cache_volume, create_if_missing=True)
weights_volume = modal.Volume.from_name(settings.hf_cache_volume, create_if_missing=True)
volumes: dict[str | PurePosixPath, modal.Volume | modal.CloudBucketMount] = {}
if settings.on_gpu:
    volumes = {HF_VOLUME: weights_volume, JIT_VOLUME: jit_volume}
# A list of one would be sent as ranked choices; snapshots are documented with a string.
ranked_gpus = settings.gpu[0] if len(settings.gpu) == 1 else list(settings.gpu)
resources: dict[str, Any] = {
    "image": image,
    "gpu": ranked_gpus if settings.on_gpu else None,
    "cpu": settings.cpu,
    "memory": settings.memory_mib,
    "region": settings.region,
    "startup_timeout": settings.startup_timeout,
}
snapshot: dict[str, Any] = {}
if settings.snapshot != "off":
    snapshot["enable_memory_snapshot"] = True
    if settings.on_gpu:
        snapshot["experimental_options"] = {"enable_gpu_snapshot": True}
if settings.on_gpu and not modal.is_local():  # before vLLM is imported
    os.environ.setdefault(READY_TIMEOUT, str(settings.engine_ready_timeout))

# Modal accepts snap=True only with a snapshot.
before_snapshot: Callable[[Any], Any] = (
    modal.enter(snap=True) if settings.snapshot != "off" else lambda hook: hook
)


class EngineContainer:
    """Base class of containers with an engine.

    All methods are async and run on one event loop: a sync one would run in a thread, and
    cancelling it would kill the container.
    """

    @before_snapshot
    async def prepare(self) -> None:
        """Before the snapshot: everything that a restored container need not repeat."""
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        self.lifecycle = Lifecycle(
            partial(settings.engine_type.load, settings.engine_options),
            settings.snapshot,
            canary_mode=settings.canary,
            attempt_timeout=settings.attempt_timeout,
        )
        self.prepared_by = os.environ.get("MODAL_TASK_ID")
        if settings.on_gpu:
            await asyncio.to_thread(compile_cache.fetch)
        await self.lifecycle.prepare()
        # Only of a trusted engine: a wrong kernel would return in every start.
        store = settings.on_gpu and self.lifecycle.trusted
        if store and await asyncio.to_thread(compile_cache.store):
            await jit_volume.commit.aio()  # type: ignore[no-untyped-call]
        self.on_prepared()

    @modal.enter(snap=False)
    async def resume(self) -> None:
        """After the snapshot."""
        if settings.snapshot == "off":  # `prepare` is not a hook then
            await self.prepare()
        # A restored container has another id.
        await self.lifecycle.resume(restored=os.environ.get("MODAL_TASK_ID") != self.prepared_by)
        self.on_resumed()
        self.watching = asyncio.create_task(
            self.lifecycle.watch(modal.experimental.stop_fetching_inputs.aio)
        )

    @modal.exit()
    async def close(self) -> None:
        """Free the engine."""
        self.watching.cancel()
        await self.lifecycle.close()

    def on_prepared(self) -> None:
        """Set up what becomes part of the snapshot; the engine is loaded or has failed."""

    def on_resumed(self) -> None:
        """Set up what must not be in the snapshot; the engine is awake or has failed."""


@app.cls(
    **resources,
    **snapshot,
    volumes=volumes,
    secrets=api_key_secrets,
    min_containers=settings.min_containers,
    max_containers=settings.max_containers,
    scaledown_window=settings.scaledown_window,
    timeout=settings.timeout,
)
@modal.concurrent(max_inputs=settings.concurrency, target_inputs=settings.concurrency // 2)
class VLLMEmbeddingSnapshot(EngineContainer):
    """One engine, vLLM or the embedded one, with RPC methods and an HTTP endpoint."""

    def on_prepared(self) -> None:
        from modal_backend.http.app import create_app
        from modal_backend.http.auth import BearerKeys

        self.keys = BearerKeys([] if settings.needs_bearer else None)
        self.http_app = create_app(
            self.lifecycle.service,
            keys=self.keys,
            max_concurrency=settings.http_concurrency,
            phases=self.lifecycle.phases,
        )

    def on_resumed(self) -> None:
        if settings.needs_bearer:
            # If the Secret has lost its key, nobody gets in; raising would restart the container
            # without end.
            self.keys.replace([SecretStr(os.environ.get("KALM_API_KEY", ""))])

    @modal.method()
    async def embed(self, sentences: list[str]) -> list[list[float]]:
        """Return vectors as lists of floats, without an instruction."""
        return await rpc.embed(self.lifecycle.service, sentences)

    @modal.method()
    async def embed_with_metadata(self, sentences: list[str]) -> list[dict[str, Any]]:
        """Return {"text", "embedding", "dimension"} for each sentence."""
        return await rpc.embed_with_metadata(self.lifecycle.service, sentences)

    @modal.method()
    async def embed_packed(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return packed vectors or an error as data, for `KalmClient`."""
        return await rpc.embed_packed(self.lifecycle.service, request)

    @modal.method()
    async def count_tokens(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the tokens of each text or an error as data, for `KalmClient`."""
        return await rpc.count_tokens(self.lifecycle.service, request)

    @modal.method()
    async def describe(self) -> dict[str, Any]:
        """Return identity, limits, version, warnings, and seconds of each phase of the start."""
        return rpc.describe(
            self.lifecycle.service,
            self.lifecycle.phases,
            restored=self.lifecycle.restored,
            engine_age=self.lifecycle.engine_age,
        )

    @modal.asgi_app(requires_proxy_auth=settings.auth != "bearer-public")
    def http(self) -> Any:
        """The OpenAI-compatible API."""
        return self.http_app


@app.cls(
    **resources,
    **snapshot,
    volumes={**volumes, worker_pool.VOLUME: bulk_volume},
    max_containers=worker_pool.MAX_CONTAINERS,
    scaledown_window=worker_pool.SCALEDOWN_WINDOW,
    timeout=worker_pool.TIMEOUT,
    retries=modal.Retries(max_retries=10, initial_delay=1.0),  # the worker itself stops sooner
)
# One shard is read and written while another is embedded, if there are not enough containers.
@modal.concurrent(max_inputs=2, target_inputs=1)
class VLLMBulkEmbedding(EngineContainer):
    """Embeds shards of bulk jobs, in a pool of its own, so that queries never wait for them.

    All jobs share one configuration and its snapshots; `with_options` would create a variant for
    each set of arguments. A job limits its containers through the autoscaler, and the worker limits
    the time of a shard.
    """

    def on_resumed(self) -> None:
        from modal_backend.bulk.worker import Container, Worker

        volume: Any = SimpleNamespace(reload=bulk_volume.reload.aio, commit=bulk_volume.commit.aio)
        self.worker = Worker(
            volume,
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
        """Embed a shard for a run of a job; return the outcome."""
        return await self.worker.embed_shard(job, run, number)


@app.function(
    image=image,
    cpu=2.0,
    memory=4096,
    volumes={worker_pool.VOLUME: bulk_volume},
    timeout=86_400,
    retries=2,
)
def prepare_bulk(request: dict[str, Any]) -> dict[str, Any]:
    """Split a job's input on Modal or in a bucket, which the caller mounts, and submit its shards;
    see `modal_backend.bulk.prepare`."""
    from modal_backend.bulk.prepare import prepare

    home = Path.home()
    bulk_volume.reload()  # a warm container has the files from its start
    if request["volume"] is not None:
        modal.Volume.from_name(request["volume"], environment_name=request["environment"]).reload()
    return prepare(
        request,
        volume=home / PurePosixPath(worker_pool.VOLUME).name,
        mounted=home / PurePosixPath(worker_pool.INPUT).name,
        commit=bulk_volume.commit,
    )


if settings.on_gpu:
    on_cpu: dict[str, Any] = {"image": image, "volumes": volumes, "cpu": 4.0}
    on_cpu["timeout"] = 2 * 3600  # 23.5 GB at 3.3 MB/s

    @app.function(**on_cpu, secrets=hf_secrets, memory=16 * 1024)
    def download_model_weights() -> None:
        """Download the weights into their volume, once, before the first start.

        `modal run -m modal_backend.app::download_model_weights`. 23.5 GB; needs no GPU.
        """
        from modal_backend.download import download

        download(settings.model, settings.revision)

    @app.function(**on_cpu, memory=8 * 1024, max_containers=1)
    def quantize_model_weights() -> None:
        """Write the int8 weights into the volume, once, after the download.

        `modal run -m modal_backend.app::quantize_model_weights`. Needs no GPU; resumes.
        """
        from modal_backend.quantize import quantize

        quantize(settings.model, settings.revision)

    @app.function(
        **resources,
        volumes=volumes,
        secrets=hf_secrets,
        max_containers=1,
        scaledown_window=settings.scaledown_window,
        timeout=settings.timeout,
    )
    @modal.concurrent(max_inputs=settings.concurrency)
    # Always with a proxy token: vLLM's own key guards only some of its routes.
    @modal.web_server(PORT, startup_timeout=settings.startup_timeout, requires_proxy_auth=True)
    def serve_http() -> None:
        """An unmodified `vllm serve` with its whole API, in a container of its own, without
        identity, priorities, canary or snapshot."""
        subprocess.Popen(vllm_serve_command(settings))  # noqa: S603


@app.local_entrypoint()
def main() -> None:
    """`modal run -m modal_backend.app`: check the deployment."""
    from modal_backend.smoke_test import check_deployment

    check_deployment(settings)
