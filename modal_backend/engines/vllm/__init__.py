"""The vLLM engine: vLLM 0.32's `AsyncLLM`, with KaLM or any embedding model that vLLM runs."""
