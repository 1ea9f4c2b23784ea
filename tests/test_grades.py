"""Grades: maps from other scales, consensus, the guideline as data."""
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mine_refine_nb.grades import (DEFAULT_GUIDELINE, ESCI_GRADES, UNJUDGED, WANDS_GRADES, Grade, Guideline, Level,
                                   consensus, from_average, from_four_point, guideline_from_dict, map_grades)


def test_the_scale_is_ordered_and_unjudged_is_no_grade():
    assert [int(g) for g in Grade] == [0, 1, 2]
    assert UNJUDGED == -1 and UNJUDGED not in list(Grade)


def test_published_labels():
    assert ESCI_GRADES == {"E": 2, "S": 1, "C": 1, "I": 0}
    assert WANDS_GRADES == {"Exact": 2, "Partial": 1, "Irrelevant": 0}
    mapped = map_grades(["I", "E", "C", "S"], ESCI_GRADES)
    assert mapped.dtype == np.int8 and mapped.tolist() == [0, 2, 1, 1]


def test_unknown_label_is_refused_with_its_count():
    with pytest.raises(ValueError, match=r"'X' has no grade \(2 of 3 labels\)"):
        map_grades(["E", "X", "X"], ESCI_GRADES)


def test_four_points():
    assert from_four_point([1, 2, 3, 4]).tolist() == [0, 1, 1, 2]
    with pytest.raises(ValueError, match="0 has no grade"): from_four_point([0])


@pytest.mark.parametrize("rating, low, high, grade", [
    (1, 1, 3, 0), (1.5, 1, 3, 0), (1.51, 1, 3, 1), (2.5, 1, 3, 1), (2.67, 1, 3, 2), (3, 1, 3, 2),
    (0.25, 0, 1, 0), (0.75, 0, 1, 1), (0.76, 0, 1, 2), (1.5, 0, 2, 1)])
def test_averaged_ratings_go_to_the_nearest_grade_ties_down(rating, low, high, grade):
    assert from_average([rating], low, high).tolist() == [grade]


@pytest.mark.parametrize("rating", [0.99, 3.01, float("nan"), float("inf")])
def test_averages_outside_the_scale_are_refused(rating):
    with pytest.raises(ValueError, match="outside 1 to 3"): from_average([2.0, rating])


@given(st.lists(st.floats(1, 3), min_size=1))
def test_averages_keep_the_order(ratings):
    grades = from_average(sorted(ratings))
    assert set(grades.tolist()) <= {0, 1, 2} and (np.diff(grades) >= 0).all()


@pytest.mark.parametrize("ratings, grade", [
    ([2], 2), ([1, 2], 1), ([0, 1], 0), ([0, 2], 1), ([0, 0, 2], 0), ([1, 1, 2, 2], 1)])
def test_consensus(ratings, grade):
    assert consensus(ratings) is Grade(grade)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=9))
def test_consensus_never_exceeds_the_median_nor_misses_it_by_one(ratings):
    assert 0 <= np.median(ratings) - consensus(ratings) < 1
    assert consensus(ratings) == consensus(ratings[::-1])


@pytest.mark.parametrize("ratings", [[], [3], [-1, 2], [1.5]])
def test_consensus_of_what_is_no_rating_is_refused(ratings):
    with pytest.raises(ValueError): consensus(ratings)


def test_the_default_guideline_has_every_level_in_every_locale():
    for level in DEFAULT_GUIDELINE.levels:
        per_locale = [sum(e.locale == locale for e in level.examples) for locale in ("en", "es", "ja")]
        assert all(2 <= count <= 3 for count in per_locale), (level.name, per_locale)
        assert level.wording and all(e.why for e in level.examples)
    assert {locale for locale, _ in DEFAULT_GUIDELINE.locale_notes} == {"en", "es", "ja"}


def test_a_guideline_survives_json():
    back = guideline_from_dict(json.loads(json.dumps(DEFAULT_GUIDELINE.to_dict())))
    assert back == DEFAULT_GUIDELINE and back.fingerprint == DEFAULT_GUIDELINE.fingerprint
    assert isinstance(back.levels[2].grade, Grade)


def test_any_change_changes_the_fingerprint():
    first = DEFAULT_GUIDELINE.levels[0]
    reworded = replace(first, wording=first.wording + " ")
    changed = [replace(DEFAULT_GUIDELINE, version="1.1"),
               replace(DEFAULT_GUIDELINE, rules=DEFAULT_GUIDELINE.rules[::-1]),
               replace(DEFAULT_GUIDELINE, levels=(reworded, *DEFAULT_GUIDELINE.levels[1:]))]
    assert len({g.fingerprint for g in [DEFAULT_GUIDELINE, *changed]}) == 4


@pytest.mark.parametrize("keep", [slice(0, 2), slice(None, None, -1), slice(0, 0)])
def test_a_guideline_needs_each_level_once_in_order(keep):
    with pytest.raises(ValueError, match="one level per grade"):
        Guideline("1", "task", DEFAULT_GUIDELINE.levels[keep])


def test_shown_text_is_escaped():
    levels = tuple(Level(grade, "<b>", "a < b & c", ()) for grade in Grade)
    shown = Guideline("1", "<script>", levels, ("<i>",), (("en", "<u>"),))._repr_html_()
    for raw in ("<script>", "a < b", "<i>", "<u>", "<b><"): assert raw not in shown
    assert "a &lt; b &amp; c" in shown
