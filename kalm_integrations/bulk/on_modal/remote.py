"""An input on Modal or in a bucket, which `prepare_bulk` in the app splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kalm_integrations.bulk.on_modal import records, worker_pool
from kalm_integrations.bulk.on_modal.cloud import Deployment, translated
from kalm_integrations.bulk.on_modal.records import Preparation, Run, Store
from kalm_integrations.errors import (
    ConfigurationError,
    ContainerFailedError,
    JobFailedError,
    KalmError,
)
from kalm_integrations.protocol import error_from_fields


@dataclass(frozen=True, kw_only=True)
class RemoteInput:
    """`modal://VOLUME/path` or `s3://BUCKET/path`, as it was typed; and the Modal Secret with the
    bucket's credentials."""

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
        noted = Preparation(call=call.object_id, source=self.typed)
        deployment.store(job).write({records.PREPARING: noted.to_bytes()})

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
        noted = _noted(store)
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
    import modal

    with translated(deployment.config):
        modal.FunctionCall.from_id(_noted(store).call).cancel()
    return True


def _noted(store: Store) -> Preparation:
    return Preparation.from_bytes(store.read(records.PREPARING), records.PREPARING)
