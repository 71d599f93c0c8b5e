"""From a request to its clearance: searches its texts, applies the policy, and fails towards safety."""

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping

from tokenmill.engine.gateway.hints import hints_of
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.sensitivity.clearance import ANYWHERE, Clearance
from tokenmill.engine.gateway.sensitivity.kinds import CLASS_OF, NOT_REDACTABLE
from tokenmill.engine.gateway.sensitivity.presidio import Presidio, kind_of
from tokenmill.engine.gateway.sensitivity.redaction import BrokenJsonError, Redaction, unescaped
from tokenmill.engine.gateway.sensitivity.scanner import Finding, Scanner
from tokenmill.engine.gateway.sensitivity.settings import ACTIONS, Action, SensitivitySettings
from tokenmill.engine.gateway.sensitivity.texts import Texts, UnreadableError, texts_of
from tokenmill.engine.gateway.sensitivity.turns import DetectorError, Turns

log = logging.getLogger("tokenmill.gateway")

#: A text and what was found in it.
_Found = tuple[str, list[Finding]]
#: A longer body gets no placeholders: it stays in trusted zones.
MOST_REDACTED_BYTES = 2 * 1024 * 1024
#: The same where there is more to replace.
MOST_VALUES = 1000
#: Less than this of a found text cannot be told from chance and is not replaced everywhere.
_SHORTEST_VALUE = 4


class Detector:
    """Searches requests.

    Args:
        settings: The policy.

    Raises:
        MissingDependencyError, ConfigurationError: Presidio is wanted and cannot be had.
    """

    def __init__(self, settings: SensitivitySettings) -> None:
        self.settings = settings
        wanted = [kind for kind in CLASS_OF if settings.action(kind) != "allow"]
        own = {name: pattern for name, pattern in settings.patterns.items() if settings.action(name) != "allow"}
        self._scanner = Scanner(wanted, own)
        asked = settings.presidio
        self._presidio = None
        if asked is not None and any(settings.action(kind_of(entity)) != "allow" for entity in asked.entities):
            self._presidio = Presidio(asked)
        self._idle = not wanted and not own and self._presidio is None
        #: False: whatever a request holds may go anywhere, `unsearched` says all that there is to say.
        self.searches = not self._idle or settings.unreadable != "allow"

    async def clear(self, exchange: Exchange) -> Clearance:
        """The clearance of a request. Never fails: what cannot be searched stays in trusted zones."""
        return self._as_asked(exchange, await self._searched(exchange))

    def unsearched(self, exchange: Exchange) -> Clearance:
        """The clearance of a request whose contents do not matter."""
        return self._as_asked(exchange, ANYWHERE)

    def _as_asked(self, exchange: Exchange, clearance: Clearance) -> Clearance:
        """The clearance within what the client itself says."""
        if hints_of(exchange).sensitivity == "private" and clearance.action in ("allow", "redact"):
            clearance = self._stay(clearance.kinds, "the client says that it is private")
        return clearance

    async def _searched(self, exchange: Exchange) -> Clearance:
        try:
            async with asyncio.timeout(self.settings.timeout_s * 10):
                return await self._judge(exchange)
        except (DetectorError, UnreadableError, TimeoutError) as error:
            return self._stay({}, f"the search for sensitive data failed ({str(error) or 'it took too long'})")
        except Exception as error:
            log.exception("request %s: the search for sensitive data failed", exchange.request_id)
            return self._stay({}, f"the search for sensitive data failed ({type(error).__name__})")

    async def _judge(self, exchange: Exchange) -> Clearance:
        if exchange.body is None:
            return self._unreadable("a form cannot be searched", {})
        turns = Turns(self.settings.timeout_s)
        address = exchange.target_path.decode("latin-1")
        texts = await texts_of(exchange.body, address, turns)
        found = await self._find(texts, turns)
        data = _distinct(found)
        kinds = Counter(kind for kind, _ in data)
        actions = {kind: self.settings.action(kind) for kind in kinds}
        action: Action = max(actions.values(), key=ACTIONS.index, default="allow")
        named = ", ".join(sorted(kind for kind, one in actions.items() if one == action))
        if action == "refuse":
            return Clearance(kinds, "refuse", frozenset(), why=f"the policy refuses requests that hold {named}")
        if action == "stay":
            return self._stay(kinds, f"it holds {named}")
        if texts.unreadable and self.settings.unreadable == "stay":
            return self._unreadable(f"it holds {texts.unreadable}, which cannot be searched", kinds)
        if action == "allow":
            return Clearance(kinds)
        values = {text: kind for kind, text in data if text is not None and len(text) >= _SHORTEST_VALUE}
        values |= _overlapping(found)
        body = exchange.body
        small = len(body.raw) <= MOST_REDACTED_BYTES and len(values) <= MOST_VALUES
        if small and not NOT_REDACTABLE & set(kinds):
            redaction = Redaction(values, await unescaped(body.raw, turns))
            try:
                hidden = await redaction.body(body, turns)
            except BrokenJsonError:
                return self._stay(kinds, f"it holds {named} in arguments of a tool that would be no JSON any more")
            if not await self._find(await texts_of(hidden, address, turns), turns):
                why = f"placeholders stand for {named}"
                return Clearance(kinds, "redact", redaction=redaction, hidden=hidden, why=why)
        return self._stay(kinds, f"it holds {named} where no placeholder can stand")

    async def _find(self, texts: Texts, turns: Turns) -> list[_Found]:
        """Of every text in which something was found what that is."""
        if self._idle:
            return []
        found: list[_Found] = []
        for text in texts.all:
            findings: list[Finding] = []
            for some in self._scanner.windows(text):
                findings += some
                if turns.due():
                    await turns.give()
            if self._presidio is not None:
                async with asyncio.timeout(self.settings.timeout_s):
                    findings += await turns.wait_for(self._presidio.find(text))
            if findings:
                found.append((text, findings))
        return found

    def _stay(self, kinds: Mapping[str, int], why: str) -> Clearance:
        return Clearance(kinds, "stay", frozenset(self.settings.trusted_zones), why=why)

    def _unreadable(self, why: str, kinds: Mapping[str, int]) -> Clearance:
        return Clearance(kinds) if self.settings.unreadable == "allow" else self._stay(kinds, why)


def _distinct(found: list[_Found]) -> dict[tuple[str, str | None], None]:
    """(kind, the data) of everything; None in the data's place where it shows only without escapes."""
    return {
        (kind, text[start:end] if start >= 0 else None): None
        for text, findings in found
        for kind, start, end in findings
    }


def _overlapping(found: list[_Found]) -> dict[str, str]:
    """Data that overlap, together, and a kind: with a placeholder for the one a piece of the other would be left."""
    together: dict[str, str] = {}
    for text, findings in found:
        first, reach, overlap = Finding("", 0, 0), 0, False
        for one in sorted(findings, key=_by_place):
            if one.start < reach < one.end and one.start >= 0:
                reach, overlap = one.end, True
            elif one.start >= reach:
                if overlap:
                    together[text[first.start : reach]] = first.kind
                first, reach, overlap = one, one.end, False
        if overlap:
            together[text[first.start : reach]] = first.kind
    return together


def _by_place(finding: Finding) -> tuple[int, int]:
    """Longer ones before those that begin at the same place."""
    return finding.start, -finding.end
