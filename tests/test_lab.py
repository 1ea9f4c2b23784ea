"""JupyterLab for real: the quickstart and its widgets in a browser, used by keys, buttons and lasso; the files on disk.

`pytest tests/test_lab.py --screenshots` also takes the pictures in nbs/images/ anew.
"""
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import polars as pl
import pytest

from mine_refine_nb.widgets import open_review

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "nbs" / "tutorials" / "01_quickstart.ipynb"
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
MAPS = """
from mine_refine_nb.encoder import Embeddings
from mine_refine_nb.explorer import explore_map


def vectors(texts, seed):
    "Triples as numbers: similar letters, similar vectors."
    counts = np.zeros((len(texts), 512))
    for row, text in enumerate(texts):
        for triple in Letters.triples(None, text): counts[row, sum(ord(letter) * 31 ** place for place, letter in enumerate(triple)) % 512] += 1
    found = counts @ np.random.default_rng(seed).normal(size=(512, 16))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def embedded(seed):
    queries, products = shop.queries, shop.products
    return Embeddings(queries["query_id"].to_list(), vectors(queries["query"], seed), products["product_id"].to_list(), vectors(products["title"], seed))


card = explore_map({"one": embedded(0), "two": embedded(1)}, shop)
card
"""
READ_MAP = """
card.explorer.points.with_columns(x=pl.Series(card.explorer.places["one"][:, 0]), y=pl.Series(card.explorer.places["one"][:, 1])).write_parquet("points.parquet")
card.explorer.selection.write_parquet("caught.parquet")
"""


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


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    "A running JupyterLab: its url and its folder of notebooks. The server ends its kernels when it is told to stop."
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
    folder = tmp_path_factory.mktemp("lab")
    process, server = start_lab(folder)
    yield server["url"], folder / "work"
    process.terminate()
    try:
        process.wait(20)
    finally:
        process.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def camera(request):
    "Takes a picture for the site, with --screenshots; otherwise it looks away."
    def shoot(what, name: str) -> None:
        if not request.config.getoption("--screenshots"):
            return
        what.page.set_viewport_size({"width": 1100, "height": 1800})    # so that nothing has to be scrolled
        what.page.wait_for_function("window.jupyterapp.shell.currentWidget.node.getBoundingClientRect().height > 1500")    # JupyterLab has followed
        what.screenshot()    # draws what the notebook had left out so far, and waits until it stands still
        handle = what.element_handle()
        what.page.wait_for_function("""e => { const was = e.top; e.scrollIntoView({block: 'center'}); e.top = e.getBoundingClientRect().top;
            return was == e.top && e.top >= 0 && e.top + Math.min(e.offsetHeight, 900) < innerHeight - 40; }""", arg=handle, polling=500)
        box = what.bounding_box()
        what.page.screenshot(path=ROOT / "nbs" / "images" / f"{name}.png", clip=box | {"height": min(box["height"], 900)}, animations="disabled")
    return shoot


def write_notebook(folder: Path, name: str, *sources: str) -> None:
    "A notebook of these cells."
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), folder / name)


def wait_for_kernel(page) -> None:
    "Until the notebook is there and its kernel listens."
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'", timeout=60_000)


def command(page, name: str) -> None:
    "One of JupyterLab's commands; it is not waited for."
    page.evaluate("name => { window.jupyterapp.commands.execute(name); }", name)


def tell_kernel(page, code: str) -> None:
    "Run code in the notebook's kernel, without a cell."
    page.evaluate("code => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({ code }).done", code)


def run_notebook(browser, url: str, name: str, shows: str = ".mr-review .mr-query", seconds: int = 60):
    "Open a notebook, run all its cells, and wait for the last card, or for an error, which fails the test."
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    page.goto(f"{url}lab/tree/{name}?token={TOKEN}&reset", wait_until="load")
    wait_for_kernel(page)
    page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")    # room for the notebook
    command(page, "notebook:run-all-cells")
    error = "[data-mime-type='application/vnd.jupyter.error']"
    page.wait_for_selector(f"{shows}, {error}", timeout=seconds * 1000)
    assert not page.locator(error).count(), page.locator(error).first.inner_text()
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
    write_notebook(work, "review.ipynb", SETUP, SHOW)
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
    write_notebook(work, "explore.ipynb", EXPLORER, EXPLORE)
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


@pytest.fixture(scope="module")
def explorers(browser, lab):
    "A page with two search explorers and a map explorer."
    url, work = lab
    write_notebook(work, "explorers.ipynb", EXPLORER, "explore(stages, shop, k=1)", "explore(stages, shop.split('test'), k=1)", MAPS)
    page = run_notebook(browser, url, "explorers.ipynb", ".js-plotly-plot .nsewdrag[data-subplot=xy]")
    yield page
    page.close()


@pytest.mark.timeout(180)
def test_two_explorers_on_one_page_keep_their_proposals_apart(explorers):
    own = "box => box.list === box.form.querySelector('datalist') && box.list.options.length"
    proposed = [box.evaluate(own) for box in explorers.locator(".mr-explore input[name=query]").all()]
    assert len(proposed) == 2 and proposed[0] > proposed[1] > 0


def inside(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    "Which points lie in a polygon: a ray to the right crosses its sides an odd number of times."
    found = np.zeros(len(points), dtype=bool)
    for (x, y), (u, v) in zip(polygon, np.roll(polygon, -1, axis=0)):
        crossed = (y > points[:, 1]) != (v > points[:, 1])
        found ^= crossed & (points[:, 0] < (u - x) * (points[:, 1] - y) / (v - y + (v == y)) + x)
    return found


def from_outline(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    "How far points are from the sides of a polygon."
    sides = [(a, b - a) for a, b in zip(polygon, np.roll(polygon, -1, axis=0))]
    feet = [a + np.clip((points - a) @ side / (side @ side), 0, 1)[:, None] * side for a, side in sides]
    return np.min([np.linalg.norm(points - foot, axis=1) for foot in feet], axis=0)


def draw(page, corners: list[tuple[float, float]]) -> None:
    "Draw an outline with the mouse, and close it."
    page.mouse.move(*corners[0])
    page.mouse.down()
    for corner in [*corners[1:], corners[0]]:
        page.mouse.move(*corner, steps=10)
    page.mouse.up()


@pytest.mark.timeout(180)
def test_a_lasso_drawn_in_jupyterlab_is_a_frame(explorers, lab):
    "What lies within the outline is selected, in both maps, and nothing else."
    page, work = explorers, lab[1]
    plot, left = page.locator(".js-plotly-plot"), page.locator(".js-plotly-plot .nsewdrag[data-subplot=xy]")
    plot.scroll_into_view_if_needed()
    box = left.bounding_box()
    at = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in ((.45, .2), (.85, .75), (.3, .65))]
    draw(page, at)
    page.locator("[aria-label='Map explorer'] h3", has_text="Selected").wait_for(timeout=30_000)

    to_data = "(plot, corners) => corners.map(([x, y]) => [plot._fullLayout.xaxis.p2d(x), plot._fullLayout.yaxis.p2d(y)])"
    outline, pixel = (np.array(plot.evaluate(to_data, part)) for part in ([(x - box["x"], y - box["y"]) for x, y in at], [(0, 0), (1, 1)]))
    tell_kernel(page, READ_MAP)
    points, caught = (pl.read_parquet(work / f"{name}.parquet") for name in ("points", "caught"))
    places, both = points.select("x", "y").to_numpy(), ["kind", "id"]
    is_caught = points.join(caught.select(both).with_columns(caught=True), on=both, how="left", maintain_order="left")["caught"].fill_null(False).to_numpy()
    doubtful = from_outline(outline, places) < 3 * abs(pixel[1] - pixel[0]).max()    # no hand draws finer than three pixels
    assert (is_caught == inside(outline, places))[~doubtful].all()
    assert 10 < is_caught.sum() < len(points) / 2 and doubtful.sum() < len(points) / 5
    bright = plot.evaluate("plot => plot.data.map(trace => trace.selectedpoints?.length ?? 0)")
    assert bright[:2] == bright[len(bright) // 2:][:2] and sum(bright[:2]) == is_caught.sum(), "both maps light up the same points"


# ---- the quickstart

MAP = """
from mine_refine_nb.explorer import explore_map

there = pl.col("locale") != "ja"    # a machine without Japanese letters would draw boxes
latin = replace(data, products=data.products.filter(there), judgments=data.judgments.filter(there))
explore_map({stage: vectors[stage] for stage in ("pretrained", "stage2")}, latin)
"""


def quickstart_for(work: Path) -> int:
    "Put the quickstart into a folder without its outputs, so that what is seen was made there; the number of its figures."
    notebook, figures = nbformat.read(QUICKSTART, as_version=4), 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            figures += sum("application/vnd.plotly.v1+json" in output.get("data", {}) for output in cell.outputs)
            cell.outputs = []
    nbformat.write(notebook, work / QUICKSTART.name)
    return figures


def run_cell(page, part: str) -> None:
    "Run the last cell whose source holds a text."
    page.evaluate("""part => {
      const notebook = window.jupyterapp.shell.currentWidget.content;
      notebook.activeCellIndex = notebook.widgets.findLastIndex(cell => cell.model.type == "code" && cell.model.sharedModel.getSource().includes(part));
      window.jupyterapp.commands.execute("notebook:run-cell");
    }""", part)


def photograph_map(page, camera) -> None:
    "Add a cell with the map explorer, look at a query, and take the picture."
    page.evaluate("""async source => {
      const notebook = window.jupyterapp.shell.currentWidget.content;
      notebook.activeCellIndex = notebook.widgets.length - 1;
      await window.jupyterapp.commands.execute("notebook:insert-cell-below");
      notebook.activeCell.model.sharedModel.setSource(source);
    }""", MAP)
    run_cell(page, "explore_map(")
    panel = page.locator("[aria-label='Map explorer']")
    panel.locator("input").fill("running")
    panel.locator("input").press("Enter")
    panel.locator(".mr-point").first.click()
    panel.locator("h3", has_text="pretrained").wait_for()
    page.locator(".js-plotly-plot .legend").last.wait_for()
    page.mouse.move(0, 0)
    camera(page.locator(".jp-OutputArea-output", has=panel), "map_explorer")


@pytest.mark.timeout(600)
def test_the_quickstart_in_jupyterlab(browser, lab, camera, request):
    "All cells run, all plots are drawn, a query is answered by three stages, a grade is given by key and found again after a reload."
    url, work = lab
    figures, home = quickstart_for(work), work / "runs" / "quickstart"
    page = run_notebook(browser, url, QUICKSTART.name, "[aria-label='Review queue'] .mr-query", seconds=500)
    page.wait_for_function("n => document.querySelectorAll('.js-plotly-plot:has(.main-svg .trace, .main-svg .bars, .main-svg .point)').length == n",
                           arg=figures, timeout=60_000)

    explorer, card = page.locator("[aria-label='Search explorer']"), page.locator("[aria-label='Review queue']")
    camera(explorer, "search_explorer")
    box = explorer.locator("input[name=query]")
    explorer.locator("select").select_option("es")
    box.fill("zapatillas de caminar")
    box.press("Enter")
    explorer.locator(".mr-status", has_text="zapatillas de caminar (es)").wait_for(timeout=60_000)
    assert explorer.locator("h3").evaluate_all("all => all.map(h => h.firstChild.data.trim())") == ["pretrained", "stage1", "stage2"]
    assert [column.locator(".mr-hit").count() for column in explorer.locator(".mr-column").all()] == [3, 3, 3]

    card.locator(".mr-query").click()
    page.keyboard.press("2")
    card.locator(".mr-status", has_text="1 of 12 done").wait_for(timeout=30_000)
    queue, file = pl.read_parquet(home / "queue.parquet"), home / "reviews" / "me.parquet"
    said = [(queue["product_id"][0], 2, None)]
    assert decided(file) == said
    camera(card, "review_card")
    if request.config.getoption("--screenshots"):
        photograph_map(page, camera)

    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.reload(wait_until="load")
    wait_for_kernel(page)
    page.evaluate("window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    card.wait_for(state="detached", timeout=30_000)
    run_cell(page, "review(")
    card.locator(".mr-status", has_text="1 of 12 done").wait_for(timeout=60_000)
    assert decided(file) == said
    assert open_review(queue, home / "reviews", "me").progress["left"] == 11, "another process finds it too"
    page.close()
