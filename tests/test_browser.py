"""The explorer's notebook in JupyterLab in a real browser: all cells run, and the slider moves number and picture."""

import os
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))

import browser  # noqa: E402

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        browser.CHROMIUM is None,
        reason="no Chromium found; `apt-get install -y chromium` (Debian) or `brew install --cask chromium` (macOS)",
    ),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The notebook in the browser after all of its cells have run."""
    with browser.notebook(ROOT / "notebooks/sparsity_explorer.ipynb", tmp_path_factory.mktemp("lab")) as page:
        yield page


def state(page):
    """What the panel shows: the slider's number, the text, and the bytes of curve and picture."""
    readout = page.locator(".widget-slider .widget-readout").inner_text()
    text = page.locator(".widget-html-content").first.inner_text()
    pictures = page.evaluate(
        """async () => Promise.all(Array.from(document.querySelectorAll('img.widget-image'), async picture => {
            const image = await (await fetch(picture.src)).arrayBuffer();
            const hash = await crypto.subtle.digest('SHA-256', image);
            return image.byteLength + ' ' + new Uint8Array(hash).join('.');
        }))"""
    )
    assert len(pictures) == 2
    return readout, text, *pictures


def moved(page, before):
    """Wait until number, text and picture are all other ones, and for no more to come; the new state."""
    deadline, last = time.monotonic() + 60, before
    while time.monotonic() < deadline:
        now = state(page)
        if all(new != old for new, old in zip(now, before, strict=True)) and now == last:
            return now
        last = now
        page.wait_for_timeout(400)
    raise AssertionError(f"the panel did not follow the slider: {before} is now {last}")


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


def test_all_cells_run_without_an_error(page):
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
    assert prompts == [f"[{n}]:" for n in range(1, len(prompts) + 1)]
    errors = page.locator(
        ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error'], .jp-RenderedText .ansi-red-fg"
    )
    assert errors.count() == 0, errors.all_inner_texts()
    assert "Error" not in page.locator(".widget-html-content").first.inner_text()


def test_keyboard_and_mouse_move_number_and_picture(page, tmp_path):
    handle = page.locator(".widget-slider .noUi-handle")
    handle.scroll_into_view_if_needed()
    start = state(page)
    assert start[0] == "90.0%" and start[1].startswith("90.00% pruned")

    handle.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    typed = moved(page, start)
    assert typed[0] == "92.0%" and typed[1].startswith("92.00% pruned: 21,296 of 266,200 weights kept")

    box, track = handle.bounding_box(), page.locator(".widget-slider .noUi-base").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 0.05 * track["width"], y, steps=8)
    page.mouse.up()
    page.wait_for_function("parseFloat(document.querySelector('.widget-slider .widget-readout').innerText) > 96")
    dragged, deadline = moved(page, typed), time.monotonic() + 30  # a slow machine draws a step on the way first
    while dragged[1].split("%")[0] != f"{float(dragged[0].rstrip('%')):.2f}" and time.monotonic() < deadline:
        page.wait_for_timeout(100)
        dragged = state(page)
    assert dragged[1].split("%")[0] == f"{float(dragged[0].rstrip('%')):.2f}"

    page.get_by_text("on all 1,000 images").first.wait_for()  # in full, once the slider rests
    before = state(page)[2]
    browser.panel(page).locator("select").first.select_option(label="snip")
    deadline, points = time.monotonic() + 60, "print({name: len(points) for name, points in panel._lines().items()})"
    filled = "{'snip': 19, 'magnitude': 19}"  # in the background, and the earlier curve stays
    while in_the_kernel(page, points) != filled and time.monotonic() < deadline:
        page.wait_for_timeout(300)
    assert in_the_kernel(page, points) == filled and state(page)[2] != before
    browser.panel(page).locator("select").first.select_option(label="magnitude")
    browser.panel(page).locator("code", has_text="magnitude").wait_for()

    folder = Path(os.environ.get("PRUNEUTILS_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / "explorer.png")
    assert (folder / "explorer.png").stat().st_size > 50_000


def focused(page):
    """What has the focus: the kind of element, and the words that belong to it."""
    return page.evaluate(
        """() => {
            const at = document.activeElement, box = at.closest('.jupyter-widgets');
            return [at.getAttribute('role') || at.type || at.tagName, box ? box.innerText : ''];
        }"""
    )


def test_every_control_is_reached_by_the_tab_key_and_the_code_can_be_copied(page):
    browser.panel(page).locator("select").first.focus()
    reached = [focused(page)]
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(focused(page))
    kinds = [kind for kind, _ in reached]
    assert kinds[:4] == ["select-one"] * 3 + ["slider"], reached
    assert any("copy as code" in words for kind, words in reached if kind in ("button", "submit")), reached
    assert any("Apply to the model" in words for kind, words in reached if kind in ("button", "submit")), reached
    button = browser.panel(page).locator("button", has_text="copy as code")
    button.focus()
    page.keyboard.press("Enter")
    browser.panel(page).locator("button", has_text="copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith('masks = pu.prune(model, "magnitude", sparsity=') and copied.endswith('"weight")')
    assert copied == browser.panel(page).locator("code").inner_text()


def test_a_panel_that_has_gone_from_the_page_lets_go(page):
    held = "print(panel._trial._twin is not None, panel.box._view_count)"
    assert in_the_kernel(page, held) == "True 1"
    page.evaluate("""async () => {
        const app = window.jupyterapp;
        await app.commands.execute('notebook:clear-all-cell-outputs');
    }""")
    page.wait_for_timeout(1500)
    assert in_the_kernel(page, held) == "False 0"
