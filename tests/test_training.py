"""Batches hold what the judgments say, the trainer's scores are plain cosines, and a stopped run goes on as if nothing happened."""
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from mine_refine_nb import training
from mine_refine_nb.data import product_text
from mine_refine_nb.encoder import encode, load_backbone
from mine_refine_nb.grades import UNJUDGED
from mine_refine_nb.losses import LabelAwareSupConLoss, MultiClassCircleLoss
from mine_refine_nb.market import simulate
from mine_refine_nb.mining import mine
from mine_refine_nb.stage1 import train_stage1
from mine_refine_nb.stage2 import level_centers, stage2_losses, train_stage2, with_mined
from mine_refine_nb.encoder import embed
from mine_refine_nb.training import (ListCollator, ListSampler, Recipe, ScoreMatrixLoss, freeze, gradient_shares, is_rich, note_pull, query_lists,
                                     sample_products, train, without_dropout, written_out)

TINY = Recipe(steps=6, queries=4, products=4, evaluate_every=3, learning_rate=2e-4, max_length=32)


@pytest.fixture(scope="module")
def market():
    return simulate(products=300, queries=60, locales=("en",), seed=3)


@pytest.fixture()
def model():
    torch.manual_seed(0)
    return load_backbone("all-MiniLM-L6-v2")


@pytest.fixture(scope="module")
def lists(market):
    return query_lists(market.split("train").judgments, market.products)


def test_lists_hold_every_train_judgment_and_no_other(market, lists):
    train_rows = market.judgments.filter(pl.col("split") == "train")
    ids = market.products["product_id"]
    seen = {(row["query_id"], ids[p], g) for row in lists for p, g in zip(row["products"], row["grades"])}
    assert seen == set(train_rows.select("query_id", "product_id", "grade").iter_rows())


@settings(max_examples=40, deadline=None)
@given(rich=st.integers(0, 12), others=st.integers(0, 30), size=st.integers(1, 10), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_batches_are_distinct_rows_of_the_right_size(rich, others, size, share, seed):
    if rich + others == 0:
        return
    data = Dataset.from_dict({"grades": [[2, 0, 1, 1, 0]] * rich + [[2]] * others, "locale": ["us"] * (rich + others)})
    sampler = ListSampler(data, size, steps=5, rich_share=share, seed=seed)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 5 and batches == list(sampler)
    for batch in batches:
        assert len(set(batch)) == len(batch) <= size and set(batch) <= set(range(rich + others))
    if share == 0 and others >= size:
        assert all(row >= rich for batch in batches for row in batch)


def test_every_query_gets_its_turn():
    data = Dataset.from_dict({"grades": [[2, 0, 1, 1, 0]] * 8 + [[2]] * 20, "locale": ["us"] * 28})
    drawn = [row for batch in ListSampler(data, 8, steps=8, rich_share=0.5) for row in batch]
    assert set(drawn) == set(range(28))


def test_a_list_shows_its_rare_grades_and_hard_pairs_more_often():
    row = {"products": list(range(40)), "grades": [2] * 38 + [0, 0], "hard": [p == 7 for p in range(40)]}
    draws = [sample_products(row, 8, np.random.default_rng(seed)) for seed in range(600)]
    assert all({38, 39} <= set(taken) and len(taken) == len(set(taken)) == 8 for taken in draws)
    hard, other = (sum(p in taken for taken in draws) for p in (7, 8))
    assert 1.4 * other < hard < 3 * other


def test_the_grade_matrix_is_the_judgments(market, model, lists):
    rows = [lists[i] for i in range(6)]
    batch = ListCollator(model, product_text(market.products).to_list(), products=5)(rows)
    texts = [text for i in range(4) for text in model.tokenizer.batch_decode(batch[f"product{i}_input_ids"], skip_special_tokens=True)]
    assert len(set(texts)) == len(texts) == batch["label"].shape[1]  # each product once
    judged = {(r["query_id"], p): g for r in rows for p, g in zip(r["products"], r["grades"])}
    columns = sorted({p for r in rows for p in r["products"]}, key=lambda p: (len(product_text(market.products)[p]), p))
    lower = {model.tokenizer.decode(model.tokenizer(product_text(market.products)[p])["input_ids"], skip_special_tokens=True): p for p in columns}
    for column, text in enumerate(texts):
        for query, row in enumerate(rows):
            assert batch["label"][query, column] == judged.get((row["query_id"], lower[text]), UNJUDGED)


def test_scores_in_the_trainer_are_the_cosines_of_the_encoder(market, model, lists):
    rows, texts = [lists[i] for i in range(3)], product_text(market.products).to_list()
    seen = {}

    class Keep(torch.nn.Module):
        def forward(self, scores, grades):
            seen["scores"] = scores.detach()
            return scores.sum()

    model.eval()
    batch = ListCollator(model, texts, products=4)(rows)
    names = ["query"] + [f"product{i}" for i in range(4)]
    features = [{k[len(n) + 1:]: v for k, v in batch.items() if k.startswith(f"{n}_")} for n in names]
    ScoreMatrixLoss(model, {"keep": Keep()})(features, batch["label"])
    tokens = {p: len(model.tokenizer(texts[p])["input_ids"]) for r in rows for p in sample_rows(r, rows)}
    columns = sorted(tokens, key=lambda p: (tokens[p], p))
    assert [batch[f"product{i}_attention_mask"].shape[1] for i in range(4)] == [max(tokens[p] for p in part) for part in np.array_split(columns, 4)]
    expected = model.encode_query([r["query"] for r in rows]) @ model.encode_document([texts[p] for p in columns]).T
    assert np.allclose(seen["scores"].numpy(), expected, atol=1e-4)


def test_attention_written_out_is_the_same_attention(market, model, lists):
    "Same loss and same gradients, with texts of different lengths in a batch; and the model is left as it was."
    without_dropout(model)
    freeze(model)
    batch = ListCollator(model, product_text(market.products).to_list(), products=4, chunks=2)([lists[i] for i in range(4)])
    features = [{k[len(n) + 1:]: v for k, v in batch.items() if k.startswith(f"{n}_")} for n in ("query", "product0", "product1")]
    assert not features[1]["attention_mask"].all()
    def gradients():
        model.zero_grad()
        value = ScoreMatrixLoss(model, {"contrast": LabelAwareSupConLoss(unjudged="negative")})(features, batch["label"])["contrast"]
        value.backward()
        return value.item(), torch.cat([weight.grad.ravel() for weight in model.parameters() if weight.grad is not None])
    before = model[0].model.config._attn_implementation
    value, gradient = gradients()
    with written_out(model):
        assert model[0].model.config._attn_implementation == "eager"
        other, same = gradients()
    assert model[0].model.config._attn_implementation == before != "eager"
    assert other == pytest.approx(value, abs=1e-5) and torch.allclose(gradient, same, atol=1e-5 * gradient.abs().max().item() + 1e-7, rtol=1e-3)


def test_gradient_shares_are_those_of_the_score_matrix():
    scores, labels = torch.zeros(1, 4, requires_grad=True), torch.tensor([[2, 1, 0, -1]])
    pull = Counter()
    scores.register_hook(partial(note_pull, pull, labels))
    (scores * torch.tensor([[3.0, -1.0, 0.0, 4.0]])).sum().backward()
    assert gradient_shares(pull) == {"gradient share -1": 0.5, "gradient share 0": 0.0, "gradient share 1": 0.125, "gradient share 2": 0.375}
    assert gradient_shares(pull) == {}


def sample_rows(row, rows):
    rng = np.random.default_rng([0, *(r["products"][0] for r in rows), len(rows)])
    return dict(zip([r["query_id"] for r in rows], [sample_products(r, 4, rng) for r in rows]))[row["query_id"]]


def test_training_lowers_the_loss_and_reports_by_part(market, model, tmp_path):
    losses = {"contrast": LabelAwareSupConLoss(0.05, unjudged="negative"), "circle": MultiClassCircleLoss()}
    history = train(model, market, losses, replace(TINY, steps=20, evaluate_every=10), tmp_path, {"circle": 0.1}, progress=False)
    names = set(history["name"].unique())
    assert {"loss", "contrast", "circle", "validation ndcg@10", "validation objective"} <= names
    shares = history.filter(pl.col("name").str.starts_with("gradient share"))
    assert shares["name"].unique().sort().to_list() == [f"gradient share {grade}" for grade in (-1, 0, 1, 2)]
    assert np.allclose(shares.group_by("step").agg(pl.col("value").sum())["value"], 1)
    curve = history.filter(pl.col("name") == "contrast").sort("step")["value"].to_list()
    assert np.mean(curve[-4:]) < np.mean(curve[:4])
    assert history.filter(pl.col("name") == "validation objective")["step"].to_list() == [0, 10, 20]
    assert all(weight.requires_grad for weight in model.parameters() if weight.is_floating_point())
    assert not list(tmp_path.iterdir()), "a gigabyte of checkpoints is left behind"


def test_a_step_that_does_not_help_is_not_kept(market, model, tmp_path):
    before = encode(model, ["red shoes"], "query")
    ruin = replace(TINY, learning_rate=5e-2)
    history = train(model, market, {"contrast": LabelAwareSupConLoss(unjudged="negative")}, ruin, tmp_path, progress=False)
    objective = history.filter(pl.col("name") == "validation objective")["value"].to_list()
    assert max(objective[1:]) < objective[0]
    assert np.allclose(encode(model, ["red shoes"], "query"), before, atol=1e-5)


def test_fewer_steps_than_one_validation_are_validated_at_their_end(market, model, tmp_path):
    history = train(model, market, {"contrast": LabelAwareSupConLoss(unjudged="negative")}, replace(TINY, steps=2), tmp_path, progress=False)
    objective = history.filter(name="validation objective")
    assert objective["step"].to_list() == [0, 2]
    assert history.filter(pl.col("name").is_in(["blend 0", "blend 1"])).sort("name")["value"].to_list() == objective["value"].to_list()


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 4:
            raise KeyboardInterrupt("killed")


@pytest.mark.parametrize("memory", [0, 200])
def test_a_killed_training_resumes_to_the_same_weights(market, tmp_path, monkeypatch, memory):
    def one(folder, resume=False):
        torch.manual_seed(1)
        model = load_backbone("all-MiniLM-L6-v2")
        history = train_stage1(model, market, [0.2, 0.4, 0.6], folder, replace(TINY, memory=memory), resume=resume, progress=False)
        return encode(model, ["steel pan", "blue running shoes"], "query"), history

    straight, history = one(tmp_path / "straight")
    quieten = training.quieten
    monkeypatch.setattr(training, "quieten", lambda trainer, progress: (quieten(trainer, progress), trainer.add_callback(Stop())))
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "killed")
    assert list((tmp_path / "killed" / "checkpoints").iterdir())
    monkeypatch.setattr(training, "quieten", quieten)
    resumed, again = one(tmp_path / "killed", resume=True)
    assert np.allclose(straight, resumed, atol=1e-4) and not (tmp_path / "killed" / "checkpoints").exists()
    loss = pl.col("name") == "loss"
    assert np.allclose(history.filter(loss)["value"], again.filter(loss)["value"], atol=1e-3)


def test_stage_two_takes_mined_judgments_more_often_and_leaves_pending_out(market, model, tmp_path):
    vectors = embed(model, market)
    mined = mine(vectors, market, "train")
    pending = mined.rows.filter(pl.col("grade") == UNJUDGED)
    assert pending.height and with_mined(market, mined).judgments.equals(market.judgments)
    held = market.split("validation").judgments["query_id"][0]
    with pytest.raises(ValueError, match="1 mined pairs are of validation or test queries .* mine the split 'train'"):
        with_mined(market, replace(mined, rows=mined.rows.head(1).with_columns(query_id=pl.lit(held), grade=pl.lit(1, pl.Int8))))
    lists = query_lists(market.split("train").judgments, market.products, mined.rows.filter(pl.col("grade") != UNJUDGED))
    hard = {(r["query_id"], market.products["product_id"][p]) for r in lists for p, h in zip(r["products"], r["hard"]) if h}
    assert hard == set(mined.rows.filter(pl.col("grade") != UNJUDGED).select("query_id", "product_id").iter_rows())
    history = train_stage2(model, market, mined, [0.2, 0.4, 0.6], tmp_path, TINY, progress=False)
    assert {"circle", "contrast"} <= set(history["name"].unique())


def test_centers_stay_within_the_scale_and_ascend():
    for scores in ([0.84, 0.86, 0.9], [0.1, 0.5, 0.2], [0.99, 0.95, 1.0], [-0.9, -1.0]):
        centers = level_centers(scores, widen=3)
        assert all(a < b for a, b in zip(centers, centers[1:])) and -1 <= centers[0] and centers[-1] <= 1


def test_a_recipe_decides_the_contrast():
    plain, wide = (stage2_losses((0.1, 0.5, 0.9), 0.05, recipe=recipe) for recipe in (Recipe(), Recipe(memory=9, boundaries=(0.5, 1.0))))
    assert plain["contrast"].settings == LabelAwareSupConLoss(0.05, unjudged="negative").settings
    assert wide["contrast"].settings == LabelAwareSupConLoss(0.05, cumulative=True, boundary_weights=(0.5, 1.0), unjudged="guarded").settings


def test_nothing_to_train_on_is_said(market):
    with pytest.raises(ValueError, match="no graded judgment"):
        query_lists(market.judgments.clear(), market.products)


def test_rich_lists_need_length_and_two_grades():
    assert is_rich([2, 0, 1, 1, 2]) and not is_rich([2] * 9) and not is_rich([2, 0])
