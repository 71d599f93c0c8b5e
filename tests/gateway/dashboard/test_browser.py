"""The dashboard in a real Chromium: log in, look, set a canary, log out; light and dark, desktop and phone."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.workers import MASTER_KEY, Workers

playwright = pytest.importorskip(
    "playwright.sync_api", reason='needs a browser driver: pip install "tokenmill[browser]"', exc_type=ImportError
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))), None)
pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def channel(colour: str) -> float:
    """Mean of a CSS colour's red, green and blue."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", colour)[:3]]
    return sum(numbers) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 900), (390, 844), (320, 640)], ids=["desktop", "phone", "narrow"])
def test_log_in_look_and_log_out(
    workers: Workers, chromium: Any, scheme: str, size: tuple[int, int], tmp_path: Path
) -> None:
    context = chromium.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page = context.new_page()
    trouble: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{workers.url}/dashboard")
    # The browser focuses the field when it first draws the page, and complains where somebody was quicker.
    page.wait_for_function("document.activeElement.id === 'key'")
    page.fill("#key", MASTER_KEY)
    page.click("button[type=submit]")
    page.wait_for_url("**/dashboard")
    assert page.locator("svg.chart").count() == 3
    assert page.locator("th", has_text="utility").first.is_visible()
    background = channel(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    ink = channel(page.evaluate("getComputedStyle(document.body).color"))
    assert (background - ink > 120) if scheme == "light" else (ink - background > 120)
    # Wide tables scroll inside their cards; the page itself never does.
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    field = page.get_by_label("Share of a in percent")
    field.fill("30")
    field.press("Enter")
    page.wait_for_url("**/dashboard#backends")
    assert page.get_by_label("Share of a in percent").input_value() == "30"
    page.get_by_role("link", name="7d").click()
    page.wait_for_url("**/dashboard?span=7d")
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url("**/dashboard/login")
    page.goto(f"{workers.url}/dashboard")
    assert page.url.endswith("/dashboard/login")
    assert trouble == []
    assert all(url.startswith(workers.url) for url in asked)
    context.close()
