"""Every example runs as a newcomer runs it, and finds what it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import serving

from kalm_integrations.models import EMBEDDED

EXAMPLES = Path(__file__).parents[2] / "examples"
DIMENSIONS = EMBEDDED.dimensions[0]

# What each prints, in this order, when it is run without arguments.
SHOWN = {
    "caching.py": (
        r"First run, with 0 vectors on disk\n    4 requests, \d{2,3} tokens\n"
        r"(    How do I bake bread\? +For a loaf of bread.*\n"
        r"    apple tart +Coupez les pommes.*\n    guacamole +Machaca el aguacate.*\n)"
        r"Second run: all from the disk\n    0 requests, 0 tokens\n\1"
        r"Another query instruction.*\n    3 requests, \d{2} tokens\n"
    ),
    "langchain_rag.py": (
        r"6 sections in the collection handbook-[0-9a-f]{16}\n(.*\n)*"
        r"Can I pay by credit card\?\n    found: Pago, (.*\n)*"
        r"A che ora si cena\?\n    found: Repas, (.*\n)*"
        r"Mag mijn hond in de slaapkamer\?\n    found: Hunde, (.*\n)*"
        r"寝袋は必要ですか\?\n    found: Schlafen, (.*\n)*"
        r"No CHAT_MODEL is set.*\n\nSystem: Answer .*\n"
        r"Human: \[Pago\] Solo aceptamos efectivo.*\n(.*\n)*"
        r"\nQuestion: Can I pay by credit card\?\n"
    ),
    "llama_index_rag.py": (
        r"First run: (\d+) of \1 files embedded, [\d,]{5,} tokens\n"
        r"Second run: 0 of \1 files embedded, 0 tokens\n\n"
        r"What happens to an empty string\?\n(    0\.\d{3}  [\w-]+\.md: .+\n){3}(.*\n)*"
        r"Context information is below.*\n(.*\n)*Query: What happens to an empty string\?\n"
    ),
    "numpy_search.py": (
        rf"Wrote 9 vectors to .+rights\.npz\nRead 9 float16 vectors of {DIMENSIONS} dimensions\n\n"
        r"May I leave my country\? +article 13 .*\nholidays and leisure +article 24 .*\n"
        r"Is torture allowed\? +article 5 .*\n\n"
        r"Refused, as it should be: these vectors .* document_template: 'Instruct: .*\n(.*\n)?"
    ),
    "openai_client.py": (
        r"KALM_BASE_URL is not set: starting `kalm serve --port \d+`.*\n\n"
        rf"{EMBEDDED.space.model}, {DIMENSIONS} dimensions, \d\d tokens\n"
        rf"Space of these vectors: {EMBEDDED.space.fingerprint};.*\n\n"
        r"Which mountain is the tallest\?\n    0\.\d{3}  Die Zugspitze.*\n(    .*\n){2}\n"
        r"A text that cannot be embedded is named: invalid_input, .*'index': 1.*\n"
    ),
    "task_prompts.py": (
        r"Task +Index .*\n(.*\n)*\nDie App stürzt beim Start ab\.\n"
        r"(    .*fits the index: True\): 0\.\d{3}  If the app crashes.*\n){2}"
    ),
}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Runs an example in an empty folder; gives what it prints."""
    theirs = ("CHAT_MODEL", "OPENAI_")
    outside = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}

    def run(name: str, *arguments: str | Path, status: int = 0, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", EXAMPLES / name, *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=outside | {"PYTHONIOENCODING": "utf-8"} | environment,
        )
        # A server that an example starts logs there.
        errors = re.sub(r"(INFO: |kalm serve: ready: ).*\n", "", done.stderr)
        assert done.returncode == status, errors
        assert not (status == 0 and errors)
        return done.stdout + errors

    return run


def test_every_example_is_run_and_listed() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == SHOWN.keys()
    listed = re.findall(
        r"^\| \[(.+)\]\(\1\) \| .+ \| `python examples/\1` \|$",
        (EXAMPLES / "README.md").read_text(),
        re.MULTILINE,
    )
    assert sorted(listed) == sorted(scripts)


@pytest.mark.parametrize("name", SHOWN)
def test_as_a_newcomer_runs_it(name: str, run: Callable[..., str]) -> None:
    shown = run(name)
    assert re.fullmatch(f"(?:{SHOWN[name]})(.*\n)*", shown), shown


@pytest.mark.parametrize("name", SHOWN)
def test_it_says_which_model_it_runs_and_what_to_write_instead(name: str) -> None:
    source = (EXAMPLES / name).read_text()
    if name == "openai_client.py":
        assert "with a small model" in source
    else:
        assert "# A small model in this process, to learn with" in source
        assert 'backend="local"' in source
        assert re.search(r'In production, the service that you run:\n +# \w+\(base_url="', source)


def test_langchain_answers_with_a_chat_model(
    run: Callable[..., str], chat_model: dict[str, str]
) -> None:
    shown = run("langchain_rag.py", **chat_model)
    assert len(re.findall(r"an answer to '", shown)) == 4
    assert "\nA che ora si cena?\n    an answer to 'A che ora si cena?'\n" in shown


def test_llama_index_reads_a_folder_of_yours(run: Callable[..., str], tmp_path: Path) -> None:
    for name, text in {
        "bins.md": "# Bins\n\nThe bins are emptied on Tuesdays.\n",
        "keys.md": "# Keys\n\nAnna, who lives next door, has the spare key.\n",
        "wifi.md": "# Wifi\n\nThe router is under the stairs.\n",
        "empty.md": "\n",
    }.items():
        (tmp_path / name).write_text(text)
    shown = run("llama_index_rag.py", tmp_path, "Who can open the door?", "Wann kommt der Müll?")
    assert "First run: 3 of 3 files" in shown
    assert re.search(r"Who can open the door\?\n    0\.\d{3}  keys\.md: # Keys Anna", shown)
    assert re.search(r"Wann kommt der Müll\?\n    0\.\d{3}  bins\.md: # Bins The bins", shown)


def test_the_openai_client_goes_to_a_service_of_yours(run: Callable[..., str]) -> None:
    from pydantic import SecretStr

    from modal_backend.engines.embedded import EmbeddedEngine
    from modal_backend.http.app import create_app
    from modal_backend.http.auth import BearerKeys
    from modal_backend.service import EmbeddingService

    service = EmbeddingService(EmbeddedEngine.load())
    with serving(create_app(service, keys=BearerKeys([SecretStr("correct-horse")]))) as url:
        shown = run("openai_client.py", KALM_BASE_URL=f"{url}/v1/", KALM_API_KEY="correct-horse")
    assert "starting" not in shown
    assert re.search(r"tallest\?\n    0\.\d{3}  Die Zugspitze", shown)
