"""`mine-refine` as a user meets it: a whole run, what it leaves behind, and what it says to mistakes."""
import json
import re
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from sentence_transformers import SentenceTransformer

from mine_refine_nb import cli, pipeline
from mine_refine_nb.data import load_data, query_ids
from mine_refine_nb.market import build_market
from mine_refine_nb.mining import Mined
from mine_refine_nb.pipeline import HEADLINE, Request, open_run, run_mining
from mine_refine_nb.widgets import open_review
from shell import COMMAND, call, start

ESCI = Path(__file__).resolve().parents[2] / "shared" / "data" / "esci"
SMOKE = ["--preset", "smoke", "--backbone", "all-MiniLM-L6-v2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "market"
    done = start("run", "market", "--out", out, *SMOKE)
    assert "stage2" in done.stdout and str(out / "report.html") in done.stdout.replace("\n", "")
    return out


def test_a_run_leaves_what_the_contract_names(folder):
    for name in ("run.json", "metrics.json", "report.html", "mined.parquet", "thresholds.json", "stage1", "model", "annotator", "annotator.json", "labels.db"):
        assert (folder / name).exists(), name
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("checkpoint-*"))
    metrics = json.loads((folder / "metrics.json").read_text())
    for stage in ("pretrained", "stage1", "stage2"):
        assert set(HEADLINE) <= set(metrics[stage]) and set(metrics[stage]["per_locale"]) == {"en", "es", "ja"}
        assert all(0 <= metrics[stage][name] <= 1 for name in HEADLINE)
    rows = metrics["comparisons"]["stage2 vs pretrained"]
    for row in rows:
        assert row["difference"] == pytest.approx(metrics["stage2"][row["metric"]] - metrics["pretrained"][row["metric"]])
    assert "gains" in json.dumps(metrics["definitions"])
    record = json.loads((folder / "run.json").read_text())
    assert record["request"]["seed"] == 0 and len(record["seconds"]) == 9 and record["versions"]["torch"]
    thresholds = json.loads((folder / "thresholds.json").read_text())
    assert thresholds["stage2"]["grade >= 1"]["threshold"] <= thresholds["stage2"]["grade >= 2"]["threshold"] + 0.2
    for stage in ("pretrained", "stage1", "stage2"):
        normed = thresholds[stage]["normalised"]
        assert 0 <= normed["norm"]["share"] <= 1 and {"grade >= 1", "grade >= 2", "calibrator", "test"} <= set(normed)
    page = (folder / "report.html").read_text(encoding="utf-8")
    told = page[page.index("Promised and kept"):page.index('<h2 id="metrics">')]
    assert all(f'{scale["grade >= 2"]["threshold"]:.3f}' in told for scale in (thresholds["stage2"], thresholds["stage2"]["normalised"]))


def test_the_annotator_is_measured_beside_what_costs_nothing(folder):
    rows = {row["annotator"]: row for row in json.loads((folder / "metrics.json").read_text())["annotator"]}
    name = json.loads((folder / "annotator" / "annotator.json").read_text())["name"]
    assert set(rows) == {name, "cosine of stage 1", "majority"} and rows["majority"]["kappa"] == 0
    facts = json.loads((folder / "annotator.json").read_text())
    assert sum(map(sum, facts["confusion"])) == rows[name]["pairs"] and facts["mined negatives"]["judged by people"] > 0
    assert sum(facts["mined negatives"][f"grade {grade}"] for grade in range(3)) == pytest.approx(1)
    assert "Who graded the mined pairs" in (folder / "report.html").read_text(encoding="utf-8")


def stopped(folder: Path, out: Path, step: str, **asked) -> Path:
    "A copy of a run as it was before a step, asked for something else from there on."
    shutil.copytree(folder, out)
    record = json.loads((out / "run.json").read_text())
    steps = list(record["seconds"])
    record["seconds"] = {name: record["seconds"][name] for name in steps[:steps.index(step)]}
    record["request"] |= asked
    (out / "run.json").write_text(json.dumps(record))
    return out


@pytest.fixture(scope="module")
def dropped(folder, tmp_path_factory):
    "A run in which nobody annotates."
    out = stopped(folder, tmp_path_factory.mktemp("runs") / "dropped", "annotator", annotator="none")
    shutil.rmtree(out / "annotator")
    for name in ("annotator.json", "labels.db", "mined.parquet"): (out / name).unlink()
    call("run", "market", "--out", out, *SMOKE, "--annotator", "none", "--resume")
    return out


def test_brackets_in_titles_and_cells_are_printed():
    with cli.OUT.capture() as said: cli.print_table([{"product": "tea pot [new]"}], "runs/[old]")
    assert "tea pot [new]" in said.get() and "runs/[old]" in said.get()


def test_mined_pairs_can_be_dropped(dropped):
    rows = pl.read_parquet(dropped / "mined.parquet").filter(pl.col("kind").is_in(["pending", "annotated"]))
    assert rows["kind"].unique().to_list() == ["pending"] and not (dropped / "annotator.json").exists()


def test_mined_pairs_can_be_taken_for_irrelevant(dropped, tmp_path):
    shutil.copytree(dropped, tmp_path / "run")
    run = open_run(tmp_path / "run", Request("market", "smoke", "all-MiniLM-L6-v2", annotator="none"), resume=True, progress=False)
    run.request = replace(run.request, annotator="zero")
    run_mining(run)
    rows = pl.read_parquet(tmp_path / "run" / "mined.parquet").filter(kind="annotated")
    pending = pl.read_parquet(dropped / "mined.parquet").filter(kind="pending")
    assert rows.height == pending.height > 0 and rows["grade"].unique().to_list() == [0]
    assert rows["source"].unique().to_list() == ["taken for irrelevant"]


def test_a_log_is_mined_graded_and_trained_on(folder, tmp_path, monkeypatch):
    "The annotator of a smoke run is sure of nothing; here its labels count all the same."
    asked = build_market(240, 120, seed=0).data.queries.select("query", "locale")
    asked.write_csv(tmp_path / "log.csv")
    out, seen = stopped(folder, tmp_path / "run", "mine", log=str(tmp_path / "log.csv")), {}
    kept = json.loads((out / "annotator.json").read_text())
    (out / "annotator.json").write_text(json.dumps(kept | {"confidence": 0.0}))
    train = pipeline.train_stage2
    monkeypatch.setattr(pipeline, "train_stage2", lambda model, data, *rest, **more: (seen.update(data=data, recipe=rest[3]), train(model, data, *rest, **more))[1])
    said = call("run", "market", "--out", out, *SMOKE, "--log", tmp_path / "log.csv", "--resume").stdout
    rows, data = Mined.load(out / "mined_log.parquet").rows, open_run(out, Request("market", "smoke", "all-MiniLM-L6-v2", log=str(tmp_path / "log.csv")), resume=True).data
    held = set(data.judgments.filter(pl.col("split") != "train")["query"])
    assert set(rows["query"]) <= set(asked["query"]) - set(data.judgments["query"]) and not set(rows["query"]) & held
    assert seen["recipe"].memory == 2048 and seen["recipe"].boundaries == (1.0, 1.0)
    assert set(rows["kind"]) == {"annotated"} and f"log: {len(rows):,} of {len(rows):,} candidates" in said
    joined = rows.join(seen["data"].judgments, on=["query_id", "product_id", "grade"], how="semi")
    assert len(joined) == len(rows) and set(seen["data"].judgments.filter(pl.col("query_id").is_in(rows["query_id"].to_list()))["split"]) == {"train"}
    assert json.loads((out / "metrics.json").read_text())["log"] == dict(queries=rows["query_id"].n_unique(), candidates=len(rows), graded=len(rows))


def test_a_file_of_mined_pairs_is_annotated_once(folder, dropped, tmp_path):
    out = tmp_path / "labels.csv"
    arguments = ["annotate", dropped / "mined.parquet", "--data", dropped / "data", "--model", folder / "annotator", "--out", out]
    call(*arguments)
    labels, pending = pl.read_csv(out), pl.read_parquet(dropped / "mined.parquet").filter(kind="pending")
    assert labels.height == pending.height and labels["grade"].is_in([0, 1, 2]).all()
    assert labels.select("p0", "p1", "p2").sum_horizontal().is_between(0.999, 1.001).all()
    first, kept = out.read_bytes(), sqlite3.connect(out.with_suffix(".db")).execute("SELECT count(*), max(at) FROM labels").fetchone()
    call(*arguments)
    assert out.read_bytes() == first
    assert sqlite3.connect(out.with_suffix(".db")).execute("SELECT count(*), max(at) FROM labels").fetchone() == kept


def test_pairs_that_cannot_be_annotated_are_explained(folder, tmp_path):
    pl.DataFrame({"query": ["pen"], "product_id": ["nowhere"]}).write_csv(tmp_path / "pairs.csv")
    given = ["annotate", tmp_path / "pairs.csv", "--model", folder / "annotator", "--out", tmp_path / "x.csv"]
    assert "query and title" in call(*given, code=2).stderr
    assert "nowhere" in call(*given, "--data", folder / "data", code=2).stderr
    pl.DataFrame({"query": ["pen", "pen"], "title": ["Blue pen", None]}).write_csv(tmp_path / "pairs.csv")
    pl.read_parquet(folder / "mined.parquet").filter(pl.col("kind") != "pending").write_parquet(tmp_path / "graded.parquet")
    assert "no pair to annotate" in call(given[0], tmp_path / "graded.parquet", *given[2:], code=2).stderr
    assert ".parquet or .csv" in call(*given[:-1], tmp_path / "x.txt", code=2).stderr
    assert "the product has no title" in call(*given).stdout and pl.read_csv(tmp_path / "x.csv")["grade"].null_count() == 1


@pytest.mark.slow
def test_a_saved_annotator_serves_another_run_and_none_is_trained_over_it(folder, tmp_path):
    assert "already holds an annotator" in call("train-annotator", "market", "--out", folder / "annotator", code=2).stderr
    done = call("run", "market", "--out", tmp_path / "second", *SMOKE, "--annotator", folder / "annotator")
    assert "stage2" in done.stdout and not (tmp_path / "second" / "annotator").exists()
    mine, theirs = (json.loads((run / "annotator.json").read_text()) for run in (tmp_path / "second", folder))
    assert mine["name"] == theirs["name"] and mine["confusion"] == theirs["confusion"]


def test_both_models_load_plainly_and_differ(folder):
    first, second = (SentenceTransformer(str(folder / name)) for name in ("stage1", "model"))
    assert first.encode_query(["phone case"]).shape == second.encode_query(["phone case"]).shape == (1, 384)


def test_a_finished_run_is_not_repeated(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "run.json"}
    done = call("run", "market", "--out", folder, *SMOKE, "--resume")
    assert done.stderr.count("done before") == 9 and "stage2" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_stopped_run_goes_on(folder):
    record = json.loads((folder / "run.json").read_text())
    del record["seconds"]["report"]
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.json").unlink()
    done = call("run", "market", "--out", folder, *SMOKE, "--resume")
    assert done.stderr.count("done before") == 8 and (folder / "metrics.json").exists()


def test_a_folder_in_use_is_not_overwritten(folder):
    assert "--resume" in call("run", "market", "--out", folder, *SMOKE, code=2).stderr
    assert "seed" in call("run", "market", "--out", folder, *SMOKE, "--resume", "--seed", 1, code=2).stderr


def test_search_answers_with_scores_and_verdicts(folder):
    shown = call("search", folder, "phone case", "-k", 3, "--locale", "en").stdout
    assert "verdict" in shown and "case" in shown.lower()
    assert call("search", folder / "model", "phone case", "-k", 3, "--locale", "en").stdout == shown
    normed = call("search", folder, "phone case", "-k", 3, "--locale", "en", "--normalised").stdout
    assert normed != shown and len(ids := re.findall(r"p\d{5}", shown)) == 3 and re.findall(r"p\d{5}", normed) == ids
    assert "holds no run" in call("search", folder / "nothing", "x", code=2).stderr
    assert "empty" in call("search", folder, " ", code=2).stderr


def test_simulate_then_evaluate(tmp_path):
    made = call("simulate", tmp_path / "market", "--products", 200, "--queries", 48, "--locales", "en,es", "--sessions", 500).stdout
    told = dict(line.split() for line in made.splitlines() if ".parquet" in line)
    files = {file.name: str(pl.read_parquet(file).height) for file in (tmp_path / "market").iterdir()}
    assert told == files and files["products.parquet"] == "200" and {"judgments.parquet", "engagement.parquet", "truth.parquet"} <= set(files)
    judged, truth = (pl.read_parquet(tmp_path / "market" / f"{name}.parquet") for name in ("judgments", "truth"))
    ids = judged.with_columns(query_ids(judged))
    assert ids.join(truth, on=["query_id", "product_id", "grade"]).height == ids.height    # nobody errs unless asked to
    assert "not empty" in call("simulate", tmp_path / "market", code=2).stderr
    call("evaluate", "all-MiniLM-L6-v2", tmp_path / "market", "--json", tmp_path / "numbers.json")
    assert "no split 'tset'" in call("evaluate", "all-MiniLM-L6-v2", tmp_path / "market", "--split", "tset", code=2).stderr
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert set(HEADLINE) <= set(numbers) and set(numbers["per_locale"]) == {"en", "es"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A simulated shop with one fallible rater per pair and a log."
    folder = tmp_path_factory.mktemp("shops") / "shop"
    call("simulate", folder, "--products", 450, "--queries", 60, "--raters", 1, "--sessions", 15_000, "--seed", 3)
    return folder


def wrong_grades(folder) -> int:
    "How many grades of a data folder are not the truth."
    data, truth = load_data(folder), pl.read_parquet(folder.parent / "shop" / "truth.parquet").select("query_id", "product_id", true="grade")
    both = data.judgments.join(truth, on=["query_id", "product_id"])
    assert both.height == data.judgments.height
    return (both["grade"] != both["true"]).sum()


def test_audit_review_and_correct(shop, tmp_path):
    "As a shop would: audit, look at the worst claims, correct, and audit again."
    out, fixed = tmp_path / "audit", shop.parent / "fixed"
    told = call("audit", shop, "--out", out).stdout
    numbers, queue = json.loads((out / "audit.json").read_text()), pl.read_parquet(out / "queue.parquet")
    for name in ("judgments", "doubted", "by two grades"): assert re.search(rf"{name} +{numbers[name]} *\n", told), told
    assert str(out / "audit.html") in told.replace("\n", "") and (out / "audit.html").exists() and queue.height == numbers["doubted"] > 15
    truth, review = pl.read_parquet(shop / "truth.parquet"), open_review(queue.head(12), tmp_path / "review", "eve")
    while (row := review.current) is not None: review.grade(truth.filter(query_id=row["query_id"], product_id=row["product_id"])["grade"].item())
    said = call("correct", shop, tmp_path / "review", "--out", fixed).stdout
    changed = review.progress["changed"]
    assert changed > 6 and f"{changed} of its grades are corrected" in said and wrong_grades(fixed) == wrong_grades(shop) - changed
    call("audit", fixed, "--out", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "audit.json").read_text())["doubted"] < numbers["doubted"]
    assert "not fit" in call("correct", fixed, tmp_path / "review", "--out", tmp_path / "twice", code=2).stderr and not (tmp_path / "twice").exists()


def test_logs_that_cannot_be_audited_are_explained_in_one_line(shop, tmp_path):
    log = pl.read_parquet(shop / "engagement.parquet")
    bad, bare, out = tmp_path / "bad.csv", tmp_path / "bare", tmp_path / "out"
    log.with_columns(clicks=pl.when(pl.int_range(pl.len()) == 6).then(pl.col("impressions") + 1).otherwise("clicks")).write_csv(bad)
    bare.mkdir()
    for name in ("products", "judgments"): shutil.copy(shop / f"{name}.parquet", bare)
    for arguments, says in [((bare,), "has no engagement file"), ((shop, "--engagement", tmp_path / "nowhere.csv"), "nowhere.csv is no file"),
                            ((shop, "--engagement", bad), "row 7: clicks exceed impressions")]:
        said = call("audit", *arguments, "--out", out, code=2).stderr
        assert said.startswith("error: ") and says in said and said.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize("arguments, says", [
    (["run", "nowhere", "--out", "x"], "nowhere"),
    (["run", "market", "--out", "x", "--backbone", "e5-smal"], "packaged ones are"),
    (["run", "market", "--out", "x", "--annotator", "crss"], "choose one of cross, llm, none, zero"),
    (["run", "market", "--out", "x", "--log", "queries.csv", "--annotator", "none"], "a log needs somebody who grades it"),
    (["run", "market", "--out", "x", "--log", "queries.csv"], "queries.csv is no file"),
    (["annotate", "nowhere.csv", "--model", "x", "--out", "y.csv"], "nowhere.csv is no file"),
    (["evaluate", "all-MiniLM-L6-v2", "nowhere"], "nowhere"),
    (["simulate", "x", "--locales", "en,fr"], "fr"),
    (["simulate", "x", "--raters", "99"], "from 1 to the 7 raters"),
    (["simulate", "x", "--sessions", "-1"], "sessions is -1"),
    (["audit", "nowhere", "--out", "x"], "nowhere is not a folder"),
    (["correct", "nowhere", "corrections.parquet", "--out", "x"], "nowhere is not a folder"),
])
def test_mistakes_end_in_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call(*arguments, code=2).stderr
    assert said.startswith("error: ") and says in said and said.count("\n") == 1 and not (tmp_path / "x").exists()


def test_broken_data_is_named_and_nothing_is_written(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    pl.DataFrame({"product_id": ["1", "2"], "title": ["pan", "pot"]}).write_csv(data / "products.csv")
    pl.DataFrame({"query": ["pan", "pot"], "product_id": ["1", "9"], "grade": [2, 1]}).write_csv(data / "judgments.csv")
    done = call("run", data, "--out", tmp_path / "out", *SMOKE, code=2)
    assert "judgments.csv" in done.stderr and "9" in done.stderr and not (tmp_path / "out").exists()


def test_unknown_options_name_the_choices():
    assert "smoke" in call("run", "market", "--out", "x", "--preset", "quik", code=2).stderr


@pytest.mark.skipif(not ESCI.exists(), reason="the ESCI sample is not beside this checkout (../shared/data/esci)")
@pytest.mark.slow
def test_esci_in_its_published_layout(tmp_path):
    call("run", ESCI, "--out", tmp_path / "esci", *SMOKE)
    metrics = json.loads((tmp_path / "esci" / "metrics.json").read_text())
    assert "us" in metrics["stage2"]["per_locale"] and 0 < metrics["stage2"]["ndcg@10"] <= 1


def test_the_markets_shoppers_try_a_run(folder, tmp_path):
    done = call("abtest", folder, "--json", tmp_path / "test.json")
    found = json.loads((tmp_path / "test.json").read_text())
    assert found["simulated"] and [row["metric"] for row in found["table"]] == ["NDCG@10", "ATCR", "CVR", "GOV"]
    assert "B against A, simulated" in done.stdout and sum(found["units"]) == 50_000
    assert "no finished run" in call("abtest", tmp_path, code=2).stderr
