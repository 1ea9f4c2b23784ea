"""The notebooks: each reads well, shows real results, and runs from top to bottom."""
import ast
import json
import multiprocessing
import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import median

import pytest
from nbdev.test import nbdev_test

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
API = [p for p in NOTEBOOKS if p.parent.name == "api"]
NAME = re.compile(r"\d\d[a-z]?_\w+\.ipynb")
SECONDS = 420  # for one notebook
# Folders of a machine (written so that this line does not match itself) and addresses in its memory.
MACHINE = re.compile(r"(?<![\w.])/(home|root|tmp|wor[k]|Users|mnt|opt)/| at 0x[0-9a-f]{6,}")
BARS = re.compile(r"\d+%\|[^|]*\||it/s\]|━━━|█{4}")


def of(paths: list[Path]):
    "One test per notebook."
    return pytest.mark.parametrize("path", paths, ids=lambda p: str(p.relative_to(ROOT / "nbs")))


def cells(path: Path, kind: str | None = None) -> list[dict]:
    "The cells of a notebook, of one kind or all, each with its source as one string."
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c | {"source": "".join(c["source"])} for c in found if kind in (None, c["cell_type"])]


def directives(cell: dict) -> str:
    "The `#|` lines of a cell."
    return "\n".join(line for line in cell["source"].splitlines() if line.startswith("#|"))


def exported(path: Path) -> list[dict]:
    "The cells that go into the module."
    return [c for c in cells(path, "code") if re.search(r"#\| *exports?i?\b", directives(c))]


def ideas(path: Path) -> list[dict]:
    "The exported cells that say something: not those that only import."
    kinds = ast.Import, ast.ImportFrom
    return [c for c in exported(path) if not all(isinstance(n, kinds) for n in ast.parse(c["source"]).body)]


def lines(cell: dict) -> int:
    "How many lines of code a cell has, without blank lines and directives."
    return sum(bool(line.strip()) and not line.startswith("#|") for line in cell["source"].splitlines())


def outputs(path: Path) -> list[dict]:
    "Every output of a notebook."
    return [o for c in cells(path, "code") for o in c["outputs"]]


def text_of(output: dict) -> str:
    "What an output says, in all its forms."
    said = [output.get("text", "")] + list(output.get("data", {}).values())
    return "\n".join("".join(s) if isinstance(s, list) else s if isinstance(s, str) else json.dumps(s) for s in said)


@of(NOTEBOOKS)
def test_title_and_subtitle(path):
    "A page opens with `# Title` and `> what it is about`, in one cell."
    first = cells(path, "markdown")[0]["source"]
    assert re.match(r"# \S.*\n+> \S", first), f"{path.name}: the first text cell must be `# Title` and `> one line`"


@of([p for p in NOTEBOOKS if p.parent.name in ("api", "tutorials")])
def test_name(path):
    assert NAME.fullmatch(path.name), f"{path.name}: call it NN_name.ipynb"


@of(API)
def test_one_idea_per_cell(path):
    sizes = [lines(cell) for cell in exported(path)]
    assert median(sizes) <= 15, f"{path.name}: the median exported cell has {median(sizes)} lines; 15 is the house's limit"
    assert max(sizes) <= 60, f"{path.name}: an exported cell has {max(sizes)} lines; 60 is the most"


@of(API)
def test_prose_for_every_exported_cell(path):
    prose, code = len(cells(path, "markdown")), len(ideas(path))
    assert prose >= code, f"{path.name}: {prose} text cells for {code} exported ones; say why before each"


@of(NOTEBOOKS)
def test_shows_something(path):
    if path.name == "index.ipynb":
        return
    assert any(o["output_type"] in ("execute_result", "display_data") for o in outputs(path)), f"{path.name} shows no result"


@of(NOTEBOOKS)
def test_outputs_are_clean(path):
    "No error, no warning, no progress bar, no folder of somebody's machine; a small file."
    kinds = {o["output_type"] for o in outputs(path)}
    assert "error" not in kinds, f"{path.name} holds an error"
    noise = [text_of(o)[:200] for o in outputs(path) if o.get("name") == "stderr" or BARS.search(text_of(o))]
    assert not noise, f"{path.name} holds warnings or progress bars: {noise[:2]}"
    found = [f"{m[0]} in {s[max(0, m.start() - 40):m.end() + 40]!r}" for c in cells(path)
             for s in [c["source"], *map(text_of, c.get("outputs", []))] for m in MACHINE.finditer(s)]
    assert not found, f"{path.name} names folders or addresses of a machine: {found[:3]}"
    assert path.stat().st_size < 300_000, f"{path.name} has {path.stat().st_size // 1000} kB; 300 is the most"


@of(NOTEBOOKS)
def test_cells_run(path):
    "A cell that is never run proves nothing."
    unrun = sum(bool(re.search(r"eval: *false", directives(c))) for c in cells(path, "code"))
    assert unrun <= 2, f"{path.name}: {unrun} cells are never run (eval: false); 2 is the most"


@of(API)
def test_imports_stand_alone(path):
    "The docs run every cell with an import again, without the cells before it: a shown one may hold nothing else."
    passed = re.compile(r"hide|eval: *false|export")
    shown = [c for c in cells(path, "code") if not passed.search(directives(c))]
    mixed = [c["source"][:80] for c in shown if imports_and_more(c["source"])]
    assert not mixed, f"{path.name}: put imports into cells of their own: {mixed}"


def imports_and_more(source: str) -> bool:
    "nbdev's rule: an import, anywhere in the cell, beside an expression or an assignment."
    if source.lstrip().startswith(("%", "!")):
        return False
    nodes = list(ast.walk(ast.parse(source)))
    has = lambda *kinds: any(isinstance(n, kinds) for n in nodes)  # noqa: E731
    return has(ast.Import, ast.ImportFrom) and has(ast.Expr, ast.Assign)


def untyped(function: ast.FunctionDef) -> list[str]:
    "The parameters of a function that have no type, and `return` if it has none."
    given = function.args
    named = [a for a in [*given.posonlyargs, *given.args, *given.kwonlyargs] if a.arg not in ("self", "cls")]
    return [a.arg for a in named if a.annotation is None] + ["return"] * (function.returns is None)


@of(API)
def test_public_names_are_documented(path):
    "Each public function and class has a docstring, each parameter and result of a function a type."
    missing = []
    for node in (n for c in exported(path) for n in ast.parse(c["source"]).body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            missing += [f"{node.name}: no docstring"] * (ast.get_docstring(node) is None)
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            missing += [f"{node.name}: no type for {name}" for name in untyped(node)]
    assert not missing, f"{path.name}: " + "; ".join(missing)


@pytest.fixture(scope="module")
def processes():
    "Starts processes with what every page imports imported already: seconds less for each page."
    found = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    if found.get_start_method() == "forkserver":
        found.set_forkserver_preload(["nbdev.test", "plotly.graph_objects", "sentence_transformers"])
    return found


def run_page(path: Path, flags: str, log: Path) -> None:
    "nbdev's own runner; what it says goes to a file. Leaves the process with 1 if a cell fails."
    os.chdir(ROOT)
    with open(log, "w", encoding="utf-8") as out, redirect_stdout(out), redirect_stderr(out):
        nbdev_test(str(path), flags=flags, n_workers=0)


@pytest.mark.timeout(SECONDS + 30)
@of(NOTEBOOKS)
def test_runs(path, request, processes, tmp_path):
    "In a process of its own; cells with `#| slow` run with --slow."
    if path.name == "01_quickstart.ipynb" and request.getfixturevalue("chromium"):
        pytest.skip("test_lab.py runs it, in JupyterLab")
    log = tmp_path / "log"
    page = processes.Process(target=run_page, args=(path, "slow" if request.config.getoption("--slow") else "", log))
    page.start()
    page.join(SECONDS)
    late = page.is_alive()
    page.kill()
    said = log.read_text(encoding="utf-8") if log.exists() else ""
    if late or page.exitcode or "Success" not in said:
        pytest.fail(f"{path.name} {f'takes more than {SECONDS} s' if late else 'does not run'}:\n{said[-3500:]}", pytrace=False)
