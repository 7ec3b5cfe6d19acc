"""The dashboard and the alert rules agree with the metrics of the real service.

Prometheus itself is not a Python package: where it is missing, its tests are skipped.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from scripted_engine import ScriptedEngine
from serving import serving

from kalm_integrations import KalmClient
from kalm_integrations.errors import (
    AuthenticationError,
    InvalidResponseError,
    KalmError,
    ServiceUnavailableError,
    subclasses,
)
from kalm_integrations.models import EMBEDDED
from kalm_integrations.protocol import ServiceWarning
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.service import EmbeddingService

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "alerts.yml"
PAGE = (ROOT / "docs" / "monitoring.md").read_text()
DASHBOARD = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
RULES = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
KEY = "k" * 20

CONDITION = re.compile(r"^(.*) (?:>|==) [\d.]+$", re.DOTALL)
EXPRESSIONS = [
    *(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]),
    # What a rule compares: the comparison itself returns nothing as long as all is well.
    *(CONDITION.sub(r"\1", rule["expr"]) for rule in RULES),
]

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None,
    reason="Prometheus is missing; on Debian and Ubuntu: apt-get install prometheus",
)


@pytest.fixture(scope="module")
def use() -> Iterator[tuple[str, Callable[[], None]]]:
    """The URL of a service, and a function that uses it in every way that is counted."""
    service = EmbeddingService(ScriptedEngine())
    service.warnings = (ServiceWarning("example", "An example."),)
    app = create_app(service, keys=BearerKeys([SecretStr(KEY)]), phases={"load": 1.0})
    with serving(app) as url:
        client = KalmClient(base_url=url, api_key=KEY, model=EMBEDDED.space.model, max_retries=0)

        def use() -> None:
            client.embed(["a"], role="query")
            client.embed(["a", "b"])
            with pytest.raises(AuthenticationError):
                client.with_options(api_key="wrong").embed(["a"])
            service.engine = ScriptedEngine(lambda vectors: vectors[:-1])
            with pytest.raises(InvalidResponseError):
                client.embed(["a"])
            service.engine = ScriptedEngine(
                faults={"embed": ServiceUnavailableError("overloaded.")}
            )
            with pytest.raises(KalmError):
                client.embed(["a"])
            service.engine = ScriptedEngine()

        use()
        yield url, use
        client.close()


def test_every_metric_is_one_of_the_service(use: tuple[str, Callable[[], None]]) -> None:
    request = urllib.request.Request(
        f"{use[0]}/metrics", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    samples = {sample.name for family in families for sample in family.samples}
    keda = (ROOT / "deploy" / "kubernetes" / "keda.yaml").read_text()
    named = {name for each in (*EXPRESSIONS, keda) for name in re.findall(r"\bkalm_\w+", each)}
    assert named - samples == set()
    described = set(re.findall(r"`(kalm_\w+)`", PAGE.split("## Metrics")[1]))
    ours = {name for name in samples if not re.search(r"_(bucket|sum|created)$", name)}
    assert described == {name.removesuffix("_count") for name in ours}


def test_every_code_is_one_of_the_service() -> None:
    named = {
        code
        for each in EXPRESSIONS
        for codes in re.findall(r'code=~?"([^"]+)"', each)
        for code in codes.split("|")
    }
    assert named
    assert named - {kind.code for kind in subclasses(KalmError)} == set()


@needs_prometheus
def test_promtool_accepts_the_rules() -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", ALERTS], check=False, capture_output=True, text=True
    )
    assert (done.returncode, f"{len(RULES)} rules found" in done.stdout) == (0, True), done.stderr


@pytest.mark.slow
@needs_prometheus
def test_every_expression_returns_data(use: tuple[str, Callable[[], None]], tmp_path: Path) -> None:
    url, use_service = use
    (snippet,) = re.findall(r"```yaml\n(scrape_configs:.*?)```", PAGE, re.DOTALL)
    config = yaml.safe_load(snippet)
    (job,) = config["scrape_configs"]
    (tmp_path / "key").write_text(KEY)
    job["authorization"]["credentials_file"] = str(tmp_path / "key")
    job["static_configs"][0]["targets"] = [url.removeprefix("http://")]
    config["rule_files"] = [str(ALERTS)]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    server = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address={address}",
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        missing = [_with_variables(each) for each in EXPRESSIONS]
        deadline = time.monotonic() + 90
        while missing and time.monotonic() < deadline:
            use_service()
            missing = [each for each in missing if not _has_data(address, each)]
            time.sleep(0.5)
        assert missing == []
        rules = _get(address, "/api/v1/rules")["groups"][0]["rules"]
        assert [rule["name"] for rule in rules] == [rule["alert"] for rule in RULES]
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
    finally:
        server.terminate()
        server.wait()


def _with_variables(expression: str) -> str:
    """As Grafana sends it."""
    return expression.replace("$__rate_interval", "1m").replace("$job", "kalm")


def _has_data(address: str, expression: str) -> bool:
    query = urllib.parse.urlencode({"query": expression})
    try:
        results = _get(address, f"/api/v1/query?{query}")["result"]
    except OSError:  # not started yet
        return False
    return any(result["value"][1] != "NaN" for result in results)


def _get(address: str, path: str) -> Any:
    with closing(urllib.request.urlopen(f"http://{address}{path}")) as response:
        return json.load(response)["data"]
