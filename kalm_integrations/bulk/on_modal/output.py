"""The folder that a job on Modal is fetched into: it remembers whose it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from kalm_integrations.bulk import shards
from kalm_integrations.bulk.manifest import Job, Manifest, check_same, replace_file
from kalm_integrations.bulk.on_modal import job_state
from kalm_integrations.errors import ConfigurationError

NOTE: Final = "modal-job.json"


def claim(folder: Path, name: str, job: Job | None) -> None:
    """Note that a folder is a job's.

    Args:
        folder: Made if it is not there.
        name: Of the job.
        job: What it is, where that is known.

    Raises:
        ConfigurationError: It holds another job.
        IdentityMismatchError: It holds vectors of another space.
    """
    manifest, noted = Manifest.read(folder), _noted(folder)
    if manifest is not None and job is not None:
        check_same(manifest.job, job, folder)
    elif noted not in (None, name) or (noted is None and any(folder.glob(f"{shards.FOLDER}/*"))):
        raise ConfigurationError(
            f"{folder} holds {noted or 'shards of another job'}: name another --output."
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / NOTE, json.dumps({"job": name}).encode())


def named(word: str) -> str:
    """The job that is meant: its name, or a folder that is one's.

    Raises:
        ConfigurationError: It is neither.
    """
    noted = _noted(Path(word).expanduser())
    if noted is None and Manifest.read(Path(word).expanduser()) is not None:
        raise ConfigurationError(
            f"{word!r} is the output of a local job: its manifest.json says how far that is, and "
            "the same command goes on with it."
        )
    if noted is None and not job_state.is_job_name(word):
        raise ConfigurationError(
            f"{word!r} is neither a job's name, like embed-0123456789abcdef, nor an --output of "
            "`kalm embed --on modal`."
        )
    return noted or word


def _noted(folder: Path) -> str | None:
    try:
        found = json.loads((folder / NOTE).read_bytes())["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) and job_state.is_job_name(found) else None
