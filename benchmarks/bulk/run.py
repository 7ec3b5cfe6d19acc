"""`kalm embed`: speed, memory, planning and `kill -9`, beside an earlier version and other ways.

    python benchmarks/bulk/run.py [--before CHECKOUT]     # 25 minutes; Markdown on stdout
    python benchmarks/bulk/run.py --only killed           # or throughput, wide, memory, planning
    python benchmarks/bulk/run.py --small                 # does it run? Its figures mean nothing

1. Share of the service's own throughput, with the embedded engine behind `kalm serve`.
2. Peak memory for a million short rows.
3. 200,000 rows of KaLM's width from an engine that costs nothing: time, memory, and rows left after
   `kill -9` at half time; beside a loop over `embed_documents` and LlamaIndex's pipeline.
4. Planning: MB of input for each second of one core.
5. 30 times `kill -9` at random moments: are all files those of an undisturbed run?

Each measurement is a process of its own. `--before` names a checkout of an earlier commit, whose
`kalm embed` is measured in the same rounds.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
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
SMALL = "--small" in sys.argv
MANY, FEW, MILLION = (2_000, 500, 5_000) if SMALL else (200_000, 20_000, 1_000_000)
ROUNDS, KILLS, PLANNED = (1, 3, 2_000) if SMALL else (3, 30, 100_000)
ONLY = sys.argv[sys.argv.index("--only") + 1] if "--only" in sys.argv else ""
BEFORE = sys.argv[sys.argv.index("--before") + 1] if "--before" in sys.argv else ""
VERSIONS = {"before": BEFORE, "now": ""} if BEFORE else {"now": ""}
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


class NarrowTransport:
    """An engine in this process that costs nothing, with 64 dimensions."""

    can_be_cold = False

    async def embed(self, request: Any) -> Any:
        """One vector for all texts."""
        import numpy as np

        from kalm_integrations.protocol import EmbedResponse
        from kalm_integrations.result import Usage

        vectors = np.zeros((len(request.texts), 64), dtype=request.dtype)
        vectors[:, 0] = 1
        return EmbedResponse(vectors=vectors, identity=None, usage=Usage(requests=1))

    async def ensure_ready(self) -> None:
        """It is."""

    async def close(self) -> None:
        """Nothing to close."""


def narrow(path: Path, out: Path, model: str) -> int:
    """`kalm embed` with few dimensions, for many rows."""
    from kalm_integrations import KalmClient
    from kalm_integrations.bulk import embed_corpus

    with KalmClient(transport=NarrowTransport(), model=model) as embedding:
        return sum(shard.rows for shard in embed_corpus(path, out, embedding).shards)


def planning(path: Path, out: Path, model: str) -> int:
    """The first pass alone."""
    from kalm_integrations import KalmClient
    from kalm_integrations.bulk import estimate

    return int(estimate(path, KalmClient(**client(model=model))).rows)


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
    "narrow": narrow,
    "planning": planning,
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


def started(
    program: str, path: Path, out: Path, model: str, checkout: str = ""
) -> subprocess.Popen[str]:
    """A process that measures itself, with the code of `checkout`."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--work", program, str(path), str(out), model]
    environment = {**os.environ, "PYTHONPATH": checkout}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def measured(
    program: str, path: Path, folder: Path, model: str, checkout: str = ""
) -> dict[str, float]:
    """Seconds, seconds of the processor, and MB that the process grew by."""
    out = folder / "out"
    with started(program, path, out, model, checkout) as process:
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
    start, cpu = time.perf_counter(), time.process_time()
    rows = PROGRAMS[program](path, out, model)
    taken, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps({"rows": rows, "wall": taken, "cpu": cpu, "mb": memory("VmHWM") - before}))


def throughput(folder: Path, few: Path, server: list[Any]) -> None:
    """The first table."""
    programs = [(name, "kalm embed", checkout) for name, checkout in VERSIONS.items()]
    programs.append(("the service alone", "service alone", ""))
    rates: dict[str, list[float]] = {name: [] for name, _, _ in programs}
    with serving(*server):
        for _ in range(ROUNDS):
            for name, program, checkout in programs:
                took = measured(program, few, folder, EMBEDDED, checkout)
                rates[name].append(FEW / took["wall"])
    medians = {name: statistics.median(seen) for name, seen in rates.items()}
    print(f"The embedded engine behind `kalm serve`, {FEW:,} texts:\n")
    print("| `kalm embed` | rows/s | of the service's own |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:,.0f} | {median / medians['the service alone']:.1%} |")


def wide_rows(folder: Path, many: Path) -> None:
    """The table of 200,000 rows."""
    print(f"\n{MANY:,} rows of 3,840 dimensions, from an engine that costs nothing:\n")
    print("| program | wall, s | MB | rows left after `kill -9` at half time |\n|---|---|---|---|")
    programs = [(f"kalm embed, {name}", "kalm embed", where) for name, where in VERSIONS.items()]
    programs += [(name, name, "") for name in PROGRAMS if name.startswith(("Lang", "Llama"))]
    for name, program, checkout in programs:
        took = measured(program, many, folder, MODEL, checkout)
        left = left_after_kill(program, many, folder, MODEL, took["wall"] / 2)
        print(f"| {name} | {took['wall']:.0f} | {took['mb']:,.0f} | {left:,} |", flush=True)


def planned(folder: Path) -> None:
    """The table of planning."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = ["embedding", "of", "the", "text", "mountain", "river", "is", "deep", "vector", "and"]
    rng = random.Random(0)  # noqa: S311
    texts = [" ".join(rng.choices(words, k=180)) for _ in range(PLANNED)]
    paths = [folder / "plan.parquet", folder / "plan.jsonl"]
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), paths[0], compression="none")
    with paths[1].open("w") as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"id": number, "text": text}) + "\n")
    print("\nPlanning texts of about 1 KB, one core:\n\n| input | | MB/s |\n|---|---|---|")
    for path in paths:
        best = dict.fromkeys(VERSIONS, math.inf)
        for _ in range(ROUNDS):
            for name, checkout in VERSIONS.items():
                took = measured("planning", path, folder, MODEL, checkout)
                best[name] = min(best[name], took["cpu"])
        for name, seconds in best.items():
            print(f"| {path.suffix} | {name} | {path.stat().st_size / 1e6 / seconds:,.0f} |")


def killed(folder: Path) -> None:
    """`kill -9` at random moments, until the job is complete."""
    rng = random.Random(1)  # noqa: S311
    source = corpus(folder / "killed.jsonl", 4_000)
    command = [sys.executable, "-m", "kalm_integrations.cli", "embed", str(source)]
    command += ["--shard-rows", "100", "--backend", "local", "--output"]
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, str(folder / "undisturbed")], check=True, **nowhere)
    kills = 0
    while kills < KILLS:
        with subprocess.Popen([*command, str(folder / "disturbed")], **nowhere) as process:
            try:
                process.wait(rng.uniform(1.0, 5.0))
                if kills < KILLS:  # complete too early: another job
                    shutil.rmtree(folder / "disturbed")
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
    subprocess.run([*command, str(folder / "disturbed")], check=True, **nowhere)
    made, wanted = (
        {path.name: path.read_bytes() for path in (folder / name / "shards").iterdir()}
        for name in ("disturbed", "undisturbed")
    )
    print(f"\nAfter {kills} times `kill -9`: {'identical' if made == wanted else 'OTHER'} files.")


def main() -> None:
    """Measure, and print the report."""
    if "--work" in sys.argv:
        program, path, out, model = sys.argv[2:]
        work(program, Path(path), Path(out), model)
        return
    kalm = [sys.executable, "-m", "kalm_integrations.cli"]
    instant = [sys.executable, HERE.parent / "client" / "http_endpoint.py", "serve", "--port", PORT]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if ONLY in ("", "throughput"):
            few = corpus(folder / "few.jsonl", FEW)
            throughput(folder, few, [*kalm, "serve", "--port", PORT])
        if ONLY in ("", "wide"):
            with serving(*instant):
                wide_rows(folder, corpus(folder / "many.jsonl", MANY))
        if ONLY in ("", "memory"):
            paths = [corpus(folder / f"{rows}.jsonl", rows) for rows in (MANY, MILLION)]
            sizes = [measured("narrow", path, folder, MODEL)["mb"] for path in paths]
            print(f"\nPeak memory over the start, 64 dimensions: {sizes[0]:,.0f} MB for {MANY:,} ")
            print(f"rows, {sizes[1]:,.0f} MB for {MILLION:,}.")
        if ONLY in ("", "planning"):
            planned(folder)
        if ONLY in ("", "killed"):
            killed(folder)
    packages = ("kalm-integrations", "pyarrow", "numpy", "langchain-core", "llama-index-core")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    machine = f"Python {platform.python_version()}, {platform.machine()} {platform.system()}"
    print(f"\nMedian of {ROUNDS} interleaved rounds (the first table); {machine}, ", end="")
    print(f"{os.cpu_count()} cores; {versions}.")


if __name__ == "__main__":
    main()
