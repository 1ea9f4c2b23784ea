"""Data: four layouts, every bad input, splits that leak nothing, saving."""
import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mine_refine_nb.data import (JUDGMENT_COLUMNS, PRODUCT_COLUMNS, DataError, Note, RelevanceData, candidates,
                                 file_source, find_leaks, likeness, load_data, make_data, near_pairs, normalise_query,
                                 product_text, query_groups, query_ids, read_table, split_queries, untrimmed)
from mine_refine_nb.grades import consensus

ESCI = Path(__file__).parents[2] / "shared" / "data" / "esci"

PRODUCTS = """product_id,title,category,brand,description,locale
007,Red shoe,Fashion > Shoes > Running,Acme,"a shoe, red
and light",en
8,Blue shoe,Fashion > Shoes,,,en
9,Tetera azul,Hogar > Cocina,,,es
"""
JUDGMENTS = """query,product_id,grade,locale
red shoes for men,007,2,en
red shoes for men,8,1,en
blue boots,8,2,en
blue boots,007,0,en
tetera,9,2,es
green kettle,007,0,en
"""


def own(folder, products=PRODUCTS, judgments=JUDGMENTS, engagement=None):
    for name, text in (("products", products), ("judgments", judgments), ("engagement", engagement)):
        if isinstance(text, str): text = text.encode()
        if text is not None: (folder / f"{name}.csv").write_bytes(text)
    return folder


def frames(texts=("red shoe", "blue kettle", "tea pot", "garden hose", "desk lamp"), **columns):
    "Products p0.. and one judgment per query text."
    n = len(texts)
    ids = [f"p{i}" for i in range(n)]
    judgments = pl.DataFrame({"query": list(texts), "product_id": ids, "grade": [2] * n, **columns})
    return pl.DataFrame({"product_id": ids, "title": [f"thing {i}" for i in range(n)]}), judgments


# --- own data -------------------------------------------------------------------------------------------------------

def test_own_csv(tmp_path):
    data = load_data(own(tmp_path))
    assert data.products.columns == list(PRODUCT_COLUMNS) and data.judgments.columns == list(JUDGMENT_COLUMNS)
    assert set(data.products.dtypes) == {pl.String} and data.judgments["grade"].dtype == pl.Int8
    assert data.products["product_id"].to_list() == ["007", "8", "9"]
    assert data.products["brand"].to_list() == ["Acme", None, None]
    assert data.judgments.height == 6 and data.name == tmp_path.name and data.ratings is None
    assert set(data.judgments["split"]) == {"train", "validation", "test"}


def test_own_parquet_equals_csv(tmp_path):
    (tmp_path / "csv").mkdir(), (tmp_path / "parquet").mkdir()
    first = load_data(own(tmp_path / "csv"))
    for name in ("products", "judgments"):
        frame = pl.read_csv(tmp_path / "csv" / f"{name}.csv", schema_overrides={"product_id": pl.String})
        frame.write_parquet(tmp_path / "parquet" / f"{name}.parquet")
    assert load_data(tmp_path / "parquet").fingerprint == first.fingerprint


def test_byte_order_mark_spaces_blank_lines_and_float_grades(tmp_path):
    judgments = "\ufeff" + JUDGMENTS.replace("men,8,1", "men, 8 ,1.0").replace("tetera,9", "\ntetera,9")
    data = load_data(own(tmp_path, judgments=judgments))
    assert data.judgments.height == 6 and data.judgments["grade"].to_list() == [2, 1, 2, 0, 2, 0]


def test_engagement(tmp_path):
    text = "query,product_id,impressions,clicks,add_to_carts,purchases\ntetera,9,10,3,1,1\nunseen,8,5,0,0,0\n"
    data = load_data(own(tmp_path, engagement=text))
    assert data.engagement["clicks"].to_list() == [3, 0] and data.engagement["clicks"].dtype == pl.Int64
    assert data.engagement["position"].is_null().all()
    assert data.engagement["query_id"][0] == data.judgments.filter(query="tetera")["query_id"][0]


def test_own_grade_map(tmp_path):
    judgments = JUDGMENTS.replace(",2,", ",4,").replace(",1,", ",3,").replace(",0,", ",1,")
    data = load_data(own(tmp_path, judgments=judgments), grades={4: 2, 3: 1, 2: 1, 1: 0})
    assert data.judgments["grade"].to_list() == [2, 1, 2, 0, 2, 0]
    with pytest.raises(DataError, match="maps 4 to 3, which is no grade"): load_data(tmp_path, grades={4: 3})


# --- bad input ------------------------------------------------------------------------------------------------------

BAD = {    # what is wrong: (file, text to replace, by what, parts of the message)
    "missing column": ("judgments", "query,product_id,grade", "query,productid,grade",
                       ["judgments.csv", "'product_id' is missing", "Is 'productid' meant? Rename it"]),
    "missing column without a near name": ("products", "title", "x", ["products.csv", "'title' is missing", "Add it"]),
    "grade too high": ("judgments", "blue boots,8,2", "blue boots,8,3",
                       ["judgments.csv, row 3 (line 4)", "grade '3' is outside 0 to 2", "grades="]),
    "unjudged written as a grade": ("judgments", "tetera,9,2", "tetera,9,-1",
                                    ["row 5 (line 6)", "'-1' is outside 0 to 2"]),
    "grade no number": ("judgments", "boots,007,0", "boots,007,good", ["row 4 (line 5)", "'good' is not a number"]),
    "grade not whole": ("judgments", "boots,007,0", "boots,007,0.5", ["row 4 (line 5)", "'0.5' is not a whole number"]),
    "grade infinite": ("judgments", "boots,007,0", "boots,007,inf", ["row 4 (line 5)", "'inf' is not a number"]),
    "grade empty": ("judgments", "boots,007,0", "boots,007,", ["row 4 (line 5)", "grade is empty"]),
    "unknown product": ("judgments", "boots,007,0", "boots,7,0",
                        ["judgments.csv, row 4 (line 5)", "product_id '7' is not among the products",
                         "'007' is not '7'"]),
    "empty title": ("products", "8,Blue shoe", "8,  ", ["products.csv, row 2 (line 4)", "title is empty"]),
    "duplicate product": ("products", "9,Tetera", "8,Tetera",
                          ["products.csv, row 2 (line 4)", "product_id '8' stands on several rows", "2 rows"]),
    "no product id": ("products", "9,Tetera", ",Tetera", ["products.csv, row 3 (line 5)", "product_id is empty"]),
    "null query": ("judgments", "tetera,9", ",9", ["judgments.csv, row 5 (line 6)", "query is empty"]),
    "too many fields": ("judgments", "tetera,9,2,es", "tetera, grande,9,2,es",
                        ["judgments.csv, line 6: 5 fields", "quotes"]),
    "quote inside a field": ("products", "9,Tetera azul", '9,Tetera 6" azul', ["products.csv, line 5: a quote inside a field", '"6"" pan"']),
    "quote not closed": ("products", "8,Blue shoe", '8,"Blue shoe', ["products.csv, line 4", "one that is not closed"]),
    "no product in a locale": ("judgments", "tetera,9,2,es", "tetera,9,2,ES", ["locale 'ES' of query 'tetera'", "['en', 'es'] (1 judgments)"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_names_file_row_and_remedy(tmp_path, what):
    file, old, new, parts = BAD[what]
    texts = dict(products=PRODUCTS, judgments=JUDGMENTS)
    assert texts[file].count(old) == 1
    with pytest.raises(DataError) as error: load_data(own(tmp_path, **texts | {file: texts[file].replace(old, new)}))
    for part in parts: assert part in str(error.value)


def test_the_first_failure_is_raised_with_the_count_of_rows_that_share_it(tmp_path):
    text = JUDGMENTS.replace(",2,", ",9,").replace("tetera", "")
    with pytest.raises(DataError, match=r"row 5 .line 6.: query is empty\. "): load_data(own(tmp_path, judgments=text))
    with pytest.raises(DataError, match=r"row 1 .line 2.: grade '9' .* \(3 rows have this problem\)"):
        load_data(own(tmp_path, judgments=JUDGMENTS.replace(",2,", ",9,")))


@pytest.mark.parametrize("content, message", [
    (b"", "judgments.csv is empty"), (b"\n\n", "judgments.csv is empty"),
    (b"query,product_id,grade\n", "judgments.csv has no rows"),
    (JUDGMENTS.replace("tetera", "tet\xe9ra").encode("latin-1"), "judgments.csv, line 6: byte 0xe9 is not UTF-8"),
    (JUDGMENTS.encode("utf-16"), "judgments.csv, line 1: byte 0xff is not UTF-8")])
def test_empty_files_and_wrong_encodings(tmp_path, content, message):
    with pytest.raises(DataError, match=message): load_data(own(tmp_path, judgments=content))


def split_text(*sides):
    lines = JUDGMENTS.splitlines()
    return "\n".join([lines[0] + ",split"] + [f"{line},{side}" for line, side in zip(lines[1:], sides, strict=True)])


def test_a_split_that_shares_a_query(tmp_path):
    text = split_text("train", "test", "train", "train", "train", "train")
    with pytest.raises(DataError) as error: load_data(own(tmp_path, judgments=text))
    assert "judgments.csv, row 2 (line 3): query 'red shoes for men' is in test here" in str(error.value)
    assert "in train at judgments.csv, row 1 (line 2). Put each query on one side" in str(error.value)
    text = split_text("train", "train", "train", "train", "train", "test").replace("green kettle", "Blue  BOOTS!")
    with pytest.raises(DataError, match="'Blue  BOOTS!' is in test here and in train"):
        load_data(own(tmp_path, judgments=text))


@pytest.mark.parametrize("side, message", [
    ("dev", "split 'dev' is unknown. Write train, validation or test"), ("", "split is empty")])
def test_unknown_split(tmp_path, side, message):
    text = split_text("train", "train", "train", "train", "train", side)
    with pytest.raises(DataError, match=rf"row 6 \(line 7\): {message}"): load_data(own(tmp_path, judgments=text))


ENGAGED = "query,product_id,impressions,clicks,add_to_carts,purchases\ntetera,9,10,3,1,1\n"


@pytest.mark.parametrize("old, new, message", [
    ("10,3", "10,-3", "clicks '-3' is not a whole number from 0 up"), ("10,3", "10,x", "clicks 'x' is not"),
    ("10,3", ",3", "impressions is empty"), ("10,3", "2,3", "clicks 3 exceed impressions 2"),
    ("9,10", "77,10", "product_id '77' is not among")])
def test_bad_engagement(tmp_path, old, new, message):
    with pytest.raises(DataError, match=rf"engagement.csv, row 1 \(line 2\): {message}"):
        load_data(own(tmp_path, engagement=ENGAGED.replace(old, new)))


def test_not_a_folder_unknown_layout_missing_and_ambiguous_files(tmp_path):
    with pytest.raises(DataError, match="is not a folder"): load_data(tmp_path / "nowhere")
    (tmp_path / "stray.txt").write_text("x")
    with pytest.raises(DataError) as error: load_data(tmp_path)
    for part in ("it holds stray.txt", "own needs products.parquet or products.csv",
                 "wands needs product.csv, query.csv", "beir needs corpus.jsonl"):
        assert part in str(error.value)
    with pytest.raises(DataError, match="layout esci needs shopping_queries_dataset_examples.parquet"):
        load_data(tmp_path, "esci")
    with pytest.raises(DataError, match="no layout 'x'"): load_data(tmp_path, "x")
    own(tmp_path)
    assert load_data(tmp_path).products.height == 3
    pl.DataFrame({"product_id": ["1"]}).write_parquet(tmp_path / "products.parquet")
    with pytest.raises(DataError, match="both products.parquet and products.csv"): load_data(tmp_path)


def test_broken_and_nested_parquet(tmp_path):
    pl.DataFrame({"product_id": ["1"], "title": [["a", "b"]]}).write_parquet(tmp_path / "products.parquet")
    (tmp_path / "judgments.csv").write_text(JUDGMENTS)
    with pytest.raises(DataError, match="column 'title' holds List"): load_data(tmp_path)
    (tmp_path / "products.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="products.parquet is not a readable Parquet file"): load_data(tmp_path)


def test_columns_called_row_or_file_do_no_harm(tmp_path):
    data = load_data(own(tmp_path, products=PRODUCTS.replace("brand", "row").replace("description", "file")))
    assert data.products.height == 3 and data.products["brand"].is_null().all()


# --- raters ---------------------------------------------------------------------------------------------------------

def test_raters_are_kept_and_their_median_taken(tmp_path):
    rows = ["8,2,ann", "8,1,bob", "9,0,ann", "9,2,bob", "9,2,eve", "007,1,ann"]
    text = "query,product_id,grade,rater\n" + "".join(f"boots,{row}\n" for row in rows)
    data = load_data(own(tmp_path, judgments=text))
    assert dict(data.judgments.select("product_id", "grade").iter_rows()) == {"8": 1, "9": 2, "007": 1}
    assert data.ratings.height == 6 and data.ratings["rater"].to_list() == ["ann", "bob", "ann", "bob", "eve", "ann"]
    note, = [n for n in data.notes if "more than once" in n.what]
    assert note.count == 2 and note.why.startswith("2 of them with different grades")


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=30))
def test_consensus_of_the_frame_is_consensus_of_the_list(rows):
    products, _ = frames()
    judgments = pl.DataFrame([("q", f"p{p}", g) for p, g in rows], ["query", "product_id", "grade"], orient="row")
    for product_id, grade in make_data(products, judgments).judgments.select("product_id", "grade").iter_rows():
        assert grade == consensus([g for p, g in rows if f"p{p}" == product_id])


# --- published layouts ----------------------------------------------------------------------------------------------

def esci(folder, **changes):
    examples = dict(query=["red shoe", "red shoe", "tetera", "funda", "blue kettle", "desk lamp"],
                    product_id=["A", "B", "A", "C", "B", "D"], product_locale=["us", "us", "es", "es", "us", "us"],
                    esci_label=["E", "S", "C", "I", "E", "E"],
                    split=["train", "train", "train", "test", "test", "train"])
    products = dict(product_id=["A", "B", "A", "C", "D"], product_title=["Shoe", "Boot", "Zapato", "Funda", "Lamp"],
                    product_description=["soft", " ", None, None, None],
                    product_bullet_point=["x", "warm", None, None, None],
                    product_brand=["Acme", None, None, None, None], product_color=["red", None, None, None, None],
                    product_locale=["us", "us", "es", "es", "us"])
    for name, values in changes.items(): (products if name.startswith("product_t") else examples)[name] = values
    pl.DataFrame(examples).write_parquet(folder / "shopping_queries_dataset_examples.parquet")
    pl.DataFrame(products).write_parquet(folder / "shopping_queries_dataset_products.parquet")
    return folder


def test_esci(tmp_path):
    data = load_data(esci(tmp_path))
    assert data.products["product_id"].to_list() == ["A@us", "B", "A@es", "C", "D"]
    assert data.products["description"].to_list() == ["soft", "warm", None, None, None]
    assert data.products["category"].is_null().all()
    assert data.judgments["product_id"].to_list() == ["A@us", "B", "A@es", "C", "B", "D"]
    assert data.judgments["grade"].to_list() == [2, 1, 1, 0, 2, 2]
    splits = dict(data.queries.select("query", "split").iter_rows())
    assert {query for query, side in splits.items() if side == "test"} == {"funda", "blue kettle"}
    assert sorted(splits.values()).count("validation") == 1
    assert any("id@locale" in note.what and note.count == 1 for note in data.notes)


def test_esci_errors_speak_of_its_own_columns(tmp_path):
    with pytest.raises(DataError, match=r"examples.parquet, row 2: esci_label 'X' is not a known label"):
        load_data(esci(tmp_path, esci_label=["E", "X", "C", "I", "E", "E"]))
    with pytest.raises(DataError, match=r"products.parquet, row 4: product_title is empty"):
        load_data(esci(tmp_path, product_title=["Shoe", "Boot", "Zapato", " ", "Lamp"]))
    with pytest.raises(DataError, match="query 'red shoe' is in test here and in train"):
        load_data(esci(tmp_path, split=["train", "test", "train", "test", "test", "train"]))
    with pytest.raises(DataError, match="product_id 'Z' is not among the products"):
        load_data(esci(tmp_path, product_id=["A", "B", "A", "C", "B", "Z"]))


def test_variants_across_a_published_split_are_dropped_from_train(tmp_path):
    data = load_data(esci(tmp_path, query=["Blue Kettle!"] * 2 + ["tetera", "funda", "blue kettle", "desk lamp"]))
    assert "Blue Kettle!" not in data.queries["query"].to_list()
    note, = [note for note in data.notes if note.what == "train queries dropped"]
    assert note.count == 1 and "2 judgments went with them" in note.why


def wands(folder, **changes):
    texts = {"product.csv": "product_id\tproduct_name\tproduct_class\tcategory hierarchy\tproduct_description\n"
                            "0\tSolid oak bed\tBeds\tFurniture / Bedroom Furniture / Beds\tplain\n"
                            "1\t\"Sofa, 24\"\" deep\"\tSofas\t\t\n",
             "query.csv": "query_id\tquery\tquery_class\n0\toak bed\tBeds\n1\tdeep sofa\tSofas\n2\tgreen lamp\t\n",
             "label.csv": "id\tquery_id\tproduct_id\tlabel\n"
                          "0\t0\t0\tExact\n1\t0\t1\tIrrelevant\n2\t1\t1\tPartial\n3\t2\t0\tIrrelevant\n"}
    for name, text in {**texts, **{f"{key}.csv": value(texts[f"{key}.csv"]) for key, value in changes.items()}}.items():
        (folder / name).write_text(text)
    return folder


def test_wands(tmp_path):
    data = load_data(wands(tmp_path))
    assert data.products["category"].to_list() == ["Furniture > Bedroom Furniture > Beds", "Sofas"]
    assert data.products["title"].to_list() == ["Solid oak bed", 'Sofa, 24" deep']
    assert data.judgments["grade"].to_list() == [2, 0, 1, 0] and data.judgments["locale"].is_null().all()
    assert set(data.judgments["split"]) == {"train", "validation", "test"}


@pytest.mark.parametrize("file, old, new, message", [
    ("label", "Partial", "Partly", r"label.csv, row 3 \(line 4\): label 'Partly' is not a known.*Known are 'Exact'"),
    ("label", "3\t2\t0", "3\t9\t0", r"label.csv, row 4 \(line 5\): query_id '9' is not in query.csv"),
    ("query", "1\tdeep", "0\tdeep", r"query.csv, row 1 \(line 2\): query_id '0' stands on several rows"),
    ("query", "deep sofa", "", r"query.csv, row 2 \(line 3\): query is empty"),
    ("product", "Solid oak bed", "", r"product.csv, row 1 \(line 2\): product_name is empty")])
def test_bad_wands(tmp_path, file, old, new, message):
    folder = wands(tmp_path, **{file: lambda text: text.replace(old, new)})
    with pytest.raises(DataError, match=message): load_data(folder)


def beir(folder, scores=(2, 1, 0), files=("train", "dev", "test")):
    corpus = [{"_id": "d1", "title": "Shoe", "text": "red", "metadata": {"x": 1}},
              {"_id": "d2", "title": "", "text": "A kettle"}]
    queries = [{"_id": f"q{i}", "text": text} for i, text in enumerate(("red shoe", "tea kettle", "desk lamp"))]
    (folder / "qrels").mkdir()
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)) + "\n")
    for i, name in enumerate(files):
        rows = f"q{i}\td1\t{scores[i]}\nq{i}\td2\t{scores[-1]}\n"
        (folder / "qrels" / f"{name}.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return folder


def test_beir(tmp_path):
    data = load_data(beir(tmp_path))
    assert data.products["title"].to_list() == ["Shoe", "A kettle"]
    assert data.queries["split"].to_list() == ["train", "validation", "test"]
    assert data.judgments["grade"].to_list() == [2, 0, 1, 0, 0, 0]


def test_beir_with_test_queries_only_is_for_evaluation(tmp_path):
    data = load_data(beir(tmp_path, files=("test",)))
    assert data.queries["split"].to_list() == ["test"]


def test_binary_scores_mean_relevant_and_high_ones_need_a_map(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    data = load_data(beir(tmp_path / "a", scores=(1, 1, 0)))
    assert set(data.judgments["grade"]) == {0, 2} and any("scores became grades" in n.what for n in data.notes)
    high = beir(tmp_path / "b", scores=(3, 1, 0))
    with pytest.raises(DataError, match=r"train.tsv, row 1 \(line 2\): score '3' is outside 0 to 2.*pass grades="):
        load_data(high)
    assert load_data(high, grades={3: 2, 2: 1, 1: 1, 0: 0}).judgments["grade"].max() == 2


def test_bad_beir(tmp_path):
    folder = beir(tmp_path)
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq7\td1\t2\n")
    with pytest.raises(DataError, match=r"test.tsv, row 1 \(line 2\): query-id 'q7' is not in queries.jsonl"):
        load_data(folder)
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td9\t2\n")
    with pytest.raises(DataError, match=r"test.tsv, row 1 \(line 2\): corpus-id 'd9' is not among the products"):
        load_data(folder)
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": "a"}\n{"_id": \n')
    with pytest.raises(DataError, match="corpus.jsonl, line 2: this is not a JSON object"): load_data(folder)


# --- splits ---------------------------------------------------------------------------------------------------------

def triples(text): return {f" {word} "[i:i + 3] for word in normalise_query(text).split() for i in range(len(word))}


def near(one, other):
    a, b = triples(one), triples(other)
    return len(a & b) >= 0.8 * len(a | b) - 1e-9


WORDS = st.sampled_from(["red", "Red", "shoe", "shoes", "without", "with", "laces", "kettle", "水筒", "500ml", "５００ml",
                         "!", "a"])
QUERIES = st.lists(st.lists(WORDS, min_size=1, max_size=6).map(" ".join), min_size=1, max_size=25, unique=True)


@settings(deadline=None, max_examples=60)
@given(QUERIES)
def test_near_pairs_are_those_of_a_double_loop(queries):
    texts = sorted({normalise_query(query) for query in queries})
    slow = {(i, j) for j in range(len(texts)) for i in range(j) if near(texts[i], texts[j])}
    assert set(map(tuple, near_pairs(texts, block=4).tolist())) == slow


@settings(deadline=None, max_examples=200)
@given(st.text() | st.text(st.sampled_from("aB é-!\tßﾜﾞ５İ㎏　"), max_size=12))
def test_the_normal_form_is_its_definition(text):
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(" " if unicodedata.category(letter)[0] in "PZC" else letter for letter in folded)
    assert normalise_query(text) == (" ".join(kept.split()) or " ".join(folded.split()))


@settings(deadline=None, max_examples=60)
@given(QUERIES, st.data())
def test_what_is_alike_among_all_is_alike_among_some(queries, draw):
    "The search is done once for all queries; a part of them gets the same groups and leaks as if it were searched alone."
    rows = np.array(draw.draw(st.lists(st.booleans(), min_size=len(queries), max_size=len(queries))), dtype=bool)
    some, known = [query for query, taken in zip(queries, rows) if taken], likeness(queries).among(rows)
    def partition(groups): return {frozenset(np.flatnonzero(groups == group).tolist()) for group in groups}
    assert partition(query_groups(some, known)) == partition(query_groups(some))
    assert set(query_groups(some, known)) == set(range(len(partition(query_groups(some)))))
    table = pl.DataFrame({"query": some, "split": [["train", "validation", "test"][len(query) % 3] for query in some]},
                         schema=dict(query=pl.String, split=pl.String))
    assert find_leaks(table, known).tolist() == find_leaks(table).tolist()


@pytest.mark.parametrize("given_split, fingerprint, moved", [
    (False, "f1c24ccbdde135bb", [("queries moved from train to test and validation", 42)]),
    (True, "b2a1eb21dfc5f348", [("train queries dropped", 2), ("queries moved from train to validation", 19)])])
def test_the_same_data_forever(given_split, fingerprint, moved):
    "A fingerprint of an earlier version: splits must not change when reading becomes faster."
    products = pl.DataFrame({"product_id": [f"p{i}" for i in range(40)], "title": [f"thing {i}" for i in range(40)], "locale": ["us", "es"] * 20})
    words = ["red", "blue", "shoe", "shoes", "lamp", "lamps", "de", "mesa", "kettle", "Café", "ＵＳＢ", "水筒"]
    texts = [f"{a} {b}" for a in words for b in words] + ["red-shoe!", "usb, lamp", "a", "b"]
    pairs = pl.DataFrame([(text, f"p{2 * ((n * 7 + k) % 20) + n % 2}", (n + k) % 3, ["us", "es"][n % 2]) for n, text in enumerate(texts) for k in range(1 + n % 12)],
                         schema=["query", "product_id", "grade", "locale"], orient="row")
    side = pl.when(pl.col("query").str.len_chars() % 5 == 0).then(pl.lit("test")).otherwise(pl.lit("train"))
    data = make_data(products, pairs.with_columns(split=side) if given_split else pairs, published=True, seed=3)
    assert data.fingerprint == fingerprint and [(note.what, note.count) for note in data.notes] == moved


@settings(deadline=None, max_examples=60)
@given(QUERIES, st.integers(0, 3), st.data())
def test_no_query_or_near_duplicate_on_two_sides(queries, seed, draw):
    rows = [(query, draw.draw(st.sampled_from(["en", "es", None])), draw.draw(st.integers(1, 20))) for query in queries]
    table = pl.DataFrame(rows, schema={"query": pl.String, "locale": pl.String, "judged": pl.UInt32}, orient="row")
    split = split_queries(table, seed=seed).to_list()
    assert "train" in split
    for one, a in zip(queries, split):
        for other, b in zip(queries, split): assert a == b or not near(one, other)


@settings(deadline=None, max_examples=40)
@given(QUERIES, st.data())
def test_a_given_split_leaks_nothing_and_keeps_its_test(queries, draw):
    queries = list({normalise_query(query): query for query in queries}.values())
    side = st.sampled_from(["train", "validation", "test"])
    products, judgments = frames(queries, split=[draw.draw(side) for _ in queries])
    data = make_data(products, judgments)
    kept = data.queries.select("query", "split").rows()
    assert set(judgments.filter(split="test")["query"]) <= {query for query, side in kept if side == "test"}
    for one, a in kept:
        for other, b in kept: assert a == b or not near(one, other)


@pytest.mark.parametrize("split", [["train", "test", "train"], ["train", "train", "test"], ["test", "train", "train"]])
def test_a_query_leaks_through_any_of_its_neighbours(split):
    texts = ["red shoes with laces", "red shoes with laces b", "red shoes with laces c"]
    products, judgments = frames(texts, split=split)
    assert make_data(products, judgments).queries["split"].to_list() == ["test"]


def test_a_dropped_validation_query_does_not_take_train_with_it():
    texts = ["red shoe with lace", "red shoe with laces", "red shoes with laces"]
    ends, both = near(texts[0], texts[2]), near(texts[0], texts[1]) and near(texts[1], texts[2])
    assert both and not ends
    products, judgments = frames([*texts, "blue kettle"], split=["train", "validation", "test", "validation"])
    assert make_data(products, judgments).queries["query"].to_list() == [texts[0], texts[2], "blue kettle"]


def test_split_is_seeded_stratified_and_indifferent_to_row_order():
    endings = ("alpha", "ervo", "immu", "otsi", "uzzy", "yxan", "endro", "owqi", "arpt", "ulbe")
    names = [f"{letter}{ending}" for letter in "bcdfghjklm" for ending in endings]
    table = pl.DataFrame({"query": names, "locale": ["en"] * 60 + ["es"] * 40, "judged": [40] * 20 + [2] * 80})
    table = table.with_columns(split_queries(table, seed=3))
    count = lambda frame: dict(frame.group_by("split").len().iter_rows())
    assert count(table) == {"train": 72, "validation": 13, "test": 15}
    assert count(table[:20]) == {"train": 14, "validation": 3, "test": 3}
    assert count(table[60:])["test"] == 6
    assert split_queries(table.drop("split")[::-1], seed=3).to_list() == table["split"].to_list()[::-1]
    assert split_queries(table.drop("split"), seed=4).to_list() != table["split"].to_list()


def test_one_query_is_train_and_groups_join_through_others():
    assert split_queries(pl.DataFrame({"query": ["a"], "locale": ["en"], "judged": [1]})).to_list() == ["train"]
    groups = query_groups(["red shoe with lace", "kettle", "red shoes with laces", "red shoe with laces"])
    assert groups[0] == groups[2] == groups[3] != groups[1]


def test_missing_sides_are_cut_from_train():
    texts = ["red shoe", "blue kettle", "tea pot", "garden hose", "desk lamp", "wool rug"]
    products, judgments = frames(texts, split=["train"] * 5 + ["validation"])
    data = make_data(products, judgments)
    assert data.queries.filter(split="validation")["query"].to_list() == ["wool rug"]
    assert data.queries["split"].to_list().count("test") == 1
    assert any(note.what == "queries moved from train to test" and note.count == 1 for note in data.notes)


# --- what is asked of the data --------------------------------------------------------------------------------------

def test_query_ids_are_stable():
    ids = query_ids(pl.DataFrame({"query": ["x", "x", "y"], "locale": ["en", None, "en"]}))
    assert ids.to_list() == ["928016a5e53a", "b75398847514", "a40b59f32133"]


def test_candidates():
    products = pl.DataFrame({"product_id": list("abc"), "title": list("xyz"), "locale": ["en", "es", None]})
    data = make_data(products, pl.DataFrame({"query": ["q"], "product_id": ["a"], "grade": [2]}))
    assert candidates(data, "en").tolist() == [0, 2] and candidates(data, "ja").tolist() == [2]
    assert candidates(data, None).tolist() == [0, 1, 2]
    data = replace(data, products=data.products.with_columns(locale=pl.lit(None, pl.String)))
    assert candidates(data, "en").tolist() == [0, 1, 2]


def test_product_text():
    products = pl.DataFrame([("a", "Shoe", "A > B > C", "Acme", "long"), ("b", "Boot", None, None, None)],
                            schema=["product_id", "title", "category", "brand", "description"], orient="row")
    assert product_text(products).to_list() == ["Shoe | A, B | Acme", "Boot"]
    assert product_text(products, fields=("brand", "category"), levels=3)[0] == "Acme | A, B, C"


def test_a_catalogue_without_locales_serves_every_locale(tmp_path):
    products = "\n".join(line.rsplit(",", 1)[0] + "," for line in PRODUCTS.replace("shoe, red\nand", "shoe and").splitlines()).replace("description,", "description,locale")
    assert load_data(own(tmp_path, products)).judgments["locale"].unique().sort().to_list() == ["en", "es"]


def test_files_are_told_apart_by_suffix_in_either_case(tmp_path):
    (tmp_path / "shop.CSV").write_text("query,title\npan,Lid\n")
    assert read_table(file_source(tmp_path / "shop.CSV"), ["query"], ["title"])["title"].to_list() == ["Lid"]
    (tmp_path / "shop.txt").write_text("query,title\npan,Lid\n")
    with pytest.raises(DataError, match=r"shop.txt: a table is a .csv, .tsv, .jsonl or .parquet file"): read_table(file_source(tmp_path / "shop.txt"), ["query"])


def test_crossing_locales_is_noted(tmp_path):
    data = load_data(own(tmp_path, judgments=JUDGMENTS.replace("tetera,9", "tetera,8")))
    assert [note.count for note in data.notes if note.what == "judgments cross locales"] == [1]


def test_summary_split_and_display(tmp_path):
    data = load_data(own(tmp_path))
    assert data.summary()["judgments"].sum() == 6 and data.summary()["queries"].sum() == 4
    assert sum(data.split(s).judgments.height for s in ("train", "validation", "test")) == 6
    assert data.split("test").products.height == 3
    with pytest.raises(ValueError, match="no split 'dev'"): data.split("dev")
    assert "3 products, 6 judgments, 4 queries" in repr(data)
    hostile = replace(data, name="<script>alert(1)</script>", notes=(Note("<b>", 1, "<i>"),),
                      judgments=data.judgments.with_columns(locale=pl.lit("<u>")))
    shown = hostile._repr_html_()
    for raw in ("<script>", "<b><", "<i>", "<u>"): assert raw not in shown
    assert "&lt;script&gt;" in shown and "3 products" in shown


# --- keeping it -----------------------------------------------------------------------------------------------------

def test_round_trip(tmp_path):
    text = JUDGMENTS + "tetera,9,0,es\n"
    data = load_data(own(tmp_path, judgments=text, engagement=ENGAGED))
    folder = data.save(tmp_path / "new" / "saved")
    for back in (RelevanceData.load(folder), load_data(folder)):
        for name in ("products", "judgments", "ratings", "engagement"):
            assert getattr(back, name).equals(getattr(data, name))
        assert (back.name, back.notes, back.fingerprint) == (data.name, data.notes, data.fingerprint)
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


def test_saving_replaces_saved_data_but_nothing_else(tmp_path):
    data = load_data(own(tmp_path))
    with pytest.raises(DataError, match="exists and is not saved data"): data.save(tmp_path)
    folder = data.save(tmp_path / "saved")
    data.split("train").save(folder)
    assert RelevanceData.load(folder).judgments.height < 6


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    data = load_data(own(tmp_path))
    monkeypatch.setattr(pl.DataFrame, "write_parquet", lambda self, path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"): data.save(tmp_path / "sub" / "saved")
    assert list((tmp_path / "sub").iterdir()) == []


def test_saved_data_that_was_changed_is_refused(tmp_path):
    folder = load_data(own(tmp_path)).save(tmp_path / "saved")
    products = pl.read_parquet(folder / "products.parquet").with_columns(brand=pl.lit("X"))
    products.write_parquet(folder / "products.parquet")
    with pytest.raises(DataError, match="changed after it was saved"): load_data(folder)
    products.drop("brand").write_parquet(folder / "products.parquet")
    with pytest.raises(DataError, match="changed after it was saved"): load_data(folder)
    with pytest.raises(DataError, match="holds no saved data"): RelevanceData.load(tmp_path)


def test_fingerprint_depends_on_content_not_on_order(tmp_path):
    data = load_data(own(tmp_path))
    products = data.products[::-1].select(data.products.columns[::-1])
    turned = replace(data, products=products, judgments=data.judgments[::-1])
    assert turned.fingerprint == data.fingerprint
    others = [replace(data, products=data.products.with_columns(brand=pl.lit(""))),
              replace(data, judgments=data.judgments.with_columns(grade=(2 - pl.col("grade")).cast(pl.Int8))),
              replace(data, ratings=data.judgments)]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_fingerprint_is_the_same_in_every_process_and_version(tmp_path):
    assert load_data(own(tmp_path)).fingerprint == "29865c872d509eb3"


# --- the real sample ------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not ESCI.exists(), reason="the ESCI sample is not beside this repository")
def test_the_esci_sample():
    data = load_data(ESCI)
    assert data.products.height == 9_407
    raw = pl.read_parquet(ESCI / "shopping_queries_dataset_examples.parquet")
    dropped = raw.join(data.queries, left_on=["query", "product_locale"], right_on=["query", "locale"], how="anti")
    dropped = dropped.filter(~pl.col("query").str.strip_chars().is_in(data.queries["query"].implode()))
    assert raw.height == 11_678 and data.judgments.height + dropped.height == 11_678
    assert set(dropped["split"]) == {"train"} and dropped.height < 0.02 * raw.height
    assert data.split("test").judgments.height == 3_275
    listed = data.queries.filter(pl.col("judged") >= 40).group_by("split").len()
    assert dict(listed.iter_rows())["test"] == 39 and dict(listed.iter_rows())["validation"] >= 10
    assert set(data.queries["locale"]) == {"us", "es", "jp"}
    assert load_data(ESCI).fingerprint == data.fingerprint


def test_descriptions_are_merged_in_the_order_of_the_file(tmp_path):
    "Bullet points stand in where there is no description, whatever part of the file a row is in."
    n = 5000
    said = [None if i % 3 == 0 else "  " if i % 3 == 1 else f" text {i} " for i in range(n)]
    products = pl.DataFrame(dict(product_id=[f"p{i}" for i in range(n)], product_title=[f"title {i}" for i in range(n)], product_description=said,
                                 product_bullet_point=[None if i % 2 else f"point {i}" for i in range(n)], product_locale="us"))
    products.write_parquet(tmp_path / "shopping_queries_dataset_products.parquet", row_group_size=100)
    pl.DataFrame(dict(query=[f"query {i // 20} {chr(97 + i // 20 % 26) * 5}" for i in range(n)], query_id=[i // 20 for i in range(n)], product_id=products["product_id"], product_locale="us",
                      esci_label="E", split="train")).write_parquet(tmp_path / "shopping_queries_dataset_examples.parquet")
    data = load_data(tmp_path)
    wanted = [f"text {i}" if i % 3 == 2 else None if i % 2 else f"point {i}" for i in range(n)]
    assert data.products["product_id"].to_list() == products["product_id"].to_list() and data.products["description"].to_list() == wanted


def test_only_columns_with_blanks_are_trimmed():
    frame = pl.DataFrame(dict(a=["tent", " tent"], b=["tent", None], c=[1, 2], d=["", "\tx"]))
    assert untrimmed(frame, frame.columns) == {"a", "d"}
