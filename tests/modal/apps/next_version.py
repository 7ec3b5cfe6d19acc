"""The app as it will be deployed with vLLM: this version has no engine for it, and refuses."""

from modal_backend import engines

engines.AVAILABLE = frozenset({"embedded", "vllm"})  # type: ignore[misc]

from modal_backend.app import app  # noqa: E402

__all__ = ["app"]
