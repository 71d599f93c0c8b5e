"""Check digits, on numbers that the issuers or standards publish as examples."""

from collections.abc import Callable

import pytest

from tokenmill.engine.gateway.sensitivity import checksums

PUBLISHED: list[tuple[Callable[[str], bool], str]] = [
    (checksums.luhn, "79927398713"),
    (checksums.luhn, "4111111111111111"),
    (checksums.luhn, "378282246310005"),
    (checksums.iban, "DE89370400440532013000"),
    (checksums.iban, "GB29NWBK60161331926819"),
    (checksums.iban, "MT84MALT011000012345MTLCAST001S"),
    (checksums.de_tax_id, "86095742719"),
    (checksums.es_nif, "12345678Z"),
    (checksums.es_nif, "X1234567L"),
    (checksums.it_codice_fiscale, "RSSMRA85T10A562S"),
    (checksums.pl_pesel, "44051401359"),
    (checksums.nl_bsn, "111222333"),
    (checksums.uk_nhs, "9434765919"),
    (checksums.aadhaar, "234123412346"),
    (checksums.fr_nir, "255081416802538"),
]


@pytest.mark.parametrize(("fits", "number"), PUBLISHED, ids=lambda value: value if isinstance(value, str) else "")
def test_published_numbers_fit(fits: Callable[[str], bool], number: str) -> None:
    assert fits(number)
    for place, character in enumerate(number):
        if character.isdigit() and place > 1:
            changed = number[:place] + str((int(character) + 1) % 10) + number[place + 1 :]
            assert not fits(changed), f"one wrong digit must be noticed: {changed}"


def test_digits_that_change_places_are_noticed() -> None:
    """What Verhoeff's check digit is for; at every place of the number."""
    number = "234123412346"
    swapped = [number[:at] + number[at + 1] + number[at] + number[at + 2 :] for at in range(len(number) - 1)]
    assert not any(checksums.aadhaar(one) for one in swapped)


def test_the_passport_of_the_standard() -> None:
    zone = "L898902C36UTO7408122F1204159ZE184226B<<<<<10"
    assert checksums.mrz_field(zone[:9], zone[9])
    assert checksums.mrz_field(zone[13:19], zone[19])
    assert checksums.mrz_field(zone[21:27], zone[27])
    assert not checksums.mrz_field("L898902C4", "6")
