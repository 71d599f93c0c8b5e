"""The fast path: what it finds, what it leaves alone, and that it finds the same whatever stands around it."""

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.gateway.sensitivity.generator import MAKERS, prose, text_with
from tokenmill.engine.gateway.sensitivity import scanner as scanners
from tokenmill.engine.gateway.sensitivity.kinds import CLASS_OF, KINDS
from tokenmill.engine.gateway.sensitivity.plain import _FORM
from tokenmill.engine.gateway.sensitivity.scanner import OVERLAP, STRIDE, Scanner, undisguised

#: Generated values of each kind.
COUNT = 300


@pytest.fixture(scope="module")
def scanner() -> Scanner:
    return Scanner()


@pytest.mark.parametrize("kind", MAKERS)
def test_finds_every_generated_value(kind: str, scanner: Scanner) -> None:
    dice = random.Random(kind)
    missed = []
    for _ in range(COUNT):
        value = MAKERS[kind](dice)
        text = text_with(dice, value)
        found = {finding.kind for finding in scanner.find(text)}
        if kind not in found:
            missed.append((value, found))
    assert not missed, f"{len(missed)} of {COUNT} missed: {missed[:3]}"


def test_every_kind_is_generated() -> None:
    assert {kind.name for kind in KINDS} - set(MAKERS) == {"private_key"}
    assert set(CLASS_OF) - {kind.name for kind in KINDS} == {"name", "location"}


ORDINARY = [
    "The meeting is at 12:30:45 on 2025-11-24 in room 204; version 1.2.3 is due.",
    "std::vector<int> a::b; int x = 1234567; float pi = 3.14159265358979;",
    "ORDER 123456 of 2024-01-02 costs 1,234.56 EUR for 40 chairs",
    "The numbers 100000 200000 300000 400000 500000 grow.",
    "password = get_password()  # token: str",
    "uuid 123e4567-e89b-12d3-a456-426614174000 and sha 9f86d081884c7d659a2feaa0c55ad015",
    "ISBN 978-3-16-148410-0, DOI 10.1000/182, RFC 2616, ISO 8601",
    "@app.route('/a') def f(): return a @ b",
    "Population 83200000, area 357022, GDP 4456081000000",
    "Unter 01.02.2024 12:30 und unter 500 000 Euro, Aufruf 0815, Kundennummer 0123456789",
    "The bearer of this letter has basic understanding; Basic Attention Tokens; bearer responsibilities",
    "fish & chips; a=1&b=22&copy=3; caf\u00e9 \u00ab10 \u2022 20 \u2022 30\u00bb",
    "127.0.0.1 and ::1 and 0.0.0.0 are at home",
    "She was born in Paris. The passport office opens at 9.",
    "4111 1111 1111 1112 and GB29 NWBK 6016 1331 9268 18 and 000-12-3456 have wrong check digits",
    "Umsatz 2002 2003 2004 2005, 2010 2011 2012 2013",
    "2024-05-25\n2024-01-27 2024-10-12 2024-02-24 23.10.1994\n16.05.1994",
    "4093\t3410\t1794\t5575\n4093\t3410\t1794\t5576",
    "6556\n6248\n5248\n8784\n5099\n1749\n7623\n7937",
    "676\t646\n830\t350\t370 and 69 153  67 250 154  82 152",
    "4111-1111 1111.1111 and 4111 1111\n1111\n1111",
    "1111 5454 5454 5454 5454 1111 1111 1111 1111 1111",
    "68.81949618319700 and 87219.87219405313 and 1.08110889819627",
    "commit 9a8b7c6d5e4f32101234567a86095742719b",
    "Bestellnummer 0123456789, Titel vom 2024-01-15, Hotel 2024-02-01, Mittelwert 1234567, Tel Aviv 2024-05-06",
    "It was called at 2024-01-15 10:22:11; syscall=12345678; telemetry ts=1700000000; dialog opened 1700000000",
    "excellent results: 1234567 rows, cells 100 200 300 400 500, call(1000000, 2000000)",
    "call_9a8b7c6d5e4f32101234567 call_1700000000 call_id 1700000000 function-call-14310424021738416386",
    "Unterlagen zu 0123456789, Unterkapitel 01.02.03.04, Unterabschnitt 01234 56789",
    "+20240115\n+3000000 +1000000 -2000000 +1234567 C++17 20 11 2024",
    "GET /index/460 200\n2024-08-21 12:00:12 GET /index/456 200\n2024",
    "part 0012345678, 0x00123456789, 0017000000 0000",
    "v4.25.3.1 and lib==4.25.3.2 and section 1.2.3.4 and Chrome/120.0.0.0",
    "sk-learn-compatible-estimators-v1 pk_constraint_users_organisations_id rk_integration_method_fourth_order",
    "secret_key = settings.SECRET_KEY_2",
    "185057800608491a 2f1d593cd98cb5bf81eb9d880221122342784ac5fb7f41f2b137006bafc92e39",
    "id 4caa4148-3476-3878-3645-c1f3a0b2d4e5, 0895fa61-fa6d-2674-1014-7300f9edf8da",
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/98.0.217.162 Safari/537.36",
    "postgres://user:password@localhost/x, redis://:$REDIS_PASSWORD@cache, mysql://root:<password>@db, a://b:c",
    "amqp://bob:xxxx@h, a://bob:***@h, a://bob:...@h, a://bob:%s@h, a://bob:%(pass)s@h, a://bob:{pw}@h",
    "a[::2] + b[1::6, 0::10], layout[2::2], c10::f, ::1234",
    'netmask 255.255.255.252, "version": "5.0.0.93", Version=4.8.1.2, version="10.2.3.4"',
    "EAN 4006381330060, GTIN 4006381330169",
    "trace 9c4657683828399be19c4657683828ab 6f94f457ee8f389501363778570b6f94",
    "03 12 25 33 41, 01 02 03 04 05 06, 07 45 12 33 98 21, 01-12-13-24-35",
    "bornés, renaissance 12, pass-through 1234567, <secret> --secret-key",
    'PAD_TOKEN=<pad> MAX_TOKEN=4096 EOS_TOKEN: </s> SELECT a AS \'b1\' curl -u user:password https://x, "auth": "none"',
    "Idempotency-Key: 8e03978e-40d5-43e8-bc93-6894a57f9324, authorization: required",
    "key: v1-cache-key-d41d8cd98f00b204e9800998ecf8427e, pip_key-d41d8cd98f00b204e9800998ecf8427e",
    "the password 'remember me' and login anna, <td value='12345678'>, key-value-pair-0123456789, &sig=1",
    r"matches \d{3}-\d{2}-\d{4} and C:\100\200\300 and x = [1\.0, 2\.0]; see t=00:00+01:00&n=12+34",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_leaves_ordinary_text_alone(text: str, scanner: Scanner) -> None:
    assert scanner.find(text) == []


WRITTEN = [
    ("credit_card", "4111 - 1111 - 1111 - 1111"),
    ("credit_card", "4111 1111\n1111 1111"),
    ("credit_card", "4111-1111-\n1111-1111"),
    ("credit_card", "2024 ~4111 1111 1111 1111~ 123 12/27"),
    ("credit_card", "15.01.2024 ~4111 1111 1111 1111~ 2024"),
    ("credit_card", "~4111 1111 1111 1111~ 5500 0000 0000 0004 4012 8888 8888 1881"),
    ("credit_card", "1234 ~6212 3456 7890 1234 569~"),
    ("credit_card", "3782 822463 10005"),
    ("credit_card", "3056 930902 5904"),
    ("credit_card", "a.~4111\n1111\n1111\n1111~."),
    ("de_tax_id", "86 095 742 719"),
    ("de_tax_id", "Nr~86095742719~"),
    ("iban", "~DE89370400440532013000~BIC COBADEFF"),
    ("iban", "~DE89 3704 0044 0532 0130 00~BIC"),
    ("iban", "DE89 - 3704 - 0044 - 0532 - 0130 - 00"),
    ("iban", "IBAN~DE89370400440532013000~"),
    ("iban", "IBAN~GB29NWBK60161331926819~"),
    ("phone", "tel:~+49-30-1234567~"),
    ("phone", "Tel. ~030 1234567~"),
    ("phone", "Telefon: ~030/123 45 67~"),
    ("phone", "contactTel: ~030 1234567~"),
    ("phone", "Fax-Nr. ~030 1234567~"),
    ("phone", "user_phone=~5551234567~"),
    ("phone", "call ~0171 2345678~"),
    ("phone", "Call us: ~555-123-4567~"),
    ("phone", "~0033 1 78 96 83 56~\n204 open"),
    ("phone", "(212) 555\n0123"),
    ("phone", "212-555-\n0123"),
    ("phone", "212 555 0123"),
    ("phone", "Phone: ~212 555\n0123~"),
    ("phone", "Nr.~0049 30 1234567~"),
    ("phone", "caller id ~030 1234567~"),
    ("phone", "my cell is ~5551234567~"),
    ("phone", "Mobilfunk: ~0171 2345678~"),
    ("phone", "Nr~+491773793907~"),
    ("phone", "erreichbar unter ~030 1234567~"),
    ("phone", "t\u00e9l. : ~05 96 76 44 40~"),
    ("phone", "le 12/05/2024 au ~06 37 53 55 92~, merci"),
    ("phone", "~04.18.65.81.94~"),
    ("phone", "\u643a\u5e2f ~090-7925-2372~"),
    ("phone", "\u96fb\u8a71\uff1a~03-5857-7627~"),
    ("phone", "Rufnummer ~0301234567~"),
    ("ip_address", "~10.0.0.5~:8080"),
    ("ip_address", "~2001:db8:85a3::8a2e:370:7334~: connection refused"),
    ("ip_address", "~2001:db8:85a3:1:2:8a2e:370:7334~: connection refused"),
    ("api_key", "sk_live_4eC39HqLyjWDarjtT1zdp7dc"),
    ("api_key", "gsk_d33A96FC2dF25Ad2732C34bb04fBA5CD1AB3A6e5a5cEf1Ed"),
    ("api_key", "nvapi-b89c5c2058cBE0A2832E-55e5d4fDc2d9204d508B3e6_2F"),
    ("api_key", "hvs.4e57cf42EdBB37CeeEDcE3F2852faA65D70a8cCf"),
    ("api_key", "https://~hooks.slack.com/services/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~"),
    ("credential", "AccountName=x;AccountKey=~49+41BBb8C+0E4fDF318E05C+B/D0fb==~"),
    ("credential", "mot de passe : ~azerty683~"),
    ("credential", "contrase\u00f1a: ~gatito192~"),
    ("credential", "has\u0142o: ~kotek040~"),
    ("credential", "<password>~kitten461~</password>"),
    ("credential", "mysql --password ~pa55w77~ -h x"),
    ("api_key", "sk-ant-api03-AbC_d-EfG9xyz0123456789"),
    ("credential", "access_token=~ya29." + "aB3-" * 56 + "~"),
    ("credential", "Authorization: Bearer ~abc/def+ghi123456789==~"),
    ("credential", "?password=~hunter22~"),
    ("credential", "password: ~abc123xyz~/secret: def456uvw"),
    ("credential", "password: abc123xyz/secret: ~def456uvw~"),
    ("credential", "password: secret: ~hunter22~"),
    ("credential", "The password is: ~hunter22~"),
    ("credential", "password is `~hunter22~`"),
    ("credential", "Password:    ~hunter22~"),
    ("credential", "Password:\n~hunter22~"),
    ("credential", "postgres://bob:~hunter22~@localhost/x"),
    ("credential", "postgres://bob:~x7kQ-9mLp2~@localhost/x"),
    ("credential", "postgres://bob:~%40hunter22~@localhost/x"),
    ("credential", "postgres://bob:~.hunter22~@localhost/x"),
    ("credential", "password: abc123xyz%20secret: ~def456uvw~"),
    ("credential", "https://bob:~hunter:22~@db.example.com/x"),
    ("credential", "password: |\n  ~hunter22~\n"),
    ("credential", "Password:\r\n~hunter22~\r\n"),
    ("credential", "userPassword:: ~c2VjcmV0MTIz~"),
    ("credential", "os.environ['DB_PASSWORD'] = '~hunter22~'"),
    ("credential", "<key>password</key>\n  <string>~hunter22~</string>"),
    ("credential", '<input type="password" name="pw" value="~hunter22~">'),
    ("credential", '<add key="DbPassword" value="~hunter22~"/>'),
    ("credential", "CREATE USER anna WITH PASSWORD '~hunter22~';"),
    ("credential", "CREATE USER anna IDENTIFIED WITH sha2 BY '~hunter22~'"),
    ("credential", "machine example.com login anna password ~hunter22~"),
    ("credential", "curl -s -u anna:~hunter22~ https://example.com"),
    ("credential", "GITHUB_TOKEN=~0123456789abcdef0123456789abcdef01234567~"),
    ("credential", "https://x.blob.core.windows.net/a?sv=2020&sig=~Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6cXV4Zm9vYmFy%3D~"),
    ("credential", "https://s3.example/k?X-Amz-Signature=~" + "0aeed9bb" * 8 + "~"),
    ("credential", '{"auths":{"x":{"auth":"~YW5uYTpodW50ZXIyMg==~"}}}'),
    ("credential", '"server_url": "https://x/sse", "authorization": "~abcdef0123456789abcdef~"'),
    ("credential", '{"authorization_token": "~abcdef0123456789abcdef~"}'),
    ("credential", "Ocp-Apim-Subscription-Key: ~0123456789abcdef0123456789abcdef~"),
    ("credential", "X-Vendor-Token: ~0123456789abcdef0123456789abcdef~"),
    ("api_key", "dapi0123456789abcdef0123456789abcdef"),
    ("api_key", "shpat_0123456789abcdef0123456789abcdef"),
    ("api_key", "123456789:AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw1"),
    ("date_of_birth", "born on ~2nd January 1990~"),
    ("date_of_birth", "born on the ~2nd of January 1990~"),
    ("date_of_birth", "DOB=~02-JAN-1990~"),
    ("date_of_birth", "n\u00e9 le ~3/06/1992~"),
    ("date_of_birth", "n\u00e9e le ~17 f\u00e9vrier 1977~"),
    ("date_of_birth", "date de naissance : ~25/02/1942~"),
    ("date_of_birth", "nacido el ~10 de mayo de 1980~"),
    ("date_of_birth", "nato il ~10/01/1953~"),
    ("date_of_birth", "ur. ~16.05.1952~"),
    ("date_of_birth", "data urodzenia ~3 pa\u017adziernika 2002~"),
    ("date_of_birth", "Geboortedatum: ~3 mrt 1971~"),
    ("passport", "Passnummer: ~C62024610~"),
    ("passport", "passeport n\u00b0 ~54AB38186~"),
    ("passport", "Pasaporte n\u00fam. ~AAA068084~"),
    ("passport", "nr paszportu: ~EB2738836~"),
    ("es_nif", "NIE ~Y-4267195-L~"),
    ("fr_nir", "~1 84 12 76 451 089 46~bis"),
    ("fr_nir", "~1 84 12 2A 451 089 33~A"),
    ("fr_nir", "~1 84 12 76 451 089 - 46~"),
    ("fr_nir", "~1-84-12-76-451-089-46~"),
    ("uk_nhs", "patient_nhs_number: ~943-476-5919~"),
    ("uk_nhs", "_NHS number ~9434765919~_"),
    ("nl_bsn", "user_bsn: ~111222333~"),
    ("us_ein", "_EIN ~78-6362387~_"),
    ("us_ein", "company_ein: ~12-3456789~"),
    ("email", "john@a.b.c.d.e.f.g.h.i.example.com"),
    ("email", "bounces+john.doe=example.org@mail.example.com"),
    ("email", r"Hello\n~anna@example.com~"),
    ("email", r"\u003c~anna@example.com~\u003e"),
]


@pytest.mark.parametrize(("kind", "text"), WRITTEN)
def test_finds_it_as_it_is_written(kind: str, text: str, scanner: Scanner) -> None:
    """What stands between `~` is the data; without any, all of the text."""
    value = text.split("~")[1] if "~" in text else text
    text = text.replace("~", "")
    assert value in {text[one.start : one.end] for one in scanner.find(text) if one.kind == kind}


@pytest.mark.parametrize(
    "text",
    [
        "client-key-data: LS0tLS1CRUdJTiBSU0EgUFJJVkFURSBLRVktLS0tLQpNSUlF",
        "tls.key: LS0tLS1CRUdJTiBQUklWQVRFIEtFWS0tLS0tCg==",
        "LS0tLS1CRUdJTiBPUEVOU1NIIFBSSVZBVEUgS0VZLS0tLS0K",
        "PuTTY-User-Key-File-3: ssh-ed25519\nEncryption: none",
    ],
)
def test_private_keys_in_other_spellings(text: str, scanner: Scanner) -> None:
    assert {one.kind for one in scanner.find(text)} == {"private_key"}


def test_a_key_of_mailgun_has_no_name_before_it(scanner: Scanner) -> None:
    key = "key-d41d8cd98f00b204e9800998ecf8427e"  # as caches of builds have
    assert scanner.find(f"MAILGUN={key} x") == [("api_key", 8, 8 + len(key))]


def test_a_key_may_hold_tildes(scanner: Scanner) -> None:
    key = "aBc8Q~dEfGhIjKlMnOpQrStUvWxYz0123456789_"  # Azure's
    assert scanner.find(f"AZURE={key} x") == [("api_key", 6, 6 + len(key))]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("email", "mail to anna.schm=\nidt@exam=\r\nple.com, please"),
        ("email", "Reply-To: =?utf-8?Q?anna=40example.com?="),
        ("email", "To: =?UTF-8?B?QW5uYSA8YW5uYUBleGFtcGxlLmNvbT4=?="),
        ("credit_card", "4111=C2=A01111=C2=A01111=C2=A01111 is the card"),
        ("credit_card", r"{\rtf1\ansi\pard Card: {\b 4111}\~{\b 1111}\~1111\~1111\par}"),
        ("email", "write to anna.schmidt@<wbr>example<wbr/>.com"),
        ("email", 'anna<span style="color:red">@example.com</span>'),
        ("credit_card", "<b>4111</b> <b>1111</b> <b>1111</b> <b>1111</b>"),
        ("email", r"{\rtf1\ansi anna\'40example.com\par}"),
    ],
)
def test_mails_and_rtf_are_read_as_programs_for_them_read_them(kind: str, text: str, scanner: Scanner) -> None:
    assert (kind, -1) in {(one.kind, one.start) for one in scanner.find(text)}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("credit_card", "dGVzdA==\ncard=4111%201111%201111%201111&x=1"),
        ("iban", "dGVzdA==\niban=DE89%203704%200044%200532%200130%2000&x=1"),
        ("phone", "dGVzdA==\nphone=202%20555%200143&x=1"),
        ("credit_card", r"in a \par: paid by\n4111%201111%201111%201111"),
    ],
)
def test_what_looks_like_an_escape_of_mails_or_rtf_hides_nothing(kind: str, text: str, scanner: Scanner) -> None:
    assert (kind, -1) in {(one.kind, one.start) for one in scanner.find(text)}


@pytest.mark.parametrize(
    "text",
    [
        r'{"to": "j\u00f6rg@firma.de"}',
        r"\"john doe\"@example.com",
        r"{\"a\": \"b\\nanna@example.com\"}",
        r"write to john\_doe@example.com",
        "a" * 70 + "@example.com",
        "john@" + "ab." * 20 + "example.com",
    ],
)
def test_an_address_that_is_not_seen_whole_has_no_place(text: str, scanner: Scanner) -> None:
    """A placeholder for what stands in the text would leave half an escape, or half an address."""
    assert {(one.kind, one.start) for one in scanner.find(text)} == {("email", -1)}


def test_marks_of_html_that_part_words_part_addresses(scanner: Scanner) -> None:
    text = "<b>Mail</b>bob@example.com<span>Phone</span> <b>ann@example.com</b><i>x</i>"
    found = [text[one.start : one.end] for one in scanner.find(text)]
    assert found == ["bob@example.com", "ann@example.com"]


def test_numbers_with_dashes_are_telephone_numbers(scanner: Scanner) -> None:
    assert [one.kind for one in scanner.find("415-555-2671")] == ["phone"]
    # Codes of places and exchanges begin with no 0 or 1 there.
    assert [one.kind for one in scanner.find("999-123-1234, 010-112-1237")] == ["uk_nhs", "uk_nhs"]
    # The last ten digits of each are a number of the NHS by their check digit.
    for number in ("+1 415 555 2671", "+49 943 476 5919"):
        assert {one.kind for one in scanner.find(number)} == {"phone"}


@pytest.mark.parametrize("begin", [0, 1, STRIDE - 30, STRIDE - 3, STRIDE, STRIDE + OVERLAP - 10, 3 * STRIDE - 7])
@pytest.mark.parametrize("kind", ["credit_card", "iban", "email", "us_ssn", "date_of_birth", "passport"])
def test_finds_it_wherever_windows_meet(kind: str, begin: int, scanner: Scanner) -> None:
    dice = random.Random(begin)
    value = MAKERS[kind](dice)
    front = (prose(dice, 4000) + " ")[-begin:] if begin else ""
    text = front[:-1] + " " * bool(front) + value + " " + prose(dice, 2000)
    found = [finding for finding in scanner.find(text) if finding.kind == kind]
    assert found
    for finding in found:
        assert text[finding.start : finding.end] in value


def test_a_long_token_is_found_whole(scanner: Scanner) -> None:
    token = "eyJ" + "a1" * 700 + ".eyJ" + "b2" * 900 + "." + "c3" * 30
    for gap in (0, 100, STRIDE - 20):
        text = "x " * (gap // 2) + token + " end"
        assert any(text[found.start : found.end] == token for found in scanner.find(text))


@pytest.mark.parametrize("before", ["Authorization: Bearer ", "api_key=", "password: "])
def test_nothing_of_a_token_is_left_where_windows_meet(before: str, scanner: Scanner) -> None:
    dice = random.Random(2)
    token = "".join(dice.choices("abcdefXYZ0123456789+/", k=1500)) + "=="
    for gap in range(0, STRIDE + OVERLAP, 50):
        text = "x " * (gap // 2) + before + token + "\nend"
        assert token in {text[found.start : found.end] for found in scanner.find(text)}, gap


def test_a_token_whose_end_cannot_be_told_has_no_place(scanner: Scanner) -> None:
    for token in ("a1" * 2400 + "\u200b" + "b2" * 300, "a1" * 20_000):
        assert ("credential", -1, -1) in scanner.find("bearer " + token)
    own = Scanner([], {"row": "E-[0-9]+"})
    assert ("row", -1, -1) in own.find("E-" + "1" * 9000)


def test_where_very_much_is_found_the_rest_has_no_place(scanner: Scanner) -> None:
    found = scanner.find("\n".join(f"212-{number % 90 + 10}-{number % 9000 + 1000}" for number in range(330)))
    assert ("us_ssn", -1, -1) in found


@pytest.mark.parametrize(
    "text",
    [
        "４１１１ １１１１ １１１１ １１１１",
        "4111\u200b1111\u200b1111\u200b1111",
        "4111\u20131111\u20131111\u20131111",
        "4111\u00a01111\u00a01111\u00a01111",
        "٤١١١ ١١١١ ١١١١ ١١١١",
        "größe: 4111 1111 1111 1111 für Jürgen",
        r"4111\u00201111\u00201111\u00201111",
        "4111%201111%201111%201111",
        "4111&#32;1111&#x20;1111&#32;1111",
        "4111&#00000032;1111&#x0020;1111&#32;1111",
        "4111%u00201111%u00201111%u00201111",
        r"4111\u{20}1111\x{20}1111\U000000201111",
        "4111\u28001111\u28001111\u28001111",
        "see https://shop.example/pay?card=4111+1111+1111+1111&x=1",
        r"4111\-1111\-1111\-1111",
        r"4111\%201111\%201111\%201111",
        r"678\%34111%201111%201111%201111",
        r"{\"a\": \"{\\\"b\\\": \\\"\\u0034111 1111 1111 1111\\\"}\"}",
    ],
)
def test_sees_through_disguises(text: str, scanner: Scanner) -> None:
    assert "credit_card" in {finding.kind for finding in scanner.find(text)}


def test_unicode_places_are_the_texts_own(scanner: Scanner) -> None:
    text = "naïve \u200b 😀 bob@example.com and 41\u200b11 1111 1111 1111 é"
    shown = {text[found.start : found.end] for found in scanner.find(text)}
    assert shown == {"bob@example.com", "41\u200b11 1111 1111 1111"}


def test_a_seen_text_is_not_searched_again() -> None:
    scanner = Scanner(max_entries=8)
    text = prose(random.Random(1), 3000) + " bob@example.com"
    first = scanner.find(text)
    searched: Counter[str] = Counter()
    original = scanner._search

    def counting(window: str, *rest: Any) -> Iterator[None]:
        searched[window] += 1
        return original(window, *rest)

    scanner._search = counting  # type: ignore[method-assign]
    assert scanner.find(text) == first
    assert not searched
    assert scanner.find(text + " and anna@example.com")[-1].kind == "email"
    assert sum(searched.values()) == 1
    for number in range(50):
        scanner.find(str(number) * 20)
    assert len(scanner._seen) == 8


def test_pages_full_of_findings_take_the_place_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanners, "MAX_FINDINGS", 200)
    scanner = Scanner()
    page = " ".join(f"10.20.30.{number}" for number in range(90))
    # Two requests at a time with the same page, which takes so long that both search it.
    one, other = scanner.windows(page), scanner.windows(page)
    assert sum(len(found) for pair in zip(one, other, strict=True) for _, found in pair) == 2 * 90
    assert scanner._remembered == 90
    for number in range(10):
        assert len(scanner.find(f"{page} {number}")) == 90
        assert sum(map(len, scanner._seen.values())) == scanner._remembered <= 200
    assert len(scanner._seen) == 2
    scanner.find("nothing")
    assert len(scanner._seen) == 3


def test_undisguised_ends() -> None:
    assert undisguised("nothing here") is None
    assert undisguised(r"C:\temp") == "C:\temp"
    assert undisguised("100% of \\q &# it") is None
    assert undisguised("%ud800 \\ud800") == "? ?"
    assert undisguised(r"john\%40example.com or\&#32;\_x\_") == "john@example.com or _x_"


@pytest.mark.parametrize("begin", ["=", "?", "&", "tel:"])
def test_of_many_beginnings_of_a_form_only_the_nearest_looks_for_a_plus(begin: str) -> None:
    """All of them together would take as long as the square of their number."""
    found = _FORM.search(begin * 50 + "11+22")
    assert found is not None
    assert found.start() == 49 * len(begin)
    assert undisguised(begin * 50 + "11+22") == begin * 50 + "11 22"


def test_only_what_is_wanted_is_looked_for() -> None:
    scanner = Scanner(["iban"], {"employee": "E-[0-9]{6}"})
    text = "bob@example.com 4111 1111 1111 1111 DE89 3704 0044 0532 0130 00 E-123456"
    assert [finding.kind for finding in scanner.find(text)] == ["iban", "employee"]
    assert Scanner([]).find(text) == []
