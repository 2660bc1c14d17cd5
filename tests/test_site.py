"""The site, built and opened in a real browser: no page has an error, no link is dead, nothing comes from outside."""

import functools
import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))

import browser  # noqa: E402
import build  # noqa: E402

NEEDED = ("mkdocs", "material", "mkdocs_jupyter", "mkdocstrings", "latex2mathml")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
REASON = f"{', '.join(MISSING)} not installed; python -m pip install -c constraints.txt -e '.[docs]'"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.skipif(bool(MISSING), reason=REASON)]
in_a_browser = pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium found: see test_browser.py")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built with few frames: its folder. PRUNEUTILS_SITE names one that is built already."""
    if "PRUNEUTILS_SITE" in os.environ:
        return Path(os.environ["PRUNEUTILS_SITE"])
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, ROOT / "docs/build.py", "--frames", "3", "--output", folder]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stderr, built.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def address(site):
    """The site served on loopback."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


class Page(HTMLParser):
    """What a page links to, loads and names."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.names, self.undescribed = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("script", "img", "source", "iframe") and given.get("src"):
            self.loads.append(given["src"])
        if given.get("srcset"):
            self.loads.append(given["srcset"])
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(given["href"])
        if tag == "img" and given.get("alt", "").removeprefix("No description")[:1] in ("", " "):
            self.undescribed.append(str(given)[:80])


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path.read_text()) for path in site.rglob("*.html")}


def test_nothing_is_loaded_from_elsewhere_and_every_picture_is_described(site, pages):
    for name, page in pages.items():
        assert not page.undescribed, name
        outside = [src for src in page.loads if re.match(r"(https?:)?//", src)]
        outside += re.findall(r"import\(.{0,100}", (site / name).read_text())  # nbconvert's script for diagrams does
        assert not outside, f"{name} loads {outside}"
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", path.read_text()), path


def test_no_link_is_dead(site, pages):
    for name, page in pages.items():
        if name == "404.html":
            continue
        for link in {*page.links, *page.loads}:
            target = urlparse(urljoin(name, link))
            if target.scheme or target.netloc or link.startswith("data:"):
                continue
            path = unquote(target.path).lstrip("/") or name
            file = site / path
            assert file.is_file() or (file / "index.html").is_file(), f"{name} links to {link}"
            if target.fragment and path in pages:
                assert unquote(target.fragment) in pages[path].names, f"{name} links to {link}"


def test_notebooks_names_and_studies_have_their_place(site, pages):
    named = [f"notebooks/{name}.html" for name in build.order()]
    assert set(pages) >= {*named, "index.html", "explorer.html", "results.html", "method.html"}
    assert {"pruneutils.prune", "pruneutils.widgets.sparsity_explorer"} <= pages["api.html"].names
    assert all(folder.name in (site / "results.html").read_text() for folder in build.results.folders())


@in_a_browser
def test_every_page_opens_without_an_error_and_the_slider_moves_the_picture(address, pages):
    errors, asked = [], set()
    with browser.chromium() as chromium:
        page = chromium.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.add(urlparse(request.url).netloc))
        for name in sorted(set(pages) - {"404.html"}):
            page.goto(address + name)
            page.wait_for_load_state("load")
            assert not errors, f"{name}: {errors}"
        assert asked <= {urlparse(address).netloc, ""}

        page.goto(address + "explorer.html")
        shown = lambda: page.evaluate("[frame.alt, frame.naturalWidth, said.value, numbers.textContent]")  # noqa: E731
        slider = page.locator("#sparsity")
        slider.focus()
        page.keyboard.press("Home")
        wait_for_frame(page, "light/magnitude_0.webp")
        first = shown()
        page.keyboard.press("End")
        last_frame = int(slider.get_attribute("max"))
        wait_for_frame(page, f"light/magnitude_{last_frame}.webp")
        last = shown()
        assert first[1] == last[1] == 1080 and (first[2], last[2]) == ("0.0%", "99.0%")
        assert "0.00% pruned" in first[3] and "99.00% pruned" in last[3]
        assert "a dot at 99.0%" in last[0] and re.search(r"fc1 \d.*, fc2 \d.*, fc3 \d", last[0])
        page.get_by_label("synflow").check()
        wait_for_frame(page, f"light/synflow_{last_frame}.webp")


@in_a_browser
def test_a_click_on_a_column_sorts_the_runs_by_it(address):
    with browser.chromium() as chromium:
        page = chromium.new_page()
        page.goto(address + "results.html")
        table = page.locator("#pruning_at_initialization_medium ~ .sortable").first
        names = table.locator("th").all_inner_texts()
        column = next(i for i, name in enumerate(names) if name.startswith("accuracy")) + 1
        for order in (1, -1):
            table.get_by_role("button", name="accuracy").click()
            means = [float(cell.split()[0]) for cell in table.locator(f"td:nth-child({column})").all_inner_texts()]
            assert len(means) > 20 and means == sorted(means)[::order]


def wait_for_frame(page, name):
    page.wait_for_function(f"frame.complete && frame.currentSrc.endsWith('/{name}')")


@in_a_browser
@pytest.mark.parametrize("style", ["light", "dark"])
def test_pages_follow_the_style_and_every_text_stands_out(address, style):
    other = {"light": "dark", "dark": "light"}[style]
    with browser.chromium() as chromium:
        page = chromium.new_context(color_scheme=style).new_page()
        for name in ("index", "explorer", "method", "notebooks/index", "notebooks/start_here", "results", "api"):
            page.goto(f"{address}{name}.html")
            page.wait_for_load_state("load")
            assert not browser.faint_texts(page), name
            page.set_viewport_size({"width": 390, "height": 850})  # a phone's page does not slide sideways
            assert name == "api" or page.evaluate("document.documentElement.scrollWidth") <= 390, name
            page.set_viewport_size({"width": 1280, "height": 720})
        page.goto(address + "explorer.html")
        page.locator("#sparsity").focus()
        page.keyboard.press("Home")
        wait_for_frame(page, f"{style}/magnitude_0.webp")
        page.locator("label.md-header__button[for^=__palette]:visible").click()
        wait_for_frame(page, f"{other}/magnitude_0.webp")
