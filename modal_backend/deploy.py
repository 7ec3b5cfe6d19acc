"""`kalm deploy`: show the cost, compare, deploy, end with the client's snippet."""

from __future__ import annotations

import os
import shlex
import sys

import modal
from rich.console import Console
from rich.table import Table

from kalm_integrations.bulk.on_modal import worker_pool
from kalm_integrations.environment import did_you_mean
from kalm_integrations.errors import (
    ConfigurationError,
    KalmError,
    ModalTokenError,
    without_sign_in_advice,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import KALM
from modal_backend import gpus
from modal_backend.settings import DeploySettings
from modal_backend.tags import DEPLOYABLE, IDENTITY_TAG, tags_of


class _OtherVectorsError(ConfigurationError):
    """The deployment would change the vectors of clients that exist."""

    remedy = (
        "Give it another --app-name, or pass --accept-new-identity and embed those indexes again."
    )


def deployed_tags(app_name: str, environment_name: str | None) -> dict[str, str] | None:
    """The tags of what is deployed under this name; None if nothing is. Starts no container.

    Raises:
        ModalTokenError: Modal refused the token, or there is none.
    """
    try:
        app = modal.App.lookup(app_name, environment_name=environment_name)
        return dict(app.get_tags())
    except modal.exception.NotFoundError:
        return None
    except modal.exception.Error as error:
        raise _ours(error, "Nothing was changed; try again.") from error


def deploy(settings: DeploySettings, *, accept_new_identity: bool) -> None:
    """Deploy, unless that would change the vectors of clients that exist.

    Args:
        settings: Checked before anything is sent.
        accept_new_identity: Replace a deployment of another vector space.

    Raises:
        ConfigurationError: The vectors would change, and that was not accepted.
        ModalTokenError: Modal refused the token, or there is none.
        KalmError: Modal failed.
    """
    _check_variables()
    console = Console(file=sys.stdout, highlight=False)
    console.print(_costs(settings))
    if settings.canary == "warn":
        console.print(
            "WARNING: --canary warn serves vectors even if the check finds them wrong. Use it to "
            "diagnose only."
        )
    console.print("Asking Modal what is deployed")
    _check_secrets(settings)
    before = deployed_tags(settings.app_name, settings.environment_name)
    _check_identity(settings, before, accept_new_identity)
    # The app reads its settings where it is imported: here, and in the container.
    os.environ.update(settings.as_variables())
    from modal_backend.app import app

    try:
        with modal.enable_output():
            app.deploy(environment_name=settings.environment_name)
    except modal.exception.Error as error:
        raise _ours(error) from error
    console.print(_what_next(settings), markup=False, soft_wrap=True)


def _check_variables() -> None:
    known = set(DeploySettings.variables().values())
    prefix = DeploySettings.variable_prefix
    for name in sorted(os.environ):
        if name.startswith(prefix) and name not in known:
            raise ConfigurationError(
                f"{name}: there is no such setting.{did_you_mean(name, known)}"
            )


def _check_secrets(settings: DeploySettings) -> None:
    """Ask for the Secrets now: once the app is being built, Modal's own words name no remedy."""
    wanted = [(settings.api_key_secret, "KALM_API_KEY")] if settings.needs_bearer else []
    wanted += [(settings.hf_secret, "HF_TOKEN")] if settings.hf_secret and settings.on_gpu else []
    for name, key in wanted:
        try:
            modal.Secret.from_name(
                name, environment_name=settings.environment_name, required_keys=[key]
            ).hydrate()
        except modal.exception.NotFoundError as error:
            raise ConfigurationError(
                f"there is no Secret {name!r} with {key} on Modal. Create it: "
                f"modal secret create {name} {key}=..., for a key of ours for instance the output "
                "of `openssl rand -hex 32`."
            ) from error
        except modal.exception.Error as error:
            raise _ours(error) from error


def _ours(error: Exception, then: str = "Nothing was deployed.") -> KalmError:
    said = f"Modal: {str(error).strip().rstrip('.')}."
    if isinstance(error, modal.exception.AuthError):
        return ModalTokenError(without_sign_in_advice(said))
    return KalmError(f"{said} {then}")


def _check_identity(
    settings: DeploySettings, before: dict[str, str] | None, accepted: bool
) -> None:
    now, then = tags_of(settings)[IDENTITY_TAG], (before or {}).get(IDENTITY_TAG)
    if before is None or then == now or accepted:
        return
    was = f"of {_space(DEPLOYABLE.get(then), then)}" if then else "of an unknown model"
    raise _OtherVectorsError(
        f"app {settings.app_name!r} serves vectors {was}; this deployment would serve "
        f"{_space(settings.space, now)}, and every index that was made with the old one would be "
        "searched wrongly."
    )


def _space(space: SpaceIdentity | None, fingerprint: str) -> str:
    """A vector space, for a message."""
    if space is None:
        return f"another model or revision (space {fingerprint})"
    computed = f", {space.quantization}" if space.declared else ""
    return f"{space.model}{computed} (space {fingerprint})"


def _costs(settings: DeploySettings) -> Table:
    hour = settings.dollars_per_hour
    idle = hour * 24 * settings.min_containers
    table = Table(title=f"What {settings.app_name} will cost", title_justify="left")
    table.add_column("")
    table.add_column("$", justify="right")
    table.add_row("one container, an hour", f"{hour:.2f}")
    table.add_row(
        f"query service at most (--max-containers {settings.max_containers}), an hour",
        f"{hour * settings.max_containers:.2f}",
    )
    table.add_row(f"idle (--min-containers {settings.min_containers}), a day", f"{idle:.2f}")
    table.add_row(
        f"the wait of {settings.scaledown_window} s after the last call, each time",
        f"{hour * settings.scaledown_window / 3600:.3f}",
    )
    if settings.on_gpu and settings.model == KALM.space.model and not settings.enforce_eager:
        rates = [gpus.rate(name.removesuffix("!"), settings.quantization) for name in settings.gpu]
        kind = "measured" if all(rate.measured for rate in rates) else "calculated"
        million = 1e6 * hour / 3600 / min(rate.tokens for rate in rates)
        table.add_row(f"a million tokens, always busy ({kind})", f"{million:.3f}")
    others = f"Bulk jobs ({worker_pool.MAX_CONTAINERS} by default)"
    if settings.on_gpu:
        others += " and serve_http (1)"
    table.caption = (
        f"{others} come on top.\n"
        "Modal's list prices of November 2026; see modal.com/pricing for today's.\n"
        "`kalm cost` compares GPUs, for your corpus and your traffic."
    )
    table.caption_justify = "left"
    return table


def _what_next(settings: DeploySettings) -> str:
    arguments = settings.client_arguments
    shown = ", ".join(["backend='modal'", *(f"{k}={v!r}" for k, v in arguments.items())])
    quoted = {name.upper(): shlex.quote(value) for name, value in arguments.items()}
    variables = "".join(f"KALM_{name}={value} " for name, value in quoted.items())
    return f"""
Deployed. With your Modal token, over RPC:

    from kalm_integrations import KalmClient

    client = KalmClient({shown})
    print(client.embed(["How tall is K2?"], role="query").vectors[0][:3].tolist())

KalmModalEmbeddings of LangChain and of LlamaIndex take the same arguments.
Over HTTP it is backend="http", with {_credentials(settings)}.
{_starts(settings)}

Check it:    {variables}kalm doctor --wake
See its log: modal app logs {settings.app_name} -f
"""


def _starts(settings: DeploySettings) -> str:
    """What to expect of starts; nobody has measured those of KaLM on Modal."""
    if not settings.on_gpu:
        off = " Nothing is snapshotted, because of --snapshot off."
        return "A start takes seconds." + (off if settings.snapshot == "off" else "")
    if settings.snapshot == "off":
        return "Each start loads the model, because of --snapshot off. Allow 5 to 10 minutes."
    return """\
The first three to five starts load the model; allow 5 to 10 minutes for each. They write snapshots,
which later starts restore. Others measured about 70 s for a restored 27 B model in fp8. GPU
snapshots are alpha at Modal: a workspace may lack them, and some restores fail and are retried.
Step by step, with what each step should show: docs/first-deployment.md."""


def _credentials(settings: DeploySettings) -> str:
    proxy = "modal_key=, modal_secret= (a proxy token: modal.com/settings/proxy-auth-tokens)"
    key = f"api_key= (KALM_API_KEY of the Secret {settings.api_key_secret!r})"
    return {
        "proxy": proxy,
        "proxy+bearer": f"{proxy} and {key}",
        "bearer-public": f"{key}.\nANYBODY can wake this service over HTTP, and you pay; "
        "--auth proxy prevents it",
    }[settings.auth]
