"""What is embedded, and the peers that embed it too."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from model_shape import text_of, write_model
from stages import Row

QUERY_TOKENS: Final = 24


def lengths(tiny: bool) -> dict[str, list[int]]:
    """Tokens of each text, by workload."""
    drawn = np.random.default_rng(0).lognormal(np.log(100), 1.0, 1024)
    mixed = [int(n) for n in np.clip(drawn, 4, 4096)]
    if tiny:
        return {"64x128": [128] * 64, "256x24": [24] * 256, "mixed": mixed[:64]}
    return {
        "1024x128": [128] * 1024,
        "256x512": [512] * 256,
        "4096x24": [24] * 4096,
        "mixed": mixed,
    }


def texts_of(tokens: Sequence[int]) -> list[str]:
    """A text of its own for each number of tokens, BOS counted."""
    return [text_of(count, seed) for seed, count in enumerate(tokens)]


def percentiles(seconds: Sequence[float]) -> Row:
    """In ms."""
    found = np.percentile(np.asarray(seconds) * 1e3, [50, 90, 99])
    return {
        "n": len(seconds),
        **{f"p{p}_ms": round(float(v), 1) for p, v in zip((50, 90, 99), found, strict=True)},
    }


def rates(tiny: bool, embed: Callable[[list[str]], Any], times: int = 1) -> Iterator[Row]:
    """Tokens a second of each workload, after a small one to warm up."""
    embed(texts_of([24, 128, 512]))
    for name, tokens in lengths(tiny).items():
        texts = texts_of(tokens)
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            embed(texts)
            taken.append(time.perf_counter() - start)
        yield rate(name, sum(tokens), taken)


def alone(ask: Callable[[str], Any], times: int) -> Row:
    """One query after the other."""
    taken = []
    for number in range(times):
        text = text_of(QUERY_TOKENS, number)
        start = time.perf_counter()
        ask(text)
        taken.append(time.perf_counter() - start)
    return {"step": "a query alone", "through": "engine", **percentiles(taken)}


def rate(workload: str, tokens: int, taken: Sequence[float]) -> Row:
    """The median run's."""
    seconds = statistics.median(taken)
    return {
        "step": "throughput",
        "workload": workload,
        "tokens_per_second": round(tokens / seconds),
        "seconds": [round(s, 2) for s in taken],
    }


# --- the card alone, and the peers -------------------------------------------------------------


def card(out: Path, tiny: bool) -> Iterator[Row]:
    """What the card multiplies: a large square, and the model's own layers, in bf16 and fp8."""
    import torch

    if tiny:
        yield {"step": "no card"}
        return

    def timed(work: Callable[[], Any], times: int) -> float:
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    def product(rows: int, inner: int, columns: int, fp8: bool, times: int = 10) -> float:
        a = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(columns, inner, device="cuda", dtype=torch.bfloat16) * inner**-0.5
        if not fp8:
            return timed(lambda: a @ b.T, times)
        one = torch.ones((), device="cuda")
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        return timed(
            lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16),
            times,
        )

    for fp8 in (False, True):
        dtype = "fp8" if fp8 else "bf16"
        square = 2 * 8192**3 / product(8192, 8192, 8192, fp8, 50) / 1e12
        yield {"step": "square of 8192", "dtype": dtype, "tflops": round(square)}
        for rows in (512, 1024, 2048, 4096, 8192, 16384):
            layer = sum(
                product(rows, inner, columns, fp8)
                for inner, columns in ((3840, 8192), (4096, 3840), (3840, 30720), (15360, 3840))
            )
            yield {
                "step": "the model's linear layers alone",
                "dtype": dtype,
                "rows": rows,
                "tokens_per_second": round(rows / (48 * layer)),
            }
    host = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    seconds = timed(lambda: host.to("cuda", non_blocking=True), 5)
    yield {"step": "host to card", "gb_per_second": round(2**30 / seconds / 1e9, 1)}


def naive(out: Path, tiny: bool) -> Iterator[Row]:
    """VLLM's `LLM.embed`, eager, 256 sequences: what one writes first."""
    from vllm import LLM
    from vllm.config import PoolerConfig

    write_model(out / "shape", tiny)
    small: Row = {"dtype": "float32", "gpu_memory_utilization": 0.3} if tiny else {}
    llm = LLM(
        str(out / "shape"),
        runner="pooling",
        convert="embed",
        pooler_config=PoolerConfig(seq_pooling_type="LAST"),
        load_format="dummy",
        max_model_len=8192,
        enforce_eager=True,
        max_num_seqs=256,
        enable_prefix_caching=False,
        **({"dtype": "bfloat16"} | small),
    )
    yield from rates(tiny, lambda texts: llm.embed(texts, use_tqdm=False))
    yield alone(lambda text: llm.embed([text], use_tqdm=False), 50)


def transformers_padded(out: Path, tiny: bool) -> Iterator[Row]:
    """Transformers in bf16, sorted by length, padded to multiples of 32, 16,384 tokens a batch."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoConfig, Gemma3TextModel

    write_model(out / "shape", tiny)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.from_file(str(out / "shape" / "tokenizer.json"))
    config = AutoConfig.from_pretrained(out / "shape")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Gemma3TextModel(config).eval()
    torch.set_default_dtype(torch.float32)
    if device == "cuda":
        assert next(model.parameters()).is_cuda

    def forward(ids: list[list[int]]) -> Any:
        width = -(-max(map(len, ids)) // 32) * 32
        padded = torch.zeros((len(ids), width), dtype=torch.long)
        mask = torch.zeros((len(ids), width), dtype=torch.long)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        with torch.inference_mode():
            output = model(
                input_ids=padded.to(device), attention_mask=mask.to(device), use_cache=False
            )
            last = mask.sum(1) - 1
            states = output.last_hidden_state[torch.arange(len(ids)), last.to(device)].float()
            return torch.nn.functional.normalize(states, dim=1).cpu().numpy()

    def embed(texts: list[str]) -> Any:
        ids = sorted((encoded.ids for encoded in tokenizer.encode_batch(texts)), key=len)
        made, batch = [], []
        for tokens in ids:
            if batch and (len(batch) + 1) * len(tokens) > 16_384:
                made.append(forward(batch))
                batch = []
            batch.append(tokens)
        return np.concatenate([*made, forward(batch)])

    yield from rates(tiny, embed)
    yield alone(lambda text: embed([text]), 30)


def shuffled_arrivals(seconds: float, per_second: float, seed: int = 0) -> list[float]:
    """When queries arrive: a Poisson process."""
    pick = random.Random(seed)  # noqa: S311
    at, arrivals = 0.0, []
    while (at := at + pick.expovariate(per_second)) < seconds:
        arrivals.append(at)
    return arrivals
