"""What the notebooks share: their size, where their pictures go, and how they are executed with outputs stored.

`python -m pruneutils.notebook notebooks/*.ipynb` executes notebooks in place. `--study` with `--size medium` or `full`
executes one as far as its sweep, whose runs are kept in results/: it can be stopped and called again until it is done.
"""

import argparse
import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._checks import unknown
from ._files import repository, written_whole

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SIZES", "image", "recorded", "size", "store"]

SIZES = ("quick", "medium", "full")


def size() -> str:
    """Return the size to run in, as the environment variable PRUNEUTILS_SIZE says.

    Returns:
        "quick" (embedded digits, CPU; the default), "medium" (real images, CPU) or "full" (GPU).

    Raises:
        ValueError: If PRUNEUTILS_SIZE has another value.

    Example:
        >>> pu.notebook.size()
        'quick'
    """
    value = os.environ.get("PRUNEUTILS_SIZE", "quick")
    if value not in SIZES:
        raise unknown("PRUNEUTILS_SIZE", value, SIZES)
    return value


def image(name: str, recorded: str | None = None) -> Path:
    """Return where a picture of a notebook goes: into build/ of the repository.

    The environment variable PRUNEUTILS_IMAGES names another folder. `make notebooks` sets it to images/, whose
    pictures README and notebooks show, so these change by that command alone. Outside of a repository the folder
    build/ lies in the working directory.

    Args:
        name: The picture's name, without a suffix.
        recorded: The size of the runs shown; defaults to the current size. Sizes beyond quick are part of the name, so
            pictures of different sizes never replace each other.

    Returns:
        The path without a suffix, as the functions of `plots` take it for `save`.

    Example:
        >>> pu.notebook.image("curve").name
        'curve'
        >>> pu.notebook.image("curve", recorded="medium").name
        'curve_medium'
    """
    folder = Path(os.environ.get("PRUNEUTILS_IMAGES") or repository() / "build")
    shown = recorded or size()
    return folder / (name if shown == "quick" else f"{name}_{shown}")


def store(name: str) -> Path | None:
    """Return where the runs of a notebook's sweep are kept: in results/<name>_<size> of the repository.

    The environment variable PRUNEUTILS_RESULTS names another folder than results/. Outside of a repository the folder
    results/ lies in the working directory.

    Args:
        name: The notebook's name.

    Returns:
        The folder, for the argument `store` of `experiments.sweep`; None in size quick, which is always computed.

    Example:
        >>> print(pu.notebook.store("my_question"))  # size quick
        None
    """
    return None if size() == "quick" else _results() / f"{name}_{size()}"


def recorded(name: str, notebook: str | None = None) -> dict[str, "pd.DataFrame"]:
    """Read the finished runs of a notebook's larger sizes from results/; print how to record them if there are none.

    Args:
        name: The name of the store, as given to `store`.
        notebook: The notebook whose sweep writes it; None if it has the store's name.

    Returns:
        For each size that is recorded, "medium" before "full", the table of its finished runs in the order of their
        start.

    Raises:
        ValueError: If a file in results/ is not a record.

    Example:
        >>> pu.notebook.recorded("my_question")
        no run of my_question is recorded yet; to record some: make study NAME=my_question SIZE=medium
        {}
    """
    from .experiments import load
    from .experiments.store import Store

    folders = {size: _results() / f"{name}_{size}" for size in SIZES[1:]}
    frames = {size: load(folder) for size, folder in folders.items() if Store(folder).keys()}
    if not frames:
        command = f"make study NAME={notebook or name} SIZE=medium"
        print(f"no run of {name} is recorded yet; to record some: {command}")
    return {size: frame[frame.status == "done"] for size, frame in frames.items()}


def _results() -> Path:
    return Path(os.environ.get("PRUNEUTILS_RESULTS") or repository() / "results")


def code_hash(notebook: Mapping[str, Any]) -> str:
    """Return the hash of a notebook's code cells (a dict as from JSON), kept in it to tell outputs of older code."""
    cells = [source_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()[:16]


def source_of(cell: Mapping[str, Any]) -> str:
    """Return a cell's text; nbformat keeps it as a string, JSON files as a list of lines."""
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def execute(
    path: str | os.PathLike,
    output: str | os.PathLike | None = None,
    parameters: Mapping[str, Any] | None = None,
    until: str | None = None,
) -> dict[str, Any]:
    """Execute a notebook in its own folder and write it with its outputs.

    The pictures that it saves go beside `output`; executed in place, into images/ of its repository.

    Args:
        path: The notebook.
        output: Where the executed notebook is written; None writes it in place.
        parameters: Values that replace those of the cell tagged `parameters`.
        until: The tag of the last cell to execute; None executes all.

    Returns:
        The executed notebook, a dict as from JSON.

    Raises:
        ValueError: If no cell has the tag `until`.
        papermill.PapermillExecutionError: If a cell fails.
    """
    import nbformat
    import papermill

    path, output = Path(path).resolve(), Path(output or path).resolve()
    notebook = nbformat.read(path, as_version=4)
    if until is not None:
        last = [i for i, cell in enumerate(notebook.cells) if until in cell.metadata.get("tags", [])]
        if not last:
            raise ValueError(f"{path} has no cell tagged {until!r}")
        notebook.cells = notebook.cells[: last[0] + 1]
    settings = {
        "PRUNEUTILS_IMAGES": str(repository(path.parent) / "images" if output == path else output.parent),
        "OMP_NUM_THREADS": "1",  # see conftest.py
    }
    if until is None:
        settings["TQDM_DISABLE"] = "1"  # a stored progress bar is a dead widget
    with tempfile.TemporaryDirectory() as folder, _environment(settings):
        part = Path(folder) / path.name
        nbformat.write(notebook, part)
        papermill.execute_notebook(part, part, dict(parameters or {}), kernel_name="python3", cwd=path.parent)
        notebook = nbformat.read(part, as_version=4)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "pruneutils": {"code": code_hash(notebook), "size": size()},
    }
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
    with written_whole(output) as file:
        nbformat.write(notebook, file)
    return notebook


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside, for kernels started there; those that the user has set stay as they are."""
    added = [name for name in settings if name not in os.environ]
    os.environ.update({name: settings[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def main() -> None:
    """Run the command line, `python -m pruneutils.notebook`."""
    parser = argparse.ArgumentParser(prog="python -m pruneutils.notebook", description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--size", choices=SIZES, help="default: PRUNEUTILS_SIZE, or quick")
    parser.add_argument("--output", type=Path, help="folder for the executed notebooks; default: in place")
    parser.add_argument("--show", action="store_true", help="print what the cells tagged `answer` print")
    parser.add_argument("--study", action="store_true", help="stop after the sweep; --output: the repository's build/")
    parser.add_argument("--budget", type=float, help="with --study: start no run after so many seconds")
    arguments = parser.parse_args()
    if arguments.size:
        os.environ["PRUNEUTILS_SIZE"] = arguments.size
    for path in arguments.notebooks:
        folder = arguments.output or (repository(path.parent) / "build" if arguments.study else path.parent)
        output = folder / path.name
        print(f"{path} ({size()})", flush=True)
        budget = {"budget_seconds": arguments.budget} if arguments.budget else {}
        notebook = execute(path, output, budget, "sweep" if arguments.study else None)
        if arguments.show or arguments.study:
            print(*_texts(notebook, "sweep" if arguments.study else "answer"), sep="\n\n")
        print(f"executed: {output}", flush=True)


def _texts(notebook, tag) -> list[str]:
    """Return the text that cells of this tag have put out; pictures are left out."""
    cells = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    outputs = [output for cell in cells for output in cell.get("outputs", []) if output.get("name") != "stderr"]
    texts = [output.get("text") or _text_of(output.get("data", {})) for output in outputs]
    return [text.rstrip() for text in texts if text]


def _text_of(data) -> str:
    return "" if "image/png" in data else data.get("text/markdown") or data.get("text/plain", "")


if __name__ == "__main__":
    main()
