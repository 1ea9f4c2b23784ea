"""What is remembered is the latest, bounded, of one locale, and counts as if it were in the batch."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mine_refine_nb.losses import supcon_loss
from mine_refine_nb.memory import Memory, Shelf, block, judged_table, load_memory, save_memory


def random_lists(rng, queries=12, products=20, locales=("us",)):
    places = [rng.choice(products, size=rng.integers(1, 6), replace=False).tolist() for _ in range(queries)]
    return dict(products=places, grades=[rng.integers(0, 3, len(one)).tolist() for one in places], locale=[locales[q % len(locales)] for q in range(queries)])


def unit(rng, n, dim=6):
    return torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(n, dim))), dim=1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_block_is_what_the_lists_say(seed):
    rng = np.random.default_rng(seed)
    lists = random_lists(rng)
    table = judged_table(lists)
    queries, products = rng.permutation(12)[:5], rng.permutation(table.shape[1])[:7]
    wanted = [[dict(zip(lists["products"][q], lists["grades"][q])).get(p, -1) for p in products.tolist()] for q in queries]
    assert block(table, torch.from_numpy(queries), torch.from_numpy(products)).tolist() == wanted


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), most=st.integers(1, 8))
def test_a_shelf_holds_the_latest_of_each_row(seed, most):
    rng, shelf, history = np.random.default_rng(seed), Shelf(most), []
    for step in range(5):
        rows = rng.permutation(10)[:3].tolist()
        shelf.put(torch.tensor(rows), torch.tensor([[float(step), float(row)] for row in rows]))
        history = [(row, at) for row, at in history if row not in rows] + [(row, step) for row in rows]
    assert list(zip(shelf.rows.tolist(), shelf.vectors[:, 0].tolist())) == history[-most:]
    assert shelf.vectors[:, 1].tolist() == shelf.rows.tolist() and not shelf.vectors.requires_grad


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_what_stands_still_is_one_large_batch(seed):
    "Loss and gradients of the fresh ones, in any order of batches, while the encoder does not change."
    rng = np.random.default_rng(seed)
    lists = random_lists(rng)
    table = judged_table(lists)
    queries, products, memory = unit(rng, 12), unit(rng, table.shape[1]), Memory(lists)
    for rows, columns in zip(np.split(rng.permutation(12), 3), np.array_split(rng.permutation(len(products)), 3)):
        fresh = [side[torch.from_numpy(own)].clone().requires_grad_() for side, own in ((queries, rows), (products, columns))]
        scores, grades = memory.widen(*fresh, torch.from_numpy(rows), torch.from_numpy(columns))
    whole = [side.clone().requires_grad_() for side in (queries, products)]
    value = supcon_loss(scores, grades, 0.1, unjudged="guarded")
    expected = supcon_loss(whole[0] @ whole[1].T, block(table, torch.arange(12), torch.arange(len(products))), 0.1, unjudged="guarded")
    assert value.item() == pytest.approx(expected.item())
    value.backward(), expected.backward()
    for one, every, own in zip(fresh, whole, (rows, columns)): assert torch.allclose(one.grad, every.grad[torch.from_numpy(own)], atol=1e-9)


def test_a_locale_remembers_its_own():
    rng = np.random.default_rng(0)
    memory = Memory(random_lists(rng, locales=("us", "jp")))
    size = [tuple(memory.widen(unit(rng, 2), unit(rng, 3), torch.tensor(rows), torch.tensor(columns))[0].shape) for rows, columns in
            (([0, 2], [0, 1, 2]), ([1, 3], [3, 4, 5]), ([4, 6], [6, 7, 0]))]
    assert size == [(2, 3), (2, 3), (4, 5)]    # product 0 was remembered and is fresh again


def test_memory_is_bounded_and_comes_back_from_a_file(tmp_path):
    rng = np.random.default_rng(1)
    lists = random_lists(rng)
    memory = Memory(lists, most=4)
    for rows in ([0, 1, 2], [3, 4, 5], [6, 7, 8]): memory.widen(unit(rng, 3), unit(rng, 3), torch.tensor(rows), torch.tensor(rows))
    save_memory(memory, tmp_path / "memory.pt")
    again, fresh = Memory(lists, most=4), (unit(rng, 2), unit(rng, 2), torch.tensor([9, 8]), torch.tensor([9, 10]))
    load_memory(again, tmp_path / "memory.pt")
    one, other = memory.widen(*fresh), again.widen(*fresh)
    assert one[0].shape == (2 + 3, 2 + 4) and all(torch.equal(a, b) for a, b in zip(one, other))
    single = [part.float() if part.is_floating_point() else part for part in fresh]    # of a machine with another number type
    load_memory(again, tmp_path / "memory.pt")
    scores, grades = again.widen(*single)
    assert scores.dtype == torch.float32 and torch.allclose(scores, one[0].float(), atol=1e-6) and torch.equal(grades, one[1])


def test_an_impossible_memory_is_refused():
    with pytest.raises(ValueError, match="memory=-1 must be 1 or more"): Memory(random_lists(np.random.default_rng(0)), most=-1)
