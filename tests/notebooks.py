"""Runs the notebooks, and stores the pictures that matter in them.

    python -m tests.notebooks            all of them, at the scale that they are stored with: some minutes
    python -m tests.notebooks 02 04      some, by how their names begin

A cell tagged ``parameters`` says how large everything is; the tests put another cell behind it. Of what the cells show,
the PNG pictures of those tagged ``keep`` are stored, and nothing else.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURE = "image/png"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def with_parameters(notebook: NotebookNode, **parameters: Any) -> NotebookNode:
    """The notebook with a cell behind its ``parameters`` that sets some of them anew.

    Raises:
        ValueError: that cell does not set one of them.
    """
    place, cell = next((i, cell) for i, cell in enumerate(notebook.cells) if "parameters" in tags(cell))
    set_there = {line.partition(" = ")[0] for line in cell.source.splitlines()}
    if missing := set(parameters) - set_there:
        raise ValueError(f"the parameters have no {min(missing)}; they are {', '.join(sorted(set_there))}")
    lines = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(lines))
    return notebook


def execute(notebook: NotebookNode, folder: Path, temporary: str) -> NotebookNode:
    """Runs all cells in a kernel of this Python that works in ``folder``; temporary files go into ``temporary``."""
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3")
    client.resources = {"metadata": {"path": str(folder)}}
    python_path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    return client.execute(
        env=os.environ | {"TMPDIR": temporary, "WANDB_MODE": "offline", "PYTHONPATH": python_path}
    )


def pictures(notebook: NotebookNode) -> list[str]:
    """The PNG pictures that cells showed, base64."""
    return [
        output.data[PICTURE]
        for cell in notebook.cells if cell.cell_type == "code"
        for output in cell.outputs if PICTURE in output.get("data", {})
    ]  # fmt: skip


def clean(notebook: NotebookNode) -> NotebookNode:
    """The notebook as it is stored."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({"tags": tags(cell)} if tags(cell) else {})
        if cell.cell_type == "code":
            shown = pictures(NotebookNode(cells=[cell])) if "keep" in tags(cell) else []
            cell.execution_count = None
            cell.outputs = [
                nbformat.v4.new_output("display_data", {PICTURE: picture.strip()}) for picture in shown
            ]
    return notebook


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="how the names of notebooks begin; all by default")
    arguments = parser.parse_args()
    for path in NOTEBOOKS:
        if arguments.names and not path.name.startswith(tuple(arguments.names)):
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            notebook = clean(execute(read(path), ROOT / "notebooks", temporary))
        nbformat.write(notebook, path)
        seconds, size = time.perf_counter() - start, path.stat().st_size / 1000
        print(f"{path.name}: {seconds:.0f} s, {len(pictures(notebook))} pictures, {size:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
