"""Validation, variables and prices of the deployment settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.options import STARTUP_TIMEOUT
from modal_backend import deploy, settings
from modal_backend.gpus import GPUS, rate
from modal_backend.settings import DeploySettings

PAGE = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()


def refused(**arguments: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        DeploySettings(**arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"gpu": "T4"}, r"gpu='T4': there is no such GPU\. There are L4, A10"),
        ({"gpu": "l40"}, r"gpu='l40': there is no such GPU\. Did you mean L40S\? There are L4"),
        ({"gpu": ""}, "gpu names none"),
        ({"gpu": "L4"}, r"--gpu L4 has 24 GiB; .* take \d\d\. Use --gpu L40S, A100-40GB"),
        (
            {"gpu": "H100,A10"},
            r"--gpu A10 has 24 GiB; .* Use [^.]*, or --quantization int8,",
        ),
        ({"gpu": "L40S,A100-40GB", "quantization": "fp8"}, "A100-40GB does not compute in fp8"),
        (
            {"quantization": "fp8"},
            r"A100-40GB \(the default\) does not compute in fp8 .* Use --gpu L4, L40S, H100",
        ),
        ({"max_model_len": 32_768}, r"--gpu A100-40GB .*has 40 GiB; .* Use --gpu L40S, A100-80GB"),
        ({"engine": "embedded", "quantization": "fp8"}, "the embedded engine has no such option"),
        ({"engine": "embedded", "gpu": "T4"}, "--gpu T4: the embedded engine has no such option"),
        ({"min_containers": 2}, "--min-containers 2 is over --max-containers 1"),
        ({"max_model_len": 40_000}, "max_model_len: .*32768"),
        ({"snapshot": "sometimes"}, "snapshot: .*'off', 'awake' or 'asleep'"),
        ({"auth": "none"}, "auth: .*'proxy', 'proxy.bearer' or 'bearer-public'"),
        ({"app_name": "no spaces"}, "app_name"),
        ({"canary": "ignore"}, "canary: .*'refuse' or 'warn'"),
        ({"startup_timeout": 1079}, "--startup-timeout 1079 .* at least 1080 s"),
        ({"startup_timeout": 3601}, "startup_timeout: .*3600"),
        ({"gpus": "L40S"}, r"gpus: there is no such argument\. Did you mean gpu\?"),
    ],
)
def test_invalid_settings_are_refused_by_name(arguments: dict[str, object], said: str) -> None:
    assert re.search(said, refused(**arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gpu": "L40S", "quantization": "fp8", "max_model_len": 16_384},
        {"gpu": ("H100!", "H200"), "quantization": "fp8"},
        {"gpu": "L40S", "quantization": "fp8"},
        {"engine": "embedded", "region": "eu", "min_containers": 1, "hf_secret": "hf"},
    ],
)
def test_settings_survive_the_variables_of_the_container(
    arguments: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed = DeploySettings(**arguments)
    for name, value in deployed.as_variables().items():
        monkeypatch.setenv(name, value)
    assert DeploySettings() == deployed


def test_an_invalid_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALM_DEPLOY_MAX_CONTAINERS", "many")
    assert "max_containers (from KALM_DEPLOY_MAX_CONTAINERS)" in refused()
    monkeypatch.setenv("KALM_DEPLOY_MAX_CONTAINERS", "")
    monkeypatch.setenv("KALM_DEPLOY_STARTUP_TIMEOUT", "600")
    assert "(from KALM_DEPLOY_STARTUP_TIMEOUT)" in refused()


@given(st.integers(1080, 3600))
def test_a_start_has_time_for_all_attempts(startup_timeout: int) -> None:
    """Or Modal kills the container and starts another one, without end."""
    made = DeploySettings(startup_timeout=startup_timeout)
    assert made.engine_ready_timeout >= settings.SHORTEST_LOAD
    attempt = made.engine_ready_timeout + settings.AROUND_LOADS
    assert attempt == made.attempt_timeout
    needed = settings.AROUND_STARTS + settings.LOAD_ATTEMPTS * attempt
    assert needed <= startup_timeout < needed + settings.LOAD_ATTEMPTS


def test_the_embedded_engine_accepts_a_short_start() -> None:
    assert DeploySettings(engine="embedded", startup_timeout=60).attempt_timeout == 30


def test_the_client_waits_as_long_as_a_start_may_take() -> None:
    assert DeploySettings().startup_timeout == STARTUP_TIMEOUT


def test_the_price_of_a_container() -> None:
    # An A100-40GB at $0.000583 a second, 4 cores at 0.0000131, 40 GiB at 0.00000222.
    hour = 3600 * (0.000583 + 4 * 0.0000131 + 40 * 0.00000222)
    assert DeploySettings().dollars_per_hour == pytest.approx(hour)
    assert DeploySettings(region="eu").dollars_per_hour == pytest.approx(1.75 * hour)
    assert DeploySettings(engine="embedded").dollars_per_hour < 0.07


@given(st.sampled_from(sorted(GPUS)), st.sampled_from(["none", "fp8"]))
def test_accepted_gpus_hold_the_weights_and_support_the_quantization(gpu, quantization):
    try:
        taken = DeploySettings(gpu=gpu, quantization=quantization)
    except ConfigurationError:
        return
    kind = GPUS[gpu]
    assert kind.gib >= (28 if quantization == "none" else 19)
    assert kind.fp8 or taken.quantization == "none"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, r"a million tokens, always busy \(calculated\) +│ +(\S+)"),
        ({"gpu": "H100!"}, r"a million tokens, always busy \(measured\) +│ +(\S+)"),
        ({"gpu": "H100,L40S"}, r"a million tokens, always busy \(calculated\) +│ +(\S+)"),
        ({"engine": "embedded"}, None),
        ({"model": "some/model"}, None),
        ({"enforce_eager": True}, None),
    ],
)
def test_the_price_of_a_million_tokens_is_shown_with_its_basis(
    arguments: dict[str, object], said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    made = DeploySettings(**arguments)
    Console(width=100).print(deploy._costs(made))
    shown = capsys.readouterr().out
    assert "`kalm cost` compares GPUs" in shown
    if said is None:
        assert "million" not in shown
        return
    found = re.search(said, shown)
    assert found
    # Of several GPUs, the dearest with the slowest one's speed: no run costs more.
    slowest = min(rate(name.removesuffix("!"), "none").tokens for name in made.gpu)
    expected = made.dollars_per_hour / 3600 / slowest * 1e6
    assert float(found[1]) == pytest.approx(expected, abs=0.0006)


def test_the_page_lists_every_setting_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `--([a-z-]+)` \|\s*`?([^|]*?)`?\s*\|", PAGE, re.M))
    for name, field in DeploySettings.model_fields.items():
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        assert rows.pop(name.replace("_", "-")) == ("" if default is None else str(default))
    assert set(rows) == {"accept-new-identity"}
