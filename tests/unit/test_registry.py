"""An engine that is added to the registry can be deployed and served."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from scripted_engine import ScriptedEngine

from kalm_integrations import cli
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.models import DEFAULT_APP, EMBEDDED, KALM, KALM_FP8
from kalm_integrations.models import DEFAULT_APP as CLIENTS_DEFAULT_APP
from kalm_integrations.protocol import EmbedRequest
from modal_backend import tags
from modal_backend.engines import registry
from modal_backend.engines.base import Engine
from modal_backend.engines.registry import ENGINES, EngineType, Options
from modal_backend.http import serve
from modal_backend.service import EmbeddingService
from modal_backend.settings import DeploySettings

TOY_PROFILE = replace(
    EMBEDDED,
    space=replace(EMBEDDED.space, model="toy", quantization="int8 weights"),
    dtype="fp16",
)


class ToyEngine(ScriptedEngine):
    identity = TOY_PROFILE.space

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options


async def load(options: Options) -> Engine:
    return ToyEngine(options)


TOY = EngineType(
    name="toy",
    label="the toy engine",
    description="one direction",
    extra="toys",
    module="numpy",
    load=load,
    serve=load,
    options=frozenset({"max_model_len"}),
    profile=TOY_PROFILE,
    packages=("numpy",),
    memory_gib=3,
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> EngineType:
    monkeypatch.setitem(registry.ENGINES, "toy", TOY)
    return TOY


def test_a_registered_engine_is_deployed_with_its_own_options(toy: EngineType) -> None:
    settings = DeploySettings(engine="toy", max_model_len=256)
    assert settings.engine_options == {"max_model_len": 256}
    assert settings.memory_mib == 3 * 1024
    assert not settings.on_gpu
    assert settings.space == TOY_PROFILE.space
    with pytest.raises(ConfigurationError, match="--model x: the toy engine has no such option"):
        DeploySettings(engine="toy", model="x")


async def test_a_registered_engine_is_loaded_and_embeds(toy: EngineType) -> None:
    settings = DeploySettings(engine="toy", max_model_len=256)
    engine = await settings.engine_type.load(settings.engine_options)
    answer = await EmbeddingService(engine).embed(EmbedRequest(texts=["a"], role="query"))
    assert answer.identity == TOY_PROFILE.space
    assert len(answer.vectors) == 1


def test_a_registered_engine_is_served_by_the_command(
    toy: EngineType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[Any] = []
    monkeypatch.setattr(serve, "serve", lambda *arguments, **_: served.extend(arguments))
    assert cli.main(["serve", "--engine", "toy", "--max-model-len", "256"]) == 0
    assert served[:2] == [toy, {"max_model_len": 256}]
    assert asyncio.run(served[0].serve(served[1])).options == {"max_model_len": 256}
    assert cli.main(["serve", "--engine", "toy", "--dtype", "fp32"]) == 2
    assert "--dtype" in capsys.readouterr().err


def test_an_engine_that_is_not_registered_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigurationError, match=f"'toy'.*{', '.join(ENGINES)}"):
        DeploySettings(engine="toy")


def test_every_known_space_can_be_named_in_a_tag() -> None:
    known = tags.DEPLOYABLE
    for space in (KALM.space, KALM_FP8.space, EMBEDDED.space):
        assert known[space.fingerprint] == space
    assert DEFAULT_APP == CLIENTS_DEFAULT_APP
