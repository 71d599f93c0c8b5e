"""Which of a request's headers hold what only trusted zones may see: a proxy's note of who asks, a user's address."""

from tokenmill.engine.gateway.anthropic import CREDENTIALS
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.sensitivity.scanner import Scanner

#: Between this host and its clients, or what proxies that log people in (oauth2-proxy, Envoy, nginx, Azure, Google,
#: AWS, Cloudflare, Tailscale) say of who asks: a name or an account that no search knows.
_OF_PEOPLE = frozenset(
    {
        *(b"cookie", b"remote-user", b"x-remote-user", b"x-remote-group", b"x-webauth-user", b"x-authenticated-user"),
        *(b"x-forwarded-user", b"x-forwarded-email", b"x-forwarded-preferred-username", b"x-forwarded-groups"),
        *(b"x-forwarded-client-cert", b"client-cert", b"client-cert-chain", b"x-client-cert", b"x-user", b"x-user-id"),
        *(b"x-user-name", b"x-username", b"x-user-email", b"x-email", b"x-goog-iap-jwt-assertion"),
    }
)
_OF_LOGINS = (
    *(b"x-auth-request-", b"x-ms-client-principal", b"x-goog-authenticated-user-", b"x-amzn-oidc-", b"cf-access-"),
    *(b"tailscale-user-", b"ssl-client-", b"x-ssl-client-", b"x-amzn-mtls-"),
)
#: Meant for the backend, or written by the gateway.
_NOT_SEARCHED = CREDENTIALS | {b"accept", b"accept-encoding", b"content-type"}
_REQUEST_ID = b"x-request-id"
#: Headers that are remembered, and how long one may be for that: they are whatever clients send.
_MOST_KNOWN, _LONGEST_KNOWN = 4096, 512
#: How long a header that is searched may be, and all of a request's together: a few milliseconds' worth, in one go.
#: What is longer counts as if it held something.
_LONGEST_SEARCHED, _MOST_SEARCHED = 2048, 8192
NONE = frozenset[bytes]()


class Headers:
    """Searches headers; clients send the same ones over and over.

    Args:
        scanner: What is looked for.
    """

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner
        self._known: dict[tuple[bytes, bytes], bool] = {}

    def private(self, exchange: Exchange) -> frozenset[bytes]:
        """The names of those headers that would go to a backend and hold something."""
        found, left = None, _MOST_SEARCHED
        for header in exchange.forward:
            name = header[0]
            if name in _NOT_SEARCHED or (name == _REQUEST_ID and name not in exchange.fields):
                continue
            held = self._known.get(header)
            if held is None:
                size = len(header[1])
                left -= size if size <= _LONGEST_SEARCHED else 0
                held = size > _LONGEST_SEARCHED or left < 0 or self._holds(header)
            if held:
                found = {name} if found is None else found | {name}
        return NONE if found is None else frozenset(found)

    def _holds(self, header: tuple[bytes, bytes]) -> bool:
        name, value = header
        # The name may be what announces it. A value in another encoding is read as Latin-1 (RFC 9110, 5.5).
        text = f"{name.decode('latin-1')}: {value.decode('utf-8', 'replace')}\n{value.decode('latin-1')}"
        held = (
            name in _OF_PEOPLE or name.startswith(_OF_LOGINS) or any(found for _, found in self._scanner.windows(text))
        )
        if len(value) <= _LONGEST_KNOWN:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[header] = held
        return held
