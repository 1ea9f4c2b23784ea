"""The built wheel, installed away from the checkout, gives the command and every module; what is optional says so."""
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

NOT_OURS = ("tests/", "nbs/", "tools/", "runs/")


def run(*words, **settings) -> subprocess.CompletedProcess:
    "A command, with its text captured; a failure shows what it said."
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=240, **settings)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    "Built from a copy of the sources, so that the checkout gets no build folder."
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in run("git", "ls-files", cwd=root).stdout.splitlines():
        if (root / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((root / name).read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, copy)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory) -> Path:
    "A fresh environment with the wheel; its requirements are lent by this environment, the checkout is not."
    env = tmp_path_factory.mktemp("env")
    run(sys.executable, "-m", "venv", "--without-pip", env)
    python = env / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")  # a .pth inside it (the checkout's) is not followed
    return env


def test_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if n.startswith(NOT_OURS)]
    assert "mine_refine_nb/losses.py" in names


def test_every_module_imports_from_the_wheel(root, elsewhere, tmp_path):
    names = sorted(p.stem for p in (root / "mine_refine_nb").glob("[a-z]*.py"))
    code = (f"import importlib, mine_refine_nb\nfor name in {names}: importlib.import_module('mine_refine_nb.' + name)\n"
            "print(mine_refine_nb.__file__)")
    found = run(elsewhere / "bin" / "python", "-c", code, cwd=tmp_path).stdout.strip()
    assert Path(found).is_relative_to(elsewhere)


def test_the_command_works_from_the_wheel(elsewhere, tmp_path):
    command = elsewhere / "bin" / "mine-refine"
    assert "search" in run(command, "--help", cwd=tmp_path).stdout
    run(command, "simulate", "shop", "--products", "120", "--queries", "24", cwd=tmp_path)
    assert (tmp_path / "shop" / "products.parquet").exists()


def test_the_package_and_the_command_start_fast(elsewhere, tmp_path):
    "Neither loads torch; a second is ample, and the heaviest libraries come where they are used."
    code = "import sys, mine_refine_nb, mine_refine_nb.cli; print(*{'torch', 'polars', 'plotly', 'transformers'} & set(sys.modules))"
    assert run(elsewhere / "bin" / "python", "-c", code, cwd=tmp_path).stdout.split() == []


def test_an_absent_extra_is_named(elsewhere, tmp_path):
    code = ("import sys; sys.modules['openai'] = None\n"
            "from mine_refine_nb.remote import RemoteAnnotator, open_client\n"
            "try: open_client(RemoteAnnotator('m', 'http://127.0.0.1:9/v1'), 'k')\nexcept ValueError as e: print(e)")
    said = run(elsewhere / "bin" / "python", "-c", code, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}).stdout
    assert "pip install 'mine_refine_nb[remote]'" in said
