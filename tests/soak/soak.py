"""Real clients and a real `kalm serve` with a fault-injecting proxy between them, for minutes.

`make soak` runs ten minutes, `SECONDS=60 make soak` one. It prints a report, and fails if a vector
was wrong, a call ended late, an exception was not ours, or something was left behind.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import psutil
from chaos_proxy import ChaosProxy

from kalm_integrations import KalmClient, KalmModalEmbeddings, errors
from kalm_integrations import llama_index as ours_for_llama_index
from kalm_integrations.event_loop import background_loop
from kalm_integrations.models import EMBEDDED

KEY = "soak"
TEXTS = [f"Text {n}: {word} and {n * n}" for n in range(40) for word in ("sun", "rain", "snow")]
TIMEOUT = 6.0
LATE, PAUSE = 3.0, 0.5  # seconds after the deadline, on a busy machine; after a failure
CLIENT = {"timeout": TIMEOUT, "max_retries": 3, "batch_size": 3, "max_concurrency": 4}


class Report:
    """What happened to all calls; threads share it."""

    def __init__(self) -> None:
        with KalmClient(backend="local") as client:
            self.right = dict(zip(TEXTS, client.embed(TEXTS).vectors, strict=True))
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.wrong = self.late = 0
        self.foreign: list[str] = []
        self._lock = threading.Lock()

    def check(self, texts: Sequence[str], rows: Any) -> None:
        """Count rows that are not the vectors of their texts; other batches round differently."""
        right = np.array([self.right[text] for text in texts])
        rows = np.asarray(rows, dtype=np.float32)
        wrong = len(right)
        if rows.shape == right.shape:
            wrong = int((np.abs(rows - right).max(axis=1) > 2e-3).sum())
        with self._lock:
            self.wrong += wrong

    def ended(
        self, how: str, start: float, error: BaseException | None, texts: Sequence[str]
    ) -> None:
        """Count a call."""
        late = time.monotonic() - start > TIMEOUT + LATE
        with self._lock:
            self.late += late
            self.outcomes[how, type(error).__name__ if error else "answered"] += 1
            if error and not isinstance(error, errors.KalmError):
                self.foreign.append(f"{how}: {error!r}")
        partial = getattr(error, "partial", None)
        if partial is not None and len(partial):
            self.check([texts[index] for index in partial.indices], partial.vectors)


Ask = Callable[[list[str]], Any]


def in_thread(report: Report, how: str, ask: Ask, end: float) -> None:
    """Call until the end; `ask` returns rows."""
    while (start := time.monotonic()) < end:
        texts, error = random.sample(TEXTS, 1 if "query" in how else 7), None
        try:
            report.check(texts, ask(texts))
        except Exception as caught:
            error = caught
        report.ended(how, start, error, texts)
        time.sleep(PAUSE if error else 0)


async def in_loop(report: Report, how: str, ask: Ask, end: float) -> None:
    """The same, and sometimes leave."""
    while (start := time.monotonic()) < end:
        texts, error = random.sample(TEXTS, 1 if "query" in how else 7), None
        patience = random.choice([None, None, None, 0.2])
        try:
            async with asyncio.timeout(patience) as limit:
                report.check(texts, await ask(texts))
        except Exception as caught:
            error = None if patience and limit.expired() else caught
        report.ended(f"{how}, left" if patience else how, start, error, texts)
        await asyncio.sleep(PAUSE if error else 0)


def rows_of(client: KalmClient) -> Ask:
    """`iter_embed` as rows in the order of the texts."""

    def ask(texts: list[str]) -> Any:
        rows = [row for part in client.iter_embed(texts) for row in part]
        return [vector for _, vector in sorted(rows, key=lambda row: row[0])]

    return ask


class Server:
    """`kalm serve` on one port, killed and started again."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.kills = 0
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kalm_integrations.cli", "serve", "--port", str(self.port)],
            env=os.environ | {"KALM_API_KEY": KEY},
            stderr=subprocess.DEVNULL,
        )

    def kill(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        self._process.wait()
        self.kills += 1

    def keep_killing(self, end: float) -> None:
        while (left := end - time.monotonic()) > 20:
            time.sleep(random.uniform(8, min(40, left - 10)))
            self.kill(random.choice([signal.SIGKILL, signal.SIGTERM]))
            time.sleep(random.uniform(0, 4))
            self.start()


SERVED: dict[str, Any] = {"api_key": KEY, "model": EMBEDDED.space.model}


def soak(seconds: float, share: float = 0.25) -> tuple[Report, ChaosProxy, Server, list[str]]:
    """Run, and return what happened and what is left behind."""
    random.seed(1)
    report, server, threads = Report(), Server(), []
    before = set(threading.enumerate())
    with ChaosProxy(f"http://127.0.0.1:{server.port}", share) as proxy:
        end = time.monotonic() + seconds
        options: Any = {"base_url": proxy.url, **SERVED, **CLIENT}
        client = KalmClient(**options)
        chain = KalmModalEmbeddings(**options)
        index: Any = ours_for_llama_index.KalmModalEmbeddings(**options)
        asks: dict[str, Ask] = {
            "embed": lambda texts: client.embed(texts).vectors,
            "embed, query": lambda texts: client.embed(texts, role="query").vectors,
            "iter_embed": rows_of(client),
            "LangChain": chain.embed_documents,
            "LangChain, query": lambda texts: [chain.embed_query(texts[0])],
            "LlamaIndex": index.get_text_embedding_batch,
            "LlamaIndex, query": lambda texts: [index.get_query_embedding(texts[0])],
        }
        for how, ask in asks.items():
            threads.append(threading.Thread(target=in_thread, args=(report, how, ask, end)))
        threads.append(threading.Thread(target=server.keep_killing, args=(end,)))
        for thread in threads:
            thread.start()

        async def loop() -> None:
            lists = partial(client.aembed_to_lists, role="document")
            await asyncio.gather(
                *(in_loop(report, "aembed", lists, end) for _ in range(3)),
                in_loop(report, "LangChain, async", chain.aembed_documents, end),
                in_loop(report, "LlamaIndex, async", index.aget_text_embedding_batch, end),
            )

        asyncio.run(loop())
        for thread in threads:
            thread.join()
        for each in (client, chain.client, index.client):
            each.close()
        time.sleep(1)
        left = left_behind(int(proxy.url.rpartition(":")[2]), before | {proxy._thread})
    server.kill(signal.SIGTERM)
    return report, proxy, server, left


def left_behind(port: int, known: set[threading.Thread]) -> list[str]:
    """Connections to the proxy, tasks of the background loop, threads."""
    gc.collect()
    left = [
        f"connection {each.laddr}"
        for each in psutil.Process().net_connections("tcp")
        if each.raddr and each.raddr.port == port and each.status == "ESTABLISHED"
    ]
    left += [f"task {task!r}" for task in asyncio.all_tasks(background_loop().loop)]
    left += [f"thread {each.name}" for each in set(threading.enumerate()) - known]
    return [each for each in left if "kalm-io" not in each]


def listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in sorted(counts.items(), key=lambda it: -it[1]))


def main() -> int:
    """Print the report; 1 if a guarantee was broken."""
    report, proxy, server, left = soak(float(sys.argv[1]))
    print("| entry point | calls | answered | errors |\n|---|---|---|---|")
    for how in sorted({how for how, _ in report.outcomes}):
        of_it = {end: n for (way, end), n in report.outcomes.most_common() if way == how}
        calls, answered = sum(of_it.values()), of_it.pop("answered", 0)
        print(f"| {how} | {calls:,} | {answered:,} | {listed(of_it)} |")
    print("\n| in all | |\n|---|---|")
    print(f"| calls | {report.outcomes.total():,} |")
    print(f"| requests | {proxy.requests:,} |")
    print(f"| faults of the network | {proxy.faults.total():,}: {listed(proxy.faults)} |")
    print(f"| kills of the service | {server.kills} |")
    print(f"| wrong vectors | {report.wrong} |")
    print(f"| late calls | {report.late} |")
    print(f"| errors of other classes | {len(report.foreign)} |")
    print(f"| connections, tasks and threads left behind | {len(left)} |\n")
    print(*report.foreign[:10], *left[:10], sep="\n")
    answered = sum(n for (_, end), n in report.outcomes.items() if end == "answered")
    broken = report.wrong or report.late or report.foreign or left
    return 1 if broken or answered < report.outcomes.total() / 5 else 0


if __name__ == "__main__":
    sys.exit(main())
