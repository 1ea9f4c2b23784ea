"""What the tests share: the --slow flag, a quiet and offline environment, the tree's paths."""
import os
import shutil
import sys
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


def pytest_collection_modifyitems(config, items):
    # what takes longest first, so that no worker waits for the other at the end
    items.sort(key=lambda item: 0 if "test_cli" in item.nodeid else 1 if "::test_runs" in item.nodeid else 2)
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run pytest with --slow"))


@pytest.fixture(scope="session")
def root() -> Path:
    "The top of the tree."
    return ROOT


@pytest.fixture(scope="session")
def browser():
    "A headless Chromium: the machine's own, or the one that playwright installed."
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as p:
        if not path and not Path(p.chromium.executable_path).exists():
            pytest.skip("no Chromium on this machine: `make browser` installs one")
        found = p.chromium.launch(executable_path=path, args=FLAGS)
        yield found
        found.close()


class ByFile(LoadScopeScheduling):
    "A file stays on one worker, which builds its fixtures once; notebooks are dealt out one by one."

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if file.endswith("test_notebooks.py") else file


def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)
