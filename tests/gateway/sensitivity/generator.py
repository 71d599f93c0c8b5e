"""Generated prompts with structured personal data: every kind in the ways in which people write it.

Check digits are made here by trying, number by number, what the issuers' own published examples are tested against in
`test_checksums.py`.
"""

import json
import random
import string
from collections.abc import Callable
from typing import Any

from tokenmill.engine.gateway.sensitivity import checksums

NAMES = ("anna", "bob", "carla", "dmitri", "emeka", "fatima", "goran", "hilde", "ines", "jun")
WORDS = [
    *("please", "summarise", "this", "letter", "for", "the", "meeting", "on", "Monday", "and", "list", "open"),
    *("points", "in", "three", "lines", "then", "draft", "an", "answer", "that", "is", "polite", "but", "firm"),
    *("about", "delivery", "of", "40", "chairs", "at", "12:30", "room", "204", "version", "1.2.3", "plan"),
]


def digits(dice: random.Random, count: int) -> str:
    return "".join(dice.choices(string.digits, k=count))


def until(make: Callable[[], str], fits: Callable[[str], bool]) -> str:
    while not fits(value := make()):
        pass
    return value


def grouped(dice: random.Random, text: str, *sizes: int) -> str:
    """In one piece, or in groups with one of the usual separators."""
    separator = dice.choice(["", " ", "-", " "])
    if not separator:
        return text
    parts, start = [], 0
    for size in sizes:
        parts.append(text[start : start + size])
        start += size
    return separator.join(part for part in (*parts, text[start:]) if part)


def email(dice: random.Random) -> str:
    name = dice.choice(NAMES) + dice.choice(["", ".", "_", "-", "+", "."]) + dice.choice(NAMES) + digits(dice, 2)
    host = dice.choice(
        [*NAMES, "m\u00fcnchen", "\u0142\u00f3d\u017a", "\u043f\u0440\u0438\u043c\u0435\u0440", "\u4f8b\u5b50"]
    )
    ends = ["com", "org", "co.uk", "de", "museum", "io", "xn--p1ai", "\u0440\u0444", "\u516c\u53f8"]
    return f"{name}@{host}.{dice.choice(ends)}"


def phone(dice: random.Random) -> str:
    number = digits(dice, 7)
    return dice.choice(
        [
            f"+49 {dice.randint(20, 999)} {number}",
            f"+1-{dice.randint(201, 989)}-{dice.randint(200, 999)}-{digits(dice, 4)}",
            f"({dice.randint(201, 989)}) {dice.randint(200, 999)}-{digits(dice, 4)}",
            f"+44 (0)20 {digits(dice, 4)} {digits(dice, 4)}",
            f"0033 1 {digits(dice, 2)} {digits(dice, 2)} {digits(dice, 2)} {digits(dice, 2)}",
            f"0049 {dice.randint(20, 999)} {number}",
            f"Tel.{dice.choice(['', ' ', '-Nr. '])}0{dice.randint(20, 99)} {number}",
            f"phone: 0{dice.randint(20, 99)} {number}",
            f"call me at 0{digits(dice, 3)}/{number}",
            f"unter 0{dice.randint(201, 999)} {number}",
            f"01{dice.randint(50, 79)} {dice.choice('123456789')}{digits(dice, 6)}",
            f"07{dice.randint(100, 999)} {digits(dice, 6)}",
        ]
    )


def ip_address(dice: random.Random) -> str:
    if dice.random() < 0.5:
        return ".".join(str(dice.randint(1, 199)) for _ in range(4)).replace("127.", "126.", 1)
    groups = [f"{dice.randint(0x1000, 0xFFFF):x}" for _ in range(5)]
    return f"2001:{groups[0]}::{groups[1]}" if dice.random() < 0.5 else "2a02:" + ":".join([*groups, "8a2e", "7334"])


def credit_card(dice: random.Random) -> str:
    if dice.random() < 0.25:
        number = until(lambda: dice.choice(["34", "37"]) + digits(dice, 13), checksums.luhn)
        return grouped(dice, number, 4, 6, 5)
    prefix = dice.choice(["4", "51", "55", "2221", "2720", "6011", "65", "3528"])
    number = until(lambda: prefix + digits(dice, 16 - len(prefix)), checksums.luhn)
    value = grouped(dice, number, 4, 4, 4, 4)
    return value.replace("-", dice.choice(["-", " - ", ".", "/"])).replace(" ", dice.choice([" ", "  ", "\u00a0"]))


def iban(dice: random.Random) -> str:
    country = dice.choice(["DE", "FR", "GB", "NL", "CH", "ES", "PL", "MT", "NO"])
    length = checksums.IBAN_LENGTHS[country] - 4
    body = digits(dice, length)
    if country == "GB":
        body = "".join(dice.choices(string.ascii_uppercase, k=4)) + body[4:]
    check = next(f"{n:02d}" for n in range(2, 99) if checksums.iban(f"{country}{n:02d}{body}"))
    value = country + check + body
    value = grouped(dice, value, *[4] * (len(value) // 4))
    return value.lower() if dice.random() < 0.2 else value


def us_ssn(dice: random.Random) -> str:
    number = until(lambda: digits(dice, 9), lambda text: checksums.us_ssn(text) and text[0] != "9")
    shown = [f"{number[:3]}-{number[3:5]}-{number[5:]}", f"{number[:3]} {number[3:5]} {number[5:]}",
             f"SSN {number}", f"social security number: {number}"]  # fmt: skip
    return dice.choice(shown)


def us_itin(dice: random.Random) -> str:
    number = until(lambda: "9" + digits(dice, 8), checksums.us_itin)
    return dice.choice([f"{number[:3]}-{number[3:5]}-{number[5:]}", f"ITIN {number}"])


def us_ein(dice: random.Random) -> str:
    return f"EIN {dice.randint(10, 99)}-{digits(dice, 7)}"


def de_tax_id(dice: random.Random) -> str:
    return grouped(dice, until(lambda: digits(dice, 11), checksums.de_tax_id), 2, 3, 3, 3)


def uk_nino(dice: random.Random) -> str:
    start = dice.choice(["AB", "CE", "JG", "WP", "SN"])
    return grouped(dice, start + digits(dice, 6) + dice.choice("ABCD"), 2, 2, 2, 2, 1)


def uk_nhs(dice: random.Random) -> str:
    number = until(lambda: digits(dice, 10), checksums.uk_nhs)
    return dice.choice([f"{number[:3]} {number[3:6]} {number[6:]}", f"NHS number {number}"])


def fr_nir(dice: random.Random) -> str:
    front = dice.choice("12") + digits(dice, 2) + f"{dice.randint(1, 12):02d}" + dice.choice(["75", "13", "2A"])
    front += digits(dice, 6)
    check = next(f"{n:02d}" for n in range(1, 98) if checksums.fr_nir(f"{front}{n:02d}"))
    value = front + check
    return dice.choice(
        [value, f"{value[0]} {value[1:3]} {value[3:5]} {value[5:7]} {value[7:10]} {value[10:13]} {check}"]
    )


def es_nif(dice: random.Random) -> str:
    front = digits(dice, 8) if dice.random() < 0.6 else dice.choice("XYZ") + digits(dice, 7)
    letter = next(c for c in string.ascii_uppercase if checksums.es_nif(front + c))
    return front + dice.choice(["", "-", " "]) + letter


def it_codice_fiscale(dice: random.Random) -> str:
    letters = string.ascii_uppercase
    front = "".join(dice.choices(letters, k=6)) + digits(dice, 2) + dice.choice("ABCDEHLMPRST")
    front += digits(dice, 2) + dice.choice(letters) + digits(dice, 3)
    return front + next(c for c in letters if checksums.it_codice_fiscale(front + c))


def pl_pesel(dice: random.Random) -> str:
    return until(
        lambda: f"{digits(dice, 2)}{dice.randint(1, 12):02d}{dice.randint(1, 28):02d}{digits(dice, 5)}",
        checksums.pl_pesel,
    )


def nl_bsn(dice: random.Random) -> str:
    return f"{dice.choice(['BSN', 'burgerservicenummer'])} {until(lambda: digits(dice, 9), checksums.nl_bsn)}"


def in_aadhaar(dice: random.Random) -> str:
    number = until(lambda: dice.choice("23456789") + digits(dice, 11), checksums.aadhaar)
    return dice.choice([f"{number[:4]} {number[4:8]} {number[8:]}", f"Aadhaar: {number}"])


def passport(dice: random.Random) -> str:
    number = dice.choice(["C", "K", "X", ""]) + digits(dice, 8)
    if dice.random() < 0.3:
        return _zone(dice)
    return dice.choice([f"passport number {number}", f"Passport No: {number}", f"Reisepass {number}"])


def _zone(dice: random.Random) -> str:
    def checked(field: str) -> str:
        return field + next(c for c in string.digits if checksums.mrz_field(field, c))

    number = "".join(dice.choices(string.ascii_uppercase, k=2)) + digits(dice, 7)
    born = f"{digits(dice, 2)}{dice.randint(10, 12)}{dice.randint(10, 28)}"
    return f"{checked(number)}UTO{checked(born)}F{checked(born)}<<<<<<<<<<<<<<0{digits(dice, 1)}"


def date_of_birth(dice: random.Random) -> str:
    day, month, year = dice.randint(1, 28), dice.randint(1, 12), dice.randint(1930, 2010)
    date = [f"{day:02d}.{month:02d}.{year}", f"{month}/{day}/{year}", f"{year}-{month:02d}-{day:02d}",
            f"{day} March {year}", f"June {day}, {year}"]  # fmt: skip
    return dice.choice(["born on ", "DOB: ", "date of birth "]) + dice.choice(date)


def api_key(dice: random.Random) -> str:
    def some(count: int) -> str:
        return "".join(dice.choices(string.ascii_letters + string.digits, k=count))

    forms = [
        *("sk-proj-" + some(40), "AKIA" + some(16).upper(), "ghp_" + some(36), "AIza" + some(35), "hf_" + some(34)),
        *("xoxb-" + digits(dice, 12) + "-" + some(24), "glpat-" + some(20), f"eyJ{some(20)}.eyJ{some(40)}.{some(43)}"),
    ]
    return dice.choice(forms)


def credential(dice: random.Random) -> str:
    word = "".join(dice.choices(string.ascii_lowercase, k=6)) + digits(dice, 3) + "!"
    token = digits(dice, 2) + "".join(dice.choices(string.ascii_letters + string.digits, k=38))
    shown = [f"{what}{word}" for what in ("password: ", "password is ", "api_key=", "secret: ")]
    return dice.choice([*shown, f"aws_secret_access_key = {token}", f"Authorization: Bearer {token}"])


MAKERS: dict[str, Callable[[random.Random], str]] = {
    maker.__name__: maker
    for maker in (
        email, phone, ip_address, credit_card, iban, us_ssn, us_itin, us_ein, de_tax_id, uk_nino, uk_nhs, fr_nir,
        es_nif, it_codice_fiscale, pl_pesel, nl_bsn, in_aadhaar, passport, date_of_birth, api_key, credential,
    )
}  # fmt: skip


def prose(dice: random.Random, count: int) -> str:
    return " ".join(dice.choices(WORDS, k=count))


def text_with(dice: random.Random, value: str) -> str:
    """A text that holds a value somewhere, with the usual characters around it."""
    before, after = dice.choice([" ", "\n", ": ", " (", ' "']), dice.choice([" ", "\n", ". ", ") ", '" ', ", "])
    length = dice.choice([3, 20, 60, 1200]) if dice.random() < 0.3 else 12
    return prose(dice, dice.randint(1, length)) + before + value + after + prose(dice, dice.randint(1, length))


def escaped(text: str) -> str:
    """As JSON with every character as a `\\u` escape."""
    return '"' + "".join(f"\\u{unit:04x}" for unit in _units(text)) + '"'


def _units(text: str) -> list[int]:
    raw = text.encode("utf-16-be")
    return [raw[place] << 8 | raw[place + 1] for place in range(0, len(raw), 2)]


def body_with(dice: random.Random, text: str, value: str) -> tuple[str, dict[str, Any], bytes]:
    """(path, fields, body) of a request without a model, the text in one of the places where texts stand."""
    filler = prose(dice, 5)
    message = {"role": "user", "content": text}
    cut = text.index(value) + dice.randint(1, max(1, len(value) - 1))
    arguments = json.dumps({"note": text}, ensure_ascii=dice.random() < 0.5)
    call = {"id": "c", "type": "function", "function": {"name": "send", "arguments": arguments}}
    shapes: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": [message]}),
        ("/v1/chat/completions", {"messages": [{"role": "system", "content": text},
                                               {"role": "user", "content": filler}]}),
        ("/v1/chat/completions", {"messages": [message, {"role": "assistant", "content": "ok"},
                                               {"role": "user", "content": filler}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [
            {"type": "text", "text": text[:cut]}, {"type": "text", "text": text[cut:]}]}]}),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]},
                                               {"role": "tool", "tool_call_id": "c", "content": filler},
                                               {"role": "user", "content": filler}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": filler}], "metadata": {"note": text}}),
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": [filler, text]}),
    ]  # fmt: skip
    path, fields = dice.choice(shapes)
    raw = json.dumps(fields, ensure_ascii=dice.random() < 0.5).encode()
    if dice.random() < 0.25:
        plain = json.dumps(text).encode()
        raw = raw.replace(plain, escaped(text).encode()) if plain in raw else raw
    return path, fields, raw
