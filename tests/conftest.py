"""What the tests share: the --slow and --screenshots flags, a quiet and offline environment, the tree's paths."""
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()
sys.path.insert(0, str(ROOT / "tools"))
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests and notebook cells marked slow")
    parser.addoption("--screenshots", action="store_true", help="test_lab.py also takes the pictures in nbs/images/ anew")


def pytest_collection_modifyitems(config, items):
    # what takes longest first, so that no worker waits for the other at the end
    items.sort(key=lambda item: 0 if re.search("test_(cli|lab|site|cross)", item.nodeid) else 1 if "::test_runs" in item.nodeid else 2)
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run pytest with --slow"))


@pytest.fixture(scope="session")
def root() -> Path:
    "The top of the tree."
    return ROOT


@pytest.fixture(scope="session")
def chromium():
    "What starts a headless Chromium, the machine's own or the one that playwright installed; None where there is neither."
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        yield None
        return
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as p:
        there = path or Path(p.chromium.executable_path).exists()
        yield partial(p.chromium.launch, executable_path=path, args=FLAGS) if there else None


@pytest.fixture(scope="session")
def browser(chromium):
    "A headless Chromium."
    if not chromium:
        pytest.skip("no Chromium, or no playwright, on this machine: `make browser` and `make install` bring them")
    found = chromium()
    yield found
    found.close()


class ByFile(LoadScopeScheduling):
    "A file stays on one worker, which builds its fixtures once; notebooks are dealt out one by one."

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if file.endswith("test_notebooks.py") else file


def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)
