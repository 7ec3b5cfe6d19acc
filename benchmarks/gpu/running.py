"""Our engine while it is measured."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import workloads
from cuda_checkpoint import Driver, gpu_used, memory_of
from model_shape import text_of
from stages import Row

CALL_TEXTS: Final = 128
BULK_TOKENS: Final = 256
QUERIES_PER_SECOND: Final = 10.0
_ENVIRONMENT: Final = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions are sent into the engine core
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # on a CPU too, the core runs the model itself
}
STEPS: Final = (1024, 1536, 2048, 4096, 8192, 16_384)


class Running:
    """An engine, and what is measured of it."""

    def __init__(self, engine: Any, tiny: bool, vectors: Path) -> None:
        self.engine = engine
        self.tiny = tiny
        self._first_vectors = vectors

    @classmethod
    async def load(cls, folder: Path, tiny: bool, options: Row, arguments: Row) -> Running:
        """Load `VLLMEngine` with random weights, made on the GPU."""
        from modal_backend.engines.vllm import process
        from modal_backend.engines.vllm.config import VLLMOptions
        from modal_backend.engines.vllm.engine import VLLMEngine
        from modal_backend.weights import Weights

        os.environ |= _ENVIRONMENT
        process.set_environment()
        _override({} if tiny and "worker_cls" in arguments else arguments)
        chosen: Row = {"max_model_len": 8192, "dtype": "bf16", **options}
        if tiny:
            chosen |= {"dtype": "fp32", "enforce_eager": True, "max_model_len": 4096}
            chosen |= {"quantization": "none", "gpu_memory_utilization": None}
        weights = Weights(folder.name, "random", folder)
        engine = await VLLMEngine.load(weights, VLLMOptions(**chosen))
        return cls(engine, tiny, folder.parent / "vectors.npy")

    async def resolved(self) -> Row:
        """What vLLM made of it."""
        (inspected,) = await self.engine._llm.collective_rpc("inspect_model")
        config = self.engine._llm.vllm_config
        sizes = config.compilation_config.cudagraph_capture_sizes or []
        return {
            "identity": self.engine.identity.to_dict(),
            "step": "load",
            "step_tokens": config.scheduler_config.max_num_batched_tokens,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "graph_mode": inspected["cuda_graphs"],
            "kernels": await self._inside(_linear_kernels),
            "graphs": len(sizes),
            "graph_sizes": [min(sizes, default=0), max(sizes, default=0)],
            "gpu_gib": gpu_used(),
        }

    def measure(self, what: str) -> AsyncIterator[Row]:
        """The rows of one kind of measurement."""
        kinds: dict[str, Callable[[], AsyncIterator[Row]]] = {
            "vectors": self.compare_vectors,
            "throughput": self.throughput,
            "service": self.service,
            "alone": self.alone,
            "steps": self.steps,
            "awake": lambda: self.snapshot("awake"),
            "asleep": lambda: self.snapshot("asleep"),
            "kernels": self.profile,
        }
        return kinds[what]()

    async def close(self) -> None:
        """End the engine."""
        await self.engine.close()

    # --- vectors, throughput and latency

    async def compare_vectors(self) -> AsyncIterator[Row]:
        """Compare with the vectors of the first variant that was measured into this folder."""
        made = await self._vectors()
        if not self._first_vectors.exists():
            np.save(self._first_vectors, made)
        cosines = (made * np.load(self._first_vectors)).sum(1)
        between = made @ made.T
        np.fill_diagonal(between, -1.0)
        yield {
            "step": "vectors",
            "lowest_cosine_to_first_variant": round(float(cosines.min()), 7),
            "highest_cosine_between_texts": round(float(between.max()), 4),
        }

    async def embed(self, texts: list[str], role: str = "document") -> Any:
        """In calls of 128 texts, all at once, as a client's come."""
        calls = [texts[start : start + CALL_TEXTS] for start in range(0, len(texts), CALL_TEXTS)]
        outputs = await asyncio.gather(*(self._call(call, role) for call in calls))
        return np.concatenate(outputs)

    async def _call(self, texts: list[str], role: str) -> Any:
        output = await self.engine.embed(texts, role=role, truncate="error", deadline=None)
        return output.vectors

    async def throughput(self) -> AsyncIterator[Row]:
        """Through the engine."""
        await self.embed(workloads.texts_of([24, 128, 512]))
        for name, tokens in workloads.lengths(self.tiny).items():
            texts, taken = workloads.texts_of(tokens), []
            busy = _Busy()
            for _ in range(2):
                start = time.perf_counter()
                await self.embed(texts)
                taken.append(time.perf_counter() - start)
            row = workloads.rate(name, sum(tokens), taken)
            yield row | {"through": "engine", "loop_busy": busy.share()}

    async def alone(self) -> AsyncIterator[Row]:
        """One query after the other."""
        taken = [await self._query(number) for number in range(20 if self.tiny else 300)]
        yield {"step": "a query alone", "through": "engine", **workloads.percentiles(taken)}
        await self._inside(_start_profile)
        count = 20 if self.tiny else 50
        for number in range(count):
            await self._query(number)
        profile = await self._inside(_end_profile)
        kernels = [[name, round(ms / count, 3), n] for name, ms, n in profile["kernels"][:6]]
        yield {
            "step": "a query alone, on the GPU",
            "ms": round(profile["busy_seconds"] * 1e3 / count, 2),
            "kernels": kernels,
        }

    async def _query(self, seed: int) -> float:
        text = text_of(workloads.QUERY_TOKENS, seed)
        start = time.perf_counter()
        await self._call([text], "query")
        return time.perf_counter() - start

    async def service(self) -> AsyncIterator[Row]:
        """Through HTTP, packed: the door on this event loop, as in a container."""
        import uvicorn
        from pydantic import SecretStr

        from modal_backend.http.app import create_app
        from modal_backend.http.auth import BearerKeys
        from modal_backend.service import EmbeddingService

        keys = BearerKeys([SecretStr("benchmark")])
        app = create_app(EmbeddingService(self.engine), keys=keys)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", access_log=False))
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, sys.argv[0], "--client", f"http://127.0.0.1:{port}"),
            json.dumps(self.engine.identity.to_dict()),
            "tiny" if self.tiny else "full",
            stdout=asyncio.subprocess.PIPE,
        )
        assert child.stdout
        busy = _Busy()
        async for line in child.stdout:
            yield json.loads(line) | {"loop_busy": busy.share()}
            busy = _Busy()
        if await child.wait():
            raise RuntimeError("the client failed")
        server.should_exit = True
        await serving

    async def steps(self) -> AsyncIterator[Row]:
        """A bulk job alone, and with queries between, at several sizes of a step; by our scheduler,
        and by vLLM's priorities alone."""
        most = (await self.resolved())["step_tokens"]
        sizes = [step for step in ((128, 256) if self.tiny else STEPS) if step <= most]
        for step in sizes:
            await self._inside(_set_step, step, True)
            yield await self._bulk(step, queries=False)
            yield await self._bulk(step, queries=True)
        if most <= 2048:
            return
        for fill in (64,) if self.tiny else (256, 1024):
            await self._inside(_set_step, sizes[1], True, fill)
            yield await self._bulk(sizes[1], queries=True) | {"fill": fill}
        for step in sizes if self.tiny else (2048, 8192):
            await self._inside(_set_step, step, False)
            yield await self._bulk(step, queries=True) | {"scheduler": "priorities alone"}

    async def _bulk(self, step: int, *, queries: bool) -> Row:
        count = 64 if self.tiny else 896
        texts = workloads.texts_of([BULK_TOKENS] * count)
        start = time.perf_counter()
        bulk = asyncio.ensure_future(self.embed(texts))
        asked: list[asyncio.Task[float]] = []
        if queries:
            for at in workloads.shuffled_arrivals(600.0, QUERIES_PER_SECOND, seed=step):
                wait = asyncio.sleep(max(0.0, start + 0.5 + at - time.perf_counter()))
                await asyncio.wait(
                    (bulk, asyncio.ensure_future(wait)), return_when="FIRST_COMPLETED"
                )
                if bulk.done():
                    break
                asked.append(asyncio.create_task(self._query(len(asked))))
        await bulk
        seconds = time.perf_counter() - start
        latencies = await asyncio.gather(*asked)
        row: Row = {"step": "bulk", "step_tokens": step, "queries": queries}
        row["tokens_per_second"] = round(count * BULK_TOKENS / seconds)
        return row | (workloads.percentiles(latencies) if latencies else {})

    async def _inside(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in the engine core's process."""
        (answer,) = await self.engine._llm.collective_rpc(work, args=arguments)
        return answer

    async def profile(self) -> AsyncIterator[Row]:
        """Where the card's time goes in a bulk job, by kernel, at two sizes of a step."""
        for step in (64,) if self.tiny else (2048, 8192):
            await self._inside(_set_step, step, True)
            texts = workloads.texts_of([128] * (16 if self.tiny else 512))
            await self.embed(texts)
            await self._inside(_start_profile)
            await self.embed(texts)
            yield {"step": "kernels", "step_tokens": step, **await self._inside(_end_profile)}

    # --- snapshots

    async def snapshot(self, state: str) -> AsyncIterator[Row]:
        """Checkpoint and restore by the driver; what each phase takes and what processes hold."""
        from modal_backend import canary

        proof = await canary.check(self.engine)
        before = await self._vectors()
        pids = [self.engine._cores[0].pid, os.getpid()]
        if not self.tiny:
            yield {"step": "allocations", "gib": await self._inside(_allocations)}
        start = time.perf_counter()
        if state == "asleep":
            await self.engine.sleep()
        seconds = round(time.perf_counter() - start, 2)
        yield {"step": state, "seconds": seconds, **_memory(pids)}
        if self.tiny:
            await self.engine.wake()
            return
        driver = Driver()
        try:
            seen = await asyncio.to_thread(driver.move, ["Lock", "Checkpoint"], pids)
            taken = _seconds(seen, "Checkpoint")
            yield {
                "step": f"checkpoint, {state}",
                "seconds": taken,
                **_memory(pids),
                **_failed(seen),
            }
            seen = await asyncio.to_thread(driver.move, ["Restore", "Unlock"], pids)
        finally:
            driver.close()
        phases = {"restore": _seconds(seen, "Restore")}
        for name, phase in (
            ("wake", self.engine.wake()),
            ("canary", canary.check(self.engine, proof)),
            ("first_query", self._query(1)),
        ):
            start = time.perf_counter()
            await phase
            phases[name] = round(time.perf_counter() - start, 3)
        after = await self._vectors()
        yield {
            "step": f"back, {state}",
            **phases,
            "restore_wake_canary": round(sum(list(phases.values())[:3]), 2),
            "bit_identical": bool(np.array_equal(before, after)),
            "lowest_cosine": round(float((before * after).sum(1).min()), 7),
            **_memory(pids),
            **_failed(seen),
        }

    async def _vectors(self) -> Any:
        most = 1024 if self.tiny else 8000
        counts = [n for n in (2, 9, 24, 64, 128, 512, 1500, 3000, 8000) if n <= most]
        return np.concatenate([await self._call([text_of(n, n)], "document") for n in counts])


def _override(arguments: Row) -> None:
    """Give vLLM random weights and these arguments, whatever the engine passes."""
    from vllm.engine import arg_utils

    of_vllm = arg_utils.AsyncEngineArgs

    def overridden(**named: Any) -> Any:
        return of_vllm(**named | {"load_format": "dummy"} | arguments)

    arg_utils.AsyncEngineArgs = overridden


class _Busy:
    """How much of the time this thread, which has the event loop, is at work."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.thread_time()

    def share(self) -> float:
        """Since it was made."""
        wall, busy = self._start
        return round((time.thread_time() - busy) / (time.perf_counter() - wall), 2)


def _seconds(seen: Row, call: str) -> float:
    return round(sum(v.get("seconds", 0.0) for k, v in seen.items() if k.startswith(call)), 2)


def _failed(seen: Row) -> Row:
    return {"ok": False, "driver": seen} if "failed" in seen else {}


def _memory(pids: list[int]) -> Row:
    """GiB: on the GPU, and of each process by kind."""
    rows = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            row = memory_of(pid)
            rows[row.pop("name")] = row
    total = sum(row.get("VmRSS", 0.0) for row in rows.values())
    return {"gpu_gib": gpu_used(), "host_gib": round(total, 2), "processes": rows}


# --- run in the engine core's process ----------------------------------------------------------


def _set_step(worker: Any, step: int, ours: bool, fill: int = 512) -> None:
    import gc

    gc.unfreeze()  # vLLM freezes what it has loaded
    (scheduler,) = [o for o in gc.get_objects() if type(o).__name__ == "QueryFirstScheduler"]
    gc.freeze()  # or each collection, one of them in `wake`, takes a second
    scheduler.step, scheduler.fill = step, min(fill, step // 2)
    scheduler.max_num_scheduled_tokens = step
    scheduler.scheduler_config.long_prefill_token_threshold = 0
    scheduler.__dict__.pop("schedule", None)
    if not ours:  # vLLM's own, with these bounds
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        scheduler.schedule = AsyncScheduler.schedule.__get__(scheduler)


def _start_profile(worker: Any) -> None:
    import time

    import torch

    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    worker.benchmark_profile = torch.profiler.profile(
        activities=kinds[-1:] if torch.cuda.is_available() else kinds[:1]
    )
    worker.benchmark_profile.start()
    worker.benchmark_start = time.perf_counter()


def _end_profile(worker: Any) -> dict[str, Any]:
    import time

    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - worker.benchmark_start
    worker.benchmark_profile.stop()
    averages = worker.benchmark_profile.key_averages()
    rows = sorted(
        ((a.key[:90], round(a.self_device_time_total / 1e3, 1), a.count) for a in averages),
        key=lambda row: -row[1],
    )
    busy = sum(row[1] for row in rows) / 1e3
    return {"seconds": round(seconds, 2), "busy_seconds": round(busy, 2), "kernels": rows[:22]}


def _linear_kernels(worker: Any) -> list[str]:
    """Names of the kernels for packed weights."""
    schemes = [getattr(module, "scheme", None) for module in worker.get_model().modules()]
    kernels = {type(getattr(scheme, "kernel", None)).__name__ for scheme in schemes if scheme}
    return sorted(kernels)


def _allocations(worker: Any) -> dict[str, float]:
    """GiB on the GPU: by vLLM's tag, and what torch has use for."""
    import torch
    from vllm.device_allocator import get_mem_allocator_instance

    found: dict[str, float] = {}
    for allocation in get_mem_allocator_instance().pointer_to_data.values():
        found[allocation.tag] = found.get(allocation.tag, 0.0) + allocation.handle[1] / 2**30
    found["in use"] = torch.cuda.memory_allocated() / 2**30
    found["reserved"] = torch.cuda.memory_reserved() / 2**30
    return {name: round(gib, 2) for name, gib in found.items()}
