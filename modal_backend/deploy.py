"""`kalm deploy`: show the cost, compare the identity, deploy, print the client's snippet."""

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
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import KALM
from modal_backend import gpus
from modal_backend.settings import DeploySettings
from modal_backend.tags import DEPLOYABLE, IDENTITY_TAG


class _OtherVectorsError(ConfigurationError):
    """The deployment would change the vectors of existing clients."""

    remedy = (
        "Give it another --app-name, or pass --accept-new-identity and embed those indexes again."
    )


def deployed_tags(app_name: str, environment_name: str | None) -> dict[str, str] | None:
    """Return the tags of the deployed app, or None. Starts no container.

    Raises:
        ModalTokenError: Modal refused the token, or there is none.
        KalmError: Modal failed.
    """
    try:
        app = modal.App.lookup(app_name, environment_name=environment_name)
        return dict(app.get_tags())
    except modal.exception.NotFoundError:
        return None
    except modal.exception.Error as error:
        raise _translate(error, "Nothing was changed; try again.") from error


def deploy(settings: DeploySettings, *, accept_new_identity: bool) -> None:
    """Deploy the app.

    Args:
        settings: Of the deployment.
        accept_new_identity: Replace a deployment with another vector space.

    Raises:
        ConfigurationError: The vectors of existing clients would change; a Secret is missing; a
            variable is unknown.
        ModalTokenError: Modal refused the token, or there is none.
        KalmError: Modal failed.
    """
    variables, prefix = set(settings.variables().values()), settings.variable_prefix
    for name in sorted(name for name in os.environ if name.startswith(prefix)):
        if name not in variables:
            hint = did_you_mean(name, variables)
            raise ConfigurationError(f"{name}: there is no such setting.{hint}")
    console = Console(file=sys.stdout, highlight=False)
    console.print(_costs(settings))
    if settings.canary == "warn":
        console.print(
            "WARNING: --canary warn serves vectors even if the check finds them wrong. Use it to "
            "diagnose only."
        )
    console.print("Asking Modal what is deployed")
    _check_secrets(settings)
    tags = deployed_tags(settings.app_name, settings.environment_name)
    if tags is not None and not accept_new_identity:
        _check_identity(settings, tags.get(IDENTITY_TAG))
    # The app reads its settings when it is imported, here and in the container.
    os.environ.update(settings.as_variables())
    from modal_backend.app import app

    try:
        with modal.enable_output():
            app.deploy(environment_name=settings.environment_name)
    except modal.exception.Error as error:
        raise _translate(error) from error
    console.print(_next_steps(settings), markup=False, soft_wrap=True)


def _check_secrets(settings: DeploySettings) -> None:
    """Look up the Secrets: Modal's own error during the deployment names no remedy."""
    secrets = [(settings.api_key_secret, "KALM_API_KEY")] if settings.needs_bearer else []
    secrets += [(settings.hf_secret, "HF_TOKEN")] if settings.hf_secret and settings.on_gpu else []
    for name, key in secrets:
        try:
            modal.Secret.from_name(
                name, environment_name=settings.environment_name, required_keys=[key]
            ).hydrate()
        except modal.exception.NotFoundError as error:
            raise ConfigurationError(
                f"there is no Secret {name!r} with {key} on Modal. Create it: "
                f"modal secret create {name} {key}=..., for KALM_API_KEY for instance with the "
                "output of `openssl rand -hex 32`."
            ) from error
        except modal.exception.Error as error:
            raise _translate(error) from error


def _translate(error: Exception, outcome: str = "Nothing was deployed.") -> KalmError:
    message = f"Modal: {str(error).strip().rstrip('.')}."
    if isinstance(error, modal.exception.AuthError):
        return ModalTokenError(message)
    return KalmError(f"{message} {outcome}")


def _check_identity(settings: DeploySettings, deployed: str | None) -> None:
    fingerprint = settings.space.fingerprint
    if deployed == fingerprint:
        return
    old = _described(DEPLOYABLE.get(deployed), deployed) if deployed else "an unknown model"
    raise _OtherVectorsError(
        f"app {settings.app_name!r} serves vectors of {old}; this deployment would serve "
        f"{_described(settings.space, fingerprint)}, and every index that was made with the old "
        "one would be searched wrongly."
    )


def _described(space: SpaceIdentity | None, fingerprint: str) -> str:
    if space is None:
        return f"another model or revision (space {fingerprint})"
    computed = f", {space.quantization}" if space.declared else ""
    return f"{space.model}{computed} (space {fingerprint})"


def _costs(settings: DeploySettings) -> Table:
    hour, window = settings.dollars_per_hour, settings.scaledown_window
    least, most = settings.min_containers, settings.max_containers
    table = Table(title=f"What {settings.app_name} will cost", title_justify="left")
    table.add_column("")
    table.add_column("$", justify="right")
    table.add_row("one container, an hour", f"{hour:.2f}")
    table.add_row(f"query service at most (--max-containers {most}), an hour", f"{hour * most:.2f}")
    table.add_row(f"idle (--min-containers {least}), a day", f"{24 * hour * least:.2f}")
    table.add_row(
        f"the wait of {window} s after the last call, each time", f"{hour * window / 3600:.3f}"
    )
    if settings.on_gpu and settings.model == KALM.space.model and not settings.enforce_eager:
        rates = [gpus.rate(name.removesuffix("!"), settings.quantization) for name in settings.gpu]
        kind = "measured" if all(rate.measured for rate in rates) else "calculated"
        million = 1e6 * hour / 3600 / min(rate.tokens for rate in rates)
        table.add_row(f"a million tokens, always busy ({kind})", f"{million:.3f}")
    serve_http = " and serve_http (1)" if settings.on_gpu else ""
    table.caption = (
        f"Bulk jobs ({worker_pool.MAX_CONTAINERS} by default){serve_http} come on top.\n"
        "Modal's list prices of November 2026; see modal.com/pricing for today's.\n"
        "`kalm cost` compares GPUs, for your corpus and your traffic."
    )
    table.caption_justify = "left"
    return table


def _next_steps(settings: DeploySettings) -> str:
    options = settings.client_arguments.items()
    arguments = ", ".join(["backend='modal'", *(f"{name}={value!r}" for name, value in options)])
    variables = "".join(f"KALM_{name.upper()}={shlex.quote(value)} " for name, value in options)
    return f"""
Deployed. With your Modal token, over RPC:

    from kalm_integrations import KalmClient

    client = KalmClient({arguments})
    print(client.embed(["How tall is K2?"], role="query").vectors[0][:3].tolist())

KalmModalEmbeddings of LangChain and of LlamaIndex take the same arguments.
Over HTTP, use backend="http" with {_credentials(settings)}.
{_starts(settings)}

Check it:    {variables}kalm doctor --wake
See its log: modal app logs {settings.app_name} -f
"""


def _starts(settings: DeploySettings) -> str:
    """Durations of starts; those of KaLM on Modal have not been measured."""
    if not settings.on_gpu:
        return "A start takes seconds."
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
        "bearer-public": f"{key}.\nANYBODY can start containers over HTTP at your expense; "
        "--auth proxy prevents that",
    }[settings.auth]
