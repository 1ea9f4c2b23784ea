"""What the tests share: the --slow flag, a quiet and offline environment, the tree's paths."""
import os
import sys
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests and notebook cells marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run pytest with --slow"))


@pytest.fixture(scope="session")
def root() -> Path:
    "The top of the tree."
    return ROOT


class ByFile(LoadScopeScheduling):
    "A file stays on one worker, which builds its fixtures once; notebooks are dealt out one by one."

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if file.endswith("test_notebooks.py") else file


def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)
