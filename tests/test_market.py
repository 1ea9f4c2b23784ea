"""The simulated market: its rule on hand-made cases, its lists and splits, and that words alone do not solve it."""
import re
import time

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import ndcg_score, roc_auc_score

from mine_refine_nb import market as mk
from mine_refine_nb.data import load_data, normalise_query, product_text, query_groups

bm25s = pytest.importorskip("bm25s")
KANA_OR_KANJI = r"[\u3040-\u30ff\u4e00-\u9fff]"


@pytest.fixture(scope="module")
def market(): return mk.build_market()


def test_counts(market):
    data = market.data
    assert data.name == "market" and data.engagement is None and data.notes == ()
    assert data.products.height == 1500 and data.queries.height == 240
    assert dict(data.products["locale"].value_counts().iter_rows()) == dict(en=500, es=500, ja=500)
    assert dict(data.queries["locale"].value_counts().iter_rows()) == dict(en=80, es=80, ja=80)
    assert data.queries["judged"].is_between(16, 24).all()
    assert data.products["product_id"].is_unique().all() and data.products["title"].is_unique().all()
    assert data.products["product_id"].str.contains(r"^p\d{5}$").all()
    assert len({t.category for t in mk.TYPES.values()}) >= 8


def test_every_query_has_every_grade_and_the_mix_is_near_esci(market):
    judgments = market.data.judgments
    assert (judgments.group_by("query_id").agg(pl.col("grade").n_unique())["grade"] == 3).all()
    mix = dict(judgments["grade"].value_counts(normalize=True).iter_rows())
    assert .22 < mix[2] < .4 and .25 < mix[1] < .4 and .3 < mix[0] < .5


@pytest.mark.parametrize("asked, product, grade", [
    (dict(type="coffee"), dict(type="coffee", brand="Aldora", variant="dark", size="1kg"), 2),
    (dict(type="coffee", size="1kg"), dict(type="coffee", size="1kg"), 2),
    (dict(type="coffee", size="1kg"), dict(type="coffee", size="250g"), 1),
    (dict(type="coffee", size="1kg", variant="dark"), dict(type="coffee", size="250g", variant="mild"), 0),
    (dict(type="coffee"), dict(type="coffee_pods"), 1),                                    # sister
    (dict(type="coffee", brand="Aldora"), dict(type="coffee_pods", brand="Montaro"), 0),   # sister and another brand
    (dict(type="coffee"), dict(type="coffee_filters"), 1),                                 # complement
    (dict(type="coffee_filters"), dict(type="coffee"), 0),                                 # not the other way round
    (dict(type="coffee"), dict(type="coffee_table"), 0),                                   # shares a word only
    (dict(type="phone", brand="Voltix", line="Nova"), dict(type="phone", brand="Voltix", line="Aero"), 1),
    (dict(type="phone", brand="Voltix", line="Nova"), dict(type="phone", brand="Sonaro", line="Prime"), 1),  # make: one
    (dict(type="phone", brand="Voltix"), dict(type="phone_case", brand="Orbeon", fits="Voltix"), 1),
    (dict(type="phone", brand="Voltix"), dict(type="phone_case", brand="Voltix", fits="Sonaro"), 0),
    (dict(type="phone_case", fits="Voltix"), dict(type="phone_case", fits="Sonaro"), 0),   # does not fit: two
    (dict(type="phone_case", fits="Voltix"), dict(type="phone_case", fits=None), 2),       # fits any
])
def test_rule(asked, product, grade): assert mk.true_grade(asked, product) == grade


def test_rule_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="spaceship"): mk.true_grade(dict(type="spaceship"), dict(type="phone"))
    with pytest.raises(ValueError, match="type"): mk.true_grade(dict(brand="Voltix"), dict(type="phone"))


def test_truth_equals_judged_grades(market):
    judgments, truth = market.data.judgments, market.truth()
    assert truth.shape == (240, 1500) and truth.dtype == np.int8
    query = {q: i for i, q in enumerate(market.intents["query_id"])}
    product = {p: i for i, p in enumerate(market.data.products["product_id"])}
    rows = [query[q] for q in judgments["query_id"]], [product[p] for p in judgments["product_id"]]
    assert (truth[rows] == judgments["grade"].to_numpy()).all()
    some_q, some_p = market.intents["query_id"][[7, 3]], market.products["product_id"][[900, 5, 44]]
    assert (market.truth(some_q, some_p) == truth[np.ix_([7, 3], [900, 5, 44])]).all()
    with pytest.raises(ValueError, match="product_id 'x'"): market.truth(None, ["x"])


def test_grades_of_a_list_of_pairs(market):
    pairs = market.data.judgments.sample(fraction=1, shuffle=True, seed=1)
    assert (mk.true_grades(market, pairs) == pairs["grade"]).all()
    other = pl.DataFrame(dict(query_id=market.intents["query_id"][[5, 0, 5]], product_id=market.products["product_id"][[9, 9, 1]]))
    assert mk.true_grades(market, other).to_list() == market.truth()[[5, 0, 5], [9, 9, 1]].tolist()
    assert mk.true_grades(market, other.head(0)).is_empty()
    with pytest.raises(ValueError, match="query_id 'x'"): mk.true_grades(market, other.with_columns(query_id=pl.lit("x")))


def test_truth_agrees_with_the_rule_on_names(market):
    truth = market.truth()
    for i, j in np.random.default_rng(0).integers(0, (240, 1500), (200, 2)):
        asked, has = (frame.select(mk.ATTRIBUTES).row(k, named=True) for frame, k in ((market.intents, i), (market.products, j)))
        assert mk.true_grade(asked, has) == truth[i, j]


def test_splits_share_types_but_no_query_near_duplicate_or_intent(market):
    q = market.intents
    assert q.sort("query_id")["split"].to_list() == market.data.queries.sort("query_id")["split"].to_list()
    knots = q.select("split", text=pl.col("query").map_elements(normalise_query, pl.String),
                     near=pl.Series(query_groups(q["query"].to_list())), intent=pl.struct(mk.ATTRIBUTES))
    for what in ("text", "near", "intent"):
        assert knots.group_by(what).agg(pl.col("split").n_unique())["split"].max() == 1, what
    assert knots["intent"].n_unique() < len(knots)    # there are paraphrases to keep together
    types = {split: set(group["type"]) for (split,), group in q.group_by("split")}
    assert set(types) == {"train", "validation", "test"} and len(types["test"] & types["train"]) / len(types["test"]) > .7
    assert set(q.select("locale", "split").unique().rows()) == {(l, s) for l in mk.LOCALES for s in types}


def test_same_seed_same_market():
    one, two, other = (mk.simulate(300, 30, seed=s) for s in (3, 3, 4))
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert one.products.equals(two.products) and one.judgments.equals(two.judgments)


def test_languages(market):
    titles = {locale: group["title"] for (locale,), group in market.data.products.group_by("locale")}
    assert titles["ja"].str.contains(KANA_OR_KANJI).all()
    assert titles["es"].str.contains("[áéíóúñü]").mean() > .8
    assert not titles["en"].str.contains(r"[^\x00-\x7f]").any()
    queries = {locale: group["query"] for (locale,), group in market.data.queries.group_by("locale")}
    assert queries["ja"].str.contains(KANA_OR_KANJI).all() and queries["es"].str.contains("[áéíóúñü]").any()
    assert market.data.products["category"].str.split(" > ").list.len().eq(3).all()
    assert not titles["es"].str.contains(r", \d, ").any()    # a decimal comma is no separator


@pytest.mark.parametrize("locale", mk.LOCALES)
def test_no_phrase_names_two_types(locale):
    said = [phrase for triple in mk.NAMES[locale].values() for group in triple for phrase in group]
    assert set(mk.NAMES[locale]) == set(mk.TYPES) and len(said) == len(set(said))


def test_errors_and_fewer_locales():
    assert mk.simulate(200, 20, locales=("ja",)).products["locale"].unique().to_list() == ["ja"]
    with pytest.raises(ValueError, match="more products"): mk.simulate(30, 300)
    with pytest.raises(ValueError, match="locales"): mk.simulate(locales=("fr",))
    with pytest.raises(ValueError, match="per locale"): mk.simulate(queries=5)


def test_judged_list_explains_itself(market):
    shown = mk.judged_list(market, market.intents["query_id"][0])
    assert shown["grade"].to_list() == sorted(shown["grade"], reverse=True)
    expected = {"exact": 2, "substitute": 1, "complement": 1, "irrelevant": 0}
    assert all(expected[why.split(":")[0]] == grade for grade, why in shown.select("grade", "why").iter_rows())


def test_twenty_thousand_products_in_seconds():
    start = time.perf_counter()
    data = mk.simulate(20_000)
    assert time.perf_counter() - start < 20
    assert data.products.height == 20_000 and data.products["title"].is_unique().all()


# prices, popularity, volume: drawn apart, so that the judged data of a seed stay what they were

def test_judged_data_of_a_seed_stay():
    assert mk.simulate(300, 30, seed=3).fingerprint == "9599352368ccdcb3"
    assert mk.simulate(200, 20, locales=("ja",)).fingerprint == "b161626108a5b27c"


def test_prices_follow_type_size_and_brand():
    products = mk.price_products(mk.draw_products(30_000, mk.LOCALES, np.random.default_rng(0)), seed=0)
    assert products["price"].dtype == pl.Float64 and products["price"].min() > .9 and products["price"].null_count() == 0
    assert ((products["price"] + .01 - (products["price"] + .01).round()).abs() < 1e-9).all()
    median = lambda *by: {key: value for *key, value in products.group_by(*by).agg(pl.col("price").median()).iter_rows()
                          for key in [tuple(key)]}
    of_type, of_size, of_brand = median("type"), median("type", "size"), median("type", "brand")
    assert of_type["laptop",] > of_type["tablet",] > of_type["headphones",] > of_type["phone_case",]
    for kind, sizes in mk.KINDS.items():
        for t in mk.TYPES.values():
            if t.size == kind and kind not in ("shoe", "wear"):
                prices = [of_size[t.key, size] for size in sizes]
                assert all(more > 1.1 * less for less, more in zip(prices, prices[1:])), (t.key, prices)
    assert of_brand["phone", "Sonaro"] > 1.15 * of_brand["phone", "Voltix"] > 1.3 * of_brand["phone", "Kirameq"]
    logs = products.filter(type="shampoo", size="400ml", brand="Florelle")["price"].log()
    assert .1 < logs.std() < .35                                                     # two of one kind differ, within reason


def test_popularity_is_heavy_tailed_and_says_nothing_about_grades(market):
    popularity = mk.draw_popularity(100_000, np.random.default_rng(0))
    assert popularity.mean() == pytest.approx(1, abs=.05) and popularity.min() > 0
    assert .4 < popularity.top_k(10_000).sum() / popularity.sum() < .6
    judged = market.data.judgments.join(market.products, on="product_id")
    assert abs(judged.select(pl.corr("grade", pl.col("popularity").log())).item()) < .06


def test_volume_is_zipf_and_short_queries_come_first(market):
    for (locale,), part in market.intents.group_by("locale"):
        volume = part["volume"].sort(descending=True)
        assert volume.sum() == pytest.approx(1) and volume[0] / volume[9] == pytest.approx(10)
    bands = market.intents.with_columns(mk.volume_band(market.intents), asks=pl.sum_horizontal(pl.col(mk.ATTRIBUTES[1:]).is_not_null()))
    by = {band: group for (band,), group in bands.group_by("band")}
    assert by["head"].height < by["torso"].height < by["tail"].height
    assert by["head"]["asks"].mean() < by["torso"]["asks"].mean() < by["tail"]["asks"].mean() and by["tail"]["asks"].min() == 0
    assert by["head"]["volume"].min() >= by["torso"]["volume"].max() >= by["torso"]["volume"].min() >= by["tail"]["volume"].max()
    shares = bands.group_by("locale", "band").agg(pl.col("volume").sum())
    assert (shares.filter(band="head")["volume"].is_between(1 / 3, .6)).all() and (shares.filter(band="tail")["volume"] <= 1 / 3).all()


# typos

def edits(a, b):
    "Levenshtein distance."
    row = range(len(b) + 1)
    for i, x in enumerate(a, 1):
        row = [last := i] + [last := min(above + 1, last + 1, corner + (x != y)) for corner, above, y in zip(row, row[1:], b)]
    return row[-1]


@pytest.mark.parametrize("locale", mk.LOCALES)
def test_typos_change_the_text_and_never_empty_it(locale, market):
    rng = np.random.default_rng(0)
    for text in [*market.intents.filter(locale=locale)["query"], "a", "靴", "ー", "卓", "é", " x ", "10"]:
        for made in (mk.mistype(text, locale, rng) for _ in range(10)):
            assert made.strip() and made != text
            if locale == "en": assert edits(text, made) <= 2 or text == " x ", (text, made)
    assert mk.mistype("", locale, rng) == ""


def test_typos_are_those_of_the_language():
    made = lambda text, locale: {mk.mistype(text, locale, np.random.default_rng(s)) for s in range(400)}
    english, spanish, japanese = made("gel pens", "en"), made("té limón", "es"), made("コーヒー 携帯 ショップ", "ja")
    assert {"gle pens", "gel pes", "gel penss", "gelpens", "grl pens"} <= english
    assert "te limon" in spanish and sum("te limon" == mk.mistype("té limón", "es", np.random.default_rng(s)) for s in range(400)) > 120
    assert {"コヒー 携帯 ショップ", "コーヒー 形態 ショップ", "こーひー 携帯 ショップ", "コーヒー 携帯 シヨップ", "コーヒー携帯 ショップ"} <= japanese
    assert not any(c in "".join(japanese) for c in "abcdefghijklmnopqrstuvwxyz")
    assert mk.mistype("gel pens", "en", np.random.default_rng(5)) == mk.mistype("gel pens", "en", np.random.default_rng(5))
    with pytest.raises(ValueError, match="locales"): mk.mistype("pomme", "fr", np.random.default_rng(0))


# any size

def test_written_market_is_the_built_one(tmp_path):
    written, built = mk.write_market(tmp_path / "shop", 1000, 48, seed=6), mk.build_market(1000, 48, seed=6)
    assert load_data(tmp_path / "shop").fingerprint == built.data.fingerprint == written.data.fingerprint
    assert written.products.equals(built.products) and written.intents.equals(built.intents)
    assert written.data.products.equals(built.data.products)
    assert sorted(p.name for p in (tmp_path / "shop").iterdir()) == ["judgments.parquet", "products.parquet"]


def test_parts_of_any_size_give_the_same_titles():
    products = mk.draw_products(2000, mk.LOCALES, np.random.default_rng(0))
    whole = mk.write_products(products, np.random.default_rng(1))
    for rows in (1, 333, 2000): assert pl.concat(mk.write_parts(products, np.random.default_rng(1), rows)).equals(whole)
    assert whole["title"].is_unique().all()


def test_large_shop_is_judged_within_a_window(tmp_path, monkeypatch):
    small = mk.build_market(900, 48, seed=1)
    monkeypatch.setattr(mk, "WINDOW", 300)
    assert mk.build_market(900, 48, seed=1).data.fingerprint == small.data.fingerprint      # 300 of each locale: no change
    built, written = mk.build_market(3000, 48, seed=1), mk.write_market(tmp_path / "shop", 3000, 48, seed=1)
    assert built.products.height == 3000 and dict(written.products["locale"].value_counts().iter_rows()) == dict(en=300, es=300, ja=300)
    assert load_data(tmp_path / "shop").fingerprint == built.data.fingerprint
    assert built.data.judgments.join(written.products, on="product_id", how="anti").is_empty()
    assert written.products.equals(built.products.join(written.products, on="product_id", how="semi", maintain_order="left"))
    assert (mk.true_grades(written, written.data.judgments) == written.data.judgments["grade"]).all()


def test_nothing_half_written(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"): mk.write_market(tmp_path / "full", 300, 48)
    with pytest.raises(ValueError, match="answer only"): mk.write_market(tmp_path / "new", 30, 300)
    with pytest.raises(ValueError, match="more products"): mk.build_market(1, 48)
    assert [p.name for p in tmp_path.iterdir()] == ["full"] and (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_hundred_thousand_products_on_disk_in_seconds(tmp_path):
    start = time.perf_counter()
    mk.write_market(tmp_path / "shop", 100_000, 60)
    assert time.perf_counter() - start < 20
    assert pl.scan_parquet(tmp_path / "shop" / "products.parquet").select(pl.col("title").n_unique()).collect().item() == 100_000


def words(text, locale):
    found = re.findall(r"\w+", text.lower())
    return found if locale != "ja" else [w[i:i + 2] for w in found for i in range(max(1, len(w) - 1))]


def bm25(data):
    texts, parts = data.products.select("product_id", "locale", text=product_text(data.products)), []
    for (locale,), queries in data.queries.group_by("locale"):
        shop, index = texts.filter(locale=locale), bm25s.BM25()
        index.index([words(t, locale) for t in shop["text"]], show_progress=False)
        parts += [shop.select("product_id", query_id=pl.lit(q), score=pl.Series(index.get_scores(words(text, locale))))
                  for q, text in queries.select("query_id", "query").iter_rows()]
    return data.judgments.join(pl.concat(parts), on=["query_id", "product_id"])


@pytest.mark.parametrize("seed", [0, 1])
def test_words_alone_do_not_solve_it(seed):
    scored = bm25(mk.simulate(seed=seed))
    for locale in (None, *mk.LOCALES):
        pairs = scored if locale is None else scored.filter(locale=locale)
        assert .52 < roc_auc_score(pairs["grade"] == 2, pairs["score"]) < .75, locale
        assert .58 < roc_auc_score(pairs["grade"] >= 1, pairs["score"]) < .78, locale
        lists = [g.select("grade", "score").to_numpy().T for _, g in pairs.group_by("query_id")]
        assert np.mean([ndcg_score([grades], [scores], k=10) for grades, scores in lists]) < .87, locale


def test_complements_share_more_words_than_exact_matches(market):
    data = market.data
    titles = dict(data.products.select("product_id", "title").iter_rows())
    shared = {relation: [] for relation in mk.RELATIONS}
    for row in data.queries.filter(pl.col("locale") != "ja").iter_rows(named=True):
        judged, asked = data.judgments.filter(query_id=row["query_id"])["product_id"], set(words(row["query"], "en"))
        for product, code in zip(judged, market.relations([row["query_id"]], judged)[0]):
            shared[mk.RELATIONS[code]].append(len(asked & set(words(titles[product], "en"))) / len(asked))
    mean = {relation: np.mean(values) for relation, values in shared.items()}
    assert mean["complement"] > mean["exact"] > mean["substitute"] > mean["irrelevant"], mean
