"""The HTTP endpoint: CPU time for 1,000 vectors, and the longest stall of its event loop.

    python benchmarks/client/http_endpoint.py                     # with a fast stub engine
    VLLM_VENV/bin/python benchmarks/client/http_endpoint.py vllm  # compared with vLLM's server

The second makes a Gemma 3 of six thin layers, 3,840 wide, and starts `kalm serve --engine vllm` and
vLLM's OpenAI server with it in turn, real vLLM on the CPU. It measures the process of the endpoint,
not vLLM's core. VLLM_VENV is what `make test-vllm` installs, `.venv-vllm`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from instant import DIMENSIONS, MODEL, InstantEngine

from kalm_integrations.codec import MEDIA_TYPE

HERE = Path(__file__).resolve().parent
PORT = 8420
URL = f"http://127.0.0.1:{PORT}"
KEY = "benchmark"
ROUNDS = 3
PACKED = {"Accept": MEDIA_TYPE}
WIDE = {
    "hidden_size": DIMENSIONS, "intermediate_size": 64, "head_dim": 64,
}  # fmt: skip
OURS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "packed float16": (PACKED, {"embed_dtype": "float16"}),
    "packed float32": (PACKED, {"embed_dtype": "float32"}),
    "base64 float32": ({}, {"encoding_format": "base64"}),
    "numbers": ({}, {"encoding_format": "float"}),
}
"""Headers and fields of a request, by the form of the response."""
VLLMS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "bytes float16": ({}, {"encoding_format": "bytes", "embed_dtype": "float16"}),
    "bytes float32": ({}, {"encoding_format": "bytes", "embed_dtype": "float32"}),
    "base64 float16": ({}, {"encoding_format": "base64", "embed_dtype": "float16"}),
    "base64 float32": ({}, {"encoding_format": "base64"}),
    "numbers": ({}, {"encoding_format": "float"}),
}


def post(kind: tuple[dict[str, str], dict[str, Any]], texts: int, model: str) -> int:
    """Send one request; returns the size of the response in bytes."""
    headers, fields = kind
    inputs = [f"a short text, number {i}" for i in range(texts)]
    request = urllib.request.Request(
        f"{URL}/v1/embeddings",
        json.dumps({"model": model, "input": inputs, **fields}).encode(),
        {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return len(answer.read())


def get(path: str) -> bytes:
    """Send a GET request; returns the body of the response."""
    request = urllib.request.Request(URL + path, headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return bytes(answer.read())


@contextmanager
def running(command: list[Any]) -> Iterator[int]:
    """Run a server; yields its process id once it responds."""
    environment = {
        **os.environ,
        "KALM_API_KEY": KEY,
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryFile() as output:
        server = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=output, env=environment
        )
        try:
            while True:
                try:
                    get("/v1/models")
                    break
                except OSError:
                    if server.poll() is not None:
                        output.seek(0)
                        raise SystemExit(output.read().decode()[-4_000:]) from None
                    time.sleep(0.5)
            yield server.pid
        finally:
            server.terminate()
            server.wait()


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_for_1000(pid: int, kind: Any, texts: int, requests: int, model: str) -> float:
    """Milliseconds of the server's CPU time for 1,000 vectors."""
    post(kind, texts, model)
    before = cpu_seconds(pid)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: post(kind, texts, model), range(requests)))
    return 1e6 * (cpu_seconds(pid) - before) / (texts * requests)


# --- with an engine that costs nothing


async def serve(port: int) -> None:
    """Serve our endpoint, and GET /longest: the longest stall of its event loop since the last such
    request, in seconds."""
    import uvicorn
    from pydantic import SecretStr
    from starlette.responses import PlainTextResponse

    from modal_backend.http.app import create_app
    from modal_backend.http.auth import BearerKeys
    from modal_backend.service import EmbeddingService

    app = create_app(EmbeddingService(InstantEngine()), keys=BearerKeys([SecretStr(KEY)]))
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - before - 0.001)

    async def measured(scope: Any, receive: Any, send: Any) -> None:
        nonlocal longest
        if scope.get("path") == "/longest":
            stall, longest = longest, 0.0
            await PlainTextResponse(str(stall))(scope, receive, send)
        else:
            await app(scope, receive, send)

    watching = asyncio.create_task(watch())
    await uvicorn.Server(uvicorn.Config(measured, port=port, log_level="error")).serve()
    watching.cancel()


def measure_alone() -> None:
    """Measure the endpoint, and print the table."""
    print("| response | texts | CPU, ms per 1,000 | longest stall, ms |")
    print("|---|---|---|---|")
    with running([sys.executable, __file__, "serve"]) as pid:
        for name, kind in OURS.items():
            for texts in (64, 2048):
                cpu, stalls = [], []
                for _ in range(ROUNDS):
                    post(kind, texts, MODEL)
                    get("/longest")
                    cpu.append(cpu_for_1000(pid, kind, texts, 6_144 // texts, MODEL))
                    stalls.append(1000 * float(get("/longest")))
                print(
                    f"| {name} | {texts:,} | {statistics.median(cpu):.0f} "
                    f"| {statistics.median(stalls):.1f} |"
                )


# --- compared with vLLM's own server


def compare_with_vllm() -> None:
    """Measure both servers, and print the table."""
    sys.path.insert(0, str(HERE.parents[1] / "tests" / "vllm"))
    from tiny_models import tiny_gemma3

    with tempfile.TemporaryDirectory() as folder:
        model = tiny_gemma3(Path(folder) / "wide", config=WIDE)
        ours = [sys.executable, "-m", "kalm_integrations.cli", "serve", "--engine", "vllm"]
        ours += ["--model", model, "--dtype", "fp32", "--enforce-eager", "--port", PORT]
        # Not `vllm serve`: the build for CPUs has no metadata under that name.
        vllms = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        vllms += ["--runner", "pooling", "--convert", "embed", "--dtype", "float32"]
        # By default it takes nearly all memory of a small machine.
        vllms += ["--gpu-memory-utilization", 0.2, "--max-model-len", 2048]
        vllms += ["--served-model-name", "wide", "--enforce-eager", "--port", PORT]
        vllms += ["--api-key", KEY, "--max-num-seqs", 64]
        figures: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for server, command, kinds in (("ours", ours, OURS), ("vLLM", vllms, VLLMS)):
                with running(command) as pid:
                    for name, kind in kinds.items():
                        cpu = cpu_for_1000(pid, kind, 64, 32, "wide")
                        figures.setdefault(f"{server} | {name}", []).append(cpu)
    print("| server | response | CPU, ms per 1,000 |\n|---|---|---|")
    for name, values in figures.items():
        print(f"| {name} | {statistics.median(values):.0f} |")


def main() -> None:
    """Run the chosen measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["serve", "vllm"])
    parser.add_argument("--port", type=int, default=PORT)
    arguments = parser.parse_args()
    if arguments.what == "serve":
        asyncio.run(serve(arguments.port))
    elif arguments.what == "vllm":
        compare_with_vllm()
    else:
        measure_alone()


if __name__ == "__main__":
    main()
