"""The weights: downloaded once, by a function without a GPU, into a volume."""

from __future__ import annotations

from kalm_integrations.profiles import KALM


def download() -> str:
    """Download KaLM's weights into the Hugging Face cache, with progress bars.

    Returns:
        The folder that holds them.
    """
    from huggingface_hub import snapshot_download

    # The card names this branch for vLLM.
    return str(snapshot_download(KALM.space.model, revision="CausalLM"))
