"""What `modal run -m modal_backend.app` prints of a service of KaLM; Modal is a stand-in here."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from kalm import BF16, FP8, KalmTransport
from scripted import ScriptedTransport

from kalm_integrations import reference
from kalm_integrations.models import EMBEDDED
from modal_backend import smoke_test
from modal_backend.settings import DeploySettings


@pytest.fixture
def proven(monkeypatch, capsys):
    """Proves what answers over this transport; returns what is printed, and the reason to fail."""

    def proven(transport, space, **settings):
        described = {"identity": space.to_dict(), "phases": {"load": 1.25}}
        methods = SimpleNamespace(
            embed=SimpleNamespace(remote=lambda texts: [[0.0] * 8 for _ in texts]),
            describe=SimpleNamespace(remote=lambda: described),
        )
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("KALM_EXPECTED_IDENTITY", json.dumps(space.to_dict()))
        monkeypatch.setattr(smoke_test, "deployed", lambda _: methods)
        monkeypatch.setattr("kalm_integrations.dispatch.open_transport", lambda _: transport)
        reason = None
        try:
            smoke_test.run(DeploySettings(**settings))
        except SystemExit as ended:
            reason = ended.code
        return capsys.readouterr().out, reason

    return proven


@pytest.mark.parametrize("identity", [BF16, FP8], ids=["bf16", "fp8"])
def test_kalms_reference_texts_are_a_row(proven, identity):
    shown, reason = proven(KalmTransport(identity=identity), identity)
    assert reason is None
    assert "reference texts" in shown
    assert "12 published values" in shown
    assert "0.932 (0.932)" in shown
    assert "1.25 s" in shown


def test_vectors_that_are_not_kalms_end_it(proven):
    transport = KalmTransport(lambda v: v[:, ::-1] if len(v) == len(reference.TEXTS) else v)
    shown, reason = proven(transport, BF16)
    assert "published values: " in shown
    assert "other vectors than KaLM's" in reason


def test_of_another_model_nothing_is_asked(proven):
    transport = ScriptedTransport(space=EMBEDDED.space)
    shown, _ = proven(transport, EMBEDDED.space, engine="embedded")
    assert "reference texts" not in shown
    assert not set(transport.sent) & set(reference.TEXTS)
