"""The built site in headless Chromium: `make docs-test`, which builds it first.

`CHROMIUM=/usr/bin/chromium` names a browser, where Playwright's own cannot be downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

SITE = Path(__file__).parents[2] / "build/site"
PAGES = sorted(
    path.parent.relative_to(SITE).as_posix().removesuffix(".") for path in SITE.rglob("index.html")
)
PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Served as mike publishes it: a folder for each version, and their list beside them."""
    root = tmp_path_factory.mktemp("published")
    (root / "0.1").symlink_to(SITE)
    versions = [{"version": "0.1", "title": "0.1", "aliases": ["latest"]}]
    (root / "versions.json").write_text(json.dumps(versions))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/0.1/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """A page that must log nothing and load nothing from elsewhere."""
    complaints: list[str] = []
    page = browser.new_page(viewport=DESKTOP, base_url=url)
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith(url[:-4]) else complaints.append(request.url)
        ),
    )
    page.on(
        "response",
        lambda response: (
            None if response.ok else complaints.append(f"{response.status} {response.url}")
        ),
    )
    yield page
    page.close()
    assert complaints == []


def test_there_are_pages() -> None:
    assert {"", "tutorial", "api", "troubleshooting"} <= set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_phone_and_logs_nothing(page: Page, name: str) -> None:
    page.set_viewport_size(PHONE)
    page.goto(f"{name}/" if name else "", wait_until="networkidle")
    assert page.locator("h1").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_search(page: Page) -> None:
    page.goto("")
    page.get_by_placeholder("Search").press_sequentially("dimensions")  # it listens to keys
    results = page.locator(".md-search-result__item")
    results.first.wait_for()
    assert results.count() > 3
    results.first.locator("a").first.click()
    page.locator("mark").first.wait_for()


def test_dark_mode_is_kept(page: Page) -> None:
    page.goto("")
    assert page.locator("body").get_attribute("data-md-color-scheme") == "default"
    page.get_by_title("Dark mode").click()
    page.goto("tutorial/")
    assert page.locator("body").get_attribute("data-md-color-scheme") == "slate"
    page.get_by_title("Light mode").click()
    assert page.locator("body").get_attribute("data-md-color-scheme") == "default"


def test_the_versions(page: Page) -> None:
    page.goto("")
    assert page.locator(".md-version__current").inner_text() == "0.1"
