"""Our client and stock vLLM's own server, with real vectors. docs/servers.md has the others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kalm_served import LOADING
from reference import cosines, reference_vectors
from texts import many, text_of_tokens
from tiny_models import MAX_LENGTH, tiny_gemma3

from kalm_integrations import KalmClient, errors

NAME = "kalm"
TEXTS = many(40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gemma3(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    log = tmp_path_factory.mktemp("serving") / "log"
    arguments = ["--model", folder, "--served-model-name", NAME, "--host", "127.0.0.1"]
    arguments += ["--port", port, "--runner", "pooling", "--convert", "embed"]
    arguments += ["--dtype", "float32", "--enforce-eager", "--max-model-len", MAX_LENGTH]
    arguments += ["--kv-cache-memory-bytes", 10**8]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_NO_USAGE_STATS": "1"},
        )
    try:
        until = time.monotonic() + LOADING
        while not _is_ready(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _is_ready(health: str) -> bool:
    try:
        with urllib.request.urlopen(health):
            return True
    except OSError:
        return False


def client_of(url: str, **options: Any) -> KalmClient:
    return KalmClient(base_url=url, model=NAME, vector_dtype="float32", **options)


def test_vectors_are_those_of_the_reference(url: str, folder: Path) -> None:
    with client_of(url) as client:
        result = client.embed(TEXTS)
    assert cosines(result.vectors, reference_vectors(folder, TEXTS)).min() >= 0.99999
    assert result.usage.tokens


def test_a_long_text_is_named_and_all_others_are_embedded(url: str, folder: Path) -> None:
    texts = [*TEXTS]
    texts[6] = text_of_tokens(folder, MAX_LENGTH + 1)
    with client_of(url) as client:
        with pytest.raises(errors.InputTooLongError) as caught:
            client.embed(texts)
        assert [each.index for each in caught.value.invalid] == [6]
        parts = list(client.iter_embed(texts, on_error="skip"))
    assert [bad.index for part in parts for bad in part.rejected] == [6]
    assert sorted(i for part in parts for i in part.indices.tolist()) == [
        i for i in range(len(texts)) if i != 6
    ]


def test_truncation_keeps_the_beginning(url: str, folder: Path) -> None:
    longest = text_of_tokens(folder, MAX_LENGTH)
    with client_of(url, truncate="end") as client:
        vectors = client.embed([longest, longest + " and more", "before it " + longest]).vectors
    assert vectors[0] @ vectors[1] >= 0.99999
    assert cosines(vectors[:1], reference_vectors(folder, [longest])).min() >= 0.99999
    assert vectors[0] @ vectors[2] < 0.99


def test_native_dimensions_are_accepted_and_others_refused(url: str) -> None:
    with client_of(url) as client:
        native = client.embed(["a"]).vectors
    with client_of(url, dimensions=native.shape[1]) as client:
        assert np.allclose(client.embed(["a"]).vectors, native, atol=1e-6)
    with client_of(url, dimensions=64) as client:
        with pytest.raises(errors.ConfigurationError, match="Matryoshka"):
            client.embed(["a"])
