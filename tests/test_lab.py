"""JupyterLab for real: a notebook in a browser, the review card and the explorer used by keys and by button, the files on disk."""
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import polars as pl
import pytest

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "review"
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
SETUP = """
import os
from pathlib import Path
import polars as pl
from mine_refine_nb.widgets import review
with open("kernels.txt", "a") as file: file.write(f"{os.getpid()}\\n")
queue = pl.DataFrame({"query_id": ["q1", "q1", "q2", "q2", "q3", "q3"], "product_id": list("abcdef"), "grade": [0, 2, 1, 0, 2, 1],
    "query": ["wireless mouse"] * 2 + ["cafetera italiana"] * 2 + ["水筒 500ml"] * 2, "suggested": [2, 0, 2, 1, 0, 2],
    "title": ["Silent mouse <img src=x onerror='window.broken = true'>", "Mouse pad", "Cafetera moka", "Filtros", "マグボトル", "ボトル"]})
"""
SHOW = "review(queue, 'reviews', 'ana')"
EXPLORER = """
import numpy as np
import polars as pl
from mine_refine_nb.explorer import explore
from mine_refine_nb.market import simulate
shop = simulate(products=300, queries=24, locales=("en", "es"), seed=0)


class Letters:
    "Three searches by shared letter triples that differ in how they weigh them."
    def __init__(self, power): self.power, self.titles = power, [self.triples(title) for title in shop.products["title"]]
    def triples(self, text): return {text.lower()[i:i + 3] for i in range(len(text) - 2)}

    def search(self, query, k=10, locale=None):
        asked = self.triples(query)
        scores = [len(asked & title) / (1 + len(title)) ** self.power for title in self.titles]
        found = shop.products.with_columns(score=pl.Series(scores), p2=pl.Series(scores).clip(0, 1))
        if locale: found = found.filter(locale=locale)
        found = found.sort("score", "product_id", descending=[True, False]).head(k)
        verdict = pl.when(pl.col("rank") < 3).then(pl.lit("relevant")).otherwise(pl.lit("irrelevant"))
        found = found.with_columns(rank=pl.int_range(1, pl.len() + 1), p0=1 - pl.col("p2"), p1=pl.lit(0.0)).with_columns(verdict=verdict)
        return found.select("rank", "score", "p0", "p1", "p2", "verdict", "product_id", "title")


stages = {name: Letters(power) for name, power in (("pretrained", 0), ("stage 1", .5), ("stage 2", 1))}
"""
EXPLORE = "explore(stages, shop, 'grades', 'ana', k=3)"


def start_lab(folder: Path) -> tuple[subprocess.Popen, dict]:
    "JupyterLab on a free port of this machine, with everything it writes in `folder`."
    places = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    env = os.environ | places | {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(ROOT), "JUPYTER_NO_CONFIG": "", "OMP_NUM_THREADS": "1"}
    (folder / "work").mkdir()
    settings = folder / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')    # else it asks, on top of the page
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser", "--ServerApp.ip=127.0.0.1",
               "--ServerApp.port=0", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder / 'work'}",
               "--LabApp.extension_manager=readonly", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(folder / "lab.log", "wb") as log:
        lab = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    return lab, wait_for_lab(lab, folder)


def wait_for_lab(lab: subprocess.Popen, folder: Path) -> dict:
    "What the server says of itself (url, port) once it answers."
    until = time.monotonic() + 60
    while time.monotonic() < until and lab.poll() is None:
        for file in (folder / "runtime").glob("jpserver-*.json"):
            try:
                server = json.loads(file.read_text())
                urllib.request.urlopen(f"{server['url']}api?token={TOKEN}", timeout=5).close()
                return server
            except (OSError, ValueError):
                pass
        time.sleep(.2)
    lab.kill()
    lab.wait()
    pytest.fail("JupyterLab did not start:\n" + (folder / "lab.log").read_text(errors="replace")[-2000:], pytrace=False)


@pytest.fixture
def lab(browser, tmp_path):
    "A running JupyterLab: its url and its folder of notebooks. The server ends its kernels when it is told to stop."
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
    process, server = start_lab(tmp_path)
    yield server["url"], tmp_path / "work"
    process.terminate()
    try:
        process.wait(20)
    finally:
        process.kill()
        shutil.rmtree(tmp_path, ignore_errors=True)


def run_notebook(browser, url: str, name: str, shows: str = ".mr-review .mr-query"):
    "Open a notebook, run all its cells, and wait for the card."
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    page.goto(f"{url}lab/tree/{name}?token={TOKEN}&reset", wait_until="load")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'", timeout=60_000)
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_selector(shows, timeout=60_000)
    return page


def act(page, does, shows: str):
    "Do something to the card, then wait until it shows a text."
    does()
    page.wait_for_function("text => document.querySelector('.mr-review').innerText.includes(text)", arg=shows, timeout=15_000)


def decided(file: Path) -> list[tuple]:
    "What a review file says: product, grade, note."
    return pl.read_parquet(file).select("product_id", "grade", "why").rows()


@pytest.mark.timeout(180)
def test_a_queue_is_judged_in_jupyterlab(browser, lab):
    url, work = lab
    cells = [nbformat.v4.new_code_cell(source) for source in (SETUP, SHOW)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), work / "review.ipynb")
    page, file = run_notebook(browser, url, "review.ipynb"), work / "reviews" / "ana.parquet"
    key = lambda name: lambda: page.keyboard.press(name)  # noqa: E731

    page.locator(".mr-review .mr-query").click()
    act(page, key("2"), "1 of 6")
    act(page, key("0"), "2 of 6")
    act(page, key("s"), "1 skipped")
    act(page, key("u"), "0 skipped")
    assert decided(file) == [("a", 2, None), ("b", 0, None)]

    act(page, key("0"), "3 of 6")    # with the next key: `0 0`, which restarts the kernel outside the card
    act(page, key("0"), "4 of 6")
    page.keyboard.press("b")    # no key of the card: JupyterLab would add a cell below
    page.locator(".mr-review input").click()
    page.keyboard.type("size 0 us, 2 left")
    page.keyboard.press("Enter")
    act(page, page.locator(".mr-review button[data-key='1']").click, "5 of 6")
    act(page, key("1"), "Done, thank you")
    grades = [("a", 2, None), ("b", 0, None), ("c", 0, None), ("d", 0, None), ("e", 1, "size 0 us, 2 left"), ("f", 1, None)]
    assert decided(file) == grades

    assert page.locator(".jp-Dialog").count() == 0 and page.locator(".jp-Notebook .jp-CodeCell").count() == 2, "a key reached JupyterLab"
    assert not page.evaluate("window.broken"), "a product's title ran as a script"
    page.close()

    page = run_notebook(browser, url, "review.ipynb")    # the next morning
    assert "Done, thank you" in page.locator(".mr-review").inner_text()
    act(page, page.locator(".mr-review button[data-key='u']").click, "5 of 6")
    assert decided(file) == grades[:-1]
    assert len(set((work / "kernels.txt").read_text().split())) == 1, "the kernel was restarted"


@pytest.mark.timeout(180)
def test_stages_are_searched_and_a_result_is_graded_in_jupyterlab(browser, lab):
    url, work = lab
    cells = [nbformat.v4.new_code_cell(source) for source in (EXPLORER, EXPLORE)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), work / "explore.ipynb")
    page, file = run_notebook(browser, url, "explore.ipynb", ".mr-explore .mr-hit"), work / "grades" / "ana.parquet"
    box, hits = page.locator(".mr-explore input[name=query]"), page.locator(".mr-column:nth-child(3) .mr-hit")

    def ask(query):
        box.fill(query)
        act(page, lambda: page.keyboard.press("Enter"), "nobody has judged this query")

    ask("zapatillas 200")
    assert page.locator(".mr-column h3").all_inner_texts() == ["pretrained", "stage 1", "stage 2"]
    assert page.locator(".mr-hit").count() == 9 and page.locator(".mr-threshold").count() == 3
    page.keyboard.press("Escape")    # out of the box, to the view
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowDown"):    # to the second result of stage 2
        page.keyboard.press(key)
    chosen, other = hits.nth(1).get_attribute("data-row"), hits.nth(2).get_attribute("data-row")
    act(page, lambda: page.keyboard.press("2"), "now 2 relevant")
    assert decided(file) == [(chosen, 2, None)]
    assert page.evaluate("document.activeElement.dataset.row") == chosen, "the choice was lost when the view was drawn anew"
    act(page, hits.nth(2).locator("button[data-value='0']").click, "2 graded in")
    act(page, lambda: page.keyboard.press("u"), "1 graded in")
    page.keyboard.press("b")    # no key of the view: JupyterLab would add a cell below
    assert decided(file) == [(chosen, 2, None)] and other != chosen
    assert page.locator(".jp-Dialog").count() == 0 and page.locator(".jp-Notebook .jp-CodeCell").count() == 2, "a key reached JupyterLab"
    page.close()

    page = run_notebook(browser, url, "explore.ipynb", ".mr-explore .mr-hit")    # the next morning
    box = page.locator(".mr-explore input[name=query]")
    ask("zapatillas 200")
    given = page.locator(f".mr-hit[data-row='{chosen}'] .mr-given").all_inner_texts()
    assert given and all("2 relevant" in text for text in given)
