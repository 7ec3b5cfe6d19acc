"""Translates failures to connect, or to get a whole response, to errors that name the cause."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

import aiohttp
from yarl import URL

from kalm_integrations.errors import ConfigurationError, ConnectionFailedError, KalmError
from kalm_integrations.transports.proxies import Proxy
from kalm_integrations.transports.redaction import redact, shorten

_REFUSED: Final = f"[Errno {errno.ECONNREFUSED}]"
"""In the message of an error that sums up those of several addresses."""


def connection_error(
    error: Exception,
    request: str,
    url: URL,
    *,
    proxy: Proxy | None,
    connect_timeout: float,
    secrets: Sequence[str],
) -> KalmError:
    """The error for an exception of aiohttp or of a SOCKS proxy.

    Args:
        error: The exception. It is not to be chained: it may hold the request's headers.
        request: Method and URL, for messages.
        url: Of the request.
        proxy: The proxy in between.
        connect_timeout: Seconds after which the attempt to connect ended.
        secrets: Redacted in the message.
    """
    place = f"{url.host}:{url.port}" if proxy is None else proxy.place
    cause = shorten(redact(str(error), secrets) or type(error).__name__)
    if isinstance(error, aiohttp.ClientSSLError):
        return _tls_error(error, f"{url.host}:{url.port}", cause)
    if isinstance(error, aiohttp.ClientHttpProxyError):
        message = redact(f"{place}, answers HTTP {error.status} {error.message}.", secrets)
        refused = error.status in (401, 403, 407)
        return ConfigurationError(message) if refused else _unreached(message)
    if isinstance(error, UnicodeError):
        return ConfigurationError(f"{url.host} is not a valid host name.")
    what = f"the service running at {url.origin()}" if proxy is None else f"{place}, running"
    if isinstance(error, aiohttp.ClientConnectorError):
        return _unreached(_why_unreached(error, place, what))
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        cause = f"not within connect_timeout={connect_timeout:g} s"
    elif not type(error).__module__.startswith("aiohttp_socks"):
        return ConnectionFailedError(f"{request}: {cause}.")
    return _unreached(f"no connection to {place}: {cause}.")


def _tls_error(error: aiohttp.ClientSSLError, place: str, cause: str) -> KalmError:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return ConfigurationError(
            f"{place}: {error.certificate_error}. For a private authority, set SSL_CERT_FILE to "
            "its certificate."
        )
    if "WRONG_VERSION_NUMBER" in str(error):
        return ConfigurationError(
            f"{place} answered, but not in TLS: the base_url of a server that speaks plain HTTP "
            "begins with http://."
        )
    return _unreached(f"the TLS handshake with {place} failed: {cause}.")


def _why_unreached(error: aiohttp.ClientConnectorError, place: str, what: str) -> str:
    cause = error.os_error
    reason = cause.strerror or str(cause) or type(cause).__name__
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"the host name of {place} cannot be resolved: {reason}."
    if cause.errno == errno.ECONNREFUSED or _REFUSED in str(cause):
        return f"connection refused: is {what}?"
    return f"no connection to {place}: {reason}."


def _unreached(message: str) -> ConnectionFailedError:
    error = ConnectionFailedError(message)
    error.is_outage = True
    return error
