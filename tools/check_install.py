"""After installation: every pin of constraints.txt that is installed is installed at that version."""
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def pins(path: Path) -> dict[str, str]:
    "The versions that a constraints file asks for, by package."
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if line)


def installed(name: str) -> str | None:
    "The installed version without its local part (`2.13.0+cpu` is the CPU build of 2.13.0), or None."
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    wanted = pins(Path("constraints.txt"))
    wrong = [f"  {n}: {v} wanted, {installed(n)} found" for n, v in wanted.items() if installed(n) not in (v, None)]
    if wrong or not installed("torch"):
        sys.exit("\n".join(["The installation differs from constraints.txt:", *wrong, "Remove .venv and run `make install` again."]))
    print(f"Installed: torch {version('torch')} and {sum(installed(n) is not None for n in wanted) - 1} more, all as pinned.")
