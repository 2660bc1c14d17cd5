"""The explorer in JupyterLab in a real browser: keyboard and mouse move number and pictures."""

import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))

import browser  # noqa: E402

REASON = "no Chromium found; `apt-get install -y chromium` (Debian) or `brew install --cask chromium` (macOS)"
found = pytest.mark.skipif(browser.CHROMIUM is None, reason=REASON)
pytestmark = [pytest.mark.browser, pytest.mark.timeout(240), found]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A notebook with the explorer in the browser, after all of its cells have run."""
    folder = tmp_path_factory.mktemp("lab")
    with browser.notebook(browser.explorer_notebook(folder), folder / "lab") as page:
        yield page


def state(page):
    """What the panel shows: the slider's number, the text, and the addresses of curve and picture."""
    readout = page.locator(".widget-slider .widget-readout").inner_text()
    text = page.locator(".widget-html-content").first.inner_text()
    return readout, text, *page.evaluate("[...document.querySelectorAll('img.widget-image')].map(image => image.src)")


def moved(page, before):
    """Wait until number, text and both pictures are all other ones, and agree; the new state."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        now = state(page)
        agree = now[1].split("%")[0] == f"{float(now[0].rstrip('%')):.2f}"
        if agree and all(new != old for new, old in zip(now, before, strict=True)):
            return now
        page.wait_for_timeout(200)
    raise AssertionError(f"the panel did not follow the slider: {before} is now {now}")


def in_the_kernel(page, code):
    """Run code beside the notebook's own, and return what it prints."""
    run = """async code => {
        const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
        let said = '';
        const future = kernel.requestExecute({ code });
        future.onIOPub = message => { said += message.content.text || '' };
        await future.done;
        return said;
    }"""
    return page.evaluate(run, code).strip()


def test_keyboard_and_mouse_move_number_and_picture(page):
    handle = page.locator(".widget-slider .noUi-handle")
    handle.scroll_into_view_if_needed()
    start = state(page)
    assert page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts() == ["[1]:", "[2]:", "[3]:"]
    assert start[0] == "90.0%" and start[1].startswith("90.00% pruned")
    handle.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.widget-slider .widget-readout').innerText == '92.0%'")
    typed = moved(page, start)
    assert typed[1].startswith("92.00% pruned: 21,296 of 266,200 weights kept")

    box, track = handle.bounding_box(), page.locator(".widget-slider .noUi-base").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 0.05 * track["width"], y, steps=8)
    page.mouse.up()
    page.wait_for_function("parseFloat(document.querySelector('.widget-slider .widget-readout').innerText) > 96")
    moved(page, typed)


def test_every_control_is_reached_by_the_tab_key_and_the_code_can_be_copied(page):
    focused = """() => {
        const at = document.activeElement, box = at.closest('.jupyter-widgets');
        return [at.getAttribute('role') || at.type || at.tagName, box ? box.innerText : ''];
    }"""
    browser.panel(page).locator("select").first.focus()
    reached = [page.evaluate(focused)]
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(focused))
    assert [kind for kind, _ in reached][:4] == ["select-one"] * 3 + ["slider"], reached
    for label in ("copy as code", "Apply to the model"):
        assert any(label in words for kind, words in reached if kind in ("button", "submit")), reached
    button = browser.panel(page).locator("button", has_text="copy as code")
    button.focus()
    page.keyboard.press("Enter")
    browser.panel(page).locator("button", has_text="copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith('masks = pu.prune(model, "magnitude", sparsity=') and copied.endswith('"weight")')


def test_a_panel_that_has_gone_from_the_page_lets_go(page):
    held = "print(panel._trial.network is not None, panel.box._view_count)"
    assert in_the_kernel(page, held) == "True 1"
    page.evaluate("async () => window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    deadline = time.monotonic() + 30
    while (found := in_the_kernel(page, held)) != "False 0" and time.monotonic() < deadline:
        page.wait_for_timeout(300)
    assert found == "False 0"
