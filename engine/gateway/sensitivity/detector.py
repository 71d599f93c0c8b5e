"""From a request to its clearance: searches its texts, applies the policy, and fails towards safety."""

import asyncio
import bisect
import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from tokenmill.engine.gateway.hints import hints_of
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.sensitivity.clearance import ANYWHERE, Clearance
from tokenmill.engine.gateway.sensitivity.headers import NONE, Headers
from tokenmill.engine.gateway.sensitivity.kinds import CLASS_OF, NOT_REDACTABLE
from tokenmill.engine.gateway.sensitivity.presidio import Presidio, kind_of
from tokenmill.engine.gateway.sensitivity.redaction import BrokenJsonError, Redaction, unescaped
from tokenmill.engine.gateway.sensitivity.scanner import REACH, Finding, Scanner
from tokenmill.engine.gateway.sensitivity.settings import ACTIONS, Action, SensitivitySettings
from tokenmill.engine.gateway.sensitivity.texts import Texts, UnreadableError, texts_of
from tokenmill.engine.gateway.sensitivity.turns import DetectorError, Turns

log = logging.getLogger("tokenmill.gateway")

#: A longer body gets no placeholders: it stays in trusted zones.
MOST_REDACTED_BYTES = 2 * 1024 * 1024
#: The same where there is more to replace.
MOST_VALUES = 1000
#: Less than this of a found text cannot be told from chance and is not replaced everywhere.
_SHORTEST_VALUE = 4
#: Names that are taken in at one go, and how long one may be.
_TOGETHER, _LONGEST_NAME = 256, 512


class _Found:
    """What was found in a request.

    Attributes:
        data: (kind, the data) of everything; None in the data's place where it shows only without escapes.
        together: Data that overlap, as one, and a kind: with a placeholder for one a piece of the other would be left.
    """

    def __init__(self) -> None:
        self.data: dict[tuple[str, str | None], None] = {}
        self.together: dict[str, str] = {}

    def add(self, text: str, findings: Sequence[Finding], begin: int = 0) -> None:
        """What was found in a window of a text that begins there, with places counted from there."""
        data, reach, ordered = self.data, 0, True
        window = text[begin : begin + REACH] if begin else text
        for kind, start, end in findings:
            data[kind, window[start:end] if start >= 0 else None] = None
            ordered = ordered and start >= reach
            reach = end
        if not ordered:
            self._join(window, sorted(findings, key=_by_place))

    def _join(self, text: str, findings: Sequence[Finding]) -> None:
        first, reach, overlap = Finding("", 0, 0), 0, False
        for one in findings:
            if 0 <= one.start < reach < one.end:
                reach, overlap = one.end, True
            elif one.start >= reach:
                if overlap:
                    self.together[text[first.start : reach]] = first.kind
                first, reach, overlap = one, one.end, False
        if overlap:
            self.together[text[first.start : reach]] = first.kind


def _by_place(finding: Finding) -> tuple[int, int]:
    """Longer ones before those that begin at the same place."""
    return finding.start, -finding.end


def _beside(named: Sequence[Finding], findings: Sequence[Finding]) -> Sequence[Finding]:
    """The names, which are in order, that may overlap what was found in a window."""
    first = min((one.start for one in findings if one.start >= 0), default=0)
    last = max(one.end for one in findings)
    begin = bisect.bisect_left(named, first - _LONGEST_NAME, key=_start)
    return named[begin : bisect.bisect_left(named, last, key=_start)]


def _start(finding: Finding) -> int:
    return finding.start


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
        self._headers = Headers(self._scanner) if wanted or own else None
        #: False: whatever a request holds may go anywhere, `unsearched` says all that there is to say.
        self.searches = not self._idle or settings.unreadable != "allow"

    async def clear(self, exchange: Exchange) -> Clearance:
        """The clearance of a request. Never fails: what cannot be searched stays in trusted zones."""
        return self._as_asked(exchange, await self._searched(exchange))

    def headers(self, exchange: Exchange) -> frozenset[bytes]:
        """Names of the headers that only trusted zones may see."""
        return NONE if self._headers is None else self._headers.private(exchange)

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
        kinds = Counter(kind for kind, _ in found.data)
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
            return Clearance(kinds) if kinds else ANYWHERE
        values = {text: kind for kind, text in found.data if text is not None and len(text) >= _SHORTEST_VALUE}
        values |= found.together
        body = exchange.body
        small = len(body.raw) <= MOST_REDACTED_BYTES and len(values) <= MOST_VALUES
        # What announces a kind that shows only without escapes may go with the placeholder of something else: it would
        # not be found again.
        if small and kinds.keys() <= {kind for kind, text in found.data if text is not None} - NOT_REDACTABLE:
            redaction = Redaction(values, await unescaped(body.raw, turns))
            try:
                hidden = await redaction.body(body, turns)
            except BrokenJsonError:
                return self._stay(kinds, f"it holds {named} in arguments of a tool that would be no JSON any more")
            searched = await self._find(await texts_of(hidden, address, turns), turns)
            if not searched.data and not await redaction.left(turns):
                why = f"placeholders stand for {named}"
                return Clearance(kinds, "redact", redaction=redaction, hidden=hidden, why=why)
        return self._stay(kinds, f"it holds {named} where no placeholder can stand")

    async def _find(self, texts: Texts, turns: Turns) -> _Found:
        """What is in any of the texts."""
        found = _Found()
        if self._idle:
            return found
        for text in texts.all:
            named: Sequence[Finding] = ()
            if self._presidio is not None:
                async with asyncio.timeout(self.settings.timeout_s):
                    named = await turns.wait_for(self._presidio.find(text))
            for start in range(0, len(named), _TOGETHER):
                # One more: it may overlap the one before.
                found.add(text, named[start : start + _TOGETHER + 1])
                if turns.due():
                    await turns.give()
            for begin, findings in self._scanner.windows(text):
                if findings and named:
                    placed = [one.moved(begin) for one in findings]
                    found.add(text, (*placed, *_beside(named, placed)))
                elif findings:
                    found.add(text, findings, begin)
                if turns.due():
                    await turns.give()
        return found

    def _stay(self, kinds: Mapping[str, int], why: str) -> Clearance:
        return Clearance(kinds, "stay", frozenset(self.settings.trusted_zones), why=why)

    def _unreadable(self, why: str, kinds: Mapping[str, int]) -> Clearance:
        return Clearance(kinds) if self.settings.unreadable == "allow" else self._stay(kinds, why)
