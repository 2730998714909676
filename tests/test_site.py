"""The documentation as `make docs` has built it, opened in a browser without a network."""

import functools
import http.server
import threading

import browser
import pages
import pytest

SITE = pages.ROOT / "site"
pytestmark = [
    pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.skipif(not (SITE / "index.html").exists(), reason="needs `make docs`"),
]
UNSET = """[...document.querySelectorAll('.arithmatex')]
    .filter(e => !e.querySelector('.katex')).map(e => e.textContent)"""
ADDRESSES = sorted(
    str(file.parent.relative_to(SITE)) for file in SITE.rglob("index.html") if SITE.exists()
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def home():
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser.page(str(tmp_path_factory.mktemp("browser"))) as tab:
        yield tab


def test_every_page(home, tab):
    """No complaint in the console, every formula set, nothing wider than the window."""
    formulas = 0
    for address in ADDRESSES:
        for width in (1400, 400):
            tab.open(f"{home}/{address}/", width)
            assert tab.evaluate("document.querySelectorAll('.md-content h1').length") == 1, address
            assert tab.evaluate(UNSET) == [], address
            assert not tab.evaluate("document.querySelectorAll('.katex-error').length"), address
            wide = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0, f"{address} is {wide} pixels wider than {width}"
        formulas += tab.evaluate("document.querySelectorAll('.katex').length")
    assert formulas > 50
    assert not tab.complaints


def test_search(home, tab):
    tab.open(f"{home}/?q=Newton")
    found = "[...document.querySelectorAll('.md-search-result__item a')].map(e => e.textContent)"
    results = tab.wait_for(f"{found}.length ? {found} : null")
    assert any("Newton" in result for result in results)
    assert not tab.complaints


def test_code_can_be_copied(home, tab):
    tab.open(f"{home}/quickstart/")
    assert tab.wait_for("document.querySelectorAll('.md-code__button, .md-clipboard').length")


def test_dark_mode(home, tab):
    tab.open(f"{home}/")
    assert tab.evaluate("document.body.getAttribute('data-md-color-scheme')") == "default"
    tab.evaluate("document.querySelector('label[for=__palette_1]').click()")
    assert tab.evaluate("document.body.getAttribute('data-md-color-scheme')") == "slate"
    assert not tab.complaints
