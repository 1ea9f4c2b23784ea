"""A cross-encoder learns grades, answers in order, keeps what it was when saved, and a killed training goes on."""
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from transformers import TrainerCallback

from mine_refine_nb import cross_encoder
from mine_refine_nb.cross_encoder import CrossAnnotator, CrossRecipe, LengthBatches, build_cross, cross_dataset, cross_name, cross_texts, pair_lengths, train_cross
from mine_refine_nb.data import DataError
from mine_refine_nb.grades import DEFAULT_GUIDELINE
from mine_refine_nb.judging import PROBABILITIES, Calibration, agreement, annotate, check_pairs, pairs_of
from mine_refine_nb.market import simulate

BACKBONE = "all-MiniLM-L6-v2"
QUICK = CrossRecipe(epochs=1, batch=8, learning_rate=1e-4, max_length=64)
TINY = CrossRecipe(epochs=2, batch=8, max_length=32)


def said(judged: pl.DataFrame) -> np.ndarray:
    return judged.select(PROBABILITIES).to_numpy()


@pytest.fixture(scope="module")
def parts():
    torch.set_num_threads(1)
    market = simulate(products=400, queries=90, locales=("en",), seed=1)
    return {name: pairs_of(market.split(name)) for name in ("train", "validation", "test")}


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "cross"
    return train_cross(parts["train"], parts["validation"], folder, BACKBONE, QUICK), folder


@pytest.fixture(scope="module")
def untrained():
    return CrossAnnotator("untrained", build_cross(BACKBONE))


def test_it_learns_what_people_said(parts, trained):
    labels = annotate(trained[0], parts["test"])
    found = agreement(parts["test"]["grade"], labels["grade"])
    majority = (parts["test"]["grade"] == parts["train"]["grade"].mode()[0]).mean()
    assert found["kappa"] > 0.25 and found["accuracy"] > majority + 0.05


def test_the_saved_annotator_is_the_trained_one(parts, trained):
    annotator, folder = trained
    again = CrossAnnotator.load(folder)
    assert (again.name, again.recipe, again.calibration) == (annotator.name, annotator.recipe, annotator.calibration)
    assert again.guideline.fingerprint == DEFAULT_GUIDELINE.fingerprint
    assert np.allclose(said(again.judge(parts["test"])), said(annotator.judge(parts["test"])), atol=1e-6)
    assert again.save(folder) == folder and CrossAnnotator.load(folder).name == annotator.name
    assert [path.name for path in folder.parent.iterdir()] == ["cross"]    # neither checkpoints nor a half-written folder


def test_answers_keep_the_order_of_the_pairs(parts, trained):
    pairs = parts["test"].head(60)
    turned = np.random.default_rng(0).permutation(pairs.height)
    assert np.allclose(said(trained[0].judge(pairs))[turned], said(trained[0].judge(pairs[turned])), atol=0.02)    # padding moves bfloat16's last digit
    assert np.ptp(said(trained[0].judge(pairs))[:, 0]) > 0.1


def test_the_query_matters(parts, trained):
    pairs = parts["test"].filter(pl.col("grade") == 2)
    other = pairs.with_columns(query=pairs["query"].reverse())
    expected = [trained[0].judge(frame).select(PROBABILITIES).to_numpy() @ [0, 1, 2] for frame in (pairs, other)]
    assert expected[0].mean() > expected[1].mean() + 0.2


def test_pairs_with_missing_fields(untrained):
    pairs = pl.DataFrame({"query": ["red shirt", "red shirt", None, " "], "title": ["Red shirt", None, "Red shirt", "Red shirt"]})
    judged = untrained.judge(pairs)
    assert judged["reason"].to_list() == [None, "the product has no title", "the query is empty", "the query is empty"]
    assert np.isclose(sum(judged.row(0)[:3]), 1) and judged["p0"].is_null().to_list() == [False, True, True, True]
    assert annotate(untrained, pairs)["grade"].to_list() == [0, None, None, None]
    assert untrained.judge(check_pairs(pairs).clear()).height == 0
    with pytest.raises(DataError, match="title"):
        untrained.judge(pairs.drop("title"))


def test_text_cannot_pass_for_the_frame(untrained):
    pairs = check_pairs(pl.DataFrame({"query": ["shirt"], "title": ["hose [SEP] shirt [CLS]"]}))
    tokenizer = untrained.model.tokenizer
    ids = untrained.model.preprocess(cross_texts(pairs, untrained.recipe, tokenizer.all_special_tokens))["input_ids"][0].tolist()
    assert ids.count(tokenizer.sep_token_id) == 2 and ids.count(tokenizer.cls_token_id) == 1


def test_calibration_changes_confidence_and_no_grade(parts, trained):
    plain = said(replace(trained[0], calibration=Calibration()).judge(parts["test"]))
    soft = said(replace(trained[0], calibration=Calibration("temperature", 3.0)).judge(parts["test"]))
    assert (plain.argmax(1) == soft.argmax(1)).all() and soft.max(1).mean() < plain.max(1).mean()


def test_another_training_has_another_name(parts, tmp_path):
    few, held = parts["train"].head(24), parts["validation"].head(16)
    once, same, other = (train_cross(few, held, tmp_path / name, BACKBONE, replace(TINY, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert once.name == same.name != other.name and once.name.startswith(f"cross-{BACKBONE}-")
    other.recipe, other.calibration = once.recipe, once.calibration
    assert cross_name(BACKBONE, other) != once.name    # the weights alone
    assert cross_name(BACKBONE, replace(once, calibration=Calibration())) != once.name
    assert cross_name(BACKBONE, once) == once.name


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt("killed")


@pytest.fixture()
def killed(parts, tmp_path, monkeypatch):
    "A training that was killed in its second epoch, and the steps of all trainings after it."
    few, held, build, steps = parts["train"].head(32), parts["validation"].head(16), cross_encoder.cross_trainer, []

    def stopping(*settings):
        trainer = build(*settings)
        trainer.add_callback(Stop())
        return trainer

    def counting(*settings):
        trainer = build(*settings)
        step = trainer.training_step
        trainer.training_step = lambda *args, **kwargs: (steps.append(1), step(*args, **kwargs))[1]
        return trainer

    monkeypatch.setattr(cross_encoder, "cross_trainer", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_cross(few, held, tmp_path / "killed", BACKBONE, TINY)
    monkeypatch.setattr(cross_encoder, "cross_trainer", counting)
    return few, held, tmp_path / "killed", steps


def test_a_killed_training_goes_on_to_the_same_model(killed):
    few, held, folder, steps = killed
    assert not folder.exists()
    resumed = train_cross(few, held, folder, BACKBONE, TINY, resume=True)
    assert len(steps) == 4    # the second epoch only
    straight = train_cross(few, held, folder.with_name("straight"), BACKBONE, TINY)
    assert len(steps) == 4 + 8 and np.allclose(said(straight.judge(held)), said(resumed.judge(held)), atol=1e-4)


def test_another_recipe_does_not_go_on_from_this_one(killed):
    few, held, folder, steps = killed
    train_cross(few, held, folder, BACKBONE, replace(TINY, learning_rate=1e-5), resume=True)
    assert len(steps) == 8


def test_every_pair_is_drawn_once_an_epoch(parts):
    dataset = cross_dataset(parts["train"].head(101), TINY)
    sampler = LengthBatches(dataset, lengths=[1] * 50 + [2] * 51, batch_size=8, drop_last=False, seed=3)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append([row for batch in sampler for row in batch])
        assert sorted(epochs[-1]) == list(range(101)) and len(list(sampler)) == len(sampler) == 13
    assert epochs[0] != epochs[1]


def test_batches_hold_pairs_of_like_length(parts, untrained):
    dataset = cross_dataset(parts["train"], TINY)
    texts = list(zip(dataset["query"], dataset["product"]))
    lengths = pair_lengths(untrained.model, texts)
    assert lengths[:64].tolist() == untrained.model.preprocess(texts[:64])["attention_mask"].sum(1).tolist()
    def padded(batches): return sum(lengths[batch].max() * len(batch) for batch in batches) / lengths.sum()
    drawn = np.random.default_rng(0).permutation(len(lengths))
    assert padded(LengthBatches(dataset, lengths=lengths, batch_size=32, drop_last=False)) < 1.05 < 1.2 < padded(np.array_split(drawn, len(drawn) // 32))


def test_ungraded_pairs_teach_nothing(parts):
    pairs = parts["train"].head(4).with_columns(grade=pl.Series([2, -1, None, 0]))
    assert cross_dataset(pairs, TINY)["label"] == [2, 0]
    with pytest.raises(DataError, match="human grades"):
        cross_dataset(pairs.drop("grade"), TINY)


@pytest.mark.parametrize("content", [None, "{", json.dumps({"kind": "llm"}), json.dumps({"kind": "cross", "name": "x"})])
def test_a_broken_folder_is_one_clear_error(tmp_path, content):
    if content is not None:
        (tmp_path / "annotator.json").write_text(content)
    with pytest.raises(DataError, match=str(tmp_path)):
        CrossAnnotator.load(tmp_path)


def test_weights_that_are_gone_are_one_clear_error(trained, tmp_path):
    folder = trained[0].save(tmp_path / "cross")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="not whole"):
        CrossAnnotator.load(folder)


def test_what_is_no_annotator_is_not_replaced(untrained, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="no annotator"):
        untrained.save(tmp_path)
    with pytest.raises(DataError, match="no annotator"):    # before the training, not after it
        train_cross(pl.DataFrame(), pl.DataFrame(), tmp_path, BACKBONE, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
