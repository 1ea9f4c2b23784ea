"""The review queue: the file says what the state says, whatever is done; the card: nothing but text comes from the data."""
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mine_refine_nb import widgets
from mine_refine_nb.data import DataError
from mine_refine_nb.grades import DEFAULT_GUIDELINE
from mine_refine_nb.plots import GRADE_COLORS
from mine_refine_nb.widgets import (DECISIONS, ReviewCard, card_html, check_queue, decisions_of, grade_chip, open_review, rater_agreement,
                                    read_decisions, review, review_html, review_path, to_corrections)

ROOT = Path(__file__).resolve().parent.parent
NASTY = '<script>alert("x")</script> & <img src=x onerror=\'alert(1)\'> "quoted"'


def queue_of(grades: list[int], **columns) -> pl.DataFrame:
    "A queue with these grades; two products per query."
    n = len(grades)
    return pl.DataFrame({"query_id": [f"q{i // 2}" for i in range(n)], "query": [f"query {i // 2}" for i in range(n)],
                         "product_id": [f"p{i}" for i in range(n)], "title": [f"title {i}" for i in range(n)], "grade": grades} | columns,
                        schema_overrides={"grade": pl.Int8})


def press(queue, key: str) -> None:
    "One key of the card, on the state alone; keys that cannot do anything change nothing."
    try:
        widgets.press(queue, key, "")
    except ValueError:
        assert queue.current is None if key != "u" else queue.decisions.is_empty()


def said(frame: pl.DataFrame) -> list[tuple]:
    "Decisions without their times."
    return frame.select("product_id", "grade").rows()


class Model:
    "What a queue must do, in the plainest words: a list of decisions, and undo takes the last."
    def __init__(self, n: int):
        self.n, self.log = n, []

    def next(self) -> str | None:
        times, last = Counter(p for p, _ in self.log), dict(self.log)
        fresh = [f"p{i}" for i in range(self.n) if f"p{i}" not in times]
        return next(iter(fresh + [p for p in times if times[p] == 1 and last[p] is None]), None)

    def press(self, key: str) -> None:
        if key == "u":
            self.log = self.log[:-1]
        elif shown := self.next():
            self.log.append((shown, None if key == "s" else int(key)))


# ---- the state

@settings(max_examples=60, deadline=None)
@given(grades=st.lists(st.integers(-1, 2), max_size=5), keys=st.lists(st.sampled_from([*"0121sssuu", "reopen"]), max_size=24))
def test_any_sequence_of_keys(grades, keys):
    "After each key the file equals the state, and both equal the model, also across restarts."
    with TemporaryDirectory() as folder:
        rows, model = queue_of(grades), Model(len(grades))
        queue = open_review(rows, folder, "ana")
        for key in keys:
            if key == "reopen":
                queue = open_review(rows, folder, "ana")
            else:
                press(queue, key)
                model.press(key)
            assert read_decisions(queue.path).equals(queue.decisions)
            assert said(queue.decisions) == model.log
            assert (queue.current or {}).get("product_id") == model.next()
        again, n = open_review(rows, folder, "ana"), queue.progress
        assert (again.current, again.progress) == (queue.current, n)
        assert n["changed"] + n["confirmed"] + n["skipped"] == len(dict(model.log)) and 0 <= n["left"] <= n["total"] == len(grades)


def test_undo_goes_back_to_the_start_and_hands_out_what_it_took(tmp_path):
    queue = open_review(queue_of([0, 1, 2]), tmp_path, "ana")
    queue.grade(2, "a note")
    queue.skip()
    queue.grade(0)
    assert [queue.undo()["product_id"] for _ in range(3)] == ["p2", "p1", "p0"]
    assert queue.current["product_id"] == "p0" and read_decisions(queue.path).is_empty()
    with pytest.raises(ValueError, match="no decision to undo"):
        queue.undo()


def test_a_decision_says_who_what_when_and_why(tmp_path):
    queue = open_review(queue_of([0]), tmp_path, "María José")
    queue.grade(2, "  same thing ")
    row = read_decisions(tmp_path / "María José.parquet").row(0, named=True)
    assert {k: v for k, v in row.items() if k != "at"} == dict(query_id="q0", product_id="p0", rater="María José", grade=2, old_grade=0, why="same thing")
    assert row["at"].utcoffset().total_seconds() == 0 and dict(queue.decisions.schema) == DECISIONS


@pytest.mark.parametrize("grade", [3, -1, None, "2"])
def test_no_other_grade_can_be_given(tmp_path, grade):
    queue = open_review(queue_of([0]), tmp_path, "ana")
    with pytest.raises(ValueError):
        queue.grade(grade)
    assert not queue.path.exists()


def test_a_killed_process_loses_nothing(tmp_path):
    code = f"""
import os, polars as pl
from mine_refine_nb.widgets import open_review
queue = open_review(pl.DataFrame({queue_of([0, 1, 2]).to_dict(as_series=False)!r}), {str(tmp_path)!r}, "ana")
queue.grade(2); queue.skip()
os.kill(os.getpid(), {int(signal.SIGTERM)})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and not done.stderr
    assert said(open_review(queue_of([0, 1, 2]), tmp_path, "ana").decisions) == [("p0", 2), ("p1", None)]


def test_what_cannot_be_saved_did_not_happen(tmp_path, monkeypatch):
    queue = open_review(queue_of([0, 1]), tmp_path, "ana")
    queue.grade(1)

    def full(path, write):
        raise OSError("no space left on device")
    monkeypatch.setattr(widgets, "write_whole", full)
    for change in (lambda: queue.grade(2), queue.skip, queue.undo):
        with pytest.raises(OSError, match="no space"):
            change()
    assert said(queue.decisions) == said(read_decisions(queue.path)) == [("p0", 1)] and queue.current["product_id"] == "p1"


def test_two_sessions_of_one_rater_do_not_erase_each_other(tmp_path):
    first, second = (open_review(queue_of([0, 1]), tmp_path, "ana") for _ in range(2))
    first.grade(2)
    with pytest.raises(DataError, match="changed by another session of 'ana'"):
        second.grade(0)
    assert said(read_decisions(first.path)) == [("p0", 2)]


def test_raters_do_not_meet(tmp_path):
    ana, ben = (open_review(queue_of([0, 1]), tmp_path, name) for name in ("ana", "ben"))
    ana.grade(2)
    ben.grade(1)
    ana.grade(2)
    assert decisions_of(tmp_path).select("rater", "product_id", "grade").rows() == [("ana", "p0", 2), ("ana", "p1", 2), ("ben", "p0", 1)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ana.parquet", "ben.parquet"]


# ---- what is refused

@pytest.mark.parametrize("column", ["query_id", "query", "product_id", "title", "grade"])
def test_a_queue_needs_its_columns(column):
    with pytest.raises(DataError, match=rf"needs the column\(s\) {column};"):
        check_queue(queue_of([0]).drop(column))


@pytest.mark.parametrize("change, said", [
    (pl.lit(None, pl.String).alias("query_id"), "row 0"), (pl.lit(None, pl.String).alias("query"), "row 0"),
    (pl.lit(5).alias("grade"), "row 0"), (pl.lit(None, pl.Int8).alias("grade"), "row 0"), (pl.lit(1.0).alias("grade"), "type Float64"),
    (pl.lit("2").alias("grade"), "type String")])
def test_a_queue_needs_its_values(change, said):
    with pytest.raises(DataError, match=said):
        check_queue(queue_of([0]).with_columns(change))


def test_a_pair_is_asked_once(tmp_path):
    rows = queue_of([0, 1, 2])
    queue = open_review(pl.concat([rows, rows.reverse()]), tmp_path, "ana")
    assert queue.rows.equals(rows) and queue.progress["total"] == 3
    with pytest.raises(DataError, match="'q0' with product_id 'p0' stands there with different grades"):
        check_queue(pl.concat([rows, queue_of([1])]))


@pytest.mark.parametrize("rater", ["", " ", ".", "..", "../ana", "a/b", "a\\b", ".hidden", "ana.", " ana", "a\nb", "a\0b", "c:ana", "x" * 51])
def test_a_rater_cannot_leave_the_folder(rater, tmp_path):
    with pytest.raises(ValueError, match="cannot be a rater's name"):
        review_path(tmp_path, rater)


@pytest.mark.parametrize("rater", ["ana", "Ana López", "田中", "हिन्दी", "a.b@example.org", "r_1-2"])
def test_people_may_use_their_names(rater, tmp_path):
    open_review(queue_of([0]), tmp_path, rater).grade(1)
    assert decisions_of(tmp_path)["rater"].to_list() == [rater]


def test_other_files_are_not_taken_for_reviews(tmp_path):
    queue_of([0]).write_parquet(tmp_path / "ana.parquet")
    (tmp_path / "ben.parquet").write_text("query_id,product_id")
    for rater in ("ana", "ben"):
        before = (tmp_path / f"{rater}.parquet").read_bytes()
        with pytest.raises(DataError, match=f"{rater}.parquet is no review file"):
            open_review(queue_of([0]), tmp_path, rater)
        assert (tmp_path / f"{rater}.parquet").read_bytes() == before
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(DataError, match="holds no review"):
            decisions_of(folder)


def test_a_review_belongs_to_its_queue_and_rater(tmp_path):
    open_review(queue_of([0, 1]), tmp_path, "ana").grade(2)
    with pytest.raises(DataError, match=r"'p0' is not in this queue \(1 of 1 decisions\)"):
        open_review(queue_of([0, 1]).tail(1), tmp_path, "ana")
    with pytest.raises(DataError, match="had grade 0 when it was judged and has 2 now"):
        open_review(queue_of([2, 1]), tmp_path, "ana")
    assert open_review(queue_of([0, 1, 1]), tmp_path, "ana").progress["left"] == 2    # a queue may grow
    (tmp_path / "ana.parquet").rename(tmp_path / "ben.parquet")
    with pytest.raises(DataError, match="holds decisions by 'ana', not by 'ben'"):
        open_review(queue_of([0, 1]), tmp_path, "ben")


# ---- several raters

def judged(folder: Path, grades: list[int], **raters: list[int | None]) -> pl.DataFrame:
    "The decisions of raters who went through one queue; None skips."
    for name, given_grades in raters.items():
        queue = open_review(queue_of(grades), folder, name)
        for grade in given_grades:
            queue.skip() if grade is None else queue.grade(grade)
    return decisions_of(folder)


def test_agreement_is_over_pairs_that_both_judged(tmp_path):
    table = rater_agreement(judged(tmp_path, [0] * 6, ana=[0, 1, 2, 0, 2, None], ben=[0, 1, 2, 2, None, 1], carla=[None]))
    rows = {(r["rater"], r["other"]): r for r in table.iter_rows(named=True)}
    both = rows["ana", "ben"]
    # by hand, weights (i - j)^2: seen 4; by chance (18 + 3 + 5) / 4, from the margins 2, 1, 1 and 1, 1, 2
    assert (both["pairs"], both["equal"], both["within_one"]) == (4, .75, .75) and both["kappa"] == pytest.approx(1 - 4 / 6.5)
    assert rows["ana", "carla"]["pairs"] == 0 and rows["ana", "carla"]["kappa"] != rows["ana", "carla"]["kappa"]
    assert len(rows) == 3


def test_corrections_are_the_median_ties_down_where_it_is_new(tmp_path):
    found = to_corrections(judged(tmp_path, [0, 1, 2, 1, 0, 2], ben=[2, 2, 0, 1, 2, None], ana=[2, 0, 1, 1, None, None], carla=[0, 1, 0, 1, 1, None]))
    assert found.rows() == [("q0", "p0", 2, 0, "ana, ben, carla", "ana 2; ben 2; carla 0"),
                            ("q1", "p2", 0, 2, "ana, ben, carla", "ana 1; ben 0; carla 0"),
                            ("q2", "p4", 1, 0, "ben, carla", "ben 2; carla 1")]
    assert found.schema["grade"] == found.schema["old_grade"] == pl.Int8


def test_the_last_word_counts(tmp_path):
    queue = open_review(queue_of([0, 1]), tmp_path, "ana")
    queue.skip()
    queue.grade(1)
    queue.grade(2, "seen again")
    assert to_corrections(decisions_of(tmp_path)).rows() == [("q0", "p0", 2, 0, "ana", "ana 2 (seen again)")]
    assert decisions_of(tmp_path).height == 2


def test_corrections_of_different_queues_are_refused(tmp_path):
    decisions = pl.concat([judged(tmp_path / "a", [0], ana=[2]), judged(tmp_path / "b", [1], ben=[2])])
    with pytest.raises(DataError, match="different old grades of query_id 'q0' with product_id 'p0'"):
        to_corrections(decisions)


def test_without_grades_there_is_nothing_to_correct(tmp_path):
    found = to_corrections(judged(tmp_path, [0], ana=[None]))
    assert found.is_empty() and found.columns == ["query_id", "product_id", "grade", "old_grade", "by", "why"]


# ---- the card

class Tags(HTMLParser):
    "The tags, attributes and texts of a fragment."
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.texts.append(data)


TEXTS = ("query", "title", "category", "brand", "locale", "direction", "evidence")


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(st.just(NASTY), st.text(st.sampled_from("<>&\"'/ =abscript\u202e値"), min_size=1, max_size=30)).filter(str.strip))
def test_shop_data_stays_text(text):
    row = queue_of([0], suggested=[2]).row(0, named=True)
    plain, found = (Tags(card_html(row | dict.fromkeys(TEXTS, said), DEFAULT_GUIDELINE)) for said in ("plain", text))
    assert (found.tags, found.attributes) == (plain.tags, plain.attributes)
    assert found.texts.count(text) >= 4


def test_rater_and_errors_are_escaped_too(tmp_path):
    queue = open_review(queue_of([0]), tmp_path, "a&b'c")
    assert "a&amp;b&#x27;c" in review_html(queue)
    card = review(queue_of([0]), tmp_path, "ana")
    (tmp_path / "ana.parquet").write_text(NASTY)
    send(card, "2")
    assert card.view["message"].startswith("Not saved: ") and not Tags(card.view["message"]).tags


def test_a_card_without_the_optional_columns():
    shown = card_html(queue_of([-1]).with_columns(title=pl.lit(None, pl.String)).row(0, named=True), DEFAULT_GUIDELINE)
    assert "(no title)" in shown and "unjudged" in shown and "None" not in shown and "suggested" not in shown


@pytest.mark.parametrize("grade", [-1, 0, 1, 2])
def test_colour_is_never_the_only_sign(grade):
    chip = grade_chip(grade, DEFAULT_GUIDELINE)
    assert GRADE_COLORS[grade] in chip
    assert ("unjudged" if grade < 0 else f"{grade} {DEFAULT_GUIDELINE.levels[grade].name}") in Tags(chip).texts


def send(card: ReviewCard, key, turn: int | None = None, note="") -> None:
    "A message as the browser sends it, through the widget's own handler."
    data = {"method": "custom", "content": {"key": key, "turn": card.view["turn"] if turn is None else turn, "note": note}}
    card._handle_msg({"content": {"data": data}, "buffers": []})


def test_keys_reach_the_file(tmp_path):
    card = review(queue_of([0, 1, 2, 0], category=list("abcd")), tmp_path, "ana")
    assert "query 0" in card.view["card"] and "<b>0</b> of 4 done" in card.view["status"]
    for key in "20su1":
        send(card, key)
    assert said(read_decisions(tmp_path / "ana.parquet")) == [("p0", 2), ("p1", 0), ("p2", 1)]
    assert "title 3" in card.view["card"] and card.view["turn"] == 5


def test_the_note_is_kept_cleared_and_brought_back(tmp_path, monkeypatch):
    card = review(queue_of([0, 1]), tmp_path, "ana")
    send(card, "2", note="right size")
    assert card.queue.decisions["why"].to_list() == ["right size"] and card.view["note"] == ""
    send(card, "u")
    assert card.view["note"] == "right size"
    monkeypatch.setattr(widgets, "save_decisions", lambda *_: (_ for _ in ()).throw(OSError("disk <full>")))
    send(card, "1", note="typed")
    assert card.view["note"] == "typed" and card.view["message"] == "Not saved: disk &lt;full&gt;" and "title 0" in card.view["card"]


@pytest.mark.parametrize("key, turn", [("3", None), ("S", None), ("", None), (None, None), (2, None), (["2"], None), ("2", -1), ("2", 7)])
def test_other_keys_and_answers_to_other_views_do_nothing(tmp_path, key, turn):
    card = review(queue_of([0, 1]), tmp_path, "ana")
    before = dict(card.view)
    send(card, key, turn)
    assert card.view == before and not (tmp_path / "ana.parquet").exists()


def test_a_hasty_second_key_does_not_grade_the_unseen_pair(tmp_path):
    card = review(queue_of([0, 1]), tmp_path, "ana")
    send(card, "2", turn=0)
    send(card, "2", turn=0)
    assert said(card.queue.decisions) == [("p0", 2)]


def test_the_end_sums_up_and_compares(tmp_path):
    judged(tmp_path, [0, 1, 2], ben=[2, 1, 2])
    card = review(queue_of([0, 1, 2]), tmp_path, "ana")
    for key in "212":
        send(card, key)
    shown = " ".join(Tags(card.view["card"]).texts)
    assert "3 pairs: 1 changed, 2 confirmed, 0 skipped" in shown and "Agreement" in shown and re.search(r"ana ben 3 1\.00", shown)
    send(card, "0")
    assert "nothing is left" in card.view["message"] and card.queue.decisions.height == 3
    send(card, "u")
    assert "title 2" in card.view["card"]


def test_the_end_bears_a_broken_file_of_somebody_else(tmp_path):
    (tmp_path / "ben.parquet").write_text("nothing")
    card = review(queue_of([0]), tmp_path, "ana")
    send(card, "0")
    assert "ben.parquet is no review file" in card.view["card"] and "1 confirmed" in card.view["card"]


def test_an_empty_queue_says_so(tmp_path):
    assert "nothing to review" in review(queue_of([]), tmp_path, "ana").view["card"]


def test_a_program_keeps_a_still_page_and_a_person_the_live_card_too(tmp_path, monkeypatch):
    card = review(queue_of([0, 1]), tmp_path, "ana")
    shown = card._repr_mimebundle_()[0]
    assert set(shown) == {"text/plain", "text/html"} and "title 0" in shown["text/html"] and shown["text/plain"] == "ReviewCard(ana, 2 of 2 pairs left)"
    send(card, "1")
    monkeypatch.setattr(widgets, "somebody_watches", lambda: True)
    shown = card._repr_mimebundle_()[0]
    assert shown[widgets.LIVE]["model_id"] == card.model_id and "title 1" in shown["text/html"]


@pytest.mark.parametrize("there, watched", [(None, False), (SimpleNamespace(), False), (SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=False)), False),
                                            (SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=True)), True)])
def test_who_can_be_asked_is_there(monkeypatch, there, watched):
    monkeypatch.setattr(widgets, "get_ipython", lambda: there)
    assert widgets.somebody_watches() is watched


def test_no_notebook_holds_the_name_of_a_live_widget():
    "JupyterLab saves it, and no page can draw it."
    cells = [(path.name, cell) for path in (ROOT / "nbs").rglob("[0-9a-z]*.ipynb") for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    holds = {name for name, cell in cells for output in cell.get("outputs", []) if widgets.LIVE in output.get("data", {})}
    assert not holds, f"{holds} hold live widgets; run them with `jupyter nbconvert --execute --inplace`, which keeps still pages"


def test_the_frame_has_a_button_for_each_key_and_the_guideline(tmp_path):
    shown = review_html(open_review(queue_of([0]), tmp_path, "ana"))
    assert re.findall(r'data-key="(.)"', shown.split("</style>")[1]) == ["0", "1", "2", "s", "u"]
    assert all(level.wording[:40] in shown for level in DEFAULT_GUIDELINE.levels) and DEFAULT_GUIDELINE.rules[0] in shown
