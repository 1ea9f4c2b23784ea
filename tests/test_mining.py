"Mining against a slow, independent loop, and the promises of its report."
import hashlib
import os
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings, strategies as st

from mine_refine_nb.data import DataError, RelevanceData, normalise_query, query_groups, query_ids
from mine_refine_nb.encoder import Embeddings
from mine_refine_nb.market import build_market, true_grades
from mine_refine_nb.metrics import top_k
from mine_refine_nb.mining import (ROWS, Mined, apply_grades, build_index, coarse, exact_ranks, list_catalogue, load_log, mine, mine_log,
                                   rank_judged, recall_against_flat, relabel, search, search_all, shortlist, unjudged_queries)
from mine_refine_nb.shoppers import AskedRater, Rater, confusion
from mine_refine_nb.stage2 import with_mined

TEXT = dict.fromkeys(('product_id', 'title', 'category', 'brand', 'description', 'locale'), pl.String)
PAIRS = dict.fromkeys(('query_id', 'query', 'product_id', 'grade', 'locale', 'split'), pl.String) | dict(grade=pl.Int8)


def unit(x):
    x = np.asarray(x, dtype=np.float64)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def make(queries, products, judged, titles=None, locales=None, query_locales=None, split='train'):
    "Data and vectors from arrays; `judged` is a list of (query row, product row, grade)."
    titles = titles or [f'title {i}' for i in range(len(products))]
    locales, query_locales = locales or [None] * len(products), query_locales or [None] * len(queries)
    catalogue = pl.DataFrame([dict(product_id=f'p{i}', title=t, locale=where) for i, (t, where) in
                              enumerate(zip(titles, locales))], schema=TEXT)
    rows = [(f'q{q:03}', f'query {q}', f'p{p}', grade, query_locales[q], split) for q, p, grade in judged]
    pairs = pl.DataFrame(rows, schema=PAIRS, orient='row')
    data = RelevanceData(catalogue, pairs, name='made')
    emb = Embeddings([f'q{i:03}' for i in range(len(queries))], unit(queries), [f'p{i}' for i in range(len(products))],
                     unit(products))
    return emb, data


def random_case(seed, queries=5, products=30, dim=4, per=8, copies=0, coarse=False, locales=False):
    "A random shop; `copies` products share one vector, `coarse` vectors make many equal scores."
    rng = np.random.default_rng(seed)
    draw = (lambda shape: rng.integers(-1, 2, shape) + .5) if coarse else (lambda shape: rng.normal(size=shape))
    q, p = draw((queries, dim)), draw((products, dim))
    if copies: p[rng.choice(products, min(copies, products), False)] = q[0]
    judged = [(i, int(j), int(rng.integers(0, 3))) for i in range(queries)
              for j in rng.choice(products, min(per, products), False)]
    where = [['es', 'en', None][i] for i in rng.integers(0, 3, products)] if locales else None
    asked = [['es', 'en', 'ja', None][i] for i in rng.integers(0, 4, queries)] if locales else None
    titles = [f'title {i}' for i in rng.integers(0, max(2, products - 5), products)]   # some texts repeat
    return make(q, p, judged, titles, where, asked)


def slow(emb, data, depth, window, margin, per_query, boundaries):
    "Every definition again, as loops over sorted lists: {(query_id, product_id, kind): (rank, score)}."
    out, of = {}, data.products['locale'].to_list()
    grades = {}
    for row in data.judgments.iter_rows(named=True):
        grades.setdefault((row['query_id'], row['locale']), {})[int(row['product_id'][1:])] = row['grade']
    for (qid, locale), judged in grades.items():
        vector = emb.queries[emb.query_ids.index(qid)].astype(float)
        searched = [j for j in range(len(of)) if locale is None or of[j] in (None, locale)]
        score = {j: round(sum(float(a) * float(b) for a, b in zip(vector, emb.products[j])), 6) for j in searched}
        order = sorted(searched, key=lambda j: (-score[j], j))
        rank = {j: i + 1 for i, j in enumerate(order)}
        here = {j: g for j, g in judged.items() if j in rank}
        for b in boundaries:
            up, down = [j for j in here if here[j] >= b], [j for j in here if here[j] < b]
            for j in up:
                if rank[j] > len(up) or any(score[d] >= score[j] for d in down):
                    out[qid, f'p{j}', 'hard_positive'] = rank[j], score[j]
            for j in down:
                if rank[j] <= depth and any(score[u] <= score[j] for u in up):
                    out[qid, f'p{j}', 'hard_negative'] = rank[j], score[j]
        seen, kept = {data.products['title'][j] for j in judged}, 0
        best = max([score[j] for j in here if here[j] == 2], default=None)
        for j in order[window[0] - 1:window[1]]:
            title = data.products['title'][j]
            if j in judged or title in seen: continue
            seen.add(title)
            if margin is not None and best is not None and score[j] < best - margin: continue
            if kept < per_query:
                out[qid, f'p{j}', 'pending'] = rank[j], score[j]
                kept += 1
    return out


def as_dict(mined):
    rows = mined.rows.select('query_id', 'product_id', 'kind', 'rank', 'score').iter_rows()
    return {tuple(key): (rank, score) for *key, rank, score in rows}


def assert_same(mined, expected):
    got = as_dict(mined)
    assert len(got) == len(mined.rows) and got.keys() == expected.keys()
    for key, (rank, score) in expected.items():
        assert got[key][0] == rank and got[key][1] == pytest.approx(score, abs=1e-9)


def assert_mines(emb, data, **options):
    "Both ways of mining find what brute force finds; without counting, what is below the list may have no rank."
    expected = slow(emb, data, **options)
    counted, quick = mine(emb, data, **options, ranks=True), mine(emb, data, **options)
    assert_same(counted, expected)
    known = pl.col('rank') <= options['depth']
    assert quick.rows.drop('rank').sort('query_id', 'product_id', 'kind').equals(counted.rows.drop('rank').sort('query_id', 'product_id', 'kind'))
    assert quick.rows.filter(known).equals(counted.rows.filter(known)) and quick.rows.filter(kind='pending')['rank'].null_count() == 0
    assert quick.report.filters.equals(counted.report.filters)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0, 12),
       st.sampled_from([None, .0123, .4567]), st.sampled_from([(1,), (2,), (1, 2)]), st.integers(1, 60),
       st.integers(0, 5))
def test_equals_brute_force(seed, queries, products, coarse, locales, copies, margin, boundaries, depth, per_query):
    emb, data = random_case(seed, queries, products, coarse=coarse, locales=locales, copies=copies)
    options = dict(depth=depth, window=(min(2, depth), depth), margin=margin, per_query=per_query,
                   boundaries=boundaries)
    assert_mines(emb, data, **options)


@pytest.mark.parametrize('seed', range(8))
def test_equals_brute_force_with_every_option(seed):
    emb, data = random_case(seed, queries=12, products=120, per=10, locales=True, copies=10)
    options = dict(depth=60, window=(2, 50), margin=.3, per_query=12, boundaries=(1, 2))
    assert_mines(emb, data, **options)


def test_equals_brute_force_at_real_width():
    "Copies of one vector, far apart in a catalogue of 900: float32 products of them differ in the last digit."
    emb, data = random_case(1, queries=24, products=900, dim=96, per=20, copies=300, locales=True)
    options = dict(depth=60, window=(1, 40), margin=None, per_query=7, boundaries=(1, 2))
    assert_mines(emb, data, **options)


def test_several_positives_leave_a_full_list():
    "Positives at the top take no place from the pending: the window is filled from below them."
    p = np.stack([np.cos(np.arange(40) / 40), np.sin(np.arange(40) / 40)], axis=1)
    emb, data = make([[1, 0]], p, [(0, j, 2) for j in range(12)])
    rows = mine(emb, data, depth=40, window=(1, 40), per_query=20).rows
    assert rows['product_id'].to_list() == [f'p{j}' for j in range(12, 32)]
    assert rows['rank'].to_list() == list(range(13, 33))


def test_list_longer_than_the_catalogue():
    emb, data = random_case(3, queries=3, products=7, per=2)
    mined = mine(emb, data, depth=1000, window=(1, 1000), per_query=1000)
    assert mined.report.filters.filter(pl.col('kind') == 'pending')['left'][0] == 3 * 7
    assert mined.report.short['window'].to_list() == [7, 7, 7]
    assert 'fewer products than the window holds' in repr(mined.report)


@pytest.mark.parametrize('shift', [0, 5])
def test_equal_scores_stand_in_catalogue_order(shift):
    "A hundred copies of the best product: whatever FAISS keeps at its cut, the first rows of the catalogue are listed."
    p = np.tile([[1., 0.]], (100 + shift, 1))
    p[:shift] = [0., 1.]
    emb, data = make([[1, .2]], p, [(0, shift + 99, 2)])
    mined = mine(emb, data, depth=10, window=(1, 10), ranks=True)
    assert mined.rows.filter(kind='pending')['product_id'].to_list() == [f'p{j}' for j in range(shift, shift + 10)]
    assert mined.rows.filter(kind='hard_positive')['rank'].to_list() == [100]
    assert mined.rows.equals(mine(emb, data, depth=10, window=(1, 10), ranks=True).rows)
    assert mine(emb, data, depth=10, window=(1, 10)).rows.filter(kind='hard_positive')['rank'].to_list() == [None]


def test_an_equal_score_is_wrong_on_both_sides():
    emb, data = make([[1, 0]], [[1, 1], [1, 1], [0, 1]], [(0, 0, 2), (0, 1, 0), (0, 2, 0)])
    kinds = dict(mine(emb, data).rows.select('product_id', 'kind').iter_rows())
    assert kinds == dict(p0='hard_positive', p1='hard_negative')


def test_negative_scores():
    "All scores below zero: the order and the margin mean the same as above zero."
    p = [[-1, .5], [-1, .4], [-1, .3], [-1, .2], [-1, 0]]
    emb, data = make([[1, 0]], p, [(0, 1, 2), (0, 0, 0)])
    mined = mine(emb, data, margin=.03)
    assert (mined.rows['score'] < 0).all()
    kinds = dict(mined.rows.select('product_id', 'kind').iter_rows())
    assert kinds == dict(p0='hard_negative', p1='hard_positive', p2='pending')
    assert mined.report.filters.filter(reason='beyond margin')['removed'].to_list() == [2]


def test_grade_one_has_no_fixed_role():
    emb, data = make([[1, 0]], [[1, .1], [1, .2], [1, .3]], [(0, 0, 0), (0, 1, 1), (0, 2, 2)])
    one, both = mine(emb, data), mine(emb, data, boundaries=(1, 2))
    assert one.rows.filter(product_id='p1')['kind'].to_list() == ['hard_negative']
    assert both.rows.filter(product_id='p1')['kind'].to_list() == ['hard_negative', 'hard_positive']


def test_a_boundary_with_an_empty_side_says_nothing():
    "No grade 2 was judged: boundary 2 cannot call the 0 hard, and at boundary 1 it is in its place."
    emb, data = make([[1, 0]], [[1, .1], [1, .2]], [(0, 0, 1), (0, 1, 0)])
    assert len(mine(emb, data, boundaries=(1, 2)).rows) == 0
    reasons = mine(emb, data, boundaries=(2,)).report.filters
    assert reasons.filter(reason='nothing better judged')['removed'].to_list() == [2]


def test_margin_counts_from_the_best_relevant_product():
    "Not from a better scored product of grade 1; and a query without a relevant product keeps all."
    p = [[1, .1], [1, .2], [1, .3], [1, .6], [1, 2]]
    emb, data = make([[1, 0]] * 2, p, [(0, 0, 1), (0, 2, 2), (1, 0, 1)])
    pending = mine(emb, data, margin=.12).rows.filter(kind='pending')
    assert pending.filter(query_id='q000')['product_id'].to_list() == ['p1', 'p3']
    assert pending.filter(query_id='q001')['product_id'].to_list() == ['p1', 'p2', 'p3', 'p4']


def test_short_queries_are_those_with_one_too_few():
    emb, data = make([[1, 0]] * 2, [[1, i / 10] for i in range(5)], [(0, 0, 2), (1, 0, 2), (1, 1, 2)])
    report = mine(emb, data, per_query=4).report
    assert report.short.row(0)[3:] == (3, 5, 2, 0, 0) and len(report.short) == 1
    assert '1 of 2 queries have fewer than 4 pending candidates.' in repr(report)
    assert len(mine(emb, data, per_query=3).report.short) == 0


@pytest.mark.parametrize('depth,window,margin,advised', [
    (5, (1, 5), None, 'raise the end of `window`'), (20, (1, 20), .001, 'raise `margin`'),
    (50, (1, 50), None, 'fewer products')])
def test_the_report_names_the_setting_that_helps(depth, window, margin, advised):
    emb, data = make([[1, 0]], [[1, i / 10] for i in range(30)], [(0, i, 2) for i in range(3)])
    lines = repr(mine(emb, data, depth=depth, window=window, margin=margin, per_query=28).report).splitlines()[-2:]
    assert '1 of 1' in lines[0] and advised in lines[1]


@pytest.mark.parametrize('seed', range(6))
def test_counts_are_honest(seed):
    emb, data = random_case(seed, locales=True, copies=6, products=60)
    mined = mine(emb, data, depth=50, window=(3, 30), margin=.5, per_query=4, boundaries=(1, 2))
    catalogue = {where: len([o for o in data.products['locale'] if where is None or o in (None, where)])
                 for where in data.queries['locale'].unique()}
    grade = data.judgments['grade']
    candidates = dict(hard_positive=(grade >= 1).sum(), hard_negative=(grade < 2).sum(),
                      pending=sum(max(0, min(30, catalogue[where]) - 2) for where in data.queries['locale']))
    for kind, count in candidates.items():
        steps, kept = mined.report.filters.filter(kind=kind), len(mined.rows.filter(kind=kind))
        assert steps.row(0)[1:] == ('candidates', 0, count)
        assert steps['removed'].sum() + kept == count and steps['left'][-1] == kept
        assert (steps['left'] == count - steps['removed'].cum_sum()).all()
        scores = mined.report.scores.filter(kind=kind)
        assert scores['pairs'].sum() == kept
    found = mined.rows.filter(kind='pending').group_by('query_id').len()
    full = set(found.filter(pl.col('len') == 4)['query_id'])
    assert set(mined.report.short['query_id']) == set(data.queries['query_id']) - full
    assert dict(mined.report.short.select('query_id', 'found').iter_rows()) == {
        q: dict(found.iter_rows()).get(q, 0) for q in mined.report.short['query_id']}


@pytest.mark.parametrize('seed', range(4))
def test_unjudged_is_never_a_negative(seed):
    emb, data = random_case(seed, products=80)
    rows, keys = mine(emb, data, boundaries=(1, 2)).rows, ['query_id', 'product_id']
    pending = rows.filter(kind='pending')
    assert len(pending) and (pending['grade'] == -1).all() and pending['source'].is_null().all()
    assert len(pending.join(data.judgments, on=keys, how='semi')) == 0
    judged = rows.filter(pl.col('kind') != 'pending').join(data.judgments, on=keys, suffix='_true')
    assert len(judged) == len(rows) - len(pending)
    assert (judged['grade'] == judged['grade_true']).all() and (judged['source'] == 'made').all()


def test_same_text_is_asked_once():
    titles = ['case', 'case', 'hose', 'hose', 'reel']
    emb, data = make([[1, 0]], [[1, i / 10] for i in range(5)], [(0, 0, 2)], titles)
    mined = mine(emb, data)
    assert mined.rows.filter(kind='pending')['product_id'].to_list() == ['p2', 'p4']
    removed = dict(mined.report.filters.filter(kind='pending').select('reason', 'removed').iter_rows())
    assert removed['text of a judged product'] == removed['text of a better candidate'] == removed['judged'] == 1


def test_locales_search_their_own_catalogue():
    "A product without a locale is everybody's; a judged product of another locale has no rank; no product, no row."
    locales, asked = ['es', 'en', None, 'en'], ['es', 'ja', 'fr']
    p = [[1, .1], [1, .2], [1, .3], [1, .4]]
    judged = [(0, 0, 2), (0, 1, 0), (1, 2, 2)]
    emb, data = make([[1, 0]] * 3, p, [*judged, (2, 0, 2)], locales=locales, query_locales=asked)
    mined = mine(emb, data)
    assert as_dict(mined) == {('q000', 'p2', 'pending'): (2, pytest.approx(0.957826, abs=1e-6)),
                              ('q002', 'p2', 'pending'): (1, pytest.approx(0.957826, abs=1e-6))}
    outside = mined.report.filters.filter(reason='outside the catalogue')
    assert dict(outside.select('kind', 'removed').iter_rows()) == dict(hard_positive=1, hard_negative=1)
    emb, data = make([[1, 0]], [[1, .1]], [(0, 0, 2)], locales=['es'], query_locales=['en'])
    alone = mine(emb, data)
    assert len(alone.rows) == 0 and alone.rows.schema == ROWS and alone.report.short['window'].to_list() == [0]


def test_only_the_split_is_mined():
    emb, data = random_case(2, queries=4)
    side = pl.when(pl.col('query_id') == 'q001').then(pl.lit('test')).otherwise('split')
    data = replace(data, judgments=data.judgments.with_columns(split=side))
    assert set(mine(emb, data).rows['query_id']) == {'q000', 'q002', 'q003'}
    assert set(mine(emb, data, 'test').rows['query_id']) == {'q001'}
    some = Embeddings(emb.query_ids[1:2], emb.queries[1:2], emb.product_ids, emb.products)   # its queries suffice
    assert mine(some, data, 'test').rows.equals(mine(emb, data, 'test').rows)


def test_the_order_of_judgments_does_not_matter():
    emb, data = random_case(4, locales=True)
    shuffled = replace(data, judgments=data.judgments.sample(fraction=1, shuffle=True, seed=1))
    assert mine(emb, data).rows.equals(mine(emb, shuffled).rows)


@pytest.mark.parametrize('factory,parameters', [
    ('HNSW16', ''), ('IVF4,Flat', 'nprobe=2'), ('SQ8', ''), ('PCA8,Flat', '')])
def test_any_index_leaves_judged_pairs_and_scores_alone(factory, parameters):
    emb, data = random_case(5, queries=8, products=300, dim=16)
    true = mine(emb, data, boundaries=(1, 2))
    given = mine(emb, data, factory=factory, parameters=parameters, boundaries=(1, 2))
    assert true.rows.filter(pl.col('kind') != 'pending').equals(given.rows.filter(pl.col('kind') != 'pending'))
    both = true.rows.join(given.rows, on=['query_id', 'product_id', 'kind'])
    assert len(both.filter(kind='pending')) and (both['score'] == both['score_right']).all()
    assert given.rows.filter(kind='pending').group_by('query_id').len()['len'].max() == 10


def test_recall_against_flat():
    emb, data = random_case(6, queries=8, products=400, dim=16)
    few, more, flat = (recall_against_flat(emb, data, *bet, k=20)['recall'][0] for bet in
                       [('IVF8,Flat', 'nprobe=1'), ('IVF8,Flat', 'nprobe=8'), ('Flat', '')])
    assert few < .9 and more == flat == 1


def test_an_index_that_finds_too_few_shortens_the_list():
    "One cluster of four searched: its products, each once, and no row made up for the rest."
    emb, data = random_case(5, queries=8, products=40, dim=8)
    index = build_index(emb.products, 'IVF4,Flat', 'nprobe=1')
    rows, scores = search(index, emb.queries, emb.products, 40)
    assert (rows < 0).any() and (np.isnan(scores) == (rows < 0)).all()
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in rows)
    mined = mine(emb, data, factory='IVF4,Flat', parameters='nprobe=1', depth=40, window=(1, 40), per_query=40)
    assert sorted(mined.report.short['window']) == sorted((rows >= 0).sum(axis=1))


def test_search_agrees_with_the_metrics():
    emb, data = random_case(7, queries=6, products=500, dim=32, copies=40)
    rows, scores = search(build_index(emb.products), emb.queries, emb.products, 60)
    expected, values = top_k(emb.queries, emb.products, np.arange(500), 60)
    assert (rows == expected).mean() > .999 and np.allclose(scores, values, atol=2e-6)


def test_ranks_do_not_depend_on_blocks():
    emb, data = random_case(8, queries=130, products=50, copies=9)
    left, right = np.repeat(np.arange(130), 3), np.random.default_rng(0).integers(0, 50, 390)
    whole, parts = (exact_ranks(emb.queries, emb.products, left, right, block) for block in (8192, 7))
    assert (whole == parts).all() and whole.max() <= 50


def in_full(queries, products, k):
    "Every score in float64, sorted."
    steps = np.rint(queries.astype(float) @ products.astype(float).T * 1e6).astype(int)
    order = np.lexsort((np.broadcast_to(np.arange(len(products)), steps.shape), -steps), axis=1)[:, :k]
    return order, np.take_along_axis(steps, order, axis=1) / 1e6


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('size, dim, k', [(5000, 48, 7), (3001, 96, 40), (700, 384, 100), (60, 8, 100), (1, 4, 3)])
@pytest.mark.parametrize('common', [0, 3])
def test_the_fast_search_is_the_exact_one(dtype, size, dim, k, common):
    "Random shops, with copies, and (`common`) as encoders make them: all vectors near each other."
    rng = np.random.default_rng(size + common)
    shift = common * rng.normal(size=dim)
    products, queries = unit(rng.normal(size=(size, dim)) + shift), unit(rng.normal(size=(70, dim)) + shift)
    products[rng.choice(size, size // 10)] = products[0]
    queries[:2] = products[0], -products[0]
    rows, scores = search_all(queries, products, k, dtype)
    expected, values = in_full(queries, products, k)
    assert (rows == expected).all() and np.allclose(scores, values, atol=1e-9)


def test_fast_scores_rule_out_most_and_never_one_of_the_best():
    "The doubt is a bound: where every rounding goes against a product, it is still on the list."
    rng = np.random.default_rng(0)
    products, queries = unit(rng.normal(size=(20_000, 64))), unit(rng.normal(size=(8, 64)))
    right, moved = coarse(products, torch.bfloat16)
    left, turned = coarse(queries, torch.bfloat16)
    assert np.allclose(moved, np.linalg.norm(products - right.float().numpy(), axis=1), atol=1e-6)
    found = shortlist((left @ right.T).view(8, 16, -1), turned + 1.01 * moved.max() + 1e-5, 50)
    for row, best in zip(found, in_full(queries, products, 50)[0]):
        assert set(best) <= set(row) and len(set(row[row >= 0])) == (row >= 0).sum() < 1000


@pytest.mark.parametrize('boundary', [1, 2])
def test_a_product_below_the_list_is_counted_only_where_its_rank_matters(boundary):
    emb, data = random_case(14, queries=9, products=200, locales=True)
    deep, short = (rank_judged(emb, data, list_catalogue(emb, data, depth), boundary) for depth in (200, 5))
    assert rank_judged(emb, data).equals(deep)
    high = (pl.col('grade') >= boundary) | (pl.col('rank') <= 5)
    assert deep.filter(high).equals(short.filter(high)) and deep['score'].equals(short['score'])
    low = pl.col('grade') < boundary
    assert deep.filter(low)['rank'].max() > 5 >= short.filter(low)['rank'].max()
    assert short.filter(~low)['rank'].null_count() == short.filter(~low)['score'].null_count()


def test_a_list_with_too_few_places_is_counted_below():
    "Five relevant products and three places: the fifth is in its place at rank 5, which the list cannot tell."
    p = np.stack([np.cos(np.arange(40) / 40), np.sin(np.arange(40) / 40)], axis=1)
    emb, data = make([[1, 0]], p, [(0, j, 2) for j in (0, 1, 2, 3, 4)] + [(0, 30, 0)])
    assert mine(emb, data, depth=3, window=(1, 3)).rows.filter(kind='hard_positive').is_empty()
    emb, data = make([[1, 0]], p, [(0, j, 2) for j in (0, 1, 2, 3, 9)] + [(0, 30, 0)])
    taken = mine(emb, data, depth=3, window=(1, 3)).rows.filter(kind='hard_positive')
    assert taken.select('product_id', 'rank').rows() == [('p9', 10)]
    emb, data = make([[1, 0]], p, [(0, 0, 2), (0, 9, 2), (0, 7, 2), (0, 30, 0)])
    taken = mine(emb, data, depth=3, window=(1, 3)).rows.filter(kind='hard_positive')
    assert taken.select('product_id', 'rank').rows() == [('p7', None), ('p9', None)]    # by score


def test_the_same_rows_forever():
    "Rows of an earlier version, which searched with FAISS and counted every rank: mining must not change when it becomes faster."
    emb, data = random_case(15, queries=40, products=600, dim=24, per=12, copies=20, locales=True)
    rows = mine(emb, data, depth=60, window=(2, 40), margin=.5, per_query=8, boundaries=(1, 2), ranks=True).rows
    text = rows.select('query_id', 'product_id', 'kind', 'rank').write_csv()
    assert (len(rows), rows['rank'].max(), hashlib.sha1(text.encode()).hexdigest()[:16]) == (552, 583, 'd096297b5df460b6')


@pytest.mark.parametrize('change,message', [
    (dict(split='test'), "split 'test' of made has no judgments; the data holds train"),
    (dict(split='tset'), 'tset'),
    (dict(window=(0, 10)), 'ranks from 1'), (dict(window=(5, 3)), 'first before last'),
    (dict(window=(1, 50), depth=20), 'depth=20'),
    (dict(per_query=-1), 'per_query=-1'), (dict(boundaries=()), 'boundaries'), (dict(boundaries=(0, 3)), 'boundaries'),
    (dict(factory='Nonsense'), "'Nonsense'.*could not parse"),
    (dict(factory='IVF64,Flat'), r'over 30 vectors.*clusters \(64\)'),
    (dict(parameters='nprobe=3'), 'nprobe'),
])
def test_refuses(change, message):
    emb, data = random_case(9)
    with pytest.raises(ValueError, match=message): mine(emb, data, **change)


def test_refuses_vectors_of_other_data():
    emb, data = random_case(9)
    cases = [(replace(emb, product_ids=emb.product_ids[::-1]), 'in that order'),
             (replace(emb, products=emb.products * 3), 'normalise'),
             (replace(emb, query_ids=['x', *emb.query_ids[1:]]), "1 queries have no vector, the first is 'query 0'"),
             (replace(emb, queries=emb.queries * np.nan), 'NaN')]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message): mine(wrong, data)


def test_split_is_checked_before_vectors():
    emb, data = random_case(9)
    with pytest.raises(ValueError, match='no judgments at all'):
        mine(emb, replace(data, judgments=data.judgments.clear()))


def labels_of(mined, every=2, grade=2):
    pending = mined.rows.filter(kind='pending').gather_every(every)
    return pending.select('query_id', 'product_id', grade=pl.lit(grade, pl.Int8), source=pl.lit('annotator 1'))


def test_apply_grades_keeps_provenance():
    mined = mine(*random_case(10))
    labels = labels_of(mined)
    graded, keys = apply_grades(mined, labels), ['query_id', 'product_id']
    done = graded.rows.filter(kind='annotated')
    assert done.select(keys).sort(keys).equals(labels.select(keys).sort(keys))
    assert (done['grade'] == 2).all() and (done['source'] == 'annotator 1').all()
    rest = graded.rows.filter(pl.col('kind') != 'annotated')
    assert rest.equals(mined.rows.join(labels, on=keys, how='anti', maintain_order='left'))
    assert graded.rows.schema == mined.rows.schema == ROWS and len(graded.rows) == len(mined.rows)
    assert graded.report.scores.filter(kind='annotated')['pairs'].sum() == len(labels)
    assert graded.report.filters.equals(mined.report.filters)
    more = apply_grades(graded, labels_of(graded, every=1, grade=0))    # a second annotator takes the rest
    assert len(more.rows.filter(kind='pending')) == 0


def test_a_failed_label_stays_pending():
    mined = mine(*random_case(10))
    labels = labels_of(mined, every=1, grade=1)
    labels = labels.with_columns(grade=pl.Series([None, -1, *labels['grade'][2:]], dtype=pl.Int8))
    graded = apply_grades(mined, labels)
    left = graded.rows.filter(kind='pending')
    assert len(left) == 2 and (left['grade'] == -1).all() and left['source'].is_null().all()


def test_labels_that_are_refused():
    mined = mine(*random_case(10))
    labels = labels_of(mined)
    human = mined.rows.filter(kind='hard_negative').head(1).with_columns(grade=pl.lit(2, pl.Int8))
    for wrong, message in [
        (labels.drop('source'), 'missing: source'), (pl.concat([labels, labels[:1]]), 'several labels'),
        (labels.with_columns(grade=pl.lit(7)), 'none of'),
        (labels.with_columns(source=pl.lit(None, pl.String)), 'no source'),
        (human, 'never replaced'), (labels.with_columns(product_id=pl.lit('stranger')).head(1), 'not pending'),
    ]:
        with pytest.raises(ValueError, match=message): apply_grades(mined, wrong)


def test_save_and_load(tmp_path):
    mined = mine(*random_case(11, locales=True), margin=.3, per_query=4)
    again = Mined.load(mined.save(tmp_path / 'deep' / 'mined.parquet'))
    assert again.rows.equals(mined.rows) and again.rows.schema == mined.rows.schema
    for name in ('filters', 'short', 'scores'):
        assert getattr(again.report, name).equals(getattr(mined.report, name))
        assert getattr(again.report, name).schema == getattr(mined.report, name).schema
    assert again.report.settings == mined.report.settings and repr(again.report) == repr(mined.report)
    assert pl.read_parquet(tmp_path / 'deep' / 'mined.parquet').equals(mined.rows)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = mine(*random_case(11)).save(tmp_path / 'mined.parquet')
    before = path.read_bytes()
    def broken(*args): raise OSError('disk full')
    monkeypatch.setattr(os, 'replace', broken)
    with pytest.raises(OSError): mine(*random_case(12)).save(path)
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ['mined.parquet']


def test_other_files_are_refused(tmp_path):
    pl.DataFrame(dict(a=[1])).write_parquet(tmp_path / 'a.parquet')
    (tmp_path / 'b.parquet').write_text('not parquet at all')
    for name in ('a.parquet', 'b.parquet'):
        with pytest.raises(ValueError, match='not a file of mined samples'): Mined.load(tmp_path / name)
    with pytest.raises(FileNotFoundError): Mined.load(tmp_path / 'c.parquet')


def test_shows_itself_and_escapes():
    emb, data = random_case(13)
    data = replace(data, judgments=data.judgments.with_columns(query=pl.lit('<script>alert(1)</script>')))
    mined = mine(emb, data, per_query=1000, depth=1000, window=(1, 1000))
    page = mined._repr_html_()
    assert '<script>' not in page and '&lt;script&gt;' in page and 'text of a better candidate' in page
    assert 'widen' not in repr(mined.report) and '5 queries' in repr(mined)


# ---- queries that nobody judged ----

@pytest.fixture(scope='module')
def wide():
    "A market, a part of whose queries are judged; the others are its log."
    market = build_market(200, 120, ('en', 'es'), seed=4)
    known = market.data.queries['query_id'][::3].to_list()
    return market, replace(market.data, judgments=market.data.judgments.filter(pl.col('query_id').is_in(known)))


def test_a_log_keeps_what_is_new_and_gives_nothing_away(wide):
    market, data = wide
    held = data.queries.filter(pl.col('split') != 'train')
    nearly = held.with_columns(query=pl.col('query') + '!')
    log = unjudged_queries(data, pl.concat([market.data.queries, nearly, market.data.queries.with_columns(pl.col('query').str.to_uppercase())], how='diagonal'))
    assert len(log) > 20 and not set(log['query']) & {*data.queries['query'], *nearly['query']}
    assert set(log['query']) <= set(market.data.queries['query']) and not log.select('query', 'locale').is_duplicated().any()
    place = {query: i for i, query in enumerate(market.data.queries['query'])}
    assert [place[query] for query in log['query']] == sorted(place[query] for query in log['query'])
    assert log['query_id'].to_list() == query_ids(log).to_list()
    assert unjudged_queries(data, market.data.queries, 5).equals(log.head(5))
    query, twin = next((query, twin) for query, twin in ((query, ' '.join(reversed(query.split()))) for query in held['query'])
                       if normalise_query(twin) != normalise_query(query) and len(set(query_groups([query, twin]))) == 1)    # another form, the same words
    asked = pl.DataFrame({'query': ['something nobody asked', twin], 'locale': held.filter(query=query)['locale'][0]})
    assert unjudged_queries(data, asked)['query'].to_list() == ['something nobody asked']


def test_candidates_of_a_log_are_spread_over_the_window_and_graded(wide):
    market, data = wide
    log, rng = unjudged_queries(data, market.data.queries), np.random.default_rng(0)
    emb = Embeddings(log['query_id'].to_list(), unit(rng.normal(size=(len(log), 8))), data.products['product_id'].to_list(), unit(rng.normal(size=(200, 8))))
    mined = mine_log(emb, data, log, window=(1, 50), per_query=10)
    assert set(mined.rows['kind']) == {'pending'} and set(mined.rows['query_id']) == set(log['query_id'])
    ranks = mined.rows.group_by('query_id').agg(pl.col('rank').sort())['rank'].to_list()
    assert all(one == [1, 6, 12, 17, 23, 28, 34, 39, 45, 50] for one in ranks)    # no text of this market comes twice
    where = mined.rows.join(data.products.select('product_id', shop='locale'), on='product_id')
    assert (where['locale'] == where['shop']).all() and mined.report.settings['split'] == 'log'
    right = relabel(mined, data, AskedRater(market, Rater('right', confusion(0, 0))))
    assert (true_grades(market, right.rows) == right.rows['grade']).all()
    more = with_mined(data, right).judgments
    assert len(more) == len(data.judgments) + len(right.rows) and set(more.filter(pl.col('query_id').is_in(log['query_id'].to_list()))['split']) == {'train'}


def test_a_log_is_read_from_a_file(wide, tmp_path):
    _, data = wide
    file, asked = tmp_path / 'log.csv', pl.DataFrame(dict(query=['red bowl', ' ', '007'], locale=['en', 'en', 'es'], times=['9', '8', '7']))
    asked.write_csv(file)
    assert load_log(file, data).rows() == [('red bowl', 'en'), ('007', 'es')]
    asked.drop('locale').write_csv(file)
    with pytest.raises(DataError, match='log.csv has no column locale, and market has en, es'): load_log(file, data)
    assert load_log(file, replace(data, judgments=data.judgments.filter(locale='en')))['locale'].to_list() == ['en', 'en']
    asked.with_columns(locale=pl.lit('fr')).write_csv(file)
    with pytest.raises(DataError, match="the locale 'fr' of 'red bowl' is none of en, es"): load_log(file, data)
    with pytest.raises(DataError, match='is no file'): load_log(tmp_path / 'lgo.csv', data)
