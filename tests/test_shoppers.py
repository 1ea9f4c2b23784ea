"""Raters and shoppers of the simulated market: what must hold by construction, and that the stated chances are met."""
import time
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from mine_refine_nb import shoppers as sh
from mine_refine_nb.data import COUNTS, load_data, make_data, query_ids
from mine_refine_nb.market import build_market, true_grades

SESSIONS = 40_000
PAIR = ["query_id", "product_id"]


@pytest.fixture(scope="module")
def market(): return build_market(900, 120, seed=2)


@pytest.fixture(scope="module")
def traps(market): return sh.traps(market)


@pytest.fixture(scope="module")
def log(market): return sh.shop(market, SESSIONS)


@pytest.fixture(scope="module")
def known(market, traps, log):
    "The log with the true grade and whether the product is bait."
    pairs = log.select(PAIR).unique()
    pairs = pairs.with_columns(true_grades(market, pairs), bait=pl.col("product_id").is_in(traps.bait["product_id"].implode()))
    return log.join(pairs, on=PAIR, how="left")


def plain(**changes) -> sh.Behaviour:
    "Shoppers whom nothing but position and grade moves."
    return replace(sh.Behaviour(price_effect=0, popularity_effect=0, bait=0, unseen=0, mistyped=0), **changes)


def rates(log, market, *by):
    pairs = log.select(PAIR).unique()
    graded = log.join(pairs.with_columns(true_grades(market, pairs)), on=PAIR)
    return graded.group_by(*by).agg(shown=pl.len(), click=pl.col("click").mean(), clicks=pl.col("click").sum(),
                                    cart=pl.col("cart").sum() / pl.col("click").sum(),
                                    purchase=pl.col("purchase").sum() / pl.col("cart").sum()).sort(*by)


# raters

def test_confusion_of_each_rater_is_recovered(market):
    truth = true_grades(market, market.data.judgments)
    given = pl.concat([sh.rate(market, per_pair=len(sh.PANEL), seed=s).with_columns(
        true=pl.Series(np.repeat(truth.to_numpy(), len(sh.PANEL)))) for s in range(3)])
    for rater in sh.PANEL:
        for true in range(3):
            mine = given.filter(rater=rater.name, true=true)["grade"].to_numpy()
            for grade, share in enumerate(rater.confusion[true]):
                assert abs((mine == grade).mean() - share) < 4.5 * np.sqrt(share * (1 - share) / len(mine)) + 1e-9, (rater, true, grade)


def test_panel_is_as_described():
    wrong = {r.name: np.array(r.confusion) for r in sh.PANEL}
    for name in ("ana", "ben", "chie", "dora"):
        assert .079 < 1 - wrong[name][1, 1] < .121 and wrong[name][0, 2] == wrong[name][2, 0] == .01
    assert wrong["careless"][0, 0] == pytest.approx(.7) and wrong["careless"][0, 2] == pytest.approx(.06)
    up, down = (lambda m: m[0, 1] + m[0, 2] + m[1, 2]), (lambda m: m[2, 0] + m[2, 1] + m[1, 0])
    assert up(wrong["lenient"]) > 3 * down(wrong["lenient"]) and down(wrong["strict"]) > 3 * up(wrong["strict"])
    assert all(m[0, 1] > m[0, 2] and m[2, 1] > m[2, 0] for m in wrong.values())


def test_rate_asks_different_people_and_repeats_itself(market):
    rated = sh.rate(market, per_pair=3, seed=7)
    assert rated.columns == [*PAIR[:1], "query", "product_id", "locale", "split", "grade", "rater"]
    counts = rated.group_by(PAIR).agg(pl.col("rater").n_unique())
    assert counts.height == market.data.judgments.height and (counts["rater"] == 3).all()
    assert rated.equals(sh.rate(market, per_pair=3, seed=7)) and not rated.equals(sh.rate(market, per_pair=3, seed=8))
    names = rated["rater"].value_counts()["count"]
    assert names.min() > .9 * names.mean() and names.max() < 1.1 * names.mean()    # drawn evenly


@pytest.mark.parametrize("call, says", [
    (lambda m: sh.rate(m, per_pair=0), "per_pair"), (lambda m: sh.rate(m, per_pair=8), "7 raters"),
    (lambda m: sh.rate(m, panel=sh.PANEL[:1] * 2), "share a name"),
    (lambda m: sh.Rater("x", ((1, 0, 0), (0, 1, 0), (.5, .6, 0))), "'x'.*sum to 1"),
    (lambda m: sh.Rater("x", ((2, -1, 0), (0, 1, 0), (0, 0, 1))), "'x'.*shares"),
    (lambda m: sh.Behaviour(page=0), "page is 0"), (lambda m: sh.Behaviour(mistyped=1.5), "mistyped is 1.5"),
    (lambda m: sh.Behaviour(attraction=(0, .1, .2)), "attraction"), (lambda m: sh.Behaviour(cart=(.1, .2)), "cart"),
    (lambda m: sh.Behaviour(examination=float("nan")), "examination"),
    (lambda m: sh.shop(m, 0), "sessions is 0"), (lambda m: sh.observe(m, sessions=-3), "sessions is -3"),
    (lambda m: sh.shop(m, 5, shown=pl.DataFrame(dict(query_id=["a"]))), "no column product_id, score"),
    (lambda m: sh.shop(m, 5, shown=sh.old_search(m).head(0)), "empty"),
    (lambda m: sh.shop(m, 5, shown=sh.old_search(m).head(2).with_columns(score=float("nan"))), "no number"),
    (lambda m: sh.shop(m, 5, shown=sh.old_search(m).head(2).with_columns(score=pl.lit("high"))), "no number"),
    (lambda m: sh.shop(m, 5, shown=sh.old_search(m).head(2).with_columns(product_id=pl.lit("p1"), score=1.)), "twice"),
    (lambda m: sh.shop(m, 5, shown=sh.old_search(m).head(1).with_columns(product_id=pl.lit("p1"))), "no product_id 'p1'"),
    (lambda m: sh.shop(m, 5, shown=sh.old_search(m).head(1).with_columns(query_id=pl.lit("q1"))), "no query_id 'q1'"),
])
def test_wrong_arguments(market, call, says):
    with pytest.raises(ValueError, match=says): call(market)


# the log

def test_log_is_consistent(market, log):
    assert log.columns == ["session", "query_id", "query", "locale", "product_id", "position", "price", "click", "cart", "purchase"]
    assert log.filter(pl.col("cart") & ~pl.col("click")).is_empty() and log.filter(pl.col("purchase") & ~pl.col("cart")).is_empty()
    assert log["purchase"].sum() > 100
    pages = log.group_by("session").agg(pl.len(), pl.col("position").min().alias("first"), pl.col("position").max().alias("last"),
                                        pl.col("product_id", "query_id", "query").n_unique())
    assert pages.height == SESSIONS and (pages["first"] == 1).all() and (pages["last"] == pages["len"]).all()
    assert (pages["product_id"] == pages["len"]).all() and (pages["query"] == 1).all() and pages["len"].max() == sh.Behaviour().page
    homes = log.join(market.products.select("product_id", home="locale", tag="price"), on="product_id")
    assert (homes["home"] == homes["locale"]).all() and (homes["tag"] == homes["price"]).all()


def test_same_seed_same_log(market):
    one, two, other = (sh.shop(market, 500, seed=s) for s in (3, 3, 4))
    assert one.equals(two) and not one.equals(other)


def test_queries_come_by_volume(market, log):
    counts = log.unique("session")["query_id"].value_counts().join(market.intents, on="query_id", how="right")
    expected = counts["volume"] / 3 * SESSIONS
    gap = (counts["count"].fill_null(0) - expected).abs() / expected.sqrt()
    assert gap.max() < 5 and (counts["count"] > 20 * counts["count"].median()).any()


def test_mistyped_share_and_that_typos_are_texts(market, log):
    typed = log.unique("session").join(market.intents.select("query_id", meant="query"), on="query_id")
    assert (typed["query"] != typed["meant"]).mean() == pytest.approx(sh.Behaviour().mistyped, abs=.008)
    assert (typed["query"].str.strip_chars().str.len_chars() > 0).all()
    exact = sh.shop(market, 300, sh.Behaviour(mistyped=0))
    assert set(exact["query"]) <= set(market.intents["query"])


def test_clicks_fall_with_the_position_for_every_grade(known):
    fair = known.filter(~pl.col("bait"))
    for grade in range(3):
        rate = dict(fair.filter(grade=grade).group_by("position").agg(pl.col("click").mean()).iter_rows())
        assert rate[1] > rate[3] > rate[8], grade


def test_stated_chances_are_met(market):
    behaviour = plain(examination=0., churn=2.)
    found = rates(sh.shop(market, 30_000, behaviour), market, "grade")
    for name, count in (("click", "shown"), ("cart", "clicks")):
        stated = {"click": behaviour.attraction, "cart": behaviour.cart}[name]
        for grade, value, n in found.select("grade", name, count).iter_rows():
            assert value == pytest.approx(stated[grade], abs=4.5 * np.sqrt(stated[grade] / n)), (name, grade)
    assert found["purchase"].to_list() == pytest.approx(behaviour.purchase, abs=.1)


def test_examination_is_recovered_from_the_log(market):
    behaviour = plain(examination=1., churn=3.)
    rate = dict(rates(sh.shop(market, 30_000, behaviour), market, "grade", "position").filter(grade=2).select("position", "click").iter_rows())
    for position in (2, 4, 8): assert rate[position] / rate[1] == pytest.approx(1 / position, rel=.15)


def test_grades_are_in_order(known):
    table = known.filter(~pl.col("bait") & (pl.col("position") <= 4)).group_by("grade").agg(
        click=pl.col("click").mean(), cart=pl.col("cart").sum() / pl.col("click").sum(),
        buy=pl.col("purchase").sum() / pl.col("click").sum()).sort("grade")
    for what in ("click", "cart", "buy"): assert table[what].is_sorted() and table[what].n_unique() == 3, what


def test_cheap_and_popular_products_are_clicked_more(market):
    pairs = sh.old_search(market)
    likely = sh.chances(market, pairs, plain(price_effect=1., popularity_effect=.5), pairs.head(0))
    likely = likely.with_columns(true_grades(market, pairs)).join(market.products.drop("price"), on="product_id")
    mean = likely.with_columns(dear=pl.col("price").log() - pl.col("price").log().mean().over("type"), appeal=pl.col("popularity").log())
    for grade in range(3):
        of = mean.filter(grade=grade)
        assert of.select(pl.corr("dear", "click")).item() < -.3 and of.select(pl.corr("appeal", "click")).item() > .3
        assert of.select(pl.corr("dear", "cart")).item() < -.3 and abs(of.select(pl.corr("appeal", "cart")).item()) < .2
    fixed = sh.chances(market, pairs, plain(), pairs.head(0)).with_columns(true_grades(market, pairs))
    assert fixed.group_by("grade").agg(pl.col("click").std())["click"].max() < 1e-9


def test_bait_is_clicked_and_left(known):
    near = known.filter(pl.col("position") <= 8).group_by("bait", "grade").agg(
        click=pl.col("click").mean(), cart=pl.col("cart").sum() / pl.col("click").sum())
    click, cart = ({(b, g): v for b, g, v in near.select("bait", "grade", what).iter_rows()} for what in ("click", "cart"))
    assert click[True, 0] > 2.5 * click[False, 0] and click[True, 0] > .8 * click[False, 2]
    assert cart[True, 0] < .6 * cart[False, 0] and cart[True, 1] < .7 * cart[False, 1]


def test_traps_are_named_by_the_seed(market, traps, log):
    assert sh.traps(market).unseen.equals(traps.unseen) and not sh.traps(market, seed=1).bait.equals(traps.bait)
    assert traps.bait.height == round(.02 * 900) and (true_grades(market, traps.unseen) == 2).all()
    assert traps.unseen.join(market.data.judgments, on=PAIR).height == traps.unseen.height > 20
    assert traps.unseen.join(log, on=PAIR).is_empty()
    none = sh.traps(market, plain())
    assert none.bait.is_empty() and none.unseen.is_empty()


def test_old_search_is_imperfect_and_moves(market, log):
    shown = sh.old_search(market)
    assert not shown.select(PAIR).is_duplicated().any()
    judged = shown.join(market.data.judgments, on=PAIR, how="semi")
    assert judged.height < shown.height                                             # some unjudged products too
    assert .4 < np.corrcoef(shown["score"], true_grades(market, shown))[0, 1] < .9
    places = log.group_by(PAIR).agg(pl.col("position").n_unique(), pl.len()).filter(pl.col("len") > 200)
    assert places.height > 50 and places["position"].median() >= 8                 # so that position can be told from product
    still = sh.shop(market, 2000, sh.Behaviour(churn=0.))
    assert (still.group_by(PAIR).agg(pl.col("position").n_unique())["position"] == 1).all()


def test_another_engine_can_be_tried(market):
    test = market.intents.filter(split="test").select("query_id", "locale")
    pairs = test.join(market.products.select("product_id", "locale"), on="locale").select(PAIR)
    good = pairs.with_columns(score=true_grades(market, pairs).cast(pl.Float32))
    a, b = (sh.shop(market, 4000, plain(), shown=frame) for frame in (good, good.with_columns(score=-pl.col("score"))))
    assert set(a["query_id"]) <= set(test["query_id"]) and a["click"].mean() > 2 * b["click"].mean()
    one = sh.shop(market, 50, shown=good.head(1))
    assert one.height == 50 and one["product_id"].n_unique() == 1


# what the marketplace sees

def test_engagement_adds_the_log_up(log):
    engagement = sh.engagement_of(log)
    assert engagement.columns == ["query", "locale", "product_id", "position", *COUNTS]
    assert engagement.select(COUNTS).sum().row(0) == (log.height, *log.select("click", "cart", "purchase").sum().row(0))
    assert not engagement.select("query", "locale", "product_id", "position").is_duplicated().any()
    some = engagement.sort("clicks").row(-1, named=True)
    rows = log.filter(**{key: some[key] for key in ("query", "locale", "product_id", "position")})
    assert (rows.height, rows["click"].sum()) == (some["impressions"], some["clicks"])


def test_engagement_passes_the_checks_of_the_reader(market, log):
    data = make_data(market.data.products, market.data.judgments, engagement=sh.engagement_of(log))
    assert data.engagement.height > 1000 and data.judgments.height == market.data.judgments.height
    known = data.engagement.join(market.intents.select("query_id"), on="query_id", how="semi")
    assert known["impressions"].sum() == pytest.approx(log.height * (1 - sh.Behaviour().mistyped), rel=.02)


def test_observe(market):
    seen = sh.observe(market, 3000, per_pair=1, seed=5)
    log = sh.shop(market, 3000, seed=5)
    assert seen.name == "market" and seen.ratings is None
    assert seen.engagement.select(COUNTS).sum().row(0) == (log.height, *log.select("click", "cart", "purchase").sum().row(0))
    same = market.data.judgments.join(seen.judgments, on=[*PAIR, "query", "locale", "split"])
    assert same.height == market.data.judgments.height and .1 < (same["grade"] != same["grade_right"]).mean() < .2
    assert (seen.engagement["query_id"] == query_ids(seen.engagement)).all()
    assert sh.observe(market, 3000, per_pair=1, seed=5).fingerprint == seen.fingerprint


def test_raters_of_observe(market):
    wrong = {}
    for per_pair in (0, 1, 3):
        data = sh.observe(market, 0, per_pair=per_pair)
        assert data.engagement is None and (data.ratings is not None) == (per_pair > 1)
        wrong[per_pair] = (data.judgments["grade"] != true_grades(market, data.judgments)).mean()
    assert wrong[0] == 0 and wrong[1] > 2 * wrong[3] > 0


def test_folder(tmp_path):
    files = sh.write_shop(tmp_path / "shop", 300, 48, seed=3, sessions=800, per_pair=3)
    assert dict(files.iter_rows()).keys() == {f"{name}.parquet" for name in ("products", "judgments", "engagement", "truth")}
    data, market = load_data(tmp_path / "shop"), build_market(300, 48, seed=3)
    assert data.fingerprint == sh.observe(market, 800, per_pair=3, seed=3).fingerprint
    truth = pl.read_parquet(tmp_path / "shop" / "truth.parquet")
    assert (truth["grade"] == true_grades(market, truth)).all() and not truth.select(PAIR).is_duplicated().any()
    assert data.judgments.join(truth, on=PAIR, how="anti").is_empty()
    assert market.data.judgments.join(truth, on=[*PAIR, "grade"]).height == market.data.judgments.height
    quiet = sh.write_shop(tmp_path / "quiet", 300, 48, seed=3, sessions=0, per_pair=0)
    assert "engagement.parquet" not in quiet["file"].to_list()
    assert load_data(tmp_path / "quiet").fingerprint == market.data.fingerprint
    for wrong, says in ((dict(folder=tmp_path / "shop"), "not empty"), (dict(folder=tmp_path / "x", sessions=-1), "sessions is -1"),
                        (dict(folder=tmp_path / "x", per_pair=9), "per_pair"), (dict(folder=tmp_path / "x", queries=3), "too few")):
        with pytest.raises(ValueError, match=says): sh.write_shop(**wrong)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quiet", "shop"]        # nothing half-written


def test_many_sessions_take_seconds(market):
    start = time.perf_counter()
    assert sh.total_engagement(market, 200_000, sh.Behaviour(), 0)["impressions"].sum() > 2_000_000
    assert time.perf_counter() - start < 20
