"""The deployment that a job runs in: what it says of itself without a container, and its Volume."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kalm_integrations.bulk.on_modal import job_state
from kalm_integrations.bulk.on_modal.queue import Queue
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import IdentityMismatchError, KalmError, NotDeployedError
from kalm_integrations.transports.modal import deployed, error_of


@dataclass(frozen=True)
class Place:
    """An app on Modal that can run bulk jobs.

    Attributes:
        settings: With its name, its environment, and the vectors that are expected.
        volume: Modal's handle of the Volume with the jobs.
        volume_name: Its name.
    """

    settings: ClientConfig
    volume: Any
    volume_name: str

    def queue(self, max_containers: int) -> Queue:
        """Where this deployment takes shards."""
        return Queue(
            app_name=self.settings.app_name,
            environment_name=self.settings.environment_name,
            max_containers=max_containers,
        )

    def store(self, job: str) -> VolumeStore:
        """A job's folder."""
        return VolumeStore(self.volume, job, self.settings)


def find(settings: ClientConfig) -> Place:
    """The deployment that `settings` names. Starts no container.

    Raises:
        NotDeployedError: There is none, or one that is too old for bulk jobs.
        IdentityMismatchError: Its vectors are not those that are expected.
        ModalTokenError: Modal refused the token, or there is none.
        ConfigurationError: Modal's package is missing.
    """
    deployed(settings)  # Modal's client is installed, and logs no token from here on
    import modal

    from modal_backend.deploy import deployed_tags
    from modal_backend.tags import BULK_TAG, IDENTITY_TAG

    with translated(settings):
        tags = deployed_tags(settings.app_name, settings.environment_name)
    if tags is None or BULK_TAG not in tags:
        what = "there is no" if tags is None else "this version takes no bulk jobs in"
        raise NotDeployedError(f"{what} app {settings.app_name!r} on Modal.")
    expected = settings.expected_space
    if expected.declared and tags.get(IDENTITY_TAG) != expected.fingerprint:
        raise IdentityMismatchError(
            f"app {settings.app_name!r} was deployed for vectors of the space "
            f"{tags.get(IDENTITY_TAG)}, and {expected.fingerprint} ({expected.model}) is expected. "
            "For what is deployed set the variables that `kalm deploy` showed at its end."
        )
    volume = modal.Volume.from_name(
        tags[BULK_TAG],
        environment_name=settings.environment_name,
        create_if_missing=True,
        version=2,
    )
    return Place(settings, volume, tags[BULK_TAG])


class VolumeStore:
    """A job's folder through Modal's API: nothing is mounted here."""

    def __init__(self, volume: Any, job: str, settings: ClientConfig) -> None:
        self._volume = volume
        self._folder = f"/{job_state.JOBS}/{job}"
        self._settings = settings

    def names(self, folder: str) -> dict[str, tuple[int, int]]:
        import modal

        with translated(self._settings):
            try:
                found = self._volume.listdir(f"{self._folder}/{folder}")
            except modal.exception.NotFoundError:
                return {}
        return {PurePosixPath(entry.path).name: (entry.size, entry.mtime) for entry in found}

    def read(self, path: str) -> bytes:
        with translated(self._settings):
            return b"".join(self._volume.read_file(f"{self._folder}/{path}"))

    def write(self, files: Mapping[str, bytes | Path]) -> None:
        with translated(self._settings), self._volume.batch_upload(force=True) as batch:
            for name, content in files.items():
                local = io.BytesIO(content) if isinstance(content, bytes) else content
                batch.put_file(local, f"{self._folder}/{name}")

    def blocks(self, path: str) -> Iterator[bytes]:
        """A file's content, of any size."""
        with translated(self._settings):
            yield from self._volume.read_file(f"{self._folder}/{path}")


@contextmanager
def translated(settings: ClientConfig) -> Iterator[None]:
    """What Modal's client raises, as ours; our own and a disk's errors as they are.

    Raises:
        KalmError: Modal failed.
    """
    try:
        yield
    except (KalmError, FileNotFoundError):
        raise
    except OSError as error:
        if error.filename is not None:  # of a local file that is uploaded
            raise
        raise error_of(error, settings) from error
    except Exception as error:
        raise error_of(error, settings) from error
