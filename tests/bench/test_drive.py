import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from jaxserve.bench import drive, figures
from jaxserve.bench.work import Item, made_up
from jaxserve.cli import main


def target(source, **settings):
    return drive.Target(source, "source", **settings)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_every_request_is_sent_once_and_every_token_counted(source, chat, processes):
    items = made_up(30, (4, 8), (1, 12), 0, ids=None)
    seen = []
    result = drive.run(target(source, chat=chat), items, concurrency=8, processes=processes, progress=seen.append)
    records = result["records"]
    assert [record["number"] for record in records] == list(range(30)) and sum(seen) == 30
    for record, item in zip(records, items):
        assert record["error"] is None and record["finish"] == "length"
        assert record["tokens"] == item.output == len(record["gaps"]) + 1
        assert record["prompt"] == len(item.prompt)
        assert record["start"] < record["first"] <= record["last"] <= record["end"]
        assert sum(record["gaps"]) == pytest.approx(record["last"] - record["first"], abs=1e-4)
    assert result["clients"] == processes and 0 < result["busy"] <= 1.5
    assert most_at_once(records) <= 8


def most_at_once(records):
    changes = sorted([(r["start"], 1) for r in records] + [(r["end"], -1) for r in records])
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def test_figures_agree_with_the_source(source):
    """100 tokens a second and stream, so 10 ms between two; more where the machine is busy."""
    result = drive.run(target(source), [Item([1] * 10, 20) for _ in range(16)], concurrency=16)
    found = figures.summary(result, {"ttft": 1e6, "tpot": 1e-3}, [20] * 15 + [21])
    assert found["output_tokens"] == 320 and found["input_tokens"] == 160 and found["errors"] == 0
    assert 5 < found["itl_ms"]["mean"] < 1000 and 5 < found["tpot_ms"]["p50"] < 1000
    assert found["out_tok_s"] == pytest.approx(320 / found["seconds"], rel=0.01)
    assert found["goodput_req_s"] == 0 and found["short"] == 1
    assert figures.summary(result, {"ttft": 1e6, "e2e": 1e6})["goodput_req_s"] == found["req_s"]


def test_a_plan_is_kept_however_slow_the_answers(source):
    plan = [0.05 * i for i in range(12)]
    result = drive.run(target(source), [Item([1], 100) for _ in plan], plan=plan)
    starts = [record["start"] for record in result["records"]]
    assert [start - starts[0] for start in starts] == pytest.approx(plan, abs=1e-6)
    assert all(record["tokens"] == 100 and record["lag"] >= 0 for record in result["records"])
    assert most_at_once(result["records"]) > 6  # each takes a second


def test_a_plan_with_few_seats(source):
    """What waits for a seat is timed from when it should have been sent."""
    result = drive.run(target(source), [Item([1], 30) for _ in range(4)], plan=[0.0] * 4, concurrency=1)
    assert sorted(round(record["lag"], 1) for record in result["records"])[-1] >= 0.8


@pytest.mark.parametrize(
    "prompt, error",
    [
        ("fail", "HTTP 503: the queue is full"),
        ("error", "the engine has stopped"),
        ("cut", "the stream ended before its end"),
    ],
)
def test_errors_are_told(source, prompt, error):
    result = drive.run(target(source), [Item(prompt, 4), Item("fine", 4)], concurrency=2)
    assert [record["error"] for record in result["records"]] == [error, None]
    found = figures.summary(result)
    assert found["errors"] == 1 and found["error_texts"] == {error: 1} and error in figures.table(found)


def test_a_whole_answer_is_timed(source):
    result = drive.run(target(source, stream=False), [Item("a b", 9)], concurrency=1)
    (record,) = result["records"]
    assert (record["error"], record["tokens"], record["prompt"], record["first"]) == (None, 9, 3, None)
    assert "e2e_ms" in figures.summary(result) and "ttft_ms" not in figures.summary(result)


def test_a_request_has_a_time_limit(source):
    began = time.monotonic()
    result = drive.run(target(source, timeout=0.5), [Item("a", 100_000)], concurrency=1)
    assert "no end after 0.5 s" in result["records"][0]["error"] and time.monotonic() - began < 20


def test_nobody_listens():
    result = drive.run(target("http://127.0.0.1:9"), [Item("a", 4)], concurrency=1)
    assert "refused" in result["records"][0]["error"]
    with pytest.raises(OSError, match="does not answer"):
        drive.first_model("http://127.0.0.1:9")


def test_conversations_need_the_chat_endpoint(source):
    with pytest.raises(ValueError, match="--chat"):
        target(source).body(Item([{"role": "user", "content": "a"}], 4))


def command(capsys, *arguments):
    """(exit status, standard output, standard error) of `jaxserve bench serve`."""
    with pytest.raises(SystemExit) as left:
        main(["bench", "serve", *map(str, arguments)])
    said = capsys.readouterr()
    return left.value.code, said.out, said.err


def test_the_command(source, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report, pictures = tmp_path / "report.json", tmp_path / "pictures"
    code, out, err = command(
        capsys, source + "/v1", "-c", "2,8", "-n", 16, "--output-len", 10, "--input-len", "4:9",
        "--goodput", "ttft:9999", "--json", report, "--plot", pictures,
    )  # fmt: skip
    assert code == 0 and not out
    data = json.loads(report.read_text())
    assert data["model"] == "source" and [run["load"] for run in data["runs"]] == ["2 clients", "8 clients"]
    assert all(run["output_tokens"] == 160 and run["short"] == run["errors"] == 0 for run in data["runs"])
    assert all(run["goodput_req_s"] == run["req_s"] > 0 for run in data["runs"])
    for words in ("TTFT", "p99", "requests/s within limits", "2 clients", "8 clients"):
        assert words in err
    files = {path.name for path in pictures.iterdir()}
    assert files == {"ttft_cdf.png", "itl_cdf.png", "throughput_latency.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.iterdir())

    code, out, _ = command(capsys, "--compare", report, report)
    assert code == 0 and "8 clients" in out and "1.000" in out


def test_the_command_at_a_rate(source, capsys):
    code, out, err = command(
        capsys, source, "--chat", "-r", "40,inf", "-n", 12, "--output-len", 3, "--json", "-", "--seed", 5
    )
    runs = json.loads(out)["runs"]
    assert code == 0 and [run["load"] for run in runs] == ["40 req/s", "inf req/s"] and "inf req/s" in err


def test_a_file_without_a_way_to_count(source, tmp_path, capsys):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"prompt": "one two three four five six", "reply": "x" * 20}))
    code, out, err = command(capsys, source, "--work", path, "-n", 5, "--json", "-")
    assert code == 0 and "four characters" in err and "has 1 exchanges" in err
    assert json.loads(out)["runs"][0]["output_tokens"] == 5


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "the URL of a server is missing"),
        (["ftp://a"], "begins with http"),
        (["localhost:99999"], "Port out of range"),
        (["http://127.0.0.1:9"], "does not answer"),
        (["SOURCE", "--work", "nowhere.json"], "there is no file nowhere.json"),
        (["SOURCE", "--work", "mix", "--chat"], "token ids"),
        (["SOURCE", "--input-len", "9:3"], "like 16:1024"),
        (["SOURCE", "-c", "0"], "over 0"),
        (["SOURCE", "-r", "1", "-c", "1,2"], "one --concurrency"),
        (["SOURCE", "--extra-body", "[]"], "JSON object"),
        (["SOURCE", "--goodput", "speed:3"], "like ttft:500"),
        (["--compare", "setup.cfg", "setup.cfg"], "setup.cfg is no report"),
        (["SOURCE", "--json", "/no/such/folder/now.json"], "there is no such folder"),
    ],
)
def test_mistakes_are_told_in_a_line(source, capsys, arguments, words):
    code, _, err = command(capsys, *[source if argument == "SOURCE" else argument for argument in arguments])
    assert code == 2 and words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("content", ["[]", "{}", '{"runs": 1}', '{"runs": [1]}', '{"runs": [{}]}', "\ufeff"])
def test_what_is_no_report(tmp_path, capsys, content):
    file = tmp_path / "now.json"
    file.write_text(content)
    code, _, err = command(capsys, "--compare", file, file)
    assert code == 2 and f"{file} is no report" in err and len(err.splitlines()) == 1


class Page(BaseHTTPRequestHandler):
    """Another server's: every answer is a page of HTML."""

    def do_GET(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


def test_a_server_of_another_kind(capsys):
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        code, _, err = command(capsys, f"127.0.0.1:{server.server_port}")
        server.shutdown()
    assert code == 2 and "/v1/models answers 404: <!DOCTYPE" in err and len(err.splitlines()) == 1


def test_all_requests_fail(source, capsys):
    bad = ("-n", 3, "--extra-body", '{"prompt": "fail"}')
    code, _, err = command(capsys, source, *bad)
    assert code == 2 and "the first request fails: HTTP 503: the queue is full" in err
    code, _, err = command(capsys, source, *bad, "--warm-up", 0)
    assert code == 1 and "3 x HTTP 503" in err
