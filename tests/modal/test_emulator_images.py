"""What a deployment says, and what of it a container finds in place."""

import sys
import venv
from pathlib import Path
from typing import Any

import modal
import pytest
from modal_emulator import Emulator, gpu_choices
from modal_emulator.images import Image, Layer
from modal_emulator.sandbox import isolation_works  # noqa: F401 (skipif asks it by name)
from modal_proto import api_pb2
from toy import parts_app

TOY = Path(parts_app.__file__).parent
SOURCES = {"PYTHONPATH": str(TOY)}  # where the deploying side finds `helper`


@pytest.fixture(scope="module")
def emulator(new_emulator: Any) -> Emulator:
    emulator: Emulator = new_emulator()
    emulator.deploy(parts_app.__file__, env=SOURCES)
    return emulator


@pytest.fixture(scope="module")
def parts(emulator: Emulator, modal_client: modal.Client) -> Any:
    return modal.Cls.from_name("parts", "Parts", client=modal_client)


def test_every_setting_of_a_function_is_on_record(emulator: Emulator) -> None:
    function = emulator.function("Parts")
    assert function.request in emulator.created
    assert gpu_choices(function.request) == ["H100!", "A100-80GB:2"]
    definition = function.definition
    assert definition.resources.milli_cpu == 2000
    assert (definition.resources.memory_mb, definition.resources.memory_mb_max) == (1024, 4096)
    assert (definition.timeout_secs, definition.startup_timeout_secs) == (600, 1200)
    scaling = definition.autoscaler_settings
    assert (scaling.scaledown_window, scaling.max_containers) == (300, 3)
    assert (scaling.min_containers, scaling.buffer_containers) == (0, 1)
    assert (definition.max_concurrent_inputs, definition.target_concurrent_inputs) == (16, 8)
    assert definition.checkpointing_enabled
    assert dict(definition.experimental_options) == {"enable_gpu_snapshot": "True"}
    assert list(definition.scheduler_placement.regions) == ["eu"]
    assert [v.mount_path for v in definition.volume_mounts] == ["/root/cache"]
    assert len(definition.secret_ids) == 1
    door = definition.method_definitions["door"].webhook_config
    assert (door.requested_suffix, door.requires_proxy_auth) == ("parts-door", True)


def test_an_image_is_read_though_never_built(emulator: Emulator) -> None:
    image = emulator.image("Parts")
    assert image.python_version == "3.12"
    assert image.env["FROM_IMAGE"] == "two words"
    assert {"alpha==1.2", "beta[extra]>=3", "gamma"} <= set(image.packages)
    assert not [package for package in image.packages if package.startswith(("-", "http"))]
    assert ["gamma", "--pre"] in image.installs
    assert "RUN echo built" in image.commands
    assert image.commands[0].startswith("FROM ubuntu:24.04")
    assert image.context_files["/.requirements.txt"] == b"delta>=4\n"
    assert emulator.files("Parts")["/srv/elsewhere/one.txt"] == b"one\n"
    assert {"/root/parts_app.py", "/root/helper.py"} <= set(emulator.files("Parts"))


def test_the_python_version_of_a_base_image() -> None:
    lines = ["FROM python:3.13.1-slim-bookworm", "RUN python -m pip install modal"]
    layer = Layer(api_pb2.Image(dockerfile_commands=lines), "2025.06")
    assert Image("im-1", (layer,), {}).python_version == "3.13"


def test_local_files_are_where_the_app_expects_them(emulator: Emulator, parts: Any) -> None:
    seen = parts(name="ada").look.remote()
    assert (seen["name"], seen["greeting"]) == ("ada", "hello ada")
    assert (seen["one"], seen["copied"]) == ("one\n", "one\n")
    assert seen["env"]["FROM_IMAGE"] == "two words"
    assert seen["env"]["INLINE"] == "yes"
    # Outside /root they are below the directory that stands for the file system's root.
    elsewhere = Path(seen["env"]["MODAL_EMULATOR_ROOTFS"]) / "srv" / "elsewhere" / "one.txt"
    assert elsewhere.read_text() == "one\n"


def test_a_container_sees_nothing_of_what_is_around_it(
    monkeypatch: pytest.MonkeyPatch, parts: Any
) -> None:
    monkeypatch.setenv("OF_THE_TEST", "set")
    seen = parts().look.remote()
    assert "OF_THE_TEST" not in seen["env"]
    assert str(TOY) not in seen["path"]


def test_parameters_make_containers_of_their_own(emulator: Emulator, parts: Any) -> None:
    before = emulator.starts("Parts")
    assert parts(name="bob").look.remote()["greeting"] == "hello bob"
    assert parts(name="eve").look.remote()["greeting"] == "hello eve"
    assert emulator.starts("Parts") == before + 2


def test_containers_may_run_another_interpreter(new_emulator: Any, tmp_path: Path) -> None:
    """Such as a venv with what the image installs. Here one with the client's packages only."""
    venv.create(tmp_path, with_pip=False)
    here = next(path for path in sys.path if (Path(path) / "modal" / "__init__.py").exists())
    python = tmp_path / "bin" / "python"
    emulator = new_emulator(
        container_python=python, container_path=[Path(here)], container_env={"EXTRA": "set"}
    )
    emulator.deploy(parts_app.__file__, env=SOURCES)
    with emulator.client() as client:
        seen = modal.Cls.from_name("parts", "Parts", client=client)().look.remote()
    assert seen["executable"] == str(python)
    assert here in seen["path"]
    assert seen["env"]["EXTRA"] == "set"


@pytest.mark.skipif("not isolation_works()", reason="needs root and Linux namespaces")
def test_an_isolated_container_has_absolute_paths_and_a_host_name(new_emulator: Any) -> None:
    emulator = new_emulator(isolated=True)
    emulator.deploy(parts_app.__file__, env=SOURCES)
    with emulator.client() as client:
        seen = modal.Cls.from_name("parts", "Parts", client=client)().absolute.remote()
    (container,) = emulator.containers("Parts")
    assert seen["file"] == "/root/parts_app.py"
    assert seen["elsewhere"] == "one\n"
    assert seen["hostname"] == f"modal-{container.task_id}"
    emulator.stop_app("parts")  # whatever a container wrote is committed at its end
    assert (emulator.volume("parts-cache") / "kept").read_text() == "in the volume"
    assert not Path("/srv/written").exists()


def test_an_ephemeral_app_runs_and_stops(emulator: Emulator) -> None:
    done = emulator.cli("run", f"{parts_app.__file__}::main", "--name", "eve", env=SOURCES)
    assert "answer: hello eve" in done.stdout
    assert not emulator.running("Parts")


def test_no_rpc_was_missing(emulator: Emulator) -> None:
    assert not emulator.unimplemented
