"""Downloads a model from Hugging Face; logs progress, and errors name the remedy."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import Any, Final

from kalm_integrations.errors import EngineLoadError
from modal_backend.weights import Weights, locate, pinned_revision

PROGRESS_SECONDS: Final = 10.0
"""Between two lines about one file."""
_IGNORED: Final = ["*.gguf", "onnx/*", "openvino/*", "*.msgpack", "*.h5", "*.ot"]
"""The same weights in formats that vLLM does not read."""
_RESUME: Final = "Run the download again: it resumes where it stopped."


def download(model: str, revision: str | None = None) -> Weights:
    """Download a repository into the Hugging Face cache and print progress.

    Args:
        model: Name of the repository.
        revision: None is the pinned one, or "main".

    Raises:
        EngineLoadError: The download failed or is incomplete; the message names the remedy.
    """
    from huggingface_hub import snapshot_download

    revision, start = revision or pinned_revision(model), time.monotonic()
    print(f"Downloading {model} at {revision}", flush=True)  # noqa: T201
    try:
        snapshot_download(
            model, revision=revision, ignore_patterns=_IGNORED, tqdm_class=_log_progress()
        )
    except Exception as error:
        raise EngineLoadError(
            f"{model} could not be downloaded ({type(error).__name__}: {error}). "
            f"{_remedy(model, error)}"
        ) from error
    weights = locate(model, revision)
    seconds = time.monotonic() - start
    print(f"{weights.size / 1e9:.1f} GB are there, after {seconds:.0f} s", flush=True)  # noqa: T201
    return weights


def _remedy(model: str, error: Exception) -> str:
    statuses = set(_statuses(error))
    advice = (
        "Create a token at huggingface.co/settings/tokens and a Secret with it, `modal secret "
        "create huggingface HF_TOKEN=...`, and pass its name: `KALM_DEPLOY_HF_SECRET=huggingface "
        "modal run ...` and `kalm deploy --hf-secret huggingface`; outside Modal set HF_TOKEN."
    )
    if 429 in statuses:
        from huggingface_hub import get_token

        message = "Hugging Face limits how much is downloaded"
        return (
            f"{message}. Wait. {_RESUME}" if get_token() else f"{message} without a token. {advice}"
        )
    if statuses & {401, 403}:
        return (
            "The repository is gated or private, or there is none of this name. Accept its terms "
            f"at huggingface.co/{model}. {advice}"
        )
    if 404 in statuses:
        return "Check the names of the repository and its revision."
    return _RESUME


def _statuses(error: BaseException | None) -> Iterator[int]:
    """HTTP statuses of an error and its causes."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            yield status
        error = error.__cause__ or error.__context__


def _log_progress() -> type[Any]:
    """Return a progress bar that prints lines; Hugging Face's own shows nothing in a log."""
    from tqdm import tqdm

    class LogProgress(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            self.printed = time.monotonic()
            super().__init__(*args, **(options | {"file": io.StringIO(), "mininterval": 1.0}))

        def display(self, *_: Any, **__: Any) -> bool:
            now = time.monotonic()
            if self.unit == "B" and self.n and now - self.printed >= PROGRESS_SECONDS:
                self.printed = now
                rate = (self.format_dict["rate"] or 0.0) / 1e6
                total = f" of {self.total / 1e9:.1f}" if self.total else ""
                print(f"{self.n / 1e9:.1f}{total} GB, {rate:.0f} MB/s", flush=True)  # noqa: T201
            return True

    return LogProgress
