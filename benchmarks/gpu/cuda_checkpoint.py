"""The CUDA driver's process checkpoint, which GPU memory snapshots are made with, and what
processes hold meanwhile. Linux; driver 570 or newer.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any


class LockArgs(ctypes.Structure):
    """CUcheckpointLockArgs."""

    _fields_ = [
        ("timeout_ms", ctypes.c_uint),
        ("reserved0", ctypes.c_uint),
        ("reserved1", ctypes.c_uint64 * 7),
    ]


def serve_driver() -> None:
    """Answer (call, pid) lines by calling the driver. A process of its own: the driver acts on
    other processes, and the one under test must not gain CUDA state by being watched."""
    cuda = ctypes.CDLL("libcuda.so.1")
    initialised = cuda.cuInit(0)
    cuda.cuGetErrorName.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    states = ["running", "locked", "checkpointed", "failed"]
    for line in sys.stdin:
        call, pid = json.loads(line)
        state = ctypes.c_int(-1)
        lock = LockArgs(timeout_ms=60_000)
        argument = {"Lock": ctypes.byref(lock), "GetState": ctypes.byref(state)}.get(call)
        started = time.perf_counter()
        code = initialised or getattr(cuda, f"cuCheckpointProcess{call}")(pid, argument)
        answer: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 3)}
        if code:
            name = ctypes.c_char_p()
            cuda.cuGetErrorName(code, ctypes.byref(name))
            answer["error"] = (name.value or b"?").decode()
        elif call == "GetState":
            answer["state"] = states[state.value]
        print(json.dumps(answer), flush=True)


class Driver:
    """The driver's checkpoint calls, made from a helper process."""

    def __init__(self) -> None:
        self._helper = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._helper.pid
        self._lock = threading.Lock()

    def call(self, call: str, pid: int) -> dict[str, Any]:
        """Make one call; its seconds, and its state or error."""
        assert self._helper.stdin
        assert self._helper.stdout
        with self._lock:
            self._helper.stdin.write(json.dumps([call, pid]) + "\n")
            self._helper.stdin.flush()
            line = self._helper.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the helper has ended"}
        return answer

    def close(self) -> None:
        """End the helper process."""
        self._helper.communicate()

    def move(self, calls: Sequence[str], pids: Sequence[int]) -> dict[str, Any]:
        """Make calls in turn, each for all processes; a process is left out of those that its
        state does not allow, so that a half-done checkpoint is still unlocked."""
        before = {"Lock": "running", "Checkpoint": "locked", "Restore": "checkpointed"}
        seen: dict[str, Any] = {}
        for call in calls:
            for pid in pids:
                state = self.call("GetState", pid).get("state")
                if state == before.get(call, "locked"):
                    seen[f"{call} {pid}"] = self.call(call, pid)
                else:
                    seen[f"{call} {pid}"] = {"error": f"not tried: {state}"}
        for pid in pids:
            seen[f"state {pid}"] = self.call("GetState", pid).get("state")
        failed = any("error" in answer for answer in seen.values() if isinstance(answer, dict))
        return seen | ({"failed": "a call of the driver"} if failed else {})


def tree(root: int) -> list[int]:
    """The process and all that came of it."""
    parents = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def memory_of(pid: int) -> dict[str, Any]:
    """Name, resident GiB by kind, open GPU device files."""
    proc = pathlib.Path(f"/proc/{pid}")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
    row: dict[str, Any] = {"name": status["Name"]}
    for key in ("VmRSS", "RssAnon", "RssFile", "RssShmem", "VmLck"):
        row[key] = round(int(status.get(key, "0 kB").split()[0]) / 2**20, 2)
    links = []
    for link in (proc / "fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(link.readlink()))
    row["nvidia_fds"] = sum("/nvidia" in link for link in links)
    row["threads"] = int(status["Threads"])
    return row


def gpu_used() -> float | None:
    """GiB in use on the first GPU, as nvidia-smi says."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return round(float(done.stdout.splitlines()[0]) / 1024, 2)
    return None


def state_now() -> dict[str, Any]:
    """GPU and host memory: of every process of ours, and of the machine."""
    processes = {}
    for pid in tree(os.getpid()):
        with contextlib.suppress(OSError):
            processes[str(pid)] = memory_of(pid)
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    meminfo = {line.split(":")[0]: int(line.split()[1]) / 2**20 for line in lines}
    return {
        "gpu_gib": gpu_used(),
        "host_available_gib": round(meminfo["MemAvailable"], 1),
        "processes": processes,
    }


if __name__ == "__main__":
    serve_driver()
