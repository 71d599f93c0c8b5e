"""The kinds of personal and secret data that are recognised by their form, and how each is told from its look-alikes.

A kind has patterns for RE2 (linear in the text, so no prompt can stall the gateway) and a check that looks at what a
pattern found: check digits, ranges, boundaries. Patterns see text whose characters are one byte each (`scanner`), with
fancy digits, dashes and spaces already made plain.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokenmill.engine.gateway.sensitivity import checks, checksums
from tokenmill.engine.gateway.sensitivity.checks import ALNUM, Check, at_home, last_digits, last_token, number
from tokenmill.engine.gateway.sensitivity.fours import in_fours

#: What the data is about; policies may name a class instead of a kind.
DataClass = Literal["contact", "financial", "government", "person", "secret"]

#: Between the groups of a number as people write it: the same throughout, for which RE2 needs one pattern each.
_BETWEEN = (rb" {1,2}", rb"-", rb"\.", rb" {1,2}- {1,2}", rb"/", rb"_")
#: And where lines or columns end: once in a number that was wrapped, or everywhere.
_ANYHOW, _PARTED = rb"[ \t\r\n._/-]{1,3}", rb"[ ._/-]{0,2}[\t\r\n]{1,2} {0,2}"
_ALONE_START = rb"(?:\A[ \t\r\n]{0,4}|[^0-9 \t\r\n][ \t\r\n]{1,4}|[^0-9 \t\r\n._/-]|(?:\A|[^0-9])[._/-])"
_ALONE_END = rb"[ \t\r\n]{0,4}(?:\z|[^0-9 \t\r\n])"
_START = rb"(?:\A|[^0-9])"
_END = rb"(?:\z|[^0-9])"
_WORD_START = rb"(?:\A|[^0-9A-Za-z])"
#: Digits in hexadecimal ones are everywhere.
_HEX_START, _HEX_END = rb"(?:\A|[^0-9A-Fa-f])", rb"(?:\b|[G-Zg-z_])"
#: In English, German, French, Spanish, Italian, Portuguese, Dutch and Polish.
_MONTH = (
    rb"(?:jan|feb|f.v|mar|m.r|mrt|a[pbv]r|ma[yij]|mag|jun|juin|giu|jul|juil|lug|aug|ao.t|ag[o.]|sep|set|o[ckt]t|out|nov"
    rb"|d.[cz]|di[czc]|ene|gen|sty|lut|kwi|cze|lip|sie|wrz|pa.|lis|gru)[a-z\x80-\xff?]{0,10}"
)
#: Letters beyond ASCII in Latin-1; the last one stands for those of other scripts, too (`plain`).
_LETTER = rb"\xaa\xb5\xba\xc0-\xd6\xd8-\xf6\xf8-\xff"
_DOMAIN = rb"(?:[0-9A-Za-z\x80-\xff-]+\.){1,16}(?:xn--[0-9A-Za-z-]{2,59}|[A-Za-z" + _LETTER + rb"]{2,24})"
#: The day of a date in words, and what stands between its month and its year.
_DAY, _OF_YEAR = rb"[0-9]{1,2}(?:st|nd|rd|th|er)?(?: (?:of|de))?[. -]{0,2}", rb"(?:[ .,-]{1,2}| del? )"
_DATE = re.compile(
    rb"(?:[0-9]{1,4}[./-][0-9]{1,2}[./-][0-9]{1,4}|"
    + _DAY
    + _MONTH
    + _OF_YEAR
    + rb"[0-9]{4}|"
    + _MONTH
    + rb"[ .]{1,2}[0-9]{1,2}(?:st|nd|rd|th)?,? [0-9]{4})\Z",
    re.IGNORECASE,
)
_3, _4 = rb"[0-9]{3}", rb"[0-9]{4}"
_OCTET = rb"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_COUNTRY = ("(?:" + "|".join(checksums.IBAN_LENGTHS) + ")").encode()
#: What announces a date of birth.
_BORN = (
    rb"born|birth|dob\b|d\.o\.b|geboren|geburtsdatum|geb\.|geboorte|\bn.e? le\b|naissance|nacid[oa]|nacimiento"
    rb"|nascid[oa]|nascimento|nascita|\bnat[oa] (?:il|a)\b|urodz|\bur\."
)
#: The digits of a telephone number, and what may stand between the word that announces it and them.
_TELEPHONE, _NEAR = rb"[0-9(](?:[ ()./\n-]{0,2}[0-9]){6,14}", rb"[^0-9+(\n]{0,20}"


#: What announces a secret, and what stands between that and the secret.
_SECRET = (
    rb"(?:password|passwd|pwd|passphrase|passwort|kennwort|wachtwoord|mot de passe|contrase.a|senha|has.o|secret"
    rb"|(?:api|access|account|secret)[_ -]?key|(?:access|auth)[_ -]?token)"
)
_SAID = (
    rb"(?:is[ \t]{0,2}:?|:=|=>|::[ \t]|[:=])[ \t]{0,8}"
    rb"(?:[|>][+-]?)?\r?\n?[ \t]{0,8}[\"'`]{0,3}"  # of YAML's blocks
)
#: What a secret without a form of its own consists of.
_CHARACTERS = "0-9A-Za-z!#$%&*+./:=?@^_~-"
_VALUE = b"[" + _CHARACTERS.encode() + b"]{6,}"


@dataclass(frozen=True)
class Kind:
    """One kind of data.

    Attributes:
        name: As policies, audit and metrics call it.
        group: Its class.
        hint: The cheap pattern without which none of it is looked for (`scanner.HINTS`).
        patterns: RE2 patterns of candidates.
        check: Narrows a candidate to the finding or refuses it.
        redactable: A placeholder can stand for all of it.
        rest: It has no greatest length and goes on with these, as in a class of a pattern.
        swift: Its patterns match in one way only, so Python's own engine is linear in the text, too. It takes longer
            to find a candidate, but hands it over in a quarter of the time: for texts full of them.
    """

    name: str
    group: DataClass
    hint: str
    patterns: tuple[bytes, ...]
    check: Check
    redactable: bool = True
    rest: str = ""
    swift: bool = False
    not_behind: bytes = b""

    def swift_form(self, pattern: bytes) -> re.Pattern[bytes] | None:
        """A pattern of its for Python's own engine, which has another name for the end of a text; None: not swift."""
        if not self.swift:
            return None
        if self.not_behind:
            pattern = pattern.replace(_START, _START + self.not_behind, 1)
        return re.compile(pattern.replace(rb"\z", rb"\Z"))


def _in_groups(first: bytes, *others: bytes) -> tuple[bytes, ...]:
    """Patterns of a number in groups of digits, the same between all of them.

    One that ends of lines or columns part stands alone: in a table every few numbers would be one.
    """
    same = [_START + first + b"".join(between + other for other in others) for between in _BETWEEN]
    parted = b"|".join(
        first + b"".join((_PARTED if place == end else _ANYHOW) + other for place, other in enumerate(others))
        for end in range(len(others))
    )
    return (*same, _ALONE_START + b"(?:" + parted + b")" + _ALONE_END)


#: Lengths of card numbers by how they begin.
_CARD_LENGTHS: dict[str, Sequence[int]] = {
    **{f"4{second}": (13, 16, 19) for second in range(10)}, **{f"5{second}": (16,) for second in range(10)},
    **{f"6{second}": range(13, 20) for second in range(10)}, **dict.fromkeys(("34", "37"), (15,)),
    **dict.fromkeys(("30", "36", "38", "39"), range(14, 20)), "35": range(16, 20),
    **dict.fromkeys(("22", "23", "24", "25", "26", "27"), (16,)),
}  # fmt: skip


#: Whether four digits begin a number of 16, by their value.
_BEGINS = bytes(
    16 in _CARD_LENGTHS.get(f"{first:04d}"[:2], ()) and not (2000 <= first <= 2220 or 2721 <= first < 3000)
    for first in range(10_000)
)


def _card(digits: str) -> bool:
    if len(digits) not in _CARD_LENGTHS.get(digits[:2], ()):
        return False
    return (digits[0] != "2" or "2221" <= digits[:4] <= "2720") and checksums.luhn(digits)


#: Hints; see `scanner.HINTS`.
_AT, _NUMBER, _GROUPS, _DOTS, _COLONS = "at", "number", "groups", "dots", "colons"
_WORD, _KEY, _ANNOUNCED, _PHONES, _CALLS = "word", "key", "announced", "phones", "calls"
_SETTINGS = "settings"


def _announced(words: bytes, value: bytes, gap: int = 30) -> bytes:
    return rb"(?i)(?:" + words + rb")[^0-9\n]{0,%d}" % gap + value


def _birth(text: bytes, start: int, end: int) -> tuple[int, int] | None:
    found = _DATE.search(text[start:end])
    return (start + found.start(), end) if found and not checks.is_one_of(text, end, checks.DIGITS) else None


def _passport_number(value: bytes) -> bool:
    return 6 <= len(value) <= 9 and sum(character in checks.DIGITS for character in value) >= 4


def _card_in_one(digits: str) -> bool:
    # Of 13 digits are articles (EAN, whose check digit is another one); the cards were given out until about 2000.
    return _card(digits) and not (len(digits) == 13 and checksums.ean(digits))


def _card_in_fours(groups: list[int], place: int) -> bool:
    return _BEGINS[groups[place]] > 0 and checksums.luhn_in_fours(groups, place)


def _aadhaar(digits: str) -> bool:
    return len(digits) == 12 and _aadhaar_in_fours([int(digits[:4]), int(digits[4:8]), int(digits[8:])], 0)


def _aadhaar_in_fours(groups: list[int], place: int) -> bool:
    if not checksums.aadhaar_in_fours(groups, place):
        return False
    # Years are none.
    return groups[place] // 100 != 20 or not {groups[place + 1] // 100, groups[place + 2] // 100} <= {19, 20}


KINDS: tuple[Kind, ...] = (
    Kind(
        "email", "contact", _AT,
        (
            rb"(?:[0-9A-Za-z._%+'?\x80-\xff-]{1,64}|\"[^\"@\r\n]{1,64}\")@" + _DOMAIN,
            # An address in one that bounces (VERP).
            rb"[0-9A-Za-z._%]{1,64}[+-][0-9A-Za-z._%+'-]{1,64}=[0-9A-Za-z-]{1,63}(?:\.[0-9A-Za-z-]{1,63}){1,4}@"
            + _DOMAIN,
        ),
        checks.email,
    ),
    Kind(
        "phone", "contact", _NUMBER,
        (
            rb"(?:\A|[^0-9+])\+[1-9](?:[ \t().\n/-]{0,3}[0-9]){6,14}",
            rb"(?:\A|[^0-9A-Fa-fx.-]|[^0-9A-Fa-f][.-])00[1-9](?:[ \t().\n/-]{0,3}[0-9]){7,14}",
            # What ends one line and what begins the next are two numbers, but behind a dash.
            _START + rb"\([2-9][0-9]{2}\)[ .\n-]{0,2}[2-9][0-9]{2}[ .\n-]{1,2}[0-9]{4}",
        ),
        checks.phone, swift=True,
    ),
    Kind(
        "phone", "contact", _NUMBER,
        (_START + rb"[2-9][0-9]{2}(?:[ .-]{1,2}|-\n)[2-9][0-9]{2}(?:[ .-]{1,2}|-\n)[0-9]{4}",),
        checks.phone, swift=True, not_behind=rb"(?<!(?<![0-9+])\+1[ .-])",
    ),
    Kind(
        "phone", "contact", _NUMBER,
        (
            # Mobile numbers of Germany and of the United Kingdom as they are written at home.
            _START + rb"\(?01[567][0-9]{1,2}\)?[ ./-]{1,3}[0-9](?:[ -]?[0-9]){5,7}" + _END,
            _START + rb"\(?07[1-9][0-9]{2}\)?[ -](?:[0-9]{6}|[0-9]{3}[ -][0-9]{3})" + _END,
            # And of Japan, those of its two largest cities, too.
            _START + rb"0[5789]0-[0-9]{4}-[0-9]{4}" + _END,
            _START + rb"0[36]-[3-9][0-9]{3}-[0-9]{4}" + _END,
        ),
        checks.phone, swift=True,
    ),
    Kind(
        "phone", "contact", _NUMBER,
        (
            # Of France.
            _START + rb"0[1-9](?: [0-9]{2}){4}" + _END,
            _START + rb"0[1-9](?:\.[0-9]{2}){4}" + _END,
            _START + rb"0[1-9](?:-[0-9]{2}){4}" + _END,
        ),
        checks.in_pairs, swift=True,
    ),
    Kind(
        "phone", "contact", _PHONES,
        (
            rb"(?i)(?:phone|telefon|mobiltel|handy|whatsapp)" + _NEAR + _TELEPHONE,
            rb"(?i)(?:(?:\A|[^0-9A-Za-z])(?:tel|t[\xe9\xc9]l|telefax|telegram|fax|sms|mobile?)|(?-i:[a-z](?:Tel|Fax|Mobile|Cell)))"
            rb"(?:[ _.-]?(?:no|nr|num|number|nummer|funk))?(?:[^0-9A-Za-z+(\n]" + _NEAR + b")?" + _TELEPHONE,
            rb"(?i)\b(?:unter|rufe?n?|rufnummern?|anruf(?:en|e)?|erreich(?:en|bar|t|e)?)\b[^0-9+(\n]{0,25}"
            rb"\(?0[1-9][0-9]{1,4}(?:[ ()./\n-]{0,2}[0-9]){4,10}",
        ),
        checks.announced_phone,
    ),
    Kind(
        "phone", "contact", _CALLS,
        (
            # Words that announce other things, too: what begins as a number of another place, or follows such words.
            rb"(?i)(?:\A|[^0-9A-Za-z_-])(?:call|dial|cell)(?:ed|ing|s|back|er id)?[ :.,\"]" + _NEAR
            + rb"(?:\(?0[0-9 ()/-](?:[ ()./\n-]{0,2}[0-9]){5,14}|\([0-9](?:[ ()./\n-]{0,2}[0-9]){6,14}"
            rb"|(?:1[ .-]?)?[2-9][0-9]{2}[ .-]?[0-9]{3}[ .-]?[0-9]{4}|[2-9][0-9]{2}[.-][0-9]{4})",
            rb"(?i)(?:\A|[^0-9A-Za-z_-])(?:call|dial|cell:)"
            rb"(?: (?:me|us|him|her|them|back|now|at|on|the|my|our|number|no|is)){0,4}[ :.]{1,2}" + _TELEPHONE,
        ),
        checks.announced_phone,
    ),
    Kind(
        "ip_address", "contact", _DOTS, (rb"(?:\A|[^0-9.])" + _OCTET + rb"(?:\." + _OCTET + b"){3}",), checks.ipv4,
        swift=True,
    ),
    Kind(
        "ip_address", "contact", _COLONS,
        (rb"(?:\A|[^0-9A-Za-z:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,8}(?:\.[0-9]{1,3}){0,3}",), checks.ipv6,
    ),
    Kind(
        "credit_card", "financial", _NUMBER, (_START + rb"[2-6][0-9]{12,18}",),
        checks.not_in_hash(number(_card_in_one, apart=True)), swift=True,
    ),
    Kind(
        "credit_card", "financial", _GROUPS,
        (
            *_in_groups(rb"(?:[3-6][0-9]{3}|2[2-7][0-9]{2})", _4, _4, _4),
            *_in_groups(rb"3[0-9]{3}", rb"[0-9]{6}", rb"[0-9]{4,5}"),
        ),
        in_fours(4, _card, _card_in_fours), swift=True,
    ),
    Kind(
        "iban", "financial", _NUMBER,
        (
            _WORD_START + rb"(?i)(?:IBAN)?" + _COUNTRY + rb"[ -]?[0-9]{2}[0-9A-Z]{11,30}",
            _COUNTRY + rb"[0-9]{13,30}",
            _WORD_START + rb"(?i)(?:IBAN)?" + _COUNTRY + rb"[ -]?[0-9]{2}(?:[ \t\n.-]{1,3}[0-9A-Z]{4}){2,7}"
            rb"(?:[ \t\n.-]{1,3}[0-9A-Z]{1,3})?",
        ),
        checks.iban,
    ),
    Kind(
        "us_ssn", "government", _GROUPS, _in_groups(rb"[0-9]{3}", rb"[0-9]{2}", _4),
        number(checksums.us_ssn, apart=True), swift=True,
    ),
    Kind(
        "us_ssn", "government", _ANNOUNCED, (_announced(rb"ssn|social.{0,3}security", rb"[0-9]{9}", 40),),
        last_digits(9, checksums.us_ssn),
    ),
    Kind(
        "us_itin", "government", _GROUPS, _in_groups(rb"9[0-9]{2}", rb"[0-9]{2}", _4),
        number(checksums.us_itin, apart=True), swift=True,
    ),
    Kind(
        "us_itin", "government", _ANNOUNCED, (_announced(rb"itin|taxpayer", rb"9[0-9]{8}", 40),),
        last_digits(9, checksums.us_itin),
    ),
    Kind(
        "us_ein", "government", _ANNOUNCED,
        (_announced(rb"(?:\b|_)ein(?:\b|_)|employer id|tax id", rb"[0-9]{2}-[0-9]{7}", 40),),
        last_digits(9, lambda digits: digits[:2] != "00"),
    ),
    Kind(
        "de_tax_id", "government", _NUMBER, (_HEX_START + rb"[1-9][0-9]{10}" + _HEX_END,),
        number(checksums.de_tax_id, apart=True), swift=True,
    ),
    Kind(
        "de_tax_id", "government", _GROUPS, _in_groups(rb"[1-9][0-9]", _3, _3, _3),
        number(checksums.de_tax_id, apart=True), swift=True,
    ),
    Kind(
        "uk_nino", "government", _NUMBER,
        (_WORD_START + rb"(?i)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z](?:[ -]?[0-9]{2}){3}[ -]?[A-D]",),
        number(lambda bare: bare[:2].upper() not in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ"), ALNUM),
    ),
    Kind(
        # With dashes it is a telephone number of North America where it may be one and nothing says what it is.
        "uk_nhs", "government", _NUMBER,
        (
            _START + rb"[0-9]{3} [0-9]{3} [0-9]{4}",
            _START + rb"(?:[01][0-9]{2}-[0-9]{3}|[2-9][0-9]{2}-[01][0-9]{2})-[0-9]{4}",
        ),
        at_home(number(checksums.uk_nhs, apart=True)), swift=True,
        not_behind=rb"(?<!\+[1-9][ .-])(?<!\+[1-9][0-9][ .-])(?<!\+[1-9][0-9]{2}[ .-])",
    ),
    Kind(
        "uk_nhs", "government", _ANNOUNCED,
        (_announced(rb"(?:\b|_)nhs", rb"[0-9]{3}[ -]?[0-9]{3}[ -]?[0-9]{4}"),), last_digits(10, checksums.uk_nhs),
    ),
    Kind(
        # An A or B beside it is that of a hexadecimal number.
        "fr_nir", "government", _NUMBER, (_START + rb"[1-478][0-9]{4}[0-9][0-9ABab][0-9]{6} ?[0-9]{2}" + _END,),
        number(checksums.fr_nir, checks.DIGITS + b"ABab"),
    ),
    Kind(
        "fr_nir", "government", _NUMBER,
        (
            _START + rb"[1-478][ .-][0-9]{2}[ .-][0-9]{2}[ .-][0-9][0-9ABab][ .-][0-9]{3}[ .-][0-9]{3}"
            rb"(?: - |[ .-])[0-9]{2}" + _END,
        ),
        number(checksums.fr_nir, even=False),
    ),
    Kind(
        "es_nif", "government", _NUMBER,
        (
            _WORD_START + rb"(?:[0-9]|[XYZxyz][ .-]?)[0-9]{7}[ .-]?[A-Za-z]",
            _WORD_START + rb"[0-9]{2}\.[0-9]{3}\.[0-9]{3}[ .-]?[A-Za-z]",
        ),
        number(checksums.es_nif, ALNUM, even=False),
    ),
    Kind(
        "it_codice_fiscale", "government", _WORD,
        (
            _WORD_START + rb"(?i)[A-Z]{6}[0-9L-V]{2}[A-EHLMPR-T][0-9L-V]{2}[A-Z][0-9L-V]{3}[A-Z]",
        ),
        number(checksums.it_codice_fiscale, ALNUM),
    ),
    Kind(
        "pl_pesel", "government", _NUMBER,
        # It begins with a date: year, month with 20 a century, day.
        (
            _HEX_START + rb"[0-9]{2}(?:[02468][1-9]|[13579][0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{5}" + _HEX_END,
        ),
        number(checksums.pl_pesel, apart=True), swift=True,
    ),
    Kind(
        "nl_bsn", "government", _ANNOUNCED, (_announced(rb"(?:\b|_)bsn|burgerservice|sofinummer", rb"[0-9]{9}", 40),),
        last_digits(9, checksums.nl_bsn),
    ),
    Kind(
        "in_aadhaar", "government", _GROUPS, _in_groups(rb"[2-9][0-9]{3}", _4, _4),
        in_fours(3, _aadhaar, _aadhaar_in_fours), swift=True,
    ),
    Kind(
        "in_aadhaar", "government", _ANNOUNCED, (_announced(rb"aadhaar|aadhar|uidai", rb"[2-9][0-9]{11}", 40),),
        last_digits(12, checksums.aadhaar),
    ),
    Kind(
        "passport", "government", _WORD,
        (
            rb"(?i)(?:passport|reisepass|passnummer|pass-?nr|passeport|pasaporte|passaporto|passaporte|paspoort|paszport)"
            rb"[a-z]{0,8}(?:[^0-9A-Za-z]{1,3}(?:n|no|nr|number|nummer|n.m(?:ero)?|num.ro|id|is|was|code)){0,3}"
            rb"[^0-9A-Za-z]{1,6}[0-9A-Za-z]{6,9}",
        ),
        last_token(ALNUM, _passport_number),
    ),
    Kind(
        "passport", "government", _NUMBER,
        (_WORD_START + rb"[0-9A-Z<]{9}[0-9][A-Z<]{3}[0-9]{7}[MFX<][0-9]{7}[0-9A-Z<]{14}[0-9<][0-9]",),
        checks.machine_zone,
    ),
    Kind(
        "date_of_birth", "person", _WORD,
        (
            rb"(?i)(?:" + _BORN + rb")[^0-9\n]{0,25}"
            rb"(?:[0-9]{1,4}[./-][0-9]{1,2}[./-][0-9]{1,4}|" + _DAY + _MONTH + _OF_YEAR + rb"[0-9]{4})",
            rb"(?i)(?:" + _BORN + rb")[^0-9\n]{0,25}" + _MONTH + rb"[ .]{1,2}[0-9]{1,2}(?:st|nd|rd|th)?,? "
            rb"[0-9]{4}",
        ),
        _birth,
    ),
    Kind(
        "api_key", "secret", _KEY,
        (
            _WORD_START + rb"(?:(?:sk|pk|rk)[-_][0-9A-Za-z_-]{16,}|A[KS]IA[0-9A-Z]{16}|gh[pousr]_[0-9A-Za-z]{20,}"
            rb"|github_pat_[0-9A-Za-z_]{20,}|glpat-[0-9A-Za-z_-]{20,}|xox[abeprs]-[0-9A-Za-z-]{10,}"
            rb"|AIza[0-9A-Za-z_-]{35}|hf_[0-9A-Za-z]{20,}|npm_[0-9A-Za-z]{30,}|pypi-[0-9A-Za-z_-]{30,}"
            rb"|SG\.[0-9A-Za-z_-]{16,}\.[0-9A-Za-z_-]{16,}"
            rb"|(?:gsk_|nvapi-|xai-|do[opr]_v1_|whsec_|hv[sb]\.|glsa_|glc_|dckr_pat_|r8_|lin_api_|ya29\.|tgp_v1_|sq0[a-z]{3}-"
            rb"|AGE-SECRET-KEY-1|ATATT3|shp(?:at|ss|ca|pa)_)[0-9A-Za-z_=-]{20,}|dapi[0-9a-f]{32}"
            rb"|SK[0-9a-f]{32}|[0-9]{8,10}:AA[0-9A-Za-z_-]{32,33}|[0-9A-Za-z_.~-]{3}[78]Q~[0-9A-Za-z_.~-]{31,34}|hooks\.slack\.com/services/[0-9A-Z]{6,16}/[0-9A-Z]{6,16}/[0-9A-Za-z]{16,}"
            rb"|eyJ[0-9A-Za-z_-]{16,}(?:\.[0-9A-Za-z_-]*){0,2})",
            rb"(?:\A|[^0-9A-Za-z_-])key-[0-9a-f]{32}",  # others' have a name before it, such as a cache's
        ),
        checks.key, rest="0-9A-Za-z_.-",
    ),
    Kind(
        # Also in base64, as files of Kubernetes have it, and PuTTY's.
        "private_key", "secret", _KEY,
        (
            rb"-----BEGIN [A-Z ]{0,24}PRIVATE KEY",
            rb"LS0tLS1CRUdJTi[0-9A-Za-z+/]{1,24}(?:UFJJVkFURSBLRV|BSSVZBVEUgS0VZ|QUklWQVRFIEtFW)",
            rb"PuTTY-User-Key-File-[0-9]",
        ),
        checks.whole_word, redactable=False,
    ),
    Kind(
        "credential", "secret", _WORD, (rb"(?i)" + _SECRET + rb"[\"'`]?\]?[ \t]{0,2}" + _SAID + _VALUE,),
        checks.secret(_SAID, rb"(?i)(?:[/&;,|?]|%[0-9A-F]{2})" + _SECRET + rb"[:=]"), rest=_CHARACTERS,
    ),
    Kind(
        # As an element of XML, and as an argument of a command.
        "credential", "secret", _WORD,
        (rb"(?i)(?:<" + _SECRET + rb">|--" + _SECRET + rb"[ \t][\"']?)" + _VALUE,),
        checks.secret(rb">|[ \t][\"']?"), rest=_CHARACTERS,
    ),
    Kind(
        # In a property list.
        "credential", "secret", _SETTINGS,
        (rb"(?i)" + _SECRET + rb"</key>[ \t\r\n]{0,16}<string>" + _VALUE,), checks.secret(rb"<string>"),
        rest=_CHARACTERS,
    ),
    Kind(
        # As an attribute beside its name: of forms, and of configurations of .NET and Java.
        "credential", "secret", _SETTINGS,
        (rb"(?i)" + _SECRET + rb"[\"'][^<>\n]{0,80}[ \t\n]value[ \t]{0,2}=[ \t]{0,2}[\"']" + _VALUE,),
        checks.secret(rb"(?i)value[ \t]{0,2}=[ \t]{0,2}[\"']"), rest=_CHARACTERS,
    ),
    Kind(
        # In SQL.
        "credential", "secret", _SETTINGS,
        (rb"(?i)(?:identified (?:with [0-9a-z_]{1,32} )?(?:by|as)|\bpassword)[ \t]{1,4}'" + _VALUE,),
        checks.secret(rb"[ \t]'"), rest=_CHARACTERS,
    ),
    Kind(
        # In a `.netrc`, and for curl.
        "credential", "secret", _SETTINGS,
        (rb"(?i)\blogin[ \t\r\n]{1,4}[^ \t\r\n]{1,64}[ \t\r\n]{1,4}password[ \t]{1,4}" + _VALUE,),
        checks.secret(rb"(?i)password[ \t]{1,4}"), rest=_CHARACTERS,
    ),
    Kind(
        "credential", "secret", _SETTINGS,
        (rb"\bcurl[ \t][^\n|;]{0,200}(?:-u|--user)[ \t=]?[\"']?[^ \t:\"'\n]{1,64}:" + _VALUE,),
        checks.secret(rb"(?:-u|--user)[ \t=]?[\"']?[^ \t:\"'\n]{1,64}:"), rest=_CHARACTERS,
    ),
    Kind(
        # A variable of the environment, a header or a tool's field, and what signs an address for whoever has it.
        "credential", "secret", _SETTINGS,
        (
            rb"(?:[0-9A-Z]_(?:TOKEN|PAT)|(?i:\bauthorization(?:_token)?|subscription[-_]key|\bx(?:-[a-z]{1,20}){0,2}-"
            rb"(?:key|token)))[\"'`]?\]?[ \t]{0,2}(?::=|[:=])[ \t]{0,4}[\"'`]{0,3}" + _VALUE[:-4] + b"{16,}",
            rb"(?i)[?&](?:sig|x-(?:amz|goog)-signature)=[0-9A-Za-z%+/_-]{40,}",
        ),
        checks.secret(rb"(?::=|[:=])[ \t]{0,4}[\"'`]{0,3}"), rest=_CHARACTERS,
    ),
    Kind(
        # Docker's, in base64.
        "credential", "secret", _SETTINGS, (rb"\"auth\"[ \t]?:[ \t]{0,4}\"[0-9A-Za-z+/]{12,}={0,2}",),
        checks.secret(rb":[ \t]{0,4}\""), rest=_CHARACTERS,
    ),
    Kind(
        "credential", "secret", _AT, (rb"://[^/ \t\r\n:@\"'`<>]{0,64}:[^/ \t\r\n@\"'`<>]{3,128}@",), checks.in_address,
    ),
    Kind(
        "credential", "secret", _WORD, (rb"(?i)\b(?:bearer|basic)[ \t]{1,2}[0-9A-Za-z+/._~-]{16,}=*",),
        checks.secret(rb"[ \t]{1,2}"), rest=_CHARACTERS,
    ),
)  # fmt: skip

#: Names and their classes; `name` is found by Presidio alone.
CLASS_OF: dict[str, DataClass] = {kind.name: kind.group for kind in KINDS} | {"name": "person", "location": "person"}
CLASSES: tuple[DataClass, ...] = ("contact", "financial", "government", "person", "secret")
#: What cannot be replaced by a placeholder as a whole.
NOT_REDACTABLE = frozenset(kind.name for kind in KINDS if not kind.redactable)
