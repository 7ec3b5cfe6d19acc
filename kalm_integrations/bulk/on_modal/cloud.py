"""Modal's side of a job: the deployment, its Volume, its queue, and a look at whether it runs."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from kalm_integrations.bulk.on_modal import state as job_state
from kalm_integrations.bulk.on_modal import worker_pool
from kalm_integrations.bulk.on_modal.queue import Queue, call_of
from kalm_integrations.bulk.on_modal.state import Call, Run, State, Store
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import (
    ConfigurationError,
    ContainerFailedError,
    IdentityMismatchError,
    JobFailedError,
    KalmError,
    NotDeployedError,
)
from kalm_integrations.protocol import error_from_fields
from kalm_integrations.transports.modal import deployed, error_of

_PROBED: Final = 8
"""Shards that Modal is asked about: do they still wait or run?"""


@dataclass(frozen=True)
class Deployment:
    """An app on Modal that runs bulk jobs.

    Attributes:
        config: With its name, its environment, and the vectors that are expected.
        volume: Modal's handle of the Volume with the jobs.
        volume_name: Its name.
    """

    config: ClientConfig
    volume: Any
    volume_name: str

    def store(self, job: str) -> VolumeStore:
        """A job's folder."""
        return VolumeStore(self.volume, job, self.config)

    def queue(self, run: Run) -> Queue:
        """Where this deployment takes shards, with the limits of `run`."""
        return Queue(self.config.app_name, self.config.environment_name, run)


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
        self._folder = f"/{job_state.JOBS}/{job}"

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


def is_alive(deployment: Deployment, store: Store, state: State) -> bool:
    """Whether Modal still has shards of the newest run, waiting or running."""
    import modal
    from grpclib import GRPCError

    if state.run is None or state.over:
        return False
    unreachable = (
        GRPCError,
        OSError,
        modal.exception.ConnectionError,
        modal.exception.ClientClosed,
    )
    with translated(deployment.config):
        call = call_of(store, f"{job_state.RUNS}/{state.run.id}/{job_state.CALL}")
        for number in state.waiting[:_PROBED] if call is not None else ():
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
    if state.over or state.run is None:
        return
    stop = job_state.Stop(reason="cancelled", message="It was cancelled.")
    folder = f"{job_state.RUNS}/{state.run.id}"
    store.write({f"{folder}/{job_state.STOPPED}": stop.to_bytes()})
    with translated(deployment.config):
        call = call_of(store, f"{folder}/{job_state.CALL}")
        if call is not None:
            call.cancel()


# --- an input on Modal or in a bucket


@dataclass(frozen=True, kw_only=True)
class RemoteInput:
    """`modal://VOLUME/path` or `s3://BUCKET/path`: split there, by a function of the app.

    Attributes:
        typed: As it was typed.
        scheme: "modal" or "s3".
        name: Of the Volume or the bucket.
        path: Within it.
        secret: The Modal Secret with the bucket's credentials.
    """

    typed: str
    scheme: str
    name: str
    path: str
    secret: str | None = None

    @classmethod
    def parse(cls, source: str, secret: str | None) -> RemoteInput | None:
        """What `source` names; None if it is a local input.

        Raises:
            ConfigurationError: It names no Volume, no bucket or no path.
        """
        scheme, _, rest = source.partition("://")
        if scheme not in ("modal", "s3") or not rest:
            return None
        name, _, path = rest.partition("/")
        if not name or not path.strip("/") or ".." in path.split("/"):
            raise ConfigurationError(
                f"{source} is not like modal://VOLUME/path or s3://BUCKET/path."
            )
        return cls(typed=source, scheme=scheme, name=name, path=path.strip("/"), secret=secret)

    @property
    def address(self) -> str:
        """It stands for the files, whose content is not known here."""
        return f"{self.scheme}://{self.name}/{self.path}"

    def prepare(
        self, deployment: Deployment, job: str, limits: Run, request: dict[str, Any]
    ) -> None:
        """Have the input split and sent. Returns at once; `is_prepared` tells how it goes.

        Raises:
            ConfigurationError: There is no such Volume, or it is the jobs' own.
            KalmError: Modal failed.
        """
        import modal

        if self.scheme == "modal" and self.name == deployment.volume_name:
            raise ConfigurationError(
                f"{self.typed}: the jobs' own Volume; put the input into another one."
            )
        environment = deployment.config.environment_name
        request |= {
            "job": job,
            "path": self.path,
            "volume": self.name if self.scheme == "modal" else None,
            "environment": environment,
            "app": deployment.config.app_name,
            "source": self.typed,
            "limits": limits.model_dump(),
        }
        with translated(deployment.config):
            found = modal.Function.from_name(
                deployment.config.app_name, worker_pool.PREPARE, environment_name=environment
            )
            mounts: Any = {
                worker_pool.VOLUME: deployment.volume,
                worker_pool.INPUT: self._mount(environment),
            }
            call = found.with_options(volumes=mounts).spawn(request)
        noted = Call(call=call.object_id, source=self.typed)
        deployment.store(job).write({job_state.PREPARING: noted.to_bytes()})

    def _mount(self, environment_name: str | None) -> Any:
        import modal

        if self.scheme == "modal":
            volume = modal.Volume.from_name(self.name, environment_name=environment_name)
            return volume.with_mount_options(read_only=True)
        secret = None
        if self.secret is not None:
            secret = modal.Secret.from_name(self.secret, environment_name=environment_name)
        return modal.CloudBucketMount(self.name, secret=secret, read_only=True)


def is_prepared(deployment: Deployment, store: Store) -> bool:
    """Whether the newest preparation is done.

    Raises:
        KalmError: What it failed with.
        JobFailedError: It was ended, or nobody began one.
    """
    import modal

    try:
        noted = Call.from_bytes(store.read(job_state.PREPARING), job_state.PREPARING)
    except FileNotFoundError:
        raise JobFailedError(
            f"in the Volume {deployment.volume_name!r} is no such job, or its upload was "
            "interrupted: run the same command again to resume it. Otherwise check the job's name, "
            "KALM_APP_NAME and KALM_ENVIRONMENT_NAME."
        ) from None
    try:
        with translated(deployment.config):
            try:
                answer = modal.FunctionCall.from_id(noted.call).get(timeout=0)
            except modal.exception.OutputExpiredError:
                return True  # of long ago: what it wrote is there
            except TimeoutError:
                return False
    except ContainerFailedError as error:
        raise JobFailedError(f"{noted.source} could not be prepared: {error}") from error
    if "error" in answer:
        raise error_from_fields(answer["error"])
    return True


def cancel_preparation(deployment: Deployment, store: Store) -> bool:
    """End the preparation, if one is under way; whether one was."""
    try:
        if is_prepared(deployment, store):
            return False
    except KalmError:
        return False  # it has ended, or there was none
    with translated(deployment.config):
        call_of(store, job_state.PREPARING).cancel()
    return True
