"""Runs in a container in place of `python -m modal._container_entrypoint`.

Modal's runtime reads two files of its sandbox, under /proc/gvisor: this points it to stand-ins for
them. It needs nothing but `modal`, and is passed to `python -c`.
"""

import os
import runpy
import signal
import sys
import threading
from pathlib import Path

from modal._runtime import gpu_memory_snapshot, task_lifecycle_manager

environ_path, checkpoint_path, lifeline = sys.argv[1:4]


def end_with_the_emulator(pipe: int) -> None:
    os.read(pipe, 1)  # nothing is ever written: this is its end
    os.killpg(0, signal.SIGKILL)


os.set_inheritable(int(lifeline), False)
threading.Thread(target=end_with_the_emulator, args=[int(lifeline)], daemon=True).start()
task_lifecycle_manager.SPEC_ENVIRON_PATH = environ_path
gpu_memory_snapshot.RUNTIME_CHECKPOINT_WAIT_PATH = checkpoint_path
sys.argv[1:] = []
sys.path[0] = str(Path.cwd())  # as `python -m` has it
runpy.run_module("modal._container_entrypoint", run_name="__main__", alter_sys=True)
