"""Augmentation: typos that stay in their place, copies that change no judgment, queries that products can answer."""
import json
import threading
import unicodedata
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from mine_refine_nb import augment
from mine_refine_nb.augment import (BARE, FACTS, FITS, KEYS, OPERATORS, PROVENANCE, STARTS_NO_WORD, SYNTHETIC, Spelling, augment_spelling, augment_synthetic,
                                    cut, exchange, keeps_product, kind_of, known_brands, misspell, product_facts, romaji, typing_language,
                                    round_trip, sample_queries, spelling_speed, template_queries, trainable, triple_overlap, width, write_template)
from mine_refine_nb.data import find_leaks, make_data, normalise_query
from mine_refine_nb.augmenting import (ARMS, HELD_OUT, KINDS, Arm, augmented, augmentation_arms, both_twins, fitting_recipe, mined_for_copies, slip_once,
                                       tie_losses)
from mine_refine_nb.encoder import Embeddings, embed, load_backbone
from mine_refine_nb.grades import DEFAULT_GUIDELINE
from mine_refine_nb.judging import judged_rows
from mine_refine_nb.market import simulate
from mine_refine_nb.mining import mine
from mine_refine_nb.remote import RemoteAnnotator
from mine_refine_nb.training import Recipe
from mine_refine_nb.typo_loss import TypoLoss, closeness, draw_pairs
from mine_refine_nb.writing import (DRAFTS, LocalWriter, RemoteWriter, funnel, keep_agreed, keep_found, keep_new, keep_rules, read_query, write_queries, writing_chat,
                                    written_queries)

WORDS = dict(
    en="wireless headphones steel water bottle running shoes phone case elephant receiver coffee mug usb tv".split(),
    es="cámara zapatillas botella café niño lámpara silla ergonómica calabaza zanahoria pequeño hilo".split(),
    ja="ワイヤレスイヤホン コーヒーメーカー ジャケット バッグ 充電器 きゅうり 収納棚 カメラ めがね usb".split())
MODELS = "wh-1000xm5 65w iphone13 x100 4k 30x40 a7".split()
BRANDS = ["Sonaro", "Green Home", "ソナロ", "Ñandú"]
ALL = Spelling(share=1.0, copies=2)


@st.composite
def queries(draw, words=None):
    "A query of a language with words, model numbers and brands."
    locale = draw(st.sampled_from(sorted(WORDS)))
    pool = words or WORDS[locale] + MODELS + [b.lower() for b in BRANDS]
    return " ".join(draw(st.lists(st.sampled_from(pool), min_size=1, max_size=5))), locale


def only(*names: str, **more) -> Spelling:
    "Settings with these operators alone."
    return Spelling(**{name: float(name in names) for name in OPERATORS}, share=1.0, **more)


@pytest.fixture(scope="module")
def shop():
    return simulate(240, 48)


@pytest.fixture(scope="module")
def written(shop):
    return template_queries(shop, 300, seed=3)


# ---- text in pieces

@given(st.text(max_size=40))
def test_pieces_are_the_text(text):
    assert "".join(cut(text)) == text
    assert all(kind_of(piece) in {"space", "kana", "kanji", "latin", "accented", "other", "kept"} for piece in cut(text))


def test_kinds():
    kinds = {"shoe": "latin", "café": "accented", "wh-1000xm5": "kept", "カメラ": "kana", "めがね": "kana", "充電": "kanji", "обувь": "other",
             "ｶﾒﾗ": "kept", "ＵＳＢ": "kept", "-": "kept", "　": "space", " ": "space", "१२": "kept"}
    assert {piece: kind_of(piece) for piece in kinds} == kinds


# ---- operators

def test_keyboards_differ_by_layout():
    assert set(KEYS["en"]["g"]) == set("fhtyvb") and set(KEYS["en"]["q"]) == set("wa")
    assert "ñ" in KEYS["es"]["l"] and "l" in KEYS["es"]["ñ"] and "ñ" not in KEYS["en"]
    assert set(KEYS["ja"]["キ"]) == set("カクケコ") and set(KEYS["ja"]["き"]) == set("かくけこ")
    for keys in KEYS.values():
        assert all(a in keys[b] for a, near in keys.items() for b in near), "who touches is touched"


@pytest.mark.parametrize("name,word,language,expected", [
    ("accent", "pingüino", "es", {"pinguino"}), ("script", "カメラ", "ja", {"かめら"}), ("script", "めがね", "ja", {"メガネ"}),
    ("romaji", "ジャケット", "ja", {"jaketto"}), ("long_mark", "ケース", "ja", {"ケス", "ケ-ス"}), ("small_kana", "ッ", "ja", {"ツ"}),
    ("width", "バッグ", "ja", {"ﾊﾞｯｸﾞ"}), ("width", "usb", "ja", {"ｕｓｂ"}), ("width", "usb", "en", {"usb"}), ("reading", "掃除機", "ja", {"そうじき"}),
    ("phonetic", "hilo", "es", {"hilo", "ilo"}), ("phonetic", "bote", "es", {"bote", "vote"}), ("phonetic", "valle", "es", {"valle", "balle", "vaye"}),
    ("phonetic", "バッグ", "ja", {"バック", "バッグ", "パッグ"}), ("phonetic", "PHONE", "en", {"PHONE", "FONE"}), ("join", " ", "en", {""}),
    ("split", "mugs", "en", {"mugs"}), ("omit", "mug", "en", {"mug"}), ("transpose", "mug", "en", {"mug"}), ("double", "tv", "en", {"tv"}),
    ("split", "abcdef", "en", {"ab cdef", "abc def", "abcd ef"})])
def test_operator(name, word, language, expected):
    assert {OPERATORS[name](word, Random(i), language) for i in range(200)} == expected


@given(st.sampled_from(["transpose", "omit", "double", "keyboard"]), st.text("abcdefghij", min_size=4, max_size=9), st.integers(0, 99))
def test_slips_of_the_finger(name, word, seed):
    made = OPERATORS[name](word, Random(seed), "en")
    assert len(made) - len(word) == dict(transpose=0, omit=-1, double=1, keyboard=0)[name]
    if name == "transpose":
        assert Counter(made) == Counter(word)
    if name == "keyboard":
        (changed,) = [(a, b) for a, b in zip(word, made) if a != b]
        assert changed[1] in KEYS["en"][changed[0]]


def test_first_letter_is_rarely_wrong():
    made = misspell([f"{word} {n}" for word in WORDS["en"][:10] for n in range(200)], None, only("keyboard", "omit", "transpose", "double"))
    assert 0.01 < sum(a[0] != b[0] for a, b in zip(made["source"], made["text"])) / len(made) < 0.1


@given(st.text("カキクサシスタツナハファィティジチャュョッーン", min_size=2, max_size=8))
def test_width_and_romaji_keep_the_sounds(word):
    assert unicodedata.normalize("NFKC", width(word, Random(0), "ja")) == unicodedata.normalize("NFKC", word)
    latin = romaji(word)
    assert latin == word or latin.isascii() and latin.isalpha()


def test_every_operator_is_reached():
    texts, locales = zip(*[(f"{word} {other}", locale) for locale, words in WORDS.items() for word in words for other in words])
    made = misspell(texts, locales, Spelling(share=1.0, copies=4))
    assert set(made["operators"].str.split("+").explode()) == set(OPERATORS) == set(FITS)
    for name in OPERATORS:
        rows = misspell(texts, locales, only(name))
        assert len(rows) and set(rows["operators"].str.split("+").explode()) == {name}


def test_rates_are_rates():
    counts = Counter(misspell(sample_queries(1000)[0], None, only("double", "keyboard", most=1))["operators"])
    assert counts["double"] / 1000 == pytest.approx(0.5, abs=0.06)
    heavy = Spelling(**{name: 0.0 for name in OPERATORS} | dict(double=3.0, keyboard=1.0), share=1.0, most=1)
    assert Counter(misspell(sample_queries(1000)[0], None, heavy)["operators"])["double"] / 1000 == pytest.approx(0.75, abs=0.06)


# ---- many queries

@settings(max_examples=80, deadline=None)
@given(st.lists(queries(), min_size=1, max_size=12), st.integers(0, 9))
def test_never_empty_never_another_query(items, seed):
    texts, locales = zip(*items)
    avoid = [augment.keyboard("bottle", Random(i), "en") for i in range(10)]
    made = misspell(texts, locales, Spelling(share=1.0, copies=3, most=3, again=1.0, seed=seed), avoid, BRANDS)
    others = {*texts, *avoid}
    forms = {*map(normalise_query, others)}
    for source, text in zip(made["source"], made["text"]):
        assert normalise_query(text) and text == text.strip() and text not in others
        assert normalise_query(text) not in forms - {normalise_query(source)}
    assert made["text"].is_unique().all() and made["row"].is_sorted()
    assert [texts[row] for row in made["row"]] == made["source"].to_list()


def test_avoid_is_heeded():
    near = {misspell(["bottle"], ["en"], Spelling(share=1.0, seed=i, width=0))["text"][0] for i in range(300)}
    made = misspell(["bottle"] , ["en"], ALL, avoid=[f"{text.upper()}!" for text in near])
    assert not {*made["text"]} & near and len(near) > 30


@settings(max_examples=50, deadline=None)
@given(st.lists(queries(), min_size=2, max_size=8, unique_by=lambda q: q[0]))
def test_seed_and_independence(items):
    texts, locales = map(list, zip(*items))
    made = misspell(texts, locales, ALL)
    assert made.equals(misspell(texts, locales, ALL))
    alone = misspell(texts[:1], locales[:1], ALL)
    others = {normalise_query(text) for text in texts[1:]}
    if not others & {normalise_query(text) for text in alone["text"]}:
        assert made.filter(row=0)["text"].to_list() == alone["text"].to_list()


def test_seeds_differ():
    texts, locales = sample_queries(200)
    assert (misspell(texts, locales, ALL)["text"] != misspell(texts, locales, Spelling(share=1.0, copies=2, seed=1))["text"]).mean() > 0.8


@settings(max_examples=80, deadline=None)
@given(st.lists(queries(), min_size=1, max_size=6), st.integers(0, 20))
def test_model_numbers_are_safe(items, seed):
    texts, locales = zip(*items)
    made = misspell(texts, locales, Spelling(share=1.0, copies=3, most=3, again=1.0, seed=seed), brands=BRANDS)
    for source, text in zip(made["source"], made["text"]):
        have = text.split()
        assert [w for w in source.split() if w in MODELS] == [w for w in have if w in MODELS]


def test_digits_with_kanji_are_safe():
    made = misspell(["iPhone13ケース", "4Kテレビ", "電池2個"], ["ja"] * 3, Spelling(share=1.0, copies=6))
    for source, token in (("iPhone13ケース", "iPhone13"), ("4Kテレビ", "4K"), ("電池2個", "2個")):
        rows = made.filter(source=source)["text"]
        assert len(rows) and rows.str.contains(token).all()


def test_nothing_to_misspell():
    assert len(misspell(["65w", "", "  ", "!?", "4k 30x40", "x100 a7"], None, ALL)) == 0
    assert len(misspell([], None, ALL)) == 0


def test_brands_get_only_slips_of_the_key():
    texts = [f"sonaro {a} {b}" for a in WORDS["en"] for b in WORDS["en"]]
    plain, careful = misspell(texts, None, ALL), misspell(texts, None, ALL, brands=BRANDS)
    hit = lambda rows: rows.filter(~pl.col("text").str.starts_with("sonaro"))
    slips = hit(careful)
    assert 0 < len(slips) < 0.5 * len(hit(plain))
    assert all("keyboard" in names for names in slips["operators"])
    for text in slips["text"]:
        word = text.split()[0]
        assert len(word) == 6 and sum(a != b for a, b in zip(word, "sonaro")) == 1
    none = misspell(texts, None, Spelling(share=1.0, copies=2, brand_rate=0.0), brands=BRANDS)
    assert len(none) and not len(hit(none))


def test_no_copy_has_the_form_of_another_query():
    "A width variant of a typo is that typo: `bag` as typed in full width must not stand for `bat`."
    pairs = misspell(["カメラ", "かめら"], ["ja", "ja"], only("script", copies=3))
    assert len(pairs) == 0
    near = {row for i in range(200) for row in misspell(["bottle"], ["en"], only("omit", seed=i))["text"]}
    assert not len(misspell(["bottle"], ["en"], only("omit", copies=3), avoid=[f"{text.upper()} !" for text in near]))
    assert not len(misspell(["BOTTLE"], ["en"], only("omit", copies=3), avoid=near))
    assert misspell(["カメラ"], ["ja"], only("width", copies=3))["text"].to_list() == ["ｶﾒﾗ"]    # its own form, and only once
    assert len(near) == 5    # six letters, and either t left out gives the same


def test_brand_alone_is_mostly_left():
    texts, settings_ = [f"sonaro {n}" for n in range(400)], Spelling(share=1.0, brand_rate=0.2)
    assert 0.12 < len(misspell(texts, None, settings_, brands=BRANDS)) / 400 < 0.28
    assert len(misspell(texts, None, settings_)) > 380


def test_brands_of_two_words_and_of_kana():
    made = misspell(["green home lamp", "ソナロイヤホン"], ["en", "ja"], Spelling(share=1.0, copies=8, brand_rate=0.0), brands=BRANDS)
    assert made.filter(row=0)["text"].str.starts_with("green home ").all()
    assert made.filter(row=1)["text"].str.starts_with("ソナロ").all() and set(made["row"]) == {0, 1}
    assert not misspell(["home lamp"], ["en"], Spelling(share=1.0, copies=20, brand_rate=0.0), brands=BRANDS)["text"].str.starts_with("home ").all()
    assert known_brands(["", None, " "]) == {}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(WORDS["ja"]), min_size=1, max_size=4), st.integers(0, 30))
def test_japanese_is_well_formed(words, seed):
    made = misspell([" ".join(words)], ["ja"], Spelling(share=1.0, copies=6, most=3, again=1.0, seed=seed, join=0))
    for text in made["text"]:
        for word in text.split():
            assert word[0] not in STARTS_NO_WORD and word[0] not in "ﾞﾟｰ"
            assert all(i and ("ｦ" <= word[i - 1] <= "ﾝ") for i, c in enumerate(word) if c in "ﾞﾟ")


def test_share_and_copies():
    texts, locales = sample_queries(1000)
    assert len(misspell(texts, locales, Spelling(share=0.0))) == 0
    assert misspell(texts, locales, Spelling(share=0.3))["row"].n_unique() == pytest.approx(300, abs=50)
    assert len(misspell(texts, locales, Spelling(share=1.0, copies=3))) > 2900
    errors = lambda **kw: (misspell(texts, locales, Spelling(share=1.0, **kw))["operators"].str.count_matches(r"\+") + 1)
    assert errors(most=1, again=1.0).max() == 1 and errors(most=3, again=1.0).max() == 3 and errors(again=0.0).max() == 1


@pytest.mark.parametrize("wrong", [dict(share=1.1), dict(copies=0), dict(most=0), dict(keyboard=-1), dict(omit=float("nan")), dict(again=2), dict(brand_rate=-0.1)])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=f"augment: .*{next(iter(wrong))}"):
        Spelling(**wrong)
    with pytest.raises(ValueError, match="every operator"):
        Spelling(**{name: 0.0 for name in OPERATORS})


def test_languages():
    assert [typing_language(x) for x in ("us", "es-MX", "jp", None, "fr")] == ["en", "es", "ja", "en", "en"]


def test_speed():
    assert spelling_speed(20_000) < 250    # 5 s for 20,000; the page aims at 20 s for a million


def test_triples():
    assert triple_overlap("mug", "mug") == 1 and triple_overlap("mug", "mgu") == 0 and triple_overlap("", "") == 1
    assert triple_overlap("ab", "ab cd") == 0.5


# ---- in the training set

def test_additive_leaves_the_clean_rows(shop):
    added = augment_spelling(shop, ALL)
    real, new = added.data.judgments.head(len(shop.judgments)), added.data.judgments.slice(len(shop.judgments))
    assert real.equals(shop.judgments) and real.schema == added.data.judgments.schema == shop.judgments.schema
    assert set(new["split"]) == {"train"} and not {*new["query_id"]} & {*shop.queries["query_id"]}
    assert added.data.products is shop.products and added.pairs is None
    assert added.provenance.schema == PROVENANCE and added.provenance["query_id"].is_unique().all()
    assert set(added.provenance["query_id"]) == set(new["query_id"])
    train = set(shop.queries.filter(split="train")["query_id"])
    assert len(added.provenance) > len(train) and set(added.provenance["source_query_id"]) <= train


def test_copies_have_the_same_judgments(shop):
    added = augment_spelling(shop, ALL)
    for new, source in added.provenance.select("query_id", "source_query_id").rows():
        of = lambda i: added.data.judgments.filter(query_id=i).drop("query_id", "query")
        assert of(new).equals(of(source))


def test_no_leak():
    "Two steps from a training query may be one step from a test query: such copies are dropped."
    products = pl.DataFrame(dict(product_id=["a"], title=["cover"]))
    rows = [("garden chair cushion cover green", "train"), ("gaden chair cushon cover gren", "test"), ("coffee grinder", "validation")]
    data = make_data(products, pl.DataFrame([(q, "a", 2, "en", s) for q, s in rows], schema=["query", "product_id", "grade", "locale", "split"], orient="row"))
    typos = only("omit", copies=60, most=2, again=1.0)
    unchecked = misspell([rows[0][0]], ["en"], typos)["text"].to_list()
    both = pl.DataFrame(dict(query=[*unchecked, rows[1][0]], split=["train"] * len(unchecked) + ["test"]))
    assert len(data.queries) == 3 and find_leaks(both).any(), "the case is one"
    added = augment_spelling(data, typos)
    assert len(added.provenance) and not find_leaks(added.data.queries).any()


def test_near_duplicates_of_unseen_queries_are_dropped():
    long = "extra large waterproof outdoor garden furniture cover for table and chairs"
    new = pl.DataFrame(dict(query=[long.replace("garden", "gardne"), "phone case"]))
    kept = augment.without_leaks(new, pl.DataFrame(dict(query=[long, "phone case black"], split=["test", "train"])))
    assert kept["query"].to_list() == ["phone case"]


def test_modes(shop):
    added, swapped, tied = (augment_spelling(shop, ALL, mode) for mode in ("additive", "replace", "tie"))
    assert tied.data.judgments.equals(added.data.judgments) and len(tied.pairs) == len(tied.provenance)
    assert set(tied.pairs["clean"]) <= set(shop.queries.filter(split="train")["query"])
    gone = set(swapped.provenance["source_query_id"])
    left = set(swapped.data.queries["query_id"])
    assert gone and not gone & left and set(shop.queries["query_id"]) - gone <= left
    unseen = lambda d: d.judgments.filter(pl.col("split") != "train")
    assert unseen(swapped.data).equals(unseen(shop)) and unseen(added.data).equals(unseen(shop))
    assert set(swapped.provenance["query_id"]) == set(added.provenance["query_id"])
    with pytest.raises(ValueError, match="no mode 'additve'"):
        augment_spelling(shop, ALL, "additve")


def test_nothing_added(shop):
    none = augment_spelling(shop, Spelling(share=0.0), "tie")
    assert none.data.judgments.equals(shop.judgments) and len(none.provenance) == len(none.pairs) == 0


# ---- queries from facts

def test_facts():
    rows = [("a", "Acme 12 oz Steel Travel Mug, Black", None, "Acme", "us"), ("b", "Funda de cuero negra 15 cm", "Hogar > Fundas", None, "es"),
            ("c", "ソナロ 本革 ケース 黒 5個", None, "ソナロ", "jp"), ("d", "blackberry cottonwood 12gbx", "Food > Jam", None, "en")]
    products = pl.DataFrame(rows, schema=["product_id", "title", "category", "brand", "locale"], orient="row").with_columns(description=pl.lit(None, pl.String))
    assert product_facts(products).select(FACTS).rows() == [
        ("travel mug", "acme", "black", "steel", "12 oz"), ("fundas", None, "negra", "cuero", "15 cm"),
        ("ケース", "ソナロ", "黒", "本革", "5個"), ("jam", None, None, None, None)]


def test_word_order():
    facts = dict(thing="mug", brand="acme", colour="black", size="12 oz", material=None)
    assert [write_template(facts, language) for language in ("en", "es", "ja")] == [
        "acme black mug 12 oz", "mug black acme 12 oz", "acme mug black 12 oz"]


def test_written_queries(shop, written):
    assert written.schema == SYNTHETIC and set(written["kind"]) == {"positive", "long-tail", "near-miss"}
    facts = {row["product_id"]: row for row in product_facts(shop.products).to_dicts()}
    forms = [normalise_query(q) for q in written["query"]]
    assert len(set(forms)) == len(forms) and not set(forms) & {normalise_query(q) for q in shop.queries["query"]}
    assert set(written["product_id"]) <= set(trainable(shop)["product_id"])
    for row in written.to_dicts():
        product, asked = facts[row["product_id"]], row["facts"].split("+")
        assert "thing" in asked and row["locale"] == product["locale"]
        assert len(asked) >= 3 if row["kind"] == "long-tail" else len(asked) >= 2
        held = [product[name] in row["query"] for name in asked if name != row["exchanged"]]
        assert all(held)
        if row["kind"] == "near-miss":
            assert row["exchanged"] in asked and row["grade"] == (0 if row["exchanged"] == "thing" else 1)
            assert row["query"] != write_template({name: product[name] for name in asked}, typing_language(row["locale"]))
        else:
            assert row["grade"] == 2 and row["exchanged"] is None


def test_written_shares_and_seed(shop, written):
    assert written.equals(template_queries(shop, 300, seed=3)) and not written.equals(template_queries(shop, 300, seed=4))
    assert set(template_queries(shop, 40, near_miss=1.0, long_tail=0.0)["kind"]) == {"near-miss"}
    assert set(template_queries(shop, 40, near_miss=0.0, long_tail=0.0)["kind"]) == {"positive"}
    with pytest.raises(ValueError, match="at most 1"):
        template_queries(shop, 10, near_miss=0.7, long_tail=0.7)


def test_no_exchange_for_what_may_hold():
    product = dict(locale="en", top="Home", said="acme mug black and white", thing="mug", brand="acme", colour="black")
    pool = {("en", "colour"): [("white", "Home"), ("black", "Home")], ("en", "thing"): [("cup", "Home"), ("cap", None), ("mug", "Fashion")]}
    assert all(exchange(product, [fact], pool, Random(i)) is None for fact in ("colour", "thing") for i in range(20))
    pool = {("en", "colour"): [("red", "Home")], ("en", "thing"): [("shoe", "Fashion")]}
    assert exchange(product, ["colour"], pool, Random(0)) == ("colour", "red", 1)
    assert exchange(product, ["thing"], pool, Random(0)) == ("thing", "shoe", 0)


def test_products_of_unseen_queries_stay_unseen(shop):
    judged = lambda split: set(shop.judgments.filter(pl.col("split") == split)["product_id"])
    hidden = (judged("test") | judged("validation")) - judged("train")
    assert hidden and set(trainable(shop)["product_id"]) == set(shop.products["product_id"]) - hidden


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_keeps_product_is_a_rank(seed, k, block):
    rng = np.random.default_rng(seed)
    queries_, products = rng.normal(size=(7, 5)), rng.normal(size=(12, 5))
    targets = rng.integers(12, size=7)
    ranks = [1 + sum(q @ p > q @ products[t] for p in products) for q, t in zip(queries_, targets)]
    assert keeps_product(queries_, products, targets, k, block).tolist() == [rank <= k for rank in ranks]


def test_round_trip_by_locale(shop, written):
    dim = len(shop.products)
    products = np.eye(dim, dtype="f4")
    at = {p: i for i, p in enumerate(shop.products["product_id"])}
    found = products[[at[p] for p in written["product_id"]]]
    assert round_trip(written, found, shop, products, k=1).equals(written)
    lost = round_trip(written, np.roll(found, 1, axis=1), shop, products, k=1)
    assert set(lost["grade"]) == {0, 1} and len(lost) == written.filter(pl.col("grade") < 2).height
    with pytest.raises(ValueError, match="2 query vectors for 1"):
        keeps_product(found[:2], products, np.array([0]))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_synthetic_share(shop, written, share):
    made = augment_synthetic(shop, written, share, seed=1)
    train = made.data.queries.filter(split="train")
    assert len(made.provenance) / len(train) <= share and len(made.provenance) >= min(len(written), int(share / (1 - share) * 28)) - 1
    assert made.data.judgments.head(len(shop.judgments)).equals(shop.judgments)
    new = made.data.judgments.slice(len(shop.judgments))
    assert set(new["split"]) <= {"train"} and set(new["query_id"]) == set(made.provenance["query_id"])
    assert new.select("query", "product_id", "grade").join(written, on=["query", "product_id", "grade"]).height == len(new)
    assert made.provenance.schema == PROVENANCE and not find_leaks(made.data.queries).any()


def test_synthetic_refuses_real_queries(shop, written):
    real = shop.queries.filter(split="train").row(0, named=True)
    twice = pl.concat([written.head(0), pl.DataFrame([(real["query"].upper(), "en", shop.products["product_id"][0], 2, "positive", "thing", None, "template")], schema=SYNTHETIC, orient="row")])
    assert len(augment_synthetic(shop, twice, 0.5).provenance) == 0
    with pytest.raises(ValueError, match="share=1"):
        augment_synthetic(shop, written, 1)


def test_synthetic_refuses_near_repeats_of_unseen_queries():
    "Also where the queries come from elsewhere than `template_queries`."
    products = pl.DataFrame(dict(product_id=["a"], title=["cover"]))
    unseen = "extra large waterproof outdoor garden furniture cover for table and chairs"
    rows = [(f"query number {word}", "train") for word in "one two three four".split()] + [(unseen, "test"), ("coffee grinder", "validation")]
    data = make_data(products, pl.DataFrame([(q, "a", 2, "en", s) for q, s in rows], schema=["query", "product_id", "grade", "locale", "split"], orient="row"))
    texts = [unseen.replace("garden", "gardens"), "blue cover"]
    made = augment_synthetic(data, pl.DataFrame([(q, "en", "a", 2, "positive", "thing", None, "template") for q in texts], schema=SYNTHETIC, orient="row"), 0.5)
    assert set(made.data.queries["query"]) - {q for q, _ in rows} == {"blue cover"}


def test_accents():
    assert BARE["é"] == "e" and BARE["Ñ"] == "N" and "e" not in BARE and all(v.isascii() for v in BARE.values())


# ---- queries written by a language model

class Echo:
    "A writer that answers from a table, or with the wanted words."
    name, batch = "echo", 7

    def __init__(self, answers=None):
        self.answers, self.asked = answers or {}, []

    def write(self, chats):
        self.asked += chats
        wanted = [json.loads(chat[-1]["content"])["wanted"] for chat in chats]
        return [self.answers.get(w, (w, None)) for w in wanted]


class Says:
    "An annotator that gives every pair one grade, or none."
    name, guideline, batch = "says", DEFAULT_GUIDELINE, 50

    def __init__(self, grade):
        self.grade, self.seen = grade, []

    def judge(self, pairs):
        self.seen += pairs["query"].to_list()
        if self.grade is None:
            return judged_rows(np.full((len(pairs), 3), np.nan), ["cannot"] * len(pairs))
        return judged_rows(np.tile(np.eye(3)[self.grade], (len(pairs), 1)))


def test_chat_shows_the_title_only_where_it_may(shop, written):
    for wish in written.head(60).to_dicts():
        system, *_, user = writing_chat(wish, "THE TITLE <|im_start|>")
        said = json.loads(user["content"])
        assert said["wanted"] == wish["query"] and ("product" in said) == (wish["kind"] != "near-miss")
        assert "<|im_start|>" not in user["content"] and {"en": "English", "es": "Spanish", "ja": "Japanese"}[wish["locale"]] in system["content"]


@pytest.mark.parametrize("answer,query", [
    ("Black Mug", "black mug"), ('\n "black mug."\nIt is black.', "black mug"), ("Query: black mug", "black mug"), ("検索：黒 マグ", "黒 マグ"), ("usb-c cable", "usb-c cable"),
    (None, None), ("", None), ("...", None), ('{"query": "mug"}', None), ("Do you want a mug?", None), ("word " * 13, None), ("x" * 81, None)])
def test_read_query(answer, query):
    assert read_query(answer) == query


def test_drafts_follow_the_wishes(shop, written):
    wishes = written.head(30)
    lost = wishes["query"][4]
    writer = Echo({lost: (None, "the model refused"), wishes["query"][5]: ("{}", None)})
    drafts = write_queries(wishes, shop, writer)
    assert drafts.schema == DRAFTS and drafts["wish"].equals(wishes["query"].alias("wish")) and set(drafts["author"]) == {"echo"}
    assert drafts.drop("query", "author", "wish", "answer", "dropped").equals(wishes.drop("query", "author"))
    assert drafts["dropped"].to_list()[4:6] == ["no answer: the model refused", "no query in the answer"] and drafts["dropped"].null_count() == 28
    assert len(written_queries(drafts)) == 28 and written_queries(drafts).schema == SYNTHETIC


def test_an_answer_is_paid_for_once(shop, written, tmp_path):
    wishes, memory = written.head(20), tmp_path / "answers.json"
    first = Echo({wishes["query"][0]: (None, "not asked: the limit")})
    write_queries(wishes.head(12), shop, first, memory)
    again = Echo()
    drafts = write_queries(wishes, shop, again, memory)
    assert len(first.asked) == 12 and len(again.asked) == 9, "what failed is asked again, what was answered is not"
    assert drafts["dropped"].null_count() == 20
    other = Echo()
    other.name = "somebody else"
    write_queries(wishes, shop, other, memory)
    assert len(other.asked) == 20


def test_rules_hold_for_the_wanted_words_and_not_for_the_title(shop, written):
    drafts = write_queries(written, shop, Echo())
    assert keep_rules(drafts, shop)["dropped"].null_count() == len(written)
    titles = dict(shop.products.select("product_id", "title").iter_rows())
    cheat = keep_rules(drafts.with_columns(query=pl.col("product_id").replace_strict(titles)), shop)
    near = cheat.filter(kind="near-miss")
    assert near["dropped"].is_in(["the exchanged fact is lost"]).all()
    assert cheat.filter(pl.col("kind") != "near-miss")["dropped"].is_in(["the title over again"]).all()


def test_a_near_miss_that_also_names_the_truth_is_dropped(shop, written):
    facts = {row["product_id"]: row for row in product_facts(shop.products).to_dicts()}
    near = write_queries(written.filter(kind="near-miss"), shop, Echo())
    both = near.with_columns(query=pl.Series([f"{row['query']} {facts[row['product_id']][row['exchanged']]}" for row in near.to_dicts()]))
    assert keep_rules(both, shop)["dropped"].null_count() == 0


def test_known_queries_are_dropped(shop, written):
    real, unseen = shop.queries.filter(split="train")["query"][0], "extra large waterproof outdoor garden furniture cover for table and chairs"
    data = replace(shop, judgments=shop.judgments.with_columns(query=pl.when(pl.col("query_id") == shop.queries.filter(split="test")["query_id"][0]).then(pl.lit(unseen)).otherwise("query")))
    drafts = write_queries(written.head(5), shop, Echo()).with_columns(query=pl.Series([real.upper(), "a thing of its own", "A thing, of its own", unseen.replace("garden", "gardens"), "blue cover"]))
    assert keep_new(drafts, data)["dropped"].to_list() == ["asked already", None, "asked already", "nearly a query that stays unseen", None]


def test_round_trip_and_annotator_drop_with_a_reason(shop, written):
    drafts = write_queries(written.head(40), shop, Echo())
    eye = np.eye(len(shop.products), dtype="f4")
    at = {p: i for i, p in enumerate(shop.products["product_id"])}
    found = eye[[at[p] for p in drafts["product_id"]]]
    assert keep_found(drafts, found, shop, eye, 1).equals(drafts)
    lost = keep_found(drafts, np.roll(found, 1, axis=1), shop, eye, 1)
    assert set(lost.filter(pl.col("dropped").is_not_null())["grade"]) == {2} == set(lost["grade"]) - set(lost.filter(pl.col("dropped").is_null())["grade"])
    judge = Says(2)
    agreed = keep_agreed(lost, shop, judge)
    assert len(judge.seen) == lost["dropped"].null_count(), "nobody is asked about what is dropped already"
    assert set(agreed.filter(pl.col("dropped") == "the annotator says 2")["grade"]) == {0, 1} and not agreed["dropped"].null_count()
    kept = keep_agreed(drafts, shop, Says(2))
    assert set(kept.filter(pl.col("dropped").is_null())["grade"]) == {2}
    assert set(keep_agreed(drafts, shop, Says(None))["dropped"]) == {"the annotator could not judge it"}
    assert dict(funnel(kept).select("reason", "near-miss").iter_rows())["kept"] == 0
    assert kept.schema == DRAFTS


def test_written_queries_enter_the_training_set_with_their_author(shop, written):
    drafts = keep_new(keep_rules(write_queries(written, shop, Echo()), shop), shop)
    made = augment_synthetic(shop, written_queries(drafts), 0.4)
    assert len(made.provenance) and made.provenance["operator"].str.starts_with("echo: thing").all()
    assert made.data.split("test").judgments.equals(shop.split("test").judgments)
    assert augment_synthetic(shop, written, 0.4).provenance["operator"].str.starts_with("template: thing").all()


@pytest.fixture
def endpoint(monkeypatch):
    "A chat endpoint on loopback: answers by `rule(wanted) -> message`."
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.seen.append(body)
            status, message = self.server.rule(json.loads(body["messages"][-1]["content"])["wanted"])
            answer = {"error": message} if status != 200 else {"choices": [{"index": 0, "finish_reason": "stop", "message": message}], "usage": {"prompt_tokens": 200, "completion_tokens": 10}}
            text = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.rule = [], lambda wanted: (200, {"content": f"my {wanted}"})
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("WRITER_KEY", "key-0123456789")
    yield server
    server.shutdown()
    server.server_close()


def remote(server, **settings):
    return RemoteAnnotator("big", f"http://127.0.0.1:{server.server_port}/v1", key="WRITER_KEY", retries=0, **settings)


def test_remote_writer(shop, written, endpoint):
    wishes = written.head(9)
    endpoint.rule = lambda wanted: (200, {"content": None, "refusal": "no"} if wanted == wishes["query"][3] else {"content": f"my {wanted}"})
    drafts = write_queries(wishes, shop, RemoteWriter(remote(endpoint)))
    assert drafts["query"].to_list() == [None if i == 3 else f"my {q}" for i, q in enumerate(wishes["query"])] and set(drafts["author"]) == {"big"}
    assert drafts["dropped"][3] == "no answer: the model refused: no"
    assert all(body["model"] == "big" and body["messages"][0]["role"] == "system" for body in endpoint.seen)


def test_remote_writer_stays_within_the_limit(shop, written, endpoint):
    who = remote(endpoint, prices=(1000.0, 0.0), limit=1.0, in_flight=3)    # 0.2 an answer
    drafts = write_queries(written.head(20), shop, RemoteWriter(who))
    assert 0 < len(endpoint.seen) <= 5 and who.spent <= 1.0
    assert drafts["dropped"].str.contains("not asked: it could pass the spending limit").sum() == 20 - len(endpoint.seen)


def test_remote_writer_stops_for_a_wrong_key_and_never_shows_it(shop, written, endpoint):
    endpoint.rule = lambda wanted: (401, {"message": "bad key key-0123456789"})
    with pytest.raises(ValueError, match="does not accept the key") as error:
        write_queries(written.head(20), shop, RemoteWriter(remote(endpoint)))
    assert len(endpoint.seen) == 1 and "key-0123456789" not in str(error.value)


@pytest.mark.slow
def test_local_writer_is_seeded(shop, written):
    from mine_refine_nb.annotator import load_llm
    model, tokenizer = load_llm()
    chats = [writing_chat(wish, "a mug") for wish in written.head(3).to_dicts()]
    first, same, other = (LocalWriter(model, tokenizer, seed=seed).write(chats) for seed in (0, 0, 1))
    assert first == same != other and all(reason is None and text for text, reason in first)


# ---- training on it

@pytest.fixture(scope="module")
def english():
    return simulate(300, 48, locales=("en",))


@pytest.fixture(scope="module")
def minilm():
    return load_backbone("all-MiniLM-L6-v2")


@pytest.fixture(scope="module")
def start(minilm, english):
    return embed(minilm, english)


def test_kinds_touch_train_only(english, minilm, start):
    made = {kind: augmented(english, kind, minilm, start.products, seed=2) for kind in KINDS}
    assert made["none"].data is english and not len(made["none"].provenance)
    for kind, one in made.items():
        assert one.data.judgments.head(len(english.judgments)).equals(english.judgments) and one.data.products is english.products
        assert all(one.data.split(split).judgments.equals(english.split(split).judgments) for split in ("validation", "test"))
        new = set(one.data.queries["query_id"]) - set(english.queries["query_id"])
        assert new == set(one.provenance["query_id"]) and one.provenance["query_id"].is_unique().all() and not find_leaks(one.data.queries).any()
        assert ({*one.provenance["kind"]} & {"misspelled"} != set()) == (kind in ("spelling", "both"))
        assert (one.provenance["source_query_id"].null_count() > 0) == (kind in ("synthetic", "both"))
    both = made["both"]
    assert both.provenance["source_query_id"].null_count() / both.data.queries.filter(split="train").height <= 0.2
    assert not augmented(english, "spelling", seed=3).data.queries.equals(augmented(english, "spelling", seed=4).data.queries)
    with pytest.raises(ValueError, match="needs the encoder"):
        augmented(english, "both")
    with pytest.raises(ValueError, match="no kind 'spell'"):
        augmented(english, "spell")


def test_callers_may_bring_queries(english):
    mine_ = pl.DataFrame([("a mug of my own", "en", english.products["product_id"][0], 2, "positive", "thing", None, "me")], schema=SYNTHETIC, orient="row")
    made = augmented(english, "synthetic", written=mine_)
    assert made.provenance.select("kind", "operator").rows() == [("positive", "me: thing")]


def test_synthetic_queries_keep_to_their_share_of_a_batch(english, minilm, start):
    made, recipe = augmented(english, "both", minilm, start.products), Recipe(rich_share=0.5)
    assert fitting_recipe(recipe, made, 0.2).rich_share == pytest.approx(0.8)
    assert fitting_recipe(recipe, made, 0.7).rich_share == 0.5
    assert fitting_recipe(recipe, augmented(english, "spelling"), 0.2) == recipe


def test_copies_inherit_what_was_mined(english, start):
    made, mined = augmented(english, "spelling"), mine(start, english, "train")
    spread = mined_for_copies(mined, made)
    assert spread.rows.head(len(mined.rows)).equals(mined.rows)
    texts = dict(made.data.queries.select("query_id", "query").iter_rows())
    for copy, source in made.provenance.select("query_id", "source_query_id").rows():
        of = lambda i: spread.rows.filter(query_id=i).drop("query_id", "query")
        assert of(copy).equals(of(source)) and set(spread.rows.filter(query_id=copy)["query"]) <= {texts[copy]}
    swapped = augmented(english, "spelling", mode="replace")
    assert set(mined_for_copies(mined, swapped).rows["query_id"]) <= set(swapped.data.queries["query_id"])


def test_typo_loss_pulls_pairs_together(minilm, english):
    import torch
    pairs = augment_spelling(english, ALL, "tie").pairs
    minilm.eval()
    grades = torch.tensor([[2, 1, 0]])
    loss = TypoLoss(minilm, pairs, size=8, seed=3)
    value = loss(None, grades)
    rows = draw_pairs(len(pairs), 8, grades, 3)
    clean, typed = (minilm.encode(pairs[name].gather(rows).to_list()) for name in ("clean", "misspelled"))
    assert value.item() == pytest.approx(1 - (clean * typed).sum(axis=1).mean(), abs=1e-3)
    assert loss(None, grades).item() == value.item() and loss(None, torch.tensor([[0, 1, 2]])).item() != value.item()
    value.backward()
    weight = minilm[0].model.encoder.layer[-1].output.dense.weight
    with torch.no_grad():
        old, moved = weight.clone(), 0.05 * weight.grad / weight.grad.norm()
        weight -= moved
        assert loss(None, grades).item() < value.item()
        weight.copy_(old)
    minilm.zero_grad()
    assert closeness(minilm, ["mug"], ["mug"]).item() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="no pairs"):
        TypoLoss(minilm, pairs.head(0))


def test_arms_differ_in_what_they_say(english, minilm):
    assert set(ARMS) == {"none", "spelling", "replacement", "regulariser", "synthetic", "both"}
    assert not tie_losses(english, ARMS["spelling"], minilm, 0)
    assert isinstance(tie_losses(english, ARMS["regulariser"], minilm, 0)["tie"], TypoLoss) and ARMS["regulariser"].kind == "none"


def test_validation_typos_are_not_those_of_training_or_test(english):
    twins = both_twins(english, typos=2)
    assert set(twins["validation"].data.judgments["split"]) == {"validation"} and set(twins["test"].data.judgments["split"]) == {"test"}
    assert twins["validation"].queries.equals(both_twins(english, typos=2, seed=9)["validation"].queries), "the test seed is the test's"
    rng = np.random.default_rng(HELD_OUT)
    assert all(slip_once("wireless headphones", "en", rng) != "wireless headphones" for _ in range(20))


def test_arms_are_trained_once(english, tmp_path, monkeypatch):
    from mine_refine_nb import augmenting
    trained = []
    def train_arm(data, arm, folder, backbone, recipes, seed, start):
        trained.append((arm.kind, seed))
        return load_backbone(backbone)
    monkeypatch.setattr(augmenting, "train_arm", train_arm)
    few, twins = {"none": Arm(), "spelling": Arm("spelling")}, both_twins(english, typos=1)
    found = augmentation_arms(english, tmp_path, few, (0, 1), "all-MiniLM-L6-v2", twins=twins)
    assert trained == [("none", 0), ("none", 1), ("spelling", 0), ("spelling", 1)] and [len(v) for v in found.values()] == [1, 2, 2]
    assert isinstance(found["none"][0], Embeddings) and set(twins["test"].queries["query_id"]) <= set(found["none"][0].query_ids)
    (tmp_path / "spelling-1.npz").unlink()
    augmentation_arms(english, tmp_path, few, (0, 1), "all-MiniLM-L6-v2", twins=twins)
    assert trained[4:] == [("spelling", 1)]
