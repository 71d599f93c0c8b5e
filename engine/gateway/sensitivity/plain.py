"""A text as the patterns see it: disguises off, one byte a character.

What Unicode itself says about a character decides: its value as a digit, its category, its compatibility form. So
digits of every script are digits, dashes are dashes, and what is not seen is not there.
"""

import binascii
import functools
import re
import unicodedata
from html.entities import html5

#: How often escapes inside escapes are taken off.
_DEPTH = 3
#: Of strings in programs and JSON, of addresses (`%`) and of HTML, which takes any number of zeros and no semicolon,
#: too. A backslash before punctuation is one of Markdown, of regular expressions, of TeX or of a shell; one before what
#: begins an escape itself is left until that is taken off: a number behind it does not join what stands before it.
_ESCAPE = re.compile(
    r"(?:\\u|%u)([0-9A-Fa-f]{4})|\\[ux]\{0{0,8}([0-9A-Fa-f]{1,6})\}|\\U([0-9A-Fa-f]{8})|\\x([0-9A-Fa-f]{2})"
    r"|%([0-9A-Fa-f]{2})|&#[xX]0{0,32}([0-9A-Fa-f]{1,6})(?![0-9A-Fa-f]);?"
    r"|\\([01][0-7]{2})|&#0{0,32}([0-9]{1,7})(?![0-9]);?|\\([nrt]|[ -$'-/:-@\[-`{-~])|&([A-Za-z]{2,24};)"
)
_NAMED_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "~": " "}  # the last one of RTF
#: What only a mail has that is written for old servers (RFC 2045, 6.7; RFC 2047): lines that go on, and escapes.
_OF_MAIL = re.compile(r"=\r?\n|=3D[\"'\s]|=C2=A0|=\?[\w-]{2,20}\?[BbQq]\?")
#: Mail programs escape neither digits nor letters: `card=4111` and `iban=DE89` of a form are none of their escapes.
_MAIL_WORD = re.compile(
    r"=\?[\w-]{2,20}\?([BbQq])\?([!->@-~]{1,512})\?=|(?:=[89A-F][0-9A-F]){2,}|=(?:[89][0-9A-F](?!\d)"
    r"|(?![A-F]{2}\d\d)[A-F][0-9A-F]|[2-7][A-F]|0[AD]|40(?=[A-Za-z])|(?:20|09)(?=[\r\n=]|\Z)|\r?\n)"
)
#: The same of RTF: formats and groups, and characters in hexadecimal.
_OF_RTF, _RTF_WORD = (
    re.compile(r"\\(?:rtf1|par|pard|plain)\b"),
    # `\n`, `\r` and `\t` are no words of RTF but others' ends of lines.
    re.compile(r"\\'([0-9a-f]{2})|\\(?![nrt](?![a-z]))[a-z]{1,32}-?[0-9]{0,10} ?|[{}]"),
)
#: Marks of HTML that a reader does not see between two characters: mail programs put `<wbr>` into long addresses. The
#: others count between digits and beside an `@`: elsewhere they part words.
_TAG = r"/?(?:span|SPAN|strong|font|FONT|b|i|em|u|mark|small)(?:\s[^<>]{0,512})?>"
_MORE = rf"(?:<{_TAG}){{0,4}}"
_INLINE = re.compile(  # the literal stands first because that is what makes the pattern quick
    rf"<(?=[/wWsSfFbieum])(?:(?:wbr|WBR)\s?/?>|(?<=[0-9]<){_TAG}{_MORE}( ?){_MORE}(?=[0-9])|{_TAG}{_MORE}(?=@)"
    rf"|(?<=@<){_TAG}{_MORE})"
)
#: What a form sends, where a plus is a blank; in front of it and behind it stands what may be a group of a number.
#: Each beginning looks no farther than the next one: many of them would take the square of their number.
_FORM = re.compile(r"(?:[?&=][^\s+?&=]*|\btel:[^\s+:]*)\+\S*")
_BLANK = re.compile(r"(?<=[0-9A-Z]{2})\+(?=[0-9A-Z]{2})")

#: Dots in the middle of a line, and the full stops that domain names may have (RFC 3490).
_DOTS = "\u00b7\u2022\u2027\u2219\u22c5\u30fb\u3002\uff0e\uff61\uff65"
#: Seen as nothing, or as a blank of any width, though their categories do not say so (Default_Ignorable_Code_Point).
_BLANKS = "\u115f\u1160\u17b4\u17b5\u3164\uffa0\ufffc"
#: A blank by its looks alone.
_BRAILLE_BLANK = "\u2800"
#: Where the table looks: beyond are ideographs and syllables, which read as no ASCII character.
_SCRIPTS = (
    range(0x80, 0x3400),
    range(0xA000, 0xAC00),
    range(0xD7B0, 0xD800),
    range(0xF900, 0x20000),
    range(0xE0000, 0xE1000),
)

#: A pattern of control characters. Those that break a line count as its end, the others as nothing; a zero stays: it
#: stands between texts.
CONTROLS = rb"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
_BREAKS = b"\x0b\x0c\x1c\x1d\x1e\x1f\x85"
_CONTROLS = bytes(
    code for code in (*range(1, 0x20), *range(0x7F, 0xA0)) if code not in _BREAKS and code not in b"\t\n\r"
)
_BROKEN = bytes.maketrans(_BREAKS, b"\n" * len(_BREAKS))
#: What stands for a letter that one byte cannot hold, and for anything else.
_LETTER, _OTHER = "\xff", "?"


def _read_as(character: str) -> str | None:
    """The ASCII character that one beyond ASCII reads as; empty: it is not seen; None: neither."""
    category = unicodedata.category(character)
    if category in ("Cf", "Mn", "Me") or character in _BLANKS:
        return ""
    digit = unicodedata.digit(character, None)
    if digit is not None:
        return str(digit)
    if character in _DOTS:
        return "."
    if category == "Pd" or character == "\u2212":
        return "-"
    if category == "Zs" or character == _BRAILLE_BLANK:
        return " "
    if category in ("Zl", "Zp"):
        return "\n"
    if category == "Cn" or not unicodedata.decomposition(character):
        return None
    form = unicodedata.normalize("NFKC", character)
    return form if len(form) == 1 and form.isascii() else None


@functools.cache
def _plain_characters() -> dict[int, str]:
    """Of all characters that read as an ASCII character or as none, which."""
    reads = ((code, _read_as(chr(code))) for codes in _SCRIPTS for code in codes)
    return {code: plain for code, plain in reads if plain is not None}


@functools.cache
def _fancy() -> frozenset[str]:
    return frozenset(map(chr, _plain_characters()))


@functools.cache
def _unseen() -> frozenset[str]:
    return frozenset(chr(code) for code, plain in _plain_characters().items() if not plain)


class _Letters(dict[int, str]):
    """One byte for each character: letters stay letters, whatever their script."""

    def __missing__(self, code: int) -> str:
        letter = code < 0x100 or unicodedata.category(chr(code))[0] in "LMN"
        self[code] = shown = (chr(code) if code < 0x100 else _LETTER) if letter else _OTHER
        return shown


_LETTERS = _Letters()


def prepare() -> None:
    """Builds the tables now rather than at the first text that needs them (some 60 ms)."""
    _fancy()
    _unseen()


def plain(text: str) -> tuple[bytes, list[int] | None]:
    """A text as the patterns see it, one byte a character, and each byte's place in the text (None: the same)."""
    places = None
    if not text.isascii():
        characters = set(text)
        if not _fancy().isdisjoint(characters):
            unseen = _unseen()
            if not unseen.isdisjoint(characters):
                places = [place for place, character in enumerate(text) if character not in unseen]
            text = text.translate(_plain_characters())
        if "@" in text and max(characters) > _LETTER:
            text = text.translate(_LETTERS)
    return text.encode("latin-1", "replace"), places


def without_controls(shown: bytes, places: list[int] | None) -> tuple[bytes, list[int] | None]:
    """What `plain` returned without control characters; for the few texts that hold some (`CONTROLS`)."""
    kept = [place for place, byte in enumerate(shown) if byte not in _CONTROLS]
    return shown.translate(_BROKEN, _CONTROLS), kept if places is None else [places[place] for place in kept]


def _unescaped(match: re.Match[str]) -> str:
    *hexadecimal, octal, decimal, named, reference = match.groups()
    if named:
        return _NAMED_ESCAPES.get(named, named)
    if reference:
        return html5.get(reference, match[0])
    base, number = (8, octal) if octal else (10, decimal) if decimal else (16, "".join(filter(None, hexadecimal)))
    code = int(number, base)
    return chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else "?"


def _of_mail(match: re.Match[str]) -> str:
    kind, word = match.groups()
    if kind in ("B", "b"):
        try:
            return binascii.a2b_base64(word).decode("utf-8", "replace")
        except binascii.Error:
            return match[0]
    quoted = match[0] if word is None else word.replace("_", " ")
    return binascii.a2b_qp(quoted.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")


def undisguised(text: str) -> str | None:
    """The text without escapes, also nested ones, and with blanks for the pluses of a form; None without any."""
    bare = text
    if "=" in text and _OF_MAIL.search(text):
        bare = _MAIL_WORD.sub(_of_mail, bare)
    if "\\" in text and _OF_RTF.search(text):
        bare = _RTF_WORD.sub(lambda match: chr(int(match[1], 16)) if match[1] else "", bare)
    if "<" in bare:
        bare = _INLINE.sub(lambda match: match[1] or "", bare)
    if "\\" in bare or "%" in bare or "&" in bare:
        for _ in range(_DEPTH):
            before = bare
            bare = _ESCAPE.sub(_unescaped, bare)
            if bare == before:
                break
    if "+" in bare:
        bare = _FORM.sub(lambda match: _BLANK.sub(" ", match[0]), bare)
    return None if bare == text else bare
