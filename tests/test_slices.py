"""Slices: twins that keep what was meant, parts that hold what they say, intervals that know which queries belong together."""
import inspect
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from mine_refine_nb import augment, augmenting, slices, typo_loss
from mine_refine_nb.data import make_data
from mine_refine_nb.encoder import Embeddings
from mine_refine_nb.market import build_market, mistype
from mine_refine_nb.metrics import compare, evaluate
from mine_refine_nb.slices import (bootstrap, evaluate_slices, make_slices, misspelled_twin, query_bands, query_draws, query_volume, slice_differences,
                                   slice_table, source_of, typos_of, unseen_products, won_back)


@pytest.fixture(scope="module")
def market():
    return build_market(products=300, queries=96, seed=0)


@pytest.fixture(scope="module")
def shop(market):
    return market.data


@pytest.fixture(scope="module")
def twin(shop):
    return misspelled_twin(shop, typos=3, seed=1)


def vectors(shop, twin, seed, noise=1.0):
    "Random vectors in which a query leans towards its relevant products, a misspelled one less so."
    rng = np.random.default_rng(seed)
    products = rng.normal(size=(len(shop.products), 24))
    at = {p: i for i, p in enumerate(shop.products["product_id"])}
    both = pl.concat([shop.judgments.select("query_id", "product_id", "grade"), twin.data.judgments.select("query_id", "product_id", "grade")])
    ids = pl.concat([shop.queries["query_id"], twin.data.queries["query_id"]]).to_list()
    queries = np.zeros((len(ids), 24))
    row = {q: i for i, q in enumerate(ids)}
    for q, p, g in both.iter_rows():
        queries[row[q]] += g * products[at[p]]
    queries += noise * np.array([[20 if "." in q else 8] for q in ids]) * rng.normal(size=queries.shape)
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype("f4")
    return Embeddings(ids, unit(queries), list(at), unit(products))


@pytest.fixture(scope="module")
def cut(market, twin):
    return make_slices(market.data, twin, volume=market.intents)


@pytest.fixture(scope="module")
def found(shop, twin, cut):
    return {name: evaluate_slices(vectors(shop, twin, 0, noise), cut) for name, noise in dict(a=1.0, b=0.6).items()}


# ---- the twin

def test_twin_keeps_what_was_meant(shop, twin):
    clean = shop.split("test")
    assert len(twin.queries) == 3 * len(clean.queries) and twin.queries["query_id"].is_unique().all()
    assert set(twin.queries["source_query_id"]) == set(clean.queries["query_id"])
    assert (twin.queries["query"] != twin.queries["clean"]).all() and twin.data.products is not None
    for query_id, source in twin.queries.select("query_id", "source_query_id").head(12).rows():
        of = lambda data, i: data.judgments.filter(query_id=i).drop("query_id", "query")
        assert of(twin.data, query_id).equals(of(clean, source)) and source_of([query_id]) == [source]
    assert set(twin.data.judgments["split"]) == {"test"} and twin.data.judgments.schema == shop.judgments.schema


def test_twin_is_seeded_and_each_query_has_its_own_stream(shop, twin):
    assert misspelled_twin(shop, typos=3, seed=1).queries.equals(twin.queries)
    assert not misspelled_twin(shop, typos=3, seed=2).queries["query"].equals(twin.queries["query"])
    fewer = replace(shop, judgments=shop.judgments.filter(pl.col("locale") != "es"))
    left = misspelled_twin(fewer, typos=3, seed=1).queries
    assert left.equals(twin.queries.filter(pl.col("locale") != "es"))


def test_copies_differ_as_far_as_they_can():
    assert len({*typos_of("wireless headphones", "us", 10, 0), "wireless headphones"}) == 11
    assert all(t != "tv" for t in typos_of("tv", "us", 3, 0))
    with pytest.raises(ValueError, match="at least one copy"):
        misspelled_twin(make_data(pl.DataFrame(dict(product_id=["a"], title=["mug"])), pl.DataFrame(dict(query=["mug"], product_id=["a"], grade=[2])), name="one"), typos=0)


def test_japanese_and_unknown_locales_get_typos():
    for text, locale in (("充電式 掃除機", "jp"), ("コーヒーメーカー", "ja"), ("usb ケーブル", "jp"), ("наушники", "ru"), ("phone case", None)):
        assert all(t and t != text for t in typos_of(text, locale, 4, 0))


def test_same_is_told():
    data = make_data(pl.DataFrame(dict(product_id=["a"], title=["mug"])), pl.DataFrame(dict(query=["travel mug"], product_id=["a"], grade=[2], split=["test"])), name="one")
    upper = misspelled_twin(data, write=lambda text, language, rng: text.upper())
    assert upper.queries["same"].to_list() == [True] and not misspelled_twin(data).queries["same"].any()


def test_the_test_generator_is_never_trained_on():
    assert inspect.signature(misspelled_twin).parameters["write"].default is mistype
    for room in (augment, augmenting, typo_loss):
        assert "mistype" not in inspect.getsource(room).replace("mistyped", ""), room.__name__


def test_training_and_test_generators_write_different_typos(shop):
    texts = shop.queries.filter(locale="en").select("query", "locale")
    trained = augment.misspell(texts["query"].to_list(), texts["locale"].to_list(), augment.Spelling(share=1.0, copies=4))["text"]
    tested = [t for q in texts["query"] for t in typos_of(q, "en", 4, 0)]
    assert len(set(trained) & set(tested)) < 0.3 * len(tested)


# ---- parts

def test_unseen_products_are_unseen(shop):
    part, trained = unseen_products(shop), set(shop.judgments.filter(split="train")["product_id"])
    assert len(part.judgments) and not trained & set(part.products["product_id"]) and set(part.judgments["split"]) == {"test"}
    assert set(part.products["product_id"]) | trained == set(shop.products["product_id"])
    rest = shop.split("test").judgments.join(part.judgments, on=["query_id", "product_id"], how="anti")
    assert set(rest["product_id"]) <= trained


def test_volume_comes_from_the_best_source(market, shop):
    assert query_volume(shop, market.intents)[1] == "volume" and query_volume(shop)[1] == "judgments"
    log = pl.DataFrame(dict(query_id=shop.queries["query_id"], query=shop.queries["query"], product_id=shop.products["product_id"][0], impressions=range(len(shop.queries)), clicks=0, add_to_carts=0, purchases=0))
    asked, by = query_volume(replace(shop, engagement=log))
    assert by == "impressions" and asked["volume"].to_list() == [float(i) for i in range(len(shop.queries))]


def test_a_text_asked_in_two_locales_has_two_volumes():
    products = pl.DataFrame(dict(product_id=["a", "b"], title=["phone", "teléfono"], locale=["us", "es"]))
    judged = pl.DataFrame(dict(query=["iphone"] * 2, product_id=["a", "b"], grade=[2, 2], locale=["us", "es"], split=["test"] * 2))
    log = pl.DataFrame(dict(query=["iphone"] * 2, product_id=["a", "b"], impressions=[1000, 1], clicks=0, add_to_carts=0, purchases=0, locale=["us", "es"]))
    asked = query_volume(make_data(products, judged, engagement=log))[0]
    assert dict(asked.select("locale", "volume").iter_rows()) == {"us": 1000, "es": 1}


def test_bands_are_thirds_of_the_traffic(market, shop):
    bands = query_bands(query_volume(shop, market.intents)[0])
    assert bands["query_id"].to_list() == shop.queries["query_id"].to_list()
    volume = bands.join(market.intents, on="query_id")
    assert volume.group_by("band").agg(pl.col("volume").mean()).sort("volume")["band"].to_list() == ["tail", "torso", "head"]
    share = dict(volume.group_by("band").agg(pl.col("volume").sum() / 3).iter_rows())
    assert share["tail"] <= 1 / 3 and share["head"] >= 1 / 3


def test_slices_hold_what_they_say(shop, twin, cut):
    queries = {name: set(piece.data.queries["query_id"]) for name, piece in cut.items()}
    assert queries["head"] | queries["torso"] | queries["tail"] == queries["clean"] == queries["en"] | queries["es"] | queries["ja"]
    assert len(queries["head"]) + len(queries["torso"]) + len(queries["tail"]) == len(queries["clean"])
    assert {*source_of(queries["misspelled"])} == queries["clean"] and len(queries["misspelled"]) == 3 * len(queries["clean"])
    assert {*source_of(queries["ja, misspelled"])} == queries["ja"]
    assert "by volume" in cut["head"].about and "0 with the same normal form" in cut["misspelled"].about
    assert not any("misspelled" in name for name in make_slices(shop))
    only = replace(shop, products=shop.products, judgments=shop.judgments.filter(locale="en"))
    assert not {"en", "ja"} & set(make_slices(only)), "one locale is no slice"


def test_only_listed_queries_count():
    products = pl.DataFrame(dict(product_id=[f"p{i}" for i in range(30)], title=[f"thing {i}" for i in range(30)], locale=["us"] * 15 + ["jp"] * 15))
    rows = [("long us query", f"p{i}", i % 3, "us", "test") for i in range(12)] + [("short us one", "p1", 2, "us", "test"), ("short jp one", "p20", 2, "jp", "test")]
    data = make_data(products, pl.DataFrame(rows, schema=["query", "product_id", "grade", "locale", "split"], orient="row"), name="lists")
    cut = make_slices(data)
    assert cut["clean"].data.queries["query"].to_list() == ["long us query"] == cut["us"].data.queries["query"].to_list()
    assert cut["jp"].data.queries["query"].to_list() == ["short jp one"], "a locale without a listed query takes all of its queries"


# ---- numbers

def test_clean_is_the_main_number(shop, twin, found):
    main = evaluate(vectors(shop, twin, 0), shop, "test").values
    assert found["a"]["clean"].values == pytest.approx(main, nan_ok=True)
    assert found["a"]["misspelled"].values["ndcg@10"] < main["ndcg@10"]


def test_unseen_slice_searches_only_unseen_products(shop, found):
    trained = set(shop.judgments.filter(split="train")["product_id"])
    assert not trained & set(found["a"]["unseen products"].run["product_id"])


def test_copies_are_drawn_together(found):
    draws, place = query_draws(found["a"]["misspelled"], 50)
    assert len(draws) == 3 * (place.max() + 1) and all((draws[place == p] == draws[place == p][0]).all() for p in range(place.max() + 1))
    assert (draws.sum(axis=0) == len(draws)).all()
    single = query_draws(found["a"]["clean"], 50)[0]
    assert (draws[np.unique(place, return_index=True)[1]] == single).all(), "a query and its copies have the same draws"


def test_table(found):
    table = slice_table(found, n=200)
    assert set(table["slice"]) == set(found["a"]) and set(table["model"]) == {"a", "b"}
    for row in table.filter(pl.col("value").is_not_null()).to_dicts():
        one = found[row["model"]][row["slice"]]
        assert row["value"] == pytest.approx(one.values[row["metric"]]) and row["queries"] == one.counts["queries"]
    assert table.drop_nulls().select(((pl.col("low") <= pl.col("value")) & (pl.col("value") <= pl.col("high"))).all()).item()


def test_differences_are_those_of_compare(found):
    ours = slice_differences(found["a"], found["b"], n=300)
    theirs = compare(found["a"]["clean"], found["b"]["clean"], ("ndcg@10", "auc_2", "auc_1"), n=300)
    for name in ("a", "b", "difference", "low", "high"):
        assert ours.filter(slice="clean")[name].to_list() == pytest.approx(theirs[name].to_list())
    assert ours.filter(slice="clean")["p"].to_list() == pytest.approx(theirs["p"].to_list(), abs=0.06)
    assert (ours.drop_nulls().select((pl.col("p_corrected") >= pl.col("p")).all())).item()
    clustered = ours.filter(slice="misspelled", metric="ndcg@10").select(pl.col("high") - pl.col("low")).item()
    alone = compare(found["a"]["misspelled"], found["b"]["misspelled"], ("ndcg@10",), n=300).select(pl.col("high") - pl.col("low")).item()
    assert clustered > alone, "copies drawn one by one look more certain than they are"


def test_seeds_are_averaged(found):
    several = {name: [found["a"][name], found["b"][name]] for name in found["a"]}
    mean = slice_table(dict(m=several), ("ndcg@10",), n=20)
    for row in mean.filter(pl.col("value").is_not_null()).to_dicts():
        assert row["value"] == pytest.approx(np.mean([found[m][row["slice"]].values["ndcg@10"] for m in "ab"]))
    twice = {name: [one, one] for name, one in found["a"].items()}
    change = slice_differences(twice, several, ("ndcg@10",), n=20).filter(slice="clean")["difference"].item()
    assert change == pytest.approx((found["b"]["clean"].values["ndcg@10"] - found["a"]["clean"].values["ndcg@10"]) / 2)


def test_won_back(found):
    back = won_back(found["a"], found["b"], n=200)
    for row in back.to_dicts():
        clean, typed, after = found["a"]["clean"].values[row["metric"]], found["a"]["misspelled"].values[row["metric"]], found["b"]["misspelled"].values[row["metric"]]
        assert row["share"] == pytest.approx((after - typed) / (clean - typed)) and row["low"] <= row["share"] <= row["high"]
    assert won_back(found["a"], found["a"], n=20)["share"].to_list() == [0, 0, 0]


def test_models_must_be_cut_alike(found):
    with pytest.raises(ValueError, match="cut both the same way"):
        slice_differences(found["a"], {"clean": found["b"]["clean"]})
    with pytest.raises(ValueError, match="different queries"):
        slice_differences({"x": found["a"]["en"]}, {"x": found["a"]["ja"]})
    assert len(bootstrap(found["a"]["en"], "auc_2", 7)) == 8
