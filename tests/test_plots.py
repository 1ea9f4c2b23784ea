"""Figures show what the frames hold, in constant colours, and stay small."""
import itertools
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import polars as pl
import pytest

from mine_refine_nb import plots
from mine_refine_nb.plots import GRADE_COLORS, GRADE_DASHES, GRADE_NAMES, GRADE_SYMBOLS, INK, LINE_COLORS

GRADE_OF = {name: grade for grade, name in GRADE_NAMES.items()}
LIMIT = 60_000  # bytes of JSON per figure
# Machado et al. 2009, severity 1.0, in linear RGB
BLINDNESS = dict(
    none=np.eye(3),
    protan=[[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
    deutan=[[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
    tritan=[[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]])


def linear(color):
    rgb = np.array([int(color[i:i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= .04045, rgb / 12.92, ((rgb + .055) / 1.055) ** 2.4)


def lab(rgb):
    to_xyz = np.array([[.4124, .3576, .1805], [.2126, .7152, .0722], [.0193, .1192, .9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / [.9505, 1, 1.089]
    f = np.where(xyz > .008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(a, b):
    low, high = sorted(float(linear(c) @ [.2126, .7152, .0722]) for c in (a, b))
    return (high + .05) / (low + .05)


def size(figure): return len(pio.to_json(figure))


def plain(figure): return figure.layout.title.text.replace('<br>', ' ')


def strata(n=500, seed=0, grades=(2, 1, 0)):
    rng = np.random.default_rng(seed)
    grade = rng.choice(grades, n)
    return pl.DataFrame(dict(grade=grade, score=.2 * grade + rng.normal(0, .1, n)))


# The visual language

@pytest.mark.parametrize('kind', BLINDNESS)
def test_grades_stay_apart_for_colour_blind_readers(kind):
    seen = {g: lab(np.array(BLINDNESS[kind]) @ linear(c)) for g, c in GRADE_COLORS.items()}
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 20, (kind, GRADE_NAMES[a], GRADE_NAMES[b])


def test_grades_differ_without_colour():
    assert len(set(GRADE_SYMBOLS.values())) == len(set(GRADE_DASHES.values())) == len(GRADE_COLORS) == 4


@pytest.mark.parametrize('page', ['#FFFFFF', '#111111'])
def test_readable_on_light_and_dark(page):
    assert contrast(INK, page) > 4
    assert all(contrast(c, page) > 2.4 for c in GRADE_COLORS.values())
    assert all(contrast(c, page) > 2.7 for c in LINE_COLORS)


def test_template_is_transparent_and_small():
    assert plots.TEMPLATE.layout.paper_bgcolor == plots.TEMPLATE.layout.plot_bgcolor == 'rgba(0,0,0,0)'
    assert len(json.dumps(plots.TEMPLATE.to_plotly_json())) < 2000


def test_light_renderer_stores_kilobytes_and_the_same_bytes():
    before = pio.renderers.default, pio.templates.default
    try:
        bundles = []
        for _ in range(2):
            plots.use_light_renderer()
            bundles.append(plots.plot_strata(dict(a=strata()))._repr_mimebundle_())
    finally:
        pio.renderers.default, pio.templates.default = before
    assert set(bundles[0]) == {'application/vnd.plotly.v1+json', 'text/plain'}
    assert bundles[0] == bundles[1]
    assert len(json.dumps(bundles[0])) < 20_000
    assert bundles[0]['text/plain'].startswith('A relevant product outscores a lower grade 9') and '<br>' not in bundles[0]['text/plain']


def test_figure_without_a_title_is_still_a_figure():
    assert plots.LightRenderer().to_mimebundle(go.Figure().to_dict())['text/plain'] == 'A figure'


def test_templates_for_known_backgrounds_have_more_contrast():
    for name, page in (('light', '#FFFFFF'), ('dark', '#14171A')):
        layout = plots.TEMPLATES[name].layout
        assert layout.paper_bgcolor == layout.plot_bgcolor == page
        assert contrast(layout.font.color, page) > 10 > contrast(INK, page)
    assert plots.TEMPLATES['either'] is plots.TEMPLATE


@pytest.mark.parametrize('title, height', [('short', 300), ('a title of many words ' * 6, 357)])
def test_titles_are_wrapped_for_a_phone_and_get_their_room(title, height):
    figure = plots._dress(go.Figure(), title, 'how to read it ' * 9, 300)
    lines = figure.layout.title.text.split('<br>')
    assert max(map(len, lines)) <= 38 and figure.layout.height == height == 300 + 19 * (len(lines) - 1)
    assert max(map(len, figure.layout.title.subtitle.text.split('<br>'))) <= 54


# Strata

def test_strata_counts_add_up_and_colours_are_the_grades():
    stages = dict(pretrained=strata(seed=1), stage1=strata(seed=2), stage2=strata(seed=3, grades=(2, 1, 0, -1)))
    figure = plots.plot_strata(stages)
    grades = (2, 1, 0, -1)
    assert len(figure.data) == 3 * 4
    for (frame, grade), trace in zip(itertools.product(stages.values(), grades), figure.data):
        assert GRADE_OF[trace.name] == grade
        assert trace.line.color == GRADE_COLORS[grade] and trace.line.dash == GRADE_DASHES[grade]
        assert sum(trace.customdata) == (frame['grade'] == grade).sum()
        assert sum(trace.y) == pytest.approx(float((frame['grade'] == grade).any()), abs=.01)
    assert [t.showlegend for t in figure.data] == [True] * 4 + [False] * 8


def test_strata_bins_hold_the_scores_in_them():
    frame = pl.DataFrame(dict(grade=[2, 2, 2, 0], score=[0., .9, 1., .05]))
    relevant = plots.plot_strata(dict(a=frame), bins=10).data[0]
    assert list(relevant.customdata) == [1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]
    assert relevant.y[9] == pytest.approx(2 / 3, abs=1e-3)


def test_strata_panels_share_their_bins_thresholds_and_aucs():
    figure = plots.plot_strata(dict(a=strata(), b=strata(seed=1)), thresholds=dict(b=[.1, .3]),
                               values=dict(b={'auc_2': .7123, 'auc_1': .8, 'ndcg@10': .5}))
    assert list(figure.data[0].x) == list(figure.data[3].x)
    assert [s.x0 for s in figure.layout.shapes] == [.1, .3] and {s.xref for s in figure.layout.shapes} == {'x2'}
    titles = [a.text for a in figure.layout.annotations]
    assert titles == ['<b>a</b>', '<b>b</b><br>auc_2 0.712<br>auc_1 0.800']


@pytest.mark.parametrize('frame, message', [
    (pl.DataFrame(dict(grade=[1])), r'missing column\(s\) score'),
    (pl.DataFrame(dict(grade=[1], score=[float('nan')])), 'not finite'),
    (pl.DataFrame(schema=dict(grade=pl.Int8, score=pl.Float32)), 'no pairs'),
])
def test_strata_refuse(frame, message):
    with pytest.raises(ValueError, match=message): plots.plot_strata(dict(a=frame))


# Training

def history(steps=400):
    return pl.DataFrame(dict(step=[*range(steps), 0, 100], name=['loss'] * steps + ['validation ndcg@10'] * 2,
                             value=[1.] * steps + [.5, .6]))


def test_training_puts_loss_above_validation():
    figure = plots.plot_training(history(), 'stage 1')
    loss = [t for t in figure.data if t.name == 'loss']
    ndcg = [t for t in figure.data if t.name == 'ndcg@10']
    assert len(loss) == 2 and {t.yaxis for t in loss} == {'y'}, 'raw and running mean'
    assert len(ndcg) == 1 and ndcg[0].yaxis == 'y2'
    assert np.allclose(ndcg[0].y, [.5, .6]) and list(ndcg[0].x) == [0, 100]
    assert plain(figure) == 'stage 1: validation ndcg@10 rises from 0.500 to 0.600, best 0.600 at step 100'


def test_training_leaves_out_what_is_no_curve_and_gives_each_panel_its_legend():
    aside = pl.DataFrame(dict(step=[1, 2], name=['learning_rate', 'blend 0.5'], value=[1e-5, .9]))
    more = pl.DataFrame(dict(step=[0, 1] * 3, name=['circle'] * 2 + ['gradient share 2'] * 2 + ['gradient share -1'] * 2,
                             value=[3., 2., .25, .5, .75, .5]))
    figure = plots.plot_training(pl.concat([history(), aside, more]))
    assert {t.name: t.yaxis for t in figure.data} == {'loss': 'y', 'circle': 'y', 'ndcg@10': 'y2', 'relevant': 'y3', 'unjudged': 'y3'}
    assert {t.legend: t.yaxis for t in figure.data} == {'legend': 'y', 'legend2': 'y2', 'legend3': 'y3'}
    heights = [figure.layout[key].y for key in ('legend', 'legend2', 'legend3')]
    tops = [figure.layout[key].domain[1] for key in ('yaxis', 'yaxis2', 'yaxis3')]
    assert np.allclose(heights, tops)


def test_training_shows_a_loss_once_where_it_is_the_only_one():
    loss = history().filter(name='loss')
    same, other = (loss.with_columns(name=pl.lit('contrast'), value=pl.col('value') * by) for by in (1.00001, 2))
    assert {t.name for t in plots.plot_training(pl.concat([loss, same])).data} == {'loss'}
    assert {t.name for t in plots.plot_training(pl.concat([loss, other])).data} == {'loss', 'contrast'}


def test_training_that_leads_nowhere_says_so():
    flat = history().with_columns(value=pl.when(pl.col('step') == 100).then(.5001).otherwise('value'))
    assert 'ends where it began, at 0.500' in plain(plots.plot_training(flat.filter(pl.col('name') != 'loss')))


def test_training_without_validation_tells_of_the_loss():
    assert plain(plots.plot_training(history().filter(name='loss'), 'x')) == 'x: loss goes from 1 to 1'


def test_gradient_shares_add_up_and_name_the_grade_that_changes_most():
    shares = pl.DataFrame(dict(step=[0, 0, 0, 10, 10, 10], grade=[0, 1, 2] * 2, share=[6., 3., 1., 1., 3., 6.]))
    figure = plots.plot_gradients(shares)
    assert [t.name for t in figure.data] == ['irrelevant', 'moderate', 'relevant']
    assert np.allclose([t.y for t in figure.data], [[.6, .1], [.3, .3], [.1, .6]])
    assert all(t.line.color == GRADE_COLORS[GRADE_OF[t.name]] and t.stackgroup for t in figure.data)
    assert plain(figure) == 'Irrelevant products make 60% of the gradient at first, 10% at last'
    with pytest.raises(ValueError, match='no steps'): plots.plot_gradients(shares.clear())


def test_training_running_mean_keeps_level_and_ends():
    raw, mean = plots.plot_training(history().filter(pl.col('name') == 'loss')).data
    assert np.allclose(mean.y, 1) and raw.x[0] == 0 and raw.x[-1] == 399 and len(raw.x) <= 300


def test_training_smooths():
    value = np.where(np.arange(200) % 2, 1., 3.)
    frame = pl.DataFrame(dict(step=range(200), name=['loss'] * 200, value=value))
    raw, mean = plots.plot_training(frame).data
    assert np.ptp(raw.y) == 2 and np.ptp(mean.y[10:-10]) < .5


# Data

def judgments():
    return pl.DataFrame(dict(query_id=['a'] * 3 + ['b'] * 2 + ['c'], grade=[2, 2, 0, 1, 1, 2],
                             locale=['us'] * 3 + ['es'] * 2 + [None]))


def test_grade_mix_shares_and_counts():
    figure = plots.plot_grade_mix(judgments())
    shown = {(GRADE_OF[t.name], y): (x, n) for t in figure.data for x, y, n in zip(t.x, t.y, t.customdata)}
    assert shown[2, 'us (3)'] == (pytest.approx(2 / 3, abs=1e-4), 2) and shown[0, 'us (3)'][1] == 1
    assert shown[1, 'es (2)'] == (1, 2) and shown[2, 'no locale (1)'] == (1, 1)
    assert all(t.marker.color == GRADE_COLORS[GRADE_OF[t.name]] for t in figure.data)
    assert plain(figure) == 'There are no irrelevant products in es'


def test_judged_per_query_counts_queries():
    figure = plots.plot_judged_per_query(judgments())
    bars = {t.name: dict(zip(t.x, t.y)) for t in figure.data}
    assert bars['us'] == {1: 0, 2: 0, 3: 1} and bars['es'][2] == 1 and bars['no locale'][1] == 1
    assert plain(figure) == 'Half of the 3 queries have 2 or more judged products'


def test_judged_per_query_bins_long_lists():
    frame = pl.DataFrame(dict(query_id=np.repeat(['a', 'b'], [1000, 3]), locale=['us'] * 1003))
    bars = plots.plot_judged_per_query(frame).data[0]
    assert len(bars.x) <= 30 and sum(bars.y) == 2 and bars.y[0] == bars.y[-1] == 1


# Comparisons

def per_query(values, query='q'):
    ids = [str(i) for i in range(len(values))]
    return pl.DataFrame({'query_id': ids, 'query': [query + i for i in ids], 'ndcg@10': values})


def test_query_deltas_sorted_signed_and_matched_by_id():
    a, b = per_query([.5, .5, .5, .5]), per_query([.4, .9, .5, .6])[[3, 1, 0, 2]]
    figure = plots.plot_query_deltas(a, b, names=('old', 'new'))
    loss, gain = figure.data
    assert np.allclose(loss.y, [-.1]) and np.allclose(gain.y, [0, .1, .4])
    assert list(loss.customdata) == ['q0'] and list(gain.customdata) == ['q2', 'q3', 'q1'] and list(gain.x) == [2, 3, 4]
    assert plain(figure) == '2 queries gain and 1 lose from old to new'
    assert figure.layout.title.subtitle.text == 'ndcg@10: mean +0.1000, 1 unchanged'


def test_query_deltas_leave_out_undefined_queries_and_keep_the_ends():
    values = np.linspace(-1, 1, 2001)
    figure = plots.plot_query_deltas(per_query([0.] * 2001 + [float('nan'), None]), per_query([*values, .3, .3]))
    shown = np.concatenate([t.y for t in figure.data])
    assert len(shown) == 240 and shown[0] == -1 and shown[-1] == 1
    assert plain(figure).startswith('1,000 queries gain and 1,000 lose') and figure.layout.title.subtitle.text.endswith('1 unchanged')


def test_query_deltas_refuse_different_queries():
    with pytest.raises(ValueError, match='different queries'):
        plots.plot_query_deltas(per_query([.1, .2]), per_query([.1]))


def test_metrics_show_interval_and_significance():
    table = pl.DataFrame(dict(metric=['ndcg@10', 'auc_2', 'auc_1'], difference=[.02, -.01, .01], low=[.01, -.03, None],
                              high=[.05, .01, None], p_corrected=[.01, .4, None]))
    figure = plots.plot_metrics({'b vs a': table})
    trace, = figure.data
    assert plain(figure) == 'b vs a: 1 of 3 metrics significantly better'
    assert list(trace.y) == ['ndcg@10', 'auc_2', 'auc_1'] and np.allclose(trace.x, [.02, -.01, .01])
    assert np.allclose(trace.error_x.array[:2], [.03, .02]) and np.allclose(trace.error_x.arrayminus[:2], [.01, .02])
    assert list(trace.marker.symbol) == ['circle', 'circle-open', 'circle-open']


def test_claims_know_that_overlap_should_fall():
    table = pl.DataFrame(dict(metric=['overlap_2', 'ndcg@10', 'auc_2', 'auc_1'], difference=[-.1, .2, -.3, .1], low=[0.] * 4, high=[.3] * 4,
                              p_corrected=[.01, .01, .01, None]))
    assert plain(plots.plot_metrics({'b vs a': table})) == 'b vs a: 2 of 4 metrics significantly better, 1 worse'


# Ridges, the animation, thresholds

def test_order_is_the_boundary_auc():
    from sklearn.metrics import roc_auc_score
    frame = strata(grades=(2, 1, 0, -1)).with_columns(pl.col('score').round(1))  # with ties
    judged = frame.filter(pl.col('grade') >= 0)
    for boundary in (1, 2):
        truth = roc_auc_score(judged['grade'] >= boundary, judged['score'])
        assert plots._order(frame, boundary) == pytest.approx(truth, abs=1e-12)
    assert plots._order(frame.filter(grade=2)) is None


def test_titles_tell_first_and_last_stage():
    swap = pl.DataFrame(dict(grade=[2, 0], score=[0., 1.]))
    stages = dict(a=swap, b=strata(), c=swap.with_columns(score=1 - pl.col('score')))
    for draw in (plots.plot_strata, plots.plot_ridges):
        assert plain(draw(stages)) == 'A relevant product outscores a lower grade 100% of the time in c, 0% in a'
        assert plain(draw(dict(a=swap))) == 'A relevant product outscores a lower grade 0% of the time'
        assert 'nothing to compare' in plain(draw(dict(a=swap.head(1))))


def test_ridges_stand_on_their_lines_with_equal_area_and_the_median():
    frame = strata(4000)
    figure = plots.plot_ridges(dict(a=frame, b=frame.with_columns(pl.col('score') / 2)), dict(b=[.3, .1]))
    ridges = [t for t in figure.data if t.name != 'median']
    assert [GRADE_OF[t.name] for t in ridges] == [2, 1, 0] * 2
    areas = [(np.array(t.y) - GRADE_OF[t.name]).sum() for t in ridges]
    assert np.allclose(areas, areas[0], rtol=.02) and max(t.y.max() - GRADE_OF[t.name] for t in ridges) == pytest.approx(1.3, abs=.01)
    medians = figure.data[3]
    for grade, x, y in zip((0, 1, 2), medians.x, medians.y):
        assert y == grade and x == pytest.approx(frame.filter(grade=grade)['score'].median(), abs=1e-3)
    assert [s.x0 for s in figure.layout.shapes] == [.1, .3] and {s.xref for s in figure.layout.shapes} == {'x2'}
    peak = ridges[0]
    assert peak.x0 + peak.dx * np.argmax(peak.y) == pytest.approx(.4, abs=.06)


def test_density_of_nothing_and_of_one_value():
    grid = np.linspace(0, 1, 21)
    assert not plots._density(np.array([]), grid).any()
    spike = plots._density(np.full(10, .5), grid)
    assert spike.argmax() == 10 and spike.sum() * .05 == pytest.approx(1, abs=1e-6)


def test_animation_frames_hold_their_steps_and_the_first_stays():
    parts = [strata(800, seed=s).with_columns(pl.col('score') + .3 * s * pl.col('grade'), step=pl.lit(s)) for s in range(40)]
    figure = plots.plot_separation(pl.concat(parts), frames=10)
    names = [f.name for f in figure.frames]
    assert len(names) == 10 and names[0] == '0' and names[-1] == '39'
    assert [s.label for s in figure.layout.sliders[0].steps] == names and figure.layout.sliders[0].active == 9
    assert all(list(s.args[0]) == [n] for s, n in zip(figure.layout.sliders[0].steps, names))
    for i in range(3):
        assert figure.data[i].line.dash == 'dot' and not figure.data[i].showlegend
        assert np.allclose(figure.data[i].y, figure.frames[0].data[i].y)
        assert np.allclose(figure.data[3 + i].y, figure.frames[-1].data[i].y)
        assert figure.data[3 + i].line.color == GRADE_COLORS[GRADE_OF[figure.data[3 + i].name]]
    assert all(f.traces == (3, 4, 5) for f in figure.frames)
    where = [figure.data[3].x0 + figure.data[3].dx * np.argmax(f.data[0].y) for f in figure.frames]
    assert where == sorted(where) and where[-1] - where[0] > 15, 'the relevant ones move to the right'
    assert re.fullmatch(r'A relevant .* 100% of the time at step 39, 9\d% at step 0', plain(figure))


def test_precision_and_recall_by_hand():
    frame = pl.DataFrame(dict(grade=[2, 2, 1, 0, 2, 0, -1], score=[.9, .8, .7, .6, .5, .4, 1.]))
    table = plots.precision_recall(frame, 2)
    shown = {round(t, 1): (p, r) for t, p, r in table.rows()}
    assert shown[.5] == (pytest.approx(3 / 5), 1) and shown[.4] == (.5, 1)
    assert set(shown) == {.4, .5}, 'cuts that let fewer than five pairs through are left out'
    with pytest.raises(ValueError, match='no pair has grade 2'): plots.precision_recall(frame.filter(pl.col('grade') < 2), 2)


def test_precision_recall_titles_and_lines():
    frame = strata(3000, grades=(2, 1, 0, -1))
    figure = plots.plot_precision_recall(frame, (.1, .3))
    passed = frame.filter((pl.col('score') >= .3) & (pl.col('grade') >= 0))
    precision, recall = (passed['grade'] == 2).mean(), (passed['grade'] == 2).sum() / (frame['grade'] == 2).sum()
    said = [int(x) for x in re.findall(r'(\d+)%', plain(figure))]
    assert abs(said[0] - 100 * precision) <= 2 and abs(said[1] - 100 * recall) <= 2
    assert [(t.line.color, t.line.dash) for t in figure.data] == [(GRADE_COLORS[g], d) for g in (2, 1) for d in ('solid', 'dot')]
    assert [s.x0 for s in figure.layout.shapes] == [.1, .3] and max(len(t.x) for t in figure.data) <= 100
    meet = plain(plots.plot_precision_recall(frame))
    assert 'meet at' in meet


# The map

def cloud(n=300, d=8, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32) * np.linspace(2, .1, d)
    grades = np.random.default_rng(seed).choice([-1, 0, 1, 2], n, p=[.7, .1, .1, .1])
    return pl.DataFrame(dict(grade=grades, title=[f't{i}' for i in range(n)])), vectors


def test_map_is_a_pca():
    from sklearn.decomposition import PCA
    points, vectors = cloud()
    truth = PCA(2).fit_transform(vectors)
    traces = plots.plot_map(points, vectors).data
    where = {t: (x, y) for trace in traces for t, x, y in zip(trace.text, trace.x, trace.y)}
    drawn = np.array([where[t] for t in points['title']])
    for axis in range(2):
        assert min(np.abs(drawn[:, axis] - sign * truth[:, axis]).max() for sign in (1, -1)) < 1e-2


def test_map_colours_caps_and_keeps_judged():
    points, vectors = cloud()
    judged = int((points['grade'] != -1).sum())
    figure = plots.plot_map(points, vectors, ('a query', vectors[0]), cap=judged + 5)
    counts = {t.name: len(t.x) for t in figure.data}
    assert counts.pop('query') == 1 and counts.pop('unjudged') == 5 and sum(counts.values()) == judged
    for trace in figure.data[:-1]: assert trace.marker.color == GRADE_COLORS[GRADE_OF[trace.name]]
    near = points['grade'].gather(np.argsort(-(vectors @ vectors[0]) / np.linalg.norm(vectors, axis=1))[:10])
    assert plain(figure).startswith(f'{(near == 2).sum()} of the 10 products nearest to "a query" are relevant')
    again = plots.plot_map(points, vectors, ('a query', vectors[0]), cap=judged + 5)
    assert pio.to_json(figure) == pio.to_json(again)


def test_many_points_are_drawn_by_the_graphics_card():
    points, vectors = cloud(6000)
    kinds = {t.name: type(t) for t in plots.plot_map(points, vectors, cap=6000).data}
    assert kinds['unjudged'] is go.Scattergl and kinds['relevant'] is go.Scatter
    assert type(plots.plot_map(points, vectors).data[0]) is go.Scatter, 'the default sample is small'


def test_rings_are_exact_and_leave_out_the_farthest_unjudged():
    points, vectors = cloud(400)
    query = vectors[0] + .1
    judged = int((points['grade'] != -1).sum())
    figure = plots.plot_rings(points, vectors, ('a query', query), [.1, .4], cap=judged + 7)
    similar = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    seen = {name: (np.hypot(x, y), s) for t in figure.data[1:] for name, x, y, s in zip(t.text, t.x, t.y, t.customdata)}
    for name, (radius, said) in seen.items():
        assert radius == pytest.approx(1 - similar[int(name[1:])], abs=1e-3) and said == pytest.approx(1 - radius, abs=1e-3)
    unjudged = [name for name in points.filter(grade=-1)['title'] if name in seen]
    others = similar[(points['grade'] == -1).to_numpy() & ~points['title'].is_in(unjudged).to_numpy()]
    assert len(unjudged) == 7 and min(similar[int(n[1:])] for n in unjudged) >= others.max() - 1e-9
    cuts = [s for s in figure.layout.shapes if s.line.dash == 'dash']
    assert [s.x1 for s in cuts] == pytest.approx([.9, .6]) and all(s.x0 == -s.x1 and s.y1 == s.x1 for s in cuts)
    for trace in figure.data[1:]: assert trace.marker.color == GRADE_COLORS[GRADE_OF[trace.name]]


def test_alike_products_stand_in_one_direction():
    rng = np.random.default_rng(0)
    ways = np.eye(8)[1:3]
    vectors = np.concatenate([np.eye(8)[0] + way + .05 * rng.normal(size=(20, 8)) for way in ways])
    _, xy = plots.around(vectors, np.eye(8)[0])
    angle = np.unwrap(np.arctan2(xy[:, 1], xy[:, 0]))
    assert abs(angle[:20].mean() - angle[20:].mean()) > 1 and max(angle[:20].std(), angle[20:].std()) < .3


def chosen():
    ids = [f'q{i}' for i in range(30)]
    pairs = pl.DataFrame(dict(query_id=np.repeat(ids, 6), product_id=[f'p{i}' for i in range(180)], grade=[2, 2, 1, 0, 0, -1] * 30))
    queries = pl.DataFrame(dict(query_id=ids, query=[f'query {i}' for i in ids]))
    products = pl.DataFrame(dict(product_id=[f'p{i}' for i in range(500)], title=[f't{i}' for i in range(500)]))
    return plots.map_points(pairs, queries, products, shown=10, others=40), ids


def test_map_points_are_some_queries_their_judged_products_and_others():
    points, _ = chosen()
    kinds = points.group_by('kind', 'grade').len().sort('kind', 'grade').rows()
    assert kinds == [('product', -1, 40), ('product', 0, 20), ('product', 1, 10), ('product', 2, 20), ('query', None, 10)]
    judged = points.filter(pl.col('grade') >= 0)
    assert set(judged['query_id']) == set(points.filter(kind='query')['query_id'])
    assert points.filter(grade=-1)['query_id'].is_null().all() and points['product_id'].drop_nulls().is_unique().all()
    assert chosen()[0].equals(points)


def test_map_vectors_are_those_of_the_points():
    points, ids = chosen()
    rng = np.random.default_rng(0)
    emb = SimpleNamespace(query_ids=ids, queries=rng.normal(size=(30, 4)), product_ids=[f'p{i}' for i in range(500)],
                          products=rng.normal(size=(500, 4)))
    vectors = plots.map_vectors(points, emb)
    for (kind, query, product), vector in zip(points.select('kind', 'query_id', 'product_id').rows(), vectors, strict=True):
        assert (vector == (emb.queries[ids.index(query)] if kind == 'query' else emb.products[int(product[1:])])).all()


def test_align_undoes_turns_and_mirrors_but_not_stretching():
    rng = np.random.default_rng(0)
    xy = rng.normal(size=(50, 2))
    turn = np.array([[np.cos(2), np.sin(2)], [np.sin(2), -np.cos(2)]])
    assert np.allclose(plots.align(xy @ turn + [3, -5], xy), xy)
    assert np.allclose(plots.align(2 * xy @ turn, xy) - xy.mean(0), 2 * (xy - xy.mean(0)))


def test_maps_are_aligned_and_tell_how_near_relevant_products_are():
    points, _ = chosen()
    before = np.random.default_rng(0).normal(size=(len(points), 6)) * np.linspace(2, .5, 6)
    figure = plots.plot_maps(points, dict(a=before, b=before @ np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]))
    left, right = ([t for t in figure.data if t.xaxis == axis] for axis in ('x', 'x2'))
    for a, b in zip(left, right, strict=True):
        assert a.name == b.name and np.allclose(a.x, b.x, atol=.01, equal_nan=True) and np.allclose(a.y, b.y, atol=.01, equal_nan=True)
    pairs = points.with_row_index('dot').filter(pl.col('grade') >= 0).join(
        points.with_row_index('star').filter(kind='query').select('query_id', 'star'), on='query_id')
    unit = before / np.linalg.norm(before, axis=1, keepdims=True)
    similar = {g: (unit[r['dot']] * unit[r['star']]).sum(1).mean() for (g,), r in pairs.group_by('grade')}
    gap = f'{similar[2] - similar[0]:.2f}'
    assert plain(figure) == f'Relevant products are {gap} more similar to their query than irrelevant ones in b, {gap} in a'
    assert figure.layout.xaxis2.matches == 'x' and figure.layout.yaxis2.matches == 'y', 'both maps have one scale'


@pytest.mark.parametrize('method', ['umap', 'pacmap'])
def test_other_maps_say_what_they_need_or_are_used(method, monkeypatch):
    monkeypatch.setitem(sys.modules, method, None)
    points, vectors = cloud(40)
    with pytest.raises(ValueError, match=r"pip install 'mine_refine_nb\[maps\]'"): plots.plot_map(points, vectors, method=method)
    class Reducer:
        def __init__(self, **settings): assert settings['random_state'] == 7
        def fit_transform(self, x): return x[:, :2] + 100
    monkeypatch.setitem(sys.modules, method, SimpleNamespace(__name__=method, UMAP=Reducer, PaCMAP=Reducer))
    figure = plots.plot_map(points, vectors, method=method, seed=7)
    assert min(min(t.x) for t in figure.data) > 98 and method in figure.layout.title.subtitle.text
    with pytest.raises(ValueError, match='choose'): plots.project(vectors, 'tsne')


@pytest.mark.slow
@pytest.mark.parametrize('method', ['umap', 'pacmap'])
def test_other_maps_for_real(method):
    pytest.importorskip(method, reason='the extra `maps` is not installed')
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(size=(60, 8)) * .2 + 3 * np.eye(8)[i] for i in range(3)])
    xy, _ = plots.project(vectors, method)
    assert np.array_equal(xy, plots.project(vectors, method)[0])
    groups = xy.reshape(3, 60, 2)
    assert groups.std(1).max() < np.linalg.norm(np.diff(groups.mean(1), axis=0), axis=1).min()


# Size and safety

def test_every_figure_stays_small_on_large_data():
    n, rng = 200_000, np.random.default_rng(0)
    many = {f'stage{i}': strata(n, i, grades=(2, 1, 0, -1)) for i in range(3)}
    rows = pl.DataFrame(dict(query_id=np.sort(rng.integers(0, 5000, n)).astype(str), grade=rng.choice([0, 1, 2], n),
                             locale=rng.choice(['us', 'es', 'jp'], n)))
    a, b = per_query(rng.random(20_000), 'long query ' * 20), per_query(rng.random(20_000))
    points, vectors = cloud(5000)
    table = pl.DataFrame(dict(metric=[f'm{i}' for i in range(12)], difference=rng.random(12), low=rng.random(12),
                              high=rng.random(12), p_corrected=rng.random(12)))
    figures = [plots.plot_strata(many), plots.plot_training(history(50_000)), plots.plot_grade_mix(rows),
               plots.plot_judged_per_query(rows), plots.plot_query_deltas(a, b),
               plots.plot_metrics({'x': table, 'y': table}),
               plots.plot_map(points.with_columns(title=pl.lit('a long title ' * 20)), vectors),
               plots.plot_rings(points.with_columns(title=pl.lit('a long title ' * 20)), vectors, ('q', vectors[0])),
               plots.plot_ridges(many), plots.plot_precision_recall(many['stage0'], (.1, .3)),
               plots.plot_gradients(pl.DataFrame(dict(step=np.repeat(range(9000), 3), grade=[0, 1, 2] * 9000, share=[1.] * 27_000))),
               plots.plot_separation(pl.concat(f.head(5000).with_columns(step=pl.lit(i)) for i in range(60) for f in [many['stage0']]))]
    assert [size(f) < LIMIT for f in figures] == [True] * len(figures), [size(f) for f in figures]
    assert size(figures[0]) < 40_000
    for figure in figures: assert figure.layout.title.text and figure.layout.title.subtitle.text


def test_texts_from_data_are_escaped_in_figures():
    hostile = '<script>alert(1)</script><b>'
    safe = '&lt;script&gt;alert(1)&lt;/script&gt;&lt;b&gt;'
    points, vectors = cloud(5)
    a = per_query([.1, .2]).with_columns(query=pl.lit(hostile))
    rows = judgments().with_columns(locale=pl.lit(hostile))
    figures = [plots.plot_map(points.with_columns(title=pl.lit(hostile)), vectors, (hostile, vectors[0])),
               plots.plot_query_deltas(a, a, names=(hostile, 'b')), plots.plot_grade_mix(rows),
               plots.plot_judged_per_query(rows), plots.plot_strata({hostile: strata()}),
               plots.plot_training(history().with_columns(name=pl.lit(hostile)), hostile),
               plots.plot_rings(points.with_columns(title=pl.lit(hostile)), vectors, (hostile, vectors[0])),
               plots.plot_ridges({hostile: strata(), 'b': strata()}),
               plots.plot_maps(chosen()[0].with_columns(title=pl.lit(hostile)), {hostile: np.random.default_rng(0).normal(size=(100, 4))})]
    for figure in figures:
        text = json.dumps(figure.to_dict(), default=list, ensure_ascii=False)
        assert '<script>' not in text and safe[:20] in text


def test_figure_text_is_one_short_line():
    assert plots.figure_text('a\n  b\tc') == 'a b c' and plots.figure_text(None) == ''
    assert len(plots.figure_text('x' * 100, 20)) == 20


# In a browser

# What stands outside its figure, and texts that lie on each other; tick labels are plotly's own business.
CROWDED = """() => [...document.querySelectorAll('.plotly-graph-div')].flatMap(figure => {
  const box = figure.getBoundingClientRect(), found = [];
  const texts = [...figure.querySelectorAll('.gtitle, .gtitle-subtitle, .xtitle, .ytitle, .legendtext, .annotation-text, .slider-label')]
    .map(e => [e.textContent, e.getBoundingClientRect()]).filter(([, r]) => r.width > 0);
  for (const [text, r] of texts) if (r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1)
    found.push(`outside: ${text}`);
  texts.forEach(([a, r], i) => texts.slice(i + 1).forEach(([b, s]) => {
    if (Math.min(r.right, s.right) - Math.max(r.left, s.left) > 3 && Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top) > 4)
      found.push(`overlap: ${a} / ${b}`); }));
  return found; })"""


def everything():
    "One figure of each kind, with long titles."
    points, vectors = cloud()
    stages = dict(pretrained=strata(seed=1), stage1=strata(seed=2), stage2=strata(seed=3, grades=(2, 1, 0, -1)))
    values = {s: dict(auc_2=.712, auc_1=.8) for s in stages}
    table = pl.DataFrame(dict(metric=['ndcg@10', 'overlap_2'], difference=[.1, .2], low=[.0, .1], high=[.2, .3], p_corrected=[.01, .2]))
    shares = pl.DataFrame(dict(step=[0, 0, 10, 10], grade=[0, -1] * 2, share=[.6, .4, .1, .9]))
    log = pl.concat([history(), shares.select('step', pl.format('gradient share {}', 'grade').alias('name'), value='share')])
    bins = pl.DataFrame(dict(confidence=[.5, .9], accuracy=[.5, .7], pairs=[10, 90]))
    steps = pl.concat(frame.with_columns(step=pl.lit(100 * i)) for i, frame in enumerate(stages.values()))
    space = np.random.default_rng(0).normal(size=(100, 4))
    return [plots.plot_strata(stages, dict(stage2=[.1, .3]), values), plots.plot_ridges(stages, dict(stage2=[.1, .16]), values),
            plots.plot_separation(steps), plots.plot_gradients(shares), plots.plot_training(log, 'stage 1'),
            plots.plot_grade_mix(judgments()), plots.plot_judged_per_query(judgments()),
            plots.plot_query_deltas(per_query([.1, .2, .3]), per_query([.2, .1, .4]), names=('pretrained', 'stage2')),
            plots.plot_metrics({'stage1 vs pretrained': table, 'stage2 vs pretrained': table}),
            plots.plot_precision_recall(stages['stage2'], (.1, .3)), plots.plot_map(points, vectors, ('wireless headphones', vectors[0])),
            plots.plot_rings(points, vectors, ('wireless headphones for children', vectors[0])),
            plots.plot_maps(chosen()[0], dict(pretrained=space, stage2=space)), plots.plot_confusion(np.eye(3) * 9 + 1, 'the annotator'),
            plots.plot_reliability(dict(raw=bins, calibrated=bins))]


@pytest.fixture(scope='module')
def gallery(tmp_path_factory):
    path = tmp_path_factory.mktemp('gallery') / 'all.html'
    divs = [pio.to_html(f, include_plotlyjs=not i, full_html=False, auto_play=False, config=dict(responsive=True)) for i, f in enumerate(everything())]
    path.write_text('<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><body style="margin:8px">'
                    + ''.join(divs), encoding='utf-8')
    return path


@pytest.mark.parametrize('width', [390, 1200])
def test_nothing_overlaps_or_is_cut_off(gallery, browser, width):
    tab, trouble = browser.new_page(viewport=dict(width=width, height=900)), []
    tab.on('pageerror', lambda error: trouble.append(str(error)))
    tab.goto(gallery.as_uri())
    tab.wait_for_function(f"document.querySelectorAll('.js-plotly-plot .gtitle').length == {len(everything())}")
    assert tab.evaluate(CROWDED) == [] and trouble == []
    tab.close()


def test_the_slider_moves_the_strata(gallery, browser):
    tab = browser.new_page(viewport=dict(width=800, height=900))
    tab.goto(gallery.as_uri())
    tab.wait_for_selector('.slider-group')
    moved = tab.evaluate("""async () => {
      const figure = [...document.querySelectorAll('.plotly-graph-div')].find(f => f.querySelector('.slider-group'));
      const shown = () => [...figure._fullData[4].y], before = shown();
      await Plotly.animate(figure, ['0'], {mode: 'immediate', frame: {duration: 0, redraw: false}, transition: {duration: 0}});
      return [figure._transitionData._frames.length, shown().some((y, i) => y != before[i])]; }""")
    tab.close()
    assert moved == [3, True]
