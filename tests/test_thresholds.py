"Calibration and thresholds: against known truth, against slow obvious loops, and by what must not happen."
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy.special import expit

from mine_refine_nb.data import make_data
from mine_refine_nb.slices import query_bands
from mine_refine_nb.thresholds import (
    KINDS, Calibrator, Thresholds, Wish, boundary_reliability, calibrate_pairs, check_thresholds, choose_cut,
    choose_thresholds, cut_table, fit_calibrator, known_volume, query_weights, shift_prevalence,
    threshold_shift)


def scored(seed=0, queries=120, gap=.1, drift=0., longest=30):
    "Pairs of many queries with lists of uneven length; Spanish scores are moved by `drift`."
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, longest, queries)
    ids = np.repeat([f'q{i:03}' for i in range(queries)], lengths)
    locale = np.where(np.repeat(np.arange(queries), lengths) % 3 == 0, 'es', 'en')
    grade = rng.choice(3, len(ids), p=[.5, .2, .3])
    score = .5 + gap * grade + rng.normal(0, .08, len(ids)) + drift * (locale == 'es')
    product = [f'p{i}' for i in range(len(ids))]
    return pl.DataFrame(dict(query_id=ids, product_id=product, locale=locale, grade=grade.astype(np.int8), score=score))


def weighted_rates(pairs, boundary, threshold):
    "Precision and recall where every query weighs one, by a loop over the queries."
    hit = passing = upper = 0
    for _, rows in pairs.group_by('query_id'):
        one = 1 / len(rows)
        for grade, score in rows.select('grade', 'score').iter_rows():
            hit += one * (grade >= boundary and score >= threshold)
            passing += one * (score >= threshold)
            upper += one * (grade >= boundary)
    return hit / passing, hit / upper


@pytest.mark.parametrize('kind', KINDS)
def test_calibrator_rises_keeps_order_and_survives_json(kind):
    fit = calibrate_pairs(scored(), kind)
    p = fit.probabilities(np.linspace(-5, 5, 4001))
    assert np.allclose(p.sum(axis=1), 1) and (p >= 0).all()
    above = np.stack([p[:, 1] + p[:, 2], p[:, 2]])
    assert (np.diff(above, axis=1) >= -1e-12).all() and (above[0] >= above[1]).all()
    assert np.allclose(fit.expected([.4, .8]), fit.probabilities([.4, .8]) @ [0, 1, 2])
    assert Calibrator.from_dict(json.loads(json.dumps(fit.to_dict()))) == fit


@pytest.mark.parametrize('kind', KINDS)
def test_calibrator_finds_the_truth(kind):
    rng = np.random.default_rng(1)
    score = rng.uniform(-1, 1, 40_000)
    draw = rng.random(len(score))
    grade = (draw < expit(4 * score + 1)).astype(int) + (draw < expit(6 * score - 2))
    p = fit_calibrator(score, grade, kind).probabilities(grid := np.linspace(-.9, .9, 50))
    assert np.abs(p[:, 2] - expit(6 * grid - 2)).max() < (.02 if kind == 'logistic' else .06)
    assert np.abs(1 - p[:, 0] - expit(4 * grid + 1)).max() < (.02 if kind == 'logistic' else .06)


def test_scale_of_the_score_does_not_matter():
    pairs = scored()
    a, b = calibrate_pairs(pairs), calibrate_pairs(pairs.with_columns(score=pl.col('score') * 1e-3 + 7))
    assert np.allclose(a.probabilities([.4, .6, .8]), b.probabilities(np.array([.4, .6, .8]) * 1e-3 + 7), atol=1e-4)


def test_crossing_curves_stay_in_order():
    fit = Calibrator('logistic', ((1., 0.), (9., 0.)), (.5, .4))
    assert (fit.probabilities([1., 3.])[:, 1] == 0).all() and (fit.probabilities([1., 3.]) >= 0).all()


def test_long_lists_do_not_drown_the_rest():
    rng = np.random.default_rng(2)
    long = pl.DataFrame(dict(query_id='long', grade=[2] * 900, score=rng.normal(.2, .05, 900)))
    rest = scored().select('query_id', pl.col('grade').cast(pl.Int64), 'score')
    both, alone = calibrate_pairs(pl.concat([rest, long])), calibrate_pairs(rest)
    assert np.abs(both.probabilities([.2])[0, 2] - alone.probabilities([.2])[0, 2]) < .1
    assert fit_calibrator(*pl.concat([rest, long]).select('score', 'grade')).probabilities([.2])[0, 2] > .5
    means = pl.concat([rest, long]).group_by('query_id').agg((pl.col('grade') == 2).mean())['grade']
    assert both.prevalence[1] == pytest.approx(means.mean())
    assert query_weights(['a', 'b', 'a', 'a']).tolist() == [1 / 3, 1, 1 / 3, 1 / 3]


@pytest.mark.parametrize('kind', KINDS)
def test_calibrator_refuses_what_it_cannot_know(kind):
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match='1 of 3 scores are not finite, the first is row 1'):
            fit_calibrator([.1, bad, .3], [0, 1, 2], kind)
        with pytest.raises(ValueError, match='not finite'): calibrate_pairs(scored(), kind).probabilities([bad])
    for grades in ([0, 1, 1], [1, 1, 2]):
        with pytest.raises(ValueError, match='a boundary with an empty side'): fit_calibrator([.1, .2, .3], grades, kind)
    with pytest.raises(ValueError, match='3 scores, 2 grades'): fit_calibrator([.1, .2, .3], [0, 2], kind)
    with pytest.raises(ValueError, match='choose logistic or isotonic'): fit_calibrator([.1, .2], [0, 2], 'platt')


@pytest.mark.parametrize('kind', KINDS)
def test_unjudged_is_not_irrelevant_and_two_levels_are_enough(kind):
    pairs = scored()
    more = pl.concat([pairs, pairs.with_columns(grade=pl.lit(-1, pl.Int8), score=pl.lit(.9))])
    assert fit_calibrator(more['score'], more['grade'], kind) == fit_calibrator(pairs['score'], pairs['grade'], kind)
    assert calibrate_pairs(more, kind) == calibrate_pairs(pairs, kind) and cut_table(more, 2).equals(cut_table(pairs, 2))
    assert choose_thresholds(more, kind=kind) == choose_thresholds(pairs, kind=kind)
    two = pairs.filter(pl.col('grade') != 1)
    assert (calibrate_pairs(two, kind).probabilities(two['score'])[:, 1] == 0).all()


def test_a_score_that_runs_backwards_says_nothing():
    fit = calibrate_pairs(scored().with_columns(score=-pl.col('score')))
    assert fit.probabilities([-1, 0, 1])[:, 2] == pytest.approx([fit.prevalence[1]] * 3)


@pytest.mark.parametrize('boundary', [1, 2])
def test_cut_table_is_what_a_loop_counts(boundary):
    pairs = scored(queries=12).with_columns(pl.col('score').round(2))    # with ties
    table = cut_table(pairs, boundary)
    assert table['threshold'].is_sorted(descending=True) and len(table) == pairs['score'].n_unique()
    for row in table.iter_rows(named=True):
        assert (row['precision'], row['recall']) == pytest.approx(weighted_rates(pairs, boundary, row['threshold']))
        assert row['passing'] == (pairs['score'] >= row['threshold']).sum()


def test_precision_at_another_prevalence_is_that_of_a_reweighed_sample():
    pairs = scored(queries=200).with_columns(query_id=pl.col('product_id'))    # every pair is a query: plain counts
    upper, lower = pairs.filter(grade=2), pairs.filter(pl.col('grade') < 2)
    rare = pl.concat([upper, *[lower.with_columns(query_id=pl.col('query_id') + f'-{i}') for i in range(5)]])
    here = cut_table(pairs, 2, prevalence=len(upper) / len(rare)).sort('threshold')
    there = cut_table(rare, 2).sort('threshold')
    assert here['precision'].to_numpy() == pytest.approx(there['precision'].to_numpy())


def test_choices_fulfil_the_wish_at_the_least_cost():
    pairs = scored()
    for boundary in (1, 2):
        table = cut_table(pairs, boundary).filter(pl.col('passing') >= 20)
        cut = choose_cut(pairs, boundary, Wish('precision', .8))
        assert cut.reached and cut.threshold == table.filter(pl.col('precision') >= .8)['threshold'].min()
        cut = choose_cut(pairs, boundary, Wish('recall', .8))
        assert cut.threshold == table.filter(pl.col('recall') >= .8)['threshold'].max()
        cut = choose_cut(pairs, boundary, Wish())
        assert cut.balanced_accuracy == table['balanced_accuracy'].max() and cut.reached and cut.wanted is None
        assert (cut.precision, cut.recall) == pytest.approx(weighted_rates(pairs, boundary, cut.threshold))


def test_a_wish_out_of_reach_is_said_and_luck_is_not_taken():
    pairs = scored(gap=.03)
    assert cut_table(pairs, 2)['precision'].max() > .95                      # the very best few
    cut = choose_cut(pairs, 2, Wish('precision', .95))
    assert not cut.reached and cut.wanted == .95
    assert (pairs['score'] >= cut.threshold).sum() >= 20
    assert cut.precision == cut_table(pairs, 2).filter(pl.col('passing') >= 20)['precision'].max() < .95


def test_wishes_are_checked():
    for bad in (('precision', None), ('balanced', .5), ('recall', 1.2), ('recall', 0.), ('precision', 90)):
        with pytest.raises(ValueError, match='need a number'): Wish(*bad)
    with pytest.raises(ValueError, match='choose precision, recall or balanced'): Wish('f1', .5)
    with pytest.raises(ValueError, match='no boundary 0'): choose_thresholds(scored(), {0: Wish()})


def test_thresholds_read_scores_and_survive_json():
    found = choose_thresholds(scored(), {2: Wish('precision', .8)}, kind='isotonic')
    one, two = found[1].threshold, found[2].threshold
    assert found.verdict([one - 1e-9, one, two - 1e-9, two]).tolist() == [0, 1, 1, 2]
    content = json.loads(json.dumps(found.to_dict()))
    assert set(content) == {'grade >= 1', 'grade >= 2', 'calibrator'} and content['grade >= 2']['threshold'] == two
    content['grade >= 1']['balanced_accuracy_test'] = .5                      # what the pipeline adds
    assert Thresholds.from_dict(content) == found
    assert found[1].wish == 'balanced' and found.calibrator.kind == 'isotonic'
    with pytest.raises(ValueError, match='not finite'): found.verdict([np.nan])
    odd = replace(found, cuts=(replace(found[1], threshold=.9), replace(found[2], threshold=.5)))
    assert odd.verdict([.4, .6, .95]).tolist() == [0, 2, 2]                   # passing the upper cut is enough


def test_another_prevalence_moves_cut_and_calibrator_alike():
    pairs = scored(queries=300)
    plain, rare = (choose_thresholds(pairs, {2: Wish('precision', .8)}, prevalence=p) for p in (None, {2: .1}))
    assert rare[2].threshold > plain[2].threshold and rare[2].prevalence_given and not plain[2].prevalence_given
    assert rare[2].prevalence == .1 and rare[1] == plain[1]
    for kind in KINDS:
        fit = calibrate_pairs(pairs, kind)
        moved = shift_prevalence(fit, {2: .1})
        p, q = (c.probabilities([.55, .65])[:, 2] for c in (fit, moved))
        odds = .1 / .9 * (1 - fit.prevalence[1]) / fit.prevalence[1]
        assert q / (1 - q) == pytest.approx(p / (1 - p) * odds, rel=.02)
        assert moved.prevalence == (fit.prevalence[0], .1)
    with pytest.raises(ValueError, match='not rising'): shift_prevalence(fit, {1: .1, 2: .2})


def test_report_is_what_a_loop_counts_and_says_what_nobody_knows():
    found = choose_thresholds(scored(0), {2: Wish('precision', .8), 1: Wish('recall', .9)})
    test = scored(1)
    report = check_thresholds(found, test, n=200)
    for row in report.filter(pl.col('by').is_in(['all', 'locale'])).iter_rows(named=True):
        part = test if row['by'] == 'all' else test.filter(locale=row['part'])
        precision, recall = weighted_rates(part, row['boundary'], found[row['boundary']].threshold)
        assert (row['precision'], row['recall']) == pytest.approx((precision, recall))
        assert row['got'] == (row['precision'] if row['wish'] == 'precision' else row['recall'])
        assert row['miss'] == pytest.approx(row['got'] - row['wanted']) and row['low'] < row['got'] < row['high']
        assert row['queries'] == part['query_id'].n_unique() and row['pairs'] == len(part)
    lost = report.filter(pl.col('by').is_in(['category', 'volume']))
    assert lost['part'].unique().to_list() == ['unknown'] and lost['got'].null_count() == len(lost) == 4


def test_report_by_category_and_band():
    test = scored(1)
    products = test.select('product_id', category=pl.when(pl.int_range(pl.len()) % 2 == 0).then(pl.lit('Home > Pans')).otherwise(None))
    volume = test.select('query_id', 'locale').unique(maintain_order=True).with_columns(volume=1 / pl.int_range(1, pl.len() + 1))[:60]
    report = check_thresholds(choose_thresholds(scored(0)), test, products, volume, n=50).filter(boundary=2)
    assert report.filter(by='category')['part'].to_list() == ['Home', 'unknown']
    bands = report.filter(by='volume')
    assert set(bands['part']) == {'head', 'torso', 'tail', 'unknown'} and bands['queries'].sum() == 120
    assert bands.filter(part='head')['reads'][0] == 'fewer than 10 queries' and bands.filter(part='head')['got'][0] is None


def test_report_finds_the_locale_that_drifts():
    found = choose_thresholds(scored(0, queries=300), {2: Wish('precision', .8)})
    report = check_thresholds(found, scored(1, queries=300, drift=.1), n=300).filter(boundary=2, by='locale')
    assert dict(report.select('part', 'reads').iter_rows())['es'] == 'short'
    calm = check_thresholds(found, scored(1, queries=300), n=300).filter(boundary=2, by='locale')
    assert calm.filter(part='es')['got'][0] > report.filter(part='es')['got'][0] + .1


def test_interval_is_over_queries_not_pairs():
    test = scored(1, queries=60)
    copies = pl.concat([test.with_columns(product_id=pl.col('product_id') + f'-{i}') for i in range(10)])
    found = choose_thresholds(scored(0))
    one, ten = (check_thresholds(found, pairs, n=400).row(0, named=True) for pairs in (test, copies))
    assert ten['got'] == pytest.approx(one['got'])
    assert ten['high'] - ten['low'] == pytest.approx(one['high'] - one['low'], rel=1e-6)
    few = check_thresholds(found, test.filter(pl.col('query_id') < 'q015'), n=400).row(0, named=True)
    assert few['high'] - few['low'] > 1.4 * (one['high'] - one['low'])


def test_interval_is_as_wide_as_the_binomial_says():
    test = scored(1, queries=150).with_columns(query_id=pl.col('product_id'))    # one pair a query: independent draws
    found = choose_thresholds(scored(0), {2: Wish('precision', .8)})
    row = check_thresholds(found, test, n=2000).filter(boundary=2, by='all').row(0, named=True)
    passing = (test['score'] >= found[2].threshold).sum()
    assert row['high'] - row['low'] == pytest.approx(2 * 1.96 * np.sqrt(row['got'] * (1 - row['got']) / passing), rel=.1)


def test_report_uses_a_given_prevalence_in_every_part():
    found = choose_thresholds(scored(0), {2: Wish('precision', .6)}, prevalence={2: .1})
    row = check_thresholds(found, scored(1), n=50).filter(boundary=2, by='all').row(0, named=True)
    raw = check_thresholds(replace(found, cuts=tuple(replace(c, prevalence_given=False) for c in found.cuts)), scored(1), n=50)
    recall, own = row['recall'], raw.filter(boundary=2, by='all').row(0, named=True)
    alarm = recall * own['prevalence'] / (1 - own['prevalence']) * (1 / own['precision'] - 1)
    assert row['got'] == pytest.approx(.1 * recall / (.1 * recall + .9 * alarm))


def test_bands_come_from_the_log_or_not_at_all():
    products = pl.DataFrame(dict(product_id=['a', 'b'], title=['pan', 'pot']))
    judged = pl.DataFrame(dict(query=['pan', 'pot'], product_id=['a', 'b'], grade=[2, 0], locale=['en', 'en'], split=['test'] * 2))
    log = pl.DataFrame(dict(query=['pan', 'pan', 'pot'], product_id=['a', 'b', 'a'], impressions=[90, 60, 10], clicks=[1, 1, 1],
                            add_to_carts=[0, 0, 0], purchases=[0, 0, 0]))
    assert known_volume(make_data(products, judged, name='x')) is None
    volume = known_volume(make_data(products, judged, engagement=log, name='x'))
    assert sorted(volume['volume']) == [10, 150]
    assert dict(query_bands(volume).join(volume, on='query_id').select('volume', 'band').iter_rows()) == {150.: 'head', 10.: 'tail'}


def test_reliability_counts():
    table = boundary_reliability([.1] * 5 + [.9] * 5, [0, 0, 0, 0, 2, 2, 2, 2, 2, 1], 2, bins=2)
    assert table['pairs'].to_list() == [5, 5] and table['accuracy'].to_list() == [.2, .8]
    assert table['confidence'].to_list() == pytest.approx([.1, .9])


def test_shift_is_measured_and_priced():
    a = scored(0)
    b = a.with_columns(score=pl.col('score') + .04).sample(fraction=1, shuffle=True, seed=1)
    found = threshold_shift(a, b, {2: Wish('precision', .8)}, n=10)
    assert found['shift'].to_numpy() == pytest.approx([.04, .04]) and found['low'].to_numpy() == pytest.approx([.04, .04])
    assert found['shift_sd'].to_numpy() == pytest.approx([.04 / a['score'].std()] * 2)
    for row in found.iter_rows(named=True):
        assert (row['precision_kept'], row['recall_kept']) == pytest.approx(weighted_rates(b, row['boundary'], row['threshold_a']))
        assert (row['precision_b'], row['recall_b']) == pytest.approx(weighted_rates(b, row['boundary'], row['threshold_b']))
        assert row['recall_kept'] > row['recall_b'] and row['precision_kept'] < row['precision_b']
    fresh = scored(5)
    assert threshold_shift(a, b, n=2, test_b=fresh)['recall_b'][0] == pytest.approx(weighted_rates(fresh, 1, found['threshold_b'][0])[1])


def test_shift_interval_holds_the_luck_of_the_sample():
    a, other = scored(0, queries=40), scored(0, queries=40).with_columns(score=pl.col('score') + np.random.default_rng(3).normal(0, .05, len(scored(0, queries=40))))
    found = threshold_shift(a, other, n=60)
    assert (found['low'] < found['high']).all() and (found['high'] - found['low'] < .3).all()
    assert found.equals(threshold_shift(a, other, n=60))


def test_shift_refuses_other_pairs():
    a = scored(0)
    for other in (a[1:], a.with_columns(grade=pl.lit(2, pl.Int8)), scored(1)):
        with pytest.raises(ValueError, match='not the same judged pairs'): threshold_shift(a, other, n=2)
