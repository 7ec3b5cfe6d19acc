"""The proxy of a URL, as the environment or the system's settings name it.

`http_proxy`, `https_proxy` and `all_proxy`, in small or capital letters, as urllib, httpx and curl
read them. `no_proxy` lists what is reached directly: host names (with their subdomains), addresses,
networks (10.0.0.0/8), each with or without a port or a scheme, or "*".
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from yarl import URL

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.install_hints import install_command
from kalm_integrations.transports.redaction import Hidden

if TYPE_CHECKING:
    import aiohttp

_PORTS: Final = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080, "socks4": 1080}


@dataclass(frozen=True, slots=True)
class Proxy:
    """A valid proxy.

    Attributes:
        url: Without credentials.
        source: The variable that names it; "the system's settings" if none does.
        user: Its user, or "".
        password: Its password, or "".
    """

    url: URL
    source: str
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    @property
    def is_socks(self) -> bool:
        return self.url.scheme.startswith("socks")

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"{self.url.host}:{self.url.port}, the proxy of {self.source}"

    @property
    def authorization(self) -> str:
        """The header for its user and password."""
        return f"Basic {base64.b64encode(f'{self.user}:{self.password}'.encode()).decode()}"


def proxy_of(url: URL) -> Proxy | None:
    """The proxy for `url`; None to connect directly.

    Raises:
        ConfigurationError: What the environment names is no proxy.
    """
    value, no_proxy = _settings(url.scheme)
    host = (url.host or "").rstrip(".")
    if not value or bypassed(host, url.port, url.scheme, no_proxy or ""):
        return None
    if no_proxy is None and proxy_bypass(host):  # the system's own exceptions
        return None
    source = _source(url.scheme, value)
    proxy = _parse(value, source)
    if proxy is None:
        raise ConfigurationError(f"{source} is not like http://host:port.")
    if proxy.url.scheme not in _PORTS:
        known = ", ".join(_PORTS)
        raise ConfigurationError(f"{source} names a {proxy.url.scheme} proxy, not one of {known}.")
    return proxy


def _settings(scheme: str) -> tuple[str, str | None]:
    """The proxy for `scheme`, or "", and the value of no_proxy, if it is set."""
    proxies = getproxies()
    value = proxies.get(scheme) or proxies.get("all") or ""
    return Hidden(value if value.strip() else ""), proxies.get("no")


def _parse(value: str, source: str) -> Proxy | None:
    """The proxy in `value`, of any scheme; None if it is none. Raises nothing that shows it."""
    value = value.strip()
    try:
        # As urllib and curl read it: without a scheme, the proxy speaks HTTP.
        parts = urlsplit(value if "://" in value else f"http://{value}")
        scheme, host = parts.scheme.lower(), parts.hostname or ""
        port = parts.port or _PORTS.get(scheme)
        host.encode("idna")
        if not (scheme and host and host.isprintable()) or " " in host:
            return None
        url = URL.build(scheme=scheme, host=host, port=port)
    except ValueError:  # a bad port, bracket or host name
        return None
    user, password = unquote(parts.username or ""), Hidden(unquote(parts.password or ""))
    return Proxy(url, source, user, password)


def socks_connector(
    proxy: Proxy, options: dict[str, Any]
) -> tuple[aiohttp.BaseConnector, Sequence[type[Exception]]]:
    """A connector through a SOCKS proxy, which resolves host names, and what it may raise.

    Raises:
        ConfigurationError: Its package is missing.
    """
    try:
        import aiohttp_socks
        import python_socks
    except ImportError as error:
        raise ConfigurationError(
            f"{proxy.source} names a {proxy.url.scheme} proxy, which needs aiohttp-socks: "
            f"{install_command('socks')}. To connect directly, add the service's host to NO_PROXY."
        ) from error
    version = proxy.url.scheme.rstrip("h").upper()
    connector = aiohttp_socks.ProxyConnector(
        host=proxy.url.host or "",
        port=proxy.url.port or 0,
        proxy_type=python_socks.ProxyType[version],
        username=proxy.user or None,
        password=proxy.password or None,
        rdns=True,
        **options,
    )
    return connector, (
        aiohttp_socks.ProxyError,
        aiohttp_socks.ProxyConnectionError,
        aiohttp_socks.ProxyTimeoutError,
    )


def bypassed(host: str, port: int | None, scheme: str, no_proxy: str) -> bool:
    """Whether `no_proxy` excludes a host."""
    host, address = host.lower(), _address(host)
    for entry in re.split(r"[,\s]+", no_proxy.lower()):
        wanted_scheme, _, name = entry.rpartition("://")
        if wanted_scheme not in ("", "all", scheme):
            continue
        if name == "*":
            return True
        network, wanted_port = _split_port(name)
        if wanted_port not in (None, port):
            continue
        name = network.removeprefix("*").strip(".")
        if name and (host == name or (address is None and host.endswith(f".{name}"))):
            return True
        if address is not None and address in _network(network):
            return True
    return False


def _split_port(entry: str) -> tuple[str, int | None]:
    """Host and port of an entry; an IPv6 address with a port is in brackets."""
    match = re.fullmatch(r"\[(.*)\](?::(\d+))?|([^:]*):(\d+)", entry)
    if match is None:
        return entry, None
    host, port = match[1] or match[3] or "", match[2] or match[4]
    return host, None if port is None else int(port)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _network(entry: str) -> tuple[()] | ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return ()


def _source(scheme: str, value: str) -> str:
    """The variable that `value` is from."""
    names = (f"{scheme}_proxy", "all_proxy")
    for name in [form for each in names for form in (each, each.upper())]:
        if os.environ.get(name) == value:
            return name
    return "the system's settings"
