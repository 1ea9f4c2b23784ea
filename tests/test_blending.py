"Words, pools, blends and empty answers: by hand, against the formula, and against `metrics.evaluate`."
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from mine_refine_nb.blending import (
    METHODS, Blend, WordIndex, answers, blend_table, blends, evaluate_scores, fit_blend, keep_above, pool,
    ranked, score_words, search_words, words_of)
from mine_refine_nb.data import make_data, product_text
from mine_refine_nb.encoder import Embeddings
from mine_refine_nb.market import simulate
from mine_refine_nb.metrics import HEADLINE, evaluate, evaluate_run


@pytest.fixture(scope='module')
def market():
    return simulate(products=240, queries=60, seed=0)


@pytest.fixture(scope='module')
def vectors(market):
    "A stand-in for an encoder: judged pairs look alike by grade, the rest is noise."
    rng = np.random.default_rng(0)
    def unit(x): return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    queries, products = rng.normal(size=(len(market.queries), 48)), rng.normal(size=(len(market.products), 48))
    row = {p: i for i, p in enumerate(market.products['product_id'])}
    place = {q: i for i, q in enumerate(market.queries['query_id'])}
    for query, product, grade in market.judgments.select('query_id', 'product_id', 'grade').iter_rows():
        products[row[product]] += .12 * grade * queries[place[query]]
    return Embeddings(list(place), unit(queries), list(row), unit(products))


@pytest.fixture(scope='module')
def index(market): return WordIndex(market)


@pytest.fixture(scope='module')
def learn(vectors, index): return pool(vectors, index, 'validation')


@pytest.fixture(scope='module')
def test_pool(vectors, index): return pool(vectors, index, 'test')


def bm25_by_hand(query, texts, k1=1.5, b=.75):
    "The share of the possible BM25 score of every text, from the formula."
    docs = [words_of(text) for text in texts]
    mean, out, most = np.mean([len(d) for d in docs]), np.zeros(len(docs)), 0
    for word in words_of(query):
        df = sum(word in d for d in docs)
        idf = np.log(1 + (len(docs) - df + .5) / (df + .5))
        tf = np.array([d.count(word) for d in docs])
        out += idf * tf / (tf + k1 * (1 - b + b * np.array([len(d) for d in docs]) / mean))
        most += idf
    return out / most


def test_words_of_three_languages():
    assert words_of('Sartén de ACERO, 28cm') == ['sarten', 'de', 'acero', '28cm']
    assert words_of('pots') == words_of('Pot!') == ['pot'] and words_of('gas') == ['gas']
    assert words_of('鉄鍋') == ['鉄', '鍋', '鉄鍋'] and words_of('鍋') == ['鍋']
    assert words_of('IH対応 鍋') == ['ih', '対', '応', '対応', '鍋']
    assert 'ガラ' in words_of('ガラス') and words_of('ｶﾞﾗｽ') == words_of('ガラス') != words_of('カラス')    # the mark is part of the letter
    assert words_of('хлеб 빵집') == ['хлеб', *words_of('빵집')] and words_of('?!') == words_of('?!')


def test_scores_are_the_formula(market, index):
    for locale in ('en', 'es', 'ja'):
        shop = market.products.filter(locale=locale)
        for query in market.queries.filter(locale=locale)['query'].to_list()[:4]:
            rows, scores = index.scores(query, locale)
            assert market.products['locale'][rows].unique().to_list() == [locale]
            assert scores == pytest.approx(bm25_by_hand(query, product_text(shop)), abs=2e-6)


def test_an_unknown_word_lowers_the_share_and_keeps_the_order(index, market):
    query, locale = market.products.row(0, named=True)['title'], market.products['locale'][0]
    (_, plain), (_, more) = index.scores(query, locale), index.scores(f'{query} zzqx', locale)
    held = plain > 0
    assert held.sum() > 5 and (more[held] < plain[held]).all()
    assert (np.diff(more[np.argsort(-plain, kind='stable')]) <= 0).all()
    assert index.scores('zzqx', locale)[1].max() == index.scores('?', locale)[1].max() == 0


def test_search_is_by_locale_ranked_and_leaves_out_what_shares_nothing(index, market):
    found = search_words(index, market.queries, k=7)
    here = found.join(market.queries.select('query_id', here='locale'), on='query_id').join(market.products, on='product_id')
    assert (here['here'] == here['locale']).all() and (found['score'] > 0).all()
    for (query_id,), rows in found.group_by('query_id'):
        row = market.queries.filter(query_id=query_id).row(0, named=True)
        at, scores = index.scores(row['query'], row['locale'])
        want = sorted(((-s, i) for i, s in zip(at, scores) if s > 0))[:7]
        assert rows['product_id'].to_list() == market.products['product_id'][[i for _, i in want]].to_list()
        assert rows['rank'].to_list() == list(range(1, len(rows) + 1))
    nothing = search_words(index, pl.DataFrame(dict(query_id=['x'], query=['zzqx'], locale=['en'])))
    assert nothing.is_empty() and nothing.schema == found.schema


def test_pairs_get_the_score_of_the_search(index, market):
    found = search_words(index, market.queries, k=50)
    mixed = found.sample(fraction=1, shuffle=True, seed=0)
    assert score_words(index, mixed, market.queries).to_list() == mixed['score'].to_list()
    abroad = pl.DataFrame(dict(query_id=market.queries.filter(locale='en')['query_id'][:1], product_id=market.products.filter(locale='ja')['product_id'][:1]))
    assert score_words(index, abroad, market.queries).to_list() == [0]


def test_a_locale_without_products_is_an_error(index):
    with pytest.raises(ValueError, match="no product of market belongs to locale 'fr'"): index.scores('pan', 'fr')


def test_pool_holds_both_lists_all_judged_pairs_and_exact_scores(test_pool, vectors, index, market):
    data = market.split('test')
    assert not test_pool.select('query_id', 'product_id').is_duplicated().any()
    assert test_pool.filter(pl.col('grade') >= 0).height == data.judgments.height
    direct = evaluate(vectors, market, 'test')
    for name, run in (('dense', direct.run), ('words', search_words(index, data.queries))):
        listed = test_pool.filter(pl.col(f'{name}_rank').is_not_null())
        both = listed.join(run, on=['query_id', 'product_id'], suffix='_run')
        assert len(both) == len(listed) == len(run)
        assert (both[f'{name}_rank'] == both['rank']).all() and both[name].to_numpy() == pytest.approx(both['score'].to_numpy(), abs=2e-6)
    assert not test_pool.select('dense', 'words', 'row', 'locale').null_count().sum_horizontal().item()


def test_any_system_is_measured_like_an_encoder(test_pool, vectors, market):
    direct = evaluate(vectors, market, 'test')
    ours = evaluate_scores(test_pool, test_pool['dense'], market, found=('dense_rank',))
    assert [ours.values[m] for m in HEADLINE] == pytest.approx([direct.values[m] for m in HEADLINE])
    again = evaluate_run(direct.run.drop('grade'), direct.pairs, market, 'test')
    assert again.to_dict() == direct.to_dict() and again.run.equals(direct.run) and again.per_query.equals(direct.per_query)


def test_fusion_by_hand():
    rows = pl.DataFrame(dict(query_id=['q', 'q', 'q', 'r'], dense=[.9, .7, .4, .2], words=[.4, .8, .1, .3],
                             dense_rank=[1, 2, None, 1], words_rank=[2, 1, 3, None]),
                        schema_overrides=dict(dense_rank=pl.Int64, words_rank=pl.Int64))
    assert Blend('ranks', .75).scores(rows).to_numpy() == pytest.approx(
        [.75 / 61 + .25 / 62, .75 / 62 + .25 / 61, .25 / 63, .75 / 61])
    # dense runs from .7 to .9 among its own, words from .1 to .8; a list of one has its best; what a list lacks gets nothing
    assert Blend('relative', .75).scores(rows).to_numpy() == pytest.approx([.75 + .25 * 3 / 7, .25, 0, .75])


def test_calibrated_sum_is_an_expected_grade(learn, test_pool):
    judged = learn.filter(pl.col('grade') >= 0)
    blend = blends(learn, 'calibrated', [.3])[0]
    score = blend.scores(test_pool)
    assert score.to_numpy() == pytest.approx(.3 * blend.dense.expected(test_pool['dense']) + .7 * blend.words.expected(test_pool['words']))
    assert score.is_between(0, 2).all()
    weight = judged.select(1 / pl.len().over('query_id')).to_series()
    said, true = ((x * weight).sum() / weight.sum() for x in (blend.scores(judged), judged['grade']))
    assert said == pytest.approx(true, abs=.03)                         # honest on average
    assert blend.words.prevalence[0] == pytest.approx(((judged['grade'] >= 1) * weight).sum() / weight.sum())


def test_lists_keep_what_was_found_and_break_ties_by_catalogue():
    rows = pl.DataFrame(dict(query_id=['q'] * 4, product_id=list('dcba'), row=[3, 2, 1, 0], dense_rank=[1, None, 2, None],
                             words_rank=[None, None, None, 1]), schema_overrides=dict(dense_rank=pl.Int64, words_rank=pl.Int64))
    run = ranked(rows, pl.Series([.5, .9, .5, .1]))
    assert run['product_id'].to_list() == ['b', 'd', 'a'] and run['rank'].to_list() == [1, 2, 3]
    assert ranked(rows, pl.Series([.5, .9, .5, .1]), k=1)['product_id'].to_list() == ['b']
    assert ranked(rows, pl.Series([.5, .9, .5, .1]), found=('words_rank',))['product_id'].to_list() == ['a']


@pytest.mark.parametrize('method', METHODS)
def test_weight_is_the_best_on_validation(method, learn, market):
    blend, table = fit_blend(learn, market, method, weights=(0, .25, .5, .75, 1))
    assert table['weight'].to_list() == [0, .25, .5, .75, 1]
    assert table.filter(weight=blend.weight)['ndcg@10'][0] == table['ndcg@10'].max()
    for tried, row in zip(blends(learn, method, (0, .5)), table[[0, 2]].iter_rows(named=True)):
        assert row['auc_2'] == evaluate_scores(learn, tried.scores(learn), market, 'validation', min_judged=1).values['auc_2']
    assert fit_blend(learn, market, method, weights=(0, 1), measure='recall@50')[1].columns == ['weight', 'ndcg@10', 'recall@50', 'auc_2', 'auc_1']
    assert Blend.from_dict(json.loads(json.dumps(blend.to_dict()))) == blend
    assert (blend.dense is not None) == (method == 'calibrated')


def test_every_validation_query_has_a_say_in_the_weight(vectors, market):
    first = market.split('validation').queries['query_id'][0]
    few = market.judgments.filter((pl.int_range(pl.len()).over('query_id') < 6) | (pl.col('query_id') == first))
    data = replace(market, judgments=few)
    rows = pool(vectors, WordIndex(data), 'validation')
    tried, (_, table) = blends(rows, 'ranks', [.5])[0], fit_blend(rows, data, 'ranks', weights=[.5])
    every, one = (evaluate_scores(rows, tried.scores(rows), data, 'validation', min_judged=n) for n in (1, 10))
    assert every.counts['queries'] == len(data.split('validation').queries) > one.counts['queries'] == 1
    assert table['ndcg@10'][0] == every.values['ndcg@10'] != one.values['ndcg@10']


def test_weight_ends_are_the_systems_alone(learn, test_pool, market):
    for weight, name in ((1, 'dense'), (0, 'words')):
        alone = evaluate_scores(test_pool, test_pool[name], market)
        blended = evaluate_scores(test_pool, blends(learn, 'calibrated', [weight])[0].scores(test_pool), market)
        assert blended.values['auc_2'] == pytest.approx(alone.values['auc_2']) and blended.values['ndcg@10'] == pytest.approx(alone.values['ndcg@10'])


def test_unknown_method():
    with pytest.raises(ValueError, match="no blend 'sum': choose calibrated, ranks, relative"): blends(pl.DataFrame(), 'sum')


def test_blend_beats_each_alone_here(learn, test_pool, market):
    blend, _ = fit_blend(learn, market, weights=(.2, .4, .6, .8))
    systems = {'encoder': evaluate_scores(test_pool, test_pool['dense'], market, found=('dense_rank',)),
               'BM25': evaluate_scores(test_pool, test_pool['words'], market, found=('words_rank',)),
               'blend': evaluate_scores(test_pool, blend.scores(test_pool), market)}
    for metric in ('ndcg@10', 'auc_2', 'auc_1'):
        assert systems['blend'].values[metric] > max(systems[n].values[metric] for n in ('encoder', 'BM25'))
    table = blend_table(systems, n=50)
    assert table.filter(system='encoder')['difference'].null_count() == 4 and len(table) == 12
    row = table.filter(system='blend', metric='auc_2').row(0, named=True)
    assert row['difference'] == pytest.approx(systems['blend'].values['auc_2'] - systems['encoder'].values['auc_2'])
    assert row['low'] <= row['difference'] <= row['high']


def test_answers_by_hand():
    products = pl.DataFrame(dict(product_id=list('abcd'), title=['pan', 'pot', 'wok', 'lid']))
    judged = pl.DataFrame([('one', 'a', 2), ('one', 'b', 0), ('two', 'a', 1), ('two', 'c', 2), ('three', 'd', 0)],
                          schema=['query', 'product_id', 'grade'], orient='row').with_columns(split=pl.lit('test'))
    data = make_data(products, judged, name='hand')
    q = dict(data.queries.select('query', 'query_id').iter_rows())
    run = pl.DataFrame([(q['one'], 'a', 1, .9), (q['one'], 'b', 2, .6), (q['one'], 'c', 3, .2), (q['two'], 'a', 1, .5), (q['two'], 'c', 2, .4)],
                       schema=['query_id', 'product_id', 'rank', 'score'], orient='row')          # `three` found nothing at all
    pairs = data.judgments.with_columns(score=pl.lit(.5))
    found = answers(evaluate_run(run, pairs, data), {'low': .3, 'high': .7, 'out': 2.})
    assert found['name'].to_list() == ['all shown', 'low', 'high', 'out']
    assert found['shown'].to_list() == pytest.approx([5 / 3, 4 / 3, 1 / 3, 0])
    assert found['unanswered'].to_list() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 1])
    assert found['precision'].to_list() == [.5, .5, 1, None]                                     # `c` of `one` is unjudged, not wrong
    assert found['judged'].to_list() == [.8, 1, 1, None]
    assert found['kept'].to_list() == [1, 1, .5, 0]
    assert answers(evaluate_run(run, pairs, data), {}, boundary=1, k=1)['precision'].to_list() == [1]
    assert keep_above(run, .5)['product_id'].to_list() == ['a', 'b', 'a'] and keep_above(run, .5, k=1).height == 2
