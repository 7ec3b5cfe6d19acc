"""The images' steps, run here without Docker, and the manifests against their schemas."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from lock_image import ROOT, pins, resolve
from serving import ready_url

from kalm_integrations.cli import build_app
from kalm_integrations.models import KALM
from modal_backend import image
from modal_backend.http import serve, server
from modal_backend.http.middleware import PUBLIC_ROUTES
from modal_backend.http.server import ServerOptions

DEPLOY = ROOT / "deploy"
MANIFESTS = [
    manifest
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text())
]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
CLOSING = serve._CLOSE_SECONDS + server._CLOSE_SECONDS


def steps(dockerfile: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, with their arguments."""
    text = (DEPLOY / dockerfile).read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def arguments(dockerfile: str, instruction: str) -> list[str]:
    return [argument for name, argument in steps(dockerfile) if name == instruction]


def manifest(kind: str) -> Any:
    (found,) = (each for each in MANIFESTS if each["kind"] == kind)
    return found


@pytest.mark.slow
def test_the_cpu_image_serves(tmp_path: Path) -> None:
    """Its files and steps, in a folder in place of `/`, with this Python."""
    theirs = {k: v for k, v in os.environ.items() if not k.startswith(("KALM_", "PYTHON"))}
    folders = f"{tmp_path}/opt/kalm/bin{os.pathsep}{Path(sys.executable).parent}{os.pathsep}"
    variables = theirs | {"PATH": folders + os.environ["PATH"], "KALM_API_KEY": "k" * 20}
    for instruction, argument in steps("Dockerfile.cpu"):
        if instruction == "COPY" and not argument.startswith("--from"):
            *names, target = argument.split()
            for name in names:
                path = tmp_path / target.strip("/") / (name if target.endswith("/") else "")
                path.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, path)
        elif instruction == "RUN" and not argument.startswith("useradd"):
            command = re.sub(r"(?<![\w.])/(opt|src)\b", rf"{tmp_path}/\1", argument)
            subprocess.run(shlex.split(command), check=True, cwd=tmp_path, env=variables)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables["PORT"] = str(free.getsockname()[1])
    (command,) = arguments("Dockerfile.cpu", "CMD")
    (check,) = arguments("Dockerfile.cpu", "HEALTHCHECK")
    probe = json.loads(check[check.index("[") :])
    probe = [argument.replace("/opt", f"{tmp_path}/opt") for argument in probe]
    assert _status(probe, variables) == 1  # nothing is served yet
    serving = subprocess.Popen(
        [*json.loads(command), "--port", variables["PORT"]],
        env=variables,
        stderr=subprocess.PIPE,
        text=True,
    )
    with serving:
        ready_url(serving)
        assert _status(probe, variables) == 0
        assert _status(probe, variables | {"KALM_API_KEY": "wrong"}) == 1
        rotated = variables["KALM_API_KEY"] + " new"
        assert _status(probe, variables | {"KALM_API_KEY": rotated}) == 0
        serving.terminate()
    assert serving.returncode == 128 + signal.SIGTERM


def _status(command: list[str], variables: dict[str, str]) -> int:
    done = subprocess.run(command, check=False, env=variables, stderr=subprocess.DEVNULL)
    return done.returncode


def test_the_gpu_image_has_the_packages_of_the_lock() -> None:
    """tests/packaging installs what of them needs no GPU; here all that `RUN` adds is resolved."""
    locked = image.LOCK.read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    _, lock_step, package_step = (
        step for step in arguments("Dockerfile", "RUN") if step.startswith("uv")
    )
    assert f"{image.LOCK.relative_to(ROOT)} /lock.txt" in arguments("Dockerfile", "COPY")
    assert "--no-deps --requirement /lock.txt" in lock_step
    assert "--constraint /lock.txt" in package_step
    extras = re.findall(r"[a-z]+", package_step.partition("[")[2])
    wanted = [*project["dependencies"]]
    wanted += [each for extra in extras for each in project["optional-dependencies"][extra]]
    resolved = pins(resolve(wanted, [line for line in locked if not line.startswith("#")]))
    both = resolved.keys() & pins(locked).keys()
    assert {"aiohttp", "numpy", "starlette"} <= both
    assert {name: resolved[name] for name in both} == {name: pins(locked)[name] for name in both}


def test_the_gpu_image_has_the_versions_of_the_image_on_modal() -> None:
    (base,) = arguments("Dockerfile", "ARG")
    assert base == f"BASE=nvidia/cuda:{image.CUDA}-devel-ubuntu22.04"
    assert f"uv venv --python {image.PYTHON} " in arguments("Dockerfile", "RUN")[0]


@pytest.mark.parametrize("dockerfile", ["Dockerfile", "Dockerfile.cpu"])
def test_an_image_is_not_root_and_has_its_files(dockerfile: str) -> None:
    (user,) = arguments(dockerfile, "USER")
    assert f"useradd --uid {user} " in arguments(dockerfile, "RUN")[-1]
    copied = (line.split()[:-1] for line in arguments(dockerfile, "COPY") if "--from" not in line)
    assert [name for names in copied for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "command",
    [
        *(json.loads(arguments(name, "CMD")[0]) for name in ("Dockerfile", "Dockerfile.cpu")),
        manifest("Deployment")["spec"]["template"]["spec"]["containers"][0]["command"],
    ],
)
def test_a_command_is_one_of_kalm(command: list[str]) -> None:
    assert command[0] == "kalm"
    build_app().parse_args(command[1:], exit_on_error=False, print_error=False)


@pytest.mark.parametrize("found", MANIFESTS, ids=lambda each: each["kind"])
def test_a_manifest_is_valid(found: dict[str, Any]) -> None:
    if found["apiVersion"] == "keda.sh/v1alpha1":  # not one of Kubernetes' own
        assert found["spec"]["scaleTargetRef"]["name"] == manifest("Deployment")["metadata"]["name"]
        return
    latest = ".".join(version("kubernetes-validate").split(".")[:2])
    kubernetes_validate.validate(found, latest, strict=True)


def test_the_schema_detects_a_misspelt_field() -> None:
    wrong = json.loads(json.dumps(manifest("Deployment")).replace("readinessProbe", "readyProbe"))
    latest = ".".join(version("kubernetes-validate").split(".")[:2])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, latest, strict=True)


def test_the_compose_file_is_valid() -> None:
    folder = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    schema = json.loads((folder / "compose-spec.json").read_text())
    jsonschema.validate(COMPOSE, schema)
    for service in COMPOSE["services"].values():
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        grace = int(service["stop_grace_period"].removesuffix("s"))
        assert grace > ServerOptions().grace + CLOSING


def test_the_pod_ends_within_its_grace_period() -> None:
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"]
    grace = int(command[command.index("--grace") + 1])
    _, sleep = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > int(sleep) + grace + CLOSING


def test_the_pod_fits_the_image_and_the_service() -> None:
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    for probe in ("startupProbe", "livenessProbe"):  # they cannot send a key
        assert container[probe]["httpGet"]["path"] in PUBLIC_ROUTES
    (check,) = arguments("Dockerfile", "HEALTHCHECK")
    assert container["readinessProbe"]["exec"]["command"] == json.loads(check[check.index("[") :])
    assert str(pod["securityContext"]["runAsUser"]) == arguments("Dockerfile", "USER")[0]
    (download,) = manifest("Job")["spec"]["template"]["spec"]["containers"]
    for each in (container, download):
        (mount,) = each["volumeMounts"]
        assert [mount["mountPath"]] == arguments("Dockerfile", "VOLUME")
    assert download["command"][2:] == [KALM.space.model, "--revision", KALM.space.revision]


def test_the_page_names_files_and_manifests_that_exist() -> None:
    page = (ROOT / "docs" / "docker.md").read_text()
    named = re.findall(r"deploy/[\w./-]*\w", page)
    assert {name for name in named if not (ROOT / name).exists()} == set()
    assert f"{KALM.space.model} --revision {KALM.space.revision}" in page.replace("\\\n    ", "")
    (secret,) = re.findall(r"create secret generic (\S+) --from-literal=(\S+?)=", page)
    (container,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    (variable,) = container["env"]
    assert secret == tuple(variable["valueFrom"]["secretKeyRef"].values())
