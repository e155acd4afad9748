"""Kills a sweep of 24 jobs at random moments, again and again; it must end as if nothing had ever happened to it.

A round is one sweep: it is started, killed at a moment drawn uniformly from its undisturbed duration (the shortest seen,
as other work on the machine makes it longer), started again by the same command, and so on until a session ends by
itself; then it is compared with the undisturbed sweep. Rounds follow one another until so many kills are through. Half of
the jobs are trained in populations, half one by one; with a teacher trained in the sweep, dropout, the best epoch kept, a
recovery stage after pruning, and members that diverge.
"""

import json
import os
import random
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from _common import fresh, jdistill, options, report, workplace

EVERY = 8
SWEEP = (
    "-m", "data=digits", "loss=kd", "teacher.widths=[32]", "teacher.optim.epochs=4", "teacher.optim.batch_size=64",
    "student.widths=[16]", "student.dropout=0.2", "optim=sgd", "optim.batch_size=64", "optim.epochs=4", "report=best_val",
    "compression=prune", "compression.recover_epochs=2", "evaluate.latency=false", f"checkpoint.every_steps={EVERY}",
    "optim.lr=0.05,0.1,1e30", "seed=0,1,2,3", "parallel.device_bytes=1,1e9",  # 1: batch by batch, which is never stacked
    "hydra.launcher.strategy=vmap", "hydra.launcher.max_members=6", "hydra.launcher.workers=2",
)  # fmt: skip
COLUMNS = "n,failed,test.accuracy,parameters,size.nonzero,size.bytes"
FILES = ("metrics.jsonl", "artifact.safetensors")
FINAL = ("finished", "diverged")


class Wrong(Exception):
    """A killed sweep is not what the undisturbed one is."""


class Place(NamedTuple):
    """Where a round happens: a sweep folder, and a cache of its own, so that the teacher is trained in the round."""

    sweep: Path
    cache: Path

    @classmethod
    def make(cls, folder: Path, compiled: Path) -> "Place":
        place = cls(fresh(folder) / "sweep", folder / "cache")
        place.cache.mkdir(parents=True)
        compiled.mkdir(exist_ok=True)
        (place.cache / "compiled").symlink_to(compiled)
        return place

    def start(self) -> "subprocess.Popen[str]":
        environment = {**os.environ, "JDISTILL_CACHE": str(self.cache)}
        command = jdistill(*SWEEP, f"hydra.sweep.dir={self.sweep}")
        with (self.cache.parent / "log.txt").open("w") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)

    def finish(self) -> float:
        """Lets a session end; its seconds."""
        started = time.perf_counter()
        self.ended(self.start().wait())
        return time.perf_counter() - started

    def ended(self, code: int) -> None:
        log = (self.cache.parent / "log.txt").read_text()
        if code != 1 or "Traceback" in log or "8 of 24 jobs failed" not in log:  # the members that diverge
            raise Wrong(f"a session ended with code {code}: {log[-2000:]}")


class Seen(NamedTuple):
    """What a kill leaves behind.

    Attributes:
      results: job folder -> inode and time of its final `result.json`.
      saved: checkpoint folder -> stage and step of the newest.
      jobs: checkpoint folder of students -> job folders that it is of.
      teacher: inode and time of the trained teacher's manifest, or None.
      began: whether the jobs were written down.
    """

    results: dict[str, tuple[int, int]]
    saved: dict[str, tuple[int, int]]
    jobs: dict[str, list[str]]
    teacher: tuple[int, int] | None
    began: bool

    @property
    def moment(self) -> str:
        """What was going on."""
        if not self.began:
            return "start-up"
        if self.teacher is None:
            return "teacher"
        return "training" if len(self.results) < 24 else "report"


def look(place: Place) -> Seen:
    """What is on disk now."""
    results = {}
    for path in place.sweep.glob("*/result.json"):
        if json.loads(path.read_text())["status"] in FINAL:
            results[path.parent.name] = stamp(path)
    kept = [*place.sweep.glob("*/checkpoints"), *place.sweep.glob("populations/*/checkpoints")]
    kept += place.cache.glob("teachers/*.partial/checkpoints")
    saved = {str(folder): newest for folder in kept if (newest := newest_of(folder))}
    jobs = {folder: jobs_of(Path(folder).parent) for folder in saved if ".partial" not in folder}
    manifests = list(place.cache.glob("teachers/*[!l]/manifest.json"))  # not in `.partial`
    if len(manifests) > 1:
        raise Wrong(f"{len(manifests)} teachers")
    teacher = stamp(manifests[0]) if manifests else None
    return Seen(results, saved, jobs, teacher, (place.sweep / "jobs.jsonl").is_file())


def stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def jobs_of(unit: Path) -> list[str]:
    if unit.parent.name != "populations":
        return [unit.name]
    return [Path(job["folder"]).name for job in json.loads((unit / "unit.json").read_text())["jobs"]]


def newest_of(folder: Path) -> tuple[int, int] | None:
    names = [path.name.split("-")[:2] for path in folder.iterdir() if path.name.replace("-", "").isdigit()]
    return max(((int(stage), int(step)) for stage, step in names), default=None)


def check(before: Seen, now: Seen, place: Place) -> int:
    """Nothing that was there is lost or written again; returns the most steps any unit will have to repeat."""
    for name, mark in before.results.items():
        if now.results.get(name) != mark:
            raise Wrong(f"the result of {name} was written again")
    if before.teacher is not None and now.teacher != before.teacher:
        raise Wrong("the teacher was trained again")
    for folder, reached in before.saved.items():
        if folder in now.saved and now.saved[folder] < reached:
            raise Wrong(f"{folder} went back from {reached} to {now.saved[folder]}")
        if folder not in now.saved and not set(before.jobs.get(folder, [])) <= now.results.keys():
            raise Wrong(f"{folder} is gone, and its jobs have not ended")
    repeated = 0
    for folder, jobs in now.jobs.items():
        for path in (place.sweep / job / "metrics.jsonl" for job in jobs):
            if path.is_file() and (rows := path.read_text().splitlines()):
                repeated = max(repeated, json.loads(rows[-1])["step"] - now.saved[folder][1])
    if repeated > EVERY:
        raise Wrong(f"{repeated} steps are lost, though a checkpoint is due every {EVERY}")
    return repeated


def outcome(place: Place) -> dict[str, Any]:
    """What must not differ: the table, and the files of each job and of the teacher, as bytes."""
    command = jdistill("table", str(place.sweep), "--format", "csv", "--columns", COLUMNS)
    table = subprocess.run(command, capture_output=True, check=True).stdout
    found = {"table": table}
    for path in (*place.sweep.glob("*/result.json"), *place.cache.glob("teachers/*/manifest.json")):
        for name in FILES:
            file = path.with_name(name)
            found[f"{path.parent.name}/{name}"] = file.read_bytes() if file.is_file() else None
        measured = json.loads(path.read_text())
        found[f"{path.parent.name}/metrics"] = measured.get("metrics")
    return found


def compare(expected: dict[str, Any], found: dict[str, Any]) -> None:
    if wrong := sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)):
        raise Wrong(f"{len(wrong)} of {len(expected)} differ from the undisturbed sweep: {', '.join(wrong[:5])}")


class Tally:
    """What happened so far."""

    def __init__(self, duration: float):
        self.duration, self.moments, self.repeated, self.rounds = duration, Counter[str](), 0, 0

    @property
    def kills(self) -> int:
        return self.moments.total()


def round_of(place: Place, drawn: random.Random, tally: Tally, most: int) -> None:
    """One sweep, killed until a session ends by itself or there were `most` kills."""
    before = Seen({}, {}, {}, None, False)
    while tally.kills < most:
        started = time.perf_counter()
        process = place.start()
        try:
            place.ended(process.wait(drawn.uniform(0, tally.duration)))
            if not before.began:
                tally.duration = min(tally.duration, time.perf_counter() - started)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        now = look(place)
        tally.repeated = max(tally.repeated, check(before, now, place))
        tally.moments[now.moment] += 1
        before = now
    else:
        place.finish()
    check(before, look(place), place)
    tally.rounds += 1


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="work here and keep everything (default: a temporary folder)")
    given = parser.parse_args()
    drawn, started = random.Random(given.seed), time.perf_counter()
    with workplace(given.folder) as folder:
        Place.make(folder / "warm", folder / "compiled").finish()  # compiles
        whole = Place.make(folder / "whole", folder / "compiled")
        tally = Tally(whole.finish())
        expected = outcome(whole)
        print(f"undisturbed: 24 jobs in {tally.duration:.1f} s", flush=True)
        while tally.kills < given.kills:
            place = Place.make(folder / "killed", folder / "compiled")
            try:
                round_of(place, drawn, tally, given.kills)
                compare(expected, outcome(place))
            except Wrong as error:
                raise SystemExit(f"round {tally.rounds}, after {tally.kills} kills: {error}\n{place.sweep}") from error
            print(f"round {tally.rounds}: as undisturbed ({tally.kills} of {given.kills} kills)", flush=True)
    numbers = {
        "kills": tally.kills, "sweeps": tally.rounds, "moments": dict(tally.moments), "undisturbed_s": tally.duration,
        "steps_repeated": tally.repeated, "checkpoint_steps": EVERY, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    during = ", ".join(f"{count} in {name}" for name, count in tally.moments.most_common())
    print(
        f"{tally.kills} kills ({during}) of {tally.rounds} sweeps: nothing finished was written again, each teacher was "
        "trained once, all files and tables are the undisturbed ones; at most "
        f"{tally.repeated} steps of recorded epochs were repeated after a kill ({numbers['seconds']:.0f} s)"
    )
    report(numbers, given.out)


if __name__ == "__main__":
    main()
