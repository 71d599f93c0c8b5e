"""Check digits of the numbers that name people and accounts, each by the rule that its issuer published.

All functions take the bare characters (no separators) and say whether their check digits fit.
"""

import itertools
import operator
from collections.abc import Sequence

#: Length of an IBAN by country, from the IBAN registry (ISO 13616).
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24,
    "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24,
    "XK": 20,
}  # fmt: skip

_VERHOEFF_PRODUCT = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    (1, 2, 3, 4, 0, 6, 7, 8, 9, 5),
    (2, 3, 4, 0, 1, 7, 8, 9, 5, 6),
    (3, 4, 0, 1, 2, 8, 9, 5, 6, 7),
    (4, 0, 1, 2, 3, 9, 5, 6, 7, 8),
    (5, 9, 8, 7, 6, 0, 4, 3, 2, 1),
    (6, 5, 9, 8, 7, 1, 0, 4, 3, 2),
    (7, 6, 5, 9, 8, 2, 1, 0, 4, 3),
    (8, 7, 6, 5, 9, 3, 2, 1, 0, 4),
    (9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
)
_VERHOEFF_PERMUTATION = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    (1, 5, 7, 6, 2, 8, 3, 0, 9, 4),
    (5, 8, 0, 3, 7, 9, 6, 1, 4, 2),
    (8, 9, 1, 6, 0, 4, 3, 5, 2, 7),
    (9, 4, 5, 3, 1, 2, 6, 8, 7, 0),
    (4, 2, 8, 6, 5, 7, 3, 9, 0, 1),
    (2, 7, 9, 3, 8, 0, 6, 4, 1, 5),
    (7, 0, 4, 6, 9, 1, 3, 2, 5, 8),
)


def _verhoeff(place: int) -> bytes:
    """What four digits come to, by their value; the last of them is so many places from the right (as modulo 8)."""
    two = [
        [
            _VERHOEFF_PRODUCT[_VERHOEFF_PERMUTATION[at][last]][_VERHOEFF_PERMUTATION[at + 1][first]]
            for first in range(10)
            for last in range(10)
        ]
        for at in (place, place + 2)
    ]
    return bytes(_VERHOEFF_PRODUCT[last][first] for first in two[1] for last in two[0])


#: In places 0 to 3 and 8 to 11, and in places 4 to 7.
_OUTER, _INNER = _verhoeff(0), _verhoeff(4)
#: A to Z as 10 to 35.
_LETTERS_AS_NUMBERS = {ord("A") + place: str(10 + place) for place in range(26)}
#: What four digits add to Luhn's sum, by their value: every other one counts twice, its own digits added.
_LUHN = bytes(
    sum(digit if place % 2 else (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)[digit] for place, digit in enumerate(four))
    for four in itertools.product(range(10), repeat=4)
)
_NIF_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"
#: Values of the characters in odd places of an Italian tax code, digits first; letters A.. have the same ten and more.
_CODICE_ODD = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)


def luhn(digits: str) -> bool:
    """Payment cards (ISO/IEC 7812-1, annex B)."""
    rest, total = int(digits), 0
    while rest:
        total += _LUHN[rest % 10_000]
        rest //= 10_000
    return total % 10 == 0


def luhn_in_fours(groups: list[int], place: int) -> bool:
    """The same for four groups of four digits from a place, by their values."""
    first, second, third, last = groups[place : place + 4]
    return (_LUHN[first] + _LUHN[second] + _LUHN[third] + _LUHN[last]) % 10 == 0


def ean(digits: str) -> bool:
    """Articles in shops (GS1: EAN-13): weights 1 3 modulo 10."""
    return weighted(digits, (1, 3) * 6 + (1,), 10) == 0


def iban(text: str) -> bool:
    """Bank accounts (ISO 13616: ISO 7064 MOD 97-10, after the country's length)."""
    text = text.upper()
    if IBAN_LENGTHS.get(text[:2]) != len(text):
        return False
    return int((text[4:] + text[:4]).translate(_LETTERS_AS_NUMBERS)) % 97 == 1


def weighted(digits: str, weights: Sequence[int], modulus: int) -> int:
    """The weighted sum of the digits that have a weight, modulo `modulus`."""
    total: int = sum(map(operator.mul, digits.encode(), weights))
    return (total - ord("0") * sum(weights[: len(digits)])) % modulus


def us_ssn(digits: str) -> bool:
    """US social security numbers: no check digit, but ranges that were never given out."""
    return digits[:3] not in ("000", "666") and digits[0] != "9" and digits[3:5] != "00" and digits[5:] != "0000"


def us_itin(digits: str) -> bool:
    """US individual taxpayer numbers: 9xx with a group of 50-65, 70-88, 90-92 or 94-99."""
    group = int(digits[3:5])
    return digits[0] == "9" and (50 <= group <= 65 or 70 <= group <= 88 or 90 <= group <= 92 or 94 <= group <= 99)


def de_tax_id(digits: str) -> bool:
    """German tax identification numbers: one digit of the first ten repeats; ISO 7064 MOD 11,10."""
    if digits[0] == "0" or len(set(digits[:10])) not in (8, 9):
        return False
    product = 10
    for digit in digits[:10]:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == int(digits[10])


def fr_nir(text: str) -> bool:
    """French social security numbers: 97 minus the number modulo 97; 2A and 2B are Corsica."""
    number = text[:13].upper().replace("2A", "19").replace("2B", "18")
    return len(text) == 15 and number.isdigit() and 97 - int(number) % 97 == int(text[13:])


def es_nif(text: str) -> bool:
    """Spanish DNI and NIE: the letter is the number modulo 23."""
    text = text.upper()
    number = text[:-1].translate(str.maketrans("XYZ", "012"))
    return _NIF_LETTERS[int(number) % 23] == text[-1]


def it_codice_fiscale(text: str) -> bool:
    """Italian tax codes: the sum of the characters' values modulo 26 is the last letter."""
    text = text.upper()
    total = 0
    for place, character in enumerate(text[:15]):
        value = int(character) if character.isdigit() else ord(character) - ord("A")
        total += _CODICE_ODD[value] if place % 2 == 0 else value
    return ord(text[15]) - ord("A") == total % 26


def pl_pesel(digits: str) -> bool:
    """Polish PESEL numbers: a date, then weights 1 3 7 9 modulo 10."""
    if not (1 <= int(digits[2:4]) % 20 <= 12 and 1 <= int(digits[4:6]) <= 31):
        return False
    return weighted(digits, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1), 10) == 0


def nl_bsn(digits: str) -> bool:
    """Dutch citizen service numbers: weights 9 to 2, then -1, modulo 11."""
    return weighted(digits, (9, 8, 7, 6, 5, 4, 3, 2, -1), 11) == 0


def uk_nhs(digits: str) -> bool:
    """UK health service numbers: weights 10 to 2 modulo 11."""
    check = 11 - weighted(digits, (10, 9, 8, 7, 6, 5, 4, 3, 2), 11)
    return check % 11 == int(digits[9])


def aadhaar(digits: str) -> bool:
    """Indian Aadhaar numbers: Verhoeff's check digit; they start with 2 to 9."""
    if digits[0] in "01":
        return False
    return aadhaar_in_fours([int(digits[:4]), int(digits[4:8]), int(digits[8:])], 0)


def aadhaar_in_fours(groups: list[int], place: int) -> bool:
    """The same for three groups of four digits from a place, by their values."""
    first, inner, last = groups[place : place + 3]
    return first >= 2000 and _VERHOEFF_PRODUCT[_VERHOEFF_PRODUCT[_OUTER[last]][_INNER[inner]]][_OUTER[first]] == 0


def mrz_field(field: str, check: str) -> bool:
    """A field of a travel document's machine-readable zone (ICAO 9303-3): weights 7 3 1 modulo 10."""
    total = 0
    for place, character in enumerate(field):
        value = 0 if character == "<" else int(character, 36)
        total += value * (7, 3, 1)[place % 3]
    return str(total % 10) == check
