"""Tiny models and the engines over them, made once for all modules of this folder.

An engine belongs to the event loop that it was loaded in, so all tests with one run in the
session's loop: `pytestmark = pytest.mark.asyncio(loop_scope="session")`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

# Before vLLM or torch is imported. The few cores are shared by a front-end, an engine core and the
# reference; nothing asks the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# As on one GPU: the core runs the model itself. On a CPU it would start one more process for it.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import pytest_asyncio
import texts as some
import torch
import transformers
from huggingface_hub import constants
from running import LENGTHS, Texts, running
from tiny_models import in_hub_cache, sentence_transformers_files, tiny_gemma3

from kalm_integrations import models
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import ModelProfile
from modal_backend.engines.vllm.engine import VLLMEngine


def pytest_configure(config: pytest.Config) -> None:
    """All other warnings stay errors."""
    for message, category in (
        # torch, when vLLM is imported
        ("`torch.jit.script_method` is deprecated", DeprecationWarning),
        ("`torch.distributed.reduce_op` is deprecated", FutureWarning),
        # vLLM leaves its sockets' context to the garbage collector
        ("Unclosed context <zmq", ResourceWarning),
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:{category.__name__}")
        # pytest collects garbage once more when the last test's filters are gone
        warnings.filterwarnings("ignore", message, category)


@pytest.fixture(scope="session", autouse=True)
def one_quiet_thread() -> Iterator[None]:
    """The reference's."""
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny Gemma3ForCausalLM, with dimensions that it may be cut to."""
    return tiny_gemma3(
        tmp_path_factory.mktemp("models") / "tiny-gemma",
        config={"matryoshka_dimensions": [128, 64, 32]},
    )


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine(gemma: Path) -> AsyncIterator[VLLMEngine]:
    """Over `gemma`, of which nothing is known: float32, eager, steps of 256 tokens, 64 texts."""
    async with running(gemma) as engine:
        yield engine


KNOWN = "someone/known-gemma"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def known(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VLLMEngine]:
    """The weights of `gemma` as Gemma3TextModel, by name from the Hugging Face cache. A known
    model; the settings in its repository are all wrong."""
    made = tmp_path_factory.mktemp("known")
    folder = tiny_gemma3(made / "folder", architecture="Gemma3TextModel")
    sentence_transformers_files(folder, pooling="mean", normalize=False, max_seq_length=64)
    commit = in_hub_cache(folder, made / "cache", KNOWN)
    profile = ModelProfile(
        space=SpaceIdentity(
            model=KNOWN,
            revision=commit,
            pooling="last",
            normalized=True,
            attention="causal",
            quantization="fp32",
            profile=1,
        ),
        dimensions=(128, 96, 16),
        max_tokens=2048,
        query_template="Query: {text}",
        dtype="fp32",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(made / "cache"))
        patch.setitem(models._KNOWN, KNOWN, profile)
        async with running(KNOWN, max_model_len=2048) as engine:
            yield engine


@pytest.fixture(scope="session")
def ladder(gemma: Path) -> Texts:
    """One text of each of `LENGTHS`."""
    return Texts.of(gemma, [some.text_of_tokens(gemma, tokens) for tokens in LENGTHS])


@pytest.fixture(scope="session")
def pool(gemma: Path, ladder: Texts) -> Texts:
    """Over 150 different texts, of every kind, up to 700 tokens; none is blank."""
    long = [text for text, tokens in zip(ladder.texts, ladder.tokens, strict=True) if tokens <= 700]
    texts = dict.fromkeys([*some.EDGE_TEXTS, *long, *some.many(130)])
    return Texts.of(gemma, [text for text in texts if not text.isspace()])
