"""What the notebooks share: their size, where their pictures go, and how they are executed with outputs stored.

`python -m pruneutils.notebook notebooks/*.ipynb` executes notebooks in place; with `--study`, called again it goes on.
"""

import argparse
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from ._checks import unknown
from ._files import repository, write_whole

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SIZES", "image", "recorded", "size", "store"]

SIZES = ("quick", "medium", "full")


def size() -> str:
    """Return the size to run in, as the environment variable PRUNEUTILS_SIZE says; ValueError if there is none such.

    Returns:
        "quick" (embedded digits, CPU; the default), "medium" (real images, CPU) or "full" (GPU).

    Example:
        >>> pu.notebook.size()
        'quick'
    """
    value = os.environ.get("PRUNEUTILS_SIZE", "quick")
    if value not in SIZES:
        raise unknown("PRUNEUTILS_SIZE", value, SIZES)
    return value


def image(name: str) -> Path:
    """Return where a picture of a notebook goes: into build/ of the repository, or where PRUNEUTILS_IMAGES says.

    Args:
        name: The picture's name, without a suffix.

    Returns:
        The path, for `save` of the functions of `plots`.

    Example:
        >>> pu.notebook.image("curve").name
        'curve'
    """
    return Path(os.environ.get("PRUNEUTILS_IMAGES") or repository() / "build") / name


def store(name: str) -> Path | None:
    """Return where the runs of a sweep are kept: <name>_<size> in results/, or in the folder PRUNEUTILS_RESULTS.

    Args:
        name: The store's name, usually the notebook's.

    Returns:
        The folder, for the argument `store` of `experiments.sweep`; None in size quick, which is always computed.

    Example:
        >>> pu.notebook.store("my_question")  # size quick: None
    """
    return None if size() == "quick" else _results() / f"{name}_{size()}"


def recorded(name: str, size: str, notebook: str | None = None) -> "pd.DataFrame":
    """Read the finished runs of a notebook's larger size from results/.

    Args:
        name, size: The name of the store, as given to `store`; and "medium" or "full".
        notebook: The notebook whose sweep writes the store; defaults to the store's name.

    Returns:
        The table of the finished runs, in the order of their start.

    Raises:
        FileNotFoundError: If nothing is recorded; the message has the command that records it.

    Example:
        >>> pu.notebook.recorded("my_question", "medium")
        Traceback (most recent call last):
        FileNotFoundError: no run of my_question_medium is recorded; to record: make study NAME=my_question SIZE=medium
    """
    from .experiments import load

    if size not in SIZES[1:]:
        raise unknown("size", size, SIZES[1:])
    folder = _results() / f"{name}_{size}"
    if not any(folder.glob("*.json")):
        command = f"make study NAME={notebook or name} SIZE={size}"
        raise FileNotFoundError(f"no run of {folder.name} is recorded; to record: {command}")
    frame = load(folder)
    return frame[frame.status == "done"]


def _results() -> Path:
    return Path(os.environ.get("PRUNEUTILS_RESULTS") or repository() / "results")


def code_hash(notebook: Mapping[str, Any]) -> str:
    """Return the hash of a notebook's code cells (a dict as from JSON), which is stored with the outputs."""
    cells = [source_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()[:16]


def source_of(cell: Mapping[str, Any]) -> str:
    """Return a cell's text; nbformat keeps it as a string, JSON files as a list of lines."""
    return "".join(cell["source"])


def _tagged(cell, *tags: str) -> bool:
    return not {*tags}.isdisjoint(cell.metadata.get("tags", []))


def execute(path: Path, output: Path, parameters: Mapping[str, Any], study: bool = False) -> dict[str, Any]:
    """Execute a notebook in its own folder and write it with its outputs to `output`, which may be `path`.

    A `study` stops after the last cell tagged `sweep`, and runs only the imports of cells tagged `answer`, which read
    what it records. Pictures go beside `output`; executed in place, into images/ of the repository.
    """
    import nbformat
    import papermill

    path, output = path.resolve(), output.resolve()
    notebook = nbformat.read(path, as_version=4)
    images = repository(path.parent) / "images" if output == path else output.parent
    settings = {"PRUNEUTILS_IMAGES": str(images), "OMP_NUM_THREADS": "1"}  # see conftest.py
    if study:
        sweeps = [number for number, cell in enumerate(notebook.cells) if _tagged(cell, "sweep")]
        if not sweeps:
            raise ValueError(f"{path} has no cell tagged 'sweep'")
        notebook.cells = notebook.cells[: sweeps[-1] + 1]
        for cell in notebook.cells:
            if _tagged(cell, "answer") and not _tagged(cell, "sweep", "parameters"):
                lines = cell.source.splitlines()  # the imports are everybody's
                cell.source = "\n".join(line for line in lines if line.startswith(("import ", "from ")))
    else:
        settings["TQDM_DISABLE"] = "1"  # a stored progress bar is a dead widget
    # For kernels started inside; what the user has set stays as it is.
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {**settings, **os.environ}):
        part = Path(folder) / path.name
        nbformat.write(notebook, part)
        papermill.execute_notebook(part, part, dict(parameters), kernel_name="python3", cwd=path.parent)
        notebook = nbformat.read(part, as_version=4)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "pruneutils": {"code": code_hash(notebook), "size": size()},
    }
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, nbformat.writes(notebook).encode())
    return notebook


def main() -> None:
    """Run the command line, `python -m pruneutils.notebook`."""
    parser = argparse.ArgumentParser(prog="python -m pruneutils.notebook", description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--size", choices=SIZES, help="default: PRUNEUTILS_SIZE, or quick")
    parser.add_argument("--output", type=Path, help="folder for the executed notebooks; default: in place")
    parser.add_argument("--show", action="store_true", help="print what the cells tagged `answer` print")
    parser.add_argument("--study", action="store_true", help="stop after the sweeps; --output: the repository's build/")
    parser.add_argument("--budget", type=float, help="with --study: start no run after so many seconds")
    arguments = parser.parse_args()
    if arguments.size:
        os.environ["PRUNEUTILS_SIZE"] = arguments.size
    for path in arguments.notebooks:
        folder = arguments.output or (repository(path.parent) / "build" if arguments.study else path.parent)
        print(f"{path} ({size()})", flush=True)
        budget = {"budget_seconds": arguments.budget} if arguments.budget else {}
        notebook = execute(path, folder / path.name, budget, arguments.study)
        if arguments.show or arguments.study:
            print(*_texts(notebook, "sweep" if arguments.study else "answer"), sep="\n\n")
        print(f"executed: {folder / path.name}", flush=True)


def _texts(notebook, tag) -> list[str]:
    """Return the text that cells of this tag have put out; pictures are left out."""
    texts = []
    for output in (output for cell in notebook.cells if _tagged(cell, tag) for output in cell.get("outputs", [])):
        data = output.get("data", {})
        if output.get("name") != "stderr" and "image/png" not in data:
            texts.append(output.get("text") or data.get("text/markdown") or data.get("text/plain", ""))
    return [text.rstrip() for text in texts if text]


if __name__ == "__main__":
    main()
