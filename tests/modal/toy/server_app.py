"""A server of files: `@app.server` with a process that listens on a port."""

import os
import subprocess
import sys

import modal

app = modal.App("server")
PORT = int(os.environ.get("TOY_PORT", "8000"))


@app.server(port=PORT, image=modal.Image.debian_slim())
class Files:
    @modal.enter()
    def listen(self) -> None:
        command = [sys.executable, "-m", "http.server", str(PORT), "--bind", "127.0.0.1"]
        self.process = subprocess.Popen(command)

    @modal.exit()
    def close(self) -> None:
        self.process.terminate()
