"""What the workers of test_executors.py do instead of training; no JAX at once, so that a worker starts in no time."""

import json
import os
import signal
import time

from jdistill.standing import Diverged, Interrupted, Pruned


def carry(unit, settings, *, stop, progress, judge):
    """Does what each job's config says, and gives back where it was done."""
    return [_act(unit, job, stop, progress, judge) for job in unit.jobs]


def _act(unit, job, stop, progress, judge):
    job.folder.mkdir(parents=True, exist_ok=True)
    attempts = job.folder / "attempts"
    attempts.write_text((attempts.read_text() if attempts.exists() else "") + f"{os.getpid()}\n")
    progress(unit, "student", 1, 2, 3.0)
    do = job.config["do"]
    if do == "finish":
        finish(job)
    elif do == "die" or (do == "die_once" and len(attempts.read_text().split()) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    elif do == "raise":
        raise KeyError("loss")
    elif do == "diverge":
        return Diverged("diverged: the loss is nan")
    elif do == "until_stop" or (do == "second_time" and len(attempts.read_text().split()) == 1):
        wait_for(stop)
        return Interrupted("interrupted: a checkpoint was written")
    elif do == "judged":
        reason, epoch = None, 0
        while reason is None and epoch < 400:
            epoch += 1
            reason = judge(job.number, epoch, {"accuracy": 0.5})
            time.sleep(0.02)
        return Pruned(f"{reason} in epoch {epoch}")
    names = ("CUDA_VISIBLE_DEVICES", "PJRT_NPROC")
    return {"job": job.number, "pid": os.getpid(), **{name: os.environ.get(name) for name in names}}


def finish(job):
    from jdistill.config import fingerprint

    result = {"status": "finished", "fingerprint": fingerprint(job.config), "job": job.number}
    (job.folder / "result.json").write_text(json.dumps(result))


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def count_teachers(unit, settings, **given):
    """Trains the unit, and leaves a line in the cache for each teacher that is trained here."""
    from jdistill.sweep.worker import train
    from jdistill.teachers import store

    real = store._train

    def counted(*arguments, **more):
        with open(os.path.join(settings.cache, "trained"), "a") as file:
            file.write("a teacher\n")
        return real(*arguments, **more)

    store._train = counted
    return train(unit, settings, **given)
