"Graded ranking metrics, separation and significance: by hand, against other libraries, and by slow obvious loops."
import json
from dataclasses import replace
from itertools import product as pairs_of

import ir_measures
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import P, R, nDCG
from scipy.stats import ks_2samp, kstest, permutation_test, rankdata
from sklearn.metrics import balanced_accuracy_score, f1_score, ndcg_score, roc_auc_score

from mine_refine_nb.data import make_data
from mine_refine_nb.encoder import Embeddings
from mine_refine_nb.metrics import (
    HEADLINE, auc_statistic, best_threshold, boundary_auc, boundary_draws, boundary_metrics, boundary_separation,
    cell_masses, cell_measures, compare, compare_separation, condensed_run, d_prime, difference_test, evaluate, holm,
    ks_distance, mean_statistic, overlap, pair_weights, pooled_statistic, quantile_gap, query_regret, rank_metrics,
    ranking_measures, running_sum, score_cells, separation, top_k, weighted_quantile)

EXPONENTIAL = {0: 0, 1: 1, 2: 3}


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def build(judged, catalogue, split='test'):
    "Data from (query, product_id, grade, locale) rows and {product_id: locale}."
    products = pl.DataFrame(dict(product_id=list(catalogue), title=[f'title of {p}' for p in catalogue],
                                 locale=list(catalogue.values())), schema_overrides=dict(locale=pl.String))
    rows = pl.DataFrame(judged, orient='row', schema=dict(query=pl.String, product_id=pl.String, grade=pl.Int64,
                                                          locale=pl.String))
    return make_data(products, rows.with_columns(split=pl.lit(split)), name='test')


def embeddings(data, seed=0, dim=6):
    rng = np.random.default_rng(seed)
    draw = lambda n: unit(rng.normal(size=(n, dim)))
    return Embeddings(query_ids=data.queries['query_id'].to_list(), queries=draw(len(data.queries)),
                      product_ids=data.products['product_id'].to_list(), products=draw(len(data.products)))


WORDS = ['usb cable', 'wedding shoes', 'folding umbrella', 'garden hose', 'running socks', 'desk lamp', 'baby monitor',
         'espresso machine', 'yoga mat', 'paper towels', 'winter gloves', 'phone case']


def toy(queries=8, judged=12, catalogue=60, seed=0):
    rng = np.random.default_rng(seed)
    ids = [f'p{i:03}' for i in rng.permutation(catalogue)]
    rows = [(WORDS[q], p, int(rng.integers(0, 3)), 'us') for q in range(queries)
            for p in rng.choice(ids, judged, replace=False)]
    return build(rows, dict.fromkeys(ids, 'us'))


quick = settings(deadline=None, max_examples=60)      # the first call of a library may be slow
brief = settings(deadline=None, max_examples=15)      # for whole tables


# ------------------------------------------------------------------------------------------ boundaries

def loop_auc(scores, grades, boundary):
    "Every pair of pairs, one by one."
    upper = [s for s, g in zip(scores, grades) if g >= boundary]
    lower = [s for s, g in zip(scores, grades) if 0 <= g < boundary]
    return np.mean([(u > low) + (u == low) / 2 for u, low in pairs_of(upper, lower)])


# few distinct scores, so that ties are common; always one pair at either end of the scale
pair = st.tuples(st.integers(-20, 20).map(lambda i: i / 20), st.integers(-1, 3))
graded = st.lists(pair, max_size=40).map(lambda rows: tuple(np.array(x) for x in zip(*rows, (.3, 3), (-.1, 0))))


@quick
@given(graded, st.integers(1, 3))
def test_auc_is_the_share_of_comparisons_won(sample, boundary):
    scores, grades = sample
    auc = boundary_auc(scores, grades, boundary)
    assert auc == pytest.approx(loop_auc(scores, grades, boundary))
    assert boundary_auc(-scores, grades, boundary) == pytest.approx(1 - auc)
    assert boundary_auc(np.exp(3 * scores) - 7, grades, boundary) == pytest.approx(auc)


@quick
@given(graded, st.integers(1, 3), st.integers(1, 60))
def test_overlap_is_a_share_and_symmetric(sample, boundary, bins):
    scores, grades = sample
    value = overlap(scores, grades, boundary, bins)
    assert 0 <= value <= 1 + 1e-12
    mirrored = np.where(grades < 0, -1, 3 - grades)                       # the upper side becomes the lower one
    assert overlap(scores, mirrored, 4 - boundary, bins) == pytest.approx(value)
    assert overlap(4 * scores + 8, grades, boundary, 1) == 1              # one bin sees no difference


@quick
@given(graded, st.integers(1, 3))
def test_overlap_is_zero_when_separated_and_one_when_equal(sample, boundary):
    scores, grades = sample
    assert overlap(scores + 3. * (grades >= boundary), grades, boundary) == 0   # a gap of 1 or more in a range below 6
    assert overlap(np.zeros_like(scores), grades, boundary) == 1


def test_overlap_by_hand():
    scores, grades = np.array([0, .1, .4, .6, .9, .1, .6, .6, .9, 1.]), np.array([0] * 5 + [2] * 5)
    # bins of width .25:     irrelevant 2 1 1 1 of 5, relevant 1 0 2 2 of 5
    assert overlap(scores, grades, 2, bins=4) == pytest.approx((1 + 0 + 1 + 1) / 5)


@quick
@given(graded, st.integers(1, 3))
def test_threshold_is_the_best_of_all_cuts(sample, boundary):
    scores, grades = sample
    found = best_threshold(scores, grades, boundary)
    judged = grades >= 0
    scores, upper = scores[judged], grades[judged] >= boundary
    best = max(balanced_accuracy_score(upper, scores >= cut) for cut in scores)
    assert found['bacc'] == pytest.approx(best)
    assert balanced_accuracy_score(upper, scores >= found['threshold']) == pytest.approx(best)
    assert f1_score(upper, scores >= found['threshold']) == pytest.approx(found['f1'])


def test_threshold_lies_halfway_in_the_gap():
    assert best_threshold([.1, .3, .7, .9, .99], [0, 0, 1, 2, -1], 1) == dict(threshold=.5, bacc=1, f1=1)


def test_unjudged_pairs_take_no_side():
    scores, grades = np.array([.9, .5, .1, .2, .8]), np.array([2, 1, 0, 0, 1])
    more = np.append(scores, [.95, .05]), np.append(grades, [-1, -1])
    assert boundary_metrics(*more) == boundary_metrics(scores, grades)
    treated_as_irrelevant = boundary_auc(more[0], np.maximum(more[1], 0), 2)
    assert treated_as_irrelevant != boundary_auc(*more, 2)


def test_an_empty_side_is_nan_and_any_number_of_levels_works():
    found = boundary_metrics([.1, .2, .3, .4], [0, 1, 2, 3], levels=5)
    assert [k for k in found if k.startswith('auc')] == ['auc_4', 'auc_3', 'auc_2', 'auc_1']
    assert np.isnan(found['auc_4']) and np.isnan(found['overlap_4']) and np.isnan(found['threshold_4'])
    assert found['auc_3'] == found['auc_1'] == 1


# ------------------------------------------------------------------------------------------ ranking

def test_ndcg_recall_precision_by_hand():
    qrels = {'q': dict(a=2, b=1, c=0, d=2, e=1)}
    got = rank_metrics({'q': ['b', 'z', 'a', 'c']}, qrels, ranking_measures(cutoff=3, recall_at=3)).row(0, named=True)
    log = np.log2(np.arange(2, 8))
    assert got['ndcg@3'] == pytest.approx((1 / log[0] + 3 / log[2]) / (3 / log[0] + 3 / log[1] + 1 / log[2]))
    assert got['ndcg@3_linear'] == pytest.approx((1 / log[0] + 2 / log[2]) / (2 / log[0] + 2 / log[1] + 1 / log[2]))
    assert (got['recall@3'], got['recall@3_ge1']) == (1 / 2, 2 / 4)
    assert (got['precision@3'], got['precision@3_ge1']) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


@quick
@given(st.permutations(range(15)), st.lists(st.integers(0, 2), min_size=12, max_size=12))
def test_ndcg_range_perfect_order_and_sklearn(order, grades):
    qrels = {'q': {f'p{i}': g for i, g in enumerate(grades)}}               # p12 to p14 are not judged
    gain = lambda p: EXPONENTIAL[qrels['q'].get(p, 0)]
    run = [f'p{i}' for i in order]
    got = rank_metrics({'q': run}, qrels, ranking_measures())
    if not any(grades):
        assert got['ndcg@10'][0] is None and got['recall@50_ge1'][0] is None
        return
    assert 0 <= got['ndcg@10'][0] <= 1 + 1e-12
    y_true, y_score = [[gain(p) for p in run]], [list(range(15, 0, -1))]
    assert got['ndcg@10'][0] == pytest.approx(ndcg_score(y_true, y_score, k=10))
    perfect = rank_metrics({'q': sorted(run, key=gain, reverse=True)}, qrels, ranking_measures())
    assert perfect['ndcg@10'][0] == perfect['ndcg@10_linear'][0] == pytest.approx(1)


def test_both_gains_in_one_call_do_not_mix():
    # an NDCG without a gain map can land in the pass of one with gains inside the library, in hash order
    qrels = {'q': dict(a=2, b=1)}
    got = rank_metrics({'q': ['b', 'a']}, qrels, ranking_measures(gains={0: 0, 1: 1, 2: 1000}))
    alone = rank_metrics({'q': ['b', 'a']}, qrels, {'linear': ranking_measures()['ndcg@10_linear']})
    assert got['ndcg@10_linear'][0] == alone['linear'][0] != got['ndcg@10'][0]


def test_gains_are_checked_and_more_levels_have_more_cuts():
    for bad in ({0: 0, 1: .1, 2: 1}, {0: 0, 2: 1}, {0: 0, 1: -1, 2: 1}, {0: 0, 1: 0, 2: 0}):
        with pytest.raises(ValueError, match='whole number'):
            ranking_measures(gains=bad)
    assert {'recall@50', 'recall@50_ge2', 'recall@50_ge1'} <= set(ranking_measures(levels=4))
    assert 'recall@50_ge3' not in ranking_measures(levels=4)


def test_evaluation_agrees_with_ir_measures_on_the_same_run():
    data = toy()
    found = evaluate(embeddings(data), data)
    qrels = data.judgments.select('query_id', pl.col('product_id').alias('doc_id'), pl.col('grade').alias('relevance'))
    for names, run in (('ndcg@10 recall@50 recall@50_ge1 precision@10', found.run),
                       ('ndcg@10_judged recall@10_judged recall@10_ge1_judged precision@10_judged', found.pairs)):
        measures = [nDCG(gains=EXPONENTIAL) @ 10, R(rel=2) @ (50 if run is found.run else 10),
                    R(rel=1) @ (50 if run is found.run else 10), P(rel=2) @ 10]
        scored = run.select('query_id', pl.col('product_id').alias('doc_id'), 'score')
        per_query = {q: {} for q in data.queries['query_id']}
        for m in ir_measures.iter_calc(measures, [ir_measures.Qrel(*r) for r in qrels.iter_rows()],
                                       [ir_measures.ScoredDoc(*r) for r in scored.iter_rows()]):
            per_query[m.query_id][measures.index(m.measure)] = m.value
        for i, name in enumerate(names.split()):
            theirs = [per_query[q][i] for q in found.per_query['query_id']]
            np.testing.assert_allclose(found.per_query[name].to_numpy(), theirs, atol=1e-9)
            assert found.values[name] == pytest.approx(np.mean(theirs))


# ------------------------------------------------------------------------------------------ search

@quick
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 40), st.sampled_from([1, 3, 7, 100]))
def test_top_k_is_the_sorted_matrix(seed, size, k, block):
    rng = np.random.default_rng(seed)
    products = rng.choice([-1., 0., .5, 1.], size=(size, 2)).astype(np.float32)      # many equal scores
    queries = rng.choice([-.5, 0., 1.], size=(3, 2)).astype(np.float32)
    rows = np.flatnonzero(rng.random(size) < .8) if size > 1 else np.arange(1)
    found, scores = top_k(queries, products, rows, k=k, block=block)
    for q, got, s in zip(queries, found, scores):
        want = sorted(rows, key=lambda row: (-float(q @ products[row]), row))[:k]
        assert got.tolist() == want
        np.testing.assert_allclose(s, products[want] @ q, atol=1e-6)


def test_float_noise_does_not_break_a_tie():
    products = np.float32([[.6, .8], [.6, .8], [1, 0]])
    products[1, 0] += 6e-8                                     # the last bit, as another machine might give it
    assert top_k(np.float32([[1, 0]]), products, np.arange(3), k=2)[0].tolist() == [[2, 0]]


def test_full_catalogue_by_brute_force_with_ties():
    data = toy(catalogue=150)
    emb = embeddings(data, dim=4)
    emb.products[10:40] = emb.products[50:80]                                  # thirty products twice
    found = evaluate(emb, data)
    grade = {(q, p): g for q, p, g in data.judgments['query_id', 'product_id', 'grade'].iter_rows()}
    for i, q in enumerate(emb.query_ids):
        scores = np.round((emb.products @ emb.queries[i]).astype(float), 6)
        want = [emb.product_ids[row] for row in np.lexsort([np.arange(150), -scores])[:100]]
        run = found.run.filter(pl.col('query_id') == q)
        assert run['product_id'].to_list() == want and run['rank'].to_list() == list(range(1, 101))
        assert run['grade'].to_list() == [grade.get((q, p), -1) for p in want]
        tops = [p for (query, p), g in grade.items() if query == q and g == 2]
        row = found.per_query.filter(pl.col('query_id') == q)
        assert row['recall@50'][0] == pytest.approx(len(set(tops) & set(want[:50])) / len(tops))
        assert row['precision@10'][0] == pytest.approx(len(set(tops) & set(want[:10])) / 10)


def test_a_query_searches_its_locale_and_a_small_catalogue_is_no_error():
    data = build([('desk lamp', 'u1', 2, 'us'), ('lampara', 'e1', 2, 'es')],
                 dict(u1='us', u2='us', e1='es', e2='es', both=None))
    run = evaluate(embeddings(data), data, min_judged=1).run
    searched = {q: set(run.filter(pl.col('query_id') == i)['product_id'])
                for i, q in data.queries['query_id', 'query'].iter_rows()}
    assert searched == {'desk lamp': {'u1', 'u2', 'both'}, 'lampara': {'e1', 'e2', 'both'}}


# ------------------------------------------------------------------------------------------ evaluation

def test_equal_scores_rank_in_catalogue_order_in_both_rankings():
    data = build([('desk lamp', p, g, 'us') for p, g in dict(a=2, z=0, m=1).items()], dict(z='us', m='us', a='us'))
    emb = embeddings(data, dim=2)
    emb.products[:] = emb.queries[:] = unit(np.array([[1, 2]]))
    found = evaluate(emb, data)
    assert found.run['product_id'].to_list() == ['z', 'm', 'a']
    by_hand = (1 / np.log2(3) + 3 / 2) / (3 + 1 / np.log2(3))
    assert found.values['ndcg@10'] == found.values['ndcg@10_judged'] == pytest.approx(by_hand)
    assert found.values['auc_2'] == .5 and found.values['overlap_2'] == 1


def test_an_unjudged_product_costs_the_full_ranking_and_not_the_condensed_one():
    data = build([('desk lamp', 'a', 2, 'us'), ('desk lamp', 'b', 0, 'us')], dict(a='us', b='us', unseen='us'))
    emb = embeddings(data, dim=2)
    emb.queries[:], emb.products[:] = [1, 0], unit(np.array([[.8, .6], [.1, 1], [1, 0]]))
    found = evaluate(emb, data, min_judged=2)
    assert found.values['ndcg@10'] == pytest.approx(1 / np.log2(3)) and found.values['ndcg@10_judged'] == 1
    assert found.run['grade'].to_list() == [-1, 2, 0]
    assert found.values['auc_2'] == 1 and found.pairs['score'].to_list() == pytest.approx([.8, .0995], abs=1e-4)


def test_a_query_without_positives_is_left_out_of_the_means_that_do_not_exist_for_it():
    grades = {'desk lamp': (2, 0), 'yoga mat': (0, 0), 'phone case': (1, 0)}
    data = build([(q, p, g, 'us') for q, both in grades.items() for p, g in zip('ab', both)], dict(a='us', b='us'))
    found = evaluate(embeddings(data), data, min_judged=2)
    rows = {r['query']: r for r in found.per_query.iter_rows(named=True)}
    assert rows['yoga mat']['ndcg@10'] is rows['yoga mat']['recall@50_ge1'] is None
    assert rows['yoga mat']['precision@10'] == 0
    assert rows['phone case']['recall@50'] is None and rows['phone case']['recall@50_ge1'] == 1
    assert found.values['recall@50'] == 1 and found.values['precision@10'] == pytest.approx(.1 / 3)
    assert found.values['ndcg@10'] == pytest.approx(np.mean([rows[q]['ndcg@10'] for q in ('desk lamp', 'phone case')]))


@pytest.fixture(scope='module')
def mixed():
    "Four us queries with 12 judgments, three us and two es queries with one or two."
    rng = np.random.default_rng(1)
    us, es = [f'u{i}' for i in range(40)], [f'e{i}' for i in range(10)]
    rows = [(WORDS[q], p, i % 3, 'us') for q in range(4) for i, p in enumerate(rng.choice(us, 12, replace=False))]
    rows += [(WORDS[q], us[q], 2, 'us') for q in range(4, 7)]
    rows += [(w, es[i], g, 'es') for w in ('zapatos de boda', 'paraguas') for i, g in ((0, 2), (1, 0))]
    data = build(rows, {p: 'us' if p[0] == 'u' else 'es' for p in us + es})
    return data, evaluate(embeddings(data), data)


def test_which_queries_count(mixed):
    data, found = mixed
    assert found.counts == dict(queries=4, judgments=48, min_judged=10)
    assert found.per_query['listed'].sum() == 4 and found.pairs['listed'].sum() == 48 and len(found.pairs) == 55
    us, es = found.per_locale['us'], found.per_locale['es']
    assert (us['queries'], us['judgments'], us['min_judged']) == (4, 48, 10)
    assert (es['queries'], es['judgments'], es['min_judged']) == (2, 4, 1)
    assert {k: us[k] for k in found.values} == found.values                    # only us has listed queries
    for k in (2, 1):
        everything = boundary_auc(found.pairs['score'], found.pairs['grade'], k)
        assert found.pairwise[f'auc_{k}'] == everything != found.values[f'auc_{k}']
    everybody = evaluate(embeddings(data), data, min_judged=99)
    assert everybody.counts == dict(queries=9, judgments=55, min_judged=1)
    assert everybody.values['auc_1'] == everybody.pairwise['auc_1'] == found.pairwise['auc_1']


def test_queries_without_locale_search_everything_and_are_reported_as_unknown():
    data = build([('desk lamp', 'a', 2, None), ('desk lamp', 'b', 0, None)], dict(a=None, b=None))
    found = evaluate(embeddings(data), data)
    assert list(found.per_locale) == ['unknown'] and found.per_locale['unknown']['queries'] == 1 and len(found.run) == 2


def test_metrics_json_is_complete_and_has_no_nan(mixed):
    data, found = mixed
    out = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert {*HEADLINE, 'ndcg@10_linear', 'recall@50_ge1', 'precision@10_ge1', 'threshold_2', 'threshold_1', 'bacc_2',
            'f1_1', 'per_locale', 'pairwise', 'definitions', 'queries'} <= set(out)
    assert out['definitions']['gains'] == {'0': 0, '1': 1, '2': 3}
    assert 'grade 2' in out['definitions']['recall_precision']
    assert found._repr_html_().count('<tr>') > len(found.values)               # shown whole, every locale beside it
    only_irrelevant = build([('desk lamp', 'a', 0, 'us')], dict(a='us'))
    bare = json.loads(json.dumps(evaluate(embeddings(only_irrelevant), only_irrelevant).to_dict(), allow_nan=False))
    assert bare['ndcg@10'] is bare['auc_2'] is bare['per_locale']['us']['threshold_1'] is None


def test_the_order_of_queries_does_not_matter(mixed):
    data, found = mixed
    emb = embeddings(data)
    turned = replace(emb, query_ids=emb.query_ids[::-1], queries=emb.queries[::-1])
    assert evaluate(turned, data).to_dict() == found.to_dict()


def test_vectors_that_do_not_belong_to_the_data_are_refused(mixed):
    data, _ = mixed
    emb = embeddings(data)
    with pytest.raises(ValueError, match='in that order'):
        evaluate(replace(emb, product_ids=emb.product_ids[::-1]), data)
    with pytest.raises(ValueError, match='2 queries of the split have no vector'):
        evaluate(replace(emb, query_ids=emb.query_ids[2:], queries=emb.queries[2:]), data)
    broken = emb.products.copy()
    broken[3] = np.nan
    with pytest.raises(ValueError, match='NaN or infinity, the first is row 3'):
        evaluate(replace(emb, products=broken), data)
    with pytest.raises(ValueError, match='no judgments'):
        evaluate(emb, data, split='validation')


# ------------------------------------------------------------------------------------------ comparison

@pytest.fixture(scope='module')
def two():
    data = toy(queries=12)
    return data, evaluate(embeddings(data, 1), data), evaluate(embeddings(data, 2), data)


def test_compare_shows_both_values_and_their_difference(two):
    _, a, b = two
    names = [*HEADLINE, 'recall@50_ge1', 'ndcg@10_linear_judged']
    table = compare(a, b, names, n=200)
    assert table.columns == ['metric', 'a', 'b', 'difference', 'low', 'high', 'p', 'p_corrected']
    for row in table.iter_rows(named=True):
        assert row['a'] == pytest.approx(a.values[row['metric']]) and row['b'] == pytest.approx(b.values[row['metric']])
        assert row['difference'] == pytest.approx(row['b'] - row['a'])
        assert row['low'] <= row['high'] and 0 < row['p'] <= row['p_corrected'] <= 1
    assert compare(a, b, names, n=200).equals(table)                          # seeded
    assert compare(b, a, ['auc_2'], n=200)['p'][0] == pytest.approx(compare(a, b, ['auc_2'], n=200)['p'][0], abs=.1)
    assert compare(a, a, n=50)['p'].to_list() == [1.] * len(HEADLINE)


def test_a_metric_that_does_not_exist_here_is_null_in_the_comparison():
    data = build([('desk lamp', 'a', 1, 'us'), ('desk lamp', 'b', 0, 'us')], dict(a='us', b='us'))
    a = evaluate(embeddings(data), data)
    row = compare(a, a, ['auc_2', 'auc_1'], n=20).row(0, named=True)
    assert row['a'] is row['p'] is row['low'] is row['p_corrected'] is None
    with pytest.raises(ValueError, match="no test for 'threshold_2'"):
        compare(a, a, ['threshold_2'])


def test_compare_refuses_different_queries_judgments_or_definitions(two):
    data, a, _ = two
    rows, catalogue = (data.judgments.sort('grade')['query', 'product_id', 'grade', 'locale'].rows(),
                       dict(data.products['product_id', 'locale'].iter_rows()))
    fewer = build([row for row in rows if row[0] != WORDS[3]], catalogue)
    with pytest.raises(ValueError, match='different queries: 1 only in a, 0 only in b'):
        compare(a, evaluate(embeddings(fewer), fewer))
    regraded = build([(*rows[0][:2], 2, 'us'), *rows[1:]], catalogue)
    with pytest.raises(ValueError, match='different judgments: 1 only in a, 1 only in b'):
        compare(a, evaluate(embeddings(regraded), regraded))
    with pytest.raises(ValueError, match='different definitions: gains'):
        compare(a, evaluate(embeddings(data), data, gains={0: 0, 1: 1, 2: 10}))
    larger = build(rows, catalogue | dict(extra='us'))
    with pytest.raises(ValueError, match='different definitions: products is 60 in a and 61 in b'):
        compare(a, evaluate(embeddings(larger), larger))


def test_running_sum_is_cumsum():
    x = np.random.default_rng(0).integers(0, 9, (131, 3)).astype(float)
    for n in (0, 1, 63, 64, 127, 128, 131):
        assert (running_sum(x[:n])[1:] == np.cumsum(x[:n], axis=0)).all() and not running_sum(x[:n])[0].any()


@pytest.mark.parametrize('kind', ['auc', 'overlap'])
def test_pooled_statistics_by_drawing_and_swapping_real_rows(two, kind):
    _, a, b = two
    rng, queries, n = np.random.default_rng(3), sorted(a.per_query['query_id']), 6
    counts, swaps = rng.integers(0, 3, (12, n)), rng.integers(0, 2, (12, n))
    # what makes two models' scores comparable: ranks for an AUC, the range for an overlap
    common = (lambda s: rankdata(s)) if kind == 'auc' else (lambda s: (s - s.min()) / np.ptp(s))
    tables = [e.pairs.with_columns(common=pl.Series(common(e.pairs['score'].to_numpy()))) for e in (a, b)]
    frames = [{q: t.filter(pl.col('query_id') == q) for q in queries} for t in tables]

    def measured(rows):
        scores, grades = (np.concatenate([r[c].to_numpy() for r in rows]) for c in ('common', 'grade'))
        if kind == 'auc':
            return boundary_auc(scores, grades, 1)
        at = np.minimum((scores * 50).astype(int), 49)
        shares = [np.bincount(at[side], minlength=50) / side.sum() for side in (grades >= 1, grades < 1)]
        return np.minimum(*shares).sum()

    statistic = pooled_statistic(kind, 1, a, b)
    drawn = statistic(np.concatenate([counts, 0 * counts]).astype(float))
    swapped = statistic(np.concatenate([1 - swaps, swaps]).astype(float))
    for i in range(n):
        taken = [frames[0][q] for q, c in zip(queries, counts[:, i]) for _ in range(c)]
        assert drawn[i] == pytest.approx(measured(taken))
        assert swapped[i] == pytest.approx(measured([frames[z][q] for q, z in zip(queries, swaps[:, i])]))


def test_weighted_auc_counts_ties_half():
    scores, upper = np.array([.5, .5, .5, .2, .9]), np.array([True, False, True, False, False])
    statistic = auc_statistic(scores, upper, np.zeros(5, dtype=int))
    assert statistic(np.ones((1, 1)))[0] == pytest.approx(loop_auc(scores, upper * 1, 1)) == (2 * (.5 + 1)) / 6


def test_auc_of_few_long_lists_and_of_many_short_ones():
    "The table of queries and the running sums over pairs agree to the last bit."
    rng = np.random.default_rng(0)
    scores, upper, pairs = rng.integers(0, 99, 300) / 99, rng.random(300) < .4, np.arange(300)
    weights = rng.integers(0, 4, (30, 8)).astype(float)
    by_table, by_sums = auc_statistic(scores, upper, pairs // 10), auc_statistic(scores, upper, pairs)
    assert (by_table(weights) == by_sums(weights[pairs // 10])).all()
    assert by_table(np.ones((30, 1)))[0] == pytest.approx(boundary_auc(scores, upper * 1, 1))


def test_p_value_agrees_with_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 11))
    swaps = np.array(list(np.ndindex(*(2,) * 11))).T                            # every swap there is
    mine = difference_test(mean_statistic(np.concatenate([a, b])), rng.multinomial(11, np.full(11, 1 / 11), size=2).T, swaps)
    theirs = permutation_test((a, b), lambda x, y, axis: np.mean(y - x, axis=axis), permutation_type='samples',
                              n_resamples=np.inf, vectorized=True)
    assert mine['difference'] == pytest.approx(theirs.statistic)
    assert (mine['p'] * (2**11 + 1) - 1) / 2**11 == pytest.approx(theirs.pvalue)


def test_one_query_has_no_interval():
    "However many copies of it there are, and if only one of several has the metric."
    alone = difference_test(mean_statistic(np.array([.2, .5])), np.ones((1, 99), dtype=int), np.zeros((1, 99)))
    assert alone["difference"] == pytest.approx(.3) and np.isnan([alone["low"], alone["high"], alone["p"]]).all()
    rng = np.random.default_rng(0)
    copies = np.repeat(rng.multinomial(1, [1.], size=99).T, 2, axis=0)
    assert np.isnan(difference_test(mean_statistic(np.array([.2, .4, .5, .7])), copies, copies)["p"])
    counts = rng.multinomial(3, np.full(3, 1 / 3), size=99).T
    assert np.isnan(difference_test(mean_statistic(np.array([np.nan, .2, np.nan, np.nan, .5, np.nan])), counts, np.zeros((3, 99)))["low"])
    same = difference_test(mean_statistic(np.array([.1, .2, .3] * 2)), counts, rng.integers(0, 2, (3, 99)))
    assert (same["low"], same["high"], same["p"]) == pytest.approx((0, 0, 1))


def simulate(times, queries=40, draws=199, effect=0., seed=0):
    "Difference tests of a metric whose per-query values share a query effect; b is better by `effect`."
    rng, out = np.random.default_rng(seed), []
    for _ in range(times):
        level = rng.normal(size=queries)
        a, b = level + rng.normal(size=queries), level + effect + rng.normal(size=queries)
        counts = rng.multinomial(queries, np.full(queries, 1 / queries), size=draws).T
        swaps = rng.integers(0, 2, (queries, draws))
        out.append(difference_test(mean_statistic(np.concatenate([a, b])), counts, swaps))
    return out


def test_p_is_uniform_when_nothing_differs_and_small_when_it_does():
    p = np.array([r['p'] for r in simulate(300)])
    assert kstest(p, 'uniform').pvalue > .01 and (p <= .05).mean() < .1
    assert np.mean([r['p'] <= .05 for r in simulate(50, effect=1.)]) > .9


def test_the_interval_covers_the_true_difference():
    covered = np.mean([r['low'] <= .3 <= r['high'] for r in simulate(300, effect=.3)])
    assert .89 <= covered <= .99


def pooled_difference(rng, queries=30, shift=0.):
    "An AUC test of two models with the same separation, of which b lives on another scale and drifts by query."
    grades, unit_of = np.tile([1, 1, 0, 0, 0, 0], queries), np.repeat(np.arange(queries), 6)
    scores = [grades * .8 + rng.normal(size=grades.size) + d * rng.normal(size=queries)[unit_of] for d in (0, shift)]
    common = np.concatenate([rankdata(scores[0]), rankdata(np.exp(scores[1]))])
    statistic = auc_statistic(common, np.tile(grades, 2) == 1, np.concatenate([unit_of, unit_of + queries]))
    counts = rng.multinomial(queries, np.full(queries, 1 / queries), size=99).T
    return difference_test(statistic, counts, rng.integers(0, 2, (queries, 99)))['p']


def test_pooled_p_is_uniform_across_scales_and_sees_a_drift():
    rng = np.random.default_rng(0)
    p = np.array([pooled_difference(rng) for _ in range(200)])
    assert kstest(p, 'uniform').pvalue > .01 and (p <= .05).mean() < .11
    assert np.mean([pooled_difference(rng, queries=80, shift=2.) <= .05 for _ in range(30)]) > .8


@quick
@given(st.lists(st.one_of(st.floats(0, 1), st.just(float('nan'))), max_size=8))
def test_holm_rejects_what_its_step_down_rule_rejects(p):
    corrected, n = holm(p), int(np.sum(~np.isnan(p)))
    for alpha in (.01, .05, .3):
        rejected, rank = set(), 0
        for i in sorted(np.flatnonzero(~np.isnan(p)), key=lambda i: p[i]):
            if p[i] * (n - rank) > alpha: break
            rejected.add(i)
            rank += 1
        assert {i for i in range(len(p)) if corrected[i] <= alpha} == rejected
    assert (np.isnan(corrected) == np.isnan(np.array(p, dtype=float))).all()


# ------------------------------------------------------------------------------------------ separation

POOLED = ['auc', 'overlap', 'ks', 'd_prime', 'gap', 'gap_sd', 'best_bacc', 'bacc_threshold', 'best_f1', 'f1_threshold']
UNITLESS = ['auc', 'ks', 'best_bacc', 'best_f1', 'bacc_one', 'bacc_own', 'bacc_regret', 'f1_one', 'f1_own', 'f1_regret']


def values_of(table, boundary=1):
    return {m: v for m, k, v in table['measure', 'boundary', 'value'].iter_rows() if k == boundary}


def scored(queries=12, judged=8, drift=0., seed=0, levels=3):
    "Pairs whose score follows the grade, plus noise, plus an offset of the query; to 3 digits: some tie."
    rng = np.random.default_rng(seed)
    q = np.repeat(np.arange(queries), judged)
    grade = rng.permuted(np.tile(np.arange(judged) % levels, (queries, 1)), axis=1).ravel()
    score = (.2 * grade + .2 * rng.normal(size=q.size) + drift * rng.normal(size=queries)[q]).round(3)
    return pl.DataFrame(dict(query_id=[f'q{i:03}' for i in q], product_id=[f'p{i:04}' for i in range(q.size)],
                             grade=grade.astype(np.int8), score=score))


@brief
@given(graded, st.integers(1, 3), st.integers(0, 10**6))
def test_a_weight_is_that_many_copies(sample, boundary, seed):
    scores, grades = sample
    copies = np.random.default_rng(seed).integers(0, 4, scores.size)
    copies[-2:] += 1                                                       # both sides stay
    mine = boundary_separation(scores, grades, boundary, copies)
    assert list(mine) == POOLED
    again = boundary_separation(np.repeat(scores, copies), np.repeat(grades, copies), boundary)
    assert mine == pytest.approx(again, nan_ok=True)


@brief
@given(graded, st.integers(1, 3), st.integers(0, 10**6))
def test_weighted_measures_against_sklearn_and_scipy(sample, boundary, seed):
    scores, grades = sample
    weights = np.random.default_rng(seed).random(scores.size) + .01
    s, up, w = scores[grades >= 0], grades[grades >= 0] >= boundary, weights[grades >= 0]
    got = boundary_separation(scores, grades, boundary, weights)
    assert got['auc'] == pytest.approx(roc_auc_score(up, s, sample_weight=w))
    assert got['best_bacc'] == pytest.approx(max(balanced_accuracy_score(up, s >= c, sample_weight=w) for c in s))
    assert got['best_f1'] == pytest.approx(max(f1_score(up, s >= c, sample_weight=w) for c in s))
    assert got['best_f1'] == pytest.approx(f1_score(up, s >= got['f1_threshold'], sample_weight=w))
    with np.errstate(divide='ignore'):                                # of scipy's p-value where a side has one pair
        theirs = ks_2samp(s[up], s[~up], method='asymp').statistic
    assert ks_distance(scores, grades, boundary) == pytest.approx(theirs)
    for q in (.1, .5, .9):
        assert weighted_quantile(s, w, q) == np.quantile(s, q, weights=w, method='inverted_cdf')


@brief
@given(graded, st.integers(1, 3))
def test_what_a_change_of_scale_leaves_alone(sample, boundary):
    scores, grades = sample
    maps = scores, np.exp(2 * scores), 5 * scores + 3
    plain, bent, stretched = (boundary_separation(x, grades, boundary) for x in maps)
    for m in ('auc', 'ks', 'best_bacc', 'best_f1'):
        assert bent[m] == pytest.approx(plain[m])
    for m in ('auc', 'ks', 'd_prime', 'gap_sd', 'best_bacc', 'best_f1'):
        assert stretched[m] == pytest.approx(plain[m], nan_ok=True)
    assert stretched['gap'] == pytest.approx(5 * plain['gap'])
    assert plain['best_bacc'] <= (1 + plain['ks']) / 2 + 1e-12             # KS looks at both directions


def test_gap_and_d_prime_by_hand():
    scores, grades = np.array([.05, .1, .2, .3, .4, .5, .3, .6, .7, .8]), np.array([0] * 6 + [2] * 4)
    # 90% of six is reached at the sixth: .5; 10% of four at the first: .3
    assert quantile_gap(scores, grades, 2) == pytest.approx(.3 - .5)
    assert quantile_gap(scores, grades, 2, tail=.4) == pytest.approx(.6 - .3)
    high, low = scores[6:], scores[:6]
    width = np.sqrt((high.var() + low.var()) / 2)
    assert d_prime(scores, grades, 2) == pytest.approx((high.mean() - low.mean()) / width)
    assert np.isnan(d_prime([.3, .3, .3], [0, 2, 2], 2)) and np.isnan(d_prime([.3], [2], 2))


@brief
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from(['query', 'cell', 'pair']))
def test_one_and_own_by_trying_every_cut(seed, queries, weights):
    rng = np.random.default_rng(seed)
    pairs = pl.concat(scored(1, int(rng.integers(2, 7)), seed=seed + q).with_columns(
        query_id=pl.lit(f'q{q}'), score=pl.col('score').round(1)) for q in range(queries))
    parts = pairs.partition_by('query_id', maintain_order=True)
    lists = [(p['score'].to_numpy(), p['grade'].to_numpy() >= 1) for p in parts]
    mass = [dict(query=1, cell=min(len(u), 3), pair=len(u))[weights] for _, u in lists]
    table = query_regret(pairs, 1, weights=weights)
    assert table['weight'].to_list() == pytest.approx(mass)
    for name, quality in dict(bacc=balanced_accuracy_score, f1=f1_score).items():
        own = [max(quality(u, s >= c) for c in s) for s, u in lists]
        at = [[quality(u, s >= c) for s, u in lists] for c in pairs['score'].unique()]
        assert table[f'{name}_own'].to_list() == pytest.approx(own)
        best = max(np.average(x, weights=mass) for x in at)
        assert np.average(table[f'{name}_one'], weights=mass) == pytest.approx(best)
        assert any(table[f'{name}_one'].to_list() == pytest.approx(x) for x in at)


def test_regret_by_hand_and_null_where_a_side_is_empty():
    rows = [('a', .9, 2), ('a', .8, 0), ('b', .5, 1), ('b', .4, 0), ('c', .7, 2), ('d', .1, 0)]
    pairs = pl.DataFrame(rows, schema=['query_id', 'score', 'grade'], orient='row').with_columns(product_id=pl.lit('p'))
    table = query_regret(pairs, 1)
    # a cut at .9 parts a and keeps nothing of b, one at .5 parts b and keeps all of a: 3/4 either way, the higher wins
    assert table['bacc_one'].to_list() == [1, .5, None, None] and table['bacc_own'].to_list() == [1, 1, None, None]
    assert table['bacc_regret'].to_list() == [0, .5, None, None]
    assert values_of(separation(pairs, draws=20))['bacc_regret'] == .25
    assert values_of(separation(pairs, draws=20))['f1_own'] == 1
    assert table['f1_one'].to_list() == pytest.approx([2 / 3, 1, None, None])     # .5: a keeps one wrong, b is right


def test_luck_is_all_of_the_regret_without_drift_and_little_of_it_with():
    calm, restless = (values_of(separation(scored(150, 6, drift), draws=2)) for drift in (0., .5))
    assert calm['bacc_regret'] > .08 and abs(calm['bacc_regret_net']) < .02
    assert restless['bacc_regret_net'] > .1 and abs(calm['f1_regret_net']) < .02 < restless['f1_regret_net']


@brief
@given(st.integers(0, 10**6))
def test_an_offset_per_query_leaves_the_ranking_and_costs_the_separation(seed):
    calm = scored(30, 9, seed=seed)
    lifts = np.random.default_rng(seed).normal(0, .5, 30).round(3)
    lift = dict(zip(calm['query_id'].unique(maintain_order=True), lifts))
    shifted = calm.with_columns(score=(pl.col('score') + pl.col('query_id').replace_strict(lift)).round(3))
    order = lambda p: condensed_run(p, calm['product_id'].to_list())
    assert order(calm) == order(shifted)
    before, after = (values_of(separation(p, draws=1)) for p in (calm, shifted))
    assert after['bacc_own'] == pytest.approx(before['bacc_own']) and after['f1_own'] == pytest.approx(before['f1_own'])
    for m in ('auc', 'ks', 'd_prime', 'gap_sd', 'best_bacc', 'bacc_one'):
        assert after[m] < before[m]
    assert after['bacc_regret_net'] > before['bacc_regret_net']


@brief
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_repeating_the_judgments_of_a_query_changes_nothing_where_queries_weigh_one(seed, times):
    pairs = scored(6, 7, .2, seed)
    again = pl.concat([pairs, *[pairs.filter(query_id='q002')] * (times - 1)])
    for weights in ('query', 'cell'):
        one, more = (values_of(separation(p, weights=weights, draws=1)) for p in (pairs, again))
        names = [m for m in one if not m.endswith(('luck', 'net'))]        # those are dealt from the pairs
        assert {m: one[m] for m in names} == pytest.approx({m: more[m] for m in names})
    one, more = (values_of(separation(p, weights='pair', draws=1)) for p in (pairs, again))
    assert one['d_prime'] != more['d_prime']


def test_pair_weights_give_the_numbers_of_the_evaluation(mixed):
    _, found = mixed
    for pairs, theirs in ((found.pairs, found.pairwise), (found.pairs.filter('listed'), found.values)):
        table = separation(pairs, weights='pair', draws=5)
        assert table.columns == ['measure', 'boundary', 'value', 'low', 'high'] and set(table['boundary']) == {1, 2}
        for k in (2, 1):
            mine = values_of(table, k)
            assert [mine[m] for m in ('auc', 'overlap', 'best_bacc', 'bacc_threshold')] == [
                theirs[f'{m}_{k}'] for m in ('auc', 'overlap', 'bacc', 'threshold')]


def test_draws_are_real_draws_of_queries():
    pairs = scored(9, 7, .2).sort('query_id', 'product_id').with_columns(
        unit=pl.col('query_id').rank('dense').cast(pl.Int64) - 1)
    counts = np.random.default_rng(0).multinomial(9, np.full(9, 1 / 9), size=8).T
    for weights in ('query', 'cell', 'pair'):
        values, drawn = boundary_draws(pairs, 1, counts, weights)
        table = query_regret(pairs, 1, weights=weights)
        for i in range(8):
            mass = pair_weights(pairs, weights) * counts[pairs['unit'], i]
            exact = boundary_separation(pairs['score'], pairs['grade'], 1, mass)
            for row, name in enumerate(values):
                if name in ('overlap', 'bacc_threshold', 'f1_threshold'): continue              # bins and cuts stay put
                mean = lambda: np.average(table[name], weights=counts[:, i] * table['weight'])
                assert drawn[row, i] == pytest.approx(exact[name] if name in exact else mean()), name
        as_it_is = boundary_draws(pairs, 1, np.ones((9, 1), int), weights)[1][:, 0]
        assert as_it_is == pytest.approx(list(values.values()))


def test_cells_cost_next_to_nothing():
    rng = np.random.default_rng(0)
    upper = rng.random(30_000) < .3
    scores = upper + rng.normal(size=upper.size)
    scores[:3000] = .123                                                   # a large tie stays in one cell
    at, x = score_cells(scores, 1000)
    assert len(x) <= 1000 and (np.diff(x) > 0).all() and len(set(at[:3000])) == 1 and np.bincount(at).max() < 3100
    lower, higher = cell_masses(at, upper, np.zeros(upper.size, int), np.ones(upper.size))(np.ones((1, 1)))
    found, exact = cell_measures(higher, lower, x), boundary_separation(scores, upper * 1, 1)
    for name in found:
        assert found[name][0] == pytest.approx(exact[name], abs=.03 if name.endswith('threshold') else 3e-3), name


def test_the_interval_of_a_pooled_auc_covers_it():
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        unit, upper = np.repeat(np.arange(40), 6), np.tile([0, 1] * 3, 40)
        score = rng.normal(size=240) + rng.normal(size=40)[unit]           # no separation at all: AUC 1/2
        at, x = score_cells(score)
        counts = rng.multinomial(40, np.full(40, 1 / 40), size=200).T.astype(float)
        lower, higher = cell_masses(at, upper == 1, unit, np.ones(240))(counts)
        low, high = np.quantile(cell_measures(higher, lower, x)['auc'], [.025, .975])
        covered += low <= .5 <= high
    assert 88 <= covered <= 99


def test_the_mirrored_interval_of_an_optimum_covers_more_than_the_percentiles_would():
    made = lambda rng, n: (rng.normal(size=8 * n) + np.tile([0, 1] * 4, n) * 1., np.repeat(np.arange(n), 8))
    true = ks_distance(made(np.random.default_rng(9), 30_000)[0], np.tile([0, 1] * 4, 30_000), 1)
    covered = np.zeros(2)
    for seed in range(60):
        score, unit = made(np.random.default_rng(seed), 25)
        pairs = pl.DataFrame(dict(query_id=unit, product_id=np.arange(200), grade=np.tile([0, 1] * 4, 25), score=score))
        value, low, high = separation(pairs, levels=2, draws=100).filter(measure='ks').row(0)[2:]
        covered += low <= true <= high, 2 * value - high <= true <= 2 * value - low
    assert covered[0] >= 48 > covered[1]


def test_what_cannot_be_measured_is_null():
    pairs = scored(5, 6).with_columns(grade=pl.col('grade').clip(0, 1))
    table = separation(pairs, draws=30)
    assert table.filter(boundary=2).select('value', 'low', 'high').null_count().row(0) == (20, 20, 20)
    assert table.filter(boundary=1).null_count().row(0) == (0, 0, 0, 0, 0)
    alone = separation(scored(1, 6), draws=30)
    assert alone['value'].null_count() == 0 and alone['low'].null_count() == alone['high'].null_count() == len(alone)
    assert separation(pairs, draws=0).null_count().row(0) == (0, 0, 20, 40, 40)
    flat = values_of(separation(pairs.with_columns(score=.5), draws=30))
    assert flat['d_prime'] is flat['gap_sd'] is None
    assert (flat['auc'], flat['ks'], flat['gap'], flat['best_bacc']) == (.5, 0, 0, .5)
    one_side_each = separation(scored(6, 1).with_columns(grade=pl.Series([0, 0, 0, 2, 2, 2])), draws=30)
    found = values_of(one_side_each)
    assert found['bacc_regret'] is found['f1_regret_net'] is None and found['auc'] is not None
    assert one_side_each.filter(measure='auc', boundary=1).null_count().sum_horizontal()[0] == 0


def test_separation_says_what_is_wrong():
    pairs = scored(3, 4)
    broken = pairs.with_columns(score=pl.when(pl.col('product_id') == 'p0005').then(float('nan')).otherwise('score'))
    with pytest.raises(ValueError, match='1 pairs have a score that is .*, the first is query q001, product p0005'):
        separation(broken)
    with pytest.raises(ValueError, match='3 pairs have a grade outside 0 to 1, the first is query q000'):
        separation(pairs, levels=2)
    with pytest.raises(ValueError, match='no column grade, score'):
        separation(pairs.drop('grade', 'score'))
    with pytest.raises(ValueError, match='no judged pairs'):
        separation(pairs.with_columns(grade=pl.lit(-1)))
    with pytest.raises(ValueError, match="weights='pairs': choose from 'query', 'cell', 'pair'"):
        separation(pairs, weights='pairs')
    with pytest.raises(ValueError, match='NaN or infinite, the first in row 1'):
        boundary_auc([.1, np.inf, .3], [0, 1, 1], 1)
    with pytest.raises(ValueError, match='3 scores, 2 grades'):
        boundary_auc([.1, .2, .3], [0, 1], 1)
    with pytest.raises(ValueError, match='not negative'):
        d_prime([.1, .2], [0, 1], 1, [1, -1])


def test_separation_is_seeded_and_ignores_unjudged_pairs_and_the_order_of_rows():
    pairs = scored(8, 6, .1)
    more = pl.concat([pairs, pairs.with_columns(grade=pl.lit(-1, pl.Int8), score=.99)])
    more = more.sample(fraction=1, shuffle=True, seed=3)
    table = separation(pairs, draws=50, seed=1)
    assert separation(more, draws=50, seed=1).equals(table)
    assert not separation(pairs, draws=50, seed=2)['low'].equals(table['low'])
    wide, narrow = (separation(pairs, draws=200, level=x).filter(measure='auc')['high'][0] for x in (.99, .5))
    assert narrow < wide
    assert separation(scored(8, 6, levels=4), levels=4, draws=2)['boundary'].unique().sort().to_list() == [1, 2, 3]


def test_two_models_on_the_same_pairs():
    a, b = scored(40, 6, .0), scored(40, 6, .3)
    table = compare_separation(a, b, draws=200)
    alone = separation(a, draws=200), separation(b, draws=200)
    assert table.columns == ['measure', 'boundary', 'a', 'b', 'difference', 'low', 'high']
    assert table['a'].equals(alone[0]['value'].alias('a')) and table['b'].equals(alone[1]['value'].alias('b'))
    row = table.filter(measure='auc', boundary=1).row(0, named=True)
    assert row['low'] < row['difference'] < row['high'] < 0
    same = compare_separation(a, a.sample(fraction=1, shuffle=True, seed=0), draws=50)
    assert not any(same.select(pl.col('difference', 'low', 'high').abs().max()).row(0))
    near = a.with_columns(score=(pl.col('score') + .02 * np.random.default_rng(0).normal(size=len(a))).round(4))
    paired = compare_separation(a, near, draws=200).filter(measure='auc', boundary=1)
    width = lambda t: (t['high'] - t['low'])[0]
    assert width(paired) < width(alone[0].filter(measure='auc', boundary=1)) / 2    # the same queries for both
    regraded = pl.when(pl.col('product_id') == 'p0003').then((pl.col('grade') + 1) % 3).otherwise('grade').cast(pl.Int8)
    with pytest.raises(ValueError, match='1 only in a, 1 only in b, of 240 and 240'):
        compare_separation(a, b.with_columns(grade=regraded))
