"""Are the shipped engine's vectors right on a GPU, at KaLM-Embedding-Gemma3-12B's full shape?

    python benchmarks/gpu/parity.py --out results          # a GPU of 80 GB, 10 minutes
    python benchmarks/gpu/parity.py --tiny --out results   # no GPU: tries the script

The engine as it is deployed (`VLLMEngine`: compiled, CUDA graphs, bf16, many calls at once) against
transformers in float32, on the same random weights: one text of each length from 2 to 8,192 tokens,
alone and among others. The weights lie where a download would leave KaLM's, so the engine's own
checks of pooling, attention, dtype, dimensions and scheduler are in force.

Accepted: cosine >= 0.999 for every text in bf16; different texts stay below 0.9, so that a mix-up
shows. fp8 is another space: its cosines are told, not judged.

Every step prints one line of JSON, appended to `results/parity.jsonl` at once; a step that fails
says so, the next one is tried, and the exit status is 1. Stages are processes of their own, so that
each finds the GPU empty. Nothing is downloaded.
"""

from __future__ import annotations

import asyncio
import json
import random
import string
import sys
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from model_shape import text_of, write_model
from stages import Row, Stage, main

sys.path.insert(0, str(Path(__file__).parents[2]))

ACCEPTED: Final = 0.999
APART: Final = 0.9
SHORT: Final = (2, 3, 7, 16, 33, 64, 100, 128, 200, 333, 512, 777, 1024, 1025, 1500, 2048)
LONG: Final = (3000, 4096, 5000, 8000, 8191, 8192)
_SHARD_BYTES: Final = 4 * 2**30
ALPHABET: Final = string.ascii_letters + string.digits


def texts(tiny: bool) -> list[str]:
    """One of each length, each with a last character of its own, of which a random model makes
    much."""
    made = []
    for tokens, last in zip(SHORT if tiny else SHORT + LONG, ALPHABET, strict=False):
        pick = random.Random(tokens)  # noqa: S311
        made.append("".join(pick.choices(ALPHABET, k=tokens - 2)) + last)
    return made


def model_folder(out: Path, tiny: bool) -> Path:
    """Where a download leaves KaLM's weights; elsewhere for what has another shape."""
    from kalm_integrations.models import KALM

    if tiny:
        return out / "tiny-gemma"
    repository = f"models--{KALM.space.model.replace('/', '--')}"
    return out / "hub" / repository / "snapshots" / KALM.space.revision


# --- stages ------------------------------------------------------------------------------------


def weights(out: Path, tiny: bool) -> Iterator[Row]:
    """Random weights that tell texts apart and do not blow up rounding through 48 layers."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, Gemma3ForCausalLM

    folder = model_folder(out, tiny)
    write_model(folder, tiny)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = Gemma3ForCausalLM(AutoConfig.from_pretrained(folder))
    generator = torch.Generator(device).manual_seed(0)
    shards: list[dict[str, Any]] = [{}]
    size = total = 0
    for name, parameter in model.named_parameters():
        mean, deviation = _distribution(name, parameter.shape)
        drawn = torch.randn(parameter.shape, generator=generator, device=device)
        tensor = drawn.mul_(deviation).add_(mean).to(torch.bfloat16).cpu()
        if size > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    yield {"gib": round(total / 2**30, 2), "shards": len(shards)}


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation. Gemma's norms scale by 1 + weight."""
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.3, 0.2  # peaked attention
    if "post_" in name:
        return -0.8, 0.1  # each layer adds a little
    if "norm" in name:
        return 0.0, 0.3
    return 0.0, shape[-1] ** -0.5


def reference(out: Path, tiny: bool) -> Iterator[Row]:
    """By transformers in float32, one text at a time; and in bf16, for what rounding does."""
    import torch
    from tokenizers import Tokenizer
    from transformers import Gemma3TextModel

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = model_folder(out, tiny)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = time.perf_counter()
    model, report = Gemma3TextModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert not report["missing_keys"], report
    model = model.eval().to(device)
    yield {"step": "load", "seconds": round(time.perf_counter() - start, 1)}
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        start = time.perf_counter()
        if dtype != torch.float32:  # lossless for the weights; rotary angles stay in float32
            angles = {name: buffer.clone() for name, buffer in model.named_buffers()}
            model = model.to(dtype)
            for name, buffer in model.named_buffers():
                buffer.data = angles[name]
        rows = []
        for text in texts(tiny):
            ids = torch.tensor([tokenizer.encode(text).ids], device=device)
            with torch.inference_mode():
                state = model(input_ids=ids, use_cache=False).last_hidden_state[0, -1].float()
            rows.append(torch.nn.functional.normalize(state, dim=0).cpu().numpy())
        found[str(dtype)] = np.stack(rows)
        seconds = round(time.perf_counter() - start, 1)
        yield {"dtype": str(dtype), "seconds": seconds, "texts": len(rows)}
    right, rounded = found["torch.float32"], found["torch.bfloat16"]
    np.save(out / "reference.npy", right)
    yield {"step": "rounding of transformers in bf16", **_cosines(rounded, right)}
    between = right @ right.T
    np.fill_diagonal(between, -1.0)
    highest = float(between.max())
    apart = {} if tiny else {"ok": highest < APART}  # in 64 dimensions all are rather near
    yield {"step": "different texts", "highest_cosine": round(highest, 4), **apart}


async def engine(out: Path, tiny: bool, quantization: str) -> AsyncIterator[Row]:
    """Our engine, as deployed."""
    from modal_backend.engines.vllm.config import VLLMOptions
    from modal_backend.engines.vllm.engine import VLLMEngine
    from modal_backend.engines.vllm.process import set_environment
    from modal_backend.weights import locate

    set_environment()
    judged = quantization == "none"
    right = np.load(out / "reference.npy")
    small: Row = {"enforce_eager": True, "dtype": "bf16", "max_num_batched_tokens": 512}
    small["max_model_len"] = 2048
    options = VLLMOptions(quantization=quantization, **(small if tiny else {}))  # type: ignore[arg-type]
    start = time.perf_counter()
    engine = await VLLMEngine.load(locate(str(model_folder(out, tiny))), options)
    try:
        loaded = time.perf_counter() - start
        start = time.perf_counter()
        await engine.warm_up()
        (inspected,) = await engine._llm.collective_rpc("inspect_model")
        yield {
            "step": "load",
            "seconds": round(loaded, 1),
            "warm_up_seconds": round(time.perf_counter() - start, 1),
            "graph_mode": inspected["cuda_graphs"],
            "identity": engine.identity.to_dict(),
            "dimensions": engine.dimensions,
            "max_tokens": engine.max_tokens,
        }

        def judge(vectors: Any) -> Row:
            found = _cosines(vectors, right)
            return found | {"ok": found["lowest_cosine"] >= ACCEPTED} if judged else found

        yield {"step": "alone", **judge(await _alone(engine, tiny))}
        for round_ in range(1 if tiny else 3):
            row, vectors = await _among_others(engine, tiny, round_)
            yield {"step": "among others", "round": round_, **row, **judge(vectors)}
        if not tiny:
            cut = await _embed(engine, [text_of(9000, 1)[:8191], text_of(9000, 1)], truncate="end")
            same = float(cut[0] @ cut[1])
            yield {"step": "cut at the end", "cosine": round(same, 6), "ok": same > 0.9999}
        before = await _alone(engine, tiny)
        start = time.perf_counter()
        await engine.sleep()
        slept = time.perf_counter() - start
        start = time.perf_counter()
        await engine.wake()
        woken = time.perf_counter() - start
        after = await _alone(engine, tiny)
        yield {
            "step": "asleep and awake again",
            "sleep_seconds": round(slept, 2),
            "wake_seconds": round(woken, 2),
            "bit_identical": bool(np.array_equal(before, after)),
            **judge(after),
        }
    finally:
        await engine.close()


async def _alone(engine: Any, tiny: bool) -> Any:
    return np.concatenate([await _embed(engine, [text]) for text in texts(tiny)])


async def _among_others(engine: Any, tiny: bool, seed: int) -> tuple[Row, Any]:
    """Every text in a call of its own or with some others, shuffled among 1,024 of 128 tokens."""
    shuffled = random.Random(seed)  # noqa: S311
    mine = list(enumerate(texts(tiny)))
    others = [(-1, text_of(128, 10_000 + n)) for n in range(64 if tiny else 1024)]
    everything = mine + others
    shuffled.shuffle(everything)
    calls = []
    while everything:
        count = shuffled.choice((1, 2, 8, 32))
        calls.append(everything[:count])
        everything = everything[count:]
    tokens = sum(len(text) + 1 for call in calls for _, text in call)
    start = time.perf_counter()
    answers = await asyncio.gather(*(_embed(engine, [text for _, text in c]) for c in calls))
    seconds = time.perf_counter() - start
    vectors = np.empty((len(mine), engine.dimensions[0]), dtype=np.float32)
    for call, answer in zip(calls, answers, strict=True):
        for (number, _), vector in zip(call, answer, strict=True):
            if number >= 0:
                vectors[number] = vector
    return {"calls": len(calls), "tokens": tokens, "tokens_per_second": round(tokens / seconds)}, (
        vectors
    )


async def _embed(engine: Any, some: list[str], truncate: str = "error") -> Any:
    output = await engine.embed(some, role="document", truncate=truncate, deadline=None)
    return output.vectors


def _cosines(vectors: Any, right: Any) -> Row:
    cosines = (vectors * right).sum(axis=1) / np.linalg.norm(vectors, axis=1)
    return {
        "lowest_cosine": round(float(cosines.min()), 6),
        "median_cosine": round(float(np.median(cosines)), 6),
        "lowest_at": int(cosines.argmin()),
    }


if __name__ == "__main__":
    stages: dict[str, Stage] = {
        "weights": weights,
        "reference": reference,
        "bf16": partial(engine, quantization="none"),
        "fp8": partial(engine, quantization="fp8"),
    }
    sys.exit(main(__doc__ or "", stages, "parity.jsonl", tiny=("weights", "reference", "bf16")))
