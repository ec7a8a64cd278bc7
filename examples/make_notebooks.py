"""
Write the notebooks from the scripts, with what they print. A line `# %%` begins a cell; the docstring becomes the
first, in Markdown.

    python examples/make_notebooks.py
"""

import ast
import contextlib
import io
import json
from pathlib import Path

HERE = Path(__file__).parent
NOTEBOOKS = ("lr_schedule", "grpo_filter_prune", "memory")


def cell(kind, number, source):
    """Return a cell of notebook format 4.5."""
    lines = source.strip("\n").splitlines(keepends=True)
    extra = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines, **extra}


def notebook_of(script):
    """Return the notebook of a script as JSON data."""
    text = script.read_text(encoding="utf-8")
    title = script.stem.replace("_", " ")
    head, *parts = text.split("\n# %%")
    cells = [cell("markdown", 0, f"# {title}\n\n{ast.get_docstring(ast.parse(head))}")]
    for part in parts:
        heading, _, code = part.partition("\n")
        if heading.strip():
            cells.append(cell("markdown", len(cells), f"## {heading.strip()}"))
        # A notebook has no command line: options are changed in this list.
        cells.append(cell("code", len(cells), code.replace("parser.parse_args()", "parser.parse_args([])")))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def run(notebook):
    """Run the cells, keep what each prints, and return the variables."""
    scope, count = {"__name__": "__main__"}, 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        count, printed = count + 1, io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {count}", "exec"), scope)
        # Neither the Trainer's progress nor what DeepSpeed says at its first import, where it is installed.
        noise = ("'epoch':", "real_accelerator.py")
        lines = [line for line in printed.getvalue().splitlines(keepends=True) if not any(n in line for n in noise)]
        cell["execution_count"] = count
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    return scope


def text_of(notebook):
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in NOTEBOOKS:
        target = HERE / f"{name}.ipynb"
        notebook = notebook_of(HERE / f"{name}.py")
        run(notebook)
        target.write_text(text_of(notebook), encoding="utf-8")
        print(target.name)
