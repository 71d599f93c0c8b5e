"""Requests that web pages make of a gateway that asks for no key, through the browser of somebody who may reach it.

A browser sends a page's `text/plain` or form to any address without asking first, also to this machine's own. The page
cannot read the answer, but has a model work, or a response cancelled. The browser says which page it was (`Origin`). A
page whose name was made to mean this machine (DNS rebinding) is of the same origin, and could read the answer, too: it
is told by its name. Programs and extensions send no page's origin.
"""

import ipaddress
import re
from collections.abc import Collection, Mapping
from typing import Any

from tokenmill.engine.gateway.api_error import ApiError, quote
from tokenmill.engine.gateway.cors import ANY

_PAGES = re.compile(r"(https?)://([^/]+)")
_PORTS = {"http": ":80", "https": ":443"}


class CrossSite:
    """Refuses what pages ask that may not.

    Args:
        origins: Pages that may, `scheme://host[:port]` of each; `*`: all.
    """

    def __init__(self, origins: Collection[str]) -> None:
        self._origins = frozenset(origins)
        self._any = ANY in self._origins

    def check(self, fields: Mapping[bytes, bytes], server: Any) -> None:
        """Lets a request pass that no page makes, or one that may.

        Args:
            fields: The request's headers, the first value of each.
            server: The address and port that it came to.

        Raises:
            ApiError: 403 for any other.
        """
        origin = fields.get(b"origin", b"").decode("latin-1")
        if not origin or self._any or origin in self._origins:
            return
        page = _PAGES.fullmatch(origin)
        if page is None and origin != "null":
            return  # an extension or a desktop program, which no web page can pass for
        if page is None or not _is_own(page[1], page[2], fields, server):
            raise ApiError(
                403,
                f"Pages of `{quote(origin)}` may not use this server; name them in `server.allowed_origins`.",
                code="forbidden_origin",
            )


def _is_own(scheme: str, authority: str, fields: Mapping[bytes, bytes], server: Any) -> bool:
    """Whether a page came from here, as a browser sees it, or from where a proxy stands in front."""
    site = fields.get(b"sec-fetch-site")
    if site is not None:
        own = site == b"same-origin"
    else:
        # Older browsers, and all where the address is neither https nor this machine's, do not say.
        named = (fields.get(name, b"").decode("latin-1") for name in (b"host", b"x-forwarded-host"))
        own = any(authority == host.removesuffix(_PORTS[scheme]) for host in named)
    if not own:
        return False
    # With TLS there is a proxy, which has a certificate for the name.
    return scheme == "https" or not _is_loopback(server) or not _is_public_name(authority)


def _is_loopback(server: Any) -> bool:
    try:
        address = ipaddress.ip_address(server[0])
    except (TypeError, ValueError):
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _is_public_name(authority: str) -> bool:
    """Whether a host is a name that somebody in the internet may have made mean any address."""
    if authority.startswith("["):
        return False
    host = authority.partition(":")[0].rstrip(".").lower()
    if "." not in host or host.endswith(".localhost"):
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False
