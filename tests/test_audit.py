"""The audit of judgments: the log, the places, the habits, the raters, the claims, and what becomes of them."""
import json
import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from scipy import integrate, stats

from mine_refine_nb import audit as au
from mine_refine_nb import auditing
from mine_refine_nb.audit_report import audit_tiles, write_audit_report
from mine_refine_nb.data import CORRECTION_COLUMNS, COUNTS, DataError, RelevanceData, load_data, make_data
from mine_refine_nb.grades import DEFAULT_GUIDELINE
from mine_refine_nb.judging import PROBABILITIES, judged_rows, pairs_of
from mine_refine_nb.market import build_market, true_grades
from mine_refine_nb.shoppers import PANEL, observe, rate, traps
from mine_refine_nb.widgets import open_review

PAIR = ["query_id", "product_id"]
SESSIONS = 30_000


@pytest.fixture(scope="module")
def market(): return build_market(600, 90)


@pytest.fixture(scope="module")
def seen(market):
    "The market as its owner sees it: one fallible rater per pair."
    return observe(market, sessions=SESSIONS)


@pytest.fixture(scope="module")
def found(seen): return au.audit(seen)


@pytest.fixture(scope="module")
def right(market):
    "The market with true grades and a log."
    return observe(market, sessions=SESSIONS, per_pair=0)


@pytest.fixture(scope="module")
def panel(market):
    "The market graded by three raters per pair."
    return observe(market, sessions=SESSIONS, per_pair=3)


def known(market, pairs: pl.DataFrame) -> pl.DataFrame:
    "Pairs with their true grade."
    return pairs.with_columns(true_grades(market, pairs).alias("true"))


# a shop small enough to count by hand

PRODUCTS = pl.DataFrame(dict(product_id=["007", "8", "9"], title=["Iron pan", "Steel pot", "Glass lid"],
                             category=["Kitchen > Pans", "Kitchen > Pots", "Kitchen > Lids"], brand=["Ferro", None, "Vitro"]))
JUDGED = [("iron pan", "007", 2, "en"), ("iron pan", "8", 0, "en"), ("glass lid", "9", 2, "en"), ("glass lid", "8", 1, "en"),
          ("pan", "007", 2, "en"), ("pan", "007", 1, "es")]


def small(judged=JUDGED, **more) -> RelevanceData:
    return make_data(PRODUCTS, pl.DataFrame(judged, schema=["query", "product_id", "grade", "locale"], orient="row"), name="small", **more)


def log_of(*rows) -> pl.DataFrame:
    "Rows of query, product, four counts; then position and locale."
    schema = dict(query=pl.String, product_id=pl.String, **dict.fromkeys(COUNTS, pl.Int64), position=pl.Int64, locale=pl.String)
    return pl.DataFrame(rows, schema=schema, orient="row")


GOOD = [("iron pan", "007", 100, 40, 10, 5, 1, "en"), ("iron pan", "8", 90, 4, 1, 0, 2, "en"), ("glass lid", "9", 80, 30, 9, 4, 1, "en"),
        ("glass lid", "8", 70, 9, 1, 1, 2, "en"), ("iron pan", "9", 5, 0, 0, 0, 3, "en")]


def folded(log, data=None) -> list[tuple]:
    "A log as `judged_log` folds it: query, locale, product, position, counts."
    data = data or small()
    rows = au.judged_log(au.open_log(log), data.judgments).join(data.queries, on="query_id")
    return sorted(rows.select("query", "locale", "product_id", "position", *COUNTS).rows(), key=repr)


def as_file(log: pl.DataFrame, kind: str, folder):
    "A log as the audit may be given it."
    if kind == "frame": return log
    if kind == "lazy": return log.lazy()
    path = folder / f"log.{kind}"
    getattr(log, f"write_{kind}")(path)
    return str(path) if kind == "csv" else path


# the log

WRONG = {"a count is missing": dict(clicks=None), "a count is negative": dict(purchases=-1),
         "there are clicks without impressions": dict(impressions=0, clicks=1), "clicks exceed impressions": dict(impressions=8),
         "purchases exceed impressions": dict(purchases=71), "position is below 1": dict(position=0),
         "a count is not a whole number": dict(clicks=1.5)}


def spoilt(at: int, **change) -> pl.DataFrame:
    "The good log with one row changed."
    log = log_of(*GOOD).with_row_index("at")
    return log.with_columns(pl.when(at=at).then(pl.lit(value)).otherwise(name).alias(name) for name, value in change.items()).drop("at")


def test_every_wrong_count_is_tried(): assert set(WRONG) == set(au.WRONG_COUNTS)


@pytest.mark.parametrize("kind", ["frame", "lazy", "csv", "parquet"])
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_count_is_named_with_its_row(what, kind, tmp_path):
    log = au.open_log(as_file(spoilt(3, **WRONG[what]), kind, tmp_path))
    with pytest.raises(DataError, match=rf"row 4: {what}: .*'glass lid'.*'8'"): au.check_log(log, PRODUCTS)


@pytest.mark.parametrize("column", COUNTS)
def test_each_count_must_be_there_and_not_negative(column):
    for value, what in ((None, "a count is missing"), (-1, "a count is negative")):
        with pytest.raises(DataError, match=f"row 1: {what}"): au.audit(small(), spoilt(0, **{column: value}))


def test_a_log_that_breaks_off_is_refused(tmp_path):
    rows = log_of(*GOOD).head(1).to_dicts() * 20_000
    pl.DataFrame(rows).with_columns(pl.col("clicks").cast(pl.String)).write_csv(tmp_path / "log.csv")
    text = (tmp_path / "log.csv").read_text().splitlines()
    (tmp_path / "log.csv").write_text("\n".join([*text, text[-1].replace(rows[0]["query"], "pan,x").replace("70", "seventy")]) + "\n")
    with pytest.raises(DataError, match="cannot be read to its end.*Correct or remove that row"): au.check_log(au.open_log(tmp_path / "log.csv"), PRODUCTS)


def test_the_first_of_several_wrong_rows_is_named():
    rows = log_of(*GOOD).to_dicts()
    for row in rows[1:3]: row["clicks"] = 1000
    with pytest.raises(DataError, match="row 2: clicks exceed impressions"): au.check_log(au.open_log(pl.DataFrame(rows)), PRODUCTS)


def test_counts_at_the_limit_are_fine():
    au.check_log(au.open_log(log_of(("pan", "8", 7, 7, 9, 7, 1, "en"), ("pan", "9", 0, 0, 0, 0, None, None))), PRODUCTS)


@pytest.mark.parametrize("column", ["query", "product_id", *COUNTS])
def test_a_missing_column_is_named(column):
    with pytest.raises(DataError, match=f"no column '{column}'"): au.audit(small(), log_of(*GOOD).drop(column))


def test_unknown_products_are_counted_and_one_is_named():
    log = pl.concat([log_of(*GOOD), log_of(("pan", "7", 1, 0, 0, 0, 1, "en"), ("pan", "7", 2, 0, 0, 0, 2, "en"), ("pan", "x", 1, 0, 0, 0, 1, "en"))])
    with pytest.raises(DataError, match="2 products .* not in the catalogue .*'7'.*'007' is not '7'"): au.audit(small(), log)


@pytest.mark.parametrize("kind", ["frame", "lazy", "csv", "parquet"])
def test_a_log_reads_alike_from_everywhere(kind, tmp_path):
    "'007' stays text in a CSV file, too."
    assert folded(as_file(log_of(*GOOD), kind, tmp_path)) == folded(log_of(*GOOD))
    assert ("iron pan", "en", "007", 1, 100, 40, 10, 5) in folded(as_file(log_of(*GOOD), kind, tmp_path))


def test_a_log_without_places_or_locales():
    bare = log_of(*GOOD).drop("position", "locale")
    assert [row[3] for row in folded(bare)] == [None] * 4
    assert [row[4:] for row in folded(bare)] == [row[4:] for row in folded(log_of(*GOOD))]
    assert [row[4:] for row in folded(log_of(*GOOD).with_columns(locale=pl.lit(None, pl.String)))] == [row[4:] for row in folded(bare)]


def test_queries_are_one_in_any_case_and_spacing():
    log = log_of(("iron pan", "007", 10, 5, 2, 1, 1, "en"), ("  IRON \t Pan ", "007", 3, 1, 1, 0, 1, "en"), ("ironpan", "007", 9, 9, 9, 9, 1, "en"))
    assert folded(log) == [("iron pan", "en", "007", 1, 13, 6, 3, 1)]


def test_a_text_of_two_locales_needs_the_locale():
    row = ("pan", "007", 10, 5, 2, 1, 1)
    assert folded(log_of((*row, "en"))) == [("pan", "en", "007", 1, 10, 5, 2, 1)]
    assert folded(log_of((*row, "es"))) == [("pan", "es", "007", 1, 10, 5, 2, 1)]
    assert folded(log_of((*row, None))) == folded(log_of((*row, "ja"))) == []


counts = st.tuples(st.sampled_from(["iron pan", "IRON  pan", "glass lid", "pan", "other"]), st.sampled_from(["007", "8", "9"]),
                   *[st.integers(0, 9)] * 4, st.sampled_from([1, 2, None]), st.sampled_from(["en", "es", None]))


@given(st.lists(counts, min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_sums_are_kept(rows):
    "Against sums in plain Python."
    homes = {(" ".join(q.lower().split()), locale): {p for q2, p, _, l2 in JUDGED if (q2, l2) == (q, locale)} for q, _, _, locale in JUDGED}
    want = {}
    for query, product, *numbers, position, locale in rows:
        text = " ".join(query.lower().split())
        places = [home for home in homes if home[0] == text and locale in (home[1], None)]
        if len(places) == 1 and product in homes[places[0]]:
            held = want.setdefault((*places[0], product, position), [0] * 4)
            held[:] = [a + b for a, b in zip(held, numbers)]
    assert folded(log_of(*rows)) == sorted([(*key, *value) for key, value in want.items()], key=repr)


def test_small_integers_do_not_overflow():
    log = log_of(*[("pan", "007", 2 * 10 ** 9, 100, 0, 0, 1, "en")] * 3)
    for kind in (pl.Int32, pl.UInt32): assert folded(log.with_columns(pl.col(COUNTS).cast(kind))) == [("pan", "en", "007", 1, 6 * 10 ** 9, 300, 0, 0)]


def test_a_log_about_something_else_is_refused():
    with pytest.raises(DataError, match="no row of the engagement is about a judged pair"): au.audit(small(), log_of(("toaster", "8", 9, 1, 0, 0, 1, "en")))
    with pytest.raises(DataError, match="small has no engagement"): au.audit(small())


ODD = {"ids are numbers": lambda log: log.with_columns(product_id=pl.when(product_id="007").then(7).otherwise(pl.col("product_id").cast(int))),
       "a count is text": lambda log: log.with_columns(clicks=pl.col("clicks").cast(pl.String) + "x"),
       "a position is text": lambda log: log.with_columns(position=pl.lit("top"))}


@pytest.mark.parametrize("what, kind", [(what, kind) for what in ODD for kind in ("frame", "parquet", "csv") if (what, kind) != ("ids are numbers", "csv")])
def test_a_column_of_another_type_is_explained(what, kind, tmp_path):
    with pytest.raises(DataError, match="product|clicks|position"): au.audit(small(), as_file(ODD[what](log_of(*GOOD)), kind, tmp_path))


@pytest.mark.parametrize("name", ["log.parquet", "log.txt", "empty.csv"])
def test_a_file_that_is_no_log_is_explained(name, tmp_path):
    (tmp_path / name).write_text("" if name.startswith("empty") else "no log")
    with pytest.raises(DataError, match=name): au.audit(small(), tmp_path / name)


@pytest.mark.parametrize("name", ["locale", "row"])
def test_columns_without_a_say(name):
    assert folded(log_of(*GOOD).with_columns(pl.lit(None).alias(name))) == folded(log_of(*GOOD).with_columns(locale=pl.lit(None, pl.String)) if name == "locale" else log_of(*GOOD))
    au.audit(small(), log_of(*GOOD).with_columns(pl.lit(None).alias(name)))


@pytest.mark.parametrize("locale", ["en", None])
def test_queries_that_differ_in_case_only_share_the_log_or_are_told_apart(locale):
    data = small([*JUDGED, ("Iron Pan", "007", 1, "en")])
    log = log_of(("iron pan", "007", 10, 4, 1, 0, 1, locale), ("Iron Pan", "007", 20, 6, 2, 1, 1, locale))
    rows = {tuple(au.judged_log(au.open_log(log), data.judgments.sample(fraction=1, shuffle=True, seed=seed)).sort("query_id").rows()) for seed in range(10)}
    assert len(rows) == 1 and len(next(iter(rows))) == 2


# the places

@given(st.lists(st.integers(0, 400), min_size=1, max_size=20), st.integers(1, 500))
@settings(max_examples=150, deadline=None)
def test_places_share_until_they_have_clicks(clicks, least):
    bins = au.place_bins(np.array(clicks), least)
    assert bins[0] == 0 and set(np.diff(bins)) <= {0, 1} and len(bins) == len(clicks)
    assert bins[-1] == 0 or (np.bincount(bins, clicks) >= least).all()
    for b in range(bins[-1]):    # and no longer than that
        assert sum(c for c, mine in zip(clicks, bins) if mine == b) - max(0, [c for c, mine in zip(clicks, bins) if mine == b][-1]) < least


EXAMINED = np.array([1, .6, .45, .3, .25, .2, .15, .1])


def placed(seed, pairs=400, size=200.0) -> pl.DataFrame:
    "Counts of pairs that stand higher the better they are."
    rng = np.random.default_rng(seed)
    appeal = np.sort(rng.uniform(.05, .7, pairs))[::-1]
    home = np.linspace(0, len(EXAMINED) - 1, pairs)[:, None]
    shown = rng.poisson(size * np.exp(-abs(np.arange(len(EXAMINED)) - home) / 1.5))
    clicks = rng.binomial(shown, appeal[:, None] * EXAMINED).astype(np.int64)
    pair, place = np.nonzero(shown)
    shown = shown.astype(np.int64)
    return pl.DataFrame(dict(query_id="q", product_id=[f"p{i:03}" for i in pair], position=place + 1, impressions=shown[pair, place], clicks=clicks[pair, place],
                             add_to_carts=0, purchases=0))


@pytest.mark.parametrize("seed", range(4))
def test_examination_is_recovered_although_the_best_stand_on_top(seed):
    log = placed(seed)
    places = au.examination(log)
    assert places["position"].to_list() == list(range(1, 9)) and places["examined"][0] == 1
    assert abs(places["examined"].to_numpy() / EXAMINED - 1).max() < 0.2
    raw = (places["clicks"] / places["impressions"]).to_numpy()
    assert raw[-1] / raw[0] < EXAMINED[-1] / 2    # what clicks per impression would say
    sums = log.group_by("position").agg(pl.col("impressions", "clicks").sum()).sort("position")
    assert_frame_equal(places.drop("examined"), sums)


def test_examination_has_no_unit():
    log = placed(0)
    want = au.examination(log)["examined"].to_numpy()
    np.testing.assert_allclose(au.examination(log.with_columns(pl.col("impressions") * 7))["examined"], want, rtol=1e-9)
    np.testing.assert_allclose(au.examination(log.with_columns(pl.col("impressions", "clicks") * 7), least=1400)["examined"], want, rtol=1e-9)
    np.testing.assert_allclose(au.examination(log.sample(fraction=1, shuffle=True, seed=1))["examined"], want, rtol=1e-9)


def test_places_with_few_clicks_share_a_value():
    log, least = placed(0, size=15.0), 200
    places = au.examination(log, least)
    told = places.group_by("examined").agg(pl.col("clicks").sum(), pl.col("position"))
    assert 2 <= told.height < 8 and (told["clicks"] >= least).all()
    assert all(set(np.diff(sorted(p))) <= {1} for p in told["position"])
    assert au.examination(log, 10 ** 6)["examined"].to_list() == [1.0] * 8


def test_pairs_seen_at_one_place_say_nothing_about_places():
    log = placed(0)
    stuck = pl.DataFrame(dict(query_id="z", product_id=[f"s{i}" for i in range(8)], position=range(1, 9), impressions=100_000, clicks=range(90_000, 10_000, -10_000),
                              add_to_carts=0, purchases=0), schema=log.schema)
    both = au.examination(pl.concat([log, stuck]))
    np.testing.assert_allclose(both["examined"], au.examination(log)["examined"], rtol=1e-12)
    assert both["clicks"].sum() == log["clicks"].sum() + stuck["clicks"].sum()
    assert au.examination(stuck).is_empty() and au.examination(stuck).columns == both.columns


def test_looks_are_weighed_impressions():
    log = log_of(("q", "a", 100, 9, 3, 2, 1, None), ("q", "a", 60, 3, 1, 0, 2, None), ("q", "b", 40, 2, 0, 0, None, None)).rename(dict(query="query_id"))
    places = pl.DataFrame(dict(position=[1, 2], examined=[1.0, 0.5]))
    looked = au.looks_of(log, places).sort("product_id")
    assert looked.select("product_id", *COUNTS, "looks").rows() == [("a", 160, 12, 4, 2, 130.0), ("b", 40, 2, 0, 0, 40.0)]


def test_without_places_the_audit_says_so(seen):
    blind = au.audit(seen, seen.engagement.drop("position"))
    assert blind.places.is_empty() and any(note.what == "places known" for note in blind.notes)
    assert (blind.pairs["looks"] == blind.pairs["impressions"]).all()


def test_places_of_the_market_are_found(found):
    want = found.places["position"].to_numpy() ** -0.8
    assert found.places.height == 16 and abs(found.places["examined"].to_numpy() - want).max() < 0.06
    assert not any(note.what == "places known" for note in found.notes)


def test_more_carts_than_clicks_are_told_and_cut(seen):
    full = seen.engagement.with_columns(add_to_carts="clicks", purchases="clicks")
    odd = au.audit(seen, full.with_columns(pl.col("add_to_carts") + 1, purchases=pl.min_horizontal("impressions", pl.col("purchases") + 1)))
    note = next(note for note in odd.notes if "add-to-carts" in note.what)
    assert note.count == odd.pairs.filter(pl.col("impressions") > 0).height
    assert aligned(odd, au.audit(seen, full)) < 1e-9


# the habits

def rates(seed, n=4000, mean=.2, shape=3.0):
    rng = np.random.default_rng(seed)
    looks = rng.gamma(1, 60, n)
    return rng.poisson(looks * rng.gamma(shape, mean / shape, n)).astype(float), looks


@pytest.mark.parametrize("seed, mean, shape", [(0, .2, 3.0), (1, .05, 1.0), (2, .5, 10.0)])
def test_rates_are_recovered(seed, mean, shape):
    counts, looks = rates(seed, mean=mean, shape=shape)
    got_mean, got_shape = au.fit_rate(counts, looks, np.ones(len(looks)))
    assert got_mean == pytest.approx(mean, rel=.06) and got_shape == pytest.approx(shape, rel=.25)


@pytest.mark.parametrize("seed, mean, weight", [(0, .3, 8.0), (1, .1, 20.0), (2, .6, 3.0)])
def test_shares_are_recovered(seed, mean, weight):
    rng = np.random.default_rng(seed)
    whole = rng.poisson(rng.gamma(1, 20, 6000)).astype(float)
    part = rng.binomial(whole.astype(int), rng.beta(mean * weight, (1 - mean) * weight, 6000)).astype(float)
    got_mean, got_weight = au.fit_share(part, whole, np.ones(6000))
    assert got_mean == pytest.approx(mean, rel=.06) and got_weight == pytest.approx(weight, rel=.25)


@pytest.mark.parametrize("fit", [au.fit_rate, au.fit_share])
def test_weights_of_nothing_and_of_everything(fit):
    part, whole = rates(0)
    part = np.minimum(part, np.floor(whole))
    whole, ones = np.floor(whole), np.ones(len(part))
    want = fit(part, whole, ones)
    ignored = fit(np.append(part, [500, 0]), np.append(whole, [500, 10 ** 6]), np.append(ones, [0, 0]))
    np.testing.assert_allclose(ignored, want, rtol=1e-9)
    np.testing.assert_allclose(fit(part, whole, ones * 3), want, rtol=1e-9)
    twice = np.tile(part, 2), np.tile(whole, 2)
    np.testing.assert_allclose(fit(*twice, np.ones(2 * len(part))), want, rtol=1e-9)


@pytest.mark.parametrize("fit", [au.fit_rate, au.fit_share])
def test_one_giant_pair_does_not_rule(fit):
    part, whole = (np.floor(x) for x in rates(0, n=500))
    part, ones = np.minimum(part, whole), np.ones(500)
    mean, alike = fit(part, whole, ones)
    giant = fit(np.append(part, 600_000), np.append(whole, 10 ** 6), np.append(ones, 1))
    assert giant[0] == pytest.approx(mean, rel=.05) and giant[1] == pytest.approx(alike, rel=.3)
    assert (part.sum() + 600_000) / (whole.sum() + 10 ** 6) > 2 * mean    # pooled counts would be ruled


@pytest.mark.parametrize("fit", [au.fit_rate, au.fit_share])
def test_nothing_to_fit_is_no_crash(fit):
    for part, whole in ((np.zeros(3), np.zeros(3)), (np.zeros(3), np.full(3, 9.0)), (np.full(3, 9.0), np.full(3, 9.0)), (np.zeros(0), np.zeros(0))):
        assert np.isfinite(fit(part, whole, np.ones(len(part)))).all()


HABITS = au.Habits(click=.3, click_shape=4.0, cart=.2, cart_weight=6.0, purchase=.4, purchase_weight=9.0)


def test_evidence_is_the_integral_over_all_products_of_the_grade():
    h, looks, (clicks, carts, bought) = HABITS, 25.0, (9, 3, 1)
    click = integrate.quad(lambda r: stats.poisson.pmf(clicks, looks * r) * stats.gamma.pdf(r, h.click_shape, scale=h.click / h.click_shape), 0, 5)[0]
    def share(k, n, mean, weight): return integrate.quad(lambda s: stats.binom.pmf(k, n, s) * stats.beta.pdf(s, mean * weight, (1 - mean) * weight), 0, 1)[0]
    want = np.log(click) + np.log(share(carts, clicks, h.cart, h.cart_weight)) + np.log(share(bought, carts, h.purchase, h.purchase_weight))
    got = au.log_evidence(h, np.array([[clicks, carts, bought]], float), np.array([looks]))
    assert got[0] == pytest.approx(want, rel=1e-5)


def test_what_nobody_looked_at_is_no_evidence():
    assert au.log_evidence(HABITS, np.zeros((2, 3)), np.array([0.0, 30.0])).tolist() == [0.0, pytest.approx(-4 * np.log(1 + 30 * .3 / 4))]


def test_clickiness_leaves_the_pair_itself_out():
    group, clicks, due = np.array([0, 0, 0, 1]), np.array([30.0, 10, 20, 99]), np.array([10.0, 10, 10, 1])
    got = au.clickiness(group, clicks, due)
    assert got == pytest.approx([40 / 30, 60 / 30, 50 / 30, 1.0])
    clicks[0] = 1000
    assert au.clickiness(group, clicks, due)[0] == got[0] and (au.clickiness(group, clicks, due)[1:3] > 10).all()
    assert au.clickiness(group, clicks, due, calm=1e9) == pytest.approx(np.ones(4), rel=1e-5)


def evidence_of(clicks, looks, query, product, said) -> au.Evidence:
    n = len(clicks)
    return au.Evidence(np.stack([clicks, np.zeros(n), np.zeros(n)], axis=1), looks, query, product, np.arange(n), np.zeros(n, int), said)


def test_scale_is_that_of_query_and_product():
    "Queries of keener shoppers, and a product that all click; looks are plenty, so the calm hardly matters."
    rng, query, product = np.random.default_rng(0), np.repeat(np.arange(30), 30), np.tile(np.arange(30), 30)
    keen, lure = np.where(np.arange(30) < 6, 2.0, 1.0), np.where(np.arange(30) == 3, 2.5, 1.0)
    said = rng.integers(0, 3, 900)
    looks, rate = np.full(900, 3000.0), np.array([.05, .1, .2])[said] * keen[query] * lure[product]
    scale = au.scale_looks(evidence_of(rng.poisson(looks * rate).astype(float), looks, query, product, said), np.eye(3)[said])
    want = keen[query] * lure[product]
    assert np.median(scale[(query < 6)]) / np.median(scale[query >= 6]) == pytest.approx(2, rel=.1)
    assert np.median(scale[product == 3]) / np.median(scale[product != 3]) == pytest.approx(2.5, rel=.1)
    assert np.corrcoef(np.log(scale), np.log(want))[0, 1] > .95


# the raters

def test_confusion_is_recovered_and_rows_sum_to_one():
    rng, n = np.random.default_rng(0), 30_000
    want = np.array([rater.confusion for rater in PANEL[-2:]])
    rater, true = rng.integers(0, 2, n), rng.integers(0, 3, n)
    said = (rng.random((n, 1)) > want[rater, true].cumsum(1)[:, :2]).sum(1)
    got = au.fit_confusion(rater, said, np.eye(3)[true])
    np.testing.assert_allclose(got.sum(2), 1)
    np.testing.assert_allclose(got, want, atol=.025)


def test_a_rater_of_whom_little_is_known_is_believed_to_be_usual():
    np.testing.assert_allclose(au.BELIEF.sum(1), 1)
    got = au.fit_confusion(np.array([1]), np.array([2]), np.array([[1.0, 0, 0]]))
    np.testing.assert_allclose(got[0], au.BELIEF)
    np.testing.assert_allclose(got[1, 1:], au.BELIEF[1:])
    np.testing.assert_allclose(got[1, 0], (au.BELIEF_PAIRS * au.BELIEF[0] + [0, 0, 1]) / (au.BELIEF_PAIRS + 1))


@pytest.fixture(scope="module")
def told_apart(panel): return au.audit(panel)


def test_careless_and_leaning_raters_are_found(told_apart):
    table = {name: frame.sort("true").select("said_0", "said_1", "said_2").to_numpy() for (name,), frame in told_apart.confusion.partition_by("rater", as_dict=True).items()}
    assert set(table) == {rater.name for rater in PANEL}
    for matrix in table.values(): np.testing.assert_allclose(matrix.sum(1), 1)
    good = {name: matrix.trace() for name, matrix in table.items()}
    assert min(good, key=good.get) == "careless" and good["careless"] < good["ana"] - .3
    up, down = ({name: m[0, 1] + m[0, 2] + m[1, 2] for name, m in table.items()}, {name: m[2, 1] + m[2, 0] + m[1, 0] for name, m in table.items()})
    assert max(up, key=lambda name: up[name] - down[name]) == "lenient" and max(up, key=lambda name: down[name] - up[name]) == "strict"


def test_what_raters_and_shoppers_say_together_beats_the_median(panel, market, told_apart):
    pairs = known(market, told_apart.pairs)
    best = pairs.select(pl.concat_list(PROBABILITIES).list.arg_max()).to_series()
    assert (best != pairs["true"]).mean() < 0.7 * (pairs["grade"] != pairs["true"]).mean()


def rated() -> RelevanceData:
    rows = [("pan", "007", 2, "a"), ("pan", "007", 1, "b"), ("pan", "007", 1, None), ("pan", "8", 0, "a"), ("lid", "9", 2, "b")]
    return make_data(PRODUCTS, pl.DataFrame(rows, schema=["query", "product_id", "grade", "rater"], orient="row"), name="rated")


def votes(data) -> list[tuple]:
    return sorted(au.votes_of(data).join(data.judgments.with_row_index("pair"), on="pair").select("query", "product_id", "rater", "grade").rows())


def correction(data, query, product, grade, by="eve", why="seen", old=None) -> pl.DataFrame:
    row = data.judgments.filter(query=query, product_id=product).row(0, named=True)
    return pl.DataFrame([dict(query_id=row["query_id"], product_id=product, grade=grade, old_grade=row["grade"] if old is None else old, by=by, why=why)])


def test_everybody_votes():
    assert votes(rated()) == [("lid", "9", "b", 2), ("pan", "007", "a", 2), ("pan", "007", "b", 1), ("pan", "007", "unnamed", 1), ("pan", "8", "a", 0)]


def test_a_corrected_pair_has_one_vote_of_who_corrected_it():
    data = au.correct(rated(), correction(rated(), "pan", "007", 0))
    want = [("lid", "9", "b", 2), ("pan", "007", "eve", 0), ("pan", "8", "a", 0)]
    assert votes(data) == want
    again = au.correct(data, correction(data, "pan", "007", 2, by="max"))
    assert votes(again) == [want[0], ("pan", "007", "max", 2), want[2]]


def test_without_ratings_the_judgments_are_one_voice():
    data = small()
    assert {row[2] for row in votes(data)} == {"judgments"} and len(votes(data)) == len(JUDGED)
    data = au.correct(data, correction(data, "iron pan", "8", 2))
    assert [row for row in votes(data) if row[2] != "judgments"] == [("iron pan", "8", "eve", 2)] and len(votes(data)) == len(JUDGED)


# the claims

def test_an_audit_is_about_every_judgment_once(found, seen):
    assert_frame_equal(found.pairs.select(*PAIR, "grade").sort(PAIR), seen.judgments.select(*PAIR, "grade").sort(PAIR))
    np.testing.assert_allclose(found.pairs.select(PROBABILITIES).to_numpy().sum(1), 1)
    order = found.pairs.select(claim="claim", gap=-(pl.col("claim") * pl.col("gap")), off=-pl.col("off"))
    assert order.select(order.columns[1:]).rows() == sorted(order.select(order.columns[1:]).rows()) and found.habits["click"].is_sorted() and found.habits["cart"].is_sorted()
    np.testing.assert_allclose(found.confusion.select("said_0", "said_1", "said_2").to_numpy().sum(1), 1)


def test_the_queue_is_as_promised(found):
    queue = found.queue
    assert set(queue.columns) == {"query_id", "query", "product_id", "title", "category", "brand", "locale", "grade", "suggested", "gap", "direction", "score", "off",
                                  "p0", "p1", "p2", "evidence"}
    assert dict(queue.schema) | dict(grade=pl.Int8, suggested=pl.Int8, gap=pl.Int8, score=pl.Float64, evidence=pl.String) == dict(queue.schema)
    assert 0 < queue.height == found.pairs["claim"].sum() and (queue["score"] > 0).all() and queue.null_count().select("title", "evidence", "score").sum_horizontal()[0] == 0
    assert (queue["gap"] == (queue["suggested"] - queue["grade"]).abs()).all()
    assert (queue["direction"] == (queue["suggested"] > queue["grade"]).replace_strict({True: "too low", False: "too high"}, return_dtype=pl.String)).all()
    assert_frame_equal(queue, found.pairs.filter("claim").select(queue.columns))


def test_evidence_says_the_counts(found, seen):
    total = seen.engagement.group_by("query", "locale", "product_id").agg(pl.col(COUNTS).sum())
    for row in found.queue.head(10).iter_rows(named=True):
        counted = found.pairs.filter(query_id=row["query_id"], product_id=row["product_id"]).row(0, named=True)
        assert total.filter(query=row["query"], locale=row["locale"], product_id=row["product_id"]).select(COUNTS).row(0) == tuple(counted[name] for name in COUNTS)
        words = ["irrelevant", "moderately relevant", "relevant"]
        assert row["evidence"].startswith(f"Shown {counted['impressions']} times, looked at about {counted['looks']:.0f} times, {counted['clicks']} clicks ({words[row['grade']]} ")
        assert f", {words[row['suggested']]} ones " in row["evidence"]


def test_what_was_never_shown_is_no_claim(found, market):
    unseen = found.pairs.filter(pl.col("impressions") == 0)
    assert unseen.join(traps(market).unseen, on=PAIR, how="semi").height > 10
    assert (unseen["score"] < 0).all() and unseen["evidence"].str.starts_with("Never shown").all()
    assert next(note.count for note in found.notes if "never shown" in note.what) == unseen.height


@pytest.mark.parametrize("per_pair", [2, 3])
def test_raters_who_differ_about_what_was_never_shown_are_no_claim(market, per_pair):
    claims = [au.audit(observe(market, sessions=3000, per_pair=per_pair, seed=seed)).queue for seed in range(3)]
    assert not pl.concat(claims)["evidence"].str.starts_with("Never shown").any()


def test_a_rare_grade_is_no_claim_by_itself():
    "One judgment in 25 says moderate; behaviour is the same for all, a quarter was never shown."
    rng, n = np.random.default_rng(0), 2000
    products = pl.DataFrame(dict(product_id=[f"p{i}" for i in range(n)], title=[f"title {i}" for i in range(n)]))
    judged = products.select("product_id", query=pl.Series([f"query {i % 100}" for i in range(n)]), grade=pl.Series(np.where(rng.random(n) < .04, 1, 2)))
    clicks = rng.binomial(100, .3, n)
    log = judged.select("query", "product_id", impressions=100, clicks=pl.Series(clicks), add_to_carts=pl.Series(rng.binomial(clicks, .3)), purchases=0)
    assert (au.audit(make_data(products, judged), log.head(1500)).queue["evidence"].str.starts_with("Never shown")).sum() == 0


@pytest.mark.parametrize("seed", range(3))
def test_mistakes_are_found_far_above_chance(market, seed):
    data = observe(market, sessions=SESSIONS, seed=seed)
    pairs = known(market, au.audit(data).pairs)
    chance = (pairs["grade"] != pairs["true"]).mean()
    curve = au.found_at(pairs, [.02, .1])
    assert chance < .2 and curve["precision"][0] > .75 and curve["precision"][1] > 3 * chance and curve["recall_by_two"][1] > .5
    claims = pairs.filter(pl.col("score") > 0)
    assert claims.height > 40 and (claims["grade"] != claims["true"]).mean() > .6
    fixed = (claims["suggested"] == claims["true"]).sum() - (claims["grade"] == claims["true"]).sum()
    assert fixed > .1 * (pairs["grade"] != pairs["true"]).sum()


def planted(right: RelevanceData, old: int, new: int, n=12) -> tuple[RelevanceData, pl.DataFrame]:
    "True grades, but for some well-seen pairs; and those pairs."
    seen = au.looks_of(au.judged_log(au.open_log(right.engagement), right.judgments), au.examination(right.engagement.clear()))
    chosen = (right.judgments.filter(grade=old).join(seen.filter(pl.col("impressions") > 300), on=PAIR, how="semi").sample(n, seed=0)
              .select(PAIR).with_columns(new=pl.lit(new, pl.Int8)))
    judged = right.judgments.join(chosen, on=PAIR, how="left", maintain_order="left").with_columns(grade=pl.coalesce("new", "grade")).drop("new")
    return replace(right, judgments=judged), chosen


@pytest.mark.parametrize("old, new, least", [(0, 2, .8), (2, 0, .8), (0, 1, .25), (1, 0, .1), (1, 2, .4), (2, 1, .5)])
def test_planted_mistakes_are_found_in_both_directions(right, old, new, least):
    data, wrong = planted(right, old, new)
    queue = au.audit(data).queue
    hits = queue.join(wrong, on=PAIR)
    assert hits.height >= least * wrong.height and set(hits["direction"]) == {"too high" if new > old else "too low"}
    assert (hits["suggested"] == old).mean() > .8
    if abs(old - new) == 2: assert queue.head(wrong.height).join(wrong, on=PAIR).height >= .75 * wrong.height


def test_true_grades_are_hardly_doubted(right):
    queue = au.audit(right).queue
    assert queue.height < .04 * right.judgments.height and (queue["gap"] == 2).sum() <= 1


@pytest.fixture(scope="module")
def baited(market):
    "Pairs of bait products that are rightly graded below relevant, of three worlds, audited."
    parts = []
    for seed in range(3):
        pairs, bait = known(market, au.audit(observe(market, sessions=SESSIONS, seed=seed)).pairs), traps(market, seed=seed).bait
        parts.append(pairs.join(bait, on="product_id", how="semi").filter(pl.col("grade") == pl.col("true"), pl.col("true") < 2, pl.col("clicks") > 5))
    return pl.concat(parts)


def test_popular_but_wrong_is_not_called_relevant(baited):
    claimed = baited.filter("claim", direction="too low")
    assert baited.height > 20 and claimed.height < .2 * baited.height and not (claimed["gap"] == 2).any()
    assert ((baited["clicks"] / baited["looks"]) > .3).mean() > .5    # they are clicked as relevant ones are


def aligned(one: au.Audit, two: au.Audit) -> float:
    "The largest difference of two audits' probabilities."
    both = one.pairs.select(*PAIR, *PROBABILITIES).join(two.pairs.select(*PAIR, *PROBABILITIES), on=PAIR)
    assert both.height == one.pairs.height == two.pairs.height
    return max((both[name] - both[f"{name}_right"]).abs().max() for name in PROBABILITIES)


def test_the_order_of_rows_does_not_matter(seen, found):
    shuffled = replace(seen, judgments=seen.judgments.sample(fraction=1, shuffle=True, seed=1), products=seen.products.sample(fraction=1, shuffle=True, seed=2))
    other = au.audit(shuffled, seen.engagement.sample(fraction=1, shuffle=True, seed=3))
    assert aligned(found, other) < 1e-6
    assert set(found.queue.select(PAIR).rows()) == set(other.queue.select(PAIR).rows())


def test_an_audit_repeats_itself(seen, found):
    again = au.audit(seen)
    for name in ("pairs", "places", "habits", "confusion"): assert_frame_equal(getattr(again, name), getattr(found, name))
    assert again.notes == found.notes


@pytest.mark.parametrize("kind", ["csv", "parquet", "lazy"])
def test_an_audit_of_a_file_is_the_audit_of_the_frame(seen, found, kind, tmp_path):
    assert aligned(found, au.audit(replace(seen, engagement=None), as_file(seen.engagement, kind, tmp_path))) < 1e-9


def test_an_eager_query_is_no_crowd_of_mistakes(right):
    "All clicks of three queries doubled, with all that follows from clicks."
    before = au.audit(right)
    spare = before.pairs.group_by("query_id").agg(pl.col("clicks").sum(), pairs=pl.len()).sort("clicks").filter(pl.col("pairs") > 12).tail(3)
    texts = right.queries.join(spare, on="query_id", how="semi")["query"]
    eager = right.engagement.with_columns(pl.when(pl.col("query").is_in(texts.implode())).then(2 * pl.col(name)).otherwise(name).alias(name) for name in COUNTS[1:])
    eager = eager.with_columns(impressions=pl.max_horizontal("impressions", "clicks"))
    after = au.audit(right, eager)
    def claims(audit): return audit.queue.join(spare, on="query_id", how="semi").height
    assert after.pairs.join(spare, on="query_id", how="semi")["clicks"].sum() == 2 * spare["clicks"].sum()
    assert spare["pairs"].sum() > 40 and claims(after) <= claims(before) + 2
    both = after.pairs.select(*PAIR, "scale").join(before.pairs.select(*PAIR, old="scale"), on=PAIR).join(spare, on="query_id", how="semi")
    ratio = (both["scale"] / both["old"]).median()
    assert 1.5 < ratio < 2.2


def test_an_annotator_helps_where_it_answered(market, seen, found):
    "A witness that is usually right; nulls are pairs that it was not asked."
    true = true_grades(market, seen.judgments).to_numpy()
    said = np.where(np.random.default_rng(0).random(len(true)) < .8, true, np.random.default_rng(1).integers(0, 3, len(true)))
    labels = seen.judgments.select(PAIR).hstack(pl.DataFrame(np.eye(3)[said] * .7 + .1, schema=list(PROBABILITIES)))
    curve = au.found_at(known(market, au.audit(seen, labels=labels).pairs), [.1])
    assert curve["recall"][0] > au.found_at(known(market, found.pairs), [.1])["recall"][0] + .08
    asked = pl.int_range(pl.len()) % 3 == 0
    some = labels.with_columns(pl.when(asked).then(name).alias(name) for name in PROBABILITIES)
    assert aligned(au.audit(seen, labels=some), au.audit(seen, labels=labels.filter(asked))) < 1e-9
    assert aligned(au.audit(seen, labels=some.clear()), found) < 1e-9
    assert aligned(au.audit(seen, labels=some.with_columns(pl.lit(None, pl.Float64).alias(name) for name in PROBABILITIES)), found) < 1e-9
    stranger = pl.concat([some, some.head(1).with_columns(product_id=pl.lit("nowhere"))])
    assert aligned(au.audit(seen, labels=stranger), au.audit(seen, labels=some)) < 1e-9


def test_an_annotator_that_says_the_usual_says_nothing(seen, found):
    "Its probabilities are held against the mix of grades, which counts already."
    usual = found.pairs.select(*PAIR, *(pl.col(name).mean() for name in PROBABILITIES))
    assert np.ptp(usual.select(PROBABILITIES).row(0)) > .05 and aligned(au.audit(seen, labels=usual), found) < .15


def test_one_grade_alone_does_not_break_the_fit(seen):
    same = replace(seen, judgments=seen.judgments.with_columns(grade=pl.lit(2, pl.Int8)))
    assert np.isfinite(au.audit(same).pairs.select(*PROBABILITIES, "score", "off").to_numpy()).all()


def test_a_log_of_few_or_no_clicks_does_not_break_the_fit():
    for log in (log_of(*GOOD), log_of(*[(*row[:3], 0, 0, 0, *row[6:]) for row in GOOD]), log_of(*[(*row[:2], 0, 0, 0, 0, *row[6:]) for row in GOOD])):
        got = au.audit(small(), log)
        assert np.isfinite(got.pairs.select(*PROBABILITIES, "score", "scale").to_numpy()).all() and got.queue.is_empty()


def test_pairs_are_ranked_by_how_far_off_they_are():
    rows = [(2, .0, .1, .9), (2, .6, .3, .1), (0, .3, .6, .1), (1, .45, .1, .45), (0, .1, .0, .9), (1, .2, .7, .1)]
    pairs = pl.DataFrame(rows, schema=["grade", *PROBABILITIES], orient="row").with_columns(pl.col("grade").cast(pl.Int8), name=pl.Series(list("abcdef")), e0=pl.col("p0").log(), e1=pl.col("p1").log(), e2=pl.col("p2").log())
    got = au.rank_pairs(pairs)
    assert got["name"].to_list() == ["e", "b", "d", "c", "f", "a"]
    assert got.select("suggested", "gap", "direction").rows() == [(2, 2, "too low"), (0, 2, "too high"), (0, 1, "too high"), (1, 1, "too low"), (0, 1, "too high"), (1, 1, "too high")]
    np.testing.assert_allclose(got["off"], [1.8, 1.5, .9, .8, .3, .1])
    np.testing.assert_allclose(got["score"], np.log([.9 / .1, .6 / .1, .45 / .1, .6 / .3, .2 / .7, .1 / .9]))


def test_ties_keep_their_order_and_zero_is_no_infinity():
    pairs = pl.DataFrame(dict(name=list("abc"), grade=pl.Series([0] * 3, dtype=pl.Int8), p0=0.0, p1=0.0, p2=1.0, e0=0.0, e1=0.0, e2=0.0))
    got = au.rank_pairs(pairs)
    assert not got["claim"].any() and got["name"].to_list() == list("abc") and got["score"].is_finite().all()


# reading an audit

def made(rows, **more) -> au.Audit:
    "An audit of these pairs."
    return au.Audit(pl.DataFrame(rows), pl.DataFrame(), pl.DataFrame(), pl.DataFrame(), (), **more)


CLAIMS = [dict(category="Food > Tea", locale="en", grade=2, gap=2, direction="too high", score=1.0, claim=True), dict(category="Food > Oil", locale="en", grade=0, gap=1, direction="too low", score=.5, claim=True),
          dict(category="Food", locale="es", grade=2, gap=2, direction="too high", score=-1.0, claim=False), dict(category="Toys > Car", locale="es", grade=1, gap=1, direction="too low", score=-2.0, claim=False)]


def test_claims_are_counted_per_group():
    per = made(CLAIMS).per
    assert sorted(per("top").rows()) == [("Food", 3, 2, 1, 2 / 3), ("Toys", 1, 0, 0, 0.0)]
    assert per("locale").rows() == [("en", 2, 2, 1, 1.0), ("es", 2, 0, 0, 0.0)]
    assert sorted(per("direction").rows()) == [("too high", 2, 1, 1, .5), ("too low", 2, 1, 0, .5)]
    with pytest.raises(ValueError, match="no column 'shop'"): per("shop")


def test_found_at_counts_what_a_budget_finds():
    ranked = pl.DataFrame(dict(grade=[0, 2, 1, 2, 0, 1, 0, 1, 2, 2], true=[2, 2, 0, 2, 0, 1, 2, 1, 2, 2])).cast(pl.UInt8)
    assert au.found_at(ranked, [.01, .2, .3, 1.0]).rows() == [(.01, 1, 1.0, 1 / 3, .5), (.2, 2, .5, 1 / 3, .5), (.3, 3, 2 / 3, 2 / 3, .5), (1.0, 10, .3, 1.0, 1.0)]
    assert au.found_at(ranked.with_columns(true="grade"), [.5]).rows() == [(.5, 5, 0, 0, 0)]


def test_the_third_voice_sides_with_whom_behaviour_fits():
    def row(name, grade, evidence, impressions=10): return dict(query_id="q", product_id=name, grade=grade, impressions=impressions) | dict(zip(au.BEHAVIOUR, evidence))
    pairs = [row("a", 2, (0., -5., -9.)), row("b", 2, (-9., -5., 0.)), row("c", 2, (-1., 0., -1.5)), row("d", 1, (0., -3., -9.)), row("same", 2, (0., 0., -9.)),
             row("unseen", 2, (0., 0., 0.), 0), row("unjudged", 2, (0., 0., -9.))]
    labels = pl.DataFrame(dict(query_id="q", product_id=["a", "b", "c", "d", "same", "unseen", "unjudged"], grade=[0, 0, 0, 0, 2, 0, None]))
    audited = made(pairs)
    audited = replace(audited, pairs=audited.pairs.with_columns(pl.col("grade").cast(pl.Int8)))
    assert au.third_voice(audited, labels).rows() == [(1, 0, 1, 0.0, 1.0, 0.0), (2, 0, 3, 1 / 3, 1 / 3, 1 / 3)]
    assert au.third_voice(audited, labels, least=0.1).rows()[1] == (2, 0, 3, pytest.approx(1 / 3), pytest.approx(2 / 3), 0.0)


# escalation

class Told:
    "An annotator that says what it was told to, per product."
    guideline, batch = DEFAULT_GUIDELINE, 2

    def __init__(self, answers, name="senior"): self.answers, self.name, self.asked = answers, name, 0

    def judge(self, pairs):
        self.asked += pairs.height
        rows = [self.answers[product] for product in pairs["product_id"]]
        return judged_rows([row or [np.nan] * 3 for row in rows], [None if row else "no answer" for row in rows])


ANSWERS = dict(sure_same_way=[.9, .05, .05], sure_half_way=[.05, .9, .05], sure_old=[.05, .05, .9], unsure=[.6, .2, .2], silent=None, exactly=[.7, .2, .1],
               low_same=[.0, .2, .8], low_other=[.9, .1, .0])


def doubted() -> tuple[pl.DataFrame, pl.DataFrame]:
    "A queue with one row per answer, and the texts of its pairs."
    high = [name for name in ANSWERS if not name.startswith("low")]
    rows = [dict(query_id="q", query="pan", product_id=name, title=name, grade=2, suggested=0, direction="too high", evidence=f"Evidence of {name}.") for name in high]
    rows += [dict(query_id="q", query="pan", product_id=name, title=name, grade=1, suggested=2, direction="too low", evidence=f"Evidence of {name}.") for name in ANSWERS if name not in high]
    queue = pl.DataFrame(rows).with_columns(pl.col("grade", "suggested").cast(pl.Int8))
    return queue, queue.select("query_id", "query", "product_id", "title")


def test_escalation_corrects_confirms_or_leaves_to_people():
    queue, pairs = doubted()
    got = au.escalate(queue, Told(ANSWERS), pairs, confidence=.7)
    assert got.corrections.columns == list(CORRECTION_COLUMNS)
    assert got.corrections.select("product_id", "grade", "old_grade", "by").rows() == [
        ("sure_same_way", 0, 2, "senior"), ("sure_half_way", 1, 2, "senior"), ("exactly", 0, 2, "senior"), ("low_same", 2, 1, "senior")]
    assert got.corrections["why"][0] == "Evidence of sure_same_way. The annotator says 0 with 0.9."
    assert got.confirmed["product_id"].to_list() == ["sure_old"]
    assert got.people["product_id"].to_list() == ["unsure", "silent", "low_other"]
    assert got.people.columns == got.confirmed.columns == queue.columns


def test_escalation_asks_once_and_remembers(tmp_path):
    queue, pairs = doubted()
    annotator = Told(ANSWERS | dict(silent=[.2, .2, .6]))
    first = au.escalate(queue, annotator, pairs.sample(fraction=1, shuffle=True, seed=0), store=tmp_path / "labels.db")
    second = au.escalate(queue, annotator, pairs, store=tmp_path / "labels.db")
    assert annotator.asked == queue.height
    for part in ("corrections", "confirmed", "people"): assert_frame_equal(getattr(first, part), getattr(second, part))
    everything = [name for part in (first.corrections, first.confirmed, first.people) for name in part["product_id"]]
    assert sorted(everything) == sorted(queue["product_id"])


def test_an_empty_queue_escalates_to_nothing():
    queue, pairs = doubted()
    got = au.escalate(queue.clear(), Told(ANSWERS), pairs.clear())
    assert got.corrections.height == got.confirmed.height == got.people.height == 0


# corrections

def grade_of(data, query, product) -> int: return data.judgments.filter(query=query, product_id=product, locale="en")["grade"].item()


def test_a_correction_changes_one_grade_and_keeps_the_old_one():
    data = small()
    fixed = au.correct(data, correction(data, "iron pan", "8", 2))
    assert grade_of(fixed, "iron pan", "8") == 2 and grade_of(data, "iron pan", "8") == 0 and data.corrections is None
    others = pl.col("product_id").ne("8") | pl.col("query").ne("iron pan")
    assert_frame_equal(fixed.judgments.filter(others), data.judgments.filter(others))
    assert fixed.judgments.schema == data.judgments.schema
    assert fixed.corrections.drop("query_id").rows() == [("8", 2, 0, "eve", "seen")]
    assert fixed.fingerprint != data.fingerprint


def test_history_is_part_of_the_fingerprint():
    data = small()
    there = au.correct(data, correction(data, "iron pan", "8", 2))
    back = au.correct(there, correction(there, "iron pan", "8", 0))
    assert_frame_equal(back.judgments, data.judgments)
    assert len({data.fingerprint, there.fingerprint, back.fingerprint}) == 3


def test_a_first_grade_joins_the_split_of_its_query(tmp_path):
    data = small()
    first = correction(data, "iron pan", "8", 1, old=-1).with_columns(product_id=pl.lit("9"))
    fixed = au.correct(data, first)
    assert fixed.judgments.height == data.judgments.height + 1 and fixed.judgments.schema == data.judgments.schema
    assert fixed.judgments.row(-1) == data.judgments.filter(query="iron pan", product_id="8").with_columns(product_id=pl.lit("9"), grade=pl.lit(1, pl.Int8)).row(0)
    assert ("iron pan", "9", "eve", 1) in votes(fixed)
    fixed.save(tmp_path / "fixed")
    assert load_data(tmp_path / "fixed").fingerprint == fixed.fingerprint


def test_correcting_twice_keeps_both():
    data = small()
    once = au.correct(data, correction(data, "iron pan", "8", 2, by="eve"))
    twice = au.correct(once, correction(once, "iron pan", "8", 1, by="max", why="half"))
    assert twice.corrections.select("grade", "old_grade", "by", "why").rows() == [(2, 0, "eve", "seen"), (1, 2, "max", "half")]
    assert grade_of(twice, "iron pan", "8") == 1


def test_a_correction_that_changes_nothing_is_no_history():
    data = small()
    both = pl.concat([correction(data, "iron pan", "8", 0), correction(data, "glass lid", "8", 2)])
    assert au.correct(data, both).corrections["product_id"].to_list() == ["8"]
    assert au.correct(data, both).corrections["old_grade"].to_list() == [1]


def test_corrections_are_saved_and_loaded(tmp_path):
    data = small(engagement=log_of(*GOOD))
    fixed = au.correct(data, correction(data, "iron pan", "8", 2))
    fixed.save(tmp_path / "fixed")
    again = load_data(tmp_path / "fixed")
    assert_frame_equal(again.corrections, fixed.corrections)
    assert again.fingerprint == fixed.fingerprint and grade_of(again, "iron pan", "8") == 2
    assert "1 corrected grades" in again._repr_html_()


def refused(data, corrections, says):
    with pytest.raises(DataError, match=says): au.correct(data, corrections)


def test_corrections_that_do_not_fit_are_refused():
    data = small()
    good = correction(data, "iron pan", "8", 2)
    refused(data, correction(data, "iron pan", "8", 2, old=1), "product_id 8 of query_id .* has grade 0 here, the correction knows 1")
    refused(data, good.with_columns(product_id=pl.lit("9")), "product_id 9 .* is not judged here")
    refused(data, good.with_columns(product_id=pl.lit("none"), old_grade=pl.lit(-1)), "product_id none .* has a query or a product that is unknown here")
    refused(data, good.with_columns(query_id=pl.lit("none"), old_grade=pl.lit(-1)), "query_id none has a query or a product that is unknown here")
    refused(data, good.with_columns(old_grade=pl.lit(-1)), "has grade 0 here, the correction knows -1")
    refused(data, pl.concat([good, good.with_columns(grade=pl.lit(1, pl.Int64))]), "'8' is corrected twice")
    refused(data, pl.concat([good, good]), "'8' is corrected twice")
    refused(au.correct(data, good), good, "has grade 2 here, the correction knows 0")
    refused(data, good.drop("why"), "missing: why")
    for grade in (-1, 3): refused(data, good.with_columns(grade=pl.lit(grade)), f"is 0, 1 or 2, not {grade}")
    refused(data, good.with_columns(grade=pl.lit(None, pl.Int8)), "is 0, 1 or 2, not None")


@pytest.mark.parametrize("change", [dict(grade=300), dict(grade=1.5), dict(grade="two"), dict(old_grade=None)], ids=repr)
def test_corrections_of_another_kind_are_refused(change):
    data = small()
    good = correction(data, "iron pan", "8", 2)
    refused(data, good.with_columns(pl.lit(value).alias(name) for name, value in change.items()), "grade")


def test_no_correction_is_no_change():
    data = small()
    assert au.correct(data, correction(data, "iron pan", "8", 0)).fingerprint == data.fingerprint


# the report

@pytest.fixture(scope="module")
def page(found, tmp_path_factory):
    path = write_audit_report(tmp_path_factory.mktemp("report") / "audit.html", found, "my shop")
    return path.read_text(encoding="utf-8")


def words(page: str) -> str:
    "What a reader sees, without scripts and tags."
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)).split())


def test_the_report_holds_numbers_queue_and_evidence(page, found):
    text = words(page).replace("&#39;", "'").replace("&amp;", "&")
    assert "Label audit: my shop" in text and f"doubted {found.queue.height}" in text
    for row in found.queue.head(30).iter_rows(named=True):
        assert " ".join(row["title"].split()) in text and row["evidence"] in text
    assert "never shown" in text and "Direction" in text and "Category" in text and "What raters do" in text
    assert "People against annotator" not in text and "http:" not in re.sub(r"<script>.*?</script>", "", page, flags=re.S)


def test_without_an_annotator_nothing_became_of_the_claims(page):
    assert "What became of the claims" not in words(page)


def test_tiles_count(found):
    tiles = {tile["what"]: tile["value"] for tile in audit_tiles(found)}
    assert tiles["judgments"] == f"{found.pairs.height:,}" and tiles["doubted"] == str(found.queue.height)
    assert tiles["by two grades"] == str((found.queue["gap"] == 2).sum())
    assert tiles["ever shown"] == f"{1 - found.pairs.filter(impressions=0).height / found.pairs.height:.0%}"


HOSTILE = "<script>alert('boo')</script><img src=x onerror=boo()>"


def test_hostile_texts_stay_text(found, tmp_path):
    columns = ("query", "title", "category", "brand", "locale", "evidence")
    bad = replace(found, pairs=found.pairs.with_columns(pl.lit(HOSTILE).alias(name) for name in columns),
                  confusion=found.confusion.with_columns(rater=pl.lit(HOSTILE)))
    queue, pairs = doubted()
    hostile = au.escalate(queue, Told(ANSWERS, HOSTILE), pairs)
    voices = pl.DataFrame([dict(grade=2, label=0, pairs=3, people=1 / 3, annotator=1 / 3, nobody=1 / 3)])
    page = write_audit_report(tmp_path / "audit.html", bad, HOSTILE, hostile, voices).read_text(encoding="utf-8")
    assert HOSTILE not in page and "<img src=x" not in page and "alert(&#39;boo&#39;)" in page
    assert "<img src=x" not in bad._repr_html_() and "<script>" not in bad._repr_html_()


def test_the_report_tells_what_became_of_the_claims(found, tmp_path):
    queue, pairs = doubted()
    voices = pl.DataFrame([dict(grade=2, label=0, pairs=31, people=.25, annotator=.5, nobody=.25)])
    text = words(write_audit_report(tmp_path / "audit.html", found, "shop", au.escalate(queue, Told(ANSWERS), pairs), voices, rows=3).read_text(encoding="utf-8"))
    assert "What became of the claims" in text and re.search(r"corrected 4 confirmed 1 left to people 3", text)
    assert "People against annotator" in text and "31" in text
    assert f"and {found.queue.height - 3} more in queue.parquet" in text and found.queue["evidence"][3].replace("'", "&#39;") not in text


def test_a_report_without_claims_and_places(tmp_path):
    calm = au.audit(small(), log_of(*GOOD).drop("position"))
    text = words(write_audit_report(tmp_path / "audit.html", calm, "calm").read_text(encoding="utf-8"))
    assert "No judgment is doubted." in text and "the log has no positions" in text and "more in queue.parquet" not in text
    assert "0 of 6 judgments" in words(calm._repr_html_())


def test_an_audit_shows_itself(found):
    shown = found._repr_html_()
    assert f"{found.queue.height} of {found.pairs.height:,} judgments" in words(shown) and shown.count("<tr>") == 6 and "never shown" in shown


# files

@pytest.fixture(scope="module")
def shop(seen, tmp_path_factory):
    "A data folder with a log."
    folder = tmp_path_factory.mktemp("shop")
    seen.products.write_parquet(folder / "products.parquet")
    seen.judgments.drop("query_id").write_parquet(folder / "judgments.parquet")
    seen.engagement.drop("query_id").write_parquet(folder / "engagement.parquet")
    return folder


@pytest.fixture(scope="module")
def audited(shop, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "audit"
    return auditing.audit_files(shop, out), out


def test_an_audit_leaves_its_files(audited, found, shop):
    numbers, out = audited
    assert {file.name for file in out.iterdir()} == {"audit.html", "audit.json", "queue.parquet", "pairs.parquet"}
    assert json.loads((out / "audit.json").read_text()) == numbers
    assert numbers == {"data": shop.name, "judgments": found.pairs.height, "ever shown": (found.pairs["impressions"] > 0).sum(), "doubted": found.queue.height,
                       "by two grades": (found.queue["gap"] == 2).sum(), "too high": (found.queue["direction"] == "too high").sum(),
                       "too low": (found.queue["direction"] == "too low").sum()}
    queue = pl.read_parquet(out / "queue.parquet")
    assert queue.columns == found.queue.columns and set(queue.select(PAIR).rows()) == set(found.queue.select(PAIR).rows())


def test_another_log_can_be_given(shop, tmp_path):
    log = pl.read_parquet(shop / "engagement.parquet").drop("position")
    log.write_csv(tmp_path / "log.csv")
    data, given = auditing.audited_data(shop, tmp_path / "log.csv")
    assert given == tmp_path / "log.csv" and data.engagement is None and au.audit(data, given).places.is_empty()


def test_folders_that_cannot_be_audited(shop, tmp_path):
    def fails(says, *arguments):
        with pytest.raises(DataError, match=says): auditing.audit_files(*arguments)
        assert not (tmp_path / "out").exists()
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("products", "judgments"): (bare / f"{name}.parquet").symlink_to(shop / f"{name}.parquet")
    fails("has no engagement file", bare, tmp_path / "out")
    log_of(*GOOD).write_csv(bare / "engagement.csv")
    log_of(*GOOD).write_parquet(bare / "engagement.parquet")
    fails("both engagement.parquet and engagement.csv", bare, tmp_path / "out")
    (bare / "engagement.csv").unlink()
    fails("nowhere.csv is no file", bare, tmp_path / "out", tmp_path / "nowhere.csv")
    fails("is not a folder", tmp_path / "typo", tmp_path / "out")
    fails("holds no annotator", shop, tmp_path / "out", None, tmp_path)


def test_an_annotator_that_was_not_good_enough_is_refused_before_the_work(tmp_path, monkeypatch, shop):
    monkeypatch.setattr(auditing, "audit", lambda *_: pytest.fail("audited all the same"))
    (tmp_path / "annotator.json").write_text("{}")
    (tmp_path / "quality.json").write_text('{"confidence": null}')
    with pytest.raises(DataError, match="not good enough"): auditing.audit_files(shop, tmp_path / "out", None, tmp_path)


def test_needed_confidence(tmp_path):
    with pytest.raises(DataError, match="holds no annotator"): auditing.needed_confidence(tmp_path)
    (tmp_path / "annotator.json").write_text("{}")
    assert auditing.needed_confidence(tmp_path) == auditing.DEFAULT_CONFIDENCE == 0.7
    (tmp_path / "quality.json").write_text('{"confidence": 0.83}')
    assert auditing.needed_confidence(tmp_path) == 0.83


def test_an_annotator_that_a_run_found_too_weak_is_refused(tmp_path):
    (tmp_path / "annotator").mkdir()
    (tmp_path / "annotator" / "annotator.json").write_text("{}")
    (tmp_path / "annotator.json").write_text('{"confidence": 0.62}')    # a run writes it beside its annotator
    assert auditing.needed_confidence(tmp_path / "annotator") == 0.62
    (tmp_path / "annotator.json").write_text('{"confidence": null}')
    with pytest.raises(DataError, match="not good enough"): auditing.needed_confidence(tmp_path / "annotator")


@pytest.fixture(scope="module")
def escalated(shop, market, tmp_path_factory):
    "An audit whose worst forty claims an annotator judged that knows the truth, but is unsure now and then."
    folder, out = tmp_path_factory.mktemp("annotator"), tmp_path_factory.mktemp("out")
    (folder / "annotator.json").write_text("{}")
    (folder / "quality.json").write_text('{"confidence": 0.8}')
    class Truth:
        name, guideline, batch = "truth", DEFAULT_GUIDELINE, 16
        def judge(self, pairs):
            true = true_grades(market, pairs).to_numpy()
            sure = np.array([.9 if int(p[1:]) % 4 else .75 for p in pairs["product_id"]])[:, None]
            return judged_rows(np.eye(3)[true] * (sure - (1 - sure) / 2) + (1 - sure) / 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auditing, "open_annotator", lambda at: Truth() if at == folder else pytest.fail("another folder"))
        return auditing.audit_files(shop, out, None, folder, 40), out


def test_claims_that_an_annotator_judged(escalated, market):
    numbers, out = escalated
    corrections, people = pl.read_parquet(out / "corrections.parquet"), pl.read_parquet(out / "people.parquet")
    assert numbers["corrected"] == corrections.height > 5 and numbers["left to people"] == people.height > 3
    assert numbers["corrected"] + numbers["confirmed"] + numbers["left to people"] == 40
    assert (known(market, corrections)["true"] == corrections["grade"]).all() and set(corrections["by"]) == {"truth"}
    assert (out / "labels.db").exists() and "left to people" in words((out / "audit.html").read_text(encoding="utf-8"))
    queue = pl.read_parquet(out / "queue.parquet").head(40)
    assert set(corrections.select(PAIR).rows()) | set(people.select(PAIR).rows()) <= set(queue.select(PAIR).rows())


def errors(data, market) -> int: return (known(market, data.judgments)["true"] != data.judgments["grade"]).sum()


def test_corrections_make_a_better_folder_that_can_be_audited_again(escalated, shop, market, tmp_path):
    numbers, out = escalated
    auditing.correct_folder(shop, out / "corrections.parquet", tmp_path / "fixed")
    fixed, before = load_data(tmp_path / "fixed"), load_data(shop)
    assert fixed.corrections.height == numbers["corrected"] == errors(before, market) - errors(fixed, market)
    again = auditing.audit_files(tmp_path / "fixed", tmp_path / "again")
    assert again["doubted"] < numbers["doubted"] and again["judgments"] == numbers["judgments"]
    with pytest.raises(DataError, match="corrections do not fit"): auditing.correct_folder(tmp_path / "fixed", out / "corrections.parquet", tmp_path / "twice")
    with pytest.raises(DataError, match="is there and not empty"): auditing.correct_folder(shop, out / "corrections.parquet", shop)
    assert not (tmp_path / "twice").exists()


def test_corrections_of_a_review(audited, shop, market, tmp_path):
    "Two people judge three claims: one change agreed on, one confirmed, one that they differ about goes down."
    queue = pl.read_parquet(audited[1] / "queue.parquet").filter(grade=2, suggested=1).head(3)
    for rater, grades in (("eve", (1, 2, 0)), ("max", (1, 2, 1))):
        review = open_review(queue, tmp_path / "review", rater)
        for grade in grades: review.grade(grade, "looked")
    made = auditing.correct_folder(shop, tmp_path / "review", tmp_path / "fixed")
    assert made.corrections.sort("grade").select("product_id", "grade", "old_grade", "by").rows() == [
        (queue["product_id"][2], 0, 2, "eve, max"), (queue["product_id"][0], 1, 2, "eve, max")]
    assert all("looked" in why for why in made.corrections["why"])
    assert load_data(tmp_path / "fixed").fingerprint == made.fingerprint


def test_corrections_must_be_somewhere(shop, tmp_path):
    with pytest.raises(DataError, match="does not exist"): auditing.read_corrections(tmp_path / "nowhere.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no review"): auditing.read_corrections(tmp_path / "empty")


def test_a_file_is_written_whole_or_not_at_all(shop, tmp_path, monkeypatch):
    auditing.audit_files(shop, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    def torn(frame, path):
        path.write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(pl.DataFrame, "write_parquet", torn)
    with pytest.raises(OSError, match="disk full"): auditing.audit_files(shop, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_file_that_is_no_corrections_is_explained(tmp_path):
    (tmp_path / "corrections.txt").write_text("change everything")
    with pytest.raises(DataError, match="corrections.txt"): auditing.read_corrections(tmp_path / "corrections.txt")


def test_an_audit_leaves_nothing_of_the_one_before(shop, tmp_path):
    for name in ("corrections", "people"): pl.DataFrame(schema=dict.fromkeys(CORRECTION_COLUMNS, pl.String)).write_parquet(tmp_path / f"{name}.parquet")
    auditing.audit_files(shop, tmp_path)
    assert not (tmp_path / "corrections.parquet").exists() and not (tmp_path / "people.parquet").exists()


def test_a_folder_without_annotator_is_refused_before_the_work(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(auditing, "audit", lambda *_: pytest.fail("audited all the same"))
    with pytest.raises(DataError, match="holds no annotator"): auditing.audit_files(shop, tmp_path / "out", None, tmp_path / "typo")
