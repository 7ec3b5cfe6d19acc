"""Requests made to stall the service or to exhaust its memory, and what other callers notice.

    python benchmarks/service/hostile_bodies.py

Starts `kalm serve` with the embedded engine, sends one body after the other with the right key, and
meanwhile asks for `/health` and embeds a short text, again and again, from another process. Prints
for each body the longest time that either of them took, and how far the service's memory grew.
Takes about four minutes; Linux only. `--source FOLDER` serves another checkout, for comparison.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

KEY: Final = "benchmark"
LIMIT: Final = 2**24 - 1024
"""Bytes of the largest bodies: just within the service's limit."""
TARGET_MS, TARGET_MB = 250, 200
_PATIENCE: Final = 15.0  # seconds for one body; what takes longer is cancelled by disconnecting
_AFTER: Final = 0.3  # seconds of polling after an answer

Body = Callable[[], bytes]


def _repeated(unit: bytes, before: bytes = b'{"input":[', after: bytes = b"]}") -> Body:
    """`unit` as often as it fits, with commas in between."""

    def build() -> bytes:
        count = (LIMIT - len(before) - len(after)) // (len(unit) + 1)
        return before + b",".join([unit] * count) + after

    return build


def _long(unit: bytes, rest: bytes = b"") -> Body:
    """One text as long as it can be."""

    def build() -> bytes:
        head = b'{"input":"'
        return head + unit * ((LIMIT - len(head) - len(rest) - 2) // len(unit)) + b'"' + rest + b"}"

    return build


def _json(**fields: Any) -> Body:
    return lambda: json.dumps(fields).encode()


def _texts(unit: str, **fields: Any) -> Body:
    """2,048 texts that fill a body."""
    size = (LIMIT - 200) // 2048 - 5
    count = size // len(json.dumps(unit)[1:-1])
    return lambda: json.dumps({"input": [unit * count] * 2048, **fields}).encode()


END: Final = b',"truncate":"end"'
BODIES: Final[dict[str, Body]] = {
    "nothing": lambda: b"",
    "2 MB: an instruction in each of 2,000 texts": _json(
        input=["a"] * 2000, instruction="x" * 2_000_000 + " {text}"
    ),
    "an instruction of 16,000 in 1,000 texts": _json(
        input=["a" * 1000] * 1000, instruction="x" * 16_000 + "{text}"
    ),
    "a misspelt preset of 2 MB": _json(input="a", instruction="web_serch" * 230_000),
    "a misspelt preset of 16,000": _json(input="a", instruction="web_serch" * 1_700),
    "4 million texts": _repeated(b'"a"'),
    "3 million texts, each a backslash": _repeated(b'"\\\\"'),
    "5 million empty lists": _repeated(b"[]"),
    "5 million empty objects": _repeated(b"{}"),
    "8 million token ids": _repeated(b"1"),
    "3 million nulls": _repeated(b"null"),
    "1.2 million unknown fields": lambda: (
        b'{"input":"a",' + b",".join(b'"f%d":1' % i for i in range(1_200_000)) + b"}"
    ),
    "1 million times the same field": _repeated(b'"input":"a"', b"{", b"}"),
    "2,000 unknown fields of 8 kB": lambda: json.dumps(
        {f"{number:0>8000}": 1 for number in range(2000)}
    ).encode(),
    "nested 8 million deep": lambda: b'{"input":' + b"[" * (LIMIT // 2) + b"]" * (LIMIT // 2 - 99),
    "nested 4,000 deep, objects": lambda: b'{"input":' * 4000 + b"1" + b"}" * 4000,
    "262,144 expanding characters": _json(input="\ufdfa" * 262_144),
    "262,144 expanding characters, cut": _json(input="\ufdfa" * 262_144, truncate="end"),
    "2,048 texts of 200 expanding characters": _json(input=["\ufdfa" * 200] * 2048),
    "262,144 letters, cut": _json(input="a" * 262_144, truncate="end"),
    "262,144 spaces between two letters": _json(input="a" + " " * 262_142 + "b"),
    "8,000 tokens": _json(input="word " * 7_990),
    "16 MB: one text": _long(b"a"),
    "16 MB: one text, cut": _long(b"a", END),
    "16 MB: one text of escapes, cut": _long(b"a\\n", END),
    "16 MB: one text of quotes, cut": _long(b'\\"', END),
    "16 MB: one text of \\u, cut": _long(b"\\u00e9", END),
    "16 MB: one wide text, cut": _long(b"a" * 2**20 + "\U0001f600".encode(), END),
    "16 MB: one text with a lone surrogate": _long(b"a\\n" * 2**20 + b"\\ud800"),
    "16 MB: white space in a text": _long(b" "),
    "16 MB: a base64 of nothing": _long(b"QUJD"),
    "16 MB: 2,048 texts of ASCII": _texts("The height of K2 is 8,611 m. "),
    "16 MB: 2,048 texts of escapes": _texts("a\n"),
    "16 MB: 2,048 texts, as queries": _texts("K2 is high. ", priority="query"),
    "16 MB: 2,048 wide texts": lambda: json.dumps(
        {"input": ["a" * 8_170 + "\U0001f600"] * 2048}, ensure_ascii=False
    ).encode(),
    "16 MB: 2,048 texts with lone surrogates": _texts("a\n" * 100 + "\ud800"),
    "16 MB: 2,048 texts of white space": _texts(" "),
    "16 MB: a number": lambda: b'{"input":' + b"1" * LIMIT + b"}",
    "16 MB: a fraction": lambda: b'{"input":0.' + b"1" * LIMIT + b"}",
    "16 MB: an exponent": lambda: b'{"input":1e' + b"9" * LIMIT + b"}",
    "16 MB: white space around": lambda: b'{"input":' + b" " * LIMIT + b'"a"}',
    "16 MB: quotation marks": lambda: b'"' * LIMIT,
    "16 MB: backslashes": lambda: b"\\" * LIMIT,
    "16 MB: not UTF-8": lambda: b'{"input":"' + b"\xff" * LIMIT + b'"}',
    "1e400, NaN, Infinity": lambda: b'{"input":[1e400,NaN,Infinity]}',
    "dimensions of 4,000 digits": lambda: b'{"input":"a","dimensions":' + b"9" * 4000 + b"}",
    "a model's name of 1 MB": _json(input="a", model="m" * 2**20),
    "a user's name of 16 MB": lambda: b'{"input":"a","user":"' + b"u" * (LIMIT - 99) + b'"}',
}


@contextmanager
def serving(source: str | None) -> Iterator[tuple[int, int]]:
    """Run `kalm serve`; yields its port and its process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"KALM_API_KEY": KEY}
    if source:
        environment["PYTHONPATH"] = str(Path(source).resolve())
    command = [sys.executable, "-m", "kalm_integrations.cli", "serve", "--port", str(port)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            try:
                if ask(port, "GET", "/health")[0] == 200:
                    break
            except OSError:
                time.sleep(0.1)
        yield port, process.pid
    finally:
        process.kill()
        process.wait()


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Send one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
    try:
        headers = {"Authorization": f"Bearer {KEY}"}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def poll(port: int, pipe: Connection) -> None:
    """In a process of its own: other callers. Told to stop, sends the longest times in seconds."""
    query = json.dumps({"input": "How tall is K2?", "input_type": "query"}).encode()
    stop = threading.Event()
    longest = {"/health": 0.0, "/v1/embeddings": 0.0}

    def again_and_again(method: str, path: str, body: bytes | None) -> None:
        while not stop.is_set():
            start = time.perf_counter()
            status, _ = ask(port, method, path, body)
            seconds = time.perf_counter() - start
            # A refusal counts as no answer at all.
            longest[path] = max(longest[path], seconds if status == 200 else _PATIENCE)
            time.sleep(0.005)

    threads = [
        threading.Thread(target=again_and_again, args=args)
        for args in (("GET", "/health", None), ("POST", "/v1/embeddings", query))
    ]
    for thread in threads:
        thread.start()
    pipe.send("polling")
    pipe.recv()
    stop.set()
    for thread in threads:
        thread.join()
    pipe.send(longest)


def processes(pid: int) -> list[int]:
    """A process and its children."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


class Memory:
    """The most memory that some processes have together, in MB, while the block runs."""

    def __init__(self, pids: list[int]) -> None:
        self._files = [Path(f"/proc/{pid}/statm") for pid in pids]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.before = self.most = self._now()

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _now(self) -> float:
        pages = sum(int(file.read_text().split()[1]) for file in self._files)
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def _watch(self) -> None:
        while not self._stop.wait(0.003):
            self.most = max(self.most, self._now())


def measure(port: int, pid: int, body: bytes) -> tuple[str, float, dict[str, float], float]:
    """Send one body while others are served.

    Returns:
        Status and size of the answer, its seconds, the others' longest seconds, MB of growth.
    """
    memory = Memory(processes(pid))
    ours, theirs = multiprocessing.Pipe()
    poller = multiprocessing.get_context("spawn").Process(target=poll, args=(port, theirs))
    poller.start()
    ours.recv()
    time.sleep(_AFTER)
    start = time.perf_counter()
    with memory:
        if body:
            try:
                status, answer = ask(port, "POST", "/v1/embeddings", body)
                outcome = f"{status}, {len(answer):,} B"
            except OSError as error:
                outcome = type(error).__name__
        else:
            time.sleep(2)
            outcome = ""
    seconds = time.perf_counter() - start
    time.sleep(_AFTER)
    ours.send("stop")
    longest = ours.recv()
    poller.join()
    return outcome, seconds, longest, memory.most - memory.before


def main() -> None:
    """Print the table. Exit status 1: a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", help="a checkout to serve instead of the installed package")
    parser.add_argument("--only", default="", help="bodies whose name has this in it")
    options = parser.parse_args()
    missed = 0
    print("| body | MB | answer | s | /health, ms | query, ms | memory, MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, build in BODIES.items():
        if options.only not in name:
            continue
        body = build()
        # A service of its own for each: what one body leaves behind is no other's.
        with serving(options.source) as (port, pid):
            ask(port, "POST", "/v1/embeddings", b'{"input":"first"}')
            outcome, seconds, longest, grown = measure(port, pid, body)
        health, query = (1000 * longest[path] for path in ("/health", "/v1/embeddings"))
        missed += max(health, query) > TARGET_MS or grown > TARGET_MB
        print(
            f"| {name} | {len(body) / 2**20:.1f} | {outcome} | {seconds:.2f} | {health:.0f} "
            f"| {query:.0f} | {grown:.0f} |",
            flush=True,
        )
    print(f"\nTargets: {TARGET_MS} ms, {TARGET_MB} MB. Missed: {missed}.")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
