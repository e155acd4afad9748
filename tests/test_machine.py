"""Threads that compute, compile and measure: who waits for whom."""

import threading
import time

import pytest

from jdistill.machine import Machine


class Thread(threading.Thread):
    """Runs `work(entered, leave)`: sets `entered` once inside, stays until `leave` is set; keeps its exception."""

    def __init__(self, context):
        super().__init__(daemon=True)
        self.context, self.entered, self.leave, self.error = context, threading.Event(), threading.Event(), None
        self.start()

    def run(self):
        try:
            with self.context():
                self.entered.set()
                assert self.leave.wait(10)
        except BaseException as error:
            self.error = error

    def end(self):
        self.leave.set()
        self.join(10)
        assert not self.is_alive() and self.error is None


def inside(thread):
    return thread.entered.wait(10)


def outside(thread):
    return not thread.entered.wait(0.15)


def test_many_compute_at_once():
    machine = Machine()
    threads = [Thread(machine.busy) for _ in range(5)]
    assert all(map(inside, threads))
    for thread in threads:
        thread.end()


def test_measuring_waits_until_nobody_computes():
    machine = Machine()
    first, second = Thread(machine.busy), Thread(machine.busy)
    assert inside(first) and inside(second)
    measuring = Thread(machine.quiet)
    assert outside(measuring)
    first.end()
    assert outside(measuring)
    second.end()
    assert inside(measuring)
    measuring.end()


def test_nobody_begins_to_compute_while_one_measures_or_waits_to():
    machine = Machine()
    computing = Thread(machine.busy)
    assert inside(computing)
    measuring = Thread(machine.quiet)
    assert outside(measuring)
    late = Thread(machine.busy)
    assert outside(late)  # else a measurement might wait for ever
    computing.end()
    assert inside(measuring) and outside(late)
    measuring.end()
    assert inside(late)
    late.end()


def test_one_measures_at_a_time():
    machine = Machine()
    first = Thread(machine.quiet)
    assert inside(first)
    second = Thread(machine.quiet)
    assert outside(second)
    first.end()
    assert inside(second)
    second.end()


def test_one_compiles_at_a_time_and_may_do_so_within():
    machine = Machine()
    first = Thread(machine.compiling)
    assert inside(first)
    second = Thread(machine.compiling)
    assert outside(second)
    first.end()
    assert inside(second)
    second.end()
    with machine.compiling(), machine.compiling():
        pass


@pytest.mark.parametrize("name", ["busy", "quiet", "compiling"])
def test_an_exception_leaves_the_machine_free(name):
    machine = Machine()
    with pytest.raises(ZeroDivisionError), getattr(machine, name)():
        raise ZeroDivisionError
    for context in (machine.busy, machine.quiet, machine.compiling):
        thread = Thread(context)
        assert inside(thread)
        thread.end()


def test_waiting_is_counted_for_the_thread_that_waits():
    machine, found = Machine(), {}
    computing = Thread(machine.busy)
    assert inside(computing) and machine.waited() < 0.05

    def measure():
        with machine.quiet():
            found["measuring"] = machine.waited()

    waiting = threading.Thread(target=measure)
    waiting.start()
    time.sleep(0.2)
    computing.end()
    waiting.join(10)
    assert found["measuring"] > 0.1 and machine.waited() < 0.05


def test_no_measurement_overlaps_with_anything():
    """Random threads: while one is quiet nobody else is inside."""
    machine, lock, inside_now, wrong, quiet_times = Machine(), threading.Lock(), [], [], []

    def work(number):
        for turn in range(40):
            measuring = (number + turn) % 5 == 0
            with machine.quiet() if measuring else machine.busy():
                with lock:
                    inside_now.append(measuring)
                    if any(inside_now) and len(inside_now) > 1:
                        wrong.append(list(inside_now))
                    quiet_times.append(measuring)
                time.sleep(0.0005)
                with lock:
                    inside_now.remove(measuring)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not wrong and sum(quiet_times) == 48 and len(quiet_times) == 240
