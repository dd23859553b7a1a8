"""Makes the notebooks from their sources, with outputs: python notebooks/make.py [NAME …]; --check only says which are not in step.

NN_name.py is what people edit and review; NN_name.ipynb is what they read on the web, made from it by running every cell.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent


def sources(names: list[str] = []) -> list[Path]:  # noqa: B006  (never changed)
    """The .py of the notebooks, all or those named."""
    found = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
    unknown = [name for name in names if not any(name in path.stem for path in found)]
    if unknown:
        raise SystemExit(f"no notebook is named {unknown[0]}; there are {', '.join(path.stem for path in found)}")
    return [path for path in found if not names or any(name in path.stem for name in names)]


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def executed(source: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs. Raises CellExecutionError where a cell fails."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of the kernel: BLAS threads that wait for busy cores take several times as long
    notebook = jupytext.read(source)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    quiet = ["--IPKernelApp.log_level=40"]
    where = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where, extra_arguments=quiet).execute()
    for i, cell in enumerate(notebook.cells):  # nothing that changes from run to run: no ids, no times, no word that kernels were compiled
        cell.id = f"cell-{i}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
            cell.outputs = [o for o in cell.outputs if not (o.get("name") == "stderr" and o.text.startswith("opt_fast: compiling"))]
    return notebook


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """What was printed in one piece, however the kernel happened to send it."""
    found: list[nbformat.NotebookNode] = []
    for output in outputs:
        if found and output.output_type == found[-1].output_type == "stream" and output.name == found[-1].name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def in_step(source: Path) -> bool:
    """Whether the notebook beside a source has the same cells."""
    made = source.with_suffix(".ipynb")
    return made.exists() and cells(nbformat.read(made, as_version=4)) == cells(jupytext.read(source))


def main(words: list[str]) -> int:
    names = [word for word in words if word != "--check"]
    for source in sources(names):
        if "--check" in words:
            if not in_step(source):
                print(f"{source.name} and its .ipynb differ: python notebooks/make.py {source.stem}")
                return 1
            continue
        nbformat.write(executed(source), source.with_suffix(".ipynb"))
        print(f"{source.with_suffix('.ipynb').name} made")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
