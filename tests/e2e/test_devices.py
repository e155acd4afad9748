"""The command on several devices."""

import socket

import pytest

from tests.e2e.helpers import TINY, finish, result, rows, saved_step, sole_error, start, until

DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


@pytest.mark.slow
def test_the_command_on_eight_devices_gives_what_one_gives(tmp_path):
    """`data` and `single` with one teacher; the batch is divided, the short last one is not."""
    found = {}
    for layout in ("single", "data"):
        folder = tmp_path / layout
        command = (*TINY, f"parallel={layout}", "optim.drop_last=false", f"hydra.run.dir={folder}")
        done = finish(start(*command, cwd=tmp_path, **DEVICES))
        assert done.code == 0, done.err
        found[layout] = result(folder)
    one, several = (found[layout]["metrics"] for layout in ("single", "data"))
    assert several["test"]["accuracy"] == pytest.approx(one["test"]["accuracy"], abs=0.01)
    assert several["train"]["loss"] == pytest.approx(one["train"]["loss"], rel=1e-4)


def test_a_batch_that_the_devices_do_not_divide_is_one_line(tmp_path):
    done = finish(start(*TINY, "parallel=data", "optim.batch_size=36", cwd=tmp_path, **DEVICES))
    sole_error(done, r"optim\.batch_size is 36, which 8 devices do not divide; take 32 or 40", 2)


def test_processes_belong_to_one_run_not_to_a_sweep(tmp_path):
    command = ("-m", *TINY, "seed=0,1", "parallel=data", "parallel.distributed=[127.0.0.1:1,2,0]")
    done = finish(start(*command, cwd=tmp_path))
    sole_error(done, r"parallel\.distributed joins the processes of one run; leave it out of a multirun", 2)


# -- two processes with two devices each

BOTH = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def together(tmp_path, folder, *changes):
    """The command in two processes that train one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (*TINY, "student.dropout=0.2", "parallel=data", "checkpoint.every_epochs=1", f"hydra.run.dir={folder}", *changes)
    return [start(*command, f"parallel.distributed=[127.0.0.1:{port},2,{i}]", cwd=tmp_path, **BOTH) for i in (0, 1)]


@pytest.mark.slow
def test_two_processes_train_one_run_and_resume_it(tmp_path):
    """Dropout on; the best epoch kept. Killed and resumed it is the undisturbed run bit for bit, and one process's."""
    changes = ("report=best_val", "data.validation=0.1", "optim.epochs=60", "optim.drop_last=false")
    whole, killed, alone = (tmp_path / name for name in ("whole", "killed", "alone"))
    for process in together(tmp_path, whole, *changes):
        done = finish(process)
        assert done.code == 0, done.err
    processes = together(tmp_path, killed, *changes)
    assert until(processes[0], lambda: saved_step(killed) >= 16)
    for process in processes:
        process.kill()
        finish(process)
    assert saved_step(killed) >= 16 and not (killed / "result.json").exists()
    for process in together(tmp_path, killed, *changes):
        done = finish(process)
        assert done.code == 0, done.err
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (killed / "artifact.safetensors").read_bytes() == (whole / "artifact.safetensors").read_bytes()

    four = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = (*TINY, "student.dropout=0.2", "parallel=data", f"hydra.run.dir={alone}", *changes)
    done = finish(start(*command, cwd=tmp_path, **four))
    assert done.code == 0, done.err
    one, two = result(alone), result(whole)
    assert two["fingerprint"] == one["fingerprint"]  # neither processes nor checkpoints change what a run is
    assert two["epoch"] == one["epoch"]
    assert two["metrics"]["test"]["accuracy"] == pytest.approx(one["metrics"]["test"]["accuracy"], abs=0.003)
    for a, b in zip(rows(alone)[:3], rows(whole)[:3], strict=True):  # float32 sums in another order part slowly
        assert b["train"]["loss"] == pytest.approx(a["train"]["loss"], rel=1e-5)
