"""The explorers and the monitor: states without a browser, what people said kept apart from what models think, nothing but text from the data."""
import re
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mine_refine_nb import explorer as room
from mine_refine_nb import widgets
from mine_refine_nb.data import DataError, make_data
from mine_refine_nb.encoder import Embeddings
from mine_refine_nb.explorer import (EXPLORER_SCRIPT, LAYERS, Monitor, SearchExplorer, TrainingLog, answer_map, answer_search, begin, explore,
                                     explore_map, find_query, layers, map_figure, map_html, map_points, mark_moves, minutes_left, monitor_html,
                                     monitor_parts, open_map, open_notes, panel_svg, regraded, search_html, spread, take, turn_to, verdict_lines,
                                     watching)
from mine_refine_nb.grades import DEFAULT_GUIDELINE, UNJUDGED
from mine_refine_nb.market import simulate
from mine_refine_nb.widgets import decisions_of, read_decisions, review

NASTY = '<script>alert("x")</script> & <img src=x onerror=\'alert(1)\'> "quoted"'


class Tags(HTMLParser):
    "What a browser would make of a piece of HTML."
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.texts.append(data)


# ---- a shop and models of it: hashed letter triples, under three random projections

@pytest.fixture(scope="module")
def shop():
    return simulate(products=300, queries=48, locales=("en", "es"), seed=0)


def triples(texts: list[str], seed: int) -> np.ndarray:
    "Vectors of texts: similar letters, similar vectors."
    found = np.zeros((len(texts), 256))
    for row, text in enumerate(texts):
        for at in range(len(text) + 1):
            found[row, hash_of(f"  {text.lower()} "[at:at + 3])] += 1
    found = found @ np.random.default_rng(seed).normal(size=(256, 32))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def hash_of(text: str) -> int:
    return sum(ord(letter) * 31 ** place for place, letter in enumerate(text)) % 256


def vectors_of(data, seed: int) -> Embeddings:
    return Embeddings(data.queries["query_id"].to_list(), triples(data.queries["query"].to_list(), seed),
                      data.products["product_id"].to_list(), triples(data.products["title"].to_list(), seed))


class Fake:
    "A stage that answers as `serving.Searcher` does."
    def __init__(self, data, seed: int, calibrated: bool = True):
        self.data, self.seed, self.calibrated, self.vectors = data, seed, calibrated, triples(data.products["title"].to_list(), seed)

    def search(self, query, k=10, locale=None):
        here = self.data.products.with_columns(score=pl.Series(self.vectors @ triples([query], self.seed)[0]).cast(pl.Float64))
        if locale is not None:
            here = here.filter(pl.col("locale") == locale)
        found = here.sort("score", "product_id", descending=[True, False]).head(k)
        if self.calibrated:
            p2 = found["score"].clip(0, 1)
            chances = dict(p0=1 - p2, p1=0 * p2, p2=p2, verdict=pl.Series(["relevant" if p > .5 else "irrelevant" for p in p2], dtype=pl.String))
        else:
            chances = dict(p0=None, p1=None, p2=None, verdict=None)
        return found.select("product_id", "title", "score").with_columns(rank=pl.int_range(1, pl.len() + 1), **chances)


@pytest.fixture(scope="module")
def stages(shop):
    return {"pretrained": Fake(shop, 0, calibrated=False), "stage 1": Fake(shop, 1), "stage 2": Fake(shop, 2)}


@pytest.fixture
def card(shop, stages, tmp_path):
    return explore(stages, shop, tmp_path, "ana", k=5)


def send(card, **content) -> None:
    "A message as the browser sends it, through the widget's own handler."
    content = {"turn": card.view["turn"]} | content
    card._handle_msg({"content": {"data": {"method": "custom", "content": content}}, "buffers": []})


# ---- the search explorer's state

def test_three_stages_answer_with_grades_and_moves(shop, stages):
    explorer = SearchExplorer(stages, shop, k=5)
    query = shop.queries.filter(split="test", locale="en").row(0, named=True)
    explorer.search(query["query"], "en")
    found = explorer.results
    assert found["stage"].unique(maintain_order=True).to_list() == list(stages)
    assert found.group_by("stage").len()["len"].to_list() == [25] * 3
    known = dict(shop.judgments.filter(query_id=query["query_id"]).select("product_id", "grade").iter_rows())
    assert found["grade"].to_list() == [known.get(product, UNJUDGED) for product in found["product_id"]]
    assert {UNJUDGED} < set(found["grade"]), "the query must have judged and unjudged results, or this test shows nothing"
    ranks = {stage: dict(stages[stage].search(query["query"], 25, "en").select("product_id", "rank").iter_rows()) for stage in stages}
    for before, after in (("pretrained", "stage 1"), ("stage 1", "stage 2")):
        here = found.filter(stage=after)
        assert here["was"].to_list() == [ranks[before].get(product) for product in here["product_id"]]


def test_unjudged_is_said_and_never_zero(card):
    results = card.explorer.results.filter(pl.col("rank") <= 5)
    columns = card.view["columns"]
    for grade, name in ((0, "0 irrelevant"), (UNJUDGED, "unjudged")):
        assert columns.count(f">{name}</span>") == (results["grade"] == grade).sum()
    send(card, do="search", query="a query that nobody judged", locale="")
    assert card.view["columns"].count(">unjudged</span>") == 15 and "0 irrelevant" not in card.view["columns"]
    assert "nobody has judged this query" in card.view["status"]


def test_the_query_of_the_data_is_found(shop):
    row = shop.queries.filter(locale="es").row(0, named=True)
    assert find_query(shop, row["query"], None) == find_query(shop, row["query"], "es") == (row["query"], "es", row["query_id"])
    assert find_query(shop, row["query"], "en")[1:] != ("es", row["query_id"])


def test_a_query_text_of_two_locales_is_not_guessed():
    products = pl.DataFrame({"product_id": ["a", "b"], "title": ["radio", "radio"], "locale": ["en", "es"]})
    judgments = pl.DataFrame({"query": ["radio"] * 2, "product_id": ["a", "b"], "grade": [2, 0], "locale": ["en", "es"], "split": ["test"] * 2})
    data = make_data(products, judgments, name="radios")
    assert find_query(data, "radio", None)[1] is None
    assert [find_query(data, "radio", locale)[2] for locale in ("en", "es")] == data.queries.sort("locale")["query_id"].to_list()


def test_a_stage_that_fails_leaves_the_last_results(card, monkeypatch):
    before = card.explorer.results

    def broken(*args, **kwargs):
        raise ValueError(f"no index {NASTY}")
    monkeypatch.setattr(card.explorer.searchers["stage 2"], "search", broken)
    send(card, do="search", query="radio", locale="en")
    assert card.explorer.results.equals(before) and not Tags(card.view["message"]).tags
    assert "no index" in card.view["message"]


@pytest.mark.parametrize("query", ["", "   "])
def test_an_empty_query_is_refused(card, query):
    asked = card.explorer.asked
    send(card, do="search", query=query, locale="en")
    assert "type a query" in card.view["message"] and card.explorer.asked == asked


def test_the_card_opens_on_a_judged_query_of_the_test_split(card, shop):
    assert shop.queries.filter(query_id=card.explorer.asked[2])["split"].to_list() == ["test"]


def test_the_card_opens_on_the_query_that_is_asked_for(shop, stages):
    query_id = shop.queries.filter(split="train")["query_id"][3]
    assert explore(stages, shop, k=2, query_id=query_id).explorer.asked[2] == query_id
    with pytest.raises(ValueError, match="no query with the query_id 'gone'"):
        explore(stages, shop, query_id="gone")


def test_a_program_keeps_a_still_page_and_a_person_the_live_view_too(card, monkeypatch):
    shown = card._repr_mimebundle_()[0]
    assert set(shown) == {"text/plain", "text/html"} and "<datalist></datalist>" in shown["text/html"]
    assert shown["text/html"].count('class="mr-hit"') == 15 and "data-key=" in shown["text/html"]
    monkeypatch.setattr(widgets, "somebody_watches", lambda: True)
    assert widgets.LIVE in card._repr_mimebundle_()[0]
    assert "<progress" in Monitor()._repr_mimebundle_()[0]["text/html"]


def test_a_query_is_answered_quickly(card):
    "What the kernel adds to the models: less than 300 ms, with room for three encoders."
    send(card, do="search", query="radio", locale="en")
    start = time.perf_counter()
    send(card, do="search", query="zapatillas", locale="es")
    assert "zapatillas" in card.view["status"] and time.perf_counter() - start < .3


# ---- grades that are given

def test_a_grade_is_on_disk_before_it_is_shown(card, tmp_path):
    product = card.explorer.results.filter(grade=UNJUDGED)["product_id"][0]
    send(card, do="grade", row=product, value="1")
    assert read_decisions(tmp_path / "ana.parquet").select("product_id", "grade", "old_grade").rows() == [(product, 1, UNJUDGED)]
    assert "now <span" in card.view["columns"] and "Saved" in card.view["message"]
    again = explore(card.explorer.searchers, card.explorer.data, tmp_path, "ana", k=5)
    assert again.explorer.results.filter(product_id=product)["given"].unique().to_list() == [1]
    assert "1 graded in" in again.view["status"] and "now <span" in again.view["columns"]


def test_second_thoughts_and_undo(card, tmp_path):
    product = card.explorer.results["product_id"][0]
    for value in "02":
        send(card, do="grade", row=product, value=value)
    assert card.explorer.results.filter(product_id=product)["given"][0] == 2
    send(card, do="undo")
    assert card.explorer.results.filter(product_id=product)["given"][0] == 0
    send(card, do="undo")
    assert card.explorer.results["given"].null_count() == card.explorer.results.height
    send(card, do="undo")
    assert "no decision to undo" in card.view["message"]


def test_grades_come_back_with_query_and_title(card, tmp_path):
    send(card, do="search", query="una consulta nueva", locale="es")
    row = card.explorer.results.row(0, named=True)
    send(card, do="grade", row=row["product_id"], value="2")
    found = regraded(tmp_path).row(0, named=True)
    assert (found["query"], found["locale"], found["title"], found["grade"], found["old_grade"], found["by"]) == (
        "una consulta nueva", "es", row["title"], 2, UNJUDGED, "ana")
    queue = pl.read_parquet(tmp_path / "queue" / "ana.parquet")
    assert review(queue, tmp_path, "ana").queue.progress["left"] == 0    # the review card goes on from the same folder
    assert decisions_of(tmp_path).height == 1


def test_raters_agree_by_median(card, shop, stages, tmp_path):
    other = explore(stages, shop, tmp_path, "ben", k=5)
    row = card.explorer.results.filter(grade=UNJUDGED).row(0, named=True)
    for who, value in ((card, "2"), (other, "0")):
        send(who, do="grade", row=row["product_id"], value=value)
    assert regraded(tmp_path).select("grade", "by").rows() == [(1, "ana, ben")]


def test_a_grade_cannot_land_under_another_query(card, tmp_path):
    product, turn = card.explorer.results["product_id"][0], card.view["turn"]
    send(card, do="search", query="radio", locale="en")
    send(card, do="grade", row=product, value="2", turn=turn)
    assert not (tmp_path / "ana.parquet").exists()


@pytest.mark.parametrize("content", [{"do": "drop"}, {}, {"do": ["grade"]}, {"do": "undo", "turn": "0"}])
def test_other_messages_do_nothing(card, content):
    before = dict(card.view)
    send(card, **content)
    assert card.view == before


@pytest.mark.parametrize("row, value", [("nowhere", "2"), (None, "2"), ("", "2"), ("FIRST", "3"), ("FIRST", "-1"), ("FIRST", "x"), ("FIRST", None)])
def test_a_grade_that_makes_no_sense_is_refused(card, tmp_path, row, value):
    row = card.explorer.results["product_id"][0] if row == "FIRST" else row
    send(card, do="grade", row=row, value=value)
    assert card.view["message"].startswith("Not done: ") and not (tmp_path / "ana.parquet").exists()


def test_what_cannot_be_saved_is_said_and_did_not_happen(card, monkeypatch):
    def full(path, write):
        raise OSError("disk <full>")
    monkeypatch.setattr(widgets, "write_whole", full)
    send(card, do="grade", row=card.explorer.results["product_id"][0], value="2")
    assert "disk &lt;full&gt;" in card.view["message"] and card.explorer.notes.decisions.is_empty()


def test_without_a_folder_nothing_can_be_graded(shop, stages):
    card = explore(stages, shop, k=5)
    assert 'data-do="grade"' not in card.view["columns"] and 'data-do="undo"' not in card.frame
    send(card, do="grade", row=card.explorer.results["product_id"][0], value="2")
    assert "folder" in card.view["message"]


def test_another_folder_of_decisions_is_refused(tmp_path, shop, stages):
    queue = pl.DataFrame({"query_id": ["q"], "query": ["x"], "product_id": ["p"], "title": ["t"], "grade": [0]})
    review(queue, tmp_path, "ana").queue.grade(2)
    with pytest.raises(DataError, match="belongs to another queue"):
        open_notes(tmp_path, "ana")


# ---- what is drawn

def test_each_column_shows_bars_chances_and_a_line(card):
    columns = dict(zip(("pretrained", "stage 1", "stage 2"), card.view["columns"].split("<section")[1:]))
    assert "mr-chances" not in columns["pretrained"] and "mr-threshold" not in columns["pretrained"] and "mr-move" not in columns["pretrained"]
    for stage in ("stage 1", "stage 2"):
        assert columns[stage].count('class="mr-chances"') == columns[stage].count('class="mr-move') == 5
    assert all(column.count('class="mr-score"') == 5 for column in columns.values())


def test_lines_stand_where_the_verdict_changes():
    names = {"r": "relevant", "m": "moderate", "i": "irrelevant", "?": None}
    lines = lambda verdicts: [line.removeprefix("below here: ") for line in verdict_lines([names[v] for v in verdicts], DEFAULT_GUIDELINE)]  # noqa: E731
    assert lines("rrmi") == ["", "", "moderately relevant", "not relevant"]
    assert lines("ii") == ["not relevant", ""]
    assert lines("??") == ["", ""] and lines("") == []


def test_moves_and_what_left(card):
    shown = card.explorer.results.filter(pl.col("rank") <= 5)
    for stage, before in (("stage 1", "pretrained"), ("stage 2", "stage 1")):
        here, column = shown.filter(stage=stage), card.view["columns"].split("<section")[2 if stage == "stage 1" else 3]
        assert column.count("✚ new") == here["was"].null_count()
        assert column.count("▲ was") == (here["was"] > here["rank"]).sum() and column.count("▼ was") == (here["was"] < here["rank"]).sum()
        gone = set(shown.filter(stage=before)["product_id"]) - set(here["product_id"])
        assert (f"{len(gone)} left the top 5" in column) == bool(gone)


def hostile(text: str):
    "A small shop in which every text is the given one."
    products = pl.DataFrame({"product_id": [f"p{i}" for i in range(4)], "title": [text] * 4, "locale": ["en"] * 4})
    judgments = pl.DataFrame({"query": [text] * 4, "product_id": [f"p{i}" for i in range(4)], "grade": [0, 1, 2, 2], "locale": ["en"] * 4,
                              "split": ["test"] * 4})
    return make_data(products, judgments, name="hostile")


@settings(max_examples=25, deadline=None)
@given(text=st.one_of(st.just(NASTY), st.text(st.sampled_from("<>&\"'/ =abscript\u202e値"), min_size=1, max_size=30)).filter(str.strip))
def test_shop_data_stays_text(text):
    found = []
    for said in ("plain", text.strip()):
        data = hostile(said)
        explorer = SearchExplorer({"one": Fake(data, 0), "two": Fake(data, 1)}, data)
        explorer.search(said, "en")
        atlas = open_map({"one": vectors_of(data, 0)}, data, project=lambda v: v[:, :2])
        atlas.select(range(5))
        atlas.focus = 4
        found += [Tags(search_html(explorer)), Tags(map_html(atlas))]
    for plain, nasty in zip(found[:2], found[2:]):
        assert (nasty.tags, nasty.attributes) == (plain.tags, plain.attributes)


def test_ids_and_stages_are_escaped():
    data = hostile("radio")
    evil = Fake(data, 0)
    evil.data = type(data)(data.products.with_columns(product_id=pl.col("product_id") + NASTY), data.judgments)
    explorer = SearchExplorer({NASTY: evil}, data)
    explorer.search("radio", "en")
    assert "script" not in Tags(search_html(explorer)).tags and "onerror" not in Tags(search_html(explorer)).attributes


def test_long_titles_are_whole_in_the_page_and_cut_by_style_alone():
    title = "Very long title with everything in it, " * 12
    data = hostile(title.strip())
    explorer = SearchExplorer({"one": Fake(data, 0)}, data)
    explorer.search("title", "en")
    page = search_html(explorer)
    assert page.count(f">{title.strip()}</div>") == 4 and "-webkit-line-clamp: 3" in page and "overflow-wrap: anywhere" in page


def test_a_product_without_a_title_and_a_search_without_results(shop):
    data = hostile("radio")
    nothing = Fake(data, 0)
    nothing.search = lambda query, k, locale: Fake.search(nothing, query, k, locale).with_columns(title=pl.lit(None, pl.String)).head(1)
    empty = Fake(data, 1)
    empty.search = lambda query, k, locale: Fake.search(empty, query, k, locale).clear()
    explorer = SearchExplorer({"untitled": nothing, "empty": empty}, data)
    explorer.search("radio", None)
    page = search_html(explorer)
    assert "(no title)" in page and "None" not in page and "nothing found" in page and "<h3>empty" in page


# ---- maps

@pytest.fixture(scope="module")
def two(shop):
    return {"before": vectors_of(shop, 0), "after": vectors_of(shop, 1)}


def test_neighbours_are_those_of_the_original_space(two, shop):
    atlas = open_map(two, shop)
    for row in (3, atlas.points.height - 1):
        found = atlas.neighbours(row, k=4)
        for model, emb in two.items():
            vectors = np.concatenate([emb.products, emb.queries])
            cosines = emb.products @ vectors[row]
            if row < len(emb.products):
                cosines[row] = -2
            part = found.filter(model=model)
            assert part["row"].to_list() == np.argsort(-cosines)[:4].tolist()
            np.testing.assert_allclose(part["cosine"], np.sort(cosines)[::-1][:4], atol=1e-6)


def test_a_map_keeps_queries_and_judged_products_first(shop):
    judged = set(shop.judgments["product_id"])
    points = map_points(shop, most=len(judged) + shop.queries.height + 7)
    assert points.height == len(judged) + shop.queries.height + 7 and judged <= set(points["id"])
    assert points.equals(map_points(shop, most=points.height)) and set(shop.queries["query_id"]) <= set(points["id"])


def test_maps_lie_alike_and_keep_their_distances():
    rng = np.random.default_rng(0)
    here = rng.normal(size=(40, 2))
    mirrored = here @ np.array([[.6, .8], [.8, -.6]]) * 3 + 5
    turned = turn_to(mirrored, here)
    np.testing.assert_allclose(turned, 3 * (here - here.mean(0)), atol=1e-9)


def test_text_is_found_in_any_order_without_accents(shop):
    points = pl.DataFrame({"kind": ["product"] * 3, "id": list("abc"), "text": ["Lámpara de pie", "LAMPARA roja (pie)", None], "locale": ["es"] * 3})
    assert room.find_text(points, "pie lampara") == [0, 1] and room.find_text(points, "(pie") == [1] and room.find_text(points, ".*") == []


def test_vectors_of_other_products_are_refused(two, shop):
    emb = two["before"]
    with pytest.raises(ValueError, match="1 points were not embedded .first: product"):
        open_map({"x": Embeddings(emb.query_ids, emb.queries, emb.product_ids[1:], emb.products[1:])}, shop)


def lasso(card, traces: list[int], places: list[int]) -> None:
    "What the browser reports of a lasso: the trace and place of each point."
    n = len(traces)
    card.figure._handler_js2py_pointsCallback({"new": {
        "event_type": "plotly_selected", "selector": {"type": "lasso", "selector_state": {"xs": [0], "ys": [0]}}, "device_state": None,
        "points": {"xs": [0.] * n, "ys": [0.] * n, "point_indexes": places, "trace_indexes": traces}}})


def test_a_lasso_on_one_map_is_a_frame_and_lights_up_the_other(two, shop):
    card = explore_map(two, shop)
    lasso(card, [0, 0, 1], [4, 2, 0])
    products = shop.products.height
    assert card.explorer.rows == [2, 4, products]
    assert card.explorer.selection["id"].to_list() == [shop.products["product_id"][2], shop.products["product_id"][4], shop.queries["query_id"][0]]
    for offset in (0, len(LAYERS)):
        assert [list(card.figure.data[offset + i].selectedpoints) for i in (0, 1)] == [[2, 4], [0]]
    assert "products: 2, queries: 1" in card.panel.view["columns"]
    lasso(card, [len(LAYERS)], [9])    # and from the second map
    assert card.explorer.rows == [9] and list(card.figure.data[0].selectedpoints) == [9] and list(card.figure.data[1].selectedpoints) == []
    lasso(card, [], [])
    assert card.explorer.rows == [9], "an outline that went took the selection with it"
    turn = card.panel.view["turn"]
    lasso(card, [len(LAYERS)], [9])
    assert card.panel.view["turn"] == turn, "what is selected already is drawn again, and may go round in circles"


def test_a_click_on_a_query_shows_its_grades_in_both_maps(two, shop):
    card = explore_map(two, shop)
    card.figure._handler_js2py_pointsCallback({"new": {
        "event_type": "plotly_click", "selector": None, "device_state": None,
        "points": {"xs": [0.], "ys": [0.], "point_indexes": [3], "trace_indexes": [len(LAYERS) + 1]}}})
    assert card.explorer.focus == shop.products.height + 3
    judged = shop.judgments.filter(query_id=shop.queries["query_id"][3])
    for offset in (0, len(LAYERS)):
        sizes = {trace.name: len(trace.x) for trace in card.figure.data[offset:offset + len(LAYERS)]}
        assert sizes["nearest"] == 10 and sizes["looked at"] == 1
        assert [sizes[name] for name in ("irrelevant", "moderate", "relevant")] == [(judged["grade"] == g).sum() for g in (0, 1, 2)]
    assert card.panel.view["columns"].count("mr-chip") == 20


def test_the_panel_is_enough_without_a_mouse(two, shop):
    card = explore_map(two, shop)
    word = shop.queries["query"][0].split()[0]
    answer_map(card, {"do": "find", "text": word})
    assert card.explorer.rows == card.explorer.find(word) != []
    answer_map(card, {"do": "look", "row": str(card.explorer.rows[0])})
    assert card.explorer.focus == card.explorer.rows[0]
    answer_map(card, {"do": "find", "text": NASTY})
    assert "No point has the text" in card.panel.view["message"] and not Tags(card.panel.view["message"]).tags
    answer_map(card, {"do": "clear"})
    assert (card.explorer.focus, card.explorer.rows) == (None, [])
    answer_map(card, {"do": "look", "row": "999999"})
    assert card.explorer.focus is None and card.panel.view["message"].startswith("Not done")


def test_titles_are_no_markup_on_a_map():
    data = hostile(NASTY)
    figure = map_figure(open_map({"one": vectors_of(data, 0)}, data, project=lambda v: v[:, :2]))
    assert all("<script" not in text and "<img" not in text for trace in figure.data for text in trace.text or ())


def test_fifty_thousand_points_stay_fluid(shop):
    "Drawn with WebGL, and a click answered at once."
    rng = np.random.default_rng(0)
    n = 50_000 - shop.queries.height
    products = pl.DataFrame({"product_id": [f"x{i}" for i in range(n)], "title": [f"thing {i}" for i in range(n)],
                             "locale": ["en"] * n}).with_columns(category=pl.lit(None, pl.String), brand=pl.lit(None, pl.String), description=pl.lit(None, pl.String))
    data = type(shop)(products, shop.judgments)
    vectors = rng.normal(size=(n, 64)).astype(np.float32)
    emb = Embeddings(shop.queries["query_id"].to_list(), rng.normal(size=(shop.queries.height, 64)).astype(np.float32), products["product_id"].to_list(), vectors)
    card = explore_map({"one": emb, "two": emb}, data)
    assert card.explorer.points.height == 50_000 and all(isinstance(trace, go.Scattergl) for trace in card.figure.data)
    start = time.perf_counter()
    answer_map(card, {"do": "look", "row": "77"})
    assert time.perf_counter() - start < 2


# ---- the monitor

class Clock:
    "A clock that is set by hand."
    now = 0.0

    def __call__(self):
        return self.now


def test_a_log_keeps_what_is_watched():
    log = TrainingLog(clock=Clock())
    begin(log, 20)
    take(log, 5, {"loss": 1.5, "grad_norm": 2.0, "learning_rate": 1e-5, "epoch": .1, "eval_auc_2": .7, "eval_ndcg@10": .5, "eval_runtime": 3.0, "train_loss": 1.4})
    assert log.history.rows() == [(5, "loss", 1.5), (5, "validation auc_2", .7), (5, "validation ndcg@10", .5)]
    log.clock.now = 10
    assert minutes_left(log) == "about 30 s left"
    begin(log, 20, step=10)
    assert log.history.is_empty() and log.step == 10


def test_a_resumed_run_does_not_count_the_steps_before():
    log = TrainingLog(clock=Clock())
    begin(log, 40, step=20)
    log.clock.now = 10
    take(log, 30, {"loss": 1.0})
    assert minutes_left(log) == "about 10 s left"


def test_pictures_are_drawn_at_most_so_often():
    clock = Clock()
    monitor = Monitor(every=1.0, clock=clock)
    begin(monitor.run, 100)
    turn = monitor.view["turn"]
    for step in range(1, 101):
        clock.now += .1
        take(monitor.run, step, {"loss": 1 / step})
        monitor.draw(late=False)
    assert 9 <= monitor.view["turn"] - turn <= 11 and monitor.run.history.height == 100


def test_a_report_costs_a_step_next_to_nothing():
    monitor = Monitor(every=0)
    begin(monitor.run, 1000)
    start = time.perf_counter()
    for step in range(1, 51):
        take(monitor.run, step, {"loss": 1 / step, "eval_auc_2": .5})
        monitor.draw(late=False)
    assert (time.perf_counter() - start) / 50 < .05


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(), min_size=1, max_size=8))
def test_any_numbers_can_be_drawn(values):
    log = TrainingLog(clock=Clock())
    begin(log, len(values))
    for step, value in enumerate(values, 1):
        take(log, step, {"loss": value, "eval_auc_1": .5})
    page = monitor_html(log)
    drawn = re.findall(r'points="([^"]*)"', page)
    places = [float(number) for points in drawn for pair in points.split() for number in pair.split(",")]
    assert places and all(-1 <= place <= 381 for place in places)


@given(st.lists(st.floats(14, 160), min_size=1, max_size=6))
def test_labels_do_not_lie_upon_each_other(places):
    found = sorted(spread(places))
    assert all(high - low > 14.9 for low, high in zip(found, found[1:])) and found[-1] <= 166.1


def test_the_monitor_says_it_in_words_too():
    svg = panel_svg("loss", pl.DataFrame({"step": [1, 5], "name": ["loss"] * 2, "value": [2.0, 1.0]}), 10)
    assert 'role="img"' in svg and 'aria-label="loss: loss from 2.000 to 1.000"' in svg
    assert "Waiting for a training run" in monitor_parts(TrainingLog())["columns"]


def test_every_trainer_inside_the_block_is_watched():
    "A real trainer of transformers, three steps of a one-parameter model; outside the block nothing is told."
    import torch
    from transformers import Trainer, TrainingArguments
    from transformers.trainer import DEFAULT_CALLBACKS

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, labels=None):
            return {"loss": ((self.weight * x.float() - labels) ** 2).mean()}

    def fit(folder):
        args = TrainingArguments(folder, max_steps=3, logging_steps=1, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True)
        rows = [{"x": torch.tensor([1.0]), "labels": torch.tensor([0.0])}] * 8
        trainer = Trainer(One(), args, train_dataset=rows)
        trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if type(c).__name__ != "PrinterCallback"]
        trainer.train()

    from tempfile import TemporaryDirectory
    monitor, before = Monitor(every=0), list(DEFAULT_CALLBACKS)
    with TemporaryDirectory() as folder:
        with watching(monitor):
            fit(folder)
        assert DEFAULT_CALLBACKS == before
        seen = monitor.run.history
        assert monitor.run.over and (monitor.run.step, monitor.run.total) == (3, 3)
        assert seen.filter(name="loss")["step"].to_list() == [1, 2, 3] and "<svg" in monitor.view["columns"] and "done" in monitor.view["status"]
        fit(folder)
        assert monitor.run.history.equals(seen)


# ---- the script

def test_the_script_keeps_keys_to_itself():
    assert "stopPropagation" in EXPLORER_SCRIPT and "data-lm-suppress-shortcuts" in EXPLORER_SCRIPT
