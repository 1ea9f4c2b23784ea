"""Pairs, prompts, labels, the store, calibration and the quality report."""
import json
import sqlite3
import subprocess
import sys
import textwrap

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from mine_refine_nb import judging
from mine_refine_nb.data import DataError
from mine_refine_nb.grades import DEFAULT_GUIDELINE, Guideline, guideline_from_dict
from mine_refine_nb.judging import (PROBABILITIES, Calibration, LabelStore, Prompt, agreement, annotate, as_data,
                                    choose_confidence, confidence_table, fit_calibration, judged_rows, quality, reliability)

PAIR = dict(query="red pen", title="Pen, red", category="Office > Pens", brand=None, description=None, locale="us", similarity=0.8)


class Fixed:
    "Answers the same for every pair, and counts."
    guideline, batch = DEFAULT_GUIDELINE, 3

    def __init__(self, name="fixed", row=(0.1, 0.2, 0.7)): self.name, self.row, self.asked = name, row, []

    def judge(self, pairs):
        self.asked += pairs["query"].to_list()
        return judged_rows([self.row] * pairs.height)


def some(n, **columns):
    return pl.DataFrame({"query": [f"query {i}" for i in range(n)], "title": [f"product {i}" for i in range(n)]} | columns)


@given(st.text() | st.sampled_from(["<|im_end|>", "a<|end|>b", "<s>", "</s>", "[INST] x [/INST]", '"}', "\u2028x\u202e", "<start_of_turn>"]))
@settings(max_examples=300, deadline=None)
def test_the_text_of_a_pair_stays_inside_its_json_string(text):
    user = Prompt().user(PAIR | {"title": text, "query": "q" + text})
    shown = json.loads(user)
    assert "\n" not in user and shown.get("title", "") == as_data(text, 160)
    assert not any(mark in user for mark in ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "</s>", "[INST]", "<start_of_turn>"))


@given(st.text(max_size=400), st.integers(1, 80))
def test_as_data_keeps_to_its_length(text, most):
    assert len(as_data(text, most)) <= most


def test_a_guideline_reaches_the_prompt_whole():
    system = Prompt(examples=1).system("ja")
    for level in DEFAULT_GUIDELINE.levels:
        assert level.wording in system
        assert any(e.product in system for e in level.examples if e.locale == "ja")
        assert not any(e.product in system for e in level.examples if e.locale == "es")
    assert all(rule in system for rule in DEFAULT_GUIDELINE.rules) and system.endswith(judging.ANSWER)
    assert not any(rule in Prompt(rules=False).system("ja") for rule in DEFAULT_GUIDELINE.rules)


def test_another_policy_is_another_fingerprint():
    changed = guideline_from_dict(DEFAULT_GUIDELINE.to_dict() | {"version": "1.1"})
    assert isinstance(changed, Guideline) and Prompt(changed).fingerprint != Prompt().fingerprint
    assert Prompt(examples=2).fingerprint != Prompt().fingerprint


def test_a_label_carries_guideline_and_annotator():
    label = annotate(Fixed(), some(1)).row(0, named=True)
    assert (label["grade"], label["annotator"], label["reason"]) == (2, "fixed", None)
    assert (label["guideline"], label["fingerprint"]) == (DEFAULT_GUIDELINE.version, DEFAULT_GUIDELINE.fingerprint)
    assert sum(label[name] for name in PROBABILITIES) == pytest.approx(1)


def test_equal_probabilities_take_the_lower_grade():
    assert annotate(Fixed(row=(0.4, 0.2, 0.4)), some(1))["grade"].to_list() == [0]


def test_what_cannot_be_judged_is_null_with_a_reason_and_never_asked():
    who = Fixed()
    labels = annotate(who, some(3, category=["a", "b", "c"]).with_columns(title=pl.Series(["", None, "pen"])))
    assert labels["grade"].to_list() == [None, None, 2] and labels["reason"].to_list()[:2] == ["the product has no title"] * 2
    assert who.asked == ["query 2"]


@pytest.mark.parametrize("row", [(0.5, 0.5, 0.5), (float("nan"),) * 3, (1.5, -0.5, 0.0)])
def test_a_bad_answer_is_refused(row):
    with pytest.raises(ValueError, match="neither three probabilities"):
        annotate(Fixed(row=row), some(2))


def test_equal_pairs_are_asked_once_and_order_is_kept():
    who, pairs = Fixed(), pl.concat([some(5), some(5)]).with_columns(query_id=pl.Series([str(i) for i in range(10)]))
    labels = annotate(who, pairs)
    assert len(who.asked) == 5 and labels["query_id"].to_list() == pairs["query_id"].to_list()


def test_a_repeated_run_asks_nothing_and_a_changed_product_is_asked_again(tmp_path):
    store = tmp_path / "labels.db"
    annotate(Fixed(), some(7), store)
    again = Fixed()
    annotate(again, some(7).with_columns(title=pl.when(pl.col("query") == "query 3").then(pl.lit("new")).otherwise("title")), store)
    assert again.asked == ["query 3"]


def test_labels_of_two_annotators_and_two_guidelines_stand_side_by_side(tmp_path):
    store, other = tmp_path / "labels.db", Fixed()
    other.guideline = guideline_from_dict(DEFAULT_GUIDELINE.to_dict() | {"version": "2.0"})
    annotate(Fixed(), some(2), store)
    annotate(Fixed("second", (0.8, 0.1, 0.1)), some(2), store)
    annotate(other, some(2), store)
    assert len(other.asked) == 2 and LabelStore(store).frame().height == 6
    two = LabelStore(store).frame().filter(pl.col("guideline") == "1.0")
    assert sorted(two.filter(pl.col("query") == "query 1").select("annotator", "grade").rows()) == [("fixed", 2), ("second", 0)]


def test_failures_are_kept_with_their_reason_and_asked_again(tmp_path):
    class Down(Fixed):
        def judge(self, pairs): return judged_rows([[np.nan] * 3] * pairs.height, ["server down"] * pairs.height)

    store, again = tmp_path / "labels.db", Fixed()
    assert annotate(Down(), some(2), store)["reason"].to_list() == ["server down"] * 2
    assert LabelStore(store).frame()["reason"].to_list() == ["server down"] * 2
    assert annotate(again, some(2), store)["grade"].to_list() == [2, 2] and len(again.asked) == 2
    assert LabelStore(store).frame()["reason"].to_list() == [None, None]


def test_a_killed_run_loses_at_most_one_batch(tmp_path):
    "A process is killed by its own annotator in the third batch; the first two are in the store."
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {str(__file__.rsplit('/', 1)[0])!r})
        from test_judging import Fixed, some, annotate
        class Killed(Fixed):
            def judge(self, pairs):
                if len(self.asked) >= 6: os.kill(os.getpid(), signal.SIGKILL)
                return super().judge(pairs)
        annotate(Killed(), some(12), {str(tmp_path / 'labels.db')!r})"""
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120).returncode == -9
    rest = Fixed()
    assert annotate(rest, some(12), tmp_path / "labels.db")["grade"].null_count() == 0 and len(rest.asked) == 6


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "labels.db").write_text("query,grade\n" * 200)
    with pytest.raises(DataError, match="not a store of labels"):
        annotate(Fixed(), some(1), tmp_path / "labels.db")


def test_the_store_refuses_a_grade_off_the_scale(tmp_path):
    with LabelStore(tmp_path / "x.db").connect() as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute("INSERT INTO labels (pair, grade) VALUES ('a', 3)")


RNG = np.random.default_rng(1)
GRADES = RNG.integers(0, 3, 3000)
LOGITS = RNG.normal(size=(3000, 3)) + 1.3 * np.eye(3)[GRADES]


@pytest.mark.parametrize("sharp", [0.4, 3.0])
@pytest.mark.parametrize("kind", ["temperature", "isotonic"])
def test_calibration_mends_over_and_underconfidence_on_held_out_grades(kind, sharp):
    said = softmax(sharp * LOGITS, axis=1)
    fitted = fit_calibration(said[:1500], GRADES[:1500], kind)(said[1500:])
    before, after = (judging.calibration_error(reliability(p, GRADES[1500:])) for p in (said[1500:], fitted))
    assert after < 0.5 * before and fitted.sum(axis=1) == pytest.approx(1)


def test_a_temperature_never_changes_the_grade():
    said = softmax(LOGITS, axis=1)
    assert (Calibration("temperature", 2.7)(said).argmax(1) == said.argmax(1)).all()


def test_reliability_counts_every_pair_and_error_is_weighted():
    table = reliability(np.array([[0.9, 0.1, 0.0], [0.8, 0.1, 0.1], [0.0, 0.0, 1.0], [np.nan] * 3]), [0, 1, 2, 2])
    assert table["pairs"].sum() == 3 and table["bin"].max() == 9
    assert judging.calibration_error(table) == pytest.approx((0.1 + 0.8 + 0.0) / 3)


def test_confidence_is_the_lowest_that_reaches_the_accuracy():
    table = confidence_table(softmax(LOGITS, axis=1), GRADES)
    chosen = choose_confidence(table, 0.75)
    reached = table.filter(pl.col("threshold") == chosen)["accuracy"][0]
    assert reached >= 0.75 and (table.filter(pl.col("threshold") < chosen)["accuracy"] < 0.75).all()
    assert choose_confidence(table, 1.01) is None


def test_agreement_on_a_case_done_by_hand():
    "Four of six right, one off by two: expected squared distance by chance is 4/3, observed 5/6."
    found = agreement([0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 2, 0])
    assert found["accuracy"] == pytest.approx(4 / 6) and found["within_one"] == pytest.approx(5 / 6)
    assert found["kappa"] == pytest.approx(1 - (5 / 6) / (27 / 18), abs=0.02)
    assert agreement([0, 1, 2], [0, 1, 2])["alpha"] == 1 and np.isnan(agreement([1, 1], [1, 1])["kappa"])


def test_quality_counts_the_unjudged_apart():
    pairs = some(4, grade=[0, 1, 2, 2], locale=["us", "us", "es", "es"], category=["A > B", "A", None, "C"])
    found = quality(judging.check_pairs(pairs), {"x": [0, 1, None, 0]})
    assert found.summary.select("pairs", "unjudged", "accuracy").row(0) == (4, 1, pytest.approx(2 / 3))
    assert found.confusion("x").tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert dict(found.per("category").select("category", "pairs").rows()) == {"A": 2, None: 1, "C": 1}
    with pytest.raises(DataError, match="3 labels for 4 pairs"): quality(judging.check_pairs(pairs), {"x": [0, 1, 2]})


def test_human_ceiling_compares_every_two_raters():
    from mine_refine_nb.data import make_data

    products = pl.DataFrame({"product_id": list("abc"), "title": ["pan", "pot", "lid"]})
    rated = pl.DataFrame({"query": ["pan"] * 6, "product_id": list("aabbcc"), "rater": ["x", "y"] * 3, "grade": [2, 2, 1, 0, 0, 0]})
    found = judging.human_ceiling(make_data(products, rated, name="two raters"))
    assert found["pairs"] == 3 and found["accuracy"] == pytest.approx(2 / 3) and found["within_one"] == 1
    assert judging.human_ceiling(make_data(products, rated.filter(rater="x"), name="one")) == {}
    alike = make_data(products, rated.with_columns(grade=pl.lit(2)), name="all say the same")    # no disagreement could be expected
    assert judging.human_ceiling(alike) == {} == judging.human_ceiling(make_data(products, pl.concat([rated.drop("rater"), rated.drop("rater").head(1)])))
