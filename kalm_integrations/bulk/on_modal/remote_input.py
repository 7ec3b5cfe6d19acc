"""An input that lies on Modal or in a bucket: split there, by a function of the app."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

from kalm_integrations.bulk.job_spec import Options, Terms
from kalm_integrations.bulk.on_modal import job_state, worker_pool
from kalm_integrations.bulk.on_modal.deployment import Place, translated
from kalm_integrations.bulk.on_modal.store import Store
from kalm_integrations.errors import (
    ConfigurationError,
    ContainerFailedError,
    JobFailedError,
    KalmError,
)
from kalm_integrations.protocol import error_from_fields

SCHEMES: Final = ("modal", "s3")


@dataclass(frozen=True, kw_only=True)
class Remote:
    """`modal://VOLUME/path` or `s3://BUCKET/path`.

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
    def read(cls, source: str, secret: str | None) -> Remote | None:
        """What `source` names; None if it is no such address.

        Raises:
            ConfigurationError: It names no Volume, no bucket or no path.
        """
        scheme, divided, rest = source.partition("://")
        if not divided or scheme not in SCHEMES:
            return None
        name, _, path = rest.partition("/")
        if not name or not path.strip("/") or ".." in path.split("/"):
            raise ConfigurationError(
                f"{source} is not like modal://VOLUME/path or s3://BUCKET/path."
            )
        if secret is not None and scheme != "s3":
            raise ConfigurationError("--bucket-secret is for s3://BUCKET/path.")
        return cls(typed=source, scheme=scheme, name=name, path=path.strip("/"), secret=secret)

    def mount(self, environment_name: str | None) -> Any:
        """What the function sees of it: read only."""
        import modal

        if self.scheme == "modal":
            volume = modal.Volume.from_name(self.name, environment_name=environment_name)
            return volume.with_mount_options(read_only=True)
        secret = None
        if self.secret is not None:
            secret = modal.Secret.from_name(self.secret, environment_name=environment_name)
        return modal.CloudBucketMount(self.name, secret=secret, read_only=True)

    def job_name(self, options: Options, decided: Terms) -> str:
        """Of the job: the input's content is not known here, so it is its address that counts."""
        address = f"{self.scheme}://{self.name}/{self.path}"
        asked = {"source": address, "options": _deciding(options), "terms": asdict(decided)}
        return job_state.job_name(asked)

    def prepare(
        self, place: Place, job: str, options: Options, decided: Terms, max_containers: int
    ) -> None:
        """Have the input split and sent. Returns at once; `prepared` tells how it goes.

        Raises:
            ConfigurationError: There is no such Volume, or it is the jobs' own.
            KalmError: Modal failed.
        """
        import modal

        if self.scheme == "modal" and self.name == place.volume_name:
            raise ConfigurationError(
                f"{self.typed}: the jobs' own Volume; put the input into another one."
            )
        environment = place.settings.environment_name
        asked = {
            "job": job,
            "path": self.path,
            "volume": self.name if self.scheme == "modal" else None,
            "source": self.typed,
            "options": _deciding(options),
            "terms": asdict(decided),
            "queue": place.queue(max_containers).to_dict(),
        }
        with translated(place.settings):
            found = modal.Function.from_name(
                place.settings.app_name, worker_pool.PREPARE, environment_name=environment
            )
            volumes: Any = {
                worker_pool.VOLUME: place.volume,
                worker_pool.INPUT: self.mount(environment),
            }
            call = found.with_options(volumes=volumes).spawn(asked)
        noted = {"call": call.object_id, "source": self.typed}
        place.store(job).write({job_state.PREPARING: json.dumps(noted).encode()})


def prepared(place: Place, store: Store) -> bool:
    """Whether the newest preparation is done.

    Raises:
        KalmError: What it failed with.
        JobFailedError: It was ended, or nobody began one.
    """
    import modal

    try:
        noted = json.loads(store.read(job_state.PREPARING))
    except FileNotFoundError:
        raise JobFailedError(
            f"in the Volume {place.volume_name!r} is no such job, or its upload was interrupted: "
            "the same command goes on with it. If there should be one, check its name, "
            "KALM_APP_NAME and KALM_ENVIRONMENT_NAME."
        ) from None
    try:
        with translated(place.settings):
            try:
                said = modal.FunctionCall.from_id(noted["call"]).get(timeout=0)
            except modal.exception.OutputExpiredError:
                return True  # of long ago: what it wrote is there
            except TimeoutError:
                return False
    except ContainerFailedError as error:
        raise JobFailedError(f"{noted['source']} could not be prepared: {error}") from error
    if "error" in said:
        raise error_from_fields(said["error"])
    return True


def cancel(place: Place, store: Store) -> bool:
    """End the preparation, if one is on its way; whether one was."""
    import modal

    try:
        if prepared(place, store):
            return False
    except KalmError:
        return False  # it has ended, or there was none
    with translated(place.settings):
        call = json.loads(store.read(job_state.PREPARING))["call"]
        modal.FunctionCall.from_id(call).cancel()
    return True


def _deciding(options: Options) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name != "dollars_per_second"}
