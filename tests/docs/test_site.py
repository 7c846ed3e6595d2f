"""The documentation site: it builds without a warning, its links lead somewhere, and a browser shows every page.

In one file, so that the site is built once.
"""

import functools
import http.server
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("sphinx", reason="the extra `docs` is not installed")

from tests.command_line import ROOT

WIDE, NARROW = 1280, 400
_TOO_WIDE = """
const room = document.documentElement.clientWidth;
const scrolls = element => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
const fits = element => element.getBoundingClientRect().right <= room + 1;
const hasScrollingAncestor = element => {
    for (let up = element.parentElement; up.tagName != "ARTICLE"; up = up.parentElement) if (scrolls(up)) return true;
    return false;
};
const elements = [...document.querySelectorAll("article *")];
const wide = elements.filter(element => !fits(element) && !hasScrollingAncestor(element)).map(each => each.outerHTML);
return document.documentElement.scrollWidth > room ? ["the page", ...wide] : wide;
"""
"""What sticks out of the page: whatever is wide must scroll within itself."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    output = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def _html_files(site: Path) -> list[Path]:
    return [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]


class _Page(HTMLParser):
    """What a page links to, and what in it can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.identifiers = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.identifiers.add(given.get("id") or "")
        self.targets += [target for name in ("href", "src") if (target := given.get(name))]


def test_links_and_anchors_lead_somewhere(site: Path) -> None:
    found = {path: _Page(path) for path in _html_files(site)}
    broken = []
    for path, page in found.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = found[to].identifiers if to in found else {unquote(parts.fragment)}
            if not to.is_file() or unquote(parts.fragment) not in known:
                broken.append(f"{path.relative_to(site)}: {target}")
    assert not broken


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium: on Debian, apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="the extra `docs` is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


def _set_width(browser: Any, width: int) -> None:
    """Of what is shown; a window would not become as narrow as a telephone."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_every_page_opens_and_fits(width: int, site: Path, address: str, browser: Any) -> None:
    _set_width(browser, width)
    problems = []
    for path in _html_files(site):
        name = path.relative_to(site).as_posix()
        browser.get(f"{address}/{name}")
        problems += [
            f"{name}: {entry['message']}" for entry in browser.get_log("browser") if entry["level"] == "SEVERE"
        ]
        problems += [f"{name}: too wide: {each[:200]}" for each in browser.execute_script(_TOO_WIDE)]
        if not browser.title:
            problems.append(f"{name}: has no title")
    assert not problems


def test_search_finds_a_knob(address: str, browser: Any) -> None:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def has_come(shown: Any) -> bool:
        links = [link.get_attribute("href") or "" for link in shown.find_elements(By.CSS_SELECTOR, "ul.search li a")]
        return all(any(page in link for link in links) for page in ("settings.html", "reference/api.html"))

    browser.get(f"{address}/search.html?q=rho")
    WebDriverWait(browser, 60, ignored_exceptions=[StaleElementReferenceException]).until(has_come)
