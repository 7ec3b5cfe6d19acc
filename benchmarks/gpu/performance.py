"""How fast is the shipped engine at KaLM-Embedding-Gemma3-12B's full shape, and what does a
snapshot of it carry?

    python benchmarks/gpu/performance.py --out results          # a GPU of 80 GB, 40 minutes
    python benchmarks/gpu/performance.py --tiny --out results   # no GPU: tries the script

Throughput of four workloads through `VLLMEngine` and through the whole service (HTTP, packed), in
one run with vLLM's `LLM.embed` as one writes it first and with transformers in padded batches, as a
share of what the card multiplies; a query alone, and while a bulk job runs, at several sizes of a
step; and the driver's process checkpoint of the engine's processes in several states. Random
weights: times and memory are those of the real model. Nothing is downloaded.

Every step is a line of JSON in `results/performance.jsonl` at once; a stage that fails says so, and
the next one is tried.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[2]))

import parity
import workloads
from model_shape import write_model
from running import Running
from stages import Row, Stage, main


@dataclass(frozen=True)
class Variant:
    """A way to run our engine.

    Attributes:
        options: Of `VLLMOptions`.
        arguments: Of `AsyncEngineArgs`, over ours.
        measure: What is measured, in this order.
        from_disk: Read random weights from the disk instead of making them on the GPU.
        packed: Bits and group size of packed weights, as `kalm quantize` writes them with 8 and
            128. They are random integers: vectors are not comparable with those of other variants.
        environment: Variables of the process.
    """

    options: Row = field(default_factory=dict)
    arguments: Row = field(default_factory=dict)
    measure: tuple[str, ...] = ()
    from_disk: bool = False
    packed: tuple[int, int] | None = None
    environment: dict[str, str] = field(default_factory=dict)


def autotune(*, on: bool) -> Row:
    """Arguments that switch flashinfer's autotuning on or off."""
    return {"kernel_config": {"enable_flashinfer_autotune": on}}


FP8: Final = {"quantization": "fp8"}
INT8: Final = {"quantization": "int8"}
INTEGERS: Final = {"worker_cls": "random_integers.RandomIntegersWorker"}
# As on an A100: vLLM has FlashAttention 3 on Hopper cards only, and version 2 cannot be part of a
# CUDA graph here, so the graphs are made in pieces.
FA2: Final = {"attention_config": {"flash_attn_version": 2}, "worker_cls": "auto"}
MEASURED: Final = ("vectors", "throughput", "service", "alone", "steps", "asleep", "asleep")
BRIEF: Final = ("throughput", "alone")
VARIANTS: Final = {
    "bf16": Variant(measure=MEASURED),
    "FlashAttention 2": Variant(
        arguments=FA2, measure=("vectors", "throughput", "alone", "asleep")
    ),
    "fp8": Variant(options=FP8, measure=MEASURED),
    "int8": Variant(options=INT8, arguments=INTEGERS, measure=MEASURED[1:], packed=(8, 128)),
    "from disk": Variant(
        arguments={"load_format": "safetensors", "safetensors_load_strategy": "prefetch"},
        measure=("alone",),
        from_disk=True,
    ),
    # What other packed weights would give: Machete has no groups of 32, and vLLM takes Marlin.
    "int8, groups of 64": Variant(arguments=INTEGERS, measure=BRIEF, packed=(8, 64)),
    "int8, groups of 32": Variant(arguments=INTEGERS, measure=BRIEF, packed=(8, 32)),
    "int4, groups of 32": Variant(arguments=INTEGERS, measure=BRIEF, packed=(4, 32)),
    # The kernel of cards before Hopper.
    "int8 with Marlin": Variant(
        options=INT8,
        arguments=INTEGERS,
        measure=BRIEF,
        packed=(8, 128),
        environment={"VLLM_DISABLED_KERNELS": "MacheteLinearKernel"},
    ),
    # They differ only where flashinfer is installed.
    "without autotune": Variant(arguments=autotune(on=False), measure=("vectors", "alone")),
    "with autotune": Variant(arguments=autotune(on=True), measure=("vectors", "alone")),
    # Twice the step, for what it would give and cost, on the same machine.
    "bf16 at 2048": Variant(options={"max_num_batched_tokens": 2048}, measure=("steps",)),
    "fp8 at 2048": Variant(options={"max_num_batched_tokens": 2048, **FP8}, measure=("steps",)),
    # One engine, whose steps are made smaller while it runs.
    "steps bf16": Variant(
        options={"max_num_batched_tokens": 16_384},
        measure=("steps", "throughput", "service", "alone", "kernels"),
    ),
    "steps fp8": Variant(
        options={"max_num_batched_tokens": 16_384, **FP8}, measure=("steps", "kernels")
    ),
    # vLLM's worker: of pooling models it makes graphs in pieces.
    "graphs in pieces": Variant(arguments={"worker_cls": "auto"}, measure=("alone", "throughput")),
    "first version": Variant(
        options={"enforce_eager": True, "gpu_memory_utilization": 0.9},
        arguments={"scheduler_cls": None, "async_scheduling": None, "worker_cls": "auto"},
        measure=("alone", "awake", "asleep"),
    ),
}


async def ours(out: Path, tiny: bool, variant: Variant) -> AsyncIterator[Row]:
    """One variant."""
    os.environ |= variant.environment
    packed = None if tiny else variant.packed  # vLLM has no such kernel for CPUs
    folder = out / ("shape" if packed is None else "shape-int{}-{}".format(*packed))
    write_model(folder, tiny, packed)
    if variant.from_disk:
        folder = parity.model_folder(out, tiny)
        for row in parity.weights(out, tiny):
            yield {"step": "weights", **row, "page_cache_dropped": not tiny and drop_page_cache()}
    start = time.perf_counter()
    running = await Running.load(folder, tiny, variant.options, variant.arguments)
    loaded = time.perf_counter() - start
    try:
        start = time.perf_counter()
        await running.engine.warm_up()
        yield {
            "step": "load",
            "seconds": round(loaded, 1),
            "warm_up_seconds": round(time.perf_counter() - start, 1),
            **await running.resolved(),
        }
        for what in variant.measure:
            try:
                async for row in running.measure(what):
                    yield row
            except Exception as error:  # noqa: BLE001 (told; the others are measured)
                yield {"step": what, "error": f"{type(error).__name__}: {error}", "ok": False}
    finally:
        await running.close()


def drop_page_cache() -> bool:
    """Make the next read come from the disk; only root can."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def client(url: str, identity: str, tiny: bool) -> Iterator[Row]:
    """What `KalmClient` gets through the HTTP door, from another process."""
    from kalm_integrations import KalmClient
    from kalm_integrations.identity import SpaceIdentity

    space = SpaceIdentity.from_dict(json.loads(identity))
    with KalmClient(
        backend="http",
        base_url=url,
        api_key="benchmark",
        model=space.model,
        expected_identity=space,
    ) as kalm:
        for row in workloads.rates(tiny, partial(kalm.embed, role="document"), times=2):
            yield row | {"through": "service"}
        times = 20 if tiny else 200
        row = workloads.alone(lambda text: kalm.embed([text], role="query"), times)
        yield row | {"through": "service"}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        for line in client(*sys.argv[2:4], tiny=sys.argv[4] == "tiny"):
            print(json.dumps(line), flush=True)
        sys.exit()
    stages: dict[str, Stage] = {
        "card": workloads.card,
        "naive": workloads.naive,
        "transformers": workloads.transformers_padded,
        **{name: partial(ours, variant=variant) for name, variant in VARIANTS.items()},
    }
    sys.exit(main(__doc__ or "", stages, "performance.jsonl", tiny=tuple(stages)))
