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
PAGE = (ROOT / "docs/arguments.md").read_text()
WAYS = re.findall(r"^\| [^|`]+ \| `(KalmModalEmbeddings\([^`]*\))` \|", PAGE, re.MULTILINE)
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
    """The variables that go with each way; an address takes the place of the page's."""
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


def test_the_commands_that_deploy() -> None:
    section = README.split("## Deploy KaLM\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    install, download, deploy = (line.partition("  #")[0].strip() for line in block.splitlines())
    assert install == "pip install '.[modal]' && modal setup"  # test_distributions.py installs it
    with Emulator() as untouched:
        command = [KALM.parent / deploy.split()[0], *deploy.split()[1:]]
        variables = outside(**untouched.client_env)
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=variables)
        *_, function = download.split("::")
        assert download == f"modal run -m modal_backend.app::{function}"
        assert untouched.function(f"vllm-embedding-snapshot/{function}").definition
    # It shows the cost before anything else, and the code at the end.
    assert done.stdout.index("one container, an hour") < done.stdout.index("App deployed")
    assert done.stdout.index("App deployed") < done.stdout.index("KalmClient(backend='modal')")


def test_figures_are_those_of_the_pages() -> None:
    performance = (ROOT / "docs/performance.md").read_text()
    differences = (ROOT / "docs/differences.md").read_text()
    ((peer, ours),) = re.findall(r"p99 (\d+) ms \| p99 (\d+) ms, for 2 to 3 %", README)
    assert f"p99 {peer} ms" in differences
    assert f"p99 {ours} ms, for" in differences
    assert re.search(rf"\| {ours} bf16, .* for 2 to 3 % of the throughput \|", performance)
    assert "**2.1 s in bf16**, **1.2 s in fp8**" in performance
    assert "measure only the last 2.1 s" in README
    assert "27,100 to 28,000 bf16" in performance
    assert "`--gpu H100`, at 28,000 tokens/s (measured)" in README
