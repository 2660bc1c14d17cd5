"""Build the site into build/site: `make docs`, or `python docs/build.py [--frames N]`.

Gathers the pages in build/docs: README as the front page, the notebooks as they are stored, the API from the
docstrings, the results from results/, a method that is added, and an explorer of recorded frames. Then runs mkdocs on
them, strictly.
"""

import argparse
import copy
import hashlib
import html
import inspect
import json
import logging
import math
import re
import shutil
import statistics
import warnings
from pathlib import Path

import pandas as pd
import torch

import pruneutils as pu
import results

ROOT = Path(__file__).resolve().parent.parent
CRITERIA = ("magnitude", "snip", "synflow")
ROOMS = sorted({*(name for name in pu.__all__ if inspect.ismodule(getattr(pu, name))), "notebook"})


def main() -> None:
    """Gather the pages and build the site."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")  # mkdocs is strict about these
    logging.getLogger("traitlets").setLevel(logging.ERROR)  # pictures without a description get one below
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=40, help="sparsities that the explorer shows, for each criterion")
    parser.add_argument("--output", type=Path, default=ROOT / "build", help="gets the folders docs and site")
    arguments = parser.parse_args()
    pages, site = arguments.output / "docs", arguments.output / "site"
    for folder in (pages, site):
        shutil.rmtree(folder, ignore_errors=True)
    (pages / "notebooks").mkdir(parents=True)
    shutil.copytree(ROOT / "images", pages / "images", ignore=shutil.ignore_patterns("*.svg"))  # no page shows these
    for name in ("pruneutils.css", "pruneutils.js"):
        shutil.copy(ROOT / "docs" / name, pages)
    (pages / "index.md").write_text(front_page())
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        (pages / "notebooks" / path.name).write_text(json.dumps(for_the_site(json.loads(path.read_text()))))
    (pages / "notebooks/index.md").write_text(notebooks_page())
    (pages / "api.md").write_text(api_page())
    (pages / "results.md").write_text(results_page())
    (pages / "method.md").write_text(method_page())
    (pages / "explorer.md").write_text(explorer_page(pages / "frames", arguments.frames))

    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    nav = [
        {"Home": "index.md"},
        {"Explorer": "explorer.md"},
        {"Notebooks": [{"By question": "notebooks/index.md"}, *[f"notebooks/{name}.ipynb" for name in order()]]},
        {"Add your method": "method.md"},
        {"API": "api.md"},
        {"Results": "results.md"},
    ]
    build(load_config(str(ROOT / "docs/mkdocs.yml"), nav=nav, docs_dir=str(pages), site_dir=str(site)))
    for page in (site / "notebooks").glob("*.html"):
        page.write_text(shared_styles(without_foreign_scripts(described(page.read_text())), page.parent))
    for path in site.rglob("*.map"):  # of scripts that nobody debugs here
        path.unlink()
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    print(f"{site}: {sum(1 for _ in site.rglob('*.html'))} pages, {size / 1e6:.1f} MB")


# --- Words -----------------------------------------------------------------------------------------------------------


def readme() -> str:
    """Return README.md."""
    return (ROOT / "README.md").read_text()


def front_page() -> str:
    """Return README with links that work on the site; what is no page here is named and not linked."""
    text = (
        readme().replace("(notebooks/README.md)", "(notebooks/index.md)").replace("(results/README.md)", "(results.md)")
    )
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#|images/|notebooks/|results\.md)[^)]+\)", r"\1", text)


def order() -> list[str]:
    """Return the names of the notebooks in README's order."""
    return re.findall(r"^\| \[(\w+)\]\(notebooks/\1\.ipynb\) \|", readme(), flags=re.M)


def notebooks_page() -> str:
    """Return the index of the notebooks, by question and with pictures, as it is kept beside them."""
    return (ROOT / "notebooks/README.md").read_text()


def for_the_site(notebook: dict) -> dict:
    """Return a stored notebook with links to pages, and with formulas as MathML instead of TeX for a script."""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = linked(source)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data.pop("application/vnd.jupyter.widget-view+json", None)  # there is no kernel here
            if "text/markdown" in data:
                data["text/markdown"] = linked("".join(data["text/markdown"]))
        cell["source"] = source
        cell["metadata"] = {}  # tags are for tests, and would be shown above the code
    return notebook


def described(page: str) -> str:
    """Name the section of each picture that code has drawn, in a notebook's page: nbconvert does not describe it."""
    section, parts = "", re.split(r"(<h[1-6][^>]*>.*?</h[1-6]>)", page, flags=re.S)
    for i, part in enumerate(parts):
        if i % 2:
            section = html.escape(re.sub(r"<[^>]+>|¶|&para;", "", part).strip(), quote=True)
        said = f'alt="Picture drawn by the code above it, in the section: {section}"'
        parts[i] = part.replace('alt="No description has been provided for this image"', said)
    return "".join(parts)


def without_foreign_scripts(page: str) -> str:
    """Leave out nbconvert's scripts for diagrams and for TeX: they would load others from elsewhere."""
    foreign = re.compile(r"mermaid|mathjax|<script src=\"\">", flags=re.I)
    keep = lambda found: "" if foreign.search(found[0]) else found[0]  # noqa: E731
    return re.sub(r"<script[^>]*>.*?</script>", keep, page, flags=re.S)


def shared_styles(page: str, folder: Path) -> str:
    """Put a style sheet of half a megabyte, which nbconvert writes into every page, into one file beside the pages."""

    def moved(found):
        name = f"style-{hashlib.sha256(found[1].encode()).hexdigest()[:8]}.css"
        (folder / name).write_text(found[1])
        return f'<link rel="stylesheet" href="{name}">'

    return re.sub(r"<style[^>]*>((?:(?!</style>).){100000,})</style>", moved, page, flags=re.S)


def linked(text: str) -> str:
    """Return markdown of a notebook with links to pages and formulas as MathML."""
    from latex2mathml.converter import convert

    text = re.sub(r"\((\w+)\.ipynb(#[^)]*)?\)", r"(\1.html\2)", text)
    text = re.sub(r"(\]\([\w.]*#)([^)]*)\)", lambda found: f"{found[1]}{slug(found[2])})", text)
    text = re.sub(r"\$\$(.+?)\$\$", lambda found: convert(found[1], display="block"), text, flags=re.S)
    parts = re.split(r"(`[^`]*`)", text)  # dollars in code are dollars
    parts[::2] = [re.sub(r"\$([^$\n]+)\$", lambda found: convert(found[1]), part) for part in parts[::2]]
    return "".join(parts)


def slug(heading: str) -> str:
    """Return the name that the site gives a heading; JupyterLab's keeps capitals and punctuation."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()).strip("-")


# --- The API ---------------------------------------------------------------------------------------------------------


def api_page() -> str:
    """Return a page with every public name and its docstring."""
    plain = [name for name in pu.__all__ if name not in ROOMS]
    text = "# API\n\n`import pruneutils as pu`. "
    text += "Names of the package first, then its rooms: " + ", ".join(f"[pu.{r}](#{r})" for r in ROOMS) + ".\n"
    text += "\n## pruneutils { #pruneutils-names }\n\n"
    text += "".join(f"::: pruneutils.{name}\n\n" for name in plain)
    for room in ROOMS:
        module = getattr(pu, room)
        text += f"\n## pu.{room} {{ #{room} }}\n\n{inspect.getdoc(module).splitlines()[0]}\n\n"
        text += "".join(f"::: {module.__name__}.{name}\n\n" for name in names_of(module))
    return text


def names_of(module) -> list[str]:
    """Return the public names of a room that have a docstring of their own."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    return [name for name in names if callable(getattr(module, name))]


# --- The results -----------------------------------------------------------------------------------------------------


# The columns that name an arm, beside those that hold words; and the values that a table shows, where there are any.
_NAMES = ("target", "asked", "compression", "ratio", "sparsity", "prunings", "rounds", "iterations", "blocks", "lr")
_NAMES += ("epochs", "steps", "n_seen", "eps")
_VALUES = ("accuracy", "test_accuracy", "perplexity", "cosine", "same_neighbour", "kept", "macs_left", "mac_density")
_VALUES += ("overlap", "threshold")
_PLAIN = ("perplexity", "threshold", "cosine")  # values that are no shares
_SAME = ("layer", "data", "dataset", "device", "folder", "status", "hits", "precision", "precision_measured")
_SAME += ("text", "norms")


def results_page() -> str:
    """Return a page with what is recorded in results/: the studies, and a table of the arms of each."""
    studies, parts = results.studies(), []
    for _, study in studies.iterrows():
        name, done, planned = study["study"], study["runs done"], study["runs planned"]
        text = f"\n## {name} {{ #{name} }}\n\n{done} of {planned} planned runs are recorded: {study['hours']} hours on "
        text += f"{study['device']} in {study['precision']}, at commit {study['commit']}. This command goes on:\n\n"
        text += f"```sh\n{study['command'].strip('`')}\n```\n\n"
        parts.append(text + sortable(arms(results.ROOT / "results" / name)))
    studies["study"] = [f"[{name}](#{name})" for name in studies["study"]]
    return (
        "---\nhide: [navigation]\n---\n\n# Results\n\n"
        "What is recorded in `results/`, written only by the experiment runner. The notebooks draw their "
        "pictures from these runs. Click on the name of a column to sort by it. Brackets hold the 95 % t-interval over "
        "the runs of a row. Rows of fewer than three runs have none, and where some runs learn and others stay at "
        "chance, the brackets count those that learn.\n\n"
        + sortable(studies.drop(columns=["command", "commit", "precision"]))
        + "".join(parts)
    )


def sortable(frame: pd.DataFrame) -> str:
    """Return a frame as a table whose columns sort it (see pruneutils.js)."""
    return f'<div class="sortable" markdown>\n\n{results.table(frame)}\n</div>\n'


def arms(folder: Path) -> pd.DataFrame:
    """Return a row an arm of a study: what names it, and the mean of each value at the end of its runs."""
    frame = pu.experiments.load(folder)
    frame = frame[frame.status == "done"].dropna(axis=1, how="all")
    if "order" in frame:  # of the test images: a seed, or by class
        frame["order"] = frame["order"].isna().map({True: "by class", False: "shuffled"})
    if "losses" in frame and "accuracy" not in frame:  # of each block of text
        frame["perplexity"] = [math.exp(statistics.mean(json.loads(losses))) for losses in frame["losses"]]
    names = [name for name in frame if not name.startswith("run_") and name not in _SAME and names_arms(frame, name)]
    frame[names] = frame[names].astype(object).where(frame[names].notna(), "")
    if "layer" in frame:
        kept, total = ("after", "before") if "after" in frame else ("kept", "total")
        sums = frame.groupby(["run_time", *names])[[kept, total]].transform("sum")
        frame["kept"] = sums[kept] / sums[total]
    frame = frame.drop_duplicates(["run_time", *names], keep="last")
    values, rows = [name for name in _VALUES if name in frame], []
    for arm, runs in frame.groupby(names, sort=False) if names else [((), frame)]:
        means = {name + " (%)" * (name not in _PLAIN): mean_of(runs, name) for name in values}
        rows.append({**dict(zip(names, arm)), "runs": len(runs), **means})
    table = pd.DataFrame(rows).rename(columns=lambda name: name.replace("_", " "))
    return (
        table.sort_values(list(table.columns[: len(names)]), key=lambda column: column.astype(str)) if names else table
    )


def names_arms(frame: pd.DataFrame, name: str) -> bool:
    """Return whether the values of a column name arms of a study: words, or numbers that stand still within a run."""
    column = frame[name]
    lists = name != "without" and column.astype(str).str.startswith("[").any()
    if column.nunique(dropna=False) < 2 or lists or (name == "sparsity" and "compression" in frame):
        return False
    if name in ("sparsity", "lr"):  # in training they may change from epoch to epoch
        still = "epoch" not in frame or column.groupby(frame["run_time"]).nunique().max() < 2
        return column.nunique() > 1 and still
    return name in _NAMES or not pd.api.types.is_numeric_dtype(column)


def mean_of(runs: pd.DataFrame, name: str) -> str:
    """Return the mean of a column with its 95 % t-interval; percent for accuracies and shares."""
    found = runs[name].dropna()
    scale, form = (1, "{:.4g}") if name in _PLAIN else (100, "{:.1f}")
    text = form.format(scale * found.mean()) if len(found) else "-"
    if name == "accuracy" and "commonest" in runs:
        learn = int((found > runs["commonest"] + 0.02).sum())
        if 0 < learn < len(found):
            return f"{text} ({learn} of {len(found)} learn)"
    if len(found) < 3:
        return text
    low, high = (form.format(scale * end) for end in pu.statistics.t_interval(found))
    return f"{text} ({low} to {high})"


# --- Your method -----------------------------------------------------------------------------------------------------


def method_page() -> str:
    """Run the lines of docs/method.md in the notebook that they change, in size quick, and return the page."""
    text = (ROOT / "docs/method.md").read_text()
    function, seeds, chosen, row, paired = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    notebook = json.loads((ROOT / "notebooks/pruning_at_initialization.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    parameters, make, run, sweep = (
        next((cell for cell in cells if re.search(begins, cell, flags=re.M)), "")
        for begins in ("= pu.notebook.size", "^def make", "^def run", "^def configs")
    )
    sweep, changed = re.subn(r"^arms = .*\n", chosen, sweep, flags=re.M)
    if changed != 1:
        raise ValueError("docs/method.md changes the line of the sweep that begins with `arms =`, which is not there")
    names = {"pu": pu, "torch": torch, "nn": torch.nn, "copy": copy}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # masks that are inverted leave layers empty
        for code in (function, parameters, seeds, make.split("\n\n\n")[0], run, sweep):
            exec(code, names)
    table = (100 * eval(row, names)).round(1).reset_index()
    text = text.replace("{table}", results.table(table.astype(object).where(table.notna(), "")))
    exec(paired, names)
    return text.replace("{differences}", results.table(names["differences"].round(3)))


# --- The explorer ----------------------------------------------------------------------------------------------------


def explorer_page(folder: Path, n: int) -> str:
    """Record the panel for three criteria at `n` sparsities, and return a page whose slider shows these frames."""
    from record import frame, lines_of, trained_panels

    places = [round(1 - 10 ** (-2 * i / (n - 1)), 4) for i in range(n)]  # 90 to 99 % get as many as 0 to 90 %
    said, seen = {}, {}
    for style, panel in trained_panels().items():
        (folder / style).mkdir(parents=True)
        for criterion in CRITERIA:
            panel.criterion.value = criterion
            panel.curve()
        for criterion in CRITERIA:
            panel.criterion.value = criterion
            for i, place in enumerate(places):
                panel.slider.value = place
                image = frame(panel, style, slider=False)
                image = image.resize((1080, round(image.height * 1080 / image.width)))
                image.save(folder / style / f"{criterion}_{i}.webp", quality=70, method=2)
                said[f"{criterion}_{i}"] = "; ".join(lines_of(panel))
                seen[f"{criterion}_{i}"] = described_frame(criterion, place, panel)
    radios = "".join(
        f'<label><input type="radio" name="criterion" value="{name}"{" checked" if name == CRITERIA[0] else ""}> {name}'
        "</label>"
        for name in CRITERIA
    )
    start = max(i for i, place in enumerate(places) if place <= 0.9)
    first = f"{CRITERIA[0]}_{start}"
    return f"""---
hide: [navigation, toc]
---

# Sparsity explorer

This is a recording of [the explorer](notebooks/sparsity_explorer.ipynb) on LeNet-300-100, trained for six epochs on the
embedded digits: three criteria at {n} sparsities. In a notebook the same panel takes any network, and every choice.

<div class="explorer" data-frames="{n}">
<fieldset><legend>criterion</legend>{radios}</fieldset>
<label for="sparsity">sparsity <output id="said" for="sparsity">{places[start]:.1%}</output></label><br>
<input type="range" id="sparsity" min="0" max="{n - 1}" step="1" value="{start}" aria-valuetext="{places[start]:.1%}">
<p id="numbers" role="status">{said[first]}</p>
<div class="frame"><picture>
<source id="dark" media="(prefers-color-scheme: dark)" srcset="frames/dark/{first}.webp">
<img id="frame" width="1080" src="frames/light/{first}.webp" alt="{seen[first]}">
</picture></div>
</div>

<script>
(() => {{
  const places = {json.dumps(places)}, said = {json.dumps(said)}, seen = {json.dumps(seen)};
  const slider = document.getElementById("sparsity"), image = document.getElementById("frame");
  const dark = document.getElementById("dark"), kept = {{}};
  const address = (style, key) => `frames/${{style}}/${{key}}.webp`;
  const load = source => kept[source] ??= Object.assign(new Image(), {{ src: source }});
  const show = () => {{
    const key = document.querySelector("input[name=criterion]:checked").value + "_" + slider.value;
    const now = (100 * places[slider.value]).toFixed(1) + "%";
    dark.srcset = address("dark", key);
    image.src = address("light", key);
    image.alt = seen[key];
    document.getElementById("said").textContent = now;
    document.getElementById("numbers").textContent = said[key];
    slider.setAttribute("aria-valuetext", now);
    const style = matchMedia(dark.media).matches ? "dark" : "light";
    for (const near of [-1, 1, 2]) {{
      const next = Math.min(Math.max(+slider.value + near, 0), places.length - 1);
      load(address(style, key.replace(/\\d+$/, next)));
    }}
  }};
  slider.addEventListener("input", show);
  document.querySelectorAll("input[name=criterion]").forEach(radio => radio.addEventListener("change", show));
  show();
}})();
</script>
"""


def described_frame(criterion: str, place: float, panel) -> str:
    """Return what is seen on a frame beside the numbers: the place on the curve, and the share of each layer."""
    shares = {name.removesuffix(".weight"): mask.double().mean().item() for name, mask in panel.masks.items()}
    layers = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return (
        f"Above, the curve of accuracy over sparsity for {criterion} with a dot at {place:.1%}. Below, the weights "
        f"that are left in each layer as histograms, and as bars the share that each layer keeps: {layers}"
    )


if __name__ == "__main__":
    main()
