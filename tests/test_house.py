"""The house rules that no single notebook can keep: rooms in order, files in step, pins that hold."""
import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import check_install
import readme

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mine_refine_nb"


def settings() -> dict:
    "settings.ini as setup.py reads it."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def rooms() -> dict[str, str]:
    "Module -> its notebook, in the order of the notebooks' numbers."
    found = {}
    for notebook in sorted((ROOT / "nbs" / "api").glob("[0-9]*.ipynb")):
        if name := re.search(r"#\| *default_exp +([\w.]+)", notebook.read_text(encoding="utf-8")):
            found[name[1]] = notebook.name
    return found


def imported(source: str) -> set[str]:
    "The rooms that a module imports, wherever in it."
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            full = ("mine_refine_nb." * (node.level > 0) + (node.module or "")).rstrip(".")
            names |= {f"{full}.{a.name}" for a in node.names} if full == "mine_refine_nb" else {full}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return {n.split(".")[1] for n in names if n.startswith("mine_refine_nb.")} - {"__version__"}


def test_imported_finds_every_form():
    source = "from mine_refine_nb.data import x\nimport mine_refine_nb.grades\ndef f():\n    from .losses import y\n    from . import plots"
    assert imported(source) == {"data", "grades", "losses", "plots"}


@pytest.mark.parametrize("module", rooms())
def test_room_imports_only_rooms_above(module):
    order = list(rooms())
    above = order[:order.index(module)]
    found = imported((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    assert found <= set(above), f"{module} ({rooms()[module]}) imports {sorted(found - set(above))}, which do not stand above it"


@pytest.mark.parametrize("module", rooms())
def test_room_uses_what_it_imports(module):
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    names = {(a.asname or a.name).split(".")[0] for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
    idle = {name for name in names - {"annotations"} if len(re.findall(rf"\b{name}\b", source)) < 2}
    assert not idle, f"{rooms()[module]} imports {sorted(idle)} and does not use it; what only an example needs is imported beside the example"


def test_every_module_has_a_notebook():
    strays = {p.stem for p in PACKAGE.glob("*.py")} - set(rooms()) - {"__init__", "_modidx"}
    assert not strays, f"modules without a notebook: {sorted(strays)}"


def test_notebook_and_module_share_a_name():
    wrong = [f"{nb} exports {module}" for module, nb in rooms().items() if nb.split("_", 1)[1] != f"{module}.ipynb"]
    assert not wrong, wrong


def test_readme_is_in_step():
    assert readme.README.read_text(encoding="utf-8") == readme.readme(), "run `make docs`: README.md is not what nbs/index.ipynb says"


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", readme.readme())
    assert not [link for link in links if not (ROOT / link).exists()]


def test_readme_commands_exist():
    "Each `make` target and each `mine-refine` command that the README names."
    text = readme.readme()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    assert set(re.findall(r"^(?:\$ )?make ([a-z]+)", text, flags=re.M)) <= targets
    for command in set(re.findall(r"^(?:\$ )?(?:\.venv/bin/)?mine-refine ([a-z]+)", text, flags=re.M)):
        done = subprocess.run([Path(sys.executable).parent / "mine-refine", command, "--help"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"README: mine-refine {command}: {done.stderr}"


def test_one_version():
    import mine_refine_nb

    assert settings()["version"] == mine_refine_nb.__version__


def test_constraints_hold_every_requirement():
    "constraints.txt pins all that settings.ini asks for, inside its ranges; these two exactly, since much depends on them."
    pins = {name.lower().replace("_", "-"): v for name, v in check_install.pins(ROOT / "constraints.txt").items()}
    assert (pins["torch"], pins["nbdev"]) == ("2.13.0", "2.4.14")
    for line in " ".join(settings()[f"{kind}requirements"] for kind in ("", "dev_", "remote_", "onnx_", "maps_")).split():
        need = Requirement(line)
        pinned = pins.get(need.name.lower().replace("_", "-"))
        assert pinned and Version(pinned) in need.specifier, f"settings.ini asks for {line}, constraints.txt has {pinned}"


def test_every_page_stands_in_the_sidebar():
    "A page that no section of _quarto.yml names is a page that nobody finds."
    sections = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    entries = [e for s in sections for e in ([s["contents"]] if isinstance(s["contents"], str) else s["contents"])]
    shown = [p for e in entries for p in (ROOT / "nbs").glob(e if isinstance(e, str) else e["href"])]
    pages = [p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    assert sorted(shown) == sorted(pages)


def test_quarto_file_is_linked():
    link = ROOT / "nbs" / "_quarto.yml"
    assert link.resolve() == ROOT / "_quarto.yml", "nbs/_quarto.yml must be a link to ../_quarto.yml"
