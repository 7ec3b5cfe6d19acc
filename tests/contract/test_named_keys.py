"""Keys with names and limits: the file `KALM_API_KEYS_FILE`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from pydantic import SecretStr
from serving import embedded_engine, serving
from test_http_server import ask
from test_serve import refused

from kalm_integrations import KalmClient
from kalm_integrations.errors import ConfigurationError, PermissionDeniedError
from kalm_integrations.models import EMBEDDED
from modal_backend.http import auth
from modal_backend.http.app import create_app
from modal_backend.http.auth import Allowance, BearerKeys
from modal_backend.service import EmbeddingService

MODEL = EMBEDDED.space.model
LIMITS = {
    "alice": "",
    "bob": "requests_per_minute = 2",
    "carol": "tokens_per_minute = 10",
    "site": "queries_only = true",
}


def write(file: Path, keys: dict[str, str]) -> Path:
    """Each key is its name, reversed."""
    tables = [f'[{name}]\nsha256 = "{digest(name)}"\n{more}\n' for name, more in keys.items()]
    file.write_text("\n".join(tables))
    return file


def digest(name: str) -> str:
    return hashlib.sha256(name[::-1].encode()).hexdigest()


@pytest.fixture
def keys(tmp_path: Path) -> BearerKeys:
    return BearerKeys([SecretStr("plain")], write(tmp_path / "keys.toml", LIMITS))


@pytest.fixture
def url(keys: BearerKeys) -> Iterator[str]:
    with serving(create_app(EmbeddingService(embedded_engine()), keys=keys)) as url:
        yield url


def status(url: str, key: str, text: str = "K2", path: str = "/query/v1/embeddings") -> int:
    return ask(f"{url}{path}", {"input": text}, key=key).status


def test_keys_of_the_file_and_of_the_variable_are_valid(url: str) -> None:
    assert [status(url, key) for key in ("ecila", "plain", "alice", "x")] == [200, 200, 401, 401]


def test_requests_per_minute(url: str) -> None:
    assert [status(url, "bob"[::-1]) for _ in range(2)] == [200, 200]
    answer = ask(f"{url}/v1/count_tokens", {"input": "K2"}, key="bob"[::-1])
    assert (answer.status, answer.error["code"]) == (429, "rate_limited")
    assert 0 < int(answer.headers["Retry-After"]) <= 30
    assert status(url, "ecila") == 200
    assert ask(f"{url}/v1/models", key="bob"[::-1]).status == 200


def test_tokens_per_minute(url: str) -> None:
    assert status(url, "lorac", "many words " * 20) == 200
    answer = ask(f"{url}/v1/embeddings", {"input": "K2"}, key="lorac")
    assert answer.status == 429
    assert int(answer.headers["Retry-After"]) > 60  # the excess is waited for


def test_a_caller_who_leaves_has_used_tokens(url: str) -> None:
    body = json.dumps({"input": ["many words " * 500] * 200}).encode()
    request = Request(f"{url}/v1/embeddings", body, {"Authorization": "Bearer lorac"})
    with pytest.raises(TimeoutError):
        urlopen(request, timeout=0.3)
    left = b'kalm_key_requests_total{code="caller_left",key="carol"} 1.0'
    for _ in range(100):
        if left in ask(f"{url}/metrics", key="ecila").body:
            break
        time.sleep(0.1)
    assert status(url, "lorac") == 429


def test_an_allowance_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(auth.time, "monotonic", lambda: now)
    allowance = Allowance(60)
    allowance.use(90)
    assert allowance.wait() == 31
    now += 31
    assert allowance.wait() == 0
    now += 1000
    allowance.wait()
    allowance.use(60)  # no more than a minute's limit is saved up
    assert allowance.wait() == 1


class TestQueriesOnly:
    @pytest.mark.parametrize("path", ["/v1/embeddings", "/document/v1/embeddings"])
    def test_all_but_queries_is_forbidden(self, url: str, path: str) -> None:
        answer = ask(f"{url}{path}", {"input": "K2"}, key="etis")
        assert (answer.status, answer.error["code"]) == (403, "permission_denied")
        assert "/query/v1" in answer.error["message"]
        assert ask(f"{url}/metrics", key="etis").status == 403

    def test_queries_are_allowed(self, url: str) -> None:
        assert status(url, "etis") == 200
        with KalmClient(base_url=url, api_key="etis", model=MODEL) as client:
            assert len(client.embed(["K2"], role="query")) == 1
            with pytest.raises(PermissionDeniedError):
                client.embed(["K2"])


def test_metrics_and_log_have_names_and_no_keys(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "uvicorn.error"):
        for _ in range(3):
            status(url, "bob"[::-1])
        status(url, "plain")
    metrics = ask(f"{url}/metrics", key="ecila").body.decode()
    assert 'kalm_key_requests_total{code="ok",key="bob"} 2.0' in metrics
    assert 'kalm_key_requests_total{code="rate_limited",key="bob"} 1.0' in metrics
    tokens = 2 * KalmClient(backend="local").count_tokens(["K2"])[0]
    assert f'kalm_key_tokens_total{{key="bob"}} {tokens}.0' in metrics
    lines = [record.getMessage() for record in caplog.records if "key " in record.getMessage()]
    assert len(lines) == 3
    assert all(line.startswith("key bob: '/query/v1/embeddings'") for line in lines)
    assert not any(secret in caplog.text + metrics for secret in (digest("bob"), "plain"))


def test_a_reload_keeps_what_was_used_unless_the_limit_changed(tmp_path: Path) -> None:
    file = write(tmp_path / "keys.toml", LIMITS)
    keys = BearerKeys([], file)

    def limited() -> bool:
        caller = keys.identify("Bearer " + "bob"[::-1])
        assert caller is not None
        return caller.over_limit() is not None

    assert [limited() for _ in range(3)] == [False, False, True]
    assert keys.reload() == 4
    assert limited()
    write(file, {"bob": "requests_per_minute = 3"})
    assert keys.reload() == 1
    assert not limited()
    assert keys.identify("Bearer ecila") is None


BROKEN = {
    "no TOML": "[alice",
    "nothing": "",
    "the key itself": '[alice]\nsha256 = "secret-key"',
    "no hash": "[alice]\n",
    "an unknown limit": f'[alice]\nsha256 = "{digest("alice")}"\nper_minute = 1',
    "no limit": f'[alice]\nsha256 = "{digest("alice")}"\nrequests_per_minute = 0',
    "a name for logs": f'["a b"]\nsha256 = "{digest("alice")}"',
    "one key twice": f'[a]\nsha256 = "{digest("c")}"\n[b]\nsha256 = "{digest("c")}"',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_refused_and_on_reload_the_old_one_stays(
    tmp_path: Path, content: str
) -> None:
    file = write(tmp_path / "keys.toml", LIMITS)
    keys = BearerKeys([], file)
    file.write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        keys.reload()
    assert str(file) in caught.value.message
    assert "secret-key" not in str(caught.value)
    assert keys.identify("Bearer ecila") is not None
    with pytest.raises(ConfigurationError):
        BearerKeys([], file)


def test_serving_with_a_file_that_cannot_be_used_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KALM_API_KEYS_FILE", str(tmp_path / "missing.toml"))
    assert "missing.toml" in refused(capsys, key=None)
    assert "KALM_API_KEYS_FILE" in refused(capsys, "--insecure-no-auth", key=None)


@pytest.mark.slow
def test_sighup_reads_the_file_again(tmp_path: Path) -> None:
    file = write(tmp_path / "keys.toml", {"alice": ""})
    command = [sys.executable, "-m", "kalm_integrations.cli", "serve", "--port", "0"]
    environment = {**os.environ, "KALM_API_KEYS_FILE": str(file)}
    environment.pop("KALM_API_KEY", None)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None

        def line_with(words: str) -> str:
            return next(line for line in process.stderr or () if words in line)

        url = line_with("ready: ").rpartition(" on ")[2].strip()
        assert [status(url, key) for key in ("ecila", "bob"[::-1])] == [200, 401]
        write(file, {"bob": ""})
        process.send_signal(signal.SIGHUP)
        line_with("1 keys")
        assert [status(url, key) for key in ("ecila", "bob"[::-1])] == [401, 200]
        file.write_text("[")
        process.send_signal(signal.SIGHUP)
        line_with(str(file))
        assert status(url, "bob"[::-1]) == 200
    finally:
        process.terminate()
        process.communicate()
