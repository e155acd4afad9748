"""The display of a whole sweep: what it counts, how it estimates, and that it never gets in the way."""

import io
import re
import threading
from pathlib import Path

import pytest

from jdistill.progress import Bar, duration, groups_text, numbers
from jdistill.sweep.display import Display
from jdistill.sweep.units import Job, Unit


def unit(*jobs, strategy="vmap"):
    made = tuple(Job(n, (f"seed={n}",), {"seed": n}, {}, Path(f"/tmp/{n}")) for n in jobs)
    return Unit(made, strategy if len(jobs) > 1 else "loop", "because")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def shown(stream):
    """What was written, without the control sequences of a terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())


def test_a_line_a_job_and_at_most_one_in_ten_seconds(clock):
    units, out = [unit(0, 1, 2), unit(3)], io.StringIO()
    with Display(units, total=4, stream=out, clock=clock) as display:
        for step in range(1, 10):
            clock.now += 1
            display.progress(units[0], "train", step, 100, 20.0)
        assert out.getvalue() == ""
        clock.now += 1
        display.progress(units[0], "train", 10, 100, 20.0)
        display.progress(units[0], "train", 11, 100, 20.0)
        assert out.getvalue().splitlines() == ["0 of 4 jobs; 20 steps/s, about 2 min left"]  # 10 s for 0.3 of 4 jobs
        display.job(0, ["student.widths=[64]", "seed=0"], "test accuracy 90.00%", "finished")
        display.job(1, ["seed=1"], "the loss is nan", "diverged")
        display.job(2, ["seed=2"], "pruned: below the median", "pruned")
    assert out.getvalue().splitlines()[1:] == [
        "[1/4] student.widths=[64] seed=0: test accuracy 90.00%",
        "[2/4] seed=1: diverged: the loss is nan",
        "[3/4] seed=2: pruned: below the median",
    ]


def test_time_left_counts_parts_of_running_jobs(clock):
    """60 s for 2 jobs and half of 4: 4 of 10 jobs, so 6 more take 90 s; jobs of earlier sessions tell nothing."""
    first, second, third = unit(2, 3), unit(4, 5, 6, 7), unit(8, 9, 10, 11)
    display = Display([first, second, third], total=12, done=2, stream=io.StringIO(), clock=clock)
    clock.now += 60
    for number in (2, 3):
        display.job(number, [], "", "finished")
    display.progress(second, "train", 50, 100, 10.0)
    assert display.summary() == "4 of 12 jobs: 2 finished, 2 before; 2 jobs/min, 10 steps/s, about 2 min left"
    display.progress(third, "teacher", 99, 100, 30.0)  # a teacher's training is no part of its jobs
    assert display.summary().endswith("40 steps/s, about 2 min left")
    display.progress(third, "train", 100, 100, 30.0)
    assert display.summary().endswith("about 15 s left")
    display.job(4, [], "", "failed")
    for number in (5, 6, 7, 8, 9, 10, 11):
        display.job(number, [], "", "finished")
    assert display.summary() == "12 of 12 jobs: 9 finished, 1 failed, 2 before; 10 jobs/min"


def test_kept_jobs_have_a_line_and_are_counted_once(clock):
    out = io.StringIO()
    display = Display([unit(1)], total=2, done=1, stream=out, clock=clock)
    display.job(0, ["seed=0"], "fine", "finished", kept=True)
    assert out.getvalue() == "[1/2] seed=0: fine\n"
    assert display.summary() == "1 of 2 jobs: 1 before"
    clock.now += 30
    display.job(1, ["seed=1"], "fine", "finished")
    assert display.summary() == "2 of 2 jobs: 1 finished, 1 before; 2 jobs/min"


def test_members_of_a_loop_count_one_by_one(clock):
    loop = unit(0, 1, 2, 3, strategy="loop")
    display = Display([loop], total=4, stream=io.StringIO(), clock=clock)
    clock.now += 10
    display.progress(loop, "train", 1, 2, 0.0)
    assert display.summary() == "0 of 4 jobs; about 1 min left"  # 3.5 jobs at 20 s each


def test_groups(clock):
    units = [unit(0, 1, 2), unit(3, 4, strategy="loop"), unit(5)]
    display = Display(units, total=6, stream=io.StringIO(), clock=clock)
    for number in (0, 2, 5):
        display.job(number, [], "", "finished")
    assert display.groups() == "1 of 3 groups done: 1 vmap (3 jobs), 2 loop (3 jobs)"
    display.job(1, [], "", "diverged")
    assert display.groups().startswith("2 of 3 groups done")


def test_a_clock_that_goes_back_gives_no_negative_times(clock):
    one = unit(0, 1)
    display = Display([one], total=2, stream=io.StringIO(), clock=clock)
    clock.now -= 500
    display.progress(one, "train", 1, 2, 1.0)
    display.job(0, [], "", "finished")
    assert "-" not in display.summary()


def test_terminal(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    units, out = [unit(*range(32)), unit(32)], Terminal()
    with Display(units, total=33, stream=out, clock=clock) as display:
        display.progress(units[0], "distil", 30, 60, 10.0)
        display.progress(units[1], "train", 1, 60, 0.0)
        display._live.refresh()
        display.job(32, ["student.widths=[64]", "x=[bold]"], "test accuracy :smile: 90%", "finished")
        display._live.refresh()
    text = shown(out)
    for words in ("vmap, jobs 0-31", "loop, job 32", "step 30/60", "10 steps/s, 3 s", "compiling", "1 of 33 jobs: 1 finished"):
        assert words in text
    assert "[33/33] student.widths=[64] x=[bold]: test accuracy :smile: 90%\n" in text.replace("\r", "")
    last = text[text.rindex("0 of 33 jobs") :]
    assert "1 of 33 jobs" in last and "job 32" not in last  # its bar is gone


def test_dumb_terminals_get_lines(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with Display([unit(0)], total=1, stream=out, clock=clock) as display:
        display.job(0, ["seed=0"], "done", "finished")
    assert out.getvalue() == "[1/1] seed=0: done\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_threads(terminal, monkeypatch):
    """Eight workers report at once while the display is drawn: every job has its line, and nothing hangs."""
    monkeypatch.setenv("TERM", "xterm")
    units = [unit(*range(8 * w, 8 * w + 8)) for w in range(8)]
    out = Terminal() if terminal else io.StringIO()

    def work(one):
        for step in range(40):
            display.progress(one, "train", step, 40, 5.0)
        for job in one.jobs:
            display.job(job.number, job.overrides, "fine", "finished")
            display.progress(one, "train", 40, 40, 5.0)

    with Display(units, total=64, stream=out) as display:
        threads = [threading.Thread(target=work, args=(one,), daemon=True) for one in units]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
            assert not thread.is_alive()
        assert display.summary().startswith("64 of 64 jobs: 64 finished")
    lines = [line for line in shown(out).replace("\r", "\n").splitlines() if line.startswith("[")]
    assert sorted(lines) == sorted(f"[{n + 1}/64] seed={n}: fine" for n in range(64))


def test_a_closed_pipe_does_not_end_the_sweep(clock):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with Display([unit(0)], total=1, stream=Closed(), clock=clock) as display:
        clock.now += 60
        display.progress(unit(0), "train", 1, 2, 1.0)
        display.job(0, [], "fine", "finished")
        assert display.summary().startswith("1 of 1 jobs")


def test_words():
    assert [duration(s) for s in (-5, 45, 720, 12000)] == ["0 s", "45 s", "12 min", "3 h 20 min"]
    assert [numbers(n) for n in ([3], [4, 5, 6], [0, 4], range(0, 24, 2))] == [
        "job 3", "jobs 4-6", "jobs 0, 4", "jobs 0, 2, 4, ... (12)",
    ]  # fmt: skip
    assert groups_text([("vmap", 2), ("loop", 1), ("vmap", 3)], 1) == "1 of 3 groups done: 2 vmap (5 jobs), 1 loop (1 job)"


def test_the_bar_of_a_single_run_says_what_is_left(monkeypatch):
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    bar = Bar("job 3 ", out)
    bar("train", 10, 100, 2.0)
    now[0] = 11.0
    bar("train", 20, 100, 2.0)
    assert out.getvalue() == "job 3 train: step 20/100, 2.0 steps/s, 40 s left\n"
