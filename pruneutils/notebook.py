"""What the notebooks share: their size, where their pictures go, and how they are executed with outputs stored.

`python -m pruneutils.notebook notebooks/*.ipynb` executes notebooks in place. `--study` with `--size medium` or `full`
executes one as far as its sweep, whose runs are kept in results/: it can be stopped and called again until it is done.
"""

import argparse
import hashlib
import logging
import os
import tempfile
from pathlib import Path

from ._checks import nearest

SIZES = ("quick", "medium", "full")


def size() -> str:
    """The size to run in: "quick" (embedded digits, CPU), "medium" (real images, CPU) or "full" (GPU).

    Read from the environment variable PRUNEUTILS_SIZE; "quick" if that is not set. Raises ValueError for another value.
    """
    value = os.environ.get("PRUNEUTILS_SIZE", "quick")
    if value not in SIZES:
        raise ValueError(f"unknown PRUNEUTILS_SIZE {value!r}; {nearest(value, SIZES)}")
    return value


def image(name: str, recorded: str | None = None) -> Path:
    """Where the picture `name` of a notebook goes: images/ beside notebooks/, or the folder in PRUNEUTILS_IMAGES.

    Sizes beyond quick are told in the name, so that they never replace each other: "curve_medium". The size is the
    present one, or `recorded`, that of the runs which are shown.
    """
    folder = Path(os.environ.get("PRUNEUTILS_IMAGES", "../images"))
    shown = recorded or size()
    return folder / (name if shown == "quick" else f"{name}_{shown}")


def store(name: str) -> Path | None:
    """Where the runs of a sweep are kept: nowhere in quick size (always computed), else results/<name>_<size>."""
    return None if size() == "quick" else Path("../results") / f"{name}_{size()}"


def recorded(name: str) -> dict:
    """The finished runs of a notebook's larger sizes that results/ holds, {size: DataFrame}; says so if there are none.

    The runs of a size are in the order of their start.
    """
    from .experiments import load

    folders = {size: Path("../results") / f"{name}_{size}" for size in SIZES[1:]}
    frames = {size: load(folder) for size, folder in folders.items() if any(folder.glob("*.json"))}
    if not frames:
        print(f"nothing is recorded in results/ yet; this does: make study NAME={name} SIZE=medium")
    return {size: frame[frame.status == "done"] for size, frame in frames.items()}


def code_hash(notebook) -> str:
    """The hash of a notebook's code cells (a dict as from JSON), kept in it to tell outputs of older code."""
    cells = [source_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()[:16]


def source_of(cell) -> str:
    """A cell's text; nbformat keeps it as a string, JSON files as a list of lines."""
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def execute(path: Path, output: Path | None = None, parameters: dict | None = None, until: str | None = None):
    """Execute a notebook in its folder, write it with its outputs (in place unless `output` is given) and return it.

    `parameters` replace those of the cell tagged `parameters`; `until` is the tag of the last cell to execute. Raises
    papermill's error if a cell fails.
    """
    import nbformat
    import papermill

    # it reads `a = 1` as a parameter but not `a, b = 1, 2`, and warns of the b that is passed
    logging.getLogger("papermill").setLevel(logging.ERROR)
    path, output = Path(path).resolve(), Path(output or path).resolve()
    if until is None:
        os.environ.setdefault("TQDM_DISABLE", "1")  # a stored progress bar is a dead widget
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # see conftest.py
    output.parent.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(path, as_version=4)
    if until is not None:
        last = next(i for i, cell in enumerate(notebook.cells) if until in cell.metadata.get("tags", []))
        notebook.cells = notebook.cells[: last + 1]
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / path.name
        nbformat.write(notebook, part)
        papermill.execute_notebook(part, part, parameters or {}, kernel_name="python3", cwd=path.parent)
        notebook = nbformat.read(part, as_version=4)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "pruneutils": {"code": code_hash(notebook), "size": size()},
    }
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
    nbformat.write(notebook, output)
    return notebook


def main():
    parser = argparse.ArgumentParser(prog="python -m pruneutils.notebook", description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--size", choices=SIZES, help="default: PRUNEUTILS_SIZE, or quick")
    parser.add_argument("--output", type=Path, help="folder for the executed notebooks; default: in place")
    parser.add_argument("--show", action="store_true", help="print what the cells tagged `answer` print")
    parser.add_argument("--study", action="store_true", help="stop after the sweep; keep the notebook in build/")
    parser.add_argument("--budget", type=float, help="with --study: start no run after so many seconds")
    arguments = parser.parse_args()
    if arguments.size:
        os.environ["PRUNEUTILS_SIZE"] = arguments.size
    if arguments.study:
        arguments.output = arguments.output or Path("build")
    for path in arguments.notebooks:
        output = arguments.output / path.name if arguments.output else path
        print(f"{path} ({size()})", flush=True)
        budget = {"budget_seconds": arguments.budget} if arguments.budget else {}
        notebook = execute(path, output, budget, "sweep" if arguments.study else None)
        if arguments.show or arguments.study:
            print(*_texts(notebook, "sweep" if arguments.study else "answer"), sep="\n\n")
        print(f"executed: {output}", flush=True)


def _texts(notebook, tag) -> list[str]:
    """The text that cells of this tag have put out."""
    cells = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    outputs = [output for cell in cells for output in cell.get("outputs", []) if output.get("name") != "stderr"]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return [text.rstrip() for text in texts if text]


if __name__ == "__main__":
    main()
