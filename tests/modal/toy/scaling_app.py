"""Functions that differ in when their idle containers go."""

import os

import modal

app = modal.App("scaling")
image = modal.Image.debian_slim()


@app.function(image=image, scaledown_window=2)
def brief() -> int:
    return os.getpid()


@app.function(image=image, scaledown_window=2, min_containers=1)
def warm() -> int:
    return os.getpid()
