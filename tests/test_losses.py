"""The graded losses against a slow oracle, published values, and the invariants a graded loss must keep."""
import json
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import softplus

from mine_refine_nb.losses import (LabelAwareSupConLoss, MultiClassCircleLoss, circle_exponent, circle_loss,
                                   circle_terms, circle_z, masked_logsumexp, repeated_products, supcon_loss)

CENTERS = {2: (0.0, 1.0), 3: (0.15, 0.5, 0.85), 4: (0.0, 0.2, 0.6, 0.9), 5: (-0.2, 0.1, 0.4, 0.6, 0.9)}
quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(seed, levels=3, queries=3, products=7, low=-1.0, high=1.0, unjudged=0.3):
    "Random scores, grades and product numbers, with unjudged pairs and repeated products."
    g = torch.Generator().manual_seed(seed)
    scores = low + (high - low) * torch.rand(queries, products, generator=g, dtype=torch.double)
    grades = torch.randint(0, levels, (queries, products), generator=g)
    grades[torch.rand(queries, products, generator=g) < unjudged] = -1
    return scores, grades, torch.randint(0, products, (products,), generator=g)


def row(scores, grades):
    return torch.tensor([scores], dtype=torch.double), torch.tensor([grades])


def gradient(loss, scores, grades):
    scores = scores.clone().requires_grad_()
    return torch.autograd.grad(loss(scores, grades), scores)[0]


# ---- the oracle: what the definitions say, one pair at a time ----

def counted_pairs(scores, grades, unjudged_as_zero, product_ids, limit=math.inf):
    "The (score, grade) pairs of one query that count: each product once, judged columns before unjudged ones, unjudged ones up to a limit."
    pairs, seen = [], set()
    for column in sorted(range(len(grades)), key=lambda c: (grades[c] == -1, c)):
        product = column if product_ids is None else product_ids[column]
        if product in seen: continue
        seen.add(product)
        if grades[column] >= 0: pairs.append((scores[column], grades[column]))
        elif unjudged_as_zero and not scores[column] > limit: pairs.append((scores[column], 0))
    return pairs


def contrast(pairs, weights, temperature, form):
    "Khosla et al.'s L_out or L_in for one query, or None without a positive."
    total = sum(math.exp(s / temperature) for s, _ in pairs)
    positives = [(weights[y], math.exp(s / temperature) / total) for s, y in pairs if y in weights]
    mass = sum(w for w, _ in positives)
    if not positives: return None
    if form == 'in': return -math.log(sum(w * share for w, share in positives) / mass)
    return -sum(w * math.log(share) for w, share in positives) / mass


def slow_supcon(scores, grades, temperature=0.05, positives=None, cumulative=False, boundary_weights=None, form='out',
                unjudged='mask', product_ids=None):
    ids = None if product_ids is None else product_ids.tolist()
    top = len(boundary_weights) if boundary_weights else int(grades.max())
    if cumulative: terms = [({g: 1.0 for g in range(k, top + 1)}, boundary_weights[k - 1] if boundary_weights else 1.0)
                            for k in range(1, top + 1)]
    else: terms = [(positives or {2: 1.0}, 1.0)]
    losses, terms = [], [(weights, share) for weights, share in terms if share]    # a boundary without weight says nothing of what is relevant either
    for s, y in zip(scores.tolist(), grades.tolist()):
        relevant = sorted(x for x, level in zip(s, y) if terms and level in terms[-1][0]) if unjudged == 'guarded' else []
        pairs = counted_pairs(s, y, unjudged != 'mask', ids, relevant[(len(relevant) - 1) // 2] if relevant else math.inf)
        parts = [(share, contrast(pairs, weights, temperature, form)) for weights, share in terms]
        parts = [share * value for share, value in parts if value is not None]
        if parts: losses.append(sum(parts))
    return sum(losses) / len(losses) if losses else 0.0


def sun_double_sum(positives, negatives, low, high, margin, gamma, saturate):
    "log(1 + sum over pairs) in score units, with Sun et al.'s four constants moved to the gap (low, high)."
    d = high - low
    o_p, o_n, delta_p, delta_n = low + d * (1 + margin), low - d * margin, low + d * (1 - margin), low + d * margin
    if saturate: positives, negatives = [min(s, high) for s in positives], [max(s, low) for s in negatives]
    total = 0.0
    for s_p in positives:
        for s_n in negatives:
            exponent = max(s_n - o_n, 0) * (s_n - delta_n) - max(o_p - s_p, 0) * (s_p - delta_p)
            total += math.exp(gamma / d**2 * exponent)
    return math.log1p(total)


def slow_circle(scores, grades, centers, margin, gamma, saturate, form='boundary', weights=1.0, unjudged='mask',
                product_ids=None):
    ids = None if product_ids is None else product_ids.tolist()
    gaps = ([(k - 1, k) for k in range(1, len(centers))] if form == 'boundary' else
            [(b, a) for a in range(len(centers)) for b in range(a)])
    margin, gamma, weights = (list(v) if isinstance(v, (list, tuple)) else [v] * len(gaps)
                              for v in (margin, gamma, weights))
    losses = []
    for s, y in zip(scores.tolist(), grades.tolist()):
        pairs, parts = counted_pairs(s, y, unjudged == 'zero', ids), []
        for (b, a), m, g, w in zip(gaps, margin, gamma, weights):
            up = [x for x, l in pairs if (l >= a if form == 'boundary' else l == a)]
            down = [x for x, l in pairs if (l < a if form == 'boundary' else l == b)]
            if up and down and w: parts.append(w * sun_double_sum(up, down, centers[b], centers[a], m, g, saturate))
        if parts: losses.append(sum(parts))
    return sum(losses) / len(losses) if losses else 0.0


@quick
@example(2, 4, 'out', 'guarded', False, 'lambdas')    # the upper boundary has no weight
@given(seeds, st.integers(2, 5), st.sampled_from(['out', 'in']), st.sampled_from(['mask', 'negative', 'guarded']), st.booleans(),
       st.sampled_from(['plain', 'weighted', 'cumulative', 'lambdas']))
def test_supcon_is_the_double_loop(seed, levels, form, unjudged, with_ids, variant):
    scores, grades, ids = batch(seed, levels)
    options = dict(plain=dict(positives={levels - 1: 1.0}), cumulative=dict(cumulative=True),
                   weighted=dict(positives={g: 1 / (levels - g) for g in range(1, levels)}),
                   lambdas=dict(cumulative=True, boundary_weights=[k % 3 / 2 for k in range(1, levels)]))[variant]
    options |= dict(form=form, unjudged=unjudged, product_ids=ids if with_ids else None)
    expected = slow_supcon(scores, grades, 0.1, **options)
    assert supcon_loss(scores, grades, 0.1, **options).item() == pytest.approx(expected, abs=1e-9)


@quick
@given(seeds, st.integers(2, 5), st.sampled_from(['boundary', 'pair']), st.sampled_from(['mask', 'zero']),
       st.booleans(), st.booleans(), st.booleans())
def test_circle_is_the_double_loop(seed, levels, form, unjudged, with_ids, saturate, per_term):
    scores, grades, ids = batch(seed, levels)
    n = levels - 1 if form == 'boundary' else levels * (levels - 1) // 2
    options = dict(margin=[0.05 + 0.4 * k / n for k in range(n)], gamma=[2.0 + k for k in range(n)],
                   weights=[k % 3 / 2 for k in range(n)]) if per_term else dict(margin=0.25, gamma=8.0)
    options |= dict(saturate=saturate, form=form, unjudged=unjudged, product_ids=ids if with_ids else None)
    expected = slow_circle(scores, grades, CENTERS[levels], **options)
    assert circle_loss(scores, grades, CENTERS[levels], **options).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


# ---- published and recomputed values ----

@pytest.mark.parametrize('margin, gamma, expected', [(0.25, 64, 18.240497592), (0.4, 80, 7.200816742),
                                                     (0.25, 32, 9.147330618)])
def test_circle_reference_two_grades(margin, gamma, expected):
    scores, grades = row([0.8, 0.6, 0.3, 0.5], [1, 1, 0, 0])
    for saturate in (False, True):  # the same: all scores lie between the centres
        value = circle_loss(scores, grades, (0, 1), margin, gamma, saturate).item()
        assert value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize('saturate, expected, z', [(False, 23.759825988, (0.270495, 22.922313)),
                                                   (True, 22.555142476, (-1.334337, 22.321389))])
def test_circle_reference_three_grades(saturate, expected, z):
    scores, grades = row([0.80, 0.55, 0.45, 0.60, 0.20, 0.10], [2, 2, 1, 1, 0, 0])
    assert circle_loss(scores, grades, gamma=32, saturate=saturate).item() == pytest.approx(expected, abs=1e-9)
    found = [circle_z(scores, grades, term, saturate)[0].item() for term in circle_terms(CENTERS[3], gamma=32)]
    assert found == pytest.approx(z, abs=1e-6)


def perfect(n=3):
    return row([0.85] * n + [0.5] * n + [0.15] * n, [2] * n + [1] * n + [0] * n)


def test_circle_reference_perfect_placement():
    scores, grades = perfect()
    plain = circle_loss(scores, grades, gamma=32, saturate=False).item()
    saturated = circle_loss(scores, grades, gamma=32).item()
    assert plain == pytest.approx(1.736601466, abs=1e-9)
    assert saturated == pytest.approx(0.569878880, abs=1e-9)
    assert saturated == pytest.approx(2 * math.log1p(18 * math.exp(-4)), abs=1e-12)
    z = [circle_z(scores, grades, term, False)[0].item() for term in circle_terms(CENTERS[3], gamma=32)]
    assert z == pytest.approx([0.324, 0.324], abs=5e-4)


def test_supcon_reference():
    scores, grades = row([0.9, 0.7, 0.4, 0.2], [2, 2, 0, 0])
    assert supcon_loss(scores, grades, 0.1).item() == pytest.approx(1.133643360, abs=1e-9)
    assert supcon_loss(scores, grades, 0.1, form='in').item() == pytest.approx(0.699862529, abs=1e-9)


def test_cosent_reference():
    "CoSENT is a neighbour, not ours: its sum over pairs of pairs splits into one Z per grade of the lower side."
    scores, grades = row([0.9, 0.5, 0.6, 0.1], [2, 1, 1, 0])
    pairs = [math.exp(20 * (scores[0, j] - scores[0, i])) for i in range(4) for j in range(4)
             if grades[0, i] > grades[0, j]]
    z = [masked_logsumexp(20 * scores, grades == b)[0] + masked_logsumexp(-20 * scores, grades > b)[0] for b in (0, 1)]
    assert math.log1p(sum(pairs)) == pytest.approx(0.003190096, abs=1e-9)
    assert softplus(torch.cat(z).logsumexp(0)).item() == pytest.approx(0.003190096, abs=1e-9)


# ---- invariants 1-4: what the loss reduces to, what does not matter ----

@quick
@given(seeds, st.sampled_from([(0.25, 16.0), (0.4, 80.0), (0.1, 64.0)]))
def test_two_grades_are_the_published_circle_loss(seed, setting):  # invariant 1
    published = pytest.importorskip('pytorch_metric_learning.losses')
    margin, gamma = setting
    scores, grades, _ = batch(seed, 2)
    active = ((grades == 1).any(1) & (grades == 0).any(1)).double()
    theirs = published.CircleLoss(m=margin, gamma=gamma)._compute_loss(scores, (grades == 1).double(),
                                                                     (grades == 0).double())['loss']['losses']
    ours = circle_loss(scores, grades, (0, 1), margin, gamma, saturate=False)
    assert ours.item() == pytest.approx((theirs.sum() / active.sum().clamp(min=1)).item(), rel=1e-6, abs=1e-6)


@quick
@given(seeds, st.floats(0.02, 1.0))
def test_supcon_is_the_published_one(seed, temperature):
    published = pytest.importorskip('pytorch_metric_learning.losses')
    scores, grades, _ = batch(seed, products=9)
    positive, negative = (grades == 2).double(), ((grades == 0) | (grades == 1)).double()
    if not (positive.any() and negative.any()): return  # theirs then gives 0 for the whole batch
    theirs = published.SupConLoss(temperature)._compute_loss(scores, positive, negative)['loss']['losses']
    ours = supcon_loss(scores, grades, temperature)
    assert ours.item() == pytest.approx((theirs.sum() / positive.any(1).sum()).item(), rel=1e-6, abs=1e-6)


@quick
@given(seeds, st.booleans())
def test_pair_form_is_the_boundary_form_for_two_grades(seed, saturate):  # invariant 2
    scores, grades, _ = batch(seed, 2)
    options = dict(centers=(0.2, 0.7), margin=0.3, gamma=20.0, saturate=saturate)
    assert torch.equal(circle_loss(scores, grades, form='pair', **options), circle_loss(scores, grades, **options))


@quick
@given(seeds, st.booleans(), st.floats(-1, 1), st.floats(0.1, 3))
def test_circle_moves_and_stretches_with_its_centres(seed, saturate, shift, stretch):  # invariant 3
    scores, grades, _ = batch(seed)
    two = grades.clamp(max=1)
    low, high = 0.3, 0.3 + stretch
    sun = circle_loss((scores - low) / (high - low), two, (0, 1), gamma=16, saturate=saturate).item()
    assert circle_loss(scores, two, (low, high), gamma=16, saturate=saturate).item() == pytest.approx(sun, rel=1e-9)
    moved = circle_loss(scores + shift, grades, tuple(c + shift for c in CENTERS[3]), saturate=saturate).item()
    assert moved == pytest.approx(circle_loss(scores, grades, saturate=saturate).item(), rel=1e-9, abs=1e-9)


LOSSES = {'supcon': supcon_loss, 'supcon in': lambda s, y, **k: supcon_loss(s, y, form='in', **k),
          'cumulative': lambda s, y, **k: supcon_loss(s, y, cumulative=True, **k), 'circle': circle_loss,
          'plain circle': lambda s, y, **k: circle_loss(s, y, saturate=False, **k),
          'pair circle': lambda s, y, **k: circle_loss(s, y, form='pair', **k)}
every_loss = pytest.mark.parametrize('loss', LOSSES.values(), ids=LOSSES)


@every_loss
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_order_does_not_matter(loss, seed):  # invariant 4
    scores, grades, _ = batch(seed)
    g = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(3, generator=g), torch.randperm(7, generator=g)
    expected = loss(scores, grades).item()
    shuffled = loss(scores[rows][:, columns], grades[rows][:, columns]).item()
    assert shuffled == pytest.approx(expected, rel=1e-12, abs=1e-12)


# ---- invariants 5 and 6: gradients ----

@quick
@given(seeds, st.booleans(), st.sampled_from(['boundary', 'pair']))
def test_circle_pulls_the_top_up_and_pushes_the_bottom_down(seed, saturate, form):  # invariant 5
    scores, grades, _ = batch(seed)
    g = gradient(lambda s, y: circle_loss(s, y, gamma=8, saturate=saturate, form=form), scores, grades)
    assert (g[grades == 2] <= 0).all() and (g[grades == 0] >= 0).all() and (g[grades == -1] == 0).all()
    if saturate:
        beyond = ((grades == 2) & (scores > 0.85)) | ((grades == 0) & (scores < 0.15))
        assert (g[beyond] == 0).all()


def test_a_middle_grade_is_pulled_both_ways():
    def pull(score):
        scores, grades = row([0.85, score, 0.15], [2, 1, 0])
        return -gradient(circle_loss, scores, grades)[0, 1].item()
    assert pull(0.3) > 1 and pull(0.7) < -1 and abs(pull(0.5)) < 0.01


def weight_and_exponent(scores, positive, term, saturate, frozen):
    "Self-paced weights taken from `frozen`, exponents from `scores`; Sun's signs, positives and negatives apart."
    u, still = ((x - term.center) / term.gap for x in (scores, frozen))
    if saturate:
        u, still = (torch.where(positive, x.clamp(max=1), x.clamp(min=0)) for x in (u, still))
    alpha = torch.where(positive, 1 + term.margin - still, still + term.margin).clamp(min=0)
    return alpha, term.gamma * alpha * torch.where(positive, 1 - term.margin - u, u - term.margin)


def frozen_circle(scores, grades, frozen, saturate, gamma):
    "Circle loss of one query with the weights of `frozen` scores, by a plain sum."
    total = 0.0
    for k, term in enumerate(circle_terms(CENTERS[3], gamma=gamma), 1):
        exponent = weight_and_exponent(scores, grades >= k, term, saturate, frozen)[1]
        total += softplus(exponent[grades >= k].logsumexp(0) + exponent[grades < k].logsumexp(0))
    return total


def analytic_circle_gradient(scores, grades, saturate, gamma):
    "The closed form: gamma / gap x sigmoid(Z) x weight x share, up for positives, 0 beyond saturation."
    g = torch.zeros_like(scores)
    for k, term in enumerate(circle_terms(CENTERS[3], gamma=gamma), 1):
        positive, u = grades >= k, (scores - term.center) / term.gap
        alpha, exponent = weight_and_exponent(scores, positive, term, saturate, scores)
        if saturate: alpha = alpha.where(torch.where(positive, u <= 1, u >= 0), 0)
        share = torch.zeros_like(scores)
        for side in (positive, ~positive): share[side] = exponent[side].softmax(0)
        z = exponent[positive].logsumexp(0) + exponent[~positive].logsumexp(0)
        g += (1 - 2 * positive.double()) * gamma / term.gap * z.sigmoid() * alpha * share
    return g


@pytest.mark.parametrize('saturate', [False, True])
@pytest.mark.parametrize('seed', range(4))
def test_circle_gradient_three_ways(seed, saturate):  # invariant 6
    scores, _, _ = batch(seed, queries=1, products=8, low=-0.3, unjudged=0)
    grades = torch.tensor([[2, 2, 2, 1, 1, 0, 0, 0]])
    g = gradient(lambda s, y: circle_loss(s, y, gamma=16, saturate=saturate), scores, grades)[0]
    s, y, h = scores[0], grades[0], 1e-6
    torch.testing.assert_close(g, analytic_circle_gradient(s, y, saturate, 16.0), rtol=1e-9, atol=1e-9)
    steps = torch.eye(8, dtype=torch.double) * h
    frozen = torch.stack([(frozen_circle(s + e, y, s, saturate, 16.0)
                           - frozen_circle(s - e, y, s, saturate, 16.0)) / (2 * h) for e in steps])
    torch.testing.assert_close(g, frozen, rtol=1e-5, atol=1e-5)
    assert g.abs().max() > 1 and g.unique().numel() >= 5  # not vacuous: large, and different from item to item
    free = torch.stack([(circle_loss(scores + e, grades, gamma=16, saturate=saturate)
                         - circle_loss(scores - e, grades, gamma=16, saturate=saturate)) / (2 * h) for e in steps])
    assert (g - free).abs().max() > 0.1  # the weights do change the value: so they were detached, not constant


@quick
@given(seeds)
def test_supcon_gradient(seed):  # invariant 14: the closed form, which sums to zero
    scores, grades, _ = batch(seed, unjudged=0.2)
    weights = {2: 1.0, 1: 0.25}
    g = gradient(lambda s, y: supcon_loss(s, y, 0.2, positives=weights), scores, grades)
    w = sum(v * (grades == k) for k, v in weights.items()).double()
    has = w.sum(1) > 0
    q = (scores / 0.2).masked_fill(grades < 0, -torch.inf).softmax(1)
    expected = ((q - w / w.sum(1, keepdim=True)) / 0.2 / has.sum().clamp(min=1)).where(has[:, None], 0)
    torch.testing.assert_close(g, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(g.sum(1), torch.zeros(3, dtype=torch.double), rtol=0, atol=1e-9)


def test_supcon_central_difference():
    scores, grades, _ = batch(5)
    for kw in (dict(), dict(form='in', positives={1, 2}), dict(cumulative=True, unjudged='negative')):
        f = lambda s: supcon_loss(s, grades, 0.2, **kw)  # noqa: E731
        assert torch.autograd.gradcheck(f, scores.clone().requires_grad_())
        assert gradient(lambda s, y: f(s), scores, grades).abs().max() > 0.1


# ---- invariants 7 and 8: missing grades ----

@every_loss
@pytest.mark.filterwarnings('ignore:Anomaly Detection')
@pytest.mark.parametrize('grades', [[[-1, -1, -1]], [[0, 0, 0]], [[-1, 0, -1]]], ids=['nothing', 'irrelevant', 'one'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nothing_to_learn_is_a_differentiable_zero(loss, grades, dtype):  # invariant 7
    scores = torch.tensor([[0.9, -0.3, 0.2]], dtype=dtype, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):  # refuses NaN even where a later step would hide it
        value = loss(scores, torch.tensor(grades))
        value.backward()
    assert value.item() == 0 and scores.grad.abs().sum() == 0


@every_loss
@pytest.mark.parametrize('shape', [(0, 4), (3, 0), (0, 0)])
def test_an_empty_batch_is_a_differentiable_zero(loss, shape):
    scores = torch.zeros(shape, requires_grad=True)
    value = loss(scores, torch.zeros(shape, dtype=torch.long))
    value.backward()
    assert value.item() == 0 and scores.grad.shape == shape


@every_loss
def test_a_query_without_anything_to_learn_does_not_count(loss):  # invariant 7
    scores, grades = row([0.8, 0.5, 0.1, 0.3], [2, 1, 0, -1])
    empty = torch.tensor([[0, 0, 0, 0], [-1, -1, -1, -1]])
    more = torch.cat([scores, scores + 0.1, scores]), torch.cat([grades, empty])
    assert loss(*more).item() == pytest.approx(loss(scores, grades).item(), rel=1e-12)
    g = gradient(loss, *more)
    assert g.isfinite().all() and (g[1:] == 0).all() and (g[0] != 0).any()


@pytest.mark.parametrize('grade', [0, 1, 2])
def test_circle_of_one_grade_is_zero(grade):  # invariant 7
    scores, grades = row([0.9, 0.1, 0.4], [grade] * 3)
    for form in ('boundary', 'pair'): assert circle_loss(scores, grades, form=form).item() == 0


@quick
@given(seeds, st.booleans())
def test_without_the_middle_grade_two_losses_remain(seed, saturate):  # invariant 8
    scores, grades, _ = batch(seed, 2, unjudged=0)
    lower, upper = (circle_loss(scores, grades, c, saturate=saturate).item() for c in (CENTERS[3][:2], CENTERS[3][1:]))
    both = circle_loss(scores, 2 * grades, saturate=saturate).item()
    assert both == pytest.approx(lower + upper, rel=1e-12, abs=1e-12)


@quick
@given(seeds)
def test_cumulative_supcon_does_not_depend_on_a_grade_that_is_missing(seed):
    scores, grades, _ = batch(seed, 3)
    expected = supcon_loss(scores, grades, cumulative=True).item()
    for more in ([1.0, 1.0], [1.0, 1.0, 1.0, 1.0]):
        value = supcon_loss(scores, grades, cumulative=True, boundary_weights=more).item()
        assert value == pytest.approx(expected, rel=1e-12)


@quick
@given(seeds)
def test_cumulative_supcon_of_two_grades_is_supcon(seed):
    scores, grades, _ = batch(seed, 2)
    torch.testing.assert_close(supcon_loss(scores, grades, cumulative=True), supcon_loss(scores, grades, positives={1}))


# ---- invariants 9-13: the circle loss's value ----

@quick
@given(seeds, st.floats(0, 0.5))
def test_saturated_circle_never_rises_on_the_right_side(seed, step):  # invariant 9
    scores, grades, _ = batch(seed, queries=1)
    before = circle_loss(scores, grades, gamma=16).item()
    for column in range(7):
        direction = {2: 1, 0: -1}.get(grades[0, column].item(), 0)
        moved = scores.clone()
        moved[0, column] += direction * step
        assert circle_loss(moved, grades, gamma=16).item() <= before + 1e-9


def test_plain_circle_does_rise_on_the_right_side():
    "The reason for saturation: without it, moving the best product up raises the loss."
    values = [circle_loss(*row([s, 0.5, 0.15], [2, 1, 0]), gamma=32, saturate=False).item() for s in (0.8, 1.1)]
    assert values[1] > values[0]


@pytest.mark.parametrize('margin, gamma, weights', [(0.25, 32.0, 1.0), ((0.1, 0.4), (64.0, 16.0), (0.5, 2.0))])
def test_perfect_placement_is_the_floor(margin, gamma, weights):  # invariant 9
    scores, grades = row([0.85] * 2 + [0.5] * 3 + [0.15] * 4, [2] * 2 + [1] * 3 + [0] * 4)
    terms = circle_terms(CENTERS[3], margin, gamma, weights)
    floor = sum(t.weight * math.log1p(n * math.exp(-2 * t.gamma * t.margin**2)) for t, n in zip(terms, (5 * 4, 2 * 7)))
    value = circle_loss(scores, grades, CENTERS[3], margin, gamma, weights=weights).item()
    assert value == pytest.approx(floor, abs=1e-12)


@quick
@given(seeds, st.floats(0.05, 0.353), st.booleans())
def test_z_at_or_below_zero_separates(seed, margin, saturate):  # invariant 10
    noise, _, _ = batch(seed, queries=200, products=9, low=-0.15, high=0.15, unjudged=0)
    grades = torch.randint(0, 3, (200, 9), generator=torch.Generator().manual_seed(seed))
    scores = torch.tensor(CENTERS[3], dtype=torch.double)[grades] + noise
    for k, term in enumerate(circle_terms(CENTERS[3], margin, 200.0), 1):
        z, active = circle_z(scores, grades, term, saturate)
        good, threshold = active & (z <= 0), (CENTERS[3][k] + CENTERS[3][k - 1]) / 2
        assert (scores > threshold)[good[:, None] & (grades >= k)].all()
        assert (scores < threshold)[good[:, None] & (grades < k)].all()


def test_z_at_or_below_zero_happens():  # invariant 10 is not vacuous
    scores, grades = perfect()
    assert all(circle_z(scores, grades, term, True)[0] < 0 for term in circle_terms(CENTERS[3], 0.25, 64.0))


@quick
@given(seeds, st.booleans())
def test_circle_is_at_least_its_hardest_pair(seed, saturate):  # invariant 11
    scores, grades, _ = batch(seed, queries=1)
    total = circle_loss(scores, grades, gamma=8, saturate=saturate).item()
    assert total >= 0
    for k, term in enumerate(circle_terms(CENTERS[3], gamma=8), 1):
        z, active = circle_z(scores, grades, term, saturate)
        if not active: continue
        pairs = [sun_double_sum([p], [n], term.center, term.center + term.gap, 0.25, 8, saturate)
                 for p in scores[grades >= k].tolist() for n in scores[(grades < k) & (grades >= 0)].tolist()]
        assert total + 1e-9 >= softplus(z).item() >= max(pairs) - 1e-9


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_stays_finite_and_computes_in_float32(name, dtype):  # invariant 12
    g = torch.Generator().manual_seed(0)
    scores = (2 * torch.rand(4, 64, generator=g) - 1).sign().mul(torch.rand(4, 64, generator=g) ** 0.02)
    scores[0, :32], scores[0, 32:] = 1.0, -1.0
    low = scores.to(dtype).requires_grad_()
    grades = torch.randint(-1, 3, (4, 64), generator=g)
    loss, kw = LOSSES[name], dict(gamma=512.0) if 'circle' in name else dict(temperature=0.01)
    value = loss(low, grades, **kw)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite() and low.grad.isfinite().all() and low.grad.abs().max() > 0
    exact = loss(low.detach().double(), grades, **kw).item()
    assert value.item() == pytest.approx(exact, rel=1e-5)


@every_loss
def test_autocast_does_not_lower_the_precision(loss):
    scores, grades, _ = batch(3)
    exact = loss(scores.float(), grades)
    with torch.autocast('cpu', dtype=torch.bfloat16): value = loss(scores.float(), grades)
    assert value.dtype == torch.float32 and torch.equal(value, exact)


@quick
@given(seeds, st.booleans())
def test_doubling_every_item_adds_two_log_two(seed, saturate):  # invariant 13
    scores, grades, _ = batch(seed)
    twice = torch.cat([scores, scores], 1), torch.cat([grades, grades], 1)
    for term in circle_terms(CENTERS[3]):
        (z, active), (z2, _) = circle_z(scores, grades, term, saturate), circle_z(*twice, term, saturate)
        torch.testing.assert_close(z2[active], z[active] + 2 * math.log(2), rtol=1e-12, atol=1e-12)


# ---- invariant 14: the contrastive loss's value ----

@quick
@given(seeds, st.sampled_from([dict(), dict(positives={1, 2}), dict(positives={2: 1.0, 1: 0.3}),
                               dict(cumulative=True)]))
def test_l_in_is_at_most_l_out(seed, kw):
    scores, grades, _ = batch(seed)
    assert supcon_loss(scores, grades, form='in', **kw) <= supcon_loss(scores, grades, **kw) + 1e-12


@quick
@given(seeds, st.integers(1, 6))
def test_l_out_is_at_least_log_of_the_positives(seed, positives):
    scores, _, _ = batch(seed, queries=1)
    grades = torch.tensor([[2] * positives + [0] * (7 - positives)])
    assert supcon_loss(scores, grades).item() >= math.log(positives) - 1e-12
    alone = supcon_loss(torch.full((1, positives), 0.4), torch.full((1, positives), 2)).item()
    assert alone == pytest.approx(math.log(positives), abs=1e-6)  # equal positives and nothing else: reached


@every_loss
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_masking_is_removing(loss, seed):
    scores, grades, _ = batch(seed, queries=1)
    known = grades[0] >= 0
    removed = loss(scores[:, known], grades[:, known]).item()
    assert loss(scores, grades).item() == pytest.approx(removed, rel=1e-12, abs=1e-12)
    g = gradient(loss, scores, grades)
    assert (g[0][~known] == 0).all()


def test_supcon_does_not_see_a_shift_and_circle_does():
    scores, grades = row([0.7, 0.5, 0.2], [2, 1, 0])
    assert supcon_loss(scores + 0.2, grades).item() == pytest.approx(supcon_loss(scores, grades).item(), abs=1e-9)
    assert abs(circle_loss(scores + 0.2, grades).item() - circle_loss(scores, grades).item()) > 1


# ---- unjudged pairs and repeated products ----

@pytest.mark.parametrize('loss, switch', [(supcon_loss, 'negative'), (circle_loss, 'zero')])
def test_unjudged_can_count_as_irrelevant(loss, switch):
    scores, grades, _ = batch(1)
    assert (grades == -1).any()
    assert torch.equal(loss(scores, grades, unjudged=switch), loss(scores, grades.clamp(min=0)))
    assert not torch.equal(loss(scores, grades, unjudged=switch), loss(scores, grades))


def test_a_guarded_contrast_leaves_out_what_looks_relevant():
    scores, grades = row([.9, .7, .5, .8, .6, .1], [2, 2, 2, -1, -1, -1])
    without = torch.tensor([0, 1, 2, 4, 5])
    assert torch.equal(supcon_loss(scores, grades, unjudged='guarded'), supcon_loss(scores[:, without], grades[:, without], unjudged='negative'))
    pull = gradient(lambda s, y: supcon_loss(s, y, unjudged='guarded'), scores, grades)[0]
    assert pull[3] == 0 and pull[4] > 0 and pull[5] > 0


@pytest.mark.parametrize('loss, switch', [(supcon_loss, 'negative'), (circle_loss, 'zero')])
def test_a_copy_of_a_judged_product_is_no_negative(loss, switch):
    scores, grades = row([0.6, 0.3, 0.6, 0.1, 0.1], [2, 0, -1, -1, -1])
    ids = torch.tensor([10, 11, 10, 12, 12])
    once = row([0.6, 0.3, 0.1], [2, 0, -1])
    with_ids = loss(scores, grades, unjudged=switch, product_ids=ids)
    assert with_ids.item() == pytest.approx(loss(*once, unjudged=switch).item(), rel=1e-12)
    assert with_ids < loss(scores, grades, unjudged=switch)
    g = gradient(lambda s, y: loss(s, y, unjudged=switch, product_ids=ids), scores, grades)
    assert g[0, 2] == 0 and g[0, 4] == 0 and g[0, 0] < 0


def test_a_repeated_judgment_counts_once():
    scores, grades = row([0.6, 0.6, 0.3], [2, 2, 0])
    assert supcon_loss(scores, grades, product_ids=torch.tensor([5, 5, 6])).item() == pytest.approx(
        supcon_loss(scores[:, 1:], grades[:, 1:]).item(), rel=1e-12)


@quick
@given(seeds)
def test_repeated_products_keeps_one_column_each(seed):
    _, grades, ids = batch(seed, products=12)
    repeated = repeated_products(grades, ids)
    for q in range(3):
        for product in ids.unique():
            columns = (ids == product).nonzero().squeeze(1)
            kept = columns[~repeated[q, columns]]
            judged = columns[grades[q, columns] >= 0]
            assert kept.tolist() == [judged[0].item() if len(judged) else columns[0].item()]


def test_distinct_products_change_nothing():
    scores, grades, _ = batch(2)
    assert not repeated_products(grades, torch.arange(7)).any()
    assert torch.equal(circle_loss(scores, grades, product_ids=torch.arange(7)), circle_loss(scores, grades))


# ---- inputs and settings ----

@pytest.mark.parametrize('loss', [supcon_loss, circle_loss])
@pytest.mark.parametrize('change, message', [
    (lambda s, y: (s, y.T), 'share one shape'), (lambda s, y: (s[0], y[0]), 'share one shape'),
    (lambda s, y: (s, y.float()), r'whole numbers.*grades\.long\(\)'), (lambda s, y: (s, y > 0), 'whole numbers'),
    (lambda s, y: (s.long(), y), 'floating point'), (lambda s, y: (s, y - 2 * (y == 0).long()), 'grade -2 at query')])
def test_impossible_batches_are_refused(loss, change, message):
    scores, grades, _ = batch(1)
    with pytest.raises(ValueError, match=message): loss(*change(scores, grades))


def test_a_grade_above_the_levels_is_named():
    scores, grades = torch.zeros(2, 3), torch.tensor([[0, 1, 2], [0, 3, 2]])
    with pytest.raises(ValueError, match='grade 3 at query 1, product 1 .*0 to 2'): circle_loss(scores, grades)
    with pytest.raises(ValueError, match='grade 3 at query 1'):
        supcon_loss(scores, grades, cumulative=True, boundary_weights=[1, 1])
    with pytest.raises(ValueError, match='name it in positives'): supcon_loss(scores, grades)


@pytest.mark.parametrize('settings, message', [
    (dict(centers=(0.5, 0.15, 0.85)), 'ascending'), (dict(centers=(0.5,)), 'two or more'),
    (dict(centers=(0.1, float('nan'), 0.9)), 'ascending'),
    (dict(margin=0.5), 'below 1/2'), (dict(margin=-0.1), 'below 1/2'),
    (dict(margin=(0.1, 0.2, 0.3)), 'margin must be one number or 2'), (dict(gamma=0), 'gamma must be above 0'),
    (dict(gamma=(64,)), 'gamma must be one number or 2'), (dict(weights=-1), 'weights must be 0 or more'),
    (dict(form='triplet'), 'form must be one of'), (dict(form='pair', margin=(0.1, 0.2)), 'one number or 3'),
    (dict(unjudged='negative'), 'unjudged must be one of')])
def test_impossible_circle_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message): MultiClassCircleLoss(**settings)


@pytest.mark.parametrize('settings, message', [
    (dict(temperature=0), 'temperature'),
    (dict(positives={0: 1.0}), '1 or more'), (dict(positives={2: 0.0}), 'weights above 0'),
    (dict(positives=[]), 'positives must'), (dict(positives={2}, cumulative=True), 'leave positives out'),
    (dict(boundary_weights=[1, 1]), 'cumulative=True'), (dict(cumulative=True, boundary_weights=[1, -1]), '0 or more'),
    (dict(cumulative=True, boundary_weights=[]), 'one number'), (dict(form='both'), 'form must be one of'),
    (dict(unjudged='zero'), 'unjudged must be one of')])
def test_impossible_supcon_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message): LabelAwareSupConLoss(**settings)


def test_product_ids_must_name_every_column():
    scores, grades, ids = batch(1)
    with pytest.raises(ValueError, match='each of the 7 columns'): circle_loss(scores, grades, product_ids=ids[:3])


@pytest.mark.parametrize('loss, function, settings', [
    (LabelAwareSupConLoss, supcon_loss,
     dict(temperature=0.1, positives={2: 1.0, 1: 0.5}, form='in', unjudged='negative')),
    (LabelAwareSupConLoss, supcon_loss, dict(cumulative=True, boundary_weights=[0.5, 1.0])),
    (MultiClassCircleLoss, circle_loss, dict(centers=(0.2, 0.4, 0.8), margin=(0.2, 0.3), gamma=32.0, saturate=False)),
    (MultiClassCircleLoss, circle_loss, dict(form='pair', weights=(1, 2, 3), unjudged='zero'))])
def test_modules_hold_the_settings(loss, function, settings):
    scores, grades, ids = batch(4)
    module = loss(**settings)
    again = loss(**json.loads(json.dumps(module.get_config_dict())))
    assert torch.equal(module(scores, grades), function(scores, grades, **settings))
    assert torch.equal(again(scores, grades, ids), function(scores, grades, product_ids=ids, **settings))
    assert settings.items() <= module.get_config_dict().items() and not list(module.parameters())
    assert module.citation.startswith('@') and str(list(settings)[0]) in repr(module)


def test_exponent_is_the_published_one_on_both_sides():
    u = torch.linspace(-1, 2, 31, dtype=torch.double)
    negative, positive = 64 * (u + 0.25).clamp(min=0) * (u - 0.25), -64 * (1.25 - u).clamp(min=0) * (u - 0.75)
    torch.testing.assert_close(circle_exponent(u, 0.25, 64.0, False), negative)
    torch.testing.assert_close(circle_exponent(1 - u, 0.25, 64.0, False), positive)
