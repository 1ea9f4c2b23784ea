"""Reading an A/B test: against known formulas and libraries, by simulation, and what a broken log must say."""
import json
from dataclasses import replace

import ir_measures
import numpy as np
import polars as pl
import pytest
from ir_measures import nDCG
from scipy import stats
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import confint_proportions_2indep
from statsmodels.stats.weightstats import DescrStatsW

from mine_refine_nb import abtest as ab
from mine_refine_nb.data import DataError
from mine_refine_nb.market import build_market, true_grades
from mine_refine_nb.shoppers import old_search, shop

COMMERCE = ("ATCR", "CVR", "GOV")


@pytest.fixture(scope="module")
def log(): return ab.draw_log(12_000, lift=.1, seed=2)


@pytest.fixture(scope="module")
def units(log): return ab.units_of(ab.sessions_of(log))


@pytest.fixture(scope="module")
def market(): return build_market(300, 45, seed=4)


@pytest.fixture(scope="module")
def pairs(market): return old_search(market).select("query_id", "product_id")


def engine(market, pairs, noise, seed=1):
    "A ranking by the true grade plus noise."
    luck = np.random.default_rng(seed).normal(size=len(pairs))
    return pairs.with_columns(score=true_grades(market, pairs).cast(pl.Float64) + noise * luck)


def tiny(*changes):
    "Two good sessions, and whatever a test adds to them."
    good = dict(arm="A", session="s1", user="u1", add_to_carts=1, orders=0, value=0.0, before=2.0)
    return pl.DataFrame([good, good | dict(arm="B", session="s2", user="u2"), *(good | change for change in changes)])


# the log

@pytest.mark.parametrize("change, says", [
    (dict(arm="C", session="s3", user="u3"), "unknown arm 'C'"),
    (dict(session="s3", user="u2"), "user 'u2' is in both arms"),
    (dict(session="s2", user="u3"), "session 's2' is in both arms"),
    (dict(user="u3"), "session 's1' belongs to two users"),
    (dict(session="s3", before=3.0), "user 'u1' has two values of before"),
    (dict(session="s3", value=-1.0), "row 2: value is -1.0"),
    (dict(session="s3", value=float("nan")), "row 2: value is nan"),
    (dict(session="s3", orders=-1), "row 2: orders is -1"),
    (dict(session="s3", add_to_carts=None), "row 2: add_to_carts is None"),
    (dict(session="s3", before=float("inf")), "row 2: before is inf"),
    (dict(session=None), "row 2 has no session"),
    (dict(session="s3", user=None), "row 2 has no user"),
])
def test_each_defect_has_its_message(change, says):
    with pytest.raises(DataError, match=says): ab.sessions_of(tiny(change))


def test_defects_of_the_whole_log():
    ab.sessions_of(tiny())
    for bad, says in ((tiny().drop("value", "orders"), "missing column.*orders, value"), (tiny().head(0), "no row"),
                      (tiny().filter(arm="A"), "no row of arm 'B'"), (tiny().with_columns(grade=1), "missing.*query_id")):
        with pytest.raises(DataError, match=says): ab.sessions_of(bad)
    with pytest.raises(DataError, match="two different names"): ab.sessions_of(tiny(), arms=("A", "A"))


def graded(*rows):
    "Impressions: arm, session, query, product, position, grade."
    names = ["arm", "session", "query_id", "product_id", "position", "grade"]
    return pl.DataFrame(rows, schema=names, orient="row").with_columns(price=1.0, cart=False, purchase=False)


@pytest.mark.parametrize("rows, says", [
    ([("A", "s1", "q", "p", 1, 3)], "grade is 3"), ([("A", "s1", "q", "p", 1, -2)], "grade is -2"),
    ([("A", "s1", "q", "p", 0, 2)], "position is 0"),
    ([("A", "s1", "q", "p", 1, 2), ("A", "s1", "q", "r", 1, 2)], "at the same position"),
    ([("A", "s1", "q", "p", 1, 2), ("A", "s3", "q", "p", 1, 1)], "two grades"),
])
def test_defects_of_what_was_shown(rows, says):
    with pytest.raises(DataError, match=says): ab.sessions_of(graded(("B", "s2", "q", "z", 1, 1), *rows))


def test_order_lines_add_up_and_files_are_read(tmp_path):
    lines = tiny(dict(orders=1, value=3.0), dict(orders=1, value=4.5))
    sessions = ab.sessions_of(lines)
    assert sessions.filter(session="s1").select("add_to_carts", "orders", "value").row(0) == (3, 2, 7.5)
    assert ab.units_of(sessions).select("sessions", "carted", "bought", "value").row(0) == (1, 1, 1, 7.5)
    lines.write_csv(tmp_path / "log.csv"); lines.write_parquet(tmp_path / "log.parquet")
    for name in ("log.csv", "log.parquet"):
        assert ab.sessions_of(tmp_path / name).equals(sessions)


def test_files_are_read_to_their_end_with_ids_as_text(tmp_path):
    lines = pl.concat([tiny(dict(value=0.0))] * 200).with_columns(session=pl.int_range(pl.len()).cast(pl.String).str.zfill(4), value=pl.lit("0"))
    lines = lines.with_columns(value=pl.when(session="0399").then(pl.lit("39.90")).otherwise("value")).drop("user", strict=False)
    lines.write_csv(tmp_path / "log.csv")
    sessions = ab.sessions_of(tmp_path / "log.csv")
    assert sessions["value"].sum() == 39.9 and "0007" in sessions["session"].to_list()
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="empty.csv cannot be read as a log"): ab.sessions_of(tmp_path / "empty.csv")


def test_ids_of_the_grades_may_be_numbers(tmp_path):
    rows = graded(("A", "s1", "7", "1", 1, 1), ("B", "s2", "7", "2", 1, 2))
    rows.write_csv(tmp_path / "log.csv")
    more = pl.DataFrame(dict(query_id=[7], product_id=[3], grade=[2]))
    known = ab.sessions_of(tmp_path / "log.csv", grades=more.cast({"query_id": pl.String, "product_id": pl.String}))["ndcg"].to_list()
    assert ab.sessions_of(tmp_path / "log.csv", grades=more)["ndcg"].to_list() == known and known[1] < 1


def test_shoppers_log_becomes_sessions(market):
    log = shop(market, 400, seed=3).with_columns(arm=pl.when(pl.col("session") % 2 > 0).then(pl.lit("B")).otherwise(pl.lit("A")))
    sessions = ab.sessions_of(log)
    assert len(sessions) == 400 and sessions["value"].sum() == pytest.approx(log.filter("purchase")["price"].sum())
    assert sessions["orders"].sum() == log["purchase"].sum() and sessions["add_to_carts"].sum() == log["cart"].sum()


def test_ndcg_is_that_of_ir_measures():
    rng = np.random.default_rng(0)
    truth = {f"q{q}": {f"p{p}": int(g) for p, g in enumerate(rng.choice([-1, 0, 1, 2], 18))} for q in range(3)}
    rows = [("AB"[s % 2], f"s{s}", q, p, place + 1, truth[q][p])
            for s in range(12) for q in [f"q{s % 3}"] for place, p in enumerate(rng.permutation(list(truth[q]))[:14])]
    grades = pl.DataFrame([(q, p, g) for q in truth for p, g in truth[q].items()], schema=["query_id", "product_id", "grade"], orient="row")
    ours = dict(ab.ndcg_shown(graded(*rows), grades).iter_rows())
    judged = lambda q: {p: g for p, g in truth[q].items() if g >= 0}
    qrels = {f"s{s}": judged(f"q{s % 3}") for s in range(12)}
    run = {f"s{s}": {r[3]: -float(r[4]) for r in rows if r[1] == f"s{s}" and r[5] >= 0} for s in range(12)}
    theirs = ir_measures.pytrec_eval.iter_calc([nDCG(gains={0: 0, 1: 1, 2: 3}) @ 10], qrels, run)
    assert ours == pytest.approx({m.query_id: m.value for m in theirs})


def test_ndcg_holds_both_arms_to_one_ideal():
    rows = [("A", "s1", "q", "b", 1, 1), ("B", "s2", "q", "a", 1, 2), ("A", "s3", "w", "x", 1, 0), ("B", "s4", "q", "u", 1, -1)]
    sessions = ab.sessions_of(graded(*rows))
    found = dict(sessions.select("session", "ndcg").iter_rows())
    ideal = 3 + 1 / np.log2(3)
    assert found["s1"] == pytest.approx(1 / ideal) and found["s2"] == pytest.approx(3 / ideal)
    assert found["s3"] is None and found["s4"] is None    # nothing to find; nothing judged: no zero
    units = ab.units_of(sessions)
    assert dict(units.select("unit", "graded").iter_rows()) == dict(s1=1, s2=1, s3=0, s4=0)
    assert np.exp(ab.arm_ratios(units, "NDCG@10")[0]) == pytest.approx([1 / ideal, 3 / ideal])


# lifts and intervals

def test_delta_interval_is_katz_for_plain_rates(log):
    units = ab.units_of(ab.sessions_of(log.drop("user")))
    for metric, column in (("ATCR", "carted"), ("CVR", "bought")):
        a, b = units.group_by("arm").agg(pl.col(column).sum(), pl.len()).sort("arm").drop("arm").rows()
        found = ab.lift_of(*ab.arm_ratios(units, metric), level=.9)
        book = np.array(confint_proportions_2indep(*b, *a, compare="ratio", method="log", alpha=.1)) - 1
        assert [found["low"], found["high"]] == pytest.approx(book, abs=2e-5)
        assert found["lift"] == pytest.approx(b[0] / b[1] / (a[0] / a[1]) - 1)


def test_ratio_variance_is_that_of_the_linearised_mean(units):
    one = units.filter(arm="A")
    y, x = one["value"].to_numpy(), one["sessions"].to_numpy()
    ratio = y.sum() / x.sum()
    error = DescrStatsW((y - ratio * x) / x.mean() / ratio).std_mean
    logs, variances = ab.arm_ratios(units, "GOV")
    assert np.exp(logs[0]) == pytest.approx(ratio) and np.sqrt(variances[0]) == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("metric", COMMERCE)
def test_bootstrap_agrees_and_sessions_of_a_user_are_not_independent(metric, units, log):
    found = ab.lift_of(*ab.arm_ratios(units, metric))
    low, high = ab.bootstrap_lift(units, metric, n=600, seed=1)
    assert [found["low"], found["high"]] == pytest.approx([low, high], abs=.15 * (high - low))
    naive = ab.lift_of(*ab.arm_ratios(ab.units_of(ab.sessions_of(log.drop("user"))), metric))
    assert found["high"] - found["low"] > 1.05 * (naive["high"] - naive["low"])


def test_bootstrap_repeats_itself(units):
    draw = lambda seed: ab.bootstrap_lift(units.sample(1000, seed=0), "CVR", n=50, seed=seed)
    assert draw(1) == draw(1) != draw(2)


def test_interval_and_p_agree():
    logs, variances = np.array([[0, 0], [.1, .1]]), np.array([[.001, .002], [.001, .002]])
    found = ab.lift_of(logs, variances)
    assert (found["low"] > 0).tolist() == (found["p"] < .05).tolist() == [True, False]
    assert found["p"][0] == pytest.approx(2 * stats.norm.sf(.1 / np.sqrt(.002)))


# ten thousand tests at once; users return and baskets are heavy-tailed

def draw(tests, lift, seed, users=500, peeks=20):
    "CVR's log ratios and variances [arm, test, look]."
    rng, n = np.random.default_rng(seed), users / peeks * np.arange(1, peeks + 1)
    logs, variances = np.empty((2, tests, peeks)), np.empty((2, tests, peeks))
    for start in range(0, tests, 500):
        for arm in (0, 1):
            shape = (500, peeks, users // peeks)
            x = 1 + rng.poisson(1.5, shape)
            y = rng.binomial(x, np.minimum(1, rng.beta(3, 12, shape) * (1 + lift * arm)))
            moments = (part.sum(axis=-1).cumsum(axis=-1) / n for part in (y, x, y * y, x * y, x * x))
            logs[arm, start:start + 500], variances[arm, start:start + 500] = ab.log_ratio(n, *moments)
    return logs, variances


def test_type_one_error_and_peeking():
    logs, variances = draw(10_000, 0, seed=1)
    fixed = ab.lift_of(logs, variances)["p"] < .05
    found = ab.sequential(logs[1] - logs[0], variances.sum(axis=0), .3)
    assert .044 < fixed[:, -1].mean() < .056
    assert fixed.any(axis=1).mean() > .2
    assert .002 < (found["p"][:, -1] < .05).mean() < .05
    without_zero = np.logical_or.accumulate((found["low"] > 0) | (found["high"] < 0), axis=1)
    assert (without_zero == (found["p"] < .05)).all()    # one reading, said twice


def test_sequential_bound_is_nearly_used_up_by_endless_looks():
    "A random walk looked at 2,000 times: close to 5%, never above; a bound that is merely loose would stay far below."
    rng, found = np.random.default_rng(2), []
    n = np.arange(1, 2001)
    for _ in range(8):
        gap = rng.normal(size=(500, 2000)).cumsum(axis=1) / n
        found.append(ab.sequential(gap, np.broadcast_to(1 / n, gap.shape), np.expm1(1.0))["p"][:, -1] < .05)
    assert .025 < np.mean(found) < .055


def test_coverage_at_a_true_lift():
    logs, variances = draw(6_000, .3, seed=3, peeks=10)
    found = ab.lift_of(logs[..., -1], variances[..., -1])
    assert abs(((found["low"] < .3) & (found["high"] > .3)).mean() - .95) < .01
    always = ab.sequential(logs[1] - logs[0], variances.sum(axis=0), .3)
    assert ((always["low"] < .3) & (always["high"] > .3)).all(axis=1).mean() > .95
    assert (always["p"][:, -1] < .05).mean() > .4    # it does find lifts


def test_sequential_formula_and_what_cannot_be_read():
    gap, variance, tau = .08, .0005, np.log1p(.05) ** 2
    grid = np.linspace(-1, 1, 400_001)
    density = stats.norm.pdf(gap, grid, np.sqrt(variance)) * stats.norm.pdf(grid, 0, np.sqrt(tau))
    evidence = np.trapezoid(density, grid) / stats.norm.pdf(gap, 0, np.sqrt(variance))    # the mixture, by its definition
    found = ab.sequential(np.array([gap]), np.array([variance]), .05)
    assert found["p"][0] == pytest.approx(1 / evidence, rel=1e-6)
    looks = ab.sequential(np.array([np.nan, gap, np.nan, 0]), np.array([np.nan, variance, np.nan, variance]), .05)
    assert looks["p"][0] == 1 and looks["p"][1:].tolist() == [found["p"][0]] * 3
    assert np.isnan(looks["low"]).tolist() == np.isnan(looks["high"]).tolist() == [True, False, True, False]
    edge = np.log1p(found["low"][0])    # an interval whose edge is zero has p = 5%
    at_edge = ab.sequential(np.array([gap - edge]), np.array([variance]), .05)
    assert at_edge["p"][0] == pytest.approx(.05)
    with pytest.raises(ValueError, match="expected is 0"): ab.sequential(np.zeros(1), np.ones(1), 0)


# CUPED

def test_cuped_lowers_variance_and_stays_unbiased(units):
    for metric, least in (("ATCR", .05), ("CVR", .03), ("GOV", .1)):
        plain, sharp = (ab.arm_ratios(frame, metric)[1].sum() for frame in (units, ab.cuped(units, metric)))
        assert sharp < (1 - least) * plain
    rng, logs, claimed = np.random.default_rng(5), [], []
    for seed in range(200):
        n = 400
        past, x = rng.gamma(2, 2, n), 1 + rng.poisson(1, n)
        arm = np.array(["A", "B"])[rng.integers(0, 2, n)]
        value = x * past * np.where(arm == "B", 1.1, 1) * rng.gamma(4, .25, n)
        one = pl.DataFrame(dict(arm=pl.Series(arm, dtype=pl.Enum(["A", "B"])), sessions=x, value=value, before=past))
        found = [ab.arm_ratios(frame, "GOV") for frame in (one, ab.cuped(one, "GOV"))]
        logs.append([r[1] - r[0] for r, _ in found]); claimed.append([v.sum() for _, v in found])
    logs, claimed = np.array(logs), np.array(claimed)
    assert logs.std(axis=0)[1] < .8 * logs.std(axis=0)[0]
    assert abs(logs.mean(axis=0)[1] - np.log(1.1)) < 3 * logs.std(axis=0)[1] / np.sqrt(200)
    assert logs.var(axis=0) == pytest.approx(claimed.mean(axis=0), rel=.3)    # the interval is as wide as it should be


def test_cuped_without_a_past_changes_nothing(units):
    for past in (pl.lit(3.0), pl.lit(None, dtype=pl.Float64)):
        blank = units.with_columns(before=past)
        assert ab.cuped(blank, "GOV").equals(blank)
    half = units.with_columns(before=pl.when(pl.int_range(pl.len()) % 2 > 0).then("before"))    # new users among them
    full, plain = (ab.arm_ratios(frame, "GOV")[1].sum() for frame in (ab.cuped(units, "GOV"), units))
    assert full < ab.arm_ratios(ab.cuped(half, "GOV"), "GOV")[1].sum() < plain
    assert ab.cuped(units, "GOV")["value"].mean() == pytest.approx(units["value"].mean())


# mismatch, correction, plan

def test_sample_ratio_mismatch():
    assert ab.ratio_mismatch(5200, 4800) < ab.SRM_ALPHA and ab.ratio_mismatch(5000, 5000) == 1
    assert ab.ratio_mismatch(520, 480) > ab.SRM_ALPHA    # too few to tell
    assert ab.ratio_mismatch(9000, 1000, share=.1) == 1 and ab.ratio_mismatch(1000, 9000, share=.1) < 1e-9
    assert ab.ratio_mismatch(5100, 4900) == pytest.approx(stats.chi2.sf(4, 1))
    b = np.random.default_rng(1).binomial(10_000, .5, 5000)
    assert .03 < np.mean([ab.ratio_mismatch(10_000 - n, n) < .05 for n in b]) < .07
    with pytest.raises(ValueError, match="share is 1"): ab.ratio_mismatch(5, 5, share=1)


def test_correction():
    p = [.01, np.nan, .04, .03]
    assert ab.corrected(p) == pytest.approx([.03, np.nan, .06, .06], nan_ok=True)
    assert ab.corrected(p, "benjamini-hochberg") == pytest.approx([.03, np.nan, .04, .04], nan_ok=True)
    assert np.isnan(ab.corrected([np.nan])).all()
    with pytest.raises(ValueError, match="'bonferoni'"): ab.corrected(p, "bonferoni")


def test_power_is_that_of_statsmodels_and_is_met():
    spread = np.sqrt(.9 / .1)
    n = ab.units_needed(.1, spread, power=.9, alpha=.01, share=.2)
    power = NormalIndPower().power(np.log(1.1) / spread, n * .8, .01, ratio=.25)
    assert power == pytest.approx(.9, abs=1e-3)
    assert ab.smallest_lift(n, spread, power=.9, alpha=.01, share=.2) == pytest.approx(.1, rel=1e-3)
    assert ab.units_needed(.1, spread) < ab.units_needed(.1, spread, share=.1)
    rng = np.random.default_rng(4)
    n = ab.units_needed(.1, np.sqrt((.9 / .1 + .89 / .11) / 2)) // 2    # B converts more and is less noisy
    a, b = rng.binomial(n, .1, 10_000) / n, rng.binomial(n, .11, 10_000) / n
    found = ab.lift_of(*np.moveaxis([ab.log_ratio(n, rate, 1, rate, rate, 1) for rate in (a, b)], 1, 0))
    assert abs((found["p"] < .05).mean() - .8) < .015
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="lift is"): ab.units_needed(wrong, spread)


def test_plan(log, units):
    table = ab.plan(log, per_day=5000, lifts=(.02, .04))
    assert table["metric"].to_list() == [m for m in COMMERCE for _ in range(2)]
    assert (table["days"] == (table["units"] / 5000).ceil().cast(pl.Int64)).all()
    sizes = table["units"].to_numpy().reshape(3, 2)
    assert (sizes[:, 0] / sizes[:, 1]) == pytest.approx(3.9, abs=.1)
    variances = ab.arm_ratios(ab.cuped(units, "CVR"), "CVR")[1]
    assert sizes[1, 0] == pytest.approx(ab.units_needed(.02, np.sqrt(variances.sum() * len(units) / 4)), rel=.02)
    unarmed = ab.plan(log.drop("arm"), per_day=5000, lifts=(.02, .04))["units"].to_numpy()
    assert unarmed == pytest.approx(table["units"].to_numpy(), rel=.1)
    with pytest.raises(ValueError, match="per_day is 0"): ab.plan(log, per_day=0)


# the readout

def test_readout_and_its_invariances(log):
    read = ab.read_test(log)
    assert read.table.columns == ["metric", "a", "b", "lift", "low", "high", "p", "p_corrected"]
    assert read.table["metric"].to_list() == list(COMMERCE) and read.unit == "user" and sum(read.units) == 12_000
    assert (read.table["low"] < .1).all() and (read.table["high"] > .1).all() and read.warnings == ()
    assert read.table["p_corrected"].to_numpy() == pytest.approx(ab.corrected(read.table["p"].to_list()))
    assert (read.table["p_corrected"] > read.table["p"]).sum() >= 2
    shuffled = ab.read_test(log.sample(fraction=1, shuffle=True, seed=1)).table
    for column in read.table.columns[1:]:
        assert shuffled[column].to_numpy() == pytest.approx(read.table[column].to_numpy(), rel=1e-9)
    back = ab.read_test(log, arms=("B", "A")).table
    for column, other in (("lift", "lift"), ("low", "high"), ("high", "low")):
        assert (1 + back[column].to_numpy()) * (1 + read.table[other].to_numpy()) == pytest.approx(np.ones(3))
    assert back["p"].to_numpy() == pytest.approx(read.table["p"].to_numpy()) and (back["lift"] < 0).all()
    named = ab.read_test(log.with_columns(pl.col("arm").replace(dict(A="control", B="<b>"))), arms=("control", "<b>"))
    assert named.table.equals(read.table) and "&lt;b&gt;" in named._repr_html_() and "<th><b>" not in named._repr_html_()
    doubled = ab.read_test(log.with_columns(pl.col("value") * 2)).table
    assert doubled["a"][2] == pytest.approx(2 * read.table["a"][2]) and doubled["lift"][2] == pytest.approx(read.table["lift"][2])
    assert json.loads(json.dumps(read.to_dict()))["table"][0]["metric"] == "ATCR"


def test_readout_uses_what_it_says(log, units):
    plain = ab.read_test(log, use_before=False)
    assert plain.table["a"][1] == pytest.approx(units.filter(arm="A")["bought"].sum() / units.filter(arm="A")["sessions"].sum())
    assert "CUPED" in ab.read_test(log).how and "CUPED" not in plain.how
    width = lambda read: (read.table["high"] - read.table["low"]).to_numpy()
    assert (width(ab.read_test(log)) < width(plain)).all() and (width(ab.read_test(log, level=.8)) < width(ab.read_test(log))).all()
    soft = ab.read_test(log, correction="benjamini-hochberg")
    assert (soft.table["p_corrected"] <= ab.read_test(log).table["p_corrected"] + 1e-12).all() and "benjamini" in soft.how


def test_warnings_stand_on_top(log):
    lost = ab.read_test(log.filter((pl.col("arm") == "A") | (pl.col("user") % 10 > 0)))
    page = lost._repr_html_()
    assert "SAMPLE RATIO MISMATCH" in lost.warnings[0] and page.index("MISMATCH") < page.index("<table>")
    assert not ab.read_test(log.filter((pl.col("arm") == "A") | (pl.col("user") % 10 > 0)), share=.9 / 1.9).warnings
    odd = ab.warnings_of(ab.units_of(ab.sessions_of(log.with_columns(pl.col("arm").replace("B", "<i>")), ("A", "<i>"))), [], 0, .5, "user")
    assert "&lt;i&gt;" in replace(lost, warnings=odd)._repr_html_() and "<i>" not in replace(lost, warnings=odd)._repr_html_()
    few = ab.read_test(log.filter(pl.col("user") < 150)).warnings
    assert any("CVR: only" in said for said in few)


def test_an_arm_without_orders_has_no_interval(log):
    none = log.with_columns(pl.when(arm="B").then(0).otherwise("orders").alias("orders"))
    read = ab.read_test(none, use_before=False)
    row = read.table.row(1, named=True)
    assert row["b"] == 0 and row["lift"] == -1 and row["low"] is row["high"] is row["p"] is row["p_corrected"] is None
    assert "only 0 users" in read.warnings[0] and "–" in read._repr_html_()


def test_watch(log):
    seen = ab.watch(log, metric="ATCR", expected=.1)
    assert seen["day"].to_list() == list(range(1, 15)) and seen["units"][-1] == 12_000
    plain = ab.read_test(log, use_before=False).table.row(0, named=True)
    assert seen["lift"][-1] == pytest.approx(plain["lift"]) and seen["fixed_p"][-1] == pytest.approx(plain["p"])
    assert seen["low"][-1] < plain["low"] and seen["high"][-1] > plain["high"]    # what peeking costs
    early = ab.watch(log.filter(pl.col("user") < 1500), metric="CVR")
    assert early["p"][0] == 1 and early["lift"][0] is None and early["low"][0] is None    # too few events to say anything
    with pytest.raises(DataError, match="missing column day"): ab.watch(log.drop("day"))
    with pytest.raises(DataError, match="no NDCG@10 without"): ab.watch(log, metric="NDCG@10")


# the simulated production test

def test_better_ranking_wins_the_simulated_test(market, pairs):
    read = ab.simulated_test(market, engine(market, pairs, 3.0), engine(market, pairs, .3), sessions=8000, seed=1)
    assert read.table["metric"].to_list() == list(ab.METRICS) and read.simulated and "<b>Simulated:</b>" in read._repr_html_()
    assert (read.table["low"][:3] > 0).all() and (read.table["p_corrected"][:3] < .01).all() and not read.warnings
    assert read.unit == "session" and sum(read.units) == 8000 and read.mismatch_p > .001


def test_same_ranking_makes_no_difference_and_repeats_itself(market, pairs):
    one = engine(market, pairs, 1.0)
    read = ab.simulated_test(market, one, one, sessions=6000, seed=2)
    assert (read.table["p_corrected"] > .01).all()
    assert read.table.equals(ab.simulated_test(market, one, one, sessions=6000, seed=2).table)
    assert not read.table.equals(ab.simulated_test(market, one, one, sessions=6000, seed=3).table)


def test_simulated_log(market, pairs):
    one = engine(market, pairs, 1.0)
    log = ab.simulated_log(market, one, one, 1000, seed=4)
    assert log.select("session", "arm").unique().height == log["session"].n_unique() == 1000    # each session lived once
    assert (log["grade"] == true_grades(market, log)).all()
    with pytest.raises(ValueError, match="different queries"):
        ab.simulated_log(market, one, one.filter(pl.col("query_id") != one["query_id"][0]), 100)
