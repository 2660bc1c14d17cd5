"""The table of the recorded studies, for the site and for results/README.md: `make findings` writes it."""

from pathlib import Path

import pandas as pd

import pruneutils as pu

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "results" / "README.md"
# Studies whose sweep stands in a notebook of another name.
NOTEBOOKS = {
    "adapted": "filter_pruning",
    "grasp_agreement": "grasp_threshold_debug",
    "grasp_normaliser": "grasp_threshold_debug",
    "grasp_thresholds": "grasp_threshold_debug",
    "prune_adapted": "gradual_pruning",
}

HEAD = """# The recorded studies

Each folder holds the runs of one study, a JSON file per run: its settings, its results, seed, versions, device,
precision, seconds and commit. The notebooks draw their pictures from these files.

The command in a row goes on with the study and skips what is recorded here. If the environment variable
`PRUNEUTILS_RESULTS` names an empty folder (its whole path), the study starts anew. The hours add up the times of all
runs. Several of them shared the machine, so an idle one needs less. `make findings` writes this page.

"""
FOOT = """
`networks/` holds the networks that *adapted* has trained: the public ResNet-20 and ResNet-56, fitted to CIFAR-10 as
JPEG images. The studies of gradual pruning and of filters start from them.
"""


def folders() -> list[Path]:
    """Return the folders of results/ that hold records."""
    return [path for path in sorted((ROOT / "results").iterdir()) if any(path.glob("*.json"))]


def command(folder: Path) -> str:
    """Return the command that records a study, or goes on with it."""
    name, size = folder.name.rsplit("_", 1)
    return f"make study NAME={NOTEBOOKS.get(name, name)} SIZE={size}"


def studies() -> pd.DataFrame:
    """Return a row per study: what it is recorded by, how much there is, and what it ran on."""
    rows = []
    for folder in folders():
        frame = pu.experiments.load(folder)
        done = frame[frame.status == "done"]
        runs = done.drop_duplicates("run_time", keep="last")
        in_rows = "precision" in done and done.run_precision.isna().all()  # an early study tells it of each epoch
        precision = done.precision.mask(done.precision == "auto") if in_rows else done.run_precision
        rows.append({
            "study": folder.name,
            "command": f"`{command(folder)}`",
            "runs": len(runs),
            "seeds": done.seed.nunique() if "seed" in done else "-",
            "data": told(done.get("data")),
            "device": told(done.run_device),
            "precision": told(precision),
            "hours": f"{runs.run_seconds.sum() / 3600:.2g}",
            "commit": told(done.run_commit),
        })  # fmt: skip
    return pd.DataFrame(rows)


def told(column: pd.Series | None) -> str:
    """Return the different values of a column; a dash if the records hold none."""
    return ", ".join(map(str, [] if column is None else column.dropna().unique()[:4])) or "-"


def table(frame: pd.DataFrame) -> str:
    """Return a frame as a table in markdown."""
    rows = [[f"{v:.4g}" if isinstance(v, float) else str(v).replace("|", "\\|") for v in row] for row in frame.values]
    lines = [[*map(str, frame.columns)], ["---"] * len(frame.columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def page() -> str:
    """Return the text of results/README.md."""
    return HEAD + table(studies()) + FOOT
