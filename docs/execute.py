"""Execute notebooks with their outputs stored, or only what they sweep: `python docs/execute.py notebooks/*.ipynb`.

A notebook is executed in its own folder and in place, in the size that PRUNEUTILS_SIZE or --size says. With --study,
its runs are recorded in results/; called again it goes on.
"""

import argparse
import ast
import hashlib
import os
import re
import symtable
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
import papermill

from pruneutils._files import repository, write_whole
from pruneutils.notebook import SIZES, size


def code_hash(notebook: Mapping[str, Any]) -> str:
    """Return the hash of a notebook's code cells (a dict as from JSON), which is stored with the outputs."""
    cells = [source_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()[:16]


def source_of(cell: Mapping[str, Any]) -> str:
    """Return a cell's text; nbformat keeps it as a string, JSON files as a list of lines."""
    return "".join(cell["source"])


def _tagged(cell, *tags: str) -> bool:
    return not {*tags}.isdisjoint(cell.metadata.get("tags", []))


def _needed(cells: list) -> list:
    """Return the cells tagged `parameters` or `sweep`, and those before the last of them that they use, in the end."""
    codes = [cell for cell in cells if cell.cell_type == "code"]
    tagged = [_tagged(cell, "sweep", "parameters") for cell in codes]
    needed, used, names = {i for i, own in enumerate(tagged) if own}, set(), []
    for cell, own in zip(codes, tagged):
        if _tagged(cell, "answer") and not own:
            lines = cell.source.splitlines()  # the imports are everybody's
            cell.source = "\n".join(line for line in lines if line.startswith(("import ", "from ")))
        names.append(_names(re.sub("^%.*", "", cell.source, flags=re.M)))
    # A function may use what only a later cell defines, so look until nothing new is found.
    while (found := {name for i in needed for name in names[i][1]}) != used:
        used = found
        needed |= {i for i in range(max(needed)) if names[i][0] & used}
    return [codes[i] for i in sorted(needed)]


def _names(source: str) -> tuple[set[str], set[str]]:
    """Return the global names that code defines or changes, and those that it uses."""
    table = symtable.symtable(source, "cell", "exec")
    defined = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    stored = (node for node in ast.walk(ast.parse(source)) if isinstance(getattr(node, "ctx", None), ast.Store))
    changed = {node.value.id for node in stored if isinstance(getattr(node, "value", None), ast.Name)}
    return defined | changed, _globals_of(table)


def _globals_of(table: symtable.SymbolTable) -> set[str]:
    """Return the global names that code reads, in its functions too."""
    outermost = table.get_type() == "module"
    names = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (s.is_global() or outermost)}
    return names.union(*map(_globals_of, table.get_children()))


def execute(path: Path, output: Path, parameters: Mapping[str, Any], study: bool = False) -> dict[str, Any]:
    """Execute a notebook in its own folder and write it with its outputs to `output`, which may be `path`.

    A `study` runs only the cells that the parameters and the sweeps need, and of cells tagged `answer`, which read what
    it records, the imports. Pictures go beside `output`; executed in place, into images/ of the repository.
    """
    path, output = path.resolve(), output.resolve()
    notebook = nbformat.read(path, as_version=4)
    images = repository(path.parent) / "images" if output == path else output.parent
    settings = {"PRUNEUTILS_IMAGES": str(images), "OMP_NUM_THREADS": "1"}  # see conftest.py
    if study:
        if not any(_tagged(cell, "sweep") for cell in notebook.cells):
            raise ValueError(f"{path} has no cell tagged 'sweep'")
        notebook.cells = _needed(notebook.cells)
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
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
        data, text = output.get("data", {}), output.get("text")
        if output.get("name") == "stderr":  # progress bars, and warnings of runs that failed or are missing
            text = "\n".join(line for line in text.splitlines() if "Warning: " in line)
        if "image/png" not in data:
            texts.append(text or data.get("text/markdown") or data.get("text/plain", ""))
    return [text.rstrip() for text in texts if text]


if __name__ == "__main__":
    main()
