"""report.html: complete, offline, and deaf to markup in the data."""
import base64
import dataclasses
import gzip
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest
from plotly.offline import get_plotlyjs

from mine_refine_nb import report

HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)>'
LOCALES = {'us': 12, 'es': 6, 'jp': 6}  # queries


def make_pairs(judged=12):
    ids = [f'{locale}{i}' for locale, n in LOCALES.items() for i in range(n)]
    rng = np.random.default_rng(0)
    return pl.DataFrame(dict(
        query_id=np.repeat(ids, judged), product_id=[f'p{i}' for i in range(len(ids) * judged)],
        locale=np.repeat(list(LOCALES), [n * judged for n in LOCALES.values()]), listed=[True] * len(ids) * judged,
        grade=rng.choice([0, 1, 2], len(ids) * judged)))


def make_evaluation(gap, ndcg, seed):
    "What metrics.Evaluation offers, small."
    rng, pairs = np.random.default_rng(seed), make_pairs()
    pairs = pairs.with_columns(score=.4 + gap * pl.col('grade') + pl.Series(rng.normal(0, .1, len(pairs))))
    per_query = pairs.select('query_id', 'locale').unique(maintain_order=True)
    per_query = per_query.with_columns(
        pl.format('search {} ' + HOSTILE, 'query_id').alias('query'), pl.lit(True).alias('listed'),
        pl.Series('ndcg@10', np.clip(rng.normal(ndcg, .15, len(per_query)), 0, 1)))
    run = pairs.with_columns(rank=pl.col('score').rank('ordinal', descending=True).over('query_id'),
                             grade=pl.when(pl.int_range(pl.len()) % 5 == 0).then(-1).otherwise('grade'))
    values = {'ndcg@10': ndcg, 'auc_2': .6 + gap, 'auc_1': .65 + gap, 'recall@50': float('nan'), 'f1_2': .4321}
    return SimpleNamespace(values=values, pairs=pairs, run=run, per_query=per_query,
                           definitions=dict(overlap='shared area'),
                           per_locale={l: values | dict(queries=n) for l, n in LOCALES.items()},
                           counts=dict(queries=24, judgments=288, min_judged=10))


def make_vectors(spread, seed):
    "What encoder.Embeddings offers, for the pairs above."
    rng, pairs = np.random.default_rng(seed), make_pairs()
    ids = pairs['query_id'].unique(maintain_order=True).to_list()
    queries = np.random.default_rng(9).normal(size=(len(ids), 8))
    far = spread * (3 - pairs['grade'].to_numpy())[:, None]
    return SimpleNamespace(query_ids=ids, queries=queries, product_ids=pairs['product_id'].to_list(),
                           products=np.repeat(queries, 12, 0) + far * rng.normal(size=(len(pairs), 8)))


def make_scale(lower, upper, reads='short'):
    "What thresholds.json has of a stage."
    def row(boundary, by, part, **more): return dict(boundary=boundary, wish='balanced', by=by, part=part, queries=24, wanted=.7512, got=.7345, low=.71, high=.76, reads=reads) | more
    rows = [row(boundary, *part) for boundary in (1, 2) for part in (('all', 'all'), ('locale', HOSTILE), ('category', 'Lamps'))]
    rows.append(row(2, 'locale', 'jp', queries=6, got=None, low=None, high=None, reads='fewer than 10 queries'))
    return {'grade >= 1': dict(threshold=lower), 'grade >= 2': dict(threshold=upper), 'test': rows}


def make_run():
    table = pl.DataFrame({'metric': ['ndcg@10', 'auc_2', 'recall@50'], 'a': [.5512, .63, None], 'b': [.6034, .76, None],
                          'difference': [.0522, .13, None], 'low': [.0111, -.02, None], 'high': [.0931, .28, None],
                          'p': [.0123, .0002, None], 'p_corrected': [.0246, .0511, None]})
    pairs = make_pairs()
    history = pl.DataFrame(dict(step=[*range(40), 0, 20], name=['loss'] * 40 + ['validation ndcg@10'] * 2,
                                value=[1.] * 40 + [.5, .6]))
    data = SimpleNamespace(
        name=f'market {HOSTILE}', judgments=pairs, fingerprint='f00dcafe',
        notes=(dict(what=HOSTILE, count=3, why='no title'),),
        products=pairs.select('product_id', title=pl.format('Lamp {} ' + HOSTILE, pl.int_range(pl.len()))))
    return dict(
        run={'seed': 41, 'preset': 'smoke', HOSTILE: HOSTILE, 'stage2': dict(margin=.25, centers=[.15, .5, .85]),
             'seconds': dict(stage1=31.5, stage2=63.)},
        evaluations=dict(pretrained=make_evaluation(.03, .5512, 1), stage1=make_evaluation(.09, .5777, 2),
                         stage2=make_evaluation(.16, .6034, 3)),
        comparisons={'stage2 vs pretrained': table}, histories=dict(stage1=history, stage2=history), data=data,
        thresholds=dict(stage1=make_scale(.4, .6), stage2=make_scale(.47, .66) | dict(normalised=make_scale(-.1, .05, 'above'))), vectors=dict(pretrained=make_vectors(.7, 1), stage2=make_vectors(.2, 2)),
        mining=dict(found=1234, removed=dict(too_close=77), note=HOSTILE, example=pl.DataFrame(dict(title=[HOSTILE]))))


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    path = report.write_report(tmp_path_factory.mktemp('run') / 'report.html', **make_run())
    return path.read_text(encoding='utf-8')


class Reader(HTMLParser):
    "Text of the page, its tags with attributes, and its scripts."
    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.scripts, self.open = [], [], [], []
        self.feed(page)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs))); self.open.append(tag)
    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag: pass
    def handle_data(self, data): (self.scripts if self.open[-1:] == ['script'] else self.texts).append(data)
    @property
    def text(self): return re.sub(r'\s+', ' ', ' '.join(self.texts))


@pytest.fixture(scope='module')
def reader(page): return Reader(page)


def test_page_loads_nothing_from_anywhere(page, reader):
    loading = [(tag, attrs) for tag, attrs in reader.tags if tag in ('link', 'img', 'iframe', 'object', 'embed', 'base')
               or 'src' in attrs or not attrs.get('href', '#').startswith('#')]
    assert loading == []
    assert "default-src 'none'" in next(a['content'] for t, a in reader.tags if t == 'meta' and 'http-equiv' in a)
    assert '@import' not in page.split('</style>')[0] and 'url(' not in page.split('</style>')[0]


def test_plotly_is_inside_once_and_packed(page, reader):
    packed = [s for s in reader.scripts if len(s) > 1_000_000]
    assert len(packed) == 1 and len(page) < 3_000_000
    assert gzip.decompress(base64.b64decode(packed[0].split("'")[1])).decode() == get_plotlyjs()
    assert sum('Plotly.newPlot' in s and len(s) < 200_000 for s in reader.scripts) == 9
    ids = [a['id'] for t, a in reader.tags if 'id' in a]
    assert len(ids) == len(set(ids))


def figure(reader, name):
    "A figure of the page, as the browser will read it."
    script = next(s for s in reader.scripts if f'newPlot("figure-{name}"' in s)
    return json.loads(script[script.index('{', script.index('newPlot')):script.rindex('})') + 1])


def test_a_figure_is_drawn_at_once_where_plotly_is_there_already():
    "The audit's page may hold plotly.js as it is."
    assert 'typeof draw == "undefined" ? f => f() : draw' in report.embed(go.Figure(), 'x')


def test_ridges_show_every_stage_and_the_thresholds(reader):
    strata = figure(reader, 'strata')
    assert [t['name'] for t in strata['data']] == ['relevant', 'moderate', 'irrelevant', 'median'] * 3
    assert [s['x0'] for s in strata['layout']['shapes']] == [.4, .6, .47, .66]
    assert 'auc_2 0.760' in strata['layout']['annotations'][2]['text']


def test_precision_and_recall_are_those_of_the_last_stage(reader):
    cuts = figure(reader, 'thresholds')
    assert [s['x0'] for s in cuts['layout']['shapes']] == [.47, .66] and cuts['layout']['title']['text'].startswith('From 0.660 on,')
    pairs = make_run()['evaluations']['stage2'].pairs
    passed = pairs.filter(pl.col('score') >= .66)
    share = (passed['grade'] == 2).mean()
    said = int(re.search(r'(\d+)% of what passes', cuts['layout']['title']['text'].replace('<br>', ' '))[1])
    assert abs(said - 100 * share) <= 2


def test_what_the_cuts_promised_and_kept_stands_beside_them(reader):
    rows = report.promise_rows(make_run()['thresholds']['stage2'])
    assert [(row['grade'], row['part'], row['scores'], row['cut']) for row in rows] == [
        (f'≥ {grade}', part, scores, cut) for grade, parts, cuts in (('2', ('all', HOSTILE, 'jp'), ('0.660', '0.050')), ('1', ('all', HOSTILE), ('0.470', '-0.100')))
        for part in parts for scores, cut in zip(('as they are', 'normalised'), cuts)]    # both scales side by side, categories left to the file
    assert rows[0] | dict(measure='balanced accuracy', promised='0.751', kept='0.735', interval='0.710 to 0.760', reads='short', sign='loss') == rows[0]
    assert rows[1]['sign'] == 'gain' and rows[4]['kept'] == '–' and rows[4]['interval'] == '' and rows[4]['reads'] == 'fewer than 10 queries'
    assert [row['scores'] for row in report.promise_rows(make_scale(.4, .6))] == ['as they are'] * 5
    assert 'Promised and kept' in reader.text and reader.text.count('fewer than 10 queries') == 2 and '-0.100' in reader.text and '0.400' not in reader.text


def test_the_map_shows_queries_and_products_of_both_models(reader):
    drawn = figure(reader, 'map')
    assert {a['text'] for a in drawn['layout']['annotations']} == {'<b>pretrained</b>', '<b>stage2</b>'}
    stars = [t for t in drawn['data'] if t['name'] == 'query']
    assert [t['xaxis'] for t in stars] == ['x', 'x2'] and {len(t['text']) for t in stars} == {12}
    titles = [text for t in drawn['data'] if t['name'] in ('relevant', 'moderate', 'irrelevant') for text in t['text']]
    assert titles and all(t.startswith('Lamp') and '<' not in t for t in titles)


def test_hostile_text_is_only_text(reader):
    assert not [t for t, a in reader.tags if any(k.startswith('on') for k in a)]
    assert HOSTILE in reader.text and f'market {HOSTILE}' in reader.text, 'shown as it is, as text'
    assert re.search(r'search \w+ ' + re.escape(HOSTILE), reader.text)
    assert re.search(r'Lamp \d+ ' + re.escape(HOSTILE), reader.text)
    for script in reader.scripts:
        if len(script) < 1_000_000: assert '<script' not in script and 'onerror=alert(2)>' not in script


def test_hostile_query_reaches_the_figures_twice_escaped(reader):
    deltas = next(s for s in reader.scripts if 'figure-deltas' in s)
    assert r'\u0026lt;' in deltas or '&lt;' in deltas.replace(r'\u0026', '&')


def test_metric_table_holds_the_numbers_passed_in(page, reader):
    row = page.split('<th>ndcg@10</th>')[1].split('</tr>')[0]
    for number in ('0.551', '0.578', '0.603', '<b>+0.052</b>', '+0.011 to +0.093', 'p 0.012', '(p 0.025)'):
        assert number in row
    auc = page.split('<th>auc_2</th>')[1].split('</tr>')[0]
    assert '+0.130' in auc and '<b>' not in auc, 'p_corrected .0511 is not significant'
    assert '–' in page.split('<th>recall@50</th>')[1].split('</tr>')[0] and '0.432' in reader.text
    assert not re.search(r'\bnan\b', reader.text)


def test_every_part_is_there(reader):
    for text in ('Scores per grade', 'Thresholds', 'Before and after', 'Lowest ndcg@10', 'Largest losses of ndcg@10', 'Seconds per step', '31.5',
                 'preset smoke', 'centers 0.15, 0.5, 0.85', 'found 1234', 'too_close 77', 'no title', 'f00dcafe',
                 'shared area', 'unjudged', '24 queries with at least 10 judged products'):
        assert text in reader.text, text
    rows = reader.text.split('Locales')[-1]
    assert all(locale in rows for locale in LOCALES)


def test_navigation_leads_somewhere(reader):
    ids = {a.get('id') for _, a in reader.tags}
    links = [a['href'][1:] for t, a in reader.tags if t == 'a']
    assert len(links) == 10 and set(links) <= ids


def test_worst_queries_are_the_worst():
    run = make_run()
    worst = report.worst_queries(run['evaluations'], run['data'].products, count=3, top=4)
    last = run['evaluations']['stage2'].per_query.sort('ndcg@10')
    assert [q['query_id'] for q in worst['Lowest ndcg@10']] == last['query_id'][:3].to_list()
    first = run['evaluations']['pretrained'].per_query
    change = dict((first.join(last, on='query_id').with_columns(d=pl.col('ndcg@10_right') - pl.col('ndcg@10')))
                  .select('query_id', 'd').iter_rows())
    lost = [q['query_id'] for q in worst['Largest losses of ndcg@10']]
    assert lost == sorted((q for q in change if change[q] < 0), key=change.get)[:3]
    products = worst['Lowest ndcg@10'][0]['products']
    assert [p['rank'] for p in products] == [1, 2, 3, 4] and products[0]['title'].startswith('Lamp')
    scores = run['evaluations']['stage2'].run.filter(pl.col('query_id') == last['query_id'][0])
    assert products[0]['product_id'] == scores.sort('score', descending=True)['product_id'][0]


def test_only_listed_queries_count():
    run = make_run()
    for e in run['evaluations'].values():
        e.per_query = e.per_query.with_columns(listed=pl.col('locale') == 'jp')
    worst = report.worst_queries(run['evaluations'], run['data'].products)
    assert {q['locale'] for queries in worst.values() for q in queries} == {'jp'}


def test_parts_without_content_are_left_out(tmp_path):
    run = make_run()
    run['evaluations'] = dict(pretrained=run['evaluations']['pretrained'])
    run |= dict(comparisons={}, histories={}, mining=None, vectors=None, thresholds=None)
    run['evaluations']['pretrained'].pairs = run['evaluations']['pretrained'].pairs.filter(pl.col('grade') < 2)
    run['data'].notes = ()
    run['run'].pop('seconds')
    reader = Reader(report.write_report(tmp_path / 'report.html', **run).read_text(encoding='utf-8'))
    assert {'training', 'mining', 'map', 'thresholds'}.isdisjoint(a.get('id') for _, a in reader.tags)
    assert 'Seconds per step' not in reader.text and 'Nothing.' in reader.text and 'None.' in reader.text


def test_an_interrupted_write_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / 'report.html'
    path.write_text('old')
    def fail(*_): raise OSError('disk full')
    monkeypatch.setattr(Path, 'replace', fail)
    with pytest.raises(OSError, match='disk full'): report.write_report(path, **make_run())
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['report.html']


def test_same_run_same_bytes(tmp_path):
    pages = [report.write_report(tmp_path / f'{i}.html', **make_run()).read_bytes() for i in range(2)]
    assert pages[0] == pages[1]


CUT = '''() => [...document.querySelectorAll('.js-plotly-plot')].flatMap(box => [...box.querySelectorAll('.gtitle, .gtitle-subtitle')]
  .filter(t => t.getBoundingClientRect().right > box.getBoundingClientRect().right).map(t => t.textContent))'''


def test_page_in_a_browser(browser, tmp_path):
    path = report.write_report(tmp_path / 'report.html', **make_run())
    trouble, requests = [], []
    tab = browser.new_page(viewport=dict(width=390, height=800), color_scheme='dark')
    tab.on('pageerror', lambda error: trouble.append(str(error)))
    tab.on('console', lambda message: trouble.append(message.text) if message.type == 'error' else None)
    tab.on('dialog', lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
    tab.on('request', lambda request: requests.append(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_function("document.querySelectorAll('.js-plotly-plot .gtitle').length >= 9")
    width, background = tab.evaluate(
        '[document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor]')
    titles = tab.locator('.gtitle').all_text_contents()
    cut = tab.evaluate(CUT)
    tab.close()
    assert trouble == [] and [r for r in requests if not r.startswith('blob:')] == [path.as_uri()]
    assert cut == [], 'titles that the phone cuts off'
    assert width == 390, 'wider than the phone: the page scrolls sideways'
    assert background == 'rgb(20, 23, 26)', 'dark where the reader asks for dark'
    assert len([t for t in titles if t.startswith('A relevant product outscores')]) == 1 and len(titles) == 9


def test_nested_values_are_shown_in_full_or_say_what_is_missing():
    @dataclasses.dataclass
    class Mining:
        filters: pl.DataFrame
        settings: dict
    shown = report.plain(Mining(pl.DataFrame(dict(removed=range(60))), dict(k=50, half=True, none=None)))
    text = Reader(str(report.environment().get_template('macros').module.nested(shown))).text
    assert 'and 10 more rows' in text and 'half yes' in text and 'none –' in text
    assert ' 49 ' in text and ' 50 and' not in text
