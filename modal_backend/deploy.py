"""`kalm deploy`: compare, say what it will cost, deploy, end with the client's snippet."""

from __future__ import annotations

import os
import sys
from typing import Any

import modal
from rich.console import Console
from rich.table import Table

from kalm_integrations.errors import ConfigurationError, KalmError, ModalTokenError
from kalm_integrations.profiles import EMBEDDED
from kalm_integrations.settings import DEFAULT_APP
from modal_backend.settings import DeploySettings
from modal_backend.tags import IDENTITY_TAG, tags_of


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
        raise _ours(error) from error


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
    if settings.engine == "vllm":
        raise ConfigurationError(
            "the vLLM engine is not in this version yet: pass --engine embedded."
        )
    console = Console(file=sys.stdout, highlight=False)
    before = deployed_tags(settings.app_name, settings.environment_name)
    _check_identity(settings, before, accept_new_identity)
    console.print(_costs(settings))
    # The app reads its settings where it is imported: here, and in the container.
    os.environ.update(settings.as_variables())
    from modal_backend.app import app

    try:
        with modal.enable_output():
            app.deploy(environment_name=settings.environment_name)
    except modal.exception.Error as error:
        raise _ours(error) from error
    console.print(_what_next(settings), markup=False)


def _ours(error: Exception) -> KalmError:
    said = f"Modal: {str(error).strip().rstrip('.')}."
    if isinstance(error, modal.exception.AuthError):
        return ModalTokenError(said)
    return KalmError(f"{said} Nothing was deployed.")


def _check_identity(
    settings: DeploySettings, before: dict[str, str] | None, accepted: bool
) -> None:
    now, then = tags_of(settings)[IDENTITY_TAG], (before or {}).get(IDENTITY_TAG)
    if before is None or then == now or accepted:
        return
    was = f"of the space {then}" if then else "of a space that it does not tell"
    raise ConfigurationError(
        f"app {settings.app_name!r} serves vectors {was}; this deployment would serve {now}, and "
        "every index that was made with the old one would be searched wrongly. Give it another "
        "--app-name, or pass --accept-new-identity and embed those indexes again."
    )


def _costs(settings: DeploySettings) -> Table:
    hour = settings.dollars_per_hour
    idle = hour * 24 * settings.min_containers
    table = Table(title=f"What {settings.app_name} will cost", title_justify="left")
    table.add_column("")
    table.add_column("$", justify="right")
    table.add_row("one container, an hour", f"{hour:.2f}")
    table.add_row(
        f"at most ({settings.max_containers} containers), an hour",
        f"{hour * settings.max_containers:.2f}",
    )
    table.add_row(f"idle ({settings.min_containers} containers kept up), a day", f"{idle:.2f}")
    table.add_row(
        f"the wait of {settings.scaledown_window} s after the last call, each time",
        f"{hour * settings.scaledown_window / 3600:.3f}",
    )
    table.caption = "Modal's list prices of November 2026; see modal.com/pricing for today's."
    table.caption_justify = "left"
    return table


def _what_next(settings: DeploySettings) -> str:
    arguments: dict[str, Any] = {}
    if settings.app_name != DEFAULT_APP:
        arguments["app_name"] = settings.app_name
    if settings.environment_name:
        arguments["environment_name"] = settings.environment_name
    if settings.engine == "embedded":
        arguments["model"] = EMBEDDED.space.model
    shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    first = {"embedded": "some 10 seconds", "vllm": "some minutes"}[settings.engine]
    return f"""
Deployed. With your Modal token, over RPC:

    from kalm_integrations import KalmModalEmbeddings

    embeddings = KalmModalEmbeddings({shown})
    print(embeddings.embed_query("How tall is K2?")[:3])

Over HTTP add backend="http" and {_credentials(settings)}.
The first start takes {first} and writes the snapshot; later ones come back from it.

Check it:    kalm doctor --wake
See its log: modal app logs {settings.app_name}
"""


def _credentials(settings: DeploySettings) -> str:
    proxy = "modal_key=, modal_secret= (a proxy token: modal.com/settings/proxy-auth-tokens)"
    key = f"api_key= (KALM_API_KEY of the Secret {settings.api_key_secret!r})"
    return {
        "proxy": proxy,
        "proxy+bearer": f"{proxy} and {key}",
        "bearer-public": f"{key}.\nANYBODY can wake this service over HTTP, and you pay; "
        "--auth proxy prevents it",
    }[settings.auth]
