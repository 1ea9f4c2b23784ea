"""The index and its updates, files that survive a kill, smaller vectors, the searcher of a run, ONNX."""
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from mine_refine_nb import serving
from mine_refine_nb.data import product_text
from mine_refine_nb.encoder import embed
from mine_refine_nb.market import simulate
from mine_refine_nb.metrics import evaluate
from mine_refine_nb.normalising import QueryNorm
from mine_refine_nb.serving import ProductIndex, Searcher, open_searcher
from mine_refine_nb.thresholds import fit_calibrator

DIM = 32


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors():
    return unit(np.random.default_rng(0).normal(size=(700, DIM)))


@pytest.fixture(scope="module")
def queries():
    return unit(np.random.default_rng(1).normal(size=(40, DIM)))


@pytest.fixture(scope="module")
def data():
    return simulate(products=150, queries=36, locales=("en", "es"), seed=0)


def bag_of_words(data, seed: int = 0, dim: int = DIM) -> SentenceTransformer:
    "An encoder that takes no time: a random vector per word, averaged."
    split = pre_tokenizers.Whitespace()
    words = {word for text in [*product_text(data.products), *data.queries["query"]] for word, _ in split.pre_tokenize_str(text)}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *sorted(words)])}, "[UNK]"))
    tokenizer.pre_tokenizer = split
    weights = np.random.default_rng(seed).normal(size=(tokenizer.get_vocab_size(), dim)).astype(np.float32)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], prompts={"query": "", "document": ""}, device="cpu")


@pytest.fixture(scope="module")
def model(data):
    return bag_of_words(data)


@pytest.fixture(scope="module")
def emb(model, data):
    return embed(model, data)


def names(count: int, start: int = 0) -> list[str]:
    return [f"p{i}" for i in range(start, start + count)]


def exact(index_ids, vectors, queries, k, only=None):
    "Plain numpy: the best by rounded score, ties by position."
    pool = np.arange(len(vectors)) if only is None else np.asarray(only)
    scores = np.rint(queries @ vectors[pool].T * 1e6) / 1e6
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.asarray(index_ids, dtype=object)[pool[order]].tolist()


KINDS = {"Flat": "", "IVF16,Flat": "nprobe=16", "HNSW16": "efSearch=700", "IVF4,SQ8,RFlat": "nprobe=4,k_factor_rf=20", "SQ8,RFlat": "k_factor_rf=20",
         "RR32,IVF4,Flat": "nprobe=4"}


@pytest.mark.parametrize("factory", KINDS)
def test_updates_equal_a_fresh_build(factory, vectors, queries, tmp_path):
    index = ProductIndex.build(names(500), vectors[:500], factory, KINDS[factory])
    index.remove(names(20, 100))
    index.add(names(30), vectors[670:], replace=True)
    index.add(names(150, 500), vectors[500:650])
    index.remove(["p649", "p30"])
    index.save(tmp_path / "index")
    index = ProductIndex.load(tmp_path / "index")
    index.add(["p649"], vectors[649:650])
    rows = np.r_[31:100, 120:500, 670:700, 500:650]
    ids = [*names(69, 31), *names(380, 120), *names(30), *names(150, 500)]
    assert index.product_ids.tolist() == ids and len(index) == len(ids) == index.index.ntotal
    for only in (None, np.arange(5, len(ids), 3)):
        assert index.search(queries, 10, only)[0].tolist() == exact(ids, vectors[rows], queries, 10, only)


def test_scores_are_cosines_and_ties_come_in_order(vectors, queries):
    twins = np.repeat(vectors[:50], 4, axis=0)
    index = ProductIndex.build(names(200), twins)
    found, scores = index.search(queries, 6)
    assert found.tolist() == exact(names(200), twins, queries, 6)
    best = [[q @ twins[int(i[1:])] for i in row] for q, row in zip(queries, found)]
    assert np.allclose(scores, best, atol=1e-6) and (np.diff(scores) <= 0).all()


def test_a_part_with_fewer_products_than_asked(vectors, queries):
    for factory in ("Flat", "HNSW16", "IVF4,Flat"):
        index = ProductIndex.build(names(100), vectors[:100], factory, "nprobe=4" if "IVF" in factory else "")
        found, scores = index.search(queries, 10, serving.places(index, ["p7", "p70", "p3"]))
        assert found.shape == scores.shape == (len(queries), 10)
        assert {*found[:, :3].ravel()} == {"p3", "p7", "p70"} and (found[:, 3:] == None).all() and np.isnan(scores[:, 3:]).all()  # noqa: E711
    assert ProductIndex.build(names(5), vectors[:5]).search(queries, 10)[0].shape == (len(queries), 5)


BAD = {"twice": (["a", "a"], 1., DIM, "'a'; keep one row"), "not unit": (["a", "b"], 2., DIM, "not of length 1, the first is that of 'a'"),
       "nan": (["a", "b"], np.nan, DIM, "not of length 1"), "dims": (["a", "b"], 1., DIM - 1, "another encoder"),
       "count": (["a"], 1., DIM, "one row per id"), "number": (["a", 7], 1., DIM, "strings, not 7"), "there": (["a", "p1"], 1., DIM, "'p1'; give replace=True")}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_changes_nothing(case, vectors, queries):
    ids, length, dim, message = BAD[case]
    index = ProductIndex.build(names(60), vectors[:60])
    before = index.search(queries, 5)[0].tolist()
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        index.add(ids, length * unit(np.ones((2, dim))))
    assert index.search(queries, 5)[0].tolist() == before and len(index) == index.index.ntotal == 60


def test_removal_that_cannot_be_done(vectors, queries):
    index = ProductIndex.build(names(300), vectors[:300], "HNSW16_SQ8")
    before = index.search(queries, 5)[0].tolist()
    with pytest.raises(ValueError, match="can neither remove products nor give its vectors back"): index.remove(["p3"])
    with pytest.raises(ValueError, match="can neither"): index.add(["p3"], vectors[400:401], replace=True)
    assert index.search(queries, 5)[0].tolist() == before and len(index) == 300
    with pytest.raises(ValueError, match="1 products are not in it, the first is 'gone'"): index.remove(["p3", "gone"])
    with pytest.raises(ValueError, match="every product"): index.remove(names(300))


def test_every_product_can_be_replaced(vectors, queries):
    for factory in ("Flat", "HNSW16", "IVF4,Flat"):
        index = ProductIndex.build(names(200), vectors[:200], factory, "nprobe=4" if "IVF" in factory else "efSearch=200" if "HNSW" in factory else "")
        index.add(names(200), vectors[200:400], replace=True)
        assert index.search(queries, 5)[0].tolist() == exact(names(200), vectors[200:400], queries, 5)


def test_cells_fit_the_catalogue(vectors):
    assert [serving.fill_factory("IVF,PQ48", n) for n in (10, 700, 10_000_000)] == ["IVF1,PQ48", "IVF17,PQ48", "IVF12649,PQ48"]
    assert serving.fill_factory("IVF8_HNSW32,Flat", 700) == "IVF8_HNSW32,Flat" and serving.fill_factory("PCA16,IVF,Flat", 700) == "PCA16,IVF17,Flat"
    index = ProductIndex.build(names(700), vectors, "IVF,Flat")
    assert index.factory == "IVF17,Flat" and index.parameters == "nprobe=4" and index.index.nprobe == 4
    with pytest.raises(ValueError, match="cannot build 'IVF64,Flat' .* over 10 vectors"): ProductIndex.build(names(10), vectors[:10], "IVF64,Flat")
    with pytest.raises(ValueError, match="no inner product"): ProductIndex.build(names(700), vectors, "HNSW8_PQ8x2")
    with pytest.raises(ValueError, match="no products"): ProductIndex.build([], np.zeros((0, 4)))


def test_an_index_comes_back_as_it_was(vectors, queries, tmp_path):
    index = ProductIndex.build(names(700), vectors, "IVF16,Flat", "nprobe=3", encoder="one", catalogue="texts")
    index.save(tmp_path)
    again = ProductIndex.load(tmp_path, encoder="one")
    assert again.search(queries, 10)[0].tolist() == index.search(queries, 10)[0].tolist() and again.index.nprobe == 3
    assert (again.factory, again.encoder, again.catalogue) == ("IVF16,Flat", "one", "texts")
    ProductIndex.build(names(9), vectors[:9], encoder="two").save(tmp_path)
    assert len(ProductIndex.load(tmp_path)) == 9 and len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ValueError, match="another encoder"): ProductIndex.load(tmp_path, encoder="one")
    next(tmp_path.glob("ids-*")).unlink()
    pl.DataFrame({"product_id": names(3), "number": [0, 1, 2]}).write_parquet(tmp_path / json.loads((tmp_path / "about.json").read_text())["files"]["ids"])
    with pytest.raises(ValueError, match="damaged: 9 vectors, 3 ids"): ProductIndex.load(tmp_path)
    with pytest.raises(ValueError, match="holds no index"): ProductIndex.load(tmp_path / "nowhere")


class Killed(BaseException):
    "A stop that nobody handles."


@pytest.mark.parametrize("moment", range(6))   # before and after the rename of the vectors, of the ids, of about.json
def test_a_killed_save_leaves_the_old_index(moment, vectors, queries, tmp_path, monkeypatch):
    old, new = ProductIndex.build(names(50), vectors[:50]), ProductIndex.build(names(90), vectors[:90])
    old.save(tmp_path)
    rename, done = Path.replace, []

    def dying(self, target):
        if len(done) == moment // 2 and moment % 2 == 0: raise Killed
        rename(self, target)
        done.append(target)
        if len(done) == moment // 2 + 1 and moment % 2: raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", dying)
        new.save(tmp_path)
    kept = ProductIndex.load(tmp_path)
    expected = new if moment == 5 else old
    assert kept.search(queries, 5)[0].tolist() == expected.search(queries, 5)[0].tolist()
    new.save(tmp_path)
    assert len(ProductIndex.load(tmp_path)) == 90 and len(list(tmp_path.iterdir())) == 3


def test_speed_table(vectors, queries):
    table = serving.index_speed(vectors, queries, {"Flat": "", "IVF16,Flat": "nprobe=1", "PQ8x4": "", "PQ8x4,RFlat": "k_factor_rf=70"})
    rows = {row["factory"]: row for row in table.to_dicts()}
    assert rows["Flat"]["recall"] == 1 and rows["Flat"]["score_error"] < 1e-5 and 4 * DIM <= rows["Flat"]["bytes_per_vector"] < 4 * DIM + 1
    assert .2 < rows["IVF16,Flat"]["recall"] < 1 and rows["IVF16,Flat"]["score_error"] < 1e-5
    assert rows["PQ8x4"]["bytes_per_vector"] < 10 and rows["PQ8x4"]["score_error"] > .05 and rows["PQ8x4"]["recall"] < .9
    assert rows["PQ8x4,RFlat"]["recall"] == 1 and rows["PQ8x4,RFlat"]["score_error"] < 1e-5
    assert (table["p95_ms"] >= table["p50_ms"]).all() and (table["p50_ms"] > 0).all()


def test_small_vectors(emb, data):
    table = serving.small_vectors(emb, data, dims=(64, 16, 8))
    rows = {(row["vectors"], row["dim"]): row for row in table.to_dicts()}
    true = evaluate(emb, data, "test").values
    assert all(rows["float32", DIM][name] == true[name] for name in serving.COSTS)
    assert all(abs(rows["int8", DIM][name] - true[name]) < .02 for name in serving.COSTS)
    assert [rows[key]["memory"] for key in (("float32", DIM), ("int8", DIM), ("binary", DIM), ("rotated 8, int8", 8))] == [128, 32, 4, 8]
    assert rows["binary, then int8", DIM]["stored"] == 36 and not any(dim == 64 for _, dim in rows)
    part, lossless = data.split("test"), serving.as_int8(emb)
    both = serving.rescored(serving.as_signs(emb), lossless, part, factor=4)
    assert all(both[name] == pytest.approx(evaluate(lossless, data, "test").values[name]) for name in serving.COSTS)   # all are proposed
    few = serving.rescored(serving.as_signs(emb), lossless, part, k=10, factor=1)
    assert few["recall@50"] < both["recall@50"] and few["auc_2"] == both["auc_2"]


def test_rotation_keeps_more_than_the_first_numbers(data):
    rng = np.random.default_rng(0)
    few = unit(rng.normal(size=(500, 4)) @ np.linalg.qr(rng.normal(size=(DIM, DIM)))[0][:4] + .01 * rng.normal(size=(500, DIM)))
    emb = serving.Embeddings(names(100), few[:100], names(400), few[100:])
    true = emb.queries @ emb.products.T
    cut, first = serving.rotated(emb, 4), serving.shortened(emb, 4)
    assert np.abs(cut.queries @ cut.products.T - true).max() < .05 < np.abs(first.queries @ first.products.T - true).max()


def test_shortened_is_what_truncate_dim_gives(model, emb, data):
    cut = bag_of_words(data)
    cut.truncate_dim = 8
    assert np.allclose(embed(cut, data).products, serving.shortened(emb, 8).products, atol=1e-5)


def test_signs_count_differing_bits(emb):
    signs, d, middle = serving.as_signs(emb), emb.products.shape[1], emb.products.mean(axis=0)
    differing = ((emb.queries[:5, None] > middle) != (emb.products[None] > middle)).sum(axis=2)
    assert np.allclose(signs.queries[:5] @ signs.products.T, 1 - 2 * differing / d, atol=1e-5)


def test_fingerprints(data, model):
    mark = serving.encoder_fingerprint(model)
    same, other = bag_of_words(data), bag_of_words(data)
    assert serving.encoder_fingerprint(same) == mark
    with torch.no_grad(): next(other.parameters())[3, 2] += 1e-6
    assert serving.encoder_fingerprint(other) != mark
    same.prompts = {"query": "q: ", "document": ""}
    assert serving.encoder_fingerprint(same) != mark
    products = data.products
    renamed = products.with_columns(title=pl.when(pl.int_range(pl.len()) == 5).then(pl.lit("x")).otherwise("title"))
    assert len({serving.catalogue_fingerprint(frame) for frame in (products, renamed, products.reverse(), products[:-1])}) == 4


def test_vectors_are_made_once_and_again_when_something_changed(data, model, tmp_path, monkeypatch):
    encoded, encode = [], serving.encode
    monkeypatch.setattr(serving, "encode", lambda model, texts, *a, **k: (encoded.append(len(texts)), encode(model, texts, *a, **k))[1])
    folder, count = tmp_path / "index", len(data.products)
    for _ in range(2): serving.kept_index(folder, model, data.products)
    assert encoded == [count]
    serving.kept_index(folder, bag_of_words(data, seed=1), data.products)
    assert encoded == [count] * 2
    index = serving.kept_index(folder, model, data.products[1:])
    assert encoded == [count, count, count - 1] and len(index) == count - 1
    next(folder.glob("index-*")).write_bytes(b"broken")
    assert len(serving.kept_index(folder, model, data.products[1:])) == count - 1 and len(encoded) == 4


@pytest.fixture(scope="module")
def searcher(model, emb, data):
    return Searcher(model, ProductIndex.build(emb.product_ids, emb.products), data, (.5, .7))


def test_a_search_lists_what_the_evaluation_ranked(searcher, emb, data):
    run = evaluate(emb, data, "test").run
    for row in data.split("test").queries.iter_rows(named=True):
        answer = searcher.search(row["query"], 10, row["locale"])
        ranked = run.filter(query_id=row["query_id"]).head(10)
        assert answer.frame["product_id"].to_list() == ranked["product_id"].to_list()
        assert np.allclose(answer.frame["score"], ranked["score"], atol=2e-6)
    titles = dict(data.products["product_id", "title"].iter_rows())
    assert answer.frame["title"].to_list() == [titles[i] for i in answer.frame["product_id"]]
    assert answer.frame.columns == ["rank", "score", "p0", "p1", "p2", "verdict", "product_id", "title"] and answer.frame["rank"].to_list() == list(range(1, 11))


def test_verdicts_least_and_no_match(searcher, data):
    query = data.queries["query"][0]
    low, high = searcher.search(query, 40).frame["score"].gather([25, 6])   # a score at a threshold is above it
    searcher = replace(searcher, cuts=(low, high))
    whole = searcher.search(query, 40)
    bands = [0 if s < low else 1 if s < high else 2 for s in whole.frame["score"]]
    assert whole.frame["verdict"].to_list() == [["irrelevant", "moderate", "relevant"][b] for b in bands] and set(bands) == {0, 1, 2}
    for least in (1, 2):
        kept = searcher.search(query, 40, least=least)
        assert len(kept) == sum(b >= least for b in bands) and kept.frame.equals(whole.frame[:len(kept)])
        assert f"{len(kept)} of {len(data.products)} products" in kept.message or "no good match" in kept.message
    none = replace(searcher, cuts=(1.5, 1.6)).search(query, 5, least=1)
    assert len(none) == 0 and none.message.startswith("no good match") and none.frame.columns == whole.frame.columns
    assert whole.frame["p0"].null_count() == 40 and replace(searcher, cuts=None).search(query).frame["verdict"].null_count() == 10
    assert "&lt;b&gt;" in searcher.search("<b>")._repr_html_()


def test_probabilities_come_from_the_calibrator(searcher, emb, data):
    pairs = evaluate(emb, data, "validation").pairs
    calibrator = fit_calibrator(pairs["score"], pairs["grade"])
    frame = replace(searcher, calibrator=calibrator).search(data.queries["query"][0], 7).frame
    assert np.allclose(frame.select("p0", "p1", "p2").to_numpy(), calibrator.probabilities(frame["score"].to_numpy()))
    assert len(replace(searcher, calibrator=calibrator, cuts=(1.5, 1.6)).search("x", least=2)) == 0


WRONG = {"query is empty": dict(query="  "), "k is 0": dict(k=0), "no products of locale 'fr': there are en, es": dict(locale="fr"), "least is 3": dict(least=3)}


@pytest.mark.parametrize("message", WRONG)
def test_questions_without_an_answer(message, searcher):
    with pytest.raises(ValueError, match=message): searcher.search(**{"query": "tent"} | WRONG[message])


def test_a_searcher_wants_its_own_index(searcher, emb, data, model):
    with pytest.raises(ValueError, match="no thresholds"): replace(searcher, cuts=None).search("tent", least=1)
    with pytest.raises(ValueError, match="different products"): Searcher(model, ProductIndex.build(emb.product_ids[1:], emb.products[1:]), data)


@pytest.fixture
def run_folder(data, model, emb, tmp_path):
    "What a run leaves behind, as far as a search reads it."
    pairs = evaluate(emb, data, "validation").pairs
    data.save(tmp_path / "data")
    model.save(str(tmp_path / "model"), create_model_card=False)
    cut = {"grade >= 1": {"threshold": .6}, "grade >= 2": {"threshold": .5}}   # crossed, as happens where the grades overlap
    scale = {"stage2": cut | {"calibrator": fit_calibrator(pairs["score"], pairs["grade"]).to_dict()}, "stage1": cut}
    scale["stage2"]["normalised"] = scale["stage2"] | {"norm": QueryNorm(.05, .5, .6).to_dict()}
    (tmp_path / "thresholds.json").write_text(json.dumps(scale))
    (tmp_path / "run.json").write_text(json.dumps({"request": {"backbone": "all-MiniLM-L6-v2", "dim": None, "seed": 0}}))
    return tmp_path


def test_a_run_is_searched(run_folder, searcher, data, monkeypatch):
    first = open_searcher(run_folder)
    assert first.cuts == (.5, .6) and first.locales == ["en", "es"]
    encoded, encode = [], serving.encode
    monkeypatch.setattr(serving, "encode", lambda model, texts, *a, **k: (encoded.append(len(texts)), encode(model, texts, *a, **k))[1])
    again = open_searcher(run_folder / "model")
    started = time.perf_counter()
    answer = again.search(data.queries["query"][0], 5, "en")
    assert time.perf_counter() - started < 1 and encoded == [1]
    assert answer.frame["product_id"].to_list() == searcher.search(data.queries["query"][0], 5, "en").frame["product_id"].to_list()
    assert np.allclose(answer.frame.select(pl.sum_horizontal("p0", "p1", "p2")).to_series(), 1)
    assert (run_folder / "index" / "stage2" / "about.json").exists()


def test_a_norm_changes_scores_and_no_order(run_folder, data):
    query = data.queries["query"][0]
    plain, normed = open_searcher(run_folder), open_searcher(run_folder, normalised=True)
    assert plain.norm is None and normed.norm == QueryNorm(.05, .5, .6)
    deep = plain.search(query, normed.norm.depth, "en").frame["score"].to_numpy()
    for k in (1, 5):
        before, after = (one.search(query, k, "en").frame for one in (plain, normed))
        assert after["product_id"].to_list() == before["product_id"].to_list() and len(after) == k
        assert np.allclose(after["score"], normed.norm.scores(deep)[:k])    # as deep as the norm looks, however few are asked for
        assert not np.allclose(after["p2"], before["p2"])
    top = normed.search(query, 1, "en").frame["score"][0]
    assert len(replace(normed, cuts=(top - .01, top + .01)).search(query, 5, "en", least=1)) >= 1
    assert "no good match" in replace(normed, cuts=(top - .01, top + .01)).search(query, 5, "en", least=2).message


def test_a_run_without_a_norm_says_so(run_folder):
    with pytest.raises(ValueError, match="no scale of normalised scores for pretrained"): serving.read_scale(run_folder, "pretrained", True)
    (run_folder / "thresholds.json").unlink()
    with pytest.raises(ValueError, match="no scale of normalised scores for stage2"): open_searcher(run_folder, normalised=True)


def test_what_is_no_run(run_folder, tmp_path):
    with pytest.raises(ValueError, match="holds no run"): open_searcher(run_folder / "data")
    with pytest.raises(ValueError, match="no finished stage1"): open_searcher(run_folder, "stage1")
    with pytest.raises(ValueError, match="no stage 'stage3': choose one of pretrained, stage1, stage2"): open_searcher(run_folder, "stage3")
    (run_folder / "thresholds.json").unlink()
    assert open_searcher(run_folder).cuts is None


def test_the_pretrained_stage_gets_its_heads(run_folder, data, monkeypatch):
    monkeypatch.setattr(serving, "load_backbone", lambda name: bag_of_words(data))
    (run_folder / "run.json").write_text(json.dumps({"request": {"backbone": "some", "dim": 8, "seed": 0}}))
    found = open_searcher(run_folder, "pretrained")
    assert found.model.get_embedding_dimension() == 8 and found.index.index.d == 8 and found.cuts is None
    assert len(found.search(data.queries["query"][0], 3)) == 3


def test_onnx_says_what_is_missing(model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    for call in (lambda: serving.load_onnx(tmp_path), lambda: serving.export_onnx(model, tmp_path / "x", ["text"])):
        with pytest.raises(ValueError, match=r'pip install "mine_refine_nb\[onnx\]"'): call()


def test_onnx_gives_the_same_vectors(data, tmp_path):
    for name in ("onnx", "onnxruntime"): pytest.importorskip(name, reason="the extra `onnx` is not installed")
    model = serving.add_heads(serving.load_backbone("all-MiniLM-L6-v2"), 64)
    texts = [*data.queries["query"][:8], *product_text(data.products)[:8], "one " * 100]
    with pytest.raises(ValueError, match="nothing was kept"): serving.export_onnx(model, tmp_path / "model", texts, least=1.1)
    assert not (tmp_path / "model").exists() and not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir(), (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="holds no ONNX export, which would be replaced"): serving.export_onnx(model, tmp_path / "mine", texts)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    for _ in range(2): assert serving.export_onnx(model, tmp_path / "model", texts) > .999    # an export gives way to a newer one
    loaded = serving.load_onnx(tmp_path / "model", threads=1)
    assert isinstance(loaded[0].model, serving.OnnxBody) and loaded.get_embedding_dimension() == 64
    assert serving.agreement(model, loaded, texts[::-1]) > .999
    assert SentenceTransformer(str(tmp_path / "model"), device="cpu").encode_query("tent").shape == (64,)
    speed = serving.encoder_speed({"torch": model, "onnx": loaded}, texts[:4])
    assert speed["encoder"].to_list() == ["torch", "onnx"] and speed["ratio"][0] == 1
    with pytest.raises(ValueError, match="holds no onnx/model.onnx"): serving.load_onnx(tmp_path)
