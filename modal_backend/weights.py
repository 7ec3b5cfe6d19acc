"""Finds the weights of a model on this machine and identifies them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kalm_integrations.errors import ConfigurationError, EngineLoadError
from kalm_integrations.models import KALM, PROFILES, profile_of

INT8: Final = "int8"
"""The quantization whose weights `kalm quantize` writes."""

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_NOT_THE_MODEL: Final = frozenset({".md", ".png", ".jpg", ".lock", ".log"})
_RESUME: Final = "run the download again; it resumes where it stopped"


@dataclass(frozen=True, slots=True)
class Weights:
    """A model on this machine."""

    name: str  # its public name
    revision: str  # the commit of its repository, or "sha256:" and the digest of its files
    folder: Path

    @property
    def size(self) -> int:
        """Bytes of the files that vLLM loads."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its container's limit."""
    file = Path("/sys/fs/cgroup/memory.max")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = file.read_text().strip() if file.is_file() else ""
    return min(memory, int(limit)) if limit.isdigit() else memory


def locate(model: str, revision: str | None = None, quantization: str = "none") -> Weights:
    """Find a model on this machine without downloading anything.

    Args:
        model: A folder, or the name of a repository in the Hugging Face cache.
        revision: Of the repository; None is the pinned one, or "main".
        quantization: "int8" finds what `kalm quantize` has made of it; any other is converted from
            the original weights while they are loaded.

    Raises:
        ConfigurationError: A folder with a revision.
        EngineLoadError: The model is missing or incomplete; the message names the remedy.
    """
    folder = Path(model).expanduser()
    commit = revision or pinned_revision(model)
    if quantization == INT8 and not folder.is_dir() and _COMMIT.fullmatch(commit):
        return _quantized(model, commit)  # without the original weights
    if folder.is_dir():
        if revision is not None:
            raise ConfigurationError(
                f"revision={revision!r}: {model} is a folder, whose files have no other revision. "
                "Drop the revision."
            )
        weights = _in_folder(folder.resolve())
    elif model.startswith((".", "/", "~")):
        raise EngineLoadError(f"{model} is not a folder.")
    else:
        weights = _in_cache(model, commit)
    _check_complete(weights.folder)
    return _quantized(weights.name, weights.revision) if quantization == INT8 else weights


def quantized_folder(name: str, revision: str) -> Path:
    """Return the folder of a model's int8 weights, in Hugging Face's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / "kalm-int8" / name.replace("/", "--") / revision.replace(":", "-")


def _quantized(name: str, revision: str) -> Weights:
    folder = quantized_folder(name, revision)
    if not (folder / "config.json").is_file():
        command = "`kalm quantize` with the same --model and --revision"
        if "MODAL_TASK_ID" in os.environ:
            variable = "" if name == KALM.space.model else f"KALM_DEPLOY_MODEL={name} "
            run = f"{variable}modal run -m modal_backend.app::quantize_model_weights"
            command = f"`{run}`, then `kalm deploy` again"
        missing = EngineLoadError(
            f"the int8 weights of {name} at {revision} are not in {folder}, or are incomplete. "
            f"Write them: {command}."
        )
        missing.permanent = True  # a mounted Volume stays as it was when the container started
        raise missing
    _check_complete(folder)
    return Weights(name, revision, folder)


def pinned_revision(model: str) -> str:
    """Return the tested commit of a known model; "main" for any other."""
    space = profile_of(model).space
    return space.revision if space.declared else "main"


def _in_cache(model: str, revision: str) -> Weights:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except HFValidationError as error:
        raise EngineLoadError(
            f"{model!r} is neither a folder nor the name of a repository."
        ) from error
    except (FileNotFoundError, HfHubHTTPError) as error:
        missing = EngineLoadError(_missing(model, revision))
        # A mounted Volume stays as it was when the container started.
        missing.permanent = isinstance(error, FileNotFoundError)
        raise missing from error
    return Weights(model, folder.name, folder)


def _missing(model: str, revision: str) -> str:
    if "MODAL_TASK_ID" not in os.environ:  # not in a container of Modal
        return (
            f"the weights of {model} at {revision} are not on this machine. Download them: "
            f"`hf download {model} --revision {revision}`."
        )
    variable = "" if model == KALM.space.model else f"KALM_DEPLOY_MODEL={model} "
    return (
        f"the weights of {model} at {revision} are not in the Volume. Run the download, "
        f"`{variable}modal run -m modal_backend.app::download_model_weights`, then `kalm deploy` "
        "again: without that, every later start loads the model afresh."
    )


def _in_folder(folder: Path) -> Weights:
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        name = repository.removeprefix("models--").replace("--", "/", 1)
        return Weights(name, folder.name, folder)
    for known in (profile.space for profile in PROFILES):
        if folder.name == known.model.rpartition("/")[2]:
            # Without its name it would be run without its prompts and checks.
            raise EngineLoadError(
                f"{folder} looks like {known.model}, but a folder does not tell its commit. Run "
                f"`hf download {known.model} --revision {known.revision}` without --local-dir, and "
                f"pass --model {known.model}."
            )
    return Weights(folder.name, f"sha256:{_digest(folder)}", folder)


def _check_complete(folder: Path) -> None:
    """Check the files: an interrupted download looks like a finished one."""
    from safetensors import SafetensorError, safe_open

    needed = {"config.json"}
    for index in folder.glob("*.index.json"):
        try:
            needed |= set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise EngineLoadError(f"{index} is damaged ({error!r}): {_RESUME}.") from error
    missing = sorted(name for name in needed if not (folder / name).is_file())
    weights = (*folder.glob("*.safetensors"), *folder.glob("*.bin"))
    if not missing and not any(file.is_file() for file in weights):  # a link may be broken
        missing = ["*.safetensors"]
    if missing:
        raise EngineLoadError(f"{folder} lacks {', '.join(missing)}: {_RESUME}.")
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise EngineLoadError(f"{path} is damaged ({error}): {_RESUME}.") from error


def _digest(folder: Path) -> str:
    """SHA-256 of the names and contents of all files that may decide a vector."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or not path.is_file() or path.suffix in _NOT_THE_MODEL:
            continue
        with path.open("rb") as file:
            whole.update(f"{name.as_posix()} ".encode())
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
