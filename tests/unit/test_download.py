"""The download of a model, from a local stand-in for Hugging Face's hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

pytestmark = pytest.mark.slow

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = save({"weight": np.zeros(500_000, np.float32)})
PROGRAM = (
    "import sys\n"
    "from modal_backend import download\n"
    "download.PROGRESS_SECONDS = 0.0\n"
    "try:\n"
    "    print(download.download('someone/model').folder)\n"
    "except Exception as error:\n"
    "    sys.exit(f'{type(error).__name__}: {error}')\n"
)


@dataclass
class Hub:
    """What the stand-in answers: files, or a status for everything or for the weights."""

    home: Path
    url: str = ""
    status: int = 200
    weights_status: int = 200

    def download(self, **variables: str) -> subprocess.CompletedProcess[str]:
        known = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "NO_PROXY": "127.0.0.1"}
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env={k: v for k, v in os.environ.items() if not k.startswith("HF_")}
            | known
            | variables,
        )


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(tmp_path / "hf")
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            status = hub.weights_status if name == "model.safetensors" else hub.status
            if "/tree/" in self.path or "/revision/" in self.path:
                listed = [{"rfilename": file} for file in files]
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
                    for file, data in files.items()
                ]
                found: object = {"id": "someone/model", "sha": COMMIT, "siblings": listed}
                content = json.dumps(tree if "/tree/" in self.path else found).encode()
            else:
                content = files.get(name, b"{}")
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) if status == 200 else 0))
            self.send_header("ETag", f'"{len(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "HEAD" or status != 200:
                return
            if name == "model.safetensors":
                self.wfile.write(content[:1_000_000])
                time.sleep(0.3)
                content = content[1_000_000:]
            self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def test_progress_is_printed_as_lines(hub: Hub) -> None:
    done = hub.download()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Downloading someone/model at main"
    assert any(" of 0.0 GB, " in line and line.endswith("MB/s") for line in lines)
    assert lines[-1].endswith(f"snapshots/{COMMIT}")
    assert "\r" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("status", "named"),
    [
        (429, ("KALM_DEPLOY_HF_SECRET=", "--hf-secret")),
        (401, ("KALM_DEPLOY_HF_SECRET=", "--hf-secret", "huggingface.co/someone/model")),
        (403, ("KALM_DEPLOY_HF_SECRET=", "--hf-secret", "huggingface.co/someone/model")),
        (404, ("revision",)),
        (500, ("again",)),
    ],
)
def test_a_refusal_names_the_remedy(hub: Hub, status: int, named: tuple[str, ...]) -> None:
    hub.status = status
    done = hub.download()
    assert done.returncode == 1
    assert done.stderr.startswith("EngineLoadError: someone/model could not be downloaded")
    assert [word for word in named if word not in done.stderr] == []
    assert ("--hf-secret" in done.stderr) == (status in (401, 403, 429))


def test_a_rate_limit_with_a_token_does_not_ask_for_one(hub: Hub) -> None:
    hub.status = 429
    done = hub.download(HF_TOKEN="hf_of_a_user")
    assert "--hf-secret" not in done.stderr
    assert "hf_of_a_user" not in done.stderr + done.stdout


def test_a_refused_file_gives_an_error_with_the_remedy(hub: Hub) -> None:
    hub.weights_status = 403  # as the files of a gated repository are, whose list is public
    done = hub.download()
    assert done.returncode == 1
    assert "--hf-secret" in done.stderr
