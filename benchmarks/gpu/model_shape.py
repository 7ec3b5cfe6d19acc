"""KaLM-Embedding-Gemma3-12B's shape without its weights, and texts of so many tokens."""

from __future__ import annotations

import json
import pathlib
import random


def write_model(folder: pathlib.Path, tiny: bool, packed: tuple[int, int] | None = None) -> None:
    """A config of the 12 B shape (or a tiny one) and a tokenizer of bytes: BOS, then one a byte.
    `packed` is bits and group size of quantized weights."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    shape = {
        "hidden_size": 64 if tiny else 3840,
        "intermediate_size": 128 if tiny else 15360,
        "num_hidden_layers": 6 if tiny else 48,
        "num_attention_heads": 4 if tiny else 16,
        "num_key_value_heads": 2 if tiny else 8,
        "head_dim": 32 if tiny else 256,
        "query_pre_attn_scalar": 32 if tiny else 256,
        "vocab_size": 512 if tiny else 262208,
    }
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **shape,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        "sliding_window_pattern": 6,  # five local layers, then a global one
        "attention_bias": False,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    if packed is not None:
        from modal_backend.quantize import quantization_config

        config["quantization_config"] = quantization_config(*packed)
    special = ["<pad>", "<eos>", "<bos>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 2)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "pad_token": "<pad>",
                "eos_token": "<eos>",
                "bos_token": "<bos>",
                "model_max_length": 131072,
            }
        )
    )


def text_of(tokens: int, seed: int) -> str:
    """A text of so many tokens, BOS counted."""
    pick = random.Random(seed)  # noqa: S311
    return "".join(pick.choices("etaoin shrdlu cmfwyp", k=tokens - 1))
