"""All arms of the contest get the same, no query is tested by an encoder that saw it, and the verdict counts what it should."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score

from mine_refine_nb import contest
from mine_refine_nb.contest import (ARMS, LOG_ARMS, ClassLabelLoss, Contest, Task, Terms, arm_evaluations, arm_folders, arm_verdicts, asked_only, bench_quality, best_blend, best_rate, common, contest_data, cut_statistic, fold_data, fold_of, main_arm, one_scale,
                                    part_name, rebuild, save_part, searched, train_arm, union, verdicts, with_thresholds, write_results)
from mine_refine_nb.data import query_groups
from mine_refine_nb.machine import write_json
from mine_refine_nb.market import build_market, simulate, true_grades
from mine_refine_nb.metrics import boundary_auc, evaluate
from mine_refine_nb.shoppers import AskedRater
from mine_refine_nb.encoder import Embeddings
from mine_refine_nb.losses import supcon_loss

TERMS = Terms(texts=96, rates=(2e-5,), pairs=12, max_length=16, distractors=20)


@pytest.fixture(scope="module")
def market():
    return simulate(products=200, queries=40, locales=("en",), seed=0)


def vectors(data, seed):
    rng, unit = np.random.default_rng(seed), lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    rows = [unit(rng.normal(size=(n, 8)).astype(np.float32)) for n in (len(data.queries), len(data.products))]
    return Embeddings(data.queries["query_id"].to_list(), rows[0], data.products["product_id"].to_list(), rows[1])


def fake_part(parts, data, arm, fold, seed, objective=0.5, normalised=None):
    part = fold_data(data, fold, 2).split("test")
    one = evaluate(vectors(part, seed), part, "test")
    found = {contest.named(way, kind): one for kind in contest.KINDS for way in ("BM25", "hybrid")}
    found |= {contest.named(way, kind): replace(one, pairs=with_thresholds(one.pairs, one.pairs)) for kind in contest.KINDS for way in contest.WAYS}
    for way in contest.WAYS:
        said = objective if normalised is None or "normalised" not in way else normalised
        found[contest.named(way, "validation")] = replace(one, values=one.values | dict.fromkeys(contest.OBJECTIVE, said))
    return save_part(parts / part_name("market", arm, fold, 0), found, dict(seconds=1.0, texts=10, pairs=20, rate=1e-5, arm=arm))


@pytest.fixture(scope="module")
def parts(market, tmp_path_factory):
    folder = tmp_path_factory.mktemp("contest") / "quality.parts"
    for arm, seed in (("pretrained", 0), ("MNRL", 1), ("ours, stage 1", 2)):
        for fold in (0, 1): fake_part(folder, market, arm, fold, 10 * seed + fold)
    fake_part(folder, market, "CoSENT", 0, 5)    # one fold only
    return folder


def test_every_query_is_tested_once_and_never_trained_on(market):
    tested = []
    for fold in range(5):
        data = fold_data(market, fold)
        sides = {name: set(data.split(name).queries["query_id"]) for name in ("train", "validation", "test")}
        assert not (sides["train"] & sides["test"] or sides["train"] & sides["validation"] or sides["validation"] & sides["test"])
        assert min(map(len, sides.values())) > 0 and len(data.judgments) == len(market.judgments)
        tested += sides["test"]
    assert sorted(tested) == sorted(market.queries["query_id"])


def test_near_duplicates_share_a_fold(market):
    queries = pl.concat([market.queries, market.queries.with_columns(pl.col("query") + "!")])
    fold, group = fold_of(queries), query_groups(queries["query"])
    assert all(len(set(fold[group == g])) == 1 for g in set(group)) and len(set(fold)) == 5
    assert (fold[:len(market.queries)] == fold[len(market.queries):]).all()


def test_long_lists_are_spread_evenly():
    queries = pl.DataFrame({"query": [f"{word} {i * 37}" for i, word in enumerate("ab cd ef gh ij kl mn op qr st uv wx yz za bc de fg hi jk lm".split() * 5)],
                            "locale": "us", "judged": [40] * 20 + [1] * 80})
    counts = np.bincount(fold_of(queries)[:20], minlength=5)
    assert counts.max() - counts.min() <= 2


def test_arms_train_within_the_budget(market, tmp_path):
    data = fold_data(market, 0)
    for arm in ("MNRL", "CircleLoss, class labels", "ours, no mining"):
        task = Task(data, replace(TERMS, texts=600) if arm.startswith("ours") else TERMS, 1e-3, 0, tmp_path, "all-MiniLM-L6-v2", np.linspace(0.2, 0.8, 50))
        before = {name: weight.clone() for name, weight in contest.fresh(task).named_parameters()}
        model, cost = train_arm(arm, task)
        moved = [name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])]
        assert moved and not any("embeddings.word" in name or "layer.0." in name for name in moved), arm
        assert min(cost.values()) > 0 and 0 < task.spent and task.pairs > 0
        if arm != "ours, no mining": assert task.spent <= TERMS.texts and task.pairs == task.spent // 2


@pytest.mark.parametrize("wanted", [(1e-3, 0.5), (2e-3, 1.0)])
def test_validation_chooses_rate_and_average(market, tmp_path, monkeypatch, wanted):
    class Layer(torch.nn.Linear): pass
    monkeypatch.setattr(contest, "fresh", lambda task: Layer(1, 1, bias=False).requires_grad_(True).eval())
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda layer: torch.nn.init.zeros_(layer.weight))
    def train(arm, task):
        model = contest.fresh(task)
        torch.nn.init.constant_(model.weight, 1000 * task.rate)
        return model, dict(seconds=1.0, cpu_seconds=1.0)
    monkeypatch.setattr(contest, "train_arm", train)
    best = 1000 * wanted[0] * wanted[1]
    monkeypatch.setattr(contest, "GradedEvaluator", lambda _: lambda model: {"objective": -abs(model.weight.item() - best - 0.01)})
    model, found = best_rate("MNRL", Task(market, replace(TERMS, rates=(1e-3, 2e-3)), 0, 0, tmp_path, "", np.zeros(0)))
    assert (found["rate"], found["average"]) == wanted and model.weight.item() == pytest.approx(best)
    assert [(one["rate"], one["average"]) for one in found["tried"]] == [(1e-3, 0.5), (1e-3, 1.0), (2e-3, 0.5), (2e-3, 1.0)]


def test_class_labels_are_those_of_the_pairs():
    class Columns(torch.nn.Module):
        def forward(self, features): return {"sentence_embedding": features["x"]}
    seen = {}
    loss = ClassLabelLoss(Columns(), lambda vectors, labels: seen.update(vectors=vectors, labels=labels))
    loss([{"x": torch.tensor([[1.0], [2.0]])}, {"x": torch.tensor([[3.0], [4.0]])}], torch.tensor([[7, 7], [8, 9]]))
    assert seen["vectors"].flatten().tolist() == [1, 2, 3, 4] and seen["labels"].tolist() == [7, 8, 7, 9]


def test_one_scale_changes_no_order_within_a_fold(market):
    pairs = evaluate(vectors(market, 0), market, None).pairs
    scaled = one_scale(pairs)
    assert abs(scaled["score"].mean()) < 1e-9 and abs(scaled["score"].std() - 1) < 1e-9
    assert boundary_auc(scaled["score"], scaled["grade"], 2) == pytest.approx(boundary_auc(pairs["score"], pairs["grade"], 2), abs=1e-12)


def test_an_evaluation_is_rebuilt_from_its_rows(market):
    one = evaluate(vectors(market, 0), market, None)
    again = rebuild(one.per_query, one.pairs, one.definitions)
    assert again.counts == one.counts and again.pairwise["auc_2"] == one.pairwise["auc_2"]
    assert {name: again.values[name] for name in ("ndcg@10", "auc_1", "overlap_2")} == pytest.approx({name: one.values[name] for name in ("ndcg@10", "auc_1", "overlap_2")})


def test_the_union_holds_every_query_once_and_averages_seeds(parts, market):
    folders = arm_folders(parts)["market"]["MNRL"]
    whole = union(folders, "clean")
    assert sorted(whole.per_query["query_id"]) == sorted(market.queries["query_id"])
    twice = union([*folders, *folders], "clean")    # a second seed with the same answers
    assert twice.values["ndcg@10"] == pytest.approx(whole.values["ndcg@10"]) and twice.values["auc_2"] == pytest.approx(whole.values["auc_2"])
    assert len(twice.per_query) == len(whole.per_query) and len(twice.pairs) == 2 * len(whole.pairs)


def test_short_lists_are_asked_in_place_of_long_ones(parts, tmp_path):
    with pytest.raises(ValueError, match="fold 0 · seed 0: every query has a long list"): union(arm_folders(parts)["market"]["MNRL"], "clean", short=True)
    few = pl.read_parquet(arm_folders(parts)["market"]["MNRL"][0] / "clean queries.parquet")["query_id"].head(3).implode()
    for path in Path(shutil.copytree(parts, tmp_path / "q.parts")).glob("*/*.parquet"):
        pl.read_parquet(path).with_columns(listed=~pl.col("query_id").is_in(few)).write_parquet(path)
    folder = arm_folders(tmp_path / "q.parts")["market"]["MNRL"][0]
    short, long = union([folder], "clean", short=True), union([folder], "clean")
    queries, pairs = (pl.read_parquet(folder / f"clean {rows}.parquet").filter(pl.col("query_id").is_in(few)) for rows in ("queries", "pairs"))
    scores = one_scale(pl.read_parquet(folder / "clean pairs.parquet")).filter(pl.col("query_id").is_in(few))["score"]
    assert short.counts == {"queries": 3, "judgments": len(pairs), "min_judged": 1} and long.counts["min_judged"] > 1
    assert short.values["ndcg@10"] == pytest.approx(queries["ndcg@10"].mean()) != long.values["ndcg@10"]
    assert short.values["auc_1"] == pytest.approx(boundary_auc(scores, pairs["grade"], 1))
    write_results(tmp_path / "q.parts", tmp_path / "q.json", n=20, tables={"few": contest.Table("market", short=True)})
    found = json.loads((tmp_path / "q.json").read_text())["few"]["misspelled"]
    assert {found["values"][arm]["queries"] for arm in ("BM25", "MNRL", "blend of MNRL", "hybrid of pretrained")} == {3} and found["verdicts"][""]["p"]


def test_an_arm_that_lacks_a_fold_is_not_compared(parts):
    assert set(common(arm_folders(parts)["market"])) == {"pretrained", "MNRL", "ours, stage 1"}


def test_validation_names_our_main_arm(market, tmp_path):
    for arm, objective in (("ours, stage 1", 0.7), ("ours, no mining", 0.6), ("MNRL", 0.9)): fake_part(tmp_path, market, arm, 0, 0, objective)
    assert main_arm(arm_folders(tmp_path)["market"]) == "ours, stage 1"
    fake_part(tmp_path, market, "ours, no mining", 1, 0, 0.5)    # more folds come first
    assert main_arm(arm_folders(tmp_path)["market"]) == "ours, no mining"


def test_each_way_has_a_main_arm_of_its_own(market, tmp_path):
    for arm, plain, normalised in (("pretrained", 0.5, 0.5), ("ours, stage 1", 0.7, 0.8), ("ours, no mining", 0.75, 0.76)): fake_part(tmp_path / "q.parts", market, arm, 0, 0, plain, normalised)
    write_results(tmp_path / "q.parts", tmp_path / "q.json", n=20)
    found = json.loads((tmp_path / "q.json").read_text())["market"]
    assert found["ours"] == {"": "ours, no mining", "blend": "ours, no mining", "normalised": "ours, stage 1", "normalised blend": "ours, stage 1"}
    assert "normalised of ours, no mining" in found["clean"]["verdicts"]["normalised"]["other"]


def test_verdicts_count_all_comparisons(parts):
    arms = {arm: union(folders, "clean") for arm, folders in common(arm_folders(parts)["market"]).items()}
    table = verdicts(arms, "ours, stage 1", n=100)
    assert set(table["other"]) == {"pretrained", "MNRL"} and {"ndcg@10", "auc_2", "global_f1_1", "global_bacc_2"} <= set(table["metric"])
    assert (table["p_corrected"] >= table["p"] - 1e-12).all() and table["p_corrected"].min() >= min(1, table["p"].min() * len(table)) - 1e-9
    same = verdicts({"a": arms["MNRL"], "ours": arms["MNRL"]}, "ours", n=50)
    assert same["difference"].abs().max() < 1e-12 and same["p"].min() == 1


def test_cuts_are_measured_as_elsewhere(parts):
    pairs = union(arm_folders(parts)["market"]["MNRL"], "clean").pairs
    n = pairs["query_id"].n_unique()
    weights = np.concatenate([np.ones((n, 1)), np.zeros((n, 1))])
    for k in (1, 2):
        for measure, known in (("f1", f1_score), ("bacc", balanced_accuracy_score)):
            assert cut_statistic(pairs, pairs, k, measure)(weights)[0] == pytest.approx(known(pairs["grade"] >= k, pairs[f"above_{k}"]))
    everything = pairs.with_columns(above_2=pl.lit(True))
    assert cut_statistic(everything, everything, 2, "bacc")(weights)[0] == pytest.approx(0.5)


def test_results_are_plain_json(parts, tmp_path):
    rows = write_results(parts, tmp_path / "quality.json", n=20)
    found = json.loads((tmp_path / "quality.json").read_text())["market"]
    assert set(found["ours"].values()) == {"ours, stage 1"} and found["cost"]["MNRL"]["texts"] == 10
    assert {"BM25", "hybrid of pretrained", "MNRL", "normalised blend of MNRL"} <= set(found["clean"]["values"]) and len(rows) == 2 * len(found["clean"]["verdicts"][""]["p"])
    for row in arm_verdicts(found, metrics=("ndcg@10", "auc_1")).iter_rows(named=True):    # verdicts are kept without the values that they are of
        mine, other = (found["clean"]["values"][arm][row["metric"]] for arm in ("ours, stage 1", row["other"]))
        assert row["difference"] == pytest.approx(mine - other, abs=1e-6)
    assert found["clean"]["per_seed"] == {}    # there is one seed
    told = found["validation"]["MNRL"]    # what `main_arm` goes by, part by part
    assert len(told) == found["parts"]["MNRL"] and contest.validated(arm_folders(parts)["market"]["MNRL"], "") == pytest.approx(np.median([*told.values()]), abs=1e-6)
    assert {"global_f1_2", "global_bacc_1"} <= set(found["clean"]["values"]["MNRL"]) and "global_f1_2" not in found["clean"]["values"]["BM25"]


def test_each_seed_has_its_own_values(parts, tmp_path):
    one = contest.table_folders(arm_folders(parts), contest.Table("market"))
    taken = dict(zip(one, [*one][1:] + [*one][:1]))    # with seed 1 every arm has the vectors of another
    for arm, fold in ((arm, fold) for arm in one for fold in (0, 1)):
        for seed, source in enumerate((arm, taken[arm])): shutil.copytree(parts / part_name("market", source, fold, 0), tmp_path / part_name("market", arm, fold, seed))
    told, alone = contest.seed_values(contest.table_folders(arm_folders(tmp_path), contest.Table("market")), "clean"), arm_evaluations(one, "clean")
    assert list(told) == ["0", "1"] and contest.seed_values(one, "clean") == {}
    for seed, source in (("0", {arm: arm for arm in one}), ("1", taken)):
        assert told[seed] == {arm: {metric: alone[source[arm]].values[metric] for metric in contest.OBJECTIVE} for arm in one}


def test_a_table_says_what_it_is_of(tmp_path):
    logged, first = "ours, with a log and memory", "ours, with a log"
    wanted = {"market": {"pretrained": 2, "MNRL": 2, logged: 2, first: 1, "ours, no mining": 1}, "us": {"pretrained": 3, "ours, stage 1": 3, "MNRL": 3, "AnglE": 1, "ours, no mining": 1, "ours, full": 1}, "es+jp": {"pretrained": 3, "ours, stage 1": 3, "AnglE": 1}}
    for dataset, arm, seed in ((dataset, arm, seed) for dataset, arms in wanted.items() for arm, seeds in arms.items() for seed in range(seeds)):
        (tmp_path / part_name(dataset, arm, 0, seed)).mkdir()
        write_json(tmp_path / part_name(dataset, arm, 0, seed) / "numbers.json", dict(values=dict(validation=dict.fromkeys(contest.OBJECTIVE, 0.5))))
    there = arm_folders(tmp_path)
    told = {name: {arm: len(some) for arm, some in contest.table_folders(there, table).items()} for name, table in contest.TABLES.items()}
    assert told["market, with a log"] == {"pretrained": 1, "MNRL": 1, first: 1, logged: 1}    # not `STEPS`
    assert told[contest.LOGGED] == {"pretrained": 1, "MNRL": 1, logged: 1}
    assert told[f"{contest.LOGGED}, seed 1"] == {"pretrained": 1, "MNRL": 1, logged: 1} and told[f"{contest.LOGGED}, seed 2"] == {}
    assert told["market"] == {"pretrained": 1, "MNRL": 1, "ours, no mining": 1}
    assert told["us, mining"] == {"pretrained": 1, "ours, no mining": 1, "ours, full": 1}
    assert told["us, full"] == {"pretrained": 1, "MNRL": 1, "AnglE": 1, "ours, full": 1} == told["us, full, short lists"]
    assert told["us"] == {"pretrained": 1, "ours, stage 1": 1, "MNRL": 1, "AnglE": 1, "ours, no mining": 1} and told["us, three seeds"] == {"pretrained": 3, "ours, stage 1": 3, "MNRL": 3}
    assert told["es+jp"] == {"pretrained": 1, "ours, stage 1": 1, "AnglE": 1} and told["es+jp, three seeds"] == {"pretrained": 3, "ours, stage 1": 3}
    assert told[f"{contest.LOGGED}, three seeds"] == told["market, seeds 1 and 2"] == {}    # there are two
    two = contest.Table("market", True, contest.ASIDE, (0, 1))
    assert {arm: len(some) for arm, some in contest.table_folders(there, two).items()} == {"pretrained": 2, "MNRL": 2, logged: 2}
    assert {arm: len(some) for arm, some in contest.table_folders(there, contest.Table("market")).items()} == {"pretrained": 1, "MNRL": 1, "ours, no mining": 1}    # the seed that all have
    assert contest.table_folders({"market": {arm: some for arm, some in there["market"].items() if arm not in LOG_ARMS}}, contest.TABLES[contest.LOGGED]) == {}


def test_a_table_of_other_parts_stays(parts, tmp_path):
    out = tmp_path / "q.json"
    write_json(out, dict(elsewhere=1, market=2))
    rows = write_results(parts, out, n=20)
    kept = json.loads(out.read_text())
    assert kept["elsewhere"] == 1 and set(kept) == {"elsewhere", "market"} and kept["market"]["ours"] and {row["table"] for row in rows} == {"market"}


def test_a_stopped_contest_loses_one_arm(market, tmp_path, monkeypatch):
    done = []
    def part(data, dataset, arm, fold, seed, backbone, terms, parts):
        if arm == "CoSENT" and "CoSENT" not in done:
            done.append("CoSENT")
            raise KeyboardInterrupt
        done.append((arm, fold))
        made = fake_part(parts, market, arm, fold, fold) / "numbers.json"
        write_json(made, json.loads(made.read_text()) | contest.made_of(data, backbone, terms))
        return dict(objective=0.5, seconds=1.0)
    monkeypatch.setattr(contest, "run_part", part)
    asked = dict(arms=("pretrained", "CoSENT", "ours, stage 1"), folds=(0, 1), seeds=(0,), contests=[Contest("market")], load=lambda *_: market, tell=lambda _: None)
    with pytest.raises(KeyboardInterrupt): bench_quality("", tmp_path / "q.json", **asked)
    assert done == [("pretrained", 0), "CoSENT"]
    monkeypatch.setattr(contest, "write_results", lambda parts, out: sorted(path.name for path in Path(parts).iterdir()))
    assert len(bench_quality("", tmp_path / "q.json", **asked)) == 6
    assert done[2:] == [("CoSENT", 0), ("ours, stage 1", 0), ("pretrained", 1), ("CoSENT", 1), ("ours, stage 1", 1)]
    other = replace(market, products=market.products.with_columns(title=pl.col("title") + "!"))
    with pytest.raises(ValueError, match="was made with other data: choose another --out"): bench_quality("", tmp_path / "q.json", **asked | dict(load=lambda *_: other))
    with pytest.raises(ValueError, match="was made with other backbone, terms"):
        bench_quality("", tmp_path / "q.json", **asked | dict(contests=[Contest("market", "multilingual-e5-small", contest.ROOM)]))
    with pytest.raises(ValueError, match="add the arm 'pretrained'"): bench_quality("", tmp_path / "q.json", **asked | dict(arms=("MNRL",)))


def test_a_part_is_whole_or_absent(tmp_path):
    with pytest.raises(AttributeError): save_part(tmp_path / "part", {"clean": object()}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_changes_the_contrast_of_both_stages_and_nothing_else(market, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(contest, "train_lists", lambda model, task, losses, weights=None, share=1.0, *, recipe, data=None, hard=None: seen.append((losses, weights, share, recipe)))
    task = Task(fold_data(market, 0), TERMS, 1e-3, 0, tmp_path, "all-MiniLM-L6-v2", np.linspace(0.2, 0.8, 50))
    for arm in ("ours, no mining", "ours, both boundaries"): ARMS[arm](contest.fresh(task).eval(), task)
    (plain1, *rest1), (plain2, *rest2), (both1, *more1), (both2, *more2) = seen
    assert rest1[:2] == more1[:2] == [None, 0.5] and rest2[:2] == more2[:2] and rest2[1] == 0.5 and set(plain1) == set(both1) == {"contrast"}
    assert both2["circle"].get_config_dict() == plain2["circle"].get_config_dict()
    assert {(one[2].queries, one[2].products, one[2].memory) for one in (rest1, rest2, more1, more2)} == {(64, 2, 0)}
    scores, grades = torch.rand(3, 6, generator=torch.manual_seed(0)), torch.tensor([[2, 1, 0, -1, 1, 2], [1, 0, 0, 2, -1, -1], [2, 2, 1, 0, 0, 0]])
    for plain, both in ((plain1, both1), (plain2, both2)):
        lower = supcon_loss(scores, grades, plain["contrast"].get_config_dict()["temperature"], positives=(1, 2), unjudged="negative")
        assert both["contrast"](scores, grades).item() == pytest.approx((0.3 * lower + plain["contrast"](scores, grades)).item())


def test_a_log_is_new_queries_with_fallible_grades(market, tmp_path, monkeypatch):
    whole = build_market(200, 120, ("en",), 0)
    data, seen = fold_data(market, 0), []
    monkeypatch.setattr(contest, "whole_market", lambda: whole)
    join = contest.with_mined
    monkeypatch.setattr(contest, "with_mined", lambda data, mined: (seen.append(mined.rows), join(data, mined))[1])
    for arm in ("ours, with a log and memory", "MNRL, then CoSENT, with a log"):
        seen.clear()
        task = Task(data, replace(TERMS, texts=600), 1e-3, 0, tmp_path, "all-MiniLM-L6-v2", np.linspace(0.2, 0.8, 50))
        train_arm(arm, task)
        rows = seen[-1]
        assert 0 < task.spent <= 900 and set(rows["kind"]) == {"annotated"} and not set(rows["query"]) & set(market.queries["query"]), arm
        assert 0.8 < (true_grades(whole, rows) == rows["grade"]).mean() < 0.95
    monkeypatch.undo()
    with pytest.raises(ValueError, match="leave out the arms 'with a log'"): contest.annotated_log(None, task)


def test_learning_rates_share_an_annotator_and_its_labels(market, tmp_path, monkeypatch):
    fitted, asked = [], []

    class Counted(AskedRater):
        def judge(self, pairs): asked.append(pairs.height); return super().judge(pairs)

    rater = Counted(build_market(200, 40, ("en",), 0), contest.PAPER)
    def fit(data, hints, folder, *rest, **more): fitted.append(folder); write_json(folder / contest.ABOUT, {}); return rater
    monkeypatch.setattr(contest, "fit_annotator", fit)
    monkeypatch.setattr(contest, "open_annotator", lambda folder: rater)
    task = Task(fold_data(market, 0), TERMS, 1e-3, 0, tmp_path / "run", "all-MiniLM-L6-v2", np.zeros(0))
    model = contest.fresh(task).eval()
    first, before = contest.mine_annotated(model, task), sum(asked)
    assert contest.mine_annotated(model, task).rows.equals(first.rows) and len(fitted) == 1
    labels, validation = first.rows.filter(kind="annotated"), task.data.split("validation").judgments
    assert before > labels.height > 0 and sum(asked) - before == validation.select("query_id", "product_id").n_unique()    # for the confidence; no candidate again


def test_contests_without_a_log_leave_its_arms_out(market, tmp_path, monkeypatch):
    asked = []
    def run(data, dataset, arm, fold, seed, backbone, terms, parts): asked.append((dataset, arm)); return dict(objective=0.5, seconds=1.0)
    monkeypatch.setattr(contest, "run_part", run)
    monkeypatch.setattr(contest, "write_results", lambda parts, out: [])
    bench_quality("", tmp_path / "quality.json", folds=[0], seeds=[0], load=lambda *_: market, contests=[Contest("us"), Contest("market", log=True)], tell=lambda _: None)
    assert {arm for dataset, arm in asked if dataset == "market"} == set(ARMS | LOG_ARMS)
    assert {arm for dataset, arm in asked if dataset == "us"} == set(ARMS)


def test_every_arm_has_a_name_without_the_separator():
    assert all(" · " not in arm for arm in ARMS | LOG_ARMS)


def test_an_unfinished_fold_waits(parts, market, tmp_path):
    shutil.copytree(parts, tmp_path / "q.parts")
    shutil.copytree(parts / part_name("market", "pretrained", 0, 0), tmp_path / "q.parts" / part_name("market", "pretrained", 2, 0))    # a fold in which ours has not run yet
    found = common(arm_folders(tmp_path / "q.parts")["market"])
    assert {len(folders) for folders in found.values()} == {2} and set(found) == {"pretrained", "MNRL", "ours, stage 1"}


def test_the_blend_is_the_best_of_validation_by_all_three(market, monkeypatch):
    data = fold_data(market, 0)
    tried = pl.DataFrame({"weight": [0.0, 0.5, 1.0], "ndcg@10": [0.9, 0.6, 0.5], "auc_2": [0.5, 0.9, 0.5], "auc_1": [0.5, 0.8, 0.5]})
    monkeypatch.setattr(contest, "fit_blend", lambda rows, data, weights=None: (weights, tried))
    assert best_blend(None, data) == (0.5,)    # NDCG@10 alone would take 0


def test_blends_are_measured_by_thresholds_of_validation_and_not_of_test(market, monkeypatch):
    data, asked = fold_data(market, 0), []
    real = contest.with_thresholds
    monkeypatch.setattr(contest, "with_thresholds", lambda pairs, validation: asked.append(set(validation["query_id"])) or real(pairs, validation))
    monkeypatch.setattr(contest, "encode", lambda model, texts, side: vectors(data, len(texts)).queries[np.arange(len(texts)) % len(data.queries)])
    found = contest.measure_arm(None, data)
    names = {contest.named(way, kind) for kind in contest.KINDS for way in contest.WAYS}
    assert set(found) == names | {contest.named(way, kind) for kind in contest.KINDS for way in ("BM25", "hybrid")} | {contest.named(way, "validation") for way in contest.WAYS}
    validation = set(data.split("validation").queries["query_id"])
    assert len(asked) == 8 and all(queries == validation for queries in asked)
    assert {name for name, one in found.items() if "above_2" in one.pairs.columns} == names


def test_normalised_scores_are_asked_at_normalised_thresholds(market):
    known, asked = (evaluate(vectors(market, seed), market, None) for seed in (0, 1))
    found = contest.both_scales("blend", known, {"clean": asked})
    assert set(found) == {"blend, validation", "blend, clean", "normalised blend, validation", "normalised blend, clean"}
    assert found["blend, validation"] is known and found["normalised blend, clean"].values["ndcg@10"] == asked.values["ndcg@10"]
    for way in ("blend", "normalised blend"):
        one = found[f"{way}, clean"].pairs
        assert one.equals(with_thresholds(one.drop("above_1", "above_2"), found[f"{way}, validation"].pairs))
    assert not found["normalised blend, clean"].pairs["score"].equals(asked.pairs["score"])


def test_ways_are_compared_with_plain_arms_and_with_the_same_way(parts, tmp_path):
    arms = arm_evaluations(common(arm_folders(parts)["market"]), "clean")
    plain = {"pretrained", "MNRL", "ours, stage 1", "BM25"}
    assert set(contest.rivals(arms, "")) == plain | {"hybrid of pretrained", "hybrid of ours, stage 1"}
    for way in contest.WAYS[1:]: assert set(contest.rivals(arms, way)) == plain | {f"{way} of {arm}" for arm in plain - {"BM25"}}


@pytest.fixture(scope="module")
def languages():
    return simulate(products=400, queries=80, locales=("en", "es", "ja"), seed=0)


def test_other_locales_train_and_are_not_asked(languages):
    folded = fold_data(languages, 0)
    asked = asked_only(folded, ("es", "ja"))
    for split in ("validation", "test"):
        assert set(asked.split(split).queries["locale"]) == {"es", "ja"}
        assert set(asked.split(split).queries["query_id"]) == set(folded.split(split).queries.filter(pl.col("locale") != "en")["query_id"])
    assert asked.split("train").judgments.equals(folded.split("train").judgments) and "en" in asked.split("train").judgments["locale"]
    assert asked_only(folded).judgments.equals(folded.judgments)


def test_measuring_leaves_out_what_no_query_finds(languages, market):
    asked = searched(asked_only(fold_data(languages, 0), ("es",)))
    assert set(asked.products["locale"]) == set(asked.judgments["locale"]) == {"es"}
    assert asked.products.equals(languages.products.filter(locale="es"))
    free = replace(languages, products=languages.products.with_columns(locale=pl.when(pl.col("locale") == "en").then(None).otherwise("locale")))
    assert set(searched(asked_only(fold_data(free, 0), ("es",))).products["locale"]) == {None, "es"}    # a product without locale is for all
    whole = searched(fold_data(market, 0))
    assert whole.products.equals(market.products) and len(whole.judgments) == len(market.judgments)


def test_a_contest_asks_its_locales_alone(languages, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(contest, "run_part", lambda data, *_: seen.append(data) or dict(objective=0.5, seconds=1.0))
    monkeypatch.setattr(contest, "write_results", lambda parts, out: [])
    bench_quality("", tmp_path / "q.json", ("pretrained",), [0], [0], [Contest("two", asked=("es", "ja")), Contest("all")], lambda *_: languages, lambda _: None)
    assert [set(data.split("test").queries["locale"]) for data in seen] == [{"es", "ja"}, {"en", "es", "ja"}]
    assert all("en" in data.split("train").judgments["locale"] for data in seen)


def test_each_locale_has_its_numbers(languages, market, tmp_path):
    for arm in ("pretrained", "ours, stage 1"): fake_part(tmp_path / "q.parts", languages, arm, 0, 0)
    write_results(tmp_path / "q.parts", tmp_path / "q.json", n=20)
    found = json.loads((tmp_path / "q.json").read_text())["market"]["clean"]
    assert set(found["per_locale"]["pretrained"]) == {"en", "es", "ja"}
    one = evaluate(vectors(fold_data(languages, 0, 2).split("test"), 0), fold_data(languages, 0, 2).split("test"), "test")
    for locale, values in found["per_locale"]["pretrained"].items():
        assert values["ndcg@10"] == pytest.approx(one.per_locale[locale]["ndcg@10"]) and values["auc_2"] == pytest.approx(one.per_locale[locale]["auc_2"])
    for arm in ("pretrained", "ours, stage 1"): fake_part(tmp_path / "r.parts", market, arm, 0, 0)
    write_results(tmp_path / "r.parts", tmp_path / "r.json", n=20)
    assert json.loads((tmp_path / "r.json").read_text())["market"]["clean"]["per_locale"] == {}    # one locale: the main numbers


def test_a_folder_without_the_locales_is_refused(market, tmp_path):
    market.save(tmp_path / "shop")
    with pytest.raises(ValueError, match="shop: no judgments of es, jp, us"): contest_data(tmp_path / "shop", "us")


def test_a_longer_contest_is_over_the_same_data(monkeypatch):
    asked = []
    monkeypatch.setattr(contest, "simulate", lambda *shape: asked.append(shape))
    for name in ("market", "market, longer"): contest_data("nowhere", name)
    assert len(asked) == 2 and asked[0] == asked[1]
    assert len({one.dataset for one in contest.CONTESTS}) == len(contest.CONTESTS)


def test_the_overview_tells_the_results():
    "The table of the first page has the numbers of the results that the contest's page reads."
    root = Path(__file__).resolve().parent.parent
    found = json.loads((root / "nbs/benchmarks/results/quality.json").read_text())
    overview = (root / "README.md").read_text(encoding="utf-8").split("## Against what people would train otherwise")[1].split("\n\n## ")[0]
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in overview.splitlines() if " · " in line}
    for dataset, told in zip(("us", "us, short lists", "es+jp", "market"), zip(*rows.values()), strict=True):
        one, last = found[f"{dataset}, three seeds" if dataset in ("us", "es+jp") else dataset], [*rows][-1]
        values = one["clean"]["values"] | ({last: found[f"{dataset}, with a log and memory"]["clean"]["values"][last]} if dataset == "market" else {})
        for arm, cell in zip([*[*rows][:-3], one["ours"][""], f"blend of {one['ours']['blend']}", last], told, strict=True):
            if cell == "not measured": assert arm not in values
            else: assert cell == " · ".join(f"{values[arm][name]:.3f}".lstrip("0") for name in ("ndcg@10", "auc_2", "auc_1")), (dataset, arm)


def test_the_overview_tells_what_second_stages_do():
    "The first page's table of second stages has the numbers of the results."
    root = Path(__file__).resolve().parent.parent
    results, overview = json.loads((root / "nbs/benchmarks/results/quality.json").read_text()), (root / "README.md").read_text(encoding="utf-8")
    values, short = (results[name]["clean"]["values"] for name in ("us, mining", "us, mining, short lists"))
    dropped, zero, annotated = (f"{short[arm]['ndcg@10']:.3f}".lstrip("0") for arm in contest.SECOND[1:])
    assert f'"irrelevant" ranks best (NDCG@10 {zero}, dropped {dropped}, re-annotated {annotated})' in overview
    told = overview.split("| second stage |")[1].split("\n\n")[0].splitlines()[2:]
    for line, arm in zip(told, contest.SECOND, strict=True):
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert cells == [f"{values[arm][name]:.3f}".lstrip("0") for name in ("ndcg@10", "ndcg@10_judged", "recall@50", "auc_2", "auc_1")], arm
