"""The explorer's notebook in JupyterLab in a real browser: all cells run, and the slider moves number and picture."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no Chromium found; `apt-get install -y chromium` (Debian) or `brew install --cask chromium` (macOS)",
    ),
]

# what would cover the notebook, and what keeps cells out of sight out of the page
SETTINGS = {
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}
RUN_ALL = """async () => {
    const app = window.jupyterapp;
    await app.restored;
    const panel = app.shell.currentWidget;
    await panel.context.ready;
    await panel.sessionContext.ready;
    await panel.sessionContext.session.kernel.info;
    await app.commands.execute('notebook:run-all-cells');
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on loopback, with a copy of the notebook: its address."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(ROOT / "notebooks/sparsity_explorer.ipynb", folder)
    for name, values in SETTINGS.items():
        path = folder / "settings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    own = {"CONFIG_DIR": "config", "RUNTIME_DIR": "runtime", "DATA_DIR": "data"}
    environment = {**os.environ, **{f"JUPYTER_{key}": str(folder / value) for key, value in own.items()}}
    environment |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    environment |= {
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "PRUNEUTILS_IMAGES": str(folder / "images"),
    }
    options = {"ServerApp.port": port, "ServerApp.port_retries": 0, "IdentityProvider.token": token}
    options |= {"ServerApp.ip": "127.0.0.1", "ServerApp.root_dir": folder, "LabApp.expose_app_in_browser": True}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    command += [f"--{key}={value}" for key, value in options.items()]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert server.poll() is None, (folder / "log").read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).close()
                break
            time.sleep(0.25)
        yield f"{address}/lab/tree/sparsity_explorer.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def page(lab):
    """The notebook in the browser after all of its cells have run."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]  # as root, and in containers with a small /dev/shm
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1400, "height": 1100})
        page.set_default_timeout(60_000)
        page.goto(lab)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.evaluate(RUN_ALL)
        yield page
        browser.close()


def state(page):
    """What the panel shows: the slider's number, the text, and the picture's bytes."""
    readout = page.locator(".widget-slider .widget-readout").inner_text()
    text = page.locator(".widget-html-content").first.inner_text()
    picture = page.evaluate(
        """async () => {
            const image = await (await fetch(document.querySelector('img.widget-image').src)).arrayBuffer();
            const hash = await crypto.subtle.digest('SHA-256', image);
            return image.byteLength + ' ' + new Uint8Array(hash).join('.');
        }"""
    )
    return readout, text, picture


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
    dragged = moved(page, typed)
    assert dragged[1].split("%")[0] == f"{float(dragged[0].rstrip('%')):.2f}"

    page.get_by_text("on all 1,000 images").first.wait_for()  # in full, once the slider rests
    folder = Path(os.environ.get("PRUNEUTILS_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / "explorer.png")
    assert (folder / "explorer.png").stat().st_size > 50_000
