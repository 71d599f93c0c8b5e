"""The dashboard over HTTP: who gets in, what forms need, what the pages hold."""

import json
import re
from http.cookies import SimpleCookie
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.gateway.dashboard.conftest import HOSTILE
from tests.gateway.governance.governed import options
from tests.gateway.running import wait_until
from tests.gateway.upstream import FakeUpstream
from tests.gateway.workers import MASTER_KEY, Workers
from tokenmill.engine.gateway.admin import tables
from tokenmill.engine.gateway.admin.roles import Actor
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.dashboard import charts, figures, session
from tokenmill.engine.gateway.governance.accounts import Account, Limits
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.store import Store

FORM = "application/x-www-form-urlencoded"


class Browser:
    """Keeps a cookie; follows nothing by itself."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.cookie = ""

    def get(self, path: str = "/dashboard") -> tuple[int, dict[str, str], str]:
        status, headers, body = self.workers.send("GET", path, key=None, cookie=self.cookie)
        return status, headers, body.decode()

    def post(self, path: str, fields: dict[str, str], **headers: str) -> tuple[int, dict[str, str], str]:
        sent = {"content_type": FORM, "cookie": self.cookie, **headers}
        status, found, body = self.workers.send("POST", path, urlencode(fields).encode(), None, **sent)
        return status, found, body.decode()

    def log_in(self, key: str = MASTER_KEY) -> dict[str, str]:
        """Logs in and returns the answer's headers."""
        status, headers, body = self.post("/dashboard/login", {"key": key})
        assert status == 303, body
        morsel = next(iter(SimpleCookie(headers["set-cookie"]).values()))
        self.cookie = f"{morsel.key}={morsel.value}"
        return headers

    def token(self) -> str:
        """The token of the page's forms."""
        found = re.search(r'name="token" value="([0-9a-f]+)"', self.get()[2])
        assert found is not None
        return found[1]


@pytest.fixture
def browser(workers: Workers) -> Browser:
    return Browser(workers)


def test_strangers_see_the_login_and_nothing_else(browser: Browser) -> None:
    for path in ("/dashboard", "/dashboard/"):
        status, headers, _ = browser.get(path)
        assert (status, headers["location"]) == (303, "/dashboard/login")
    for cookie in (
        "x=y",
        "tokenmill_session=master:9999999999999:" + "0" * 16 + ":" + "0" * 64,
        "tokenmill_session=\xff",
    ):
        browser.cookie = cookie
        assert browser.get()[0] == 303
    assert browser.post("/dashboard/login", {"key": "sk-guess"})[0] == 403
    plain = browser.workers.json("POST", "/admin/keys", {}, status=201)["key"]
    assert browser.post("/dashboard/login", {"key": plain})[0] == 403
    assert browser.post("/dashboard/login", {"key": "x" * 10_000})[0] == 413
    status, _, body = browser.post("/dashboard/login", {f"field{number}": "" for number in range(21)})
    assert (status, "more than 20 fields" in body) == (400, True)


def test_the_cookie_is_for_this_site_alone(browser: Browser) -> None:
    said = browser.log_in()["set-cookie"].lower()
    assert "httponly" in said and "samesite=strict" in said and "path=/dashboard" in said
    assert "secure" not in said
    for outside in ("https", "https, http", "HTTPS"):
        _, headers, _ = browser.post("/dashboard/login", {"key": MASTER_KEY}, x_forwarded_proto=outside)
        assert "secure" in headers["set-cookie"].lower()
    assert MASTER_KEY not in said


def test_pages_load_nothing_from_elsewhere_and_run_no_script(browser: Browser) -> None:
    browser.log_in()
    for path in ("/dashboard", "/dashboard/login", "/dashboard/style.css"):
        status, headers, body = browser.get(path)
        assert status in (200, 303)
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert "http:" not in body.replace("http-equiv", "") and "https:" not in body
        assert "<script" not in body and " style=" not in body and "@import" not in body


def test_text_of_others_stays_text(browser: Browser) -> None:
    browser.log_in()
    page = browser.get()[2]
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(" in page


def test_the_page_has_the_figures_of_both_workers(browser: Browser) -> None:
    browser.log_in()

    def complete() -> bool:
        page = browser.get("/dashboard?span=1h")[2]
        traffic = bool(re.search(r"0 of 12 requests", page)) and page.count("complexity:") >= 6
        return traffic and "2 workers" in page and "connection refused" in page  # a worker says so when it has looked

    wait_until(complete)
    page = browser.get("/dashboard?span=1h")[2]
    assert "1 of 2" in page
    assert "search" in page
    total = browser.workers.json("GET", "/admin/ledger?team=search")["rows"][0]
    assert charts.money(total["cost"]) in page
    assert browser.get("/dashboard?span=../../etc")[0] == 200


def test_a_page_loads_itself_anew_unless_it_is_to_stand_still(browser: Browser) -> None:
    browser.log_in()
    live, still = browser.get("/dashboard?span=1h")[2], browser.get("/dashboard?span=1h&still=1")[2]
    assert '<meta http-equiv="refresh"' in live and "span=1h&amp;still=1" in live and "span=7d&amp;still=1" not in live
    assert "http-equiv" not in still and "span=7d&amp;still=1" in still and 'href="/dashboard?span=1h">' in still


def test_of_many_budgets_the_fullest_are_shown(tmp_path: Path, upstream: FakeUpstream) -> None:
    with Workers(tmp_path, Backend("a", upstream.url, "utility", models=("tiny",))) as workers:
        browser = Browser(workers)
        browser.log_in()
        for number in range(figures.BUDGETS + 5):
            account = {"kind": "team", "id": f"t{number:02}", "limits": {"hard_limit_dollars": number % 54}}
            workers.json("POST", "/admin/accounts", account, status=201)
        page = browser.get()[2]
        shown = re.findall(r'<th scope="row">(t\d\d)</th>', page)
        # Those that may not spend anything have nothing left.
        assert (len(shown), shown[:2]) == (figures.BUDGETS, ["t00", "t54"])
        assert f"the {figures.BUDGETS} fullest of {figures.BUDGETS + 5}" in page


def test_a_budget_is_as_full_as_its_period_says() -> None:
    account = Account("t", "team", None, "", Limits(soft_limit=10, period_ms=60_000), 0, 8, 0, None)
    assert [figures.used_share(account, now) for now in (59_999, 60_000)] == [0.8, 0.0]


def test_forms_need_the_sessions_own_token_and_this_origin(browser: Browser) -> None:
    browser.log_in()
    token = browser.token()
    fields = {"token": token, "backend": "a", "percent": "25"}
    assert browser.post("/dashboard/canary", {**fields, "token": "0" * 64})[0] == 403
    assert browser.post("/dashboard/canary", fields, origin="http://evil.example")[0] == 403
    other = Browser(browser.workers)
    assert other.post("/dashboard/canary", fields)[0] == 403
    assert browser.post("/dashboard/canary", {**fields, "percent": "200"})[0] == 400
    assert browser.post("/dashboard/canary", {**fields, "percent": "nan"})[0] == 400
    assert browser.post("/dashboard/canary", {**fields, "backend": "nobody"})[0] == 404
    assert browser.post("/dashboard/canary", fields)[0] == 303
    shown = {one["name"]: one["canary"] for one in browser.workers.json("GET", "/admin/backends")["backends"]}
    assert shown["a"] == 0.25
    assert browser.post("/dashboard/canary", {**fields, "percent": ""})[0] == 303
    assert browser.post("/dashboard/logout", {"token": token})[0] == 303


def test_a_session_ends_with_its_key_and_shows_an_auditor_no_forms(browser: Browser) -> None:
    made = browser.workers.json("POST", "/admin/keys", {"role": "auditor"}, status=201)
    browser.log_in(made["key"])
    status, _, page = browser.get()
    assert status == 200 and "/dashboard/canary" not in page
    found = re.search(r'name="token" value="([0-9a-f]+)"', page)
    assert found is not None
    assert browser.post("/dashboard/canary", {"token": found[1], "backend": "a", "percent": "1"})[0] == 403
    browser.workers.json("DELETE", f"/admin/keys/{made['id']}")
    assert browser.get()[0] == 303


def test_a_session_is_over_after_eight_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "gateway.db", SCHEMA)
    tables.prepare(store)
    governed, begun = options("unused"), 1_800_000_000_000
    until = begun + 8 * 3600 * 1000
    monkeypatch.setattr(session, "now_ms", lambda: begun)
    cookie = session.cookie(store.reader, governed, Actor("master", "admin"))
    assert session.cookie(store.reader, governed, Actor("master", "admin")) != cookie
    longer = cookie.replace(str(until), str(until + 1))
    assert longer != cookie
    for now, value, valid in ((until - 1, cookie, True), (until, cookie, False), (until - 1, longer, False)):
        monkeypatch.setattr(session, "now_ms", lambda now=now: now)
        assert (session.actor_of(store.reader, governed, value) is not None) == valid
    store.close()


def test_a_session_ends_when_its_key_is_rotated(browser: Browser) -> None:
    made = browser.workers.json("POST", "/admin/keys", {"role": "auditor"}, status=201)
    browser.log_in(made["key"])
    assert browser.get()[0] == 200
    rotated = browser.workers.json("POST", f"/admin/keys/{made['id']}/rotate")
    assert browser.get()[0] == 303
    browser.log_in(rotated["key"])
    assert browser.get()[0] == 200


def test_a_session_ends_with_its_logout_in_every_worker(browser: Browser) -> None:
    browser.log_in()
    other = Browser(browser.workers)
    other.log_in()
    copied = browser.cookie
    assert browser.post("/dashboard/logout", {"token": "0" * 64})[0] == 403
    assert browser.get()[0] == 200
    assert browser.post("/dashboard/logout", {"token": browser.token()})[0] == 303
    browser.cookie = copied
    for _ in range(8):
        assert browser.get()[0] == 303
    assert other.get()[0] == 200


def test_metrics_are_of_both_workers_and_survive_one(workers: Workers) -> None:
    def requests() -> float:
        found = re.findall(
            rb'tokenmill_account_requests_total\{[^}]*team="search"[^}]*\} (\S+)', workers.send("GET", "/metrics")[2]
        )
        return sum(map(float, found))

    wait_until(lambda: requests() == 12)
    victim = workers.processes[0]
    victim.kill()
    victim.wait()
    workers.processes[0] = workers.start()
    workers.wait_ready()
    wait_until(lambda: requests() == 12)
    assert json.loads(workers.send("GET", "/ready")[2])["worker"] != victim.pid


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (0.001, "0.001"),
        (0.00008, "0.00008"),
        (12.34, "12.3"),
        (999, "999"),
        (1500, "1.5k"),
        (2e9, "2G"),
    ],
)
def test_numbers_are_short(value: float, shown: str) -> None:
    assert charts.short(value) == shown


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        (0, "$0"),
        (1, "<$0.000001"),
        (8_120, "$0.000081"),
        (123_456, "$0.0012"),
        (250_000_000, "$2.50"),
        (10**14, "$1,000,000.00"),
    ],
)
def test_money_is_readable(amount: int, shown: str) -> None:
    assert charts.money(amount) == shown
