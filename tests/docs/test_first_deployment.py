"""docs/first-deployment.md: its commands run as they stand, against the emulated cloud, and show
what the page says; its prices follow from the settings."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from modal_emulator import Emulator

from kalm_integrations.bulk.on_modal import worker_pool
from kalm_integrations.models import EMBEDDED
from modal_backend import gpus
from modal_backend.settings import DeploySettings

PAGE = (Path(__file__).parents[2] / "docs" / "first-deployment.md").read_text()
BLOCKS = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
SERVICE = "kalm-try/VLLMEmbeddingSnapshot"
CLASS = "VLLMEmbeddingSnapshot"


def steps() -> Iterator[tuple[str, str]]:
    """Each command of the page, in order, with the output that is shown below it."""
    for block in BLOCKS:
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = step.partition("\n")
            yield command, output


def pattern(output: str) -> re.Pattern[str]:
    """ "…" on a line of its own stands for any lines, elsewhere for any part of a line."""
    lines = [
        r"(?:.*\n)*?" if line == "…" else re.escape(line).replace("…", ".*?") + r" *\n"
        for line in output.splitlines()
    ]
    return re.compile("".join(lines))


def test_every_command_shows_what_the_page_says(tmp_path: Path) -> None:
    """Commands share a folder and exported variables, as in one terminal."""
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("KALM", "MODAL"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{outside['PATH']}"
    with Emulator() as cloud:
        variables = outside | cloud.client_env | {"PATH": path, "COLUMNS": "100"}
        for command, expected in steps():
            name, *arguments = shlex.split(command)
            if name == "export":
                variables |= dict(argument.split("=", 1) for argument in arguments)
            elif name == "unset":
                for argument in arguments:
                    del variables[argument]
            elif name == "sleep":  # longer than a container waits
                assert int(arguments[0]) > DeploySettings().scaledown_window
                cloud.kill(SERVICE)
            else:
                done = subprocess.run(
                    ["bash", "-c", command],
                    cwd=tmp_path,
                    env=variables,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    check=False,
                    timeout=120,
                )
                assert pattern(expected).fullmatch(done.stdout), f"{command}\n{done.stdout}"
                assert (done.returncode == 0) == ("✗" not in expected), command
        assert cloud.starts(SERVICE) == 2
        assert not cloud.running(SERVICE)  # the rehearsal leaves nothing behind
        assert not cloud.starts(f"vllm-embedding-snapshot/{CLASS}")
        assert not cloud.unimplemented


def test_the_comparison_sees_another_output() -> None:
    assert pattern("…\na … c\n…\n").fullmatch("x\ny\na b c\nz\n")
    assert not pattern("…\na … c\n").fullmatch("x\na b d\n")
    assert not pattern("a\n").fullmatch("a\nb\n")


def test_names_and_identities_are_the_codes() -> None:
    assert EMBEDDED.space.fingerprint in PAGE
    assert DeploySettings().app_name in PAGE


def test_the_prices() -> None:
    """Generous times: steps 2 to 4 take 15 minutes, the download 20, and KaLM loads five times."""
    window = DeploySettings().scaledown_window
    kalm = 5 * (600 + window) + 2 * (70 + window) + 600 + 300 + worker_pool.SCALEDOWN_WINDOW
    paid = (
        900 * DeploySettings(engine="embedded").dollars_per_hour / 3600
        + 1200 * gpus.machine_dollars(4, 16)
        + kalm * DeploySettings().dollars_per_hour / 3600
    )
    assert f"costs about ${paid:.0f}," in PAGE
    kept = DeploySettings(min_containers=1)
    assert f"costs ${24 * kept.dollars_per_hour:.2f} a day" in " ".join(PAGE.split())
