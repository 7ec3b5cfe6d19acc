"""`kalm deploy` and `modal deploy`, run by the real Modal client against the emulated cloud."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modal
import pytest
from modal_emulator import Emulator, gpu_choices

from kalm_integrations import models

ROOT = Path(__file__).parents[2]
CLASS = "VLLMEmbeddingSnapshot"
APP = "vllm-embedding-snapshot"
KALM = [sys.executable, "-m", "kalm_integrations.cli"]
EMBEDDED = {"KALM_DEPLOY_ENGINE": "embedded"}


@pytest.fixture
def run(emulator: Emulator) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(
        *command: str, status: int = 0, cwd: Path = ROOT, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=cwd,
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **emulator.client_env, "COLUMNS": "200", **variables},
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run


class TestKalmDeploy:
    def test_it_ends_with_a_snippet_that_works(self, run: Any, emulator: Emulator) -> None:
        shown = run(*KALM, "deploy", "--engine", "embedded", "--max-containers", "2").stdout
        assert re.search(r"one container, an hour\s+│\s+0\.06", shown)
        assert re.search(
            r"query service at most \(--max-containers 2\), an hour\s+│\s+0\.13", shown
        )
        assert re.search(r"idle \(--min-containers 0\), a day\s+│\s+0\.00", shown)
        snippet = "\n".join(re.findall(r"^    (.*)$", shown.partition("over RPC:")[2], re.M))
        assert len(json.loads(run(sys.executable, "-W", "error", "-c", snippet).stdout)) == 3
        (check,) = re.findall(r"^Check it: +(.*) kalm doctor --wake$", shown, re.M)
        variables = dict(pair.split("=") for pair in check.split())
        assert "All good" in run(*KALM, "doctor", "--wake", **variables).stdout
        assert not emulator.unimplemented

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ((), None),
            (("--quantization", "fp8", "--gpu", "H100"), "kalm-fp8"),
            (("--revision", "0" * 40), '{"model": "tencent/KaLM'),
        ],
    )
    def test_clients_are_told_which_space_to_expect(
        self, run: Any, options: tuple[str, ...], expected: str | None
    ) -> None:
        shown = run(*KALM, "deploy", "--app-name", f"kalm-{len(options)}", *options).stdout
        assert ("expected_identity" in shown) == (expected is not None)
        assert ("KALM_EXPECTED_IDENTITY=" in shown) == (expected is not None)
        assert expected is None or f"expected_identity='{expected}" in shown

    def test_a_secret_that_is_missing_and_a_misspelt_variable(
        self, run: Any, emulator: Emulator
    ) -> None:
        before = len(emulator.created)
        bearer = [*KALM, "deploy", "--engine", "embedded", "--auth", "proxy+bearer"]
        refused = run(*bearer, "--api-key-secret", "nowhere", status=2)
        assert "modal secret create nowhere KALM_API_KEY=" in refused.stderr
        assert "one container, an hour" in refused.stdout
        misspelt = run(*KALM, "deploy", status=2, **EMBEDDED, KALM_DEPLOY_MAXCONTAINERS="3")
        assert "Did you mean KALM_DEPLOY_MAX_CONTAINERS?" in misspelt.stderr
        assert len(emulator.created) == before

    def test_other_vectors_do_not_replace_these_without_a_word(
        self, run: Any, emulator: Emulator
    ) -> None:
        run(*KALM, "deploy", "--engine", "embedded")
        deployed = len(emulator.created)
        # The app as `modal deploy` would make it of other settings, under the same name.
        emulator.deploy("modal_backend.app", cwd=ROOT)
        assert len(emulator.created) > deployed
        deployed = len(emulator.created)
        refused = run(*KALM, "deploy", "--engine", "embedded", status=2).stderr
        assert "pass --accept-new-identity" in refused
        assert "kalm deploy --help" not in refused
        for space in (models.KALM.space, models.EMBEDDED.space):  # by name, not only by a hash
            assert space.model in refused
            assert space.fingerprint in refused
        assert len(emulator.created) == deployed
        diagnosing = ("--canary", "warn", "--snapshot", "off")
        command = [*KALM, "deploy", "--engine", "embedded", "--accept-new-identity", *diagnosing]
        shown = run(*command).stdout
        assert "WARNING: --canary warn" in shown
        run(*KALM, "deploy", "--engine", "embedded", "--max-containers", "2")  # the same vectors

    def test_bad_settings_and_a_bad_token_send_nothing(self, run: Any, emulator: Emulator) -> None:
        before = len(emulator.created)
        run(*KALM, "deploy", "--engine", "embedded", "--min-containers", "9", status=2)
        refused = run(*KALM, "deploy", "--engine", "embedded", status=1, MODAL_TOKEN_SECRET="as-no")
        assert "modal setup" in refused.stderr
        assert "one container, an hour" in refused.stdout  # which nobody has to sign in for
        assert "as-no" not in refused.stderr + refused.stdout
        assert len(emulator.created) == before

    def test_without_a_token_the_cost_is_shown_and_one_command_named(
        self, run: Any, emulator: Emulator, tmp_path: Path
    ) -> None:
        nobody = {"MODAL_TOKEN_ID": "", "MODAL_TOKEN_SECRET": "", "HOME": str(tmp_path)}
        nobody["MODAL_CONFIG_PATH"] = str(tmp_path / "none.toml")
        before = len(emulator.created)
        refused = run(*KALM, "deploy", "--engine", "embedded", status=1, **nobody)
        assert "one container, an hour" in refused.stdout
        assert "modal setup" in refused.stderr
        assert "modal token" not in refused.stderr + refused.stdout
        assert len(emulator.created) == before


class TestDeployRequest:
    """Every setting reaches the platform in the place where it expects it."""

    @pytest.fixture
    def deployed(self, emulator: Emulator) -> Callable[..., Any]:
        def deployed(**settings: str) -> Any:
            variables = {f"KALM_DEPLOY_{name.upper()}": value for name, value in settings.items()}
            emulator.deploy("modal_backend.app", cwd=ROOT, env=variables)
            return emulator.function(f"{settings.get('app_name', APP)}/{CLASS}")

        return deployed

    def test_every_setting(self, deployed: Any, emulator: Emulator) -> None:
        emulator.set_secret("hf", {"HF_TOKEN": "x"})
        emulator.set_secret("key", {"KALM_API_KEY": "x"})
        function = deployed(
            app_name="chosen",
            gpu="H100!,L40S",
            quantization="fp8",
            snapshot="off",
            min_containers="0",
            max_containers="3",
            scaledown_window="60",
            concurrency="32",
            timeout="120",
            startup_timeout="1200",
            auth="bearer-public",
            api_key_secret="key",
            hf_secret="hf",
            region="eu",
            hf_cache_volume="weights",
            jit_cache_volume="kernels",
            bulk_volume="jobs",
        )
        made = function.definition
        assert gpu_choices(function.request) == ["H100!", "L40S"]
        assert made.resources.memory_mb == 28 * 1024
        assert (made.timeout_secs, made.startup_timeout_secs) == (120, 1200)
        assert (made.autoscaler_settings.max_containers, made.task_idle_timeout_secs) == (3, 60)
        assert (made.max_concurrent_inputs, made.target_concurrent_inputs) == (32, 16)
        assert not made.checkpointing_enabled
        assert list(made.scheduler_placement.regions) == ["eu"]
        assert not made.method_definitions["http"].webhook_config.requires_proxy_auth
        assert len(made.secret_ids) == 1  # the download has the other
        download = emulator.function("chosen/download_model_weights").definition
        assert len(download.secret_ids) == 1
        assert download.secret_ids != made.secret_ids
        assert emulator.volume("weights").exists()
        assert emulator.volume("kernels").exists()
        assert emulator.volume("jobs").exists()

    def test_a_secret_without_the_key_is_refused_at_once(
        self, deployed: Any, emulator: Emulator
    ) -> None:
        emulator.set_secret("empty", {"OTHER": "x"})
        with pytest.raises(AssertionError, match="KALM_API_KEY"):
            deployed(**{"engine": "embedded", "auth": "proxy+bearer", "api_key_secret": "empty"})


class TestAnywhere:
    """What is deployed needs nothing but itself."""

    PLAIN = (
        "import modal, sys\n"
        "service = modal.Cls.from_name(sys.argv[1], 'VLLMEmbeddingSnapshot')()\n"
        "vectors = service.embed.remote(['Hello world'])\n"
        "rows = service.embed_with_metadata.remote(['Hello world', 'Bye'])\n"
        "assert type(vectors) is list and {type(x) for x in vectors[0]} == {float}\n"
        "assert [row['text'] for row in rows] == ['Hello world', 'Bye']\n"
        "assert rows[0]['dimension'] == len(rows[0]['embedding']) == 512\n"
        "assert max(abs(a - b) for a, b in zip(rows[0]['embedding'], vectors[0])) < 1e-5\n"
        "try:\n"
        "    service.embed.remote(['fine', ' '])\n"
        "except RuntimeError as error:\n"
        "    assert 'invalid_input: texts[1] is white space only' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('not refused')\n"
        "print(sorted({'numpy', 'kalm_integrations', 'safetensors'} & sys.modules.keys()))\n"
    )
    WITHOUT = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('numpy', 'kalm_integrations', 'safetensors'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )

    def test_a_modal_client_without_numpy_and_without_us_can_call_it(
        self, run: Any, emulator: Emulator
    ) -> None:
        emulator.deploy("modal_backend.app", cwd=ROOT, env=EMBEDDED)
        out = run(sys.executable, "-c", self.WITHOUT + self.PLAIN, APP).stdout
        assert out == "[]\n"

    def test_from_an_installed_wheel(self, run: Any, emulator: Emulator, tmp_path: Path) -> None:
        uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
        run(*uv, "--no-deps", "--target", str(tmp_path / "site"), str(ROOT))
        wheel = {"PYTHONPATH": str(tmp_path / "site"), **EMBEDDED, "KALM_DEPLOY_APP_NAME": "wheel"}
        where = "import modal_backend; print(modal_backend.__file__)"
        assert str(tmp_path) in run(sys.executable, "-c", where, cwd=tmp_path, **wheel).stdout
        emulator.deploy("modal_backend.app", cwd=tmp_path, env=wheel)
        with emulator.client() as client:
            service: Any = modal.Cls.from_name("wheel", CLASS, client=client)()
            assert service.describe.remote()["dimensions"] == [512]

    def test_the_image_declares_all_that_the_container_needs(
        self, run: Any, new_emulator: Any, tmp_path: Path
    ) -> None:
        """The container runs in an environment of the image's own list; the project is not
        installed there, so that a package or a file that the image lacks shows."""
        emulator = new_emulator()
        emulator.deploy("modal_backend.app", cwd=ROOT, env=EMBEDDED)
        # What is not pinned is the base image's own: pip, wheel, uv.
        packages = [package for package in emulator.image(CLASS).packages if "==" in package]
        python = tmp_path / "venv" / "bin" / "python"
        venv.create(tmp_path / "venv", symlinks=True)
        # Modal mounts its client, and what that needs, into every container.
        uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
        run(*uv, *packages, "modal>=1.6.4,<1.7")
        with (
            emulator.changed(container_python=python, container_env={"PYTHONPATH": ""}),
            emulator.client() as client,
        ):
            service: Any = modal.Cls.from_name(APP, CLASS, client=client)()
            assert len(service.embed.remote(["Hello world"])[0]) == 512
            assert "error" not in service.describe.remote()
            request = urllib.request.Request(
                emulator.web_url(CLASS, "http") + "/v1/models",
                headers={"Modal-Key": "wk-emulated", "Modal-Secret": "ws-emulated"},
            )
            with urllib.request.urlopen(request) as answer:
                assert json.load(answer)["data"][0]["dimensions"] == [512]


def test_the_local_entrypoint_checks_a_deployment(run: Any, emulator: Emulator) -> None:
    emulator.deploy("modal_backend.app", cwd=ROOT, env=EMBEDDED)
    modal_run = [sys.executable, "-m", "modal", "run", "-m", "modal_backend.app"]
    output = run(*modal_run, **EMBEDDED).stdout
    for check in ("start", "identity", "vectors", "latency"):
        assert re.search(rf"^✓ {check} ", output, re.MULTILINE)
