"""Which backend has seen the beginning of a prompt, so that its KV cache holds it.

A prompt's bytes are cut into blocks, and each block is named by a hash of itself and all before it (as vLLM names its
cache blocks). A bounded table remembers which backends were sent which blocks, the least recently used forgotten.
"""

import hashlib
from collections.abc import Iterable

from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.portfolio import Target

#: Bytes in a block: about eight of vLLM's blocks of 16 tokens.
BLOCK_BYTES = 512
#: Blocks of one prompt that are looked at: what follows 64 KiB in common decides no more.
MAX_BLOCKS = 128
#: Blocks remembered; about 100 bytes each.
MAX_ENTRIES = 50_000

_PROMPT_FIELDS = ("messages", "prompt", "input")
_KINDS = ("organisation", "team", "app", "key")


def owner(exchange: Exchange, target: Target) -> str | None:
    """Whose cache a request may find prompts in at a backend; None: everybody's.

    Where a key has no account of the kind that `prefix_cache` names, the nearest one below counts: a key by itself.
    """
    shared_by, principal = target.backend.prefix_cache, exchange.principal
    if shared_by is None or principal is None:
        return None
    chain = (principal.organisation, principal.team, principal.app, principal.key)
    return next(one for one in chain[_KINDS.index(shared_by) :] if one is not None)


def owner_among(exchange: Exchange, targets: Iterable[Target]) -> str | None:
    """Who alone may learn where a request's prompt goes, among backends of which some divide their caches."""
    if exchange.principal is None:
        return None
    return next((found for target in targets if (found := owner(exchange, target)) is not None), None)


def salt(exchange: Exchange, target: Target) -> str | None:
    """vLLM's `cache_salt` for a request; None: as the client wrote it.

    What the client says itself is a part of it: he may divide his owner's cache further, and see no other.
    """
    whose = owner(exchange, target)
    if whose is None or exchange.body is None:
        return None
    said = exchange.body.raw_field("cache_salt") or b"null"
    return hashlib.blake2b(whose.encode() + b"\0" + said, digest_size=16).hexdigest()


def prompt_blocks(body: Body | None, model: str | None, whose: str | None = None) -> list[int]:
    """The names of a request's whole prompt blocks, in order; empty for a short prompt.

    Args:
        body: The request's.
        model: The model that is asked.
        whose: Whose cache they may be in; None: everybody's. Where a prompt goes tells nobody what others asked.
    """
    if body is None:
        return []
    for name in _PROMPT_FIELDS:
        field = body.view(name)
        if field is not None:
            break
    else:
        return []
    text = bytes(field[: BLOCK_BYTES * MAX_BLOCKS])
    # Tool definitions stand before the messages in every chat template.
    chain = hash((model, body.raw_field("tools"), whose))
    blocks = []
    for start in range(0, len(text) - BLOCK_BYTES + 1, BLOCK_BYTES):
        chain = hash((chain, text[start : start + BLOCK_BYTES]))
        blocks.append(chain)
    return blocks


class PrefixTable:
    """What was sent where.

    Args:
        max_entries: Blocks remembered.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._holders: dict[int, tuple[Target, ...]] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def matches(self, blocks: list[int], targets: Iterable[Target]) -> dict[Target, int]:
        """How many blocks from the beginning each of `targets` was sent before; those with none are left out."""
        found: dict[Target, int] = {}
        remaining = set(targets)
        for depth, block in enumerate(blocks, 1):
            remaining.intersection_update(self._holders.get(block, ()))
            if not remaining:
                break
            for target in remaining:
                found[target] = depth
        return found

    def record(self, blocks: list[int], target: Target) -> None:
        """The prompt is being sent to `target`."""
        holders = self._holders
        for block in reversed(blocks):  # the beginning is the most recently used: it is forgotten last
            known = holders.pop(block, ())
            holders[block] = known if target in known else (*known, target)
        while len(holders) > self._max_entries:
            del holders[next(iter(holders))]
