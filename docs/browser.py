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
    copy = json.loads(notebook.read_text())
    for cell in copy["cells"]:
        if style == "dark":
            cell["source"] = "".join(cell["source"]).replace("sparsity=sparsity)", 'sparsity=sparsity, style="dark")')
    (folder / notebook.name).write_text(json.dumps(copy))
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


def show_three_curves(page: Any) -> None:
    """Let the explorer measure the curves of three criteria, and go back to the first."""
    criterion = panel(page).locator("select").first
    for name in ("synflow", "snip", "magnitude"):
        criterion.select_option(label=name)
        panel(page).get_by_text("on all 1,000 images").first.wait_for()
        page.wait_for_timeout(12_000)
