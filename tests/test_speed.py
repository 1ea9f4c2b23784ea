"""The sides that are timed do the same work, and a measurement that was stopped goes on."""
import json
from functools import partial

import numpy as np
import polars as pl
import pytest
import torch

from mine_refine_nb import speed
from mine_refine_nb.data import load_data
from mine_refine_nb.losses import circle_loss, in_blocks, supcon_loss
from mine_refine_nb.market import simulate
from mine_refine_nb.speed import LOSSES, bench_peers, evaluation_speed, grade_of, in_turns, list_training, long_lists, loss_batch, mining_data, mining_speed, ratio, slope, training_side, write_esci


def test_sides_take_turns():
    order = []
    found = in_turns({name: partial(order.append, name) for name in ("a", "b")}, rounds=3)
    assert order == ["a", "b"] * 3 and {len(values) for values in found.values()} == {3}


def test_the_ratio_is_the_median_of_the_rounds():
    assert ratio({"slow": [2.0, 9.0, 40.0], "fast": [1.0, 3.0, 10.0]}, "slow", "fast") == 3.0


@pytest.mark.parametrize("kind", ["supcon", "circle"])
@pytest.mark.parametrize("side", ["ours", "ours in blocks"])
def test_both_libraries_compute_the_same(kind, side):
    queries, products, owner = loss_batch(48, 200, dim=16)
    value, theirs = (LOSSES[name](kind, queries, products, owner) for name in (side, "pytorch-metric-learning"))
    assert value.item() == pytest.approx(theirs.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(value, (queries, products)), torch.autograd.grad(theirs, (queries, products))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 7, 100])
@pytest.mark.parametrize("loss", [partial(supcon_loss, cumulative=True, unjudged="negative"), partial(supcon_loss, form="in"), circle_loss])
def test_blocks_are_the_whole(loss, rows):
    generator = torch.Generator().manual_seed(rows)
    q, p = (torch.nn.functional.normalize(torch.randn(n, 8, generator=generator, dtype=torch.double), dim=1).requires_grad_() for n in (9, 30))
    grades = torch.randint(-1, 3, (9, 30), generator=generator)
    grades[:4] = -1    # a block without anything to learn
    grades[4, grades[4] == 2] = 1    # a query without a positive
    whole, pieces = loss(q @ p.T, grades), in_blocks(loss, q, p, grades, rows)
    assert pieces.item() == pytest.approx(whole.item(), abs=1e-12)
    for a, b in zip(torch.autograd.grad(3 * whole, (q, p)), torch.autograd.grad(3 * pieces, (q, p))): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_blocks_refuse_what_does_not_fit():
    q, p = torch.randn(2, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match="must be"): in_blocks(circle_loss, q, p, torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="rows"): in_blocks(circle_loss, q, p, torch.zeros(2, 3, dtype=torch.long), rows=0)


def test_each_query_owns_its_products():
    _, _, owner = loss_batch(5, 23, dim=4)
    grades = grade_of(owner, 5)
    assert grades.sum(0).tolist() == [1] * 23 and all(grades[owner[i], i] == 1 for i in range(23))


def test_miners_find_the_same():
    found = mining_speed(1500, 60, dim=24, rounds=1)
    assert found["recall of theirs in ours"] > 0.999 and found["times faster"] > 0


def test_both_miners_find_the_same_where_some_products_lie_deep():
    found = mining_speed(1500, 60, dim=24, rounds=1, deep=0.5)
    assert found["recall of theirs in ours"] > 0.999


def test_deep_products_are_judged_and_far_from_their_query():
    data, emb = mining_data(3000, 40, 64, deep=0.5)
    assert data.judgments.select("query_id", "product_id").is_unique().all() and data.judgments.height == 160
    at = {product: row for row, product in enumerate(emb.product_ids)}
    last = data.judgments.group_by("query_id", maintain_order=True).agg(pl.col("product_id").last())["product_id"]
    scores = (emb.queries * emb.products[[at[product] for product in last]]).sum(1)
    assert scores[:20].max() < scores[20:].min()


def test_the_clock_can_be_chosen():
    ticks = iter(range(100))
    assert in_turns({"a": lambda: None, "b": lambda: None}, rounds=2, clock=lambda: next(ticks)) == {"a": [1, 1], "b": [1, 1]}


def test_alike_sides_differ_in_nothing_but_their_batches():
    peer, same, ours = training_side("CoSENT", "all-MiniLM-L6-v2", 0.5, 16), training_side("CoSENT", "all-MiniLM-L6-v2", 0.5, 16, alike=True), training_side("ours", "all-MiniLM-L6-v2", 0.5, 16)
    def state(model): return (model[0].model.config._attn_implementation, {part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)},
                              [weight.requires_grad for weight in model.parameters()])
    assert state(same) == state(ours) and state(peer)[2] == state(ours)[2] and state(peer)[:2] != state(ours)[:2]


def test_made_up_judgments_name_made_up_products():
    data, emb = mining_data(300, 20, 16, judged=4)
    assert data.judgments.height == 80 and data.judgments["product_id"].is_in(data.products["product_id"].implode()).all()
    assert np.allclose(np.linalg.norm(emb.products, axis=1), 1, atol=1e-5)


def test_training_counts_the_judged_pairs_of_its_batches(tmp_path):
    market = simulate(200, 24, ("en",), 0)
    _, pairs = list_training(minilm(), market, long_lists(market), 2, 4, 4, str(tmp_path))
    assert pairs >= 2 * 4 * 4 * 0.9    # four judged products of four queries, in two steps; shared products add to it


def minilm():
    from mine_refine_nb.encoder import load_backbone
    return load_backbone("all-MiniLM-L6-v2")


def test_the_made_up_folder_is_esci(tmp_path):
    write_esci(tmp_path, 3000, 2000)
    data = load_data(tmp_path)
    assert data.name and data.products.height == 2000 and 2500 < data.judgments.height <= 3000
    said = data.products["description"].str.count_matches(" ") + 1
    assert .9 < said.count() / data.products.height < 1 and set(said.drop_nulls()) == {110, 130}    # bullet points stand in for what has no description
    assert set(data.judgments["locale"]) == {"us", "jp", "es"} and set(data.judgments["split"]) == {"train", "validation", "test"}


def test_evaluation_runs_on_what_it_makes():
    assert 0 < evaluation_speed(20, 400, 16)["ndcg@10"] <= 1


def test_memory_of_now_is_below_the_peak():
    block = np.ones(30_000_000)    # .24 GB
    held = speed.peak_memory(now=True)
    del block
    assert 0 < speed.peak_memory(now=True) <= held - .2 and held <= speed.peak_memory() + .01


def test_slope_of_squares_is_two():
    assert slope([dict(size=n, seconds=3.0 * n**2) for n in (1, 10, 100)]) == pytest.approx(2)


def test_training_grows_by_its_steps(monkeypatch):
    asked = []
    monkeypatch.setattr(speed, "training_speed", lambda **how: asked.append(how) or {"ours pairs per second": 96.0, "CoSENT pairs per second": 24.0})
    assert speed.training_at(4) == {"size": 768, "seconds": 8.0, "theirs": 32.0}
    assert asked == [dict(steps=4, queries=12, products=16, rounds=1, frozen=None)] and all(hasattr(speed, f"{part}_at") for part in speed.GROWTH)


def test_a_stopped_measurement_goes_on(tmp_path, monkeypatch):
    calls = []
    def apart(call):
        calls.append(call)
        if call == "b()" and calls.count("b()") == 1: raise KeyboardInterrupt
        return {"call": call}
    monkeypatch.setattr(speed, "apart", apart)
    asked = dict(parts={"first": "a()", "second": "b()"}, sizes={}, reading=None)
    with pytest.raises(KeyboardInterrupt): bench_peers(tmp_path / "speed.json", **asked)
    assert json.loads((tmp_path / "speed.json").read_text()) == {"first": {"call": "a()"}, "processor": {"first": speed.processor()}}
    monkeypatch.setattr(speed, "processor", lambda: "another one")
    done = bench_peers(tmp_path / "speed.json", **asked)
    assert set(done) == {"first", "second", "processor"} and calls == ["a()", "b()", "b()"]
    assert list(done["processor"]) == ["first", "second"] and done["processor"]["first"] != done["processor"]["second"] == "another one"


def test_real_lists_are_trained_on_where_there_are_some(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(speed, "apart", lambda call: calls.append(call) or {})
    bench_peers(tmp_path / "speed.json", {}, {}, None, tmp_path / "shop")
    assert calls == [f"training_speed(speed.load_data({str(tmp_path / 'shop')!r}), frozen=None)"]
