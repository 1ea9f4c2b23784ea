"""What a query scores anyway comes off, evenly within the query, and only as much as validation supports."""
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mine_refine_nb.encoder import Embeddings
from mine_refine_nb.market import simulate
from mine_refine_nb.metrics import Evaluation, boundary_auc, evaluate
from mine_refine_nb.normalising import CLEARLY, HALF, QueryNorm, fit_norm, log_partition, normalised, query_partitions, shifted, without_matches

SCORES = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def market():
    return simulate(products=200, queries=40, locales=("en",), seed=0)


def scored(data, height, spread=0.05, seed=0) -> Evaluation:
    "An evaluation in which grades lie a tenth apart and each query adds a height of its own, by its number."
    rng, unit = np.random.default_rng(seed), lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    rows = [unit(rng.normal(size=(n, 8)).astype(np.float32)) for n in (len(data.queries), len(data.products))]
    one = evaluate(Embeddings(data.queries["query_id"].to_list(), rows[0], data.products["product_id"].to_list(), rows[1]), data, None)
    own = dict(zip(one.per_query["query_id"], height * rng.normal(size=len(one.per_query))))
    pairs = one.pairs.with_columns(score=0.4 + 0.1 * pl.col("grade") + spread * pl.Series(rng.normal(size=len(one.pairs))) + pl.col("query_id").replace_strict(own, return_dtype=pl.Float64))
    run = pairs.filter(pl.len().over("query_id") > 1).sort("query_id", -pl.col("score")).with_columns(rank=pl.int_range(1, pl.len() + 1).over("query_id"))
    return replace(one, pairs=pairs, run=run.select(one.run.columns))


@given(SCORES, st.floats(0.01, 0.5))
def test_the_partition_is_a_smooth_maximum(scores, temperature):
    found = log_partition(np.array(scores), temperature)
    assert np.exp((found - np.array(scores)) / temperature).min() >= 1 - 1e-6 and np.exp((np.array(scores) - found) / temperature).sum() == pytest.approx(1)    # softmax probabilities
    assert max(scores) - 1e-9 <= found <= max(scores) + temperature * np.log(len(scores)) + 1e-9


@given(SCORES, st.floats(-0.5, 0.5))
def test_a_query_that_scores_higher_throughout_is_set_back_by_all_of_it(scores, more):
    norm = QueryNorm(0.05, 1.0, 0.6)
    assert norm.scores(np.array(scores) + more) == pytest.approx(norm.scores(scores), abs=1e-9)


@settings(deadline=None)
@given(SCORES, st.floats(0, 1))
def test_one_query_and_a_run_are_normalised_alike(scores, share):
    norm = QueryNorm(0.05, share, 0.6, depth=10)
    run = pl.DataFrame(dict(query_id=["a"] * len(scores), rank=np.arange(1, len(scores) + 1), score=np.sort(scores)[::-1]))
    assert norm.scores(run["score"]) == pytest.approx(shifted(run, norm.offsets(run))["score"].to_numpy(), abs=1e-9)
    assert np.ptp(norm.scores(scores) - np.array(scores)) < 1e-9    # one number for the whole query


def test_only_the_first_products_count():
    run = pl.DataFrame(dict(query_id=["a"] * 4, rank=[1, 2, 3, 4], score=[0.9, 0.8, 0.7, 0.6]))
    assert query_partitions(run, 0.1, 2)["partition"].to_list() == query_partitions(run.head(2), 0.1)["partition"].to_list()
    assert query_partitions(run, 0.1, 2)["partition"][0] < query_partitions(run, 0.1)["partition"][0]


def test_a_query_without_a_list_keeps_its_scores():
    rows = pl.DataFrame(dict(query_id=["a", "b"], score=[1.0, 1.0]))
    assert shifted(rows, pl.DataFrame(dict(query_id=["a"], offset=[0.5])))["score"].to_list() == [0.5, 1.0]


def test_heights_of_queries_come_off_and_rankings_stay(market):
    one = scored(market, height=0.3)
    norm = fit_norm(one)[0]
    after = normalised(one, norm)
    assert norm.share > HALF and after.values["auc_2"] > one.values["auc_2"] + 0.1 and after.values["auc_1"] > one.values["auc_1"] + 0.1
    assert {name: after.values[name] for name in ("ndcg@10", "recall@50", "ndcg@10_judged")} == {name: one.values[name] for name in ("ndcg@10", "recall@50", "ndcg@10_judged")}
    listed = after.pairs.filter("listed")
    assert after.values["auc_1"] == pytest.approx(boundary_auc(listed["score"], listed["grade"], 1))
    assert after.pairwise["auc_2"] == pytest.approx(boundary_auc(after.pairs["score"], after.pairs["grade"], 2)) and set(after.per_locale) == set(one.per_locale)
    order = [frame.sort("query_id", "score", "product_id")["product_id"].to_list() for frame in (one.pairs, after.pairs)]
    assert order[0] == order[1]


def test_half_is_kept_unless_another_share_is_clearly_better(market):
    norm, table = fit_norm(scored(market, height=0.0))
    gains = dict(zip(table["share"], table["gain"]))
    assert (norm.share == HALF) == (max(gains.values()) <= gains[HALF] + CLEARLY)
    assert fit_norm(scored(market, height=0.0, spread=0.02))[1]["gain"][0] == 0
    few = fit_norm(scored(market, height=0.3), shares=())[1]
    assert few["share"].to_list() == [0.0, HALF]


def test_what_every_query_has_is_news_that_is_kept():
    "Where only the height tells grades apart, taking it off ruins the scores, and validation says so."
    data = simulate(products=200, queries=40, locales=("en",), seed=1)
    one = scored(data, height=0.0, spread=0.0)
    told = one.per_query.select("query_id", at=pl.int_range(pl.len()) % 3)
    pairs = one.pairs.drop("grade").join(told, on="query_id", maintain_order="left").with_columns(grade=pl.col("at").cast(pl.Int8), score=0.3 * pl.col("at") + 0.15 * pl.Series(np.random.default_rng(0).normal(size=len(one.pairs)))).drop("at")
    run = pairs.sort("query_id", -pl.col("score")).with_columns(rank=pl.int_range(1, pl.len() + 1).over("query_id"))
    assert fit_norm(replace(one, pairs=pairs, run=run))[0].share < HALF


def test_a_norm_is_kept_as_json():
    norm = QueryNorm(0.05, 0.5, 0.61, 50)
    assert QueryNorm.from_dict(json.loads(json.dumps(norm.to_dict()))) == norm
    with pytest.raises(ValueError, match="temperature must be above 0"): log_partition(np.array([0.5]), 0.0)


def test_queries_without_matches_lose_pairs_and_places(market):
    one = scored(market, height=0.1)
    poor = without_matches(one, 2, 0.5, seed=1)
    gone = one.pairs.join(poor.pairs, on=["query_id", "product_id"], how="anti")
    assert set(gone["grade"]) == {2} and 0.2 < gone["query_id"].n_unique() / len(one.per_query) < 0.8
    assert (poor.run.group_by("query_id").agg(pl.col("rank").max() == pl.len())["rank"]).all()
    assert not poor.run.filter(pl.col("query_id").is_in(gone["query_id"].implode()), pl.col("grade") == 2).height
