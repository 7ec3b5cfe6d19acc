"""Nothing is left behind, nothing of the user's is touched, nothing is swallowed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import modal
import modal_emulator
import pytest
from modal_emulator import Emulator
from modal_emulator.sandbox import marked_processes
from toy import failing_app, toy_app


def sockets() -> set[str]:
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return {name for link in links if (name := str(link.readlink())).startswith("socket:")}


# The client's background loop lives as long as the process, and with it a pair to wake it.
SYNCHRONIZER_SOCKETS = 2


def test_closing_leaves_nothing() -> None:
    threads, before = set(threading.enumerate()), sockets()
    emulator = Emulator(crash_backoff=(0.05, 0.1))
    emulator.set_secret("toy-secret", {})
    emulator.deploy(toy_app.__file__)
    emulator.deploy(failing_app.__file__)
    with emulator.client() as client:
        children = modal.Cls.from_name("toy", "Toy", client=client)().spawn_children.remote()
        modal.Cls.from_name("toy", "Toy", client=client)().work.spawn(60)
        modal.Cls.from_name("failing", "ExitsInEnter", client=client)().ping.spawn()
        emulator.wait(lambda: emulator.starts("ExitsInEnter") > 1)
    names = [c.name for c in (*emulator.containers("Toy"), *emulator.containers("ExitsInEnter"))]
    address = emulator.cloud.server_url.removeprefix("http://").split(":")
    directory = emulator.directory
    assert marked_processes(names[0])
    emulator.close()
    assert not [pid for name in names for pid in marked_processes(name)]
    assert not [pid for pid in children if Path(f"/proc/{pid}/exe").exists()]
    assert not directory.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address[0], int(address[1])))
    left = set(threading.enumerate()) - threads
    assert not {t for t in left if "modal-emulator" in t.name or "waitpid" in t.name}
    assert len(sockets() - before) <= SYNCHRONIZER_SOCKETS


def test_containers_end_with_the_process_of_the_emulator() -> None:
    script = """if True:
        import os, signal, sys
        import modal
        from modal_emulator import Emulator
        emulator = Emulator()
        emulator.deploy(sys.argv[1])
        with emulator.client() as client:
            dies = modal.Cls.from_name("failing", "Dies", client=client)()
            print(dies.note.remote("here", 0), emulator.directory, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", script, failing_app.__file__],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, directory = done.stdout.split()
    shutil.rmtree(directory)
    for _ in range(200):
        if not Path(f"/proc/{pid}/exe").exists():
            break
        time.sleep(0.02)
    else:
        pytest.fail("the container lives on")


def test_what_fails_inside_is_raised_at_the_end(tmp_path: Path) -> None:
    emulator = Emulator(container_python=tmp_path / "absent")
    emulator.deploy(failing_app.__file__)
    with emulator.client() as client:
        modal.Function.from_name("failing", "broken", client=client).spawn()
        emulator.wait(lambda: emulator.cloud.errors)
    with pytest.raises(ExceptionGroup) as caught:
        emulator.close()
    assert caught.group_contains(FileNotFoundError)


def test_the_readme_names_every_option(emulator: Emulator) -> None:
    readme = (Path(modal_emulator.__file__).parent / "README.md").read_text()
    assert [f.name for f in fields(emulator.options) if f"`{f.name}`" not in readme] == []
