"""`sd-search watch`: the page over real HTTP, what it refuses, and that it only reads."""

import dataclasses
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from eval.report_page.text import plain
from eval.watch.command import WatchConfig
from eval.watch.page import SCRIPT, STYLE, count_words
from eval.watch.server import is_own_name, listen
from eval.watch.view import View, check_is_run
from launch.cli import main as command
from megatron_sd.door import FAILED_EXIT_CODE, INTERRUPTED_EXIT_CODE, USAGE_EXIT_CODE
from megatron_sd.durable.run_lock import hold
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.observability.metrics_log import MetricsLog
from megatron_sd.records import StopReason
from tests.eval.test_report import INJECTIONS, Page, group, write

CONFIG = "num_steps: 8\nlog:\n  transcripts_every: 4\n"


def run_of(directory, steps=4):
    """A run directory after some steps, with transcripts of the fourth."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(CONFIG)
    log = MetricsLog(directory / "metrics.jsonl", first_step=1)
    for step in range(1, steps + 1):
        log.record(
            step, {"reward/mean": step / 10, "other/thing": 1.0, "time/step_s": 2.0, "time/update_s": 1.5}
        )
    log.close()
    write(directory, [group(1)])
    return directory


@contextmanager
def served(directory):
    with listen(View(directory, look_every_s=0.0), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()


def ask(server, path="/", method="GET", host=None, **headers):
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"} | headers)
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer, content


def sections_of(server, **known):
    answer, content = ask(
        server, "/sections?" + "&".join(f"{name}={version}" for name, version in known.items())
    )
    assert answer.status == 200 and answer.getheader("Content-Type") == "application/json; charset=utf-8"
    return json.loads(content)


def test_the_page_shows_curves_times_and_groups(tmp_path):
    with served(run_of(tmp_path / "seven")) as server:
        assert server.server_address[0] == "127.0.0.1"
        answer, page = ask(server, "/", host="localhost")
    assert answer.status == 200 and answer.getheader("Content-Type") == "text/html; charset=utf-8"
    Page(page.replace(f"<script>{SCRIPT}</script>", ""))  # every tag is closed in turn
    assert "<title>seven</title>" in page
    assert '<b class="badge stopped">stopped</b> before the last step of the plan' in page
    assert re.search(r"step 4 of 8 · recorded \d s ago", page)
    assert "<b>reward/mean</b>" in page and "other/thing" not in page, (
        "that one is asked for when it is opened"
    )
    assert "<th>step 4</th>" in page and "update 1.5 s" in page
    assert "1 group of step 4. Transcripts hold the first groups of a step, every 4 steps (log." in page
    assert 'class="wrong wrong-despite-gold"' in page
    assert '<small data-count="wrong-despite-gold">1 group, 1 rollout</small>' in page
    assert '<small data-count="truncated">0 groups, 0 rollouts</small>' in page
    assert '<details class="fold"><summary>observation</summary><pre class="segment observed">' in page
    assert '<pre class="segment block">Attempt 1</pre>' in page


def test_headers_forbid_what_is_not_the_page_itself(tmp_path):
    with served(run_of(tmp_path)) as server:
        answer, page = ask(server)
    policy = answer.getheader("Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert answer.getheader("X-Content-Type-Options") == "nosniff"
    assert answer.getheader("Cache-Control") == "no-store"
    assert answer.getheader("Access-Control-Allow-Origin") is None
    assert f"<style>{STYLE}</style>" in page and f"<script>{SCRIPT}</script>" in page
    assert "http:" not in page and "https:" not in page and " style=" not in page, "all is within"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "127.0.0.1:x", "[::1]"]
)
def test_another_host_is_refused(tmp_path, host):
    with served(run_of(tmp_path)) as server:
        for path in ("/", "/sections?standing="):
            answer, content = ask(server, path, host=host)
            assert answer.status == 403 and "answers to 127.0.0.1 and localhost only" in content
    assert not is_own_name(host)


def test_a_request_with_no_host_or_two_is_refused(tmp_path):
    with served(run_of(tmp_path)) as server:
        for head in ("", "Host: localhost\r\nHost: evil.example\r\n"):
            with socket.create_connection(server.server_address, timeout=20) as client:
                client.sendall(f"GET / HTTP/1.1\r\n{head}\r\n".encode())
                assert b" 403 " in client.recv(100)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"])
def test_nothing_but_get_is_answered(tmp_path, method):
    with served(run_of(tmp_path)) as server:
        answer, content = ask(server, method=method)
    assert answer.status == 405 and answer.getheader("Allow") == "GET"
    assert method == "HEAD" or "this page only reads" in content


def test_there_are_two_pages(tmp_path):
    with served(run_of(tmp_path)) as server:
        for path in ("/metrics.jsonl", "/../metrics.jsonl", "/sections/"):
            assert ask(server, path)[0].status == 404


def test_sections_are_sent_when_they_have_changed(tmp_path):
    run = run_of(tmp_path)
    names = ("standing", "phases", "pulses", "curves", "more", "groups")
    with served(run) as server:
        found = sections_of(server, **dict.fromkeys(names, ""), unknown="")
        assert tuple(found) == names
        assert "other/thing" in found["more"]["html"] and "reward/mean" not in found["more"]["html"]
        assert found["groups"]["counts"]["repeated-query"] == "0 groups, 0 rollouts"
        known = {name: own["version"] for name, own in found.items()}
        unchanged = {name: known[name] for name in ("phases", "pulses", "curves", "more", "groups")}
        assert sections_of(server, **unchanged) == {}
        log = MetricsLog(run / "metrics.jsonl", first_step=5)
        log.record(5, {"reward/mean": 0.9, "time/step_s": 2.0})
        log.close()
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "metr')  # half written
        newer = sections_of(server, **unchanged)
        assert tuple(newer) == ("phases", "curves"), "the other curves have not moved"
        assert (
            '<span class="last">0.9</span>' in newer["curves"]["html"] and "step 5" in newer["phases"]["html"]
        )
        assert "step 5 of 8" in sections_of(server, standing="")["standing"]["html"]
        write(run, [group(2), group(3)], name="step_00000005")
        (groups,) = sections_of(
            server, **unchanged | {n: own["version"] for n, own in newer.items()}
        ).values()
        assert "2 groups of step 5" in groups["html"]


def test_what_was_read_and_has_not_changed_is_not_made_again(tmp_path, monkeypatch):
    run = run_of(tmp_path)
    view, made = View(run, look_every_s=0.0), []
    monkeypatch.setattr("eval.watch.view.render_charts", lambda *given: made.append("charts") or "c")
    monkeypatch.setattr("eval.watch.view.render_groups", lambda *given: made.append("groups") or "g")
    for _ in range(3):
        view.sections({"curves": "", "groups": "", "phases": ""})
    assert made == ["charts", "groups"]
    patient = View(run, look_every_s=60.0)
    patient.sections({"standing": ""})
    run_of(run, steps=6)
    assert "step 4 of 8" in patient.sections({"standing": ""})["standing"].html, "many pages, one look"


def test_a_run_without_steps_says_so_and_fills_when_they_arrive(tmp_path):
    run = tmp_path / "run"
    with hold(run):
        check_is_run(run)
        with served(run) as server:
            _, page = ask(server)
            assert '<b class="badge training">training</b>' in page and "no steps yet" in page
            assert "No transcripts yet." in page and "Nothing has been recorded yet" in page
            assert "No pulses" in page and "No step has been timed yet" in page
            (run / "config.yaml").write_text(CONFIG)
            assert "they are written every 4 steps" in sections_of(server, groups="")["groups"]["html"]
            (run / "config.yaml").write_text(CONFIG.replace("4", "0"))
            assert "writes no transcripts" in sections_of(server, groups="")["groups"]["html"]
            run_of(run)
            assert "reward/mean" in sections_of(server, curves="")["curves"]["html"]


@pytest.mark.parametrize("text", INJECTIONS)
def test_no_text_of_a_run_becomes_markup(tmp_path, text):
    own = group(title=text, answer=text)
    question = dataclasses.replace(own.question, id=text, text=text, golden_answers=(text,))
    run = run_of(tmp_path)
    write(run, [dataclasses.replace(own, question=question)], block=text, text=lambda ids: text)
    log = MetricsLog(run / "metrics.jsonl", first_step=5)
    log.record(5, {text: 1.0, f"time/{text}_s": 0.1, "time/step_s": 1.0})
    log.close()
    (run / "plan_changes.jsonl").write_text(json.dumps({"step": 2, "words": text}) + "\n[]\n")
    (run / "watchdog").mkdir()
    (run / "watchdog" / "rank_0.txt").write_bytes(f"watchdog: {text}\n".encode())
    with served(run) as server:
        _, raw = ask(server)
        raw += sections_of(server, more="")["more"]["html"]
    raw = raw.replace(SCRIPT, "")
    page = Page(raw.replace("<script></script>", ""))
    assert not page.tags & {"script", "img", "iframe", "link", "object", "a"}
    assert not {name for name in page.attributes if name.startswith("on") or name in ("href", "src", "style")}
    assert plain(text) in raw and not any(c in raw for c in "\x00\x1b\u202e\u200b")


def test_broken_records_are_told_and_passed_over(tmp_path):
    run = run_of(tmp_path)
    path = write(run, [group(1)])
    path.write_text(path.read_text() + '{"question": {"id": "a"}, "rollouts": [{}]}\n{"question": 3}\nhalf')
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + "nonsense\n" * 2)
    with served(run) as server:
        _, page = ask(server)
    assert "1 group of step 4" in page and "Passed over: 2 lines that cannot be read as transcripts" in page
    assert "passed over: 1 line of metrics.jsonl with no metrics" in page, (
        "the second may be torn by a kill, for now"
    )


def test_failed_rollouts_are_found(tmp_path):
    own = group(1)
    failed = dataclasses.replace(own.rollouts[1], stop_reason=StopReason.RETRIEVAL_FAILED, scores=None)
    run = run_of(tmp_path)
    write(run, [dataclasses.replace(own, rollouts=(own.rollouts[0], failed))])
    with served(run) as server:
        _, page = ask(server)
    assert 'class="failed retrieval-failed"' in page
    assert '<small data-count="retrieval-failed">1 group, 1 rollout</small>' in page


def test_nothing_in_the_run_directory_is_touched(tmp_path):
    run = run_of(tmp_path / "run")

    def state():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in (run, *run.rglob("*"))}

    before = state()
    with served(run) as server:
        ask(server)
        sections_of(server, more="", groups="")
    assert state() == before


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    run = run_of(tmp_path)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    with served(run) as server:
        answer, content = ask(server)
    assert (
        answer.status == 500 and "the run directory cannot be read" in content and "metrics.jsonl" in content
    )


def test_directories_that_are_no_run_are_refused(tmp_path, capsys):
    assert command(["watch", str(tmp_path / "missing")]) == FAILED_EXIT_CODE
    assert "found nothing at" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"holds none of lock.json, config.yaml"):
        check_is_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="found a file"):
        check_is_run(tmp_path / "file")
    run_of(tmp_path / "recipe" / "train")
    with hold(tmp_path / "recipe"), pytest.raises(DataError, match=r"but holds train; .*recipe/train"):
        check_is_run(tmp_path / "recipe")
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(DataError, match="look at it with `sd-search report"):
        check_is_run(tmp_path)


def test_a_port_in_use_is_named(tmp_path, capsys):
    run = run_of(tmp_path)
    with served(run) as server:
        port = server.server_address[1]
        assert command(["watch", str(run), "--port", str(port)]) == USAGE_EXIT_CODE
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port}: it is in use" in error and "--port 0 for any" in error
    with pytest.raises(ConfigError, match="70000"):
        listen(View(run), 70000)
    assert WatchConfig(run_dir="x").port == 8765


def test_the_command_serves_until_it_is_interrupted(tmp_path):
    program = [sys.executable, "-m", "launch.cli", "watch", str(run_of(tmp_path)), "--port=0"]
    process = subprocess.Popen(
        program,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # these tests may run in the background of a shell, whose children ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        line = process.stdout.readline()
        port = int(re.search(r"at http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends\)", line)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == INTERRUPTED_EXIT_CODE and "Traceback" not in error


def test_counts_are_words():
    from eval.watch.filters import Matches

    assert count_words(Matches(groups=1, rollouts=3)) == "1 group, 3 rollouts"
