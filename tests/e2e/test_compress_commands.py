"""Compression by the command: the quickstart, the command behind a table's row, budgets, and one line for each mistake."""

import csv
import io
import shlex
from pathlib import Path

import pytest

from jdistill.compress.artifact import read_artifact
from tests.e2e.helpers import call, jobs, result, succeed

SMALL = ("optim.epochs=2", "teacher.optim.epochs=2", "evaluate.latency=false")
ONE = ("experiment=quickstart", "loss=none", *SMALL)


def table(sweep):
    return list(csv.DictReader(io.StringIO(succeed("table", str(sweep), "--format", "csv").out)))


def test_a_tables_row_is_made_again_by_the_command_it_gives():
    steps = "compression.steps=[distill],[prune,distill,qat],[distill,structured,int8]"
    succeed("-m", "experiment=compress_quickstart", "loss=none,kd", steps, "seed=0,1", *SMALL)
    (sweep,) = Path("sweeps").iterdir()
    assert [job["status"] for job in jobs(sweep)] == ["finished"] * 12
    rows = table(sweep)
    lines = [line for line in succeed("table", str(sweep), "--commands").out.splitlines() if line.startswith("jdistill ")]
    assert len(lines) == len(rows) == 6
    for row, line in list(zip(rows, lines, strict=True))[1::2]:
        again = Path("again") / str(lines.index(line))
        succeed(*shlex.split(line)[1:], f"hydra.sweep.dir={again}")
        (found,) = table(again)
        same = ("n", "test.accuracy.mean", "test.accuracy.std", "bytes", "nonzero", "parameters")
        assert {key: found[key] for key in same} == {key: row[key] for key in same}
    sizes = {row["compression.steps"]: float(row["bytes"]) for row in rows if row["loss"] == "kd"}
    assert sizes["[distill, structured, int8]"] < sizes["[prune, distill, qat]"] < sizes["[distill]"]


def test_a_structured_student_is_a_smaller_network_in_its_file():
    succeed(*ONE, "compression=structured", "compression.recover_epochs=1", "hydra.run.dir=out")
    params, _, about = read_artifact(Path("out/artifact.safetensors"))
    assert about["student"]["widths"] == [16] and params["fc1"]["kernel"].shape == (64, 16)
    found = result(Path("out"))
    assert found["size"]["parameters"] == 64 * 16 + 16 + 16 * 10 + 10 and found["config"]["student"]["widths"] == [32]


MISTAKES = {
    "nothing left": (("compression=prune", "compression.sparsity=0.9999"), 1, "nothing is left of fc/kernel"),
    "no units": (("compression=structured", "compression.sparsity=0.999"), 2, "leaves none of the 32 units of widths.0"),
    "no table": (("compression=pq_embedding",), 2, "compression=pq_embedding found no table"),
    "unknown step": (("compression=pipeline", "compression.steps=[distill,prun]"), 2, "did you mean 'prune'"),
    "no training": (("compression=movement_prune", "compression.recover_epochs=0"), 2, "recover_epochs=0 leaves"),
    "only": (("compression=int8", "compression.only=fc9/*"), 2, "names no weight of this network"),
    "widths": (("student=mobilenetv2", "data=synthetic", "compression=structured"), 2, "needs a student with removable widths"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_be_compressed_is_one_line(case):
    overrides, code, message = MISTAKES[case]
    done = call(*ONE, *overrides)
    (line,) = done.error_lines
    assert done.code == code and message in line
