"""Downloads a model from Hugging Face, with progress for a log and errors that name the remedy."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import Any, Final

from kalm_integrations.errors import EngineLoadError
from modal_backend.weights import Weights, locate, pinned

PROGRESS_SECONDS: Final = 10.0
"""Between two lines about one bar."""
_IGNORED: Final = ["*.gguf", "onnx/*", "openvino/*", "*.msgpack", "*.h5", "*.ot"]
"""Some repositories hold the same weights a second time, in formats that vLLM does not read."""
_RESUME: Final = "Run the download again: it resumes where it stopped."


def download(model: str, revision: str | None = None) -> Weights:
    """Download a repository into the Hugging Face cache; prints a line about it now and then.

    Args:
        model: Name of the repository.
        revision: Of it; None is the one that the model's profile pins, else "main".

    Raises:
        EngineLoadError: It failed, or what arrived is not whole; the message names the remedy.
    """
    from huggingface_hub import snapshot_download

    wanted, started = revision or pinned(model), time.monotonic()
    print(f"Downloading {model} at {wanted}", flush=True)  # noqa: T201
    try:
        snapshot_download(
            model, revision=wanted, ignore_patterns=_IGNORED, tqdm_class=_log_progress()
        )
    except Exception as error:
        raise EngineLoadError(
            f"{model} could not be downloaded ({type(error).__name__}: {error}). "
            f"{_remedy(model, error)}"
        ) from error
    weights = locate(model, wanted)
    seconds = time.monotonic() - started
    print(f"{weights.size / 1e9:.1f} GB are there, after {seconds:.0f} s", flush=True)  # noqa: T201
    return weights


def _remedy(model: str, error: Exception) -> str:
    statuses = set(_statuses(error))
    how = (
        "Create a token at huggingface.co/settings/tokens and a Secret with it, `modal secret "
        "create huggingface HF_TOKEN=...`, and pass its name: `KALM_DEPLOY_HF_SECRET=huggingface "
        "modal run ...` and `kalm deploy --hf-secret huggingface`; outside Modal set HF_TOKEN."
    )
    if 429 in statuses:
        from huggingface_hub import get_token

        limited = "Hugging Face limits how much is downloaded"
        return f"{limited}. Wait. {_RESUME}" if get_token() else f"{limited} without a token. {how}"
    if statuses & {401, 403}:
        return (
            "The repository is gated or private, or there is none of this name. Accept its terms "
            f"at huggingface.co/{model}. {how}"
        )
    if 404 in statuses:
        return "Check the names of the repository and its revision."
    return _RESUME


def _statuses(error: BaseException | None) -> Iterator[int]:
    """HTTP statuses of an error and of those that caused it."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            yield status
        error = error.__cause__ or error.__context__


def _log_progress() -> type[Any]:
    """A class of progress bars that prints lines: Hugging Face's own show nothing in a log."""
    from tqdm import tqdm

    class LogProgress(tqdm):  # type: ignore[misc]
        shown = 0.0

        def __init__(self, *args: Any, **options: Any) -> None:
            self.shown = time.monotonic()
            super().__init__(*args, **(options | {"file": io.StringIO(), "mininterval": 1.0}))

        def display(self, *_: Any, **__: Any) -> bool:
            now = time.monotonic()
            if self.unit == "B" and self.n and now - self.shown >= PROGRESS_SECONDS:
                self.shown = now
                rate = (self.format_dict["rate"] or 0.0) / 1e6
                of = f" of {self.total / 1e9:.1f}" if self.total else ""
                print(f"{self.n / 1e9:.1f}{of} GB, {rate:.0f} MB/s", flush=True)  # noqa: T201
            return True

    return LogProgress
