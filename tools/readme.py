"""Write README.md from nbs/index.ipynb: its prose, its visible code and its text outputs.

nbdev's own command needs Quarto; this is nbconvert's Markdown of the same cells. `--check` writes nothing and exits
with 1 when README.md is not what the notebook says.
"""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import Preprocessor
from nbformat.v4 import new_markdown_cell

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"
NOTE = "<!-- Written from nbs/index.ipynb by `make docs`: edit the notebook. -->\n\n"
LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)\s]+)")


def from_top(link: str) -> str:
    "A relative link counts from nbs/ in the notebook and from the top in the README."
    return link[3:] if link.startswith("../") else f"nbs/{link.removeprefix('./')}"


def shown(output: dict) -> list:
    "An output as a Markdown cell, if a README can show it: printed text, Markdown, or a value's plain text."
    data = output.get("data", {})
    if any("plotly" in kind or "widget" in kind for kind in data) or output.get("name") == "stderr":
        return []
    if "text/markdown" in data:
        return [new_markdown_cell(data["text/markdown"])]
    text = data.get("text/plain", output.get("text", "")).rstrip()
    return [new_markdown_cell(f"```text\n{text}\n```")] if text else []


class ForReadme(Preprocessor):
    "Leave out hidden cells and nbdev's directives, and set the outputs that a README can show as Markdown cells."

    def preprocess(self, nb, resources):
        nb.metadata["language_info"] = {"name": "python"}  # the language of the code fences
        nb.cells = [new for cell in nb.cells for new in self.prepare(cell)]
        return nb, resources

    def prepare(self, cell):
        "What one cell of the notebook becomes."
        if re.match(r"\s*#\| *(hide|include: *false)", cell.source):
            return []
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(lambda m: m[1] + from_top(m[2]), cell.source)
            return [cell]
        outputs = [new for output in cell.outputs for new in shown(output)]
        cell.source, cell.outputs = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M), []
        return [cell, *outputs]


def readme() -> str:
    "The README that the notebook asks for."
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    text, _ = MarkdownExporter(preprocessors=[ForReadme]).from_notebook_node(notebook)
    return NOTE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    text = readme()
    if sys.argv[1:] != ["--check"]:
        README.write_text(text, encoding="utf-8")
    elif not README.exists() or README.read_text(encoding="utf-8") != text:
        sys.exit("README.md is not in step with nbs/index.ipynb: run `make docs`.")
