"""A service over HTTP: its name, its port, its certificate, and whether it lets us in."""

from __future__ import annotations

import socket
import ssl
from http.client import HTTPException
from typing import Final
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass, urlopen

from kalm_integrations.doctor import embedding
from kalm_integrations.doctor.checks import KEYS, LIMIT, Check, Finding, Patient

MODAL: Final = ".modal.run"
"""What is below it is Modal's, and may be asleep."""
_PORTS: Final = {"http": 80, "https": 443}
_MODAL_KEYS: Final = (
    "Set KALM_MODAL_KEY and KALM_MODAL_SECRET to a token of modal.com/settings/proxy-auth-tokens; "
    "after `kalm deploy --auth proxy+bearer` KALM_API_KEY too, after bearer-public that alone."
)
_REACH: Final = "Check that the service runs, KALM_BASE_URL, and the network in between."


def checks(patient: Patient) -> list[Check]:
    """For the service at `base_url`, or at the endpoint that an earlier check finds."""
    given = patient.settings.base_url
    patient.url = given or patient.url
    patient.on_modal = given is None or (urlsplit(given).hostname or "").endswith(MODAL)
    before = "settings" if given else "http endpoint"
    network = Check("network", _network, needs=(before,), silence=_REACH)
    if patient.on_modal:  # any request wakes, and one without a key is refused
        keys = Check("keys", _keys, needs=("settings",))
        awake = embedding.checks("credentials", patient, needs=("keys", "network"))
        return [keys, network, *awake]
    health = Check("health", _health, needs=("network",), silence=_REACH)
    return [network, health, *embedding.checks("credentials", patient, needs=("health",))]


def _keys(patient: Patient) -> Finding:
    """Which are set. Whether they are right, only a request can tell."""
    settings = patient.settings
    given = {"KALM_API_KEY": settings.api_key, "KALM_MODAL_KEY, _SECRET": settings.modal_key}
    names = [name for name, value in given.items() if value is not None]
    if names:
        return Finding.ok(f"set: {' and '.join(names)}")
    if settings.base_url is None:  # ours, which is never open
        return Finding.fail("no key is set, and the deployment asks everybody for one", _MODAL_KEYS)
    return Finding.warn("no key is set", KEYS)


def _network(patient: Patient) -> Finding:
    """Name, port and certificate; sends no request, so that nothing wakes."""
    url = urlsplit(patient.url)
    host, port = url.hostname or "", url.port or _PORTS[url.scheme]
    tls, through = url.scheme == "https", ""
    if proxy := None if proxy_bypass(host) else getproxies().get(url.scheme):
        aim = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        host, port, tls = aim.hostname or "", aim.port or 80, False
        through = f", the proxy of {url.scheme.upper()}_PROXY"
    place = f"{host}:{port}{through}"
    try:
        with socket.create_connection((host, port), LIMIT) as connection:
            if not tls:
                return Finding.ok(f"{place} accepts connections")
            with ssl.create_default_context().wrap_socket(connection, server_hostname=host) as safe:
                return Finding.ok(
                    f"{place} accepts connections, {safe.version()}, certificate good"
                )
    except (OSError, UnicodeError) as error:
        return Finding.fail(*_trouble(place, error))


def _trouble(place: str, error: Exception) -> tuple[str, str]:
    """What is wrong with the connection, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        remedy = "For a private authority point SSL_CERT_FILE at its certificate."
        return f"{place}: {error.verify_message}", remedy
    if isinstance(error, ssl.SSLError):
        remedy = "If it is plain HTTP, write http:// in KALM_BASE_URL."
        return f"{place} does not speak TLS: {error.reason}", remedy
    if isinstance(error, ConnectionRefusedError):
        return f"nobody listens at {place}", _REACH
    return f"{place}: {getattr(error, 'strerror', None) or error}", _REACH


def _health(patient: Patient) -> Finding:
    """Whether a server answers at all; no key is sent. Stock servers need not have this route."""
    root = patient.url.rstrip("/").removesuffix("/v1")
    try:
        # The settings accept http and https only.
        with urlopen(f"{root}/health", timeout=LIMIT) as answer:  # noqa: S310
            status = answer.status
    except HTTPError as error:
        status = error.code
        error.close()
    except (URLError, OSError, HTTPException) as error:
        return Finding.fail(f"GET {root}/health: {getattr(error, 'reason', error)}", _REACH)
    if status >= 500:
        return Finding.fail(f"GET {root}/health: HTTP {status}", "See the service's own log.")
    return Finding.ok(f"GET {root}/health: HTTP {status}")
