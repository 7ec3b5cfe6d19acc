"""vLLM 0.32's `AsyncLLM` behind our protocol: KaLM on a GPU, or any embedding model that vLLM runs.

`config` says what is asked for and compares it with what `extension` finds in the loaded model;
`process` starts and ends vLLM; `tokenizer` makes token ids of texts; `engine` is the engine.
"""
