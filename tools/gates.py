"""The gates before the tests, on a copy of the tree: nbdev_clean changes no notebook, nbdev_export no module.

Working on a copy, they hold in a tree with uncommitted work too and leave it as it is.
"""
import shutil
import subprocess
import sys
import tempfile
from filecmp import cmp
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("nbs", "mine_refine_nb")
LITTER = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.pyc")


def copy_tree(target: Path) -> None:
    "Copy what nbdev reads and writes: its settings, the notebooks and the package."
    for part in PARTS:
        shutil.copytree(ROOT / part, target / part, ignore=LITTER, symlinks=True)
    for name in ("settings.ini", "_quarto.yml"):
        shutil.copy(ROOT / name, target / name)


def changed(target: Path) -> list[str]:
    "The files that differ between the tree and the copy, or are only in one of them."
    def files(root: Path) -> set[Path]:
        found = (path for part in PARTS for path in (root / part).rglob("*") if path.suffix in (".py", ".ipynb"))
        return {path.relative_to(root) for path in found if not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)}

    ours, theirs = files(ROOT), files(target)
    differing = {path for path in ours & theirs if not cmp(ROOT / path, target / path, shallow=False)}
    return sorted(map(str, ours ^ theirs | differing))


def gate(command: str, target: Path) -> None:
    "Run an nbdev command in the copy; stop with the names of the files it changes."
    done = subprocess.run([Path(sys.executable).parent / command], cwd=target, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command} failed:\n{done.stdout}{done.stderr}")
    if names := changed(target):
        sys.exit("\n".join([f"{command} changes these files; run it and look at the difference:", *(f"  {n}" for n in names)]))
    print(f"{command}: no difference")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        gate("nbdev_clean", Path(folder))
        gate("nbdev_export", Path(folder))
