"""`kalm serve` as a command: what it refuses, and how it ends. What it answers over HTTP is tested
in test_http_server.py, vLLM in tests/vllm."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest

from kalm_integrations import cli
from kalm_integrations.install_hints import install_command
from kalm_integrations.models import EMBEDDED

WITHOUT_VLLM = """
import sys
sys.modules["vllm"] = None
sys.exit(__import__("kalm_integrations.cli").cli.main(sys.argv[1:]))
"""


def refused(
    capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2, key: str | None = "k"
) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if key:
            patch.setenv("KALM_API_KEY", key)
        assert cli.main(["serve", *arguments]) == status
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        ("--model", "x"), ("--revision", "x"), ("--max-model-len", "512"), ("--dtype", "bf16"),
        ("--quantization", "none"), ("--enforce-eager",),
    ],
)  # fmt: skip
def test_vllm_options_are_refused_for_the_embedded_engine(
    capsys: pytest.CaptureFixture[str], option: tuple[str, ...]
) -> None:
    message = refused(capsys, *option)
    assert message.startswith(f"kalm serve: {option[0]} is for --engine vllm, not for embedded.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "tei"), '"tei" for --engine'),
        (("--engine", "vllm", "--dtype", "int8"), '"int8" for --dtype'),
        (("--engine", "vllm", "--quantization", "awq"), '"awq" for --quantization'),
        (("--engine", "vllm", "--max-model-len", "0"), "256"),
        (("--engine", "vllm", "--max-model-len", "long"), "--max-model-len"),
        (("--port", "65536"), "65535"),
        (("--host", "no.such.host.invalid"), "--host no.such.host.invalid: "),
    ],
)
def test_wrong_arguments(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, *arguments)


def test_serving_without_a_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "open to everybody" in refused(capsys, key=None)
    assert "open to everybody" in refused(capsys, key=" \n")
    message = refused(capsys, "--insecure-no-auth", "--host", "0.0.0.0", key=None)
    assert "--insecure-no-auth is for 127.0.0.1 only, not for 0.0.0.0" in message


def test_a_key_that_is_not_ascii_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, key="schlüssel")
    assert "KALM_API_KEY" in message
    assert "schlüssel" not in message


def test_a_key_with_no_authentication_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = refused(capsys, "--insecure-no-auth", key="secret-key")
    assert "--insecure-no-auth" in message
    assert "KALM_API_KEY" in message
    assert "secret-key" not in message


@pytest.mark.parametrize("engine", ["embedded", "vllm"])
def test_a_port_in_use_is_reported_before_loading(
    capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        message = refused(capsys, "--engine", engine, "--port", str(port))
    assert message.startswith(f"kalm serve: cannot listen on 127.0.0.1:{port}: ")


@pytest.mark.slow
def test_without_vllm_the_message_names_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_VLLM, "serve", "--engine", "vllm"],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"KALM_API_KEY": "k"},
    )
    assert done.returncode == 1
    assert "vLLM is not installed" in done.stderr
    assert install_command("server,vllm") in done.stderr


WRONG_VECTORS = """
import sys
from kalm_integrations import cli
from modal_backend.engines.base import EngineOutput
from modal_backend.engines.embedded_process import ProcessEngine
embed = ProcessEngine.embed
async def reversed_rows(self, *args, **options):
    output = await embed(self, *args, **options)
    return EngineOutput(output.vectors[::-1], output.tokens)
ProcessEngine.embed = reversed_rows
sys.exit(cli.main(sys.argv[1:]))
"""


def stopped_when_ready(*arguments: str) -> tuple[int, list[str]]:
    """The exit status of a program that gets SIGTERM when it is ready, and the lines of stderr."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"KALM_API_KEY": "k"},
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("kalm serve: ready: "):
                process.terminate()
        return process.wait(10), lines


@pytest.mark.slow
@pytest.mark.parametrize("canary", [[], ["--canary", "warn"]], ids=["refuse", "warn"])
def test_an_engine_that_fails_the_canary_is_served_only_in_warn_mode(canary: list[str]) -> None:
    status, lines = stopped_when_ready("-c", WRONG_VECTORS, "serve", "--port", "0", *canary)
    printed = "".join(lines)
    assert status == (143 if canary else 1)
    assert ("ready: " in printed) == bool(canary)
    assert ("WARNING: " in printed) == bool(canary)
    assert "texts in one batch do not have the vectors that they have alone" in printed


@pytest.mark.slow
def test_it_prints_its_address_and_stops_on_a_signal() -> None:
    status, lines = stopped_when_ready(
        "-W", "error", "-m", "kalm_integrations.cli", "serve", "--port", "0"
    )
    output = "".join(lines)
    assert status == 143
    assert re.search(rf"{EMBEDDED.space.fingerprint}.* http://127\.0\.0\.1:\d+\n", output)
    assert "Traceback" not in output
