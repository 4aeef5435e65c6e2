"""Load tests: what is measured is what the server did, from when requests were due; and what is refused."""

import asyncio
import json
import re
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from app.cli import app
from app.errors import InvalidRequest, ServiceError
from app.loadtest import (
    Arrival,
    Measures,
    Objective,
    Point,
    Sample,
    Target,
    Times,
    at_rate,
    back_to_back,
    check_host,
    drive,
    knee,
    read_trace,
    recommended,
    started,
)
from tests.fake_tgi import Drop, FakeTGI, Hang, Refuse, Reply, Tokens

ROOT = Path(__file__).parents[2]
LENIENT = Objective(ttft_seconds=60.0, tpot_seconds=60.0)


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["loadtest", *map(str, arguments)], env={"COLUMNS": "200"})


def target(tgi: FakeTGI, **given: object) -> Target:
    return Target(f"{tgi.url}/v1", "tgi", **given)


def due(*seconds: float) -> list[Arrival]:
    return [Arrival(each, 4, 3) for each in seconds]


# --- what is measured ---


async def test_known_delays_come_out_as_measured():
    samples: list[Sample] = []
    async with FakeTGI(default=Tokens("a", "b", "c", "d", "e", delay_seconds=0.1)) as tgi:
        measures = await drive(target(tgi), due(0.0, 0.01), LENIENT, on_sample=samples.append)
    assert measures.outcomes == {"ok": 2}
    assert measures.tokens == 10
    for sample in samples:
        # The server sleeps 0.1 s before each token; a busy machine adds to that and takes nothing away.
        assert sample.ttft_seconds >= 0.1
        assert sample.tpot_seconds >= 0.1
        assert sample.total_seconds == pytest.approx(sample.ttft_seconds + 4 * sample.tpot_seconds)
        assert sample.total_seconds <= measures.seconds
    assert measures.ttft.quantile(0.5) == pytest.approx(min(s.ttft_seconds for s in samples), rel=0.011)


async def test_times_count_from_when_a_request_was_due_while_the_server_stalls():
    samples: list[Sample] = []
    gate = asyncio.Event()
    async with FakeTGI(Tokens("slow", gate=gate), default=Tokens("fast")) as tgi:
        asyncio.get_running_loop().call_later(0.5, gate.set)
        # One place: the others cannot be sent before the first is answered, though they were due long before.
        await drive(target(tgi), due(0.0, 0.05, 0.1), LENIENT, in_flight=1, on_sample=samples.append)
        assert len(tgi.bodies) == 3
    stalled = samples[0].ttft_seconds
    assert stalled > 0.2
    for sample, due_seconds in zip(samples[1:], (0.05, 0.1), strict=True):
        assert sample.late_seconds >= stalled - due_seconds
        assert sample.ttft_seconds > sample.late_seconds


async def test_a_stalled_server_is_sent_what_is_due_all_the_same():
    gate = asyncio.Event()
    async with FakeTGI(default=Tokens("a", gate=gate)) as tgi:
        driving = asyncio.create_task(drive(target(tgi), due(0.0, 0.01, 0.02), LENIENT))
        await tgi.until(lambda: len(tgi.bodies) == 3)  # Nothing has been answered yet.
        gate.set()
        measures = await driving
    assert measures.outcomes == {"ok": 3}


async def test_no_more_than_the_places_are_out_at_once():
    gate = asyncio.Event()
    async with FakeTGI(default=Tokens("a", gate=gate)) as tgi:
        driving = asyncio.create_task(drive(target(tgi), due(*[0.0] * 6), LENIENT, in_flight=2))
        await tgi.until(lambda: len(tgi.bodies) == 2)
        gate.set()
        assert (await driving).requests == 6
        assert tgi.connections == 2


async def test_callers_that_wait_are_timed_from_when_they_send():
    samples: list[Sample] = []
    async with FakeTGI(default=Tokens("a", delay_seconds=0.05)) as tgi:
        arrivals = back_to_back(6, 4, 3)
        measures = await drive(target(tgi), arrivals, LENIENT, in_flight=1, paced=False, on_sample=samples.append)
    # One after the other: if any had counted the wait for those before it, the sum would be above the whole.
    assert 6 * 0.05 <= sum(sample.total_seconds for sample in samples) <= measures.seconds


@pytest.mark.parametrize(
    ("act", "outcome"),
    [
        (Refuse(429, "full", "overloaded", in_stream=False), "429"),
        (Refuse.failed(), "error_in_stream"),
        (Drop(), "cut_off"),
        (Tokens("a", "b", cut_after=1), "cut_off"),
        (Reply(b"data: {oops\n\n", content_type="text/event-stream"), "garbage"),
        (Reply(b"data: [1]\n\n", content_type="text/event-stream"), "garbage"),
        (Reply(b"data: " + b"[" * 100_000 + b"\n\n", content_type="text/event-stream"), "garbage"),
        (Reply(b"x" * (1 << 21), content_type="text/event-stream"), "garbage"),
        (Reply(b"data: [DONE]\n\n", content_type="text/event-stream"), "empty"),
        (Reply(b"{}"), "no_stream"),
        (Reply(b"", status=302, headers={"location": "http://127.0.0.1:1/"}), "302"),
        (Hang(), "timeout"),
    ],
)
async def test_what_goes_wrong_is_counted_by_its_kind(act, outcome):
    async with FakeTGI(act) as tgi:
        measures = await drive(target(tgi, timeout_seconds=0.3 if outcome == "timeout" else 30.0), due(0.0), LENIENT)
    assert measures.outcomes == {outcome: 1}
    assert measures.good == 0


async def test_a_count_of_tokens_that_no_answer_has_is_not_believed():
    said = {"choices": [{"delta": {"content": "a"}}], "usage": {"completion_tokens": 10**400}}
    stream = b"data: " + json.dumps(said).encode() + b"\n\ndata: [DONE]\n\n"
    async with FakeTGI(Reply(stream, content_type="text/event-stream")) as tgi:
        measures = await drive(target(tgi), due(0.0), LENIENT)
    assert measures.outcomes == {"ok": 1}
    assert measures.tokens == 1


async def test_a_server_that_is_gone_is_no_connection():
    async with FakeTGI() as tgi:
        gone = target(tgi)
    assert (await drive(gone, due(0.0), LENIENT)).outcomes == {"no_connection": 1}


async def test_a_request_has_the_lengths_and_fields_that_were_asked_for():
    async with FakeTGI() as tgi:
        await drive(target(tgi, key="secret", extra={"seed": 7}), [Arrival(0.0, 50, 9)], LENIENT)
        (body,) = tgi.bodies
        assert tgi.requests[0].headers["authorization"] == "Bearer secret"
    assert len(body["messages"][0]["content"].split()) == 50
    assert (body["max_tokens"], body["seed"], body["stream"]) == (9, 7, True)


def test_goodput_counts_failures_and_both_limits():
    measures = Measures(Objective(ttft_seconds=1.0, tpot_seconds=0.1, share=0.5))
    measures.seconds = 2.0
    measures.add(Sample("ok", 0.0, 0.5, 0.9, tokens=5))
    measures.add(Sample("ok", 0.0, 1.5, 1.9, tokens=5))  # Late to start.
    measures.add(Sample("ok", 0.0, 0.5, 1.5, tokens=5))  # 0.25 s a token.
    measures.add(Sample("429"))
    figures = measures.described()
    assert figures["good_share"] == 0.25
    assert figures["goodput_per_second"] == 0.5
    assert figures["requests_per_second"] == 1.5
    assert figures["meets_objective"] is False
    assert figures["outcomes"] == {"429": 1, "ok": 3}


def test_quantiles_hold_within_one_per_cent_in_bounded_memory():
    times = Times()
    for i in range(1, 100_001):
        times.add(i / 1000.0)
    for share in (0.5, 0.9, 0.99, 1.0):
        assert times.quantile(share) == pytest.approx(share * 100.0, rel=0.01)
    assert len(times._buckets) < 1_500
    assert Times().quantile(0.5) is None


# --- traces ---


def test_azures_trace_is_read(tmp_path):
    file = tmp_path / "code.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:04.4799600,3180,8\n"
    )
    assert list(read_trace(file)) == [Arrival(0.0, 4808, 10), Arrival(0.5, 3180, 8)]
    assert list(read_trace(file, speed=2.0))[1].due_seconds == 0.25
    assert len(list(read_trace(file, limit=1))) == 1


def test_a_trace_that_says_its_zone_is_read(tmp_path):
    file = tmp_path / "code2024.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n"
        "2024-05-10 02:00:00.509930+02:00,2399,6\n"
    )
    assert list(read_trace(file)) == [Arrival(0.0, 2162, 5), Arrival(pytest.approx(0.5, abs=1e-6), 2399, 6)]


def test_mooncakes_trace_is_read(tmp_path):
    file = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": t, "input_length": 10, "output_length": n, "hash_ids": [1]} for t, n in ((500, 2), (2000, 0))
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert list(read_trace(file)) == [Arrival(0.0, 10, 2), Arrival(1.5, 10, 1)]


CSV = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,48,10\n"
JSONL = '{"timestamp": 5, "input_length": 1, "output_length": 1}\n'


@pytest.mark.parametrize(
    ("name", "text", "line", "field"),
    [
        ("a.csv", "", 1, "TIMESTAMP"),
        ("a.csv", "TIMESTAMP,ContextTokens\n", 1, "GeneratedTokens"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", 1, "file"),
        ("a.csv", CSV + "2023-11-16 18:17:04,many,10\n", 3, "ContextTokens"),
        ("a.csv", CSV + "2023-11-16 18:17:04,5,-1\n", 3, "GeneratedTokens"),
        ("a.csv", CSV + "2023-11-16 18:17:04,5\n", 3, "GeneratedTokens"),
        ("a.csv", CSV + "soon,5,5\n", 3, "TIMESTAMP"),
        ("a.csv", CSV + "5," * 100_000 + '"' + "5" * 200_000, 3, "line"),
        ("a.csv", CSV + "2023-11-16 18:17:02,5,5\n", 3, "TIMESTAMP"),
        ("a.jsonl", "", 1, "file"),
        ("a.jsonl", JSONL + "{oops\n", 2, "line"),
        ("a.jsonl", JSONL + "[]\n", 2, "line"),
        ("a.jsonl", JSONL + "[" * 100_000, 2, "line"),
        ("a.jsonl", JSONL + '{"timestamp": 6, "input_length": 1}\n', 2, "output_length"),
        ("a.jsonl", JSONL + '{"timestamp": 6, "input_length": 1.5, "output_length": 1}\n', 2, "input_length"),
        ("a.jsonl", JSONL + '{"timestamp": 6, "input_length": true, "output_length": 1}\n', 2, "input_length"),
        ("a.jsonl", JSONL + '{"timestamp": "six", "input_length": 1, "output_length": 1}\n', 2, "timestamp"),
        ("a.jsonl", JSONL + '{"timestamp": NaN, "input_length": 1, "output_length": 1}\n', 2, "timestamp"),
        ("a.jsonl", JSONL + '{"timestamp": 4, "input_length": 1, "output_length": 1}\n', 2, "timestamp"),
    ],
)
def test_a_wrong_line_is_told_by_number_and_field_before_anything_is_sent(tmp_path, name, text, line, field):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=re.escape(f"{name}, line {line}: `{field}`")):
        list(read_trace(file))
    done = run("--trace", file, "--url", "http://127.0.0.1:1/v1")
    assert done.exit_code == 2
    assert f"line {line}" in done.stderr


def test_arrivals_at_a_rate_are_poisson_and_reproducible():
    drawn = list(at_rate(50.0, 100.0, 4, 3, seed=1))
    assert drawn == list(at_rate(50.0, 100.0, 4, 3, seed=1))
    assert len(drawn) == pytest.approx(5_000, rel=0.05)
    gaps = [b.due_seconds - a.due_seconds for a, b in zip(drawn, islice(drawn, 1, None), strict=False)]
    assert sum(gap > 0.02 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)  # exp(-1)


# --- the frontier ---


def point(value: float, throughput: float, ttft: float, *, good: float, meets: bool) -> Point:
    figures = {"requests_per_second": throughput, "ttft_seconds": {"p95": ttft}, "goodput_per_second": good}
    return Point(value, {**figures, "meets_objective": meets})


FRONTIER = [
    point(1, 1.0, 0.10, good=1.0, meets=True),
    point(4, 3.9, 0.12, good=3.9, meets=True),
    point(8, 7.0, 0.30, good=6.8, meets=True),
    point(16, 7.5, 2.00, good=6.9, meets=False),
]


def test_the_highest_goodput_that_meets_the_objective_is_recommended():
    found = recommended(FRONTIER)
    assert found is not None
    assert found.value == 8
    assert recommended(FRONTIER[3:]) is None


def test_the_knee_is_where_latency_starts_to_outgrow_throughput():
    found = knee(FRONTIER)
    assert found is not None
    assert found.value == 8
    assert knee(FRONTIER[:2]) is None
    straight = [point(n, float(n), float(n), good=1.0, meets=True) for n in (1, 2, 3)]
    assert knee(straight) is None
    falling = [point(n, float(n), 1.0 / n, good=1.0, meets=True) for n in (1, 2, 3)]
    assert knee(falling) is None


# --- the command ---


def test_another_machine_is_refused_unless_it_is_meant():
    done = run("--url", "https://api.example.org/v1", "--rate", "1")
    assert done.exit_code == 2
    assert "--allow-remote" in done.stderr
    for url in ("http://localhost:1/v1", "http://127.8.8.8:1", "http://[::1]:1"):
        check_host(url, allow_remote=False)
    check_host("https://api.example.org/v1", allow_remote=True)
    for url in ("http://127.0.0.1.example.org/", "http://0.0.0.0/", "http://localhost@example.org/", "file:///x", "x"):
        with pytest.raises(InvalidRequest):
            check_host(url, allow_remote=False)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--rate"),
        (["--rate", "1", "--concurrency", "1"], "--rate"),
        (["--rate", "0"], "--rate"),
        (["--rate", "1", "--value", "1"], "--command"),
        (["--rate", "1", "--command", "x {value}"], "--value"),
        (["--rate", "1", "--rate", "2", "--command", "x {value}", "--value", "1"], "--rate"),
        (["--rate", "1", "--command", "true", "--value", "1"], "--command"),
        (["--rate", "1", "--command", "/no/such/program {value}", "--value", "1"], "--command"),
        (["--rate", "1", "--command", "x '{value}", "--value", "1"], "--command"),
        (["--rate", "1", "--extra", "[]"], "--extra"),
        (["--rate", "1", "--extra", "{"], "--extra"),
        (["--rate", "1", "--extra", "[" * 100_000], "--extra"),
        (["--rate", "inf"], "--rate"),
        (["--rate", "nan"], "--rate"),
        (["--rate", "1e300"], "--rate"),  # Between two so near each other no time passes.
        (["--rate", "1", "--seconds", "inf"], "--seconds"),
        (["--rate", "1", "--speed", "nan"], "--speed"),
        (["--rate", "1", "--ttft-seconds", "nan"], "--ttft-seconds"),
        (["--rate", "1", "--tpot-seconds", "inf"], "--tpot-seconds"),
        (["--rate", "1", "--timeout-seconds", "nan"], "--timeout-seconds"),
    ],
)
def test_a_wrong_argument_is_told_by_name(arguments, named):
    done = run(*arguments, "--url", "http://127.0.0.1:1/v1")
    assert done.exit_code == 2, done.output
    assert f"`{named}`" in done.stderr


async def served(tgi: FakeTGI, *arguments: str | Path) -> Result:
    return await asyncio.to_thread(run, "--url", f"{tgi.url}/v1", "--model", "tgi", *arguments)


async def test_a_sweep_recommends_and_draws(tmp_path):
    png = tmp_path / "frontier.png"
    sweep = ("--concurrency", "1", "--concurrency", "2", "--requests", "6")
    generous = ("--ttft-seconds", "60", "--tpot-seconds", "60")
    async with FakeTGI() as tgi:
        done = await served(tgi, *sweep, *generous, "--png", png, "--json")
        assert len(tgi.bodies) == 12
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [each["value"] for each in report["points"]] == [1.0, 2.0]
    assert report["points"][0]["outcomes"] == {"ok": 6}
    assert 0.0 < report["points"][0]["driver_busy_share"] < 1.1
    assert report["recommended"] in (1.0, 2.0)
    assert png.read_bytes().startswith(b"\x89PNG")


async def test_a_picture_that_cannot_be_written_is_told_before_anything_is_sent(tmp_path):
    async with FakeTGI() as tgi:
        done = await served(tgi, "--concurrency", "1", "--png", tmp_path / "no" / "frontier.png")
        assert tgi.bodies == []
    assert done.exit_code == 1
    assert f"There is no folder '{tmp_path / 'no'}' to write frontier.png into." in done.stderr
    assert run("--concurrency", "1", "--png", tmp_path).exit_code == 2


def test_without_matplotlib_a_picture_is_refused_before_anything_is_sent(tmp_path):
    program = (
        "import sys; sys.modules['matplotlib'] = None; from app.cli import app; "
        "app(['loadtest', '--url', 'http://127.0.0.1:1/v1', '--concurrency', '1', '--png', sys.argv[1]])"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "x"], capture_output=True, text=True, timeout=50)
    assert done.returncode == 2, done.stderr
    assert "pip install 'hallmark[plot]'" in done.stderr
    assert "concurrency 1 ..." not in done.stderr
    assert list(tmp_path.iterdir()) == []


async def test_figures_are_shown_also_where_they_cannot_be_drawn_in_the_end(tmp_path):
    png, gate = tmp_path / "frontier.png", asyncio.Event()
    async with FakeTGI(default=Tokens("a", gate=gate)) as tgi:
        testing = asyncio.create_task(served(tgi, "--concurrency", "1", "--requests", "1", "--png", png, "--json"))
        await tgi.until(lambda: len(tgi.bodies) == 1)
        png.mkdir()  # Somebody else's, while the server was measured.
        gate.set()
        done = await testing
    assert done.exit_code == 1
    assert json.loads(done.stdout)["points"][0]["outcomes"] == {"ok": 1}
    assert str(png) in done.stderr
    assert list(tmp_path.iterdir()) == [png]


async def test_a_trace_is_replayed_and_an_objective_missed_exits_with_1(tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text(JSONL * 3)
    async with FakeTGI() as tgi:
        done = await served(tgi, "--trace", trace, "--ttft-seconds", "0.000001")
        assert len(tgi.bodies) == 3
    assert done.exit_code == 1, done.output
    assert "no value meets the objective" in done.stdout
    assert "not answered" not in done.stdout


async def test_what_was_not_answered_is_told_by_kind():
    async with FakeTGI(Refuse(429, "full", "overloaded", in_stream=False)) as tgi:
        done = await served(tgi, "--concurrency", "1", "--requests", "4", "--ttft-seconds", "60", "--share", "0.5")
    assert done.exit_code == 0, done.output
    assert "not answered at concurrency 1: 1 429" in done.stdout


# --- a server that is started for each value ---

SERVER = """
import http.server, pathlib, sys
pathlib.Path(sys.argv[1]).open("a").write(sys.argv[2] + " ")
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[3])), Ready).serve_forever()
"""


async def test_a_command_is_started_with_the_value_and_ended(tmp_path, free_port):
    started_with = tmp_path / "values"
    (tmp_path / "server.py").write_text(SERVER)
    template = f"{sys.executable} {tmp_path / 'server.py'} {started_with} {{value}} {free_port}"
    for value in ("8", "16"):
        async with started(template, value, f"http://127.0.0.1:{free_port}/v1/models"):
            pass
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", free_port)
    assert started_with.read_text() == "8 16 "


TAKES_A_MEBI = """
import http.server, sys
if sys.argv[1] != "1048576": raise SystemExit(3)
class Streams(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(b"")
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.answer(b'data: {"choices": [{"delta": {"content": "a"}}]}\\n\\ndata: [DONE]\\n\\n')
    def answer(self, body):
        self.send_response(200); self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Streams).serve_forever()
"""


def test_a_value_that_the_server_does_not_take_leaves_the_others_measured(tmp_path, free_port):
    (tmp_path / "server.py").write_text(TAKES_A_MEBI)
    load = ("--url", f"http://127.0.0.1:{free_port}/v1", "--concurrency", "1", "--requests", "2")
    command = ("--command", f"{sys.executable} {tmp_path / 'server.py'} {{value}} {free_port}", "--ttft-seconds", "60")
    done = run(*load, *command, "--value", "16", "--value", "1048576", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [(each["value"], each["outcomes"]) for each in report["points"]] == [(1048576.0, {"ok": 2})]
    said = f"the command ended with 3 before http://127.0.0.1:{free_port}/v1/models answered."
    assert report["failed"] == [{"value": 16.0, "error": said}]
    done = run(*load, *command, "--value", "1048576", "--value", "16")
    assert f"not measured at setting 16: {said}" in done.stdout
    assert "recommended: setting 1048576" in done.stdout
    done = run(*load, *command, "--value", "16")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert said in done.stderr


LAUNCHER = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, *sys.argv[1:]])
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # Without waiting for the child.
child.wait()
"""
LINGERS = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
TIDIES = """
import pathlib, signal, sys
def tidy(*_):
    pathlib.Path(sys.argv[1]).open("a").write("ended ")
    raise SystemExit
signal.signal(signal.SIGTERM, tidy)
"""


@pytest.mark.parametrize(
    ("child", "stop_seconds", "left"),
    [(LINGERS, 0.2, "8 16 "), (TIDIES, 30.0, "8 ended 16 ended ")],
    ids=["lingers", "tidies"],
)
async def test_the_children_of_a_launcher_that_is_gone_at_once_are_ended(
    tmp_path, free_port, child, stop_seconds, left
):
    written, launcher, server = (tmp_path / name for name in ("values", "launcher.py", "server.py"))
    launcher.write_text(LAUNCHER)
    server.write_text(child + SERVER)
    template = f"{sys.executable} {launcher} {server} {written} {{value}} {free_port}"
    for value in ("8", "16"):
        async with started(template, value, f"http://127.0.0.1:{free_port}/", stop_seconds=stop_seconds):
            pass
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", free_port)
    assert written.read_text() == left


async def test_a_command_that_ends_early_is_told(free_port):
    with pytest.raises(ServiceError, match="ended with 3"):
        async with started(f"{sys.executable} -c 'raise SystemExit({{value}})'", "3", f"http://127.0.0.1:{free_port}/"):
            pass


async def test_a_server_that_runs_already_is_not_measured_in_the_commands_place():
    async with FakeTGI() as tgi:
        with pytest.raises(InvalidRequest, match="already"):
            async with started("true {value}", "1", f"{tgi.url}/v1/models"):
                pass
