"""The site, built and opened in a real browser: no page has an error, no link is dead, nothing comes from outside."""

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
from PIL import Image, ImageStat

import pruneutils as pu
from pruneutils.plots.look import contrast

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))

import browser  # noqa: E402

import build  # noqa: E402

MISSING = [name for name in ("mkdocs", "material", "mkdocs_jupyter", "mkdocstrings", "latex2mathml")
           if importlib.util.find_spec(name) is None]  # fmt: skip
pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"{', '.join(MISSING)} not installed; python -m pip install -c constraints.txt -e '.[docs]'",
    ),
]
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
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Quiet", (Quiet,), {"folder": str(site)}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a log."""

    folder = ""

    def __init__(self, *arguments):
        super().__init__(*arguments, directory=self.folder)

    def log_message(self, *_):
        pass


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


def test_every_notebook_has_a_page_and_the_stored_outputs(site, pages):
    assert {f"notebooks/{name}.html" for name in build.order()} <= set(pages)
    assert {"index.html", "api.html", "results.html", "explorer.html", "notebooks/index.html"} <= set(pages)
    assert "26,620 kept in 3 layers" in (site / "notebooks/sparsity_explorer.html").read_text()


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for name, page in pages.items():
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


def test_every_picture_says_what_is_seen(pages):
    assert not {name: page.undescribed for name, page in pages.items() if page.undescribed}


def test_the_site_is_small(site):
    sizes = [path.stat().st_size for path in site.rglob("*") if path.is_file()]
    frames = [path.stat().st_size for path in site.rglob("frames/*/*.webp")]
    with_all_frames = sum(sizes) - sum(frames) + 2 * 3 * 40 * sum(frames) / len(frames)
    assert with_all_frames < 30e6


def test_the_explorer_has_frames_in_light_and_dark(site):
    for path in sorted((site / "frames/light").iterdir()):
        light, dark = (Image.open(site / "frames" / style / path.name).convert("L") for style in ("light", "dark"))
        assert light.size == dark.size and light.size[0] == 1080
        assert ImageStat.Stat(light).median[0] > 250 and ImageStat.Stat(dark).median[0] < 25, path.name
    assert {path.name for path in (site / "frames/dark").iterdir()} == {
        f"{criterion}_{i}.webp" for criterion in build.CRITERIA for i in range(len(list(path.parent.iterdir())) // 3)
    }


def test_every_public_name_is_on_the_api_page(pages):
    names = pages["api.html"].names
    for name in pu.__all__:
        if name in build.ROOMS:
            assert name in names
            module = getattr(pu, name)
            assert all(f"{module.__name__}.{inner}" in names for inner in build.names_of(module)), name
        else:
            assert f"pruneutils.{name}" in names, name


def test_the_results_name_every_study(site):
    text = (site / "results.html").read_text()
    for folder in (ROOT / "results").iterdir():
        assert folder.name in text or not any(folder.glob("*.json"))


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
        assert slider.get_attribute("aria-valuetext") == "99.0%" and not errors


def wait_for_frame(page, name):
    page.wait_for_function(f"frame.complete && frame.currentSrc.endsWith('/{name}')")


@in_a_browser
def test_pictures_follow_the_system_and_the_switch_between_light_and_dark(address):
    with browser.chromium() as chromium:
        for system, other in (("dark", "light"), ("light", "dark")):
            page = chromium.new_context(color_scheme=system).new_page()
            page.goto(address + "explorer.html")
            page.locator("#sparsity").focus()
            page.keyboard.press("Home")
            wait_for_frame(page, f"{system}/magnitude_0.webp")
            page.locator("label.md-header__button[for^=__palette]:visible").click()
            wait_for_frame(page, f"{other}/magnitude_0.webp")
            page.get_by_label("snip").check()
            wait_for_frame(page, f"{other}/snip_0.webp")
            canvas = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert canvas == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[other]

            page.goto(address + "notebooks/index.html")  # the choice is kept
            page.wait_for_load_state("load")
            sources = "[...document.querySelectorAll('article picture img')].map(image => image.currentSrc)"
            dark = [source.endswith("_dark.png") for source in page.evaluate(sources)]
            assert len(dark) > 5 and set(dark) == {other == "dark"}


@in_a_browser
@pytest.mark.parametrize("style", ["light", "dark"])
def test_every_text_stands_out_from_the_page(address, style):
    pages = ["index", "explorer", "notebooks/index", "notebooks/start_here", "notebooks/one_shot_pruning", "results"]
    with browser.chromium() as chromium:
        page = chromium.new_context(color_scheme=style).new_page()
        for name in [*pages, "api"]:
            page.goto(f"{address}{name}.html")
            page.wait_for_load_state("load")
            assert not browser.faint_texts(page), name
        page.goto(f"{address}explorer.html")
        slider = page.evaluate("getComputedStyle(sparsity).accentColor")
        canvas = page.evaluate("getComputedStyle(document.body).backgroundColor")
        rgb = [tuple(int(part) / 255 for part in re.findall(r"\d+", color)) for color in (slider, canvas)]
        assert contrast(*rgb) >= 3


@in_a_browser
def test_a_phone_shows_the_explorer_without_a_page_that_slides_sideways(address):
    with browser.chromium() as chromium:
        page = chromium.new_context(viewport={"width": 390, "height": 850}).new_page()
        for name in ("explorer", "index", "notebooks/start_here", "results"):
            page.goto(f"{address}{name}.html")
            page.wait_for_load_state("load")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        page.goto(f"{address}explorer.html")
        assert "weights kept" in page.locator("#numbers").inner_text()
        box = page.locator("#numbers").bounding_box()
        assert box["width"] > 300 and box["height"] > 40
