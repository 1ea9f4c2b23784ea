"""Figures show what the frames hold, in constant colours, and stay small."""
import itertools
import json

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
    assert set(bundles[0]) == {'application/vnd.plotly.v1+json', 'text/html'}
    assert bundles[0] == bundles[1]
    assert len(json.dumps(bundles[0])) < 40_000


def test_two_displays_of_one_figure_get_two_places():
    renderer, figure = plots.LightRenderer(), go.Figure().to_dict()
    assert renderer.to_mimebundle(figure)['text/html'] != renderer.to_mimebundle(figure)['text/html']


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
    assert titles[0] == '<b>a</b>' and 'auc_2 0.712 · auc_1 0.800' in titles[1]


@pytest.mark.parametrize('frame, message', [
    (pl.DataFrame(dict(grade=[1])), r'missing column\(s\) score'),
    (pl.DataFrame(dict(grade=[1], score=[float('nan')])), 'not finite'),
    (pl.DataFrame(schema=dict(grade=pl.Int8, score=pl.Float32)), 'no pairs'),
])
def test_strata_refuse(frame, message):
    with pytest.raises(ValueError, match=message): plots.plot_strata(dict(a=frame))


# Training

def history(steps=400):
    return pl.DataFrame(dict(step=[*range(steps), 0, 100], name=['loss'] * steps + ['ndcg@10'] * 2,
                             value=[1.] * steps + [.5, .6]))


def test_training_puts_loss_above_validation():
    figure = plots.plot_training(history(), 'stage 1')
    loss = [t for t in figure.data if t.name == 'loss']
    ndcg = [t for t in figure.data if t.name == 'ndcg@10']
    assert len(loss) == 2 and {t.yaxis for t in loss} == {'y'}, 'raw and running mean'
    assert len(ndcg) == 1 and ndcg[0].yaxis == 'y2'
    assert np.allclose(ndcg[0].y, [.5, .6]) and list(ndcg[0].x) == [0, 100]
    assert 'stage 1' in figure.layout.title.text


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


def test_judged_per_query_counts_queries():
    figure = plots.plot_judged_per_query(judgments())
    bars = {t.name: dict(zip(t.x, t.y)) for t in figure.data}
    assert bars['us'] == {1: 0, 2: 0, 3: 1} and bars['es'][2] == 1 and bars['no locale'][1] == 1
    assert '3 queries, median 2' in figure.layout.title.subtitle.text


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
    assert '2 queries gain, 1 lose, 1 unchanged; mean +0.1000' in figure.layout.title.subtitle.text.replace('<br>', ' ')
    assert figure.layout.title.text == 'ndcg@10 per query: new vs old'


def test_query_deltas_leave_out_undefined_queries_and_keep_the_ends():
    values = np.linspace(-1, 1, 2001)
    figure = plots.plot_query_deltas(per_query([0.] * 2001 + [float('nan'), None]), per_query([*values, .3, .3]))
    shown = np.concatenate([t.y for t in figure.data])
    assert len(shown) == 240 and shown[0] == -1 and shown[-1] == 1
    assert '1,000 queries gain, 1,000 lose, 1 unchanged' in figure.layout.title.subtitle.text.replace('<br>', ' ')


def test_query_deltas_refuse_different_queries():
    with pytest.raises(ValueError, match='different queries'):
        plots.plot_query_deltas(per_query([.1, .2]), per_query([.1]))


def test_metrics_show_interval_and_significance():
    table = pl.DataFrame(dict(metric=['ndcg@10', 'auc_2', 'auc_1'], difference=[.02, -.01, .01], low=[.01, -.03, None],
                              high=[.05, .01, None], p_corrected=[.01, .4, None]))
    trace, = plots.plot_metrics({'b vs a': table}).data
    assert list(trace.y) == ['ndcg@10', 'auc_2', 'auc_1'] and np.allclose(trace.x, [.02, -.01, .01])
    assert np.allclose(trace.error_x.array[:2], [.03, .02]) and np.allclose(trace.error_x.arrayminus[:2], [.01, .02])
    assert list(trace.marker.symbol) == ['circle', 'circle-open', 'circle-open']


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
    again = plots.plot_map(points, vectors, ('a query', vectors[0]), cap=judged + 5)
    assert pio.to_json(figure) == pio.to_json(again)


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
               plots.plot_map(points.with_columns(title=pl.lit('a long title ' * 20)), vectors)]
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
               plots.plot_training(history().with_columns(name=pl.lit(hostile)), hostile)]
    for figure in figures:
        text = json.dumps(figure.to_dict(), default=list, ensure_ascii=False)
        assert '<script>' not in text and safe[:20] in text


def test_figure_text_is_one_short_line():
    assert plots.figure_text('a\n  b\tc') == 'a b c' and plots.figure_text(None) == ''
    assert len(plots.figure_text('x' * 100, 20)) == 20
