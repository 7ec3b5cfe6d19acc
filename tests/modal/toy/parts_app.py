"""An app made of many parts: base image, packages, local files, and every setting of a function."""

import os
import socket
import sys
from pathlib import Path

import modal

HERE = Path(__file__).parent
app = modal.App("parts")
image = (
    modal.Image.from_registry("ubuntu:24.04", add_python="3.12")
    .entrypoint([])
    .uv_pip_install(
        "alpha==1.2", "beta[extra]>=3", extra_index_url="https://example.invalid/simple"
    )
    .pip_install("gamma", pre=True)
    .run_commands("echo built")
    .env({"FROM_IMAGE": "two words"})
)
if modal.is_local():
    image = (
        image.pip_install_from_requirements(HERE / "data" / "requirements.txt")
        .add_local_file(HERE / "data" / "one.txt", "/root/copied/one.txt", copy=True)
        .add_local_file(HERE / "data" / "one.txt", "/srv/elsewhere/one.txt")
        .add_local_dir(HERE / "data", "/root/data")
        .add_local_python_source("helper")
    )


@app.cls(
    image=image,
    gpu=["H100!", "A100-80GB:2"],
    cpu=2.0,
    memory=(1024, 4096),
    timeout=600,
    startup_timeout=1200,
    scaledown_window=300,
    min_containers=0,
    max_containers=3,
    buffer_containers=1,
    region="eu",
    volumes={"/root/cache": modal.Volume.from_name("parts-cache", create_if_missing=True)},
    secrets=[modal.Secret.from_dict({"INLINE": "yes"})],
    enable_memory_snapshot=True,
    experimental_options={"enable_gpu_snapshot": True},
)
@modal.concurrent(max_inputs=16, target_inputs=8)
class Parts:
    name: str = modal.parameter(default="nobody")

    @modal.method()
    def look(self) -> dict[str, object]:
        import helper

        return {
            "name": self.name,
            "greeting": helper.greet(self.name),
            "one": (Path.home() / "data" / "one.txt").read_text(),
            "copied": (Path.home() / "copied" / "one.txt").read_text(),
            "path": sys.path,
            "executable": sys.executable,
            "env": dict(os.environ),
        }

    @modal.method()
    def absolute(self) -> dict[str, str]:
        """Only an isolated container has its files where they belong."""
        Path("/srv/written").write_text("inside")
        Path("/root/cache/kept").write_text("in the volume")
        return {
            "file": __file__,
            "elsewhere": Path("/srv/elsewhere/one.txt").read_text(),
            "hostname": socket.gethostname(),
        }

    @modal.asgi_app(label="parts-door", requires_proxy_auth=True)
    def door(self) -> object:
        return None


@app.local_entrypoint()
def main(name: str = "you") -> None:
    print("answer:", Parts(name=name).look.remote()["greeting"])
