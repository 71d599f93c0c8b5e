"""How many tokens an inlined picture has at most: its size stands in its first bytes."""

import binascii
import struct

#: The most tokens of a picture: Qwen's models take 12,845,056 pixels by default, 28 x 28 of them in a token.
MOST_TOKENS = 16_384
#: At least so many are reserved: where fewer pixels are more tokens (16 x 16 of Pixtral's, tiles that overlap or are
#: scaled up), there are no more than these, Pixtral's 64 rows of 64 with a mark at the end of each.
LEAST_TOKENS = 4160
_CELL = 28
#: A JPEG's size stands behind its metadata, which may hold a small picture of its own.
_HEAD_CHARACTERS = 4 * 24_000
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN = 0xDA
#: Parts of a head before the picture itself; where there are more, they are not looked at: requests would wait for it.
_MOST_PARTS = 256
#: Markers without a length.
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xDA)})


def picture_tokens(encoded: str) -> int:
    """The most tokens of a picture.

    Args:
        encoded: Base64, or a `data:` URL of it; PNG, JPEG, GIF and WebP are known, others count as the largest.
    """
    start = encoded.find(",") + 1 if encoded.startswith("data:") else 0
    try:
        # Some of it is enough for all but a JPEG with much metadata.
        head = binascii.a2b_base64(encoded[start : start + _HEAD_CHARACTERS])
    except ValueError:
        return MOST_TOKENS
    size = _size(head)
    if size is None:
        return MOST_TOKENS
    width, height = size
    return min(max(-(-width // _CELL) * -(-height // _CELL), LEAST_TOKENS), MOST_TOKENS)


def _size(head: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels; None where it is not known."""
    try:
        if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":
            width, height = _png_size(head)
        elif head.startswith(b"\xff\xd8"):
            width, height = _jpeg_size(head)
        elif head.startswith((b"GIF87a", b"GIF89a")):
            width, height = _gif_size(head)
        elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
            width, height = _webp_size(head)
        else:
            return None
    except (struct.error, IndexError):
        return None
    return (width, height) if width and height else None


def _png_size(head: bytes) -> tuple[int, int]:
    """The largest that is said before the picture itself begins: of several, readers take the last."""
    at, width, height = 8, 0, 0
    for _ in range(_MOST_PARTS):
        length, kind = struct.unpack_from(">I4s", head, at)
        if kind == b"IDAT":
            return width, height
        if kind == b"IHDR":
            columns, lines = struct.unpack_from(">II", head, at + 8)
            width, height = max(width, columns), max(height, lines)
        at += 12 + length
    return 0, 0


def _gif_size(head: bytes) -> tuple[int, int]:
    """The screen's, enlarged for the first picture where that has no place on it, as readers do."""
    width, height, flags = struct.unpack_from("<HHB", head, 6)
    at = 13 + (6 << (flags & 7) if flags & 0x80 else 0)
    in_extension = False
    for _ in range(_MOST_PARTS):
        mark = head[at]
        if in_extension:  # its blocks, the last of them empty
            at += 1 + mark
            in_extension = mark > 0
        elif mark == 0x21:
            at += 2
            in_extension = True
        elif mark == 0x2C:
            left, top, columns, lines = struct.unpack_from("<HHHH", head, at + 1)
            return max(width, left + columns), max(height, top + lines)
        else:
            break
    return 0, 0


def _jpeg_size(head: bytes) -> tuple[int, int]:
    """The largest that is said before the picture itself begins, or what is there of the head ends."""
    at, width, height = 2, 0, 0
    for _ in range(_MOST_PARTS):
        if at + 9 > len(head) or head[at] != 0xFF or head[at + 1] == _JPEG_SCAN:
            return width, height
        kind = head[at + 1]
        if kind == 0xFF or kind in _JPEG_BARE:
            at += 1 if kind == 0xFF else 2
            continue
        if kind in _JPEG_SIZES:
            lines, columns = struct.unpack_from(">HH", head, at + 5)
            width, height = max(width, columns), max(height, lines)
        at += 2 + max(struct.unpack_from(">H", head, at + 2)[0], 2)
    return 0, 0


def _webp_size(head: bytes) -> tuple[int, int]:
    kind = head[12:16]
    if kind == b"VP8X":  # 24 bits each, less one
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if kind == b"VP8L":  # 14 bits each, less one
        bits = struct.unpack_from("<I", head, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", head, 26) if kind == b"VP8 " else (0, 0)
    return width & 0x3FFF, height & 0x3FFF
