"""The table of the recorded studies, for the site and for results/README.md: `make findings` writes it."""

from pathlib import Path

import pandas as pd

import pruneutils as pu

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "results" / "README.md"
# The notebook whose sweep records each study, and how many runs its grid has.
STUDIES = {
    "adapted_full": ("filter_pruning", 1),
    "adapted_medium": ("filter_pruning", 1),
    "evaluation_mode_medium": ("evaluation_mode", 133),
    "filter_pruning_medium": ("filter_pruning", 380),
    "filter_pruning_epoch_medium": ("filter_pruning", 30),
    "gradual_budget_medium": ("gradual_pruning", 18),
    "grasp_agreement_medium": ("grasp_threshold_debug", 5),
    "grasp_normaliser_medium": ("grasp_threshold_debug", 20),
    "grasp_thresholds_medium": ("grasp_threshold_debug", 5),
    "language_model_medium": ("language_model", 107),
    "one_shot_imagenet_medium": ("one_shot_imagenet", 150),
    "prune_adapted_full": ("gradual_pruning", 135),
    "pruning_at_initialization_full": ("pruning_at_initialization", 275),
    "pruning_at_initialization_medium": ("pruning_at_initialization", 675),
    "sentence_encoder_medium": ("sentence_encoder", 102),
    "vanishing_signal_medium": ("vanishing_signal", 135),
    "vgg16_at_initialization_medium": ("vgg16_at_initialization", 36),
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
JPEG images. The studies of gradual pruning and of filters start from the ResNet-20.
"""


def folders() -> list[Path]:
    """Return the folders of results/ that hold records."""
    return [path for path in sorted((ROOT / "results").iterdir()) if any(path.glob("*.json"))]


def studies() -> pd.DataFrame:
    """Return a row per study: what it is recorded by, how much of it there is, and what it ran on."""
    rows = []
    for folder in folders():
        notebook, planned = STUDIES[folder.name]
        frame = pu.experiments.load(folder)
        done = frame[frame.status == "done"]
        runs = done.drop_duplicates("run_time", keep="last")
        by_epoch = "precision" in done and done.run_precision.isna().all()  # early studies recorded it of each epoch
        precision = done.precision.mask(done.precision == "auto") if by_epoch else done.run_precision
        row = {"study": folder.name, "command": f"`make study NAME={notebook} SIZE={folder.name.rsplit('_', 1)[1]}`"}
        row |= {"runs planned": planned, "runs done": len(runs)}
        row |= {"seeds": done.seed.nunique() if "seed" in done else "-", "data": _distinct(done.get("data"))}
        row |= {"device": _distinct(done.run_device), "precision": _distinct(precision)}
        row |= {"hours": f"{runs.run_seconds.sum() / 3600:.2g}", "commit": _distinct(done.run_commit)}
        rows.append(row)
    return pd.DataFrame(rows)


def _distinct(column: pd.Series | None) -> str:
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


if __name__ == "__main__":
    PAGE.write_text(page())
