"""`kalm embed` beside what one writes with LangChain and with LlamaIndex, on the same service.

    python benchmarks/bulk/run.py          # 15 minutes; a Markdown report on stdout

Three questions. What does a job reach of what the service alone does, with the embedded engine
behind `kalm serve`? How much memory does it take for 20,000 and for 200,000 rows? And 200,000 rows
of KaLM's width, from our HTTP endpoint with an engine that costs nothing: how long, how much
memory, and what is left after a `kill -9` at half time? The three programs use our own client, so
that they differ in nothing but the way they go about it. Each measurement is a process of its own.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "client"))

from instant import MODEL  # noqa: E402
from measure import memory  # noqa: E402

KEY = "benchmark"
EMBEDDED = "universal-sentence-encoder-multilingual-3"
PORT = 8430
MANY, FEW = 200_000, 20_000
ROUNDS = 3
BLOCK = 1_000
"""Texts that the loop with LangChain hands over at a time."""


def corpus(path: Path, rows: int) -> Path:
    """JSON Lines of short, different texts."""
    with path.open("w") as file:
        for number in range(rows):
            text = f"A short text about number {number}, of some twenty words or a little less."
            file.write(json.dumps({"id": number, "text": text}) + "\n")
    return path


def texts_of(path: Path) -> list[str]:
    """All at once, as one does."""
    with path.open() as file:
        return [json.loads(line)["text"] for line in file]


def client(**more: Any) -> dict[str, Any]:
    """Arguments of every client here."""
    return {"backend": "http", "base_url": f"http://127.0.0.1:{PORT}", "api_key": KEY, **more}


# --- the programs that are compared


def bulk(path: Path, out: Path, model: str) -> int:
    """`kalm embed`."""
    from kalm_integrations import KalmClient
    from kalm_integrations.bulk import embed_corpus

    with KalmClient(**client(model=model)) as embedding:
        return sum(shard.rows for shard in embed_corpus(path, out, embedding).shards)


def alone(path: Path, out: Path, model: str) -> int:
    """What the service does: every vector is fetched, looked at, and dropped."""
    from kalm_integrations import KalmClient

    with KalmClient(**client(model=model)) as embedding:
        return sum(len(part) for part in embedding.iter_embed(texts_of(path)))


def langchain_loop(path: Path, out: Path, model: str) -> int:
    """A loop over `embed_documents`, and a file at its end."""
    import numpy as np

    from kalm_integrations.langchain import KalmModalEmbeddings

    embeddings = KalmModalEmbeddings(**client(model=model))
    texts, vectors = texts_of(path), []
    for start in range(0, len(texts), BLOCK):
        vectors += embeddings.embed_documents(texts[start : start + BLOCK])
    np.save(out / "vectors.npy", np.array(vectors, dtype=np.float16))
    return len(vectors)


def llama_index_pipeline(path: Path, out: Path, model: str) -> int:
    """An `IngestionPipeline`, and a file at its end."""
    import numpy as np
    from llama_index.core.ingestion import IngestionPipeline
    from llama_index.core.schema import TextNode

    from kalm_integrations.llama_index import KalmModalEmbeddings

    pipeline = IngestionPipeline(transformations=[KalmModalEmbeddings(**client(model=model))])
    nodes = pipeline.run(nodes=[TextNode(text=text) for text in texts_of(path)])
    np.save(out / "vectors.npy", np.array([n.embedding for n in nodes], dtype=np.float16))
    return len(nodes)


PROGRAMS: dict[str, Callable[[Path, Path, str], int]] = {
    "kalm embed": bulk,
    "service alone": alone,
    "LangChain, loop of embed_documents": langchain_loop,
    "LlamaIndex, IngestionPipeline": llama_index_pipeline,
}


# --- measuring


@contextmanager
def serving(*command: Any) -> Iterator[None]:
    """A server, once it says that it is ready, or answers."""
    import urllib.error
    import urllib.request

    environment = {**os.environ, "KALM_API_KEY": KEY}
    nowhere = subprocess.DEVNULL
    server = subprocess.Popen(
        list(map(str, command)), env=environment, stdout=nowhere, stderr=nowhere
    )
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.2)
        yield
    finally:
        server.terminate()
        server.wait()


def started(program: str, path: Path, out: Path, model: str) -> subprocess.Popen[str]:
    """A process that measures itself."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, __file__, program, str(path), str(out), model]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def measured(program: str, path: Path, folder: Path, model: str) -> dict[str, float]:
    """Seconds, and MB that the process grew by."""
    out = folder / "out"
    with started(program, path, out, model) as process:
        said = process.communicate()[0]
    assert process.returncode == 0
    shutil.rmtree(out)
    return dict(json.loads(said.splitlines()[-1]))


def left_after_kill(program: str, path: Path, folder: Path, model: str, after: float) -> int:
    """Rows whose vectors are on the disk, `after` seconds from the start of the work."""
    out = folder / "killed"
    with started(program, path, out, model) as process:
        assert process.stdout
        process.stdout.readline()
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
    manifest = out / "manifest.json"
    rows = json.loads(manifest.read_bytes())["rows"] if manifest.exists() else 0
    shutil.rmtree(out)
    return int(rows)


def work(program: str, path: Path, out: Path, model: str) -> None:
    """In a process of its own: do it, and print what it took."""
    import kalm_integrations.bulk.job
    import kalm_integrations.langchain
    import kalm_integrations.llama_index  # noqa: F401

    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    print("begins", flush=True)
    start = time.perf_counter()
    rows = PROGRAMS[program](path, out, model)
    taken = time.perf_counter() - start
    print(json.dumps({"rows": rows, "wall": taken, "mb": memory("VmHWM") - before}))


def main() -> None:
    """Measure, and print the report."""
    if len(sys.argv) > 1:
        program, path, out, model = sys.argv[1:]
        work(program, Path(path), Path(out), model)
        return
    kalm = [sys.executable, "-m", "kalm_integrations.cli"]
    instant = [sys.executable, HERE.parent / "client" / "http_endpoint.py", "serve", "--port", PORT]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        few, many = corpus(folder / "few.jsonl", FEW), corpus(folder / "many.jsonl", MANY)
        rates: dict[str, list[float]] = {"kalm embed": [], "service alone": []}
        with serving(*kalm, "serve", "--port", PORT):
            for _ in range(ROUNDS):
                for program, seen in rates.items():
                    seen.append(FEW / measured(program, few, folder, EMBEDDED)["wall"])
        job, service = (statistics.median(seen) for seen in rates.values())
        print(f"The embedded engine behind `kalm serve`, {FEW:,} texts: `kalm embed` {job:,.0f}")
        print(f"rows/s, the service alone {service:,.0f}: {job / service:.1%} of it.\n")
        with serving(*instant):
            small = measured("kalm embed", few, folder, MODEL)["mb"]
            print(f"{MANY:,} rows of 3,840 dimensions, from an engine that costs nothing:\n")
            print("| program | wall, s | MB | rows left after `kill -9` at half time |")
            print("|---|---|---|---|")
            for program in PROGRAMS:
                if program == "service alone":
                    continue
                taken = measured(program, many, folder, MODEL)
                left = left_after_kill(program, many, folder, MODEL, taken["wall"] / 2)
                print(f"| {program} | {taken['wall']:.0f} | {taken['mb']:,.0f} | {left:,} |")
                if program == "kalm embed":
                    large = taken["mb"]
        print(f"\nPeak memory of `kalm embed`: {small:,.0f} MB for {FEW:,} rows, ", end="")
        print(f"{large:,.0f} MB for {MANY:,}.")
    packages = ("kalm-integrations", "pyarrow", "numpy", "langchain-core", "llama-index-core")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    machine = f"Python {platform.python_version()}, {platform.machine()} {platform.system()}"
    print(f"\nMedian of {ROUNDS} interleaved rounds (the first figure); {machine}, ", end="")
    print(f"{os.cpu_count()} cores; {versions}.")


if __name__ == "__main__":
    main()
