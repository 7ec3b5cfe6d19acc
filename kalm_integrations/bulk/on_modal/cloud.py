"""Modal's side of a job: the deployment, its Volume, its queue, and a look at whether it runs."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from kalm_integrations.bulk.on_modal import records
from kalm_integrations.bulk.on_modal.records import Store
from kalm_integrations.bulk.on_modal.state import State
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import IdentityMismatchError, KalmError, NotDeployedError
from kalm_integrations.transports.modal import deployed, error_of

_PROBED: Final = 8
"""Shards that Modal is asked about: do they still wait or run?"""


@dataclass(frozen=True)
class Deployment:
    """An app on Modal that runs bulk jobs, and the Volume that has them."""

    config: ClientConfig
    volume: Any
    volume_name: str

    def store(self, job: str) -> VolumeStore:
        """A job's folder."""
        return VolumeStore(self.volume, job, self.config)


def find(config: ClientConfig) -> Deployment:
    """The deployment that `config` names. Starts no container.

    Raises:
        NotDeployedError: There is none, or one that is too old for bulk jobs.
        IdentityMismatchError: Its vectors are not the expected ones.
        ModalTokenError: Modal refused the token, or there is none.
        ConfigurationError: Modal's package is missing.
    """
    deployed(config)  # Modal's client is installed, and logs no token from here on
    import modal

    from modal_backend.deploy import deployed_tags
    from modal_backend.tags import BULK_TAG, IDENTITY_TAG

    with translated(config):
        tags = deployed_tags(config.app_name, config.environment_name)
    if tags is None or BULK_TAG not in tags:
        what = "there is no" if tags is None else "this version takes no bulk jobs in"
        raise NotDeployedError(f"{what} app {config.app_name!r} on Modal.")
    expected = config.expected_space
    if expected.declared and tags.get(IDENTITY_TAG) != expected.fingerprint:
        raise IdentityMismatchError(
            f"app {config.app_name!r} was deployed for vectors of the space "
            f"{tags.get(IDENTITY_TAG)}, and {expected.fingerprint} ({expected.model}) is expected. "
            "For what is deployed set the variables that `kalm deploy` showed at its end."
        )
    volume = modal.Volume.from_name(
        tags[BULK_TAG], environment_name=config.environment_name, create_if_missing=True, version=2
    )
    return Deployment(config, volume, tags[BULK_TAG])


class VolumeStore:
    """A job's folder through Modal's API: nothing is mounted here."""

    def __init__(self, volume: Any, job: str, config: ClientConfig) -> None:
        self._volume, self._config = volume, config
        self._folder = f"/{records.JOBS}/{job}"

    def names(self, folder: str) -> dict[str, tuple[int, int]]:
        import modal

        with translated(self._config):
            try:
                found = self._volume.listdir(f"{self._folder}/{folder}")
            except modal.exception.NotFoundError:
                return {}
        return {PurePosixPath(entry.path).name: (entry.size, entry.mtime) for entry in found}

    def read(self, path: str) -> bytes:
        return b"".join(self.blocks(path))

    def write(self, files: Mapping[str, bytes | Path]) -> None:
        with translated(self._config), self._volume.batch_upload(force=True) as batch:
            for name, content in files.items():
                local = io.BytesIO(content) if isinstance(content, bytes) else content
                batch.put_file(local, f"{self._folder}/{name}")

    def blocks(self, path: str) -> Iterator[bytes]:
        """A file's content, of any size."""
        with translated(self._config):
            yield from self._volume.read_file(f"{self._folder}/{path}")


@contextmanager
def translated(config: ClientConfig) -> Iterator[None]:
    """Raise errors of Modal's client as ours; our own and a disk's as they are."""
    try:
        yield
    except (KalmError, FileNotFoundError):
        raise
    except OSError as error:
        if error.filename is not None:  # of a local file that is uploaded
            raise
        raise error_of(error, config) from error
    except Exception as error:
        raise error_of(error, config) from error


def is_alive(deployment: Deployment, state: State) -> bool:
    """Whether Modal still has shards of the newest run, waiting or running."""
    import modal
    from grpclib import GRPCError

    if state.run is None or state.over or not state.run.call:
        return False
    unreachable = (
        GRPCError,
        OSError,
        modal.exception.ConnectionError,
        modal.exception.ClientClosed,
    )
    with translated(deployment.config):
        call = modal.FunctionCall.from_id(state.run.call)
        for number in state.waiting[:_PROBED]:
            try:
                call.get(timeout=0, index=state.run.shards.index(number))
            except TimeoutError:
                return True
            except modal.exception.NotFoundError:
                return False
            except unreachable:
                raise
            except (Exception, modal.exception.InputCancellation):  # noqa: BLE001, S112
                continue  # what the shard ended with; it has no record
    return False


def cancel_run(deployment: Deployment, store: Store, state: State) -> None:
    """End the newest run; finished shards stay."""
    import modal

    if state.over or state.run is None:
        return
    records.write_stop(store, state.run.id, "cancelled", "It was cancelled.")
    if state.run.call:
        with translated(deployment.config):
            modal.FunctionCall.from_id(state.run.call).cancel()
