"""Does vLLM's AsyncLLM survive the CUDA driver's process checkpoint, and what does each state cost?

    python benchmarks/gpu/checkpoint.py --out results          # a GPU of 80 GB, 20 minutes
    python benchmarks/gpu/checkpoint.py --tiny --out results   # no GPU: tries the script

A GPU memory snapshot of a container is: freeze the processes, let the driver move what is on the
GPU into host memory (`cuCheckpointProcessLock`, `cuCheckpointProcessCheckpoint`), save the host's
memory; later load it and go back (`cuCheckpointProcessRestore`, `cuCheckpointProcessUnlock`). This
script does the driver's part to every process of a running engine that uses CUDA, at the shape of
KaLM-Embedding-Gemma3-12B with random weights, asleep and awake, and compares the vectors bit by
bit. It needs Linux, a driver of version 570 or newer, and vLLM; nothing is downloaded.

Each experiment is a process group of its own, killed at its end, so that the next one finds the GPU
empty. Every step prints one line of JSON, appended to `results/steps.jsonl` at once; a step that
fails says so, and the next one is tried. The engine's own log is `results/EXPERIMENT.log`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Sequence
from typing import Any

from cuda_checkpoint import Driver, gpu_used, memory_of, state_now, tree
from model_shape import text_of, write_model
from stages import machine

GIB = 2**30
ENGINE_ARGS: dict[str, Any] = {
    "runner": "pooling",
    "convert": "embed",
    "load_format": "dummy",
    "dtype": "bfloat16",
    "max_model_len": 8192,
    "max_num_batched_tokens": 16384,
    "max_num_seqs": 512,
    "kv_cache_memory_bytes": 8 * GIB,
    "scheduling_policy": "priority",
    "enable_sleep_mode": True,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "hf_overrides": {"matryoshka_dimensions": [3840, 2048, 1024, 512, 256, 128, 64]},
}
# name: (what differs from ENGINE_ARGS, the steps after the load)
EXPERIMENTS: dict[str, tuple[dict[str, Any], Sequence[str]]] = {
    "bf16": ({}, ("asleep", "alive")),
    "bf16-again": ({}, ("asleep", "asleep")),  # the same once more: is the compile cache used?
    "fp8": ({"quantization": "fp8"}, ("asleep", "alive")),
    "graphs-offloaded": ({"sleep_mode_offload_cudagraph": True}, ("asleep",)),
    "steps-of-8k": ({"max_num_batched_tokens": 8192}, ("alive",)),
    "awake": ({}, ("awake", "alive", "awake interrupted")),
    "core-only": ({}, ("asleep core only", "alive", "asleep interrupted")),
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of compile workers in a snapshot
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


# --- what is embedded --------------------------------------------------------------------------


TEXTS = [
    *(text_of(n, n) for n in (2, 5, 9, 17, 24, 33, 64, 100, 128, 256, 512, 1000, 1500, 3000, 8000)),
    "Grüße aus Köln: 東京の天気、погода в Москве.",
]
QUERY = text_of(24, 1)


# --- the engines -------------------------------------------------------------------------------


class AsyncEngine:
    """AsyncLLM: its core in a process of its own, requests one text each."""

    def __init__(self, args: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs, PoolingParams
        from vllm.renderers.inputs.preprocess import parse_model_prompt
        from vllm.v1.engine.async_llm import AsyncLLM

        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
        self._parse, self._params, self._n = parse_model_prompt, PoolingParams, 0

    async def embed(self, text: str, priority: int = 0, dimensions: int | None = None) -> Any:
        """One text's vector."""
        renderer = self.engine.renderer
        prompt = self._parse(self.engine.model_config, text)
        (rendered,) = await renderer.render_cmpl_async([prompt], renderer.default_cmpl_tok_params)
        self._n += 1
        params = self._params(task="embed", dimensions=dimensions)
        async for out in self.engine.encode(rendered, params, f"r{self._n}", priority=priority):
            last = out
        return last.outputs.data

    async def sleep(self) -> None:
        await self.engine.sleep(level=1)

    async def wake(self) -> None:
        await self.engine.wake_up()

    async def health(self) -> dict[str, Any]:
        """What the engine says of itself."""
        await self.engine.check_health()
        return {
            "errored": self.engine.errored,
            "running": self.engine.is_running,
            "sleeping": await self.engine.is_sleeping(),
        }

    def resolved(self) -> dict[str, Any]:
        """What vLLM made of the arguments."""
        config = self.engine.vllm_config
        return {
            "dtype": str(config.model_config.dtype),
            "quantization": config.model_config.quantization,
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "capture_sizes": len(config.compilation_config.cudagraph_capture_sizes or []),
            "async_scheduling": config.scheduler_config.async_scheduling,
            "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
            "pooler": str(config.model_config.pooler_config),
            "gpu_blocks": config.cache_config.num_gpu_blocks,
        }

    def close(self) -> None:
        self.engine.shutdown(timeout=1)


# --- one experiment ----------------------------------------------------------------------------


class Experiment:
    """The steps of one experiment over one engine."""

    def __init__(self, name: str, out: pathlib.Path, work: pathlib.Path, tiny: bool) -> None:
        self.name, self.out, self.work, self.tiny = name, out, work, tiny
        self.started = time.perf_counter()
        self.engine: Any = None
        self.vectors: list[Any] = []
        self.pids: list[int] = []
        self.driver = Driver()

    def say(self, step: str, **seen: Any) -> None:
        """One line of what was seen."""
        at = round(time.perf_counter() - self.started, 1)
        line = json.dumps({"experiment": self.name, "step": step, "at": at, **seen})
        print(line, flush=True)
        with (self.out / "steps.jsonl").open("a") as file:
            file.write(line + "\n")

    @contextlib.asynccontextmanager
    async def step(self, step: str, memory: bool = False) -> AsyncIterator[dict[str, Any]]:
        """Time what is inside and say what it saw; a failure is said too, and swallowed."""
        seen: dict[str, Any] = {}
        started = time.perf_counter()
        try:
            yield seen
        except Exception as error:  # noqa: BLE001
            seen["failed"] = f"{type(error).__name__}: {error}"[:2000]
            seen["trace"] = "".join(traceback.format_tb(error.__traceback__)[-3:])[-1500:]
        seen = {"seconds": round(time.perf_counter() - started, 3), **seen}
        if memory:
            with contextlib.suppress(OSError):
                seen |= await asyncio.to_thread(state_now)
        self.say(step, **seen)

    async def run(self, deadline: float) -> None:
        """Load, then each step that the experiment has."""
        overrides, steps = EXPERIMENTS[self.name]
        async with self.step("load", memory=True) as seen:
            seen["cold_cache"] = not (self.work / "vllm").exists()
            self.load(overrides)
            seen["resolved"] = self.engine.resolved()
        if self.engine is None:
            return
        async with self.step("first embeds") as seen:
            self.vectors = [await self.engine.embed(text) for text in TEXTS]
            await self.same_vectors(seen)
            narrow = await self.engine.embed(QUERY, dimensions=64)
            seen |= {"mrl_64": list(narrow.shape), "norm": round(float(narrow.norm()), 5)}
            # Same last token, other context: a fault before the last token would show.
            one, other = [await self.engine.embed(start + QUERY) for start in ("x", "y")]
            seen["cosine_other_first_letter"] = float(one @ other)
        async with self.step("one query at a time") as seen:
            seen.update(await self.query_latency())
        async with self.step("who uses CUDA") as seen:
            for pid in tree(os.getpid()):
                if pid == self.driver.pid:
                    continue
                answer = await asyncio.to_thread(self.driver.call, "GetState", pid)
                seen[str(pid)] = answer
                if answer.get("state") == "running" and memory_of(pid)["nvidia_fds"]:
                    self.pids.append(pid)
            seen["to_checkpoint"] = self.pids
        for step in steps:
            if time.time() > deadline:
                self.say("out of time", before=step)
                break
            if step == "alive":
                await self.alive()
            else:
                await self.cycle(step)
        async with self.step("close"):
            self.engine.close()

    def load(self, overrides: dict[str, Any]) -> None:
        """Build the engine (it blocks)."""
        from vllm.config import PoolerConfig

        args = ENGINE_ARGS | overrides
        args["model"] = str(self.work / "model")
        args["pooler_config"] = PoolerConfig(seq_pooling_type="LAST", use_activation=True)
        if self.tiny:
            args |= {"enable_sleep_mode": False, "enforce_eager": True, "dtype": "float32"}
            args |= {"hf_overrides": {"matryoshka_dimensions": [64, 32]}}
            args |= {"kv_cache_memory_bytes": GIB, "max_num_seqs": 64}
        self.engine = AsyncEngine(args)

    async def cycle(self, kind: str) -> None:
        """Checkpoint and restore, and look at the vectors. Kind: "asleep" or "awake"; "core only"
        leaves the main process alone; "interrupted" sends a request in between."""
        asleep, interrupt = "asleep" in kind, "interrupted" in kind
        pids = [pid for pid in self.pids if pid != os.getpid() or "core only" not in kind]
        pending: asyncio.Task[Any] | None = None
        if asleep:
            async with self.step("sleep", memory=True) as seen:
                await self.engine.sleep()
        async with self.step(f"checkpoint {kind}", memory=True) as seen:
            calls = ["Lock", "Checkpoint"]
            seen.update(await asyncio.to_thread(self.driver.move, calls, pids))
        if interrupt:
            # The core's threads run on meanwhile. Asleep, its scheduler holds the request back;
            # awake, the core calls CUDA and dies of it.
            pending = asyncio.create_task(self.engine.embed(TEXTS[0]))
            async with self.step("a request while checkpointed") as seen:
                done, _ = await asyncio.wait([pending], timeout=2)
                seen["answered_within_2_s"] = bool(done)
        async with self.step(f"restore {kind}", memory=True) as seen:
            calls = ["Restore", "Unlock"]
            seen.update(await asyncio.to_thread(self.driver.move, calls, pids))
        if asleep:
            async with self.step("wake", memory=True):
                await asyncio.wait_for(self.engine.wake(), 120)
        if pending:
            async with self.step("that request afterwards") as seen:
                vector = await asyncio.wait_for(pending, 60)
                seen["bit_equal"] = bool((vector == self.vectors[0]).all())
        async with self.step(f"first query after {kind}") as seen:
            await asyncio.wait_for(self.engine.embed(QUERY), 120)
        async with self.step(f"vectors after {kind}") as seen:
            await self.same_vectors(seen)
            seen.update(await self.engine.health())
            seen.update(await self.query_latency())

    async def same_vectors(self, seen: dict[str, Any]) -> None:
        """Embed all texts again, one at a time, and compare with the first time's vectors."""
        again = [await asyncio.wait_for(self.engine.embed(text), 120) for text in TEXTS]
        pairs = list(zip(self.vectors, again, strict=True))
        seen["texts"] = len(pairs)
        seen["bit_equal"] = sum(bool((a == b).all()) for a, b in pairs)
        seen["worst_cosine"] = min(float(a.double() @ b.double()) for a, b in pairs)
        seen["finite"] = all(bool(b.isfinite().all()) for _, b in pairs)

    async def query_latency(self, times: int = 20) -> dict[str, Any]:
        """Milliseconds of one query after the other."""
        taken = []
        for _ in range(times):
            started = time.perf_counter()
            await asyncio.wait_for(self.engine.embed(QUERY), 120)
            taken.append((time.perf_counter() - started) * 1e3)
        return {
            "query_p50_ms": round(statistics.median(taken), 1),
            "query_max_ms": round(max(taken), 1),
        }

    async def alive(self) -> None:
        """Many at once; queries while a bulk job runs."""
        size = 64 if self.tiny else 256
        async with self.step("200 at once") as seen:
            texts = [text_of(8 + n % 120, n) for n in range(200)]
            vectors = await asyncio.gather(*(self.engine.embed(text) for text in texts))
            seen["unit"] = all(abs(float(vector.norm()) - 1) < 1e-3 for vector in vectors)
        async with self.step("bulk with queries between") as seen:
            count = 32 if self.tiny else 1024
            started = time.perf_counter()
            bulk = asyncio.gather(
                *(self.engine.embed(text_of(size, n), priority=10) for n in range(count))
            )
            taken = []
            await asyncio.sleep(1)
            while not bulk.done():
                began = time.perf_counter()
                await self.engine.embed(QUERY, priority=0)
                taken.append(round((time.perf_counter() - began) * 1e3))
            await bulk
            seen["bulk_tokens_per_s"] = round(count * size / (time.perf_counter() - started))
            seen["query_ms"] = taken


# --- all experiments ---------------------------------------------------------------------------


def disk_mib(folder: pathlib.Path) -> float:
    """MiB of files."""
    return round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20, 1)


def run_all(options: argparse.Namespace, out: pathlib.Path, work: pathlib.Path) -> None:
    """One experiment after the other, each in a process group of its own."""
    write_model(work / "model", options.tiny)
    end = time.time() + options.seconds
    line = json.dumps({"experiment": None, "step": "machine", **machine(), "gpu_gib": gpu_used()})
    print(line, flush=True)
    with (out / "steps.jsonl").open("a") as file:
        file.write(line + "\n")
    environment = (
        os.environ
        | ENVIRONMENT
        | {
            "VLLM_CACHE_ROOT": str(work / "vllm"),
            "TRITON_CACHE_DIR": str(work / "triton"),
        }
    )
    for name in options.experiments:
        left = end - time.time()
        if left < 60:
            print(json.dumps({"experiment": name, "step": "skipped: out of time"}), flush=True)
            continue
        command = [sys.executable, __file__, "--experiment", name, "--out", str(out)]
        command += ["--work", str(work), "--seconds", str(left - 20)]
        command += ["--tiny"] * options.tiny
        with (out / f"{name}.log").open("w") as log:
            child = subprocess.Popen(
                command,
                stderr=log,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                start_new_session=True,
            )
            timer = threading.Timer(left, os.killpg, (child.pid, signal.SIGKILL))
            timer.start()
            assert child.stdout
            for line in child.stdout:  # the engine's log lines come here too
                if line.startswith('{"experiment"'):
                    print(line, end="", flush=True)
                else:
                    log.write(line)
                    log.flush()
                if '"step": "end"' in line:
                    break
            timer.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        time.sleep(3)
        seen = {"gpu_gib": gpu_used(), "compile_cache_mib": disk_mib(work / "vllm")}
        print(json.dumps({"experiment": name, "step": "killed", **seen}), flush=True)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("checkpoint-results"))
    parser.add_argument("--work", type=pathlib.Path, help="model and caches; default: OUT/work")
    parser.add_argument("--seconds", type=float, default=1800, help="stop starting things after")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, no sleep mode: for CPUs")
    parser.add_argument(
        "--experiments",
        nargs="+",
        choices=EXPERIMENTS,
        metavar="NAME",
        default=list(EXPERIMENTS),
        help=f"of {', '.join(EXPERIMENTS)}",
    )
    parser.add_argument("--experiment", choices=EXPERIMENTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    work = (options.work or out / "work").resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not options.experiment:
        return run_all(options, out, work)
    experiment = Experiment(options.experiment, out, work, options.tiny)
    asyncio.run(experiment.run(time.time() + options.seconds))
    experiment.say("end")
    return None


if __name__ == "__main__":
    main()
