"""Checks of a service over HTTP: name, port, certificate, and whether it accepts our keys."""

from __future__ import annotations

import socket
import ssl
from functools import partial
from http.client import HTTPException
from typing import Final
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from kalm_integrations.client import KalmClient
from kalm_integrations.doctor import service
from kalm_integrations.doctor.base import KEYS, LIMIT, Check, DoctorContext, Result, fail, warn
from kalm_integrations.errors import ConfigurationError

MODAL: Final = ".modal.run"
"""Modal's domain; services below it may be asleep."""
_MODAL_KEYS: Final = (
    "Set KALM_MODAL_KEY and KALM_MODAL_SECRET to a token of modal.com/settings/proxy-auth-tokens; "
    "after `kalm deploy --auth proxy+bearer` KALM_API_KEY too, after bearer-public that alone."
)
_REACH: Final = "Check that the service runs, KALM_BASE_URL, and the network in between."


def checks(context: DoctorContext) -> list[Check]:
    """For the service at `base_url`, or at the endpoint that an earlier check finds. Of several
    services, the first is checked in detail."""
    base_url, *others = context.settings.base_urls or [""]
    context.url = base_url or context.url
    context.scales_to_zero = not base_url or (urlsplit(base_url).hostname or "").endswith(MODAL)
    address = "settings" if base_url else "http endpoint"
    network = Check("network", _network, needs=(address,), no_answer=_REACH)
    further = [
        Check(f"server {number}", partial(_other, url=url), ("identity",), True, _REACH)
        for number, url in enumerate(others, 2)
    ]
    if context.scales_to_zero:  # any request starts a container, and one without a key is refused
        return [
            Check("keys", _keys, needs=("settings",)),
            network,
            *service.checks("credentials", context, "keys", "network"),
            *further,
        ]
    health = Check("health", _health, needs=("network",), no_answer=_REACH)
    return [network, health, *service.checks("credentials", context, "health"), *further]


def _other(context: DoctorContext, url: str) -> Result:
    """Whether another server accepts this client, and has the identity of the first."""
    served = context.description.identity if context.description else None
    options = {**context.arguments, "base_url": url, "hedge": False, "timeout": context.limit}
    if served is not None:
        options["expected_identity"] = served
    with KalmClient(**options) as client:
        return f"{url} answers, vectors {client.warm_up().fingerprint}"


def _keys(context: DoctorContext) -> Result:
    """Which keys are set; only a request can tell whether they are right."""
    config = context.settings
    given = {"KALM_API_KEY": config.api_key, "KALM_MODAL_KEY, _SECRET": config.modal_key}
    if names := [name for name, value in given.items() if value is not None]:
        return f"set: {' and '.join(names)}"
    if config.base_url is None:  # ours, which is never open
        return fail("no key is set, and the deployment requires one", _MODAL_KEYS)
    return warn("no key is set", KEYS)


def _network(context: DoctorContext) -> Result:
    """Name, port and certificate; sends no request, so that no container starts."""
    try:
        host, port, tls, place = _next_hop(context.url)
    except ConfigurationError as error:
        return fail(error.message, "Correct or unset that variable, or add the host to NO_PROXY.")
    try:
        with socket.create_connection((host, port), LIMIT) as connection:
            if not tls:
                return f"{place} accepts connections"
            with ssl.create_default_context().wrap_socket(connection, server_hostname=host) as safe:
                return f"{place} accepts connections, {safe.version()}, valid certificate"
    except ssl.SSLCertVerificationError as error:
        remedy = "For a private authority set SSL_CERT_FILE to its certificate."
        return fail(f"{place}: {error.verify_message}", remedy)
    except ssl.SSLError as error:
        remedy = "If it is plain HTTP, write http:// in KALM_BASE_URL."
        return fail(f"{place} does not speak TLS: {error.reason}", remedy)
    except (OSError, UnicodeError) as error:
        reason = f"{place}: {getattr(error, 'strerror', None) or error}"
        refused = isinstance(error, ConnectionRefusedError)
        return fail(f"nothing listens at {place}" if refused else reason, _REACH)


def _next_hop(base_url: str) -> tuple[str, int, bool, str]:
    """Host, port, whether it speaks TLS, and its name, of the service or of the proxy to it."""
    from yarl import URL

    from kalm_integrations.transports.proxies import proxy_of

    url = URL(base_url)
    proxy = proxy_of(url)
    if proxy is None:
        host, port = url.host or "", url.port or 0
        return host, port, url.scheme == "https", f"{host}:{port}"
    return proxy.url.host or "", proxy.url.port or 0, proxy.url.scheme == "https", proxy.place


def _health(context: DoctorContext) -> Result:
    """Whether a server answers at all; sends no key. Other servers need not have this route."""
    url = f"{context.url.rstrip('/').removesuffix('/v1')}/health"
    try:
        # The settings accept http and https only.
        with urlopen(url, timeout=LIMIT) as response:  # noqa: S310  # nosec B310
            status = response.status
    except HTTPError as error:
        status = error.code
        error.close()
    except (URLError, OSError, HTTPException) as error:
        return fail(f"GET {url}: {getattr(error, 'reason', error)}", _REACH)
    if status >= 500:
        return fail(f"GET {url}: HTTP {status}", "See the service's own log.")
    return f"GET {url}: HTTP {status}"
