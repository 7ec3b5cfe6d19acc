"""What the README shows besides its commands and blocks, which other modules here run.

The three places that vectors come from are tried with both frameworks' blocks, each in an
interpreter of its own: in process, from `kalm serve`, and over Modal's RPC, whose cloud is an
emulator.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from modal_emulator import Emulator

from kalm_integrations.models import EMBEDDED

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
KALM = Path(sys.executable).parent / "kalm"
LOCAL = 'KalmModalEmbeddings(backend="local")'
WAYS = re.findall(r"^\| [^|`]+ \| `(KalmModalEmbeddings\([^`]*\))` \|", README, re.MULTILINE)
BLOCKS = [
    block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if LOCAL in block
]
SHOWN = ("Bread rises because yeast gives off gas.\n", "K2 is 8,611 metres high.\n")


def outside(**variables: str) -> dict[str, str]:
    theirs = {name: at for name, at in os.environ.items() if not name.startswith(("KALM", "MODAL"))}
    return theirs | variables


@pytest.fixture(scope="module")
def cloud() -> Iterator[Emulator]:
    with Emulator() as cloud:
        yield cloud


@pytest.fixture(scope="module")
def services(cloud: Emulator) -> Iterator[dict[str, dict[str, str]]]:
    """The variables that go with each way; an address takes the place of the README's."""
    deploy = [KALM, "deploy", "--engine", "embedded"]
    subprocess.run(deploy, check=True, capture_output=True, env=outside(**cloud.client_env))
    key, model = {"KALM_API_KEY": "correct-horse"}, {"KALM_MODEL": EMBEDDED.space.model}
    with subprocess.Popen(
        [KALM, "serve", "--port", "0"], env=outside(**key), stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        ready = next(line for line in server.stderr if "kalm serve: ready: " in line)
        url = ready.split(" on ")[-1].strip()
        yield {
            LOCAL: {},
            'KalmModalEmbeddings(backend="modal")': model | cloud.client_env,
            f'KalmModalEmbeddings(base_url="{url}")': model | key,
        }
        server.terminate()


def test_three_ways_and_two_frameworks_in_five_lines_each() -> None:
    assert (len(WAYS), len(BLOCKS)) == (3, 2)
    assert WAYS[0] == LOCAL
    assert all(len([line for line in block.splitlines() if line]) == 5 for block in BLOCKS)


@pytest.mark.parametrize(
    ("way", "block"),
    [(0, 0), (1, 0), (2, 0), (1, 1)],  # both adapters have one client, which has the ways
    ids=["local", "modal", "http", "llama_index"],
)
def test_each_way_works(services: dict[str, dict[str, str]], way: int, block: int) -> None:
    line, variables = list(services.items())[way]
    port = r"127\.0\.0\.1:\d+"
    assert re.sub(port, "", line) == re.sub(port, "", WAYS[way])
    code = BLOCKS[block].replace(LOCAL, line)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env=outside(**variables),
    )
    # How long a container takes to start is this machine's matter; all else is a complaint.
    said = [line for line in done.stderr.splitlines() if "may be starting" not in line]
    assert (done.stdout, said) == (SHOWN[block], [])


def test_what_kalm_deploy_shows() -> None:
    """As it is, but for addresses and the time it took."""
    with Emulator() as untouched:
        variables = outside(COLUMNS="100", **untouched.client_env)
        done = subprocess.run(
            [KALM, "deploy"], check=True, capture_output=True, text=True, env=variables
        )
    screen = re.sub(r"https?://\S+", "https://…", done.stdout)
    screen = re.sub(r"deployed in [\d.]+s!", "deployed in … s!", screen)
    shown = re.search(r"```text\n(What vllm-embedding-snapshot.*?)\n```", README, re.DOTALL)
    assert shown is not None
    assert shown[1].splitlines() == [line.rstrip() for line in screen.strip().splitlines()]


def test_messages_are_those_of_the_page_that_it_points_to() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    rows = re.findall(
        r"^\| `(.+?)` \| .* \| \[.+\]\(docs/troubleshooting\.md#(.+)\) \|$", README, re.M
    )
    assert len(rows) >= 8
    for message, anchor in rows:
        (section,) = (
            part
            for part in re.split(r"^### ", page, flags=re.MULTILINE)[1:]
            if re.sub(r"[^\w\- ]", "", part.splitlines()[0].lower()).replace(" ", "-") == anchor
        )
        quotes = re.findall(r"^> `(.+)`$", section, re.MULTILINE)
        assert any(message in quote for quote in quotes), message


def test_figures_are_those_of_the_pages() -> None:
    performance = (ROOT / "docs/performance.md").read_text()
    differences = (ROOT / "docs/differences.md").read_text()
    ((bf16, fp8),) = re.findall(r"\| (\d+) ms in bf16, (\d+) in fp8, for 2 to 3 %", README)
    assert f"| {bf16} bf16, {fp8} fp8, for 2 to 3 % of the throughput |" in performance
    assert f"a query during a bulk job has a p99 of {bf16} ms" in differences
    assert f"p99 225 ms | {bf16} ms" in README
    assert "p99 225 ms" in differences
    assert "**2.1 s in bf16**, **1.2 s in fp8**" in performance
    assert "restore, wake and canary take 2.1 s in bf16 and 1.2 s in fp8" in README
