"""What is shown within a step: nothing for short work, a line every 30 s off a terminal, a bar on one."""

import io

from megatron_sd.observability.progress import SILENT, Work


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_short_work_leaves_no_line():
    stream, clock = io.StringIO(), Clock()
    with Work(stream, clock=clock).on("rollouts", 4, "ended") as task:
        for _ in range(4):
            clock.now += 7
            task.add(done=1, tokens=10)
    assert stream.getvalue() == ""


def test_long_work_says_every_30_s_how_far_it_is():
    stream, clock = io.StringIO(), Clock()
    with Work(stream, clock=clock).on("rollouts", 40, "ended") as task:
        for _ in range(10):
            clock.now += 8
            task.add(done=1, tokens=160)
    assert stream.getvalue().splitlines() == [
        "rollouts: 4 of 40 ended, 640 tokens, 20.0 tokens/s, 32 s",
        "rollouts: 8 of 40 ended, 1,280 tokens, 20.0 tokens/s, 64 s",
    ]


def test_time_alone_brings_a_line_and_work_without_tokens_names_none():
    stream, clock = io.StringIO(), Clock()
    with Work(stream, clock=clock).on("update", 3, "microbatches") as task:
        task.add(done=1)
        clock.now += 31
        task.tick()
        task.tick()
    assert stream.getvalue() == "update: 1 of 3 microbatches, 31 s\n"


def test_a_terminal_gets_a_bar_that_goes_when_the_work_is_done():
    stream, clock = Terminal(), Clock()
    with Work(stream, clock=clock).on("rollouts", 4, "ended") as task:
        clock.now += 2
        task.add(done=2, tokens=50)
    assert "rollouts:  50%" in stream.getvalue()
    assert "2/4" in stream.getvalue()
    assert "50 tokens, 25.0 tokens/s" in stream.getvalue()
    assert stream.getvalue().split("\r")[-1].strip() == ""


def test_silence_counts_all_the_same():
    with SILENT.on("rollouts", 2, "ended") as task:
        task.add(done=1, tokens=3)
    assert (task.done, task.tokens, task.total) == (1, 3, 2)
