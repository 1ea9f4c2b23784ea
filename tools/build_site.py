"""Build the documentation site of the notebooks into _docs/ and check every link in it.

nbdev prepares the notebooks (hidden cells go, a `show_doc` table comes for every exported symbol), then Quarto renders
them, or smalldocs where there is no Quarto. Figures are drawn by one copy of plotly.js that the site carries itself,
so the pages work offline and a figure is stored once. Exits with 1 and a list when a link leads nowhere.
"""
import html
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_docs"
PLOTLY = "application/vnd.plotly.v1+json"
DRAW = """// Draw each figure of the page in the width of its column.
for (const box of document.querySelectorAll('.plotly-figure')) {
  const figure = JSON.parse(box.nextElementSibling.textContent);
  delete figure.layout.width;
  figure.config = {...figure.config, responsive: true, displaylogo: false};
  Plotly.newPlot(box, figure);
}
"""


# ---- from nbs/ to _proc/

def process() -> Path:
    "Let nbdev prepare the notebooks, in this one process: torch is then imported once, not once per notebook."
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    warnings.filterwarnings("ignore", "Found cells containing imports")  # tests/test_notebooks.py names them
    refresh_quarto_yml()
    shutil.rmtree(ROOT / "_proc", ignore_errors=True)
    try:
        return proc_nbs(n_workers=0)
    except Exception as error:  # nbdev runs the exported cells and those with imports again, to read their signatures
        sys.exit(f"A notebook cannot be prepared for the documentation. {error}\n--> {error.__cause__!r}\n"
                 "Cells with imports run here without the cells before them: they may hold imports only.")


def front_matter(notebook: Path) -> dict:
    "The title, description and output name that nbdev wrote into a processed notebook."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = "".join(cells[0]["source"]) if cells else ""
    return yaml.safe_load(source.strip().strip("-")) if source.startswith("---") else {}


def figure_html(figure: dict, up: str, first: bool) -> str:
    "A figure as data beside an empty box; the page's first one also loads plotly.js and the script that draws."
    scripts = "".join(f'<script src="{up}plotly/{name}" defer></script>\n' for name in ("plotly.min.js", "draw.js"))
    data = json.dumps(figure, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    height = figure.get("layout", {}).get("height") or 450
    box = f'<div class="plotly-figure" style="height:{height}px"></div><script type="application/json">{data}</script>'
    return scripts * first + box


def plain_table(table: str) -> str:
    "A Polars table as a reader wants it: strings without their quotes, columns of words to the left, short ones on one line."
    cells = re.compile(r"<(t[hd])>(.*?)</\1>", re.S)
    words = {at for row in table.split("</tr>") for at, (_, shown) in enumerate(cells.findall(row))
             if shown.startswith("&quot;") and any(map(str.isalpha, html.unescape(shown)))}

    def cell(at: int, kind: str, shown: str) -> str:
        shown = re.sub(r"^&quot;|&quot;$", "", shown)
        classes = ["text"] * (at in words) + ["line"] * (len(html.unescape(shown)) <= 32)
        return f'<{kind} class="{" ".join(classes)}">{shown}</{kind}>'

    def row(match: re.Match) -> str:
        places = count()
        return cells.sub(lambda m: cell(next(places), m[1], m[2]), match[0])

    return re.sub(r"<tr>.*?</tr>", row, table, flags=re.S)


def plain_signature(code: str) -> str:
    """A signature as a reader wants it: classes without the modules they live in, of a long default only its class, and no
    links in comments, where the brackets would show."""
    def line(text: str) -> str:
        head, mark, comment = text.partition(" # ")
        head = re.sub(r"(?<![\w.'\"])(?:[a-z_]\w*\.)+(?=[A-Z])", "", head)
        head = re.sub(r"(=[A-Z]\w*)(\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))", lambda m: m[0] if len(m[2]) <= 40 else f"{m[1]}(...)", head)
        return head + mark + re.sub(r"\[(`[^`]+`)\]\(\S+?\)", r"\1", comment)

    return "\n".join(map(line, code.split("\n")))


def lighten_outputs(notebook: Path, cache: Path) -> int:
    "Make a processed notebook's outputs ready for a page: figures, tables and signatures; return how many figures there were."
    nb, figures = json.loads(notebook.read_text(encoding="utf-8")), 0
    up = "../" * len(notebook.relative_to(cache).parent.parts)
    for output in (o for cell in nb["cells"] for o in cell.get("outputs", [])):
        data = output.get("data", {})
        if PLOTLY in data:
            output["data"] = {"text/html": figure_html(data[PLOTLY], up, first=not figures)}
            figures += 1
        elif "text/html" in data:
            shown = "".join(data["text/html"])
            data["text/html"] = re.sub(r'<table [^>]*class="dataframe".*?</table>', lambda m: plain_table(m[0]), shown, flags=re.S)
        elif "text/markdown" in data:
            shown = "".join(data["text/markdown"])
            data["text/markdown"] = re.sub(r"^```python\n.*?^```", lambda m: plain_signature(m[0]), shown, flags=re.S | re.M)
    notebook.write_text(json.dumps(nb, ensure_ascii=False), encoding="utf-8")
    return figures


# ---- from _proc/ to _docs/

def render(cache: Path) -> str:
    "Render the processed notebooks into _docs/; return the renderer's name."
    shutil.rmtree(SITE, ignore_errors=True)
    if shutil.which("quarto"):
        subprocess.run(["quarto", "render", "--no-cache"], cwd=cache, check=True)
        shutil.move(cache / SITE.name, SITE)
        return "Quarto"
    from smalldocs.site import build

    ignored = re.compile(r"output-file is not read|\.(html-math-method|grid) is ignored")  # done below and in styles.css
    if problems := [w for w in build(cache, quiet=True).warnings if not ignored.search(w)]:
        sys.exit("\n".join(["smalldocs cannot render the site as it is:", *problems]))
    shutil.move(cache / SITE.name, SITE)
    finish_smalldocs(cache)
    return "smalldocs"


def finish_smalldocs(cache: Path) -> None:
    "What Quarto does and smalldocs does not: nbdev's page names, and formulas that need no network."
    names = {}
    for notebook in cache.rglob("*.ipynb"):
        output = front_matter(notebook).get("output-file", f"{notebook.stem}.html")
        names |= {notebook.stem + end: Path(output).stem + end for end in (".html", ".llms.md")}
    pattern = re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, names)) + ")")
    for path in [p for p in SITE.rglob("*") if p.suffix in (".html", ".json", ".xml", ".md", ".txt")]:
        text = pattern.sub(lambda m: names[m[1]], path.read_text(encoding="utf-8"))
        path.write_text(mathml(text) if path.suffix == ".html" else text, encoding="utf-8")
        path.rename(path.with_name(names.get(path.name, path.name)))


def mathml(page: str) -> str:
    "Write the formulas of a page as MathML, which every browser draws, and drop the script that would fetch KaTeX."
    from latex2mathml.converter import convert

    def formula(match: re.Match) -> str:
        drawn = convert(html.unescape(match[2]), display="block" if match[1] == "display" else "inline")
        return f'<span class="math {match[1]}">{drawn}</span>'

    page = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', formula, page, flags=re.S)
    return re.sub(r'<(?:link|script)[^>]*(?:href|src)="https://[^"]*katex[^"]*"[^>]*>(?:</script>)?\n?', "", page)


def localise_links(site_url: str) -> None:
    """nbdev links symbols by the published address. Make these links relative, so that they work in a local copy too. A name
    that several modules have is the page's own where it has it; a method or a private name, which has no heading of its own,
    leads to its class or its page."""
    from mine_refine_nb._modidx import d

    pages = {page: Links(page) for page in SITE.rglob("*.html")}
    symbols = {address for module in d["syms"].values() for address, _ in module.values()}

    def local(match: re.Match, page: Path, up: str) -> str:
        own = f"{page.relative_to(SITE).as_posix()}#{match[2]}"
        path, _, name = (own if own in symbols else match[1]).partition("#")
        ids = pages[SITE / path].ids if SITE / path in pages else {name}
        anchor = next((n for n in (name, name.split(".")[0]) if n in ids), "")
        return f'href="{up}{path}{anchor and "#"}{anchor}"'

    for page in pages:
        up = "../" * len(page.relative_to(SITE).parent.parts) or "./"
        text = page.read_text(encoding="utf-8")
        link = f'href="{re.escape(site_url)}/([^"]*)"(?=(?:><code>([a-z_]+)</code>)?)'
        page.write_text(re.sub(link, lambda m: local(m, page, up), text), encoding="utf-8")


def add_plotly() -> None:
    "Put plotly.js and the drawing script into the site, once."
    from plotly.offline import get_plotlyjs

    folder = SITE / "plotly"
    folder.mkdir()
    (folder / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    (folder / "draw.js").write_text(DRAW, encoding="utf-8")


def write_llms(cache: Path, title: str, description: str) -> None:
    "Write llms.txt: every page with its one-line description, for readers that are programs."
    lines = [f"# {title}", "", f"> {description}"]
    for section, pattern in (("Start", "*.ipynb"), ("Tutorials", "tutorials/*.ipynb"), ("Benchmarks", "benchmarks/*.ipynb"), ("API", "api/*.ipynb")):
        lines += ["", f"## {section}", ""]
        for notebook in sorted(cache.glob(pattern)):
            front = front_matter(notebook)
            page = notebook.relative_to(cache).with_name(front.get("output-file", f"{notebook.stem}.html"))
            copy = page.with_suffix(".llms.md")
            link = copy if (SITE / copy).exists() else page
            lines.append(f"- [{front['title']}]({link.as_posix()}): {front.get('description', '')}")
    (SITE / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- the check

class Links(HTMLParser):
    "Collect what a page links to and the places in it that can be linked to."

    def __init__(self, page: Path):
        super().__init__()
        self.targets, self.ids = [], {"", "top"}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value is not None:
                self.targets.append(value)
            elif name in ("id", "name") and value:
                self.ids.add(value)


def broken_links(site: Path) -> list[str]:
    "Every link between the site's own files that leads to no file, or to no place in one: `page -> link`."
    pages = {page.resolve(): Links(page) for page in site.rglob("*.html")}
    broken = []
    for page, links in pages.items():
        for target in links.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            path = (page.parent / unquote(url.path)).resolve() if url.path else page
            path = path / "index.html" if path.is_dir() else path
            missing = not path.is_file() or (path in pages and unquote(url.fragment) not in pages[path].ids)
            if missing or url.path.startswith("/"):
                broken.append(f"{page.relative_to(site.resolve())} -> {target}")
    copies = [site / "llms.txt", *site.rglob("*.llms.md")]
    for copy in filter(Path.exists, copies):
        for target in re.findall(r"\]\(([^)\s#]+\.(?:html|md))", copy.read_text(encoding="utf-8")):
            if not urlsplit(target).scheme and not (copy.parent / target).is_file():
                broken.append(f"{copy.relative_to(site)} -> {target}")
    return sorted(set(broken))


def main() -> None:
    "Build the site and check it."
    os.chdir(ROOT)
    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")
    cache = process()
    meta = yaml.safe_load((cache / "nbdev.yml").read_text(encoding="utf-8"))["website"]
    figures = sum(lighten_outputs(notebook, cache) for notebook in cache.rglob("*.ipynb"))
    renderer = render(cache)
    localise_links(meta["site-url"])
    add_plotly()
    write_llms(cache, meta["title"], meta["description"])
    if broken := broken_links(SITE):
        sys.exit("\n".join(["Broken links in the documentation site:", *(f"  {line}" for line in broken)]))
    print(f"Documentation: {len(list(SITE.rglob('*.html')))} pages, {figures} figures, no broken links, by {renderer} in _docs/")


if __name__ == "__main__":
    main()
