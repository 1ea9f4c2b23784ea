"""The documentation site: links lead somewhere, nothing is fetched from elsewhere, figures draw, a phone can read it."""
import re
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import polars as pl
import pytest

import build_site

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [ROOT / "_quarto.yml", ROOT / "tools" / "build_site.py", ROOT / "nbs" / "styles.css", *(ROOT / "nbs").rglob("*.ipynb")]

# The elements of the text that reach beyond the window and stand in no box that scrolls by itself.
OUTSIDE = """() => [...document.querySelectorAll('main *')].filter(e => {
  if (e.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let box = e; box.tagName != 'MAIN'; box = box.parentElement)
    if (getComputedStyle(box).overflowX != 'visible') return false;
  return true;
}).map(e => e.tagName + ' ' + e.className)"""


@pytest.fixture(scope="session")
def site() -> Path:
    "The built site: the one in _docs/ if no source is newer, else a new one."
    built = build_site.SITE / "llms.txt"
    if not built.exists() or built.stat().st_mtime < max(p.stat().st_mtime for p in SOURCES):
        done = subprocess.run([sys.executable, "tools/build_site.py"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return build_site.SITE


@pytest.fixture(scope="session")
def address(site):
    "The site behind a web server, since a browser lets no local file read another."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def pages(site: Path) -> list[Path]:
    "The site's pages."
    return sorted(site.rglob("*.html"))


def test_every_link_leads_somewhere(site):
    assert build_site.broken_links(site) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "b.html").write_text('<h2 id="here">b</h2><a href="https://example.org/x">elsewhere</a>')
    links = ["b.html#here", "b.html#gone", "c.html", "/b.html", "#nowhere", "b.html"]
    (tmp_path / "a.html").write_text("".join(f'<a href="{link}"></a>' for link in links))
    assert build_site.broken_links(tmp_path) == [f"a.html -> {link}" for link in ("#nowhere", "/b.html", "b.html#gone", "c.html")]


def test_a_name_of_several_modules_leads_to_the_page_s_own(site):
    "`annotate` is judging's on its page and the command's on the command line's; a symbol of one module is found from everywhere."
    def leads(page: str, name: str) -> set[str]:
        return set(re.findall(f'<a href="([^"]*)"><code>{name}</code></a>', (site / "api" / page).read_text(encoding="utf-8")))
    assert leads("judging.html", "annotate") == {"../api/judging.html#annotate"}
    assert leads("market.html", "simulate") == {"../api/market.html#simulate"}
    assert leads("shoppers.html", "make_data") == {"../api/data.html#make_data"}


def test_no_page_shows_the_markdown_of_a_link(site):
    "nbdev links a name between backticks itself; in the text of a link, or in a comment, that leaves brackets on the page."
    assert not [p.name for p in pages(site) if re.search(r"\]\([^)\s]*\.ipynb|`\]\(http", p.read_text(encoding="utf-8"))]


def test_a_signature_reads_as_it_was_written(site):
    code = """def f(
    a:polars.dataframe.frame.DataFrame | None=None, # of [`g`](https://x.org/api/y.html#g), as in torch.nn.Module
    b:collections.abc.Callable[[__main__.Task, numpy.ndarray], mine_refine_nb.mining.Mined]=<function h>, c:str='a.B', d:Grade=Grade.RELEVANT,
    e:Recipe=Recipe(steps=40, sides=(1, (2, 3)), name='long', seed=0), f:Norm=Norm(share=0.5)
)->pathlib.Path: # where"""
    assert build_site.plain_signature(code) == """def f(
    a:DataFrame | None=None, # of `g`, as in torch.nn.Module
    b:Callable[[Task, numpy.ndarray], Mined]=<function h>, c:str='a.B', d:Grade=Grade.RELEVANT,
    e:Recipe=Recipe(...), f:Norm=Norm(share=0.5)
)->Path: # where"""
    shown = {p.name: re.findall(r"__main__|dataframe\.frame|collections\.abc", re.sub(r"<[^>]+>", "", p.read_text(encoding="utf-8"))) for p in pages(site) if p.parent.name == "api"}
    assert len(shown) > 20 and not any(shown.values()), {name: found for name, found in shown.items() if found}


def test_nothing_is_fetched_from_elsewhere(site):
    "Scripts, styles and pictures are the site's own."
    if "quarto" in (site / "index.html").read_text(encoding="utf-8").split('name="generator"', 1)[1][:30]:
        pytest.skip("Quarto decides itself what its pages load")
    class Loads(build_site.Links):
        def handle_starttag(self, tag, attrs):
            if tag in ("script", "link", "img", "iframe"):
                super().handle_starttag(tag, attrs)
    assert not [(p.name, t) for p in pages(site) for t in Loads(p).targets if urlsplit(t).netloc]


def test_tables_read_as_text():
    "Strings lose their quotes, columns of words stand left, numbers and figures written as strings right; long texts may wrap."
    frame = pl.DataFrame({"query": ['14" laptop', "x" * 40], "score": [0.5, None], "rank": ["1", "2"], "名": ["靴", None], "lists": [["a"], []]})
    with pl.Config(fmt_str_lengths=50, tbl_hide_column_data_types=True, tbl_hide_dataframe_shape=True):
        table = build_site.plain_table(frame._repr_html_())
    rows = [re.findall(r'<t[hd] class="([^"]*)">(.*?)</t[hd]>', row) for row in re.findall("<tr>(.*?)</tr>", table)]
    assert rows == [
        [("text line", "query"), ("line", "score"), ("line", "rank"), ("text line", "名"), ("line", "lists")],
        [("text line", "14&quot; laptop"), ("line", "0.5"), ("line", "1"), ("text line", "靴"), ("line", "[&quot;a&quot;]")],
        [("text", "x" * 40), ("line", "null"), ("line", "2"), ("text line", "null"), ("line", "[]")]]


def test_no_table_of_the_site_quotes_its_strings(site):
    texts = {path.name: path.read_text(encoding="utf-8") for path in pages(site)}
    assert sum('class="text line"' in text for text in texts.values()) > 10    # the tables are there
    assert not [name for name, text in texts.items() if re.search(r"<td[^>]*>&quot;", text)]


def test_llms_txt_describes_every_page(site):
    listed = [line for line in (site / "llms.txt").read_text(encoding="utf-8").splitlines() if line.startswith("- [")]
    assert len(listed) == len([p for p in pages(site) if p.name != "404.html"])
    assert all(line.split("): ", 1)[1].strip() for line in listed)


def test_figures_draw(site, address, browser):
    "On a page with figures each box holds a drawing, and nothing complains."
    with_figures = [p for p in pages(site) if 'class="plotly-figure"' in p.read_text(encoding="utf-8")]
    if not with_figures:
        pytest.skip("no page has a figure yet")
    page, errors = browser.new_page(), []
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{address}/{with_figures[0].relative_to(site).as_posix()}", wait_until="load")
    boxes = page.locator(".plotly-figure").count()
    page.wait_for_function("n => document.querySelectorAll('.plotly-figure:has(svg.main-svg)').length == n", arg=boxes, timeout=30_000)
    assert not errors


def test_a_phone_shows_every_page_whole(site, address, browser):
    "At 390 pixels no page scrolls sideways and none is cut off; wide tables and code scroll in their own boxes."
    page = browser.new_page(viewport={"width": 390, "height": 844})
    wide = []
    for path in pages(site):
        page.goto(f"{address}/{path.relative_to(site).as_posix()}", wait_until="load")
        if page.evaluate("document.documentElement.scrollWidth") > 390 or page.evaluate(OUTSIDE):
            wide.append(f"{path.name}: {page.evaluate(OUTSIDE)[:3]}")
    assert not wide


def test_search_finds_a_page(address, browser):
    page = browser.new_page()
    page.goto(f"{address}/index.html", wait_until="load")
    assert page.evaluate("fetch('search.json').then(r => r.json()).then(entries => entries.length)") > 0
