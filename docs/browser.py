"""Notebooks and pages in a real Chromium, for tests and for screenshots: JupyterLab on loopback, and all cells run."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

# what would cover the notebook, and what keeps cells out of sight out of the page
_SETTINGS = {
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}
_DARK = {"@jupyterlab/apputils-extension/themes.jupyterlab-settings": {"theme": "JupyterLab Dark"}}
_RUN_ALL = """async () => {
    const app = window.jupyterapp;
    await app.restored;
    const panel = app.shell.currentWidget;
    await panel.context.ready;
    await panel.sessionContext.ready;
    await panel.sessionContext.session.kernel.info;
    await app.commands.execute('notebook:run-all-cells');
}"""


@contextlib.contextmanager
def lab(notebook: Path, folder: Path, style: str = "light") -> Iterator[str]:
    """Start JupyterLab on loopback with a copy of a notebook in `folder`; yields its address."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / notebook.name).write_bytes(notebook.read_bytes())
    for name, values in (_SETTINGS | (_DARK if style == "dark" else {})).items():
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
        yield f"{address}/lab/tree/{notebook.name}?token={token}"
    finally:
        server.terminate()
        server.wait(30)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Start a Chromium; yields playwright's browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]  # as root, and in containers with a small /dev/shm
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def notebook(path: Path, folder: Path, style: str = "light") -> Iterator[Any]:
    """Open a notebook in JupyterLab and run all of its cells; yields playwright's page."""
    with lab(path, folder, style) as address, chromium() as browser:
        context = browser.new_context(viewport={"width": 1400, "height": 1100}, color_scheme=style)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.goto(address)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.evaluate(_RUN_ALL)
        yield page


def panel(page: Any) -> Any:
    """Return the panel on a notebook's page."""
    return page.locator(".jp-OutputArea-output .jupyter-widgets.widget-vbox").first


def explorer_notebook(folder: Path, style: str = "light") -> Path:
    """Write a notebook with an explorer of LeNet-300-100 on the embedded digits."""
    cells = [
        "import pruneutils as pu\ntrain, test = pu.data.load('digits')\nmodel = pu.models.create('lenet300')",
        "pu.fit(model, train, None, 6, 'adam');",
        f"panel = pu.widgets.sparsity_explorer(model, test, train.batch(256), sparsity=0.9, style={style!r})\npanel",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"explorer_{style}.ipynb"
    nbformat.write(notebook, path)
    return path


_FAINT = """() => {
    const brush = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    const mixed = (colors, last = 1) => {
        brush.clearRect(0, 0, 1, 1);
        colors.forEach((color, i) => {
            brush.globalAlpha = i == colors.length - 1 ? last : 1;
            brush.fillStyle = color;
            brush.fillRect(0, 0, 1, 1);
        });
        return [...brush.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const bright = rgb => rgb.reduce((sum, c, i) => sum + linear(c / 255) * [0.2126, 0.7152, 0.0722][i], 0.05);
    const found = new Map(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const at = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
        const shown = at.checkVisibility({ opacityProperty: true, visibilityProperty: true });
        if (!text || !shown || at.closest('script, style, .headerlink')) continue;
        const style = getComputedStyle(at), behind = ['#fff'], parents = [];
        for (let e = at; e; e = e.parentElement) parents.unshift(getComputedStyle(e));
        behind.push(...parents.map(parent => parent.backgroundColor));
        const opacity = parents.reduce((product, parent) => product * parent.opacity, 1);
        const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
        const [ink, canvas] = [mixed([...behind, style.color], opacity), mixed(behind)].map(bright);
        const contrast = Math.max(ink, canvas) / Math.min(ink, canvas);
        if (contrast < (large ? 3 : 4.5)) {
            const kind = `${at.tagName}.${at.className} ${style.color}`;
            found.set(kind, `${contrast.toFixed(2)} ${kind}: ${text.slice(0, 40)}`);
        }
    }
    return [...found.values()];
}"""


def faint_texts(page: Any) -> list[str]:
    """Return the texts of a page, one of each kind, whose contrast is less than WCAG's 4.5, or 3 for large letters."""
    return page.evaluate(_FAINT)
