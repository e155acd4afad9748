import csv
import io
import shutil
import subprocess

import fake_runs as fake
import numpy as np
import pytest
import scipy.stats

from jdistill.errors import UsageError
from jdistill.report import collect, make_table, render, stats

GOLDEN_MARKDOWN = """\
| loss |   n | failed | test accuracy (%) | difference to loss=none [95 % CI] | p (Holm) | min. detectable |
| ---- | --: | -----: | ----------------: | --------------------------------: | -------: | --------------: |
| none |   3 |      0 |      91.00 ± 1.00 |                          baseline |        - |               - |
| dkd  |   2 |      1 |  **94.00 ± 1.41** |              +3.50 [-2.85, +9.85] |    0.148 |            8.17 |
| kd   |   3 |      0 |      93.00 ± 1.00 |              +2.00 [-0.48, +4.48] |    0.148 |            3.26 |

"""
GOLDEN_LATEX = r"""% needs \usepackage{booktabs}
\begin{tabular}{lrrrr}
\toprule
loss & n & test accuracy (\%) & difference to loss=none {[}95 \% CI] & bytes \\
\midrule
none & 3 & 91.00 $\pm$ 1.00 & baseline & 9,900 \\
dkd & 2 & 94.00 $\pm$ 1.41 & +3.50 {[}$-$2.85, +9.85] & 9,900 \\
kd & 3 & 93.00 $\pm$ 1.00 & +2.00 {[}$-$0.48, +4.48] & 9,900 \\
\bottomrule
\end{tabular}
"""
SHORT = ["n", "failed", "metric", "difference", "p", "detectable"]


def sweep(folder, records):
    return collect(fake.write_sweep(folder, records))


def rows_by(table, key):
    return {row[key]: row for row in table.rows}


@pytest.fixture
def frame(tmp_path):
    return collect(fake.small_sweep(tmp_path / "sweep"))


def test_markdown_golden(frame):
    text = render(make_table(frame, columns=SHORT), bold=True)
    assert text.startswith(GOLDEN_MARKDOWN)
    notes = text[len(GOLDEN_MARKDOWN) :].splitlines()
    assert notes[0] == "- mean ± sample standard deviation (ddof = 1) over n finished runs; metric: test.accuracy."
    assert "paired t test, Holm correction over 2 comparisons" in notes[1]
    assert notes[2:] == [
        "- reported epoch: last (after the final epoch).",
        "- teacher: test accuracy 97.00 %, 50,000 parameters, 200,000 bytes.",
        "- machine: box cpu, jax 0.10.2, commit abcdef.",
        "- jobs: 9 in all, 8 finished, 1 failed; most frequent error: out of memory.",
    ]


def test_latex_golden(frame):
    assert render(make_table(frame, columns=["n", "metric", "difference", "bytes"]), "latex").startswith(GOLDEN_LATEX)


def test_csv_golden_and_unrounded(frame):
    table = make_table(frame, metrics=["teacher_agreement"])
    found = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert list(found[0]) == [
        "loss",
        "n",
        "failed",
        "reason",
        "test.accuracy.mean",
        "test.accuracy.std",
        "test.teacher_agreement.mean",
        "test.teacher_agreement.std",
        "difference",
        "difference.low",
        "difference.high",
        "pairs",
        "p",
        "p.raw",
        "detectable",
        "parameters",
        "nonzero",
        "bytes",
        "latency_ms.1.p50",
        "latency_ms.256.p50",
        "time_s.train",
    ]
    kd = next(row for row in found if row["loss"] == "kd")
    a, b = np.array([0.92, 0.94, 0.93]), np.array([0.90, 0.91, 0.92])
    np.testing.assert_allclose(float(kd["test.accuracy.std"]), a.std(ddof=1), rtol=1e-12)
    np.testing.assert_allclose(float(kd["p.raw"]), scipy.stats.ttest_rel(a, b).pvalue, rtol=1e-9)
    np.testing.assert_allclose(
        float(kd["difference.low"]), scipy.stats.ttest_rel(a, b).confidence_interval().low, rtol=1e-9
    )
    assert found[0]["difference"] == "" and found[0]["p"] == ""
    assert table.frame["loss"].tolist() == ["none", "dkd", "kd"]


def test_text(frame):
    lines = render(make_table(frame, columns=SHORT), "text").splitlines()
    assert lines[0].split() == [
        "loss",
        "n",
        "failed",
        "test",
        "accuracy",
        "(%)",
        "difference",
        "to",
        "loss=none",
        "[95",
        "%",
        "CI]",
        "p",
        "(Holm)",
        "min.",
        "detectable",
    ]
    assert lines[2].split() == ["none", "3", "0", "91.00", "±", "1.00", "baseline", "-", "-"]


def test_comparisons_are_corrected_and_paired_by_seed(tmp_path):
    """Seeds in another order, one only in one row: the pairs are the common seeds."""
    base, kd, dkd = (
        {0: 0.90, 1: 0.91, 2: 0.93, 3: 0.92},
        {3: 0.94, 2: 0.96, 0: 0.93, 9: 0.1},
        {0: 0.9, 1: 0.92, 2: 0.93, 3: 0.94},
    )
    records = [
        fake.result(s, a, loss=loss)
        for loss, values in (("none", base), ("kd", kd), ("dkd", dkd))
        for s, a in values.items()
    ]
    table = make_table(sweep(tmp_path / "s", records), correction="bonferroni")
    rows = rows_by(table, "choices.loss")
    expected = scipy.stats.ttest_rel([0.93, 0.96, 0.94], [0.90, 0.93, 0.92]).pvalue
    np.testing.assert_allclose(rows["kd"]["p.raw"], expected, rtol=1e-9)
    np.testing.assert_allclose(rows["kd"]["p"], 2 * expected, rtol=1e-9)
    assert (rows["kd"]["pairs"], rows["kd"]["n"], rows["dkd"]["pairs"]) == (3, 4, 4)
    d = np.array([0.0, 0.01, 0.0, 0.02])
    np.testing.assert_allclose(
        rows["dkd"]["detectable"], stats.minimum_detectable_difference(4, d.std(ddof=1)), rtol=1e-9
    )
    assert any("fewer common seeds" in note for note in table.footer)
    assert any("Bonferroni correction over 2 comparisons" in note for note in table.footer)


def test_other_tests(frame):
    table = make_table(frame, test="permutation", correction="none")
    assert rows_by(table, "choices.loss")["kd"]["p"] == 2 / 8
    assert any("sign-flip permutation test, no correction" in note for note in table.footer)


def test_a_row_whose_runs_all_failed_stays(tmp_path):
    records = [fake.result(0, 0.9, loss="none"), fake.result(1, 0.9, loss="none")]
    records += [
        fake.failure(0, "loss is nan"),
        fake.failure(1, "loss is nan"),
        fake.failure(2, "a|b", status="diverged"),
    ]
    table = make_table(sweep(tmp_path / "s", records))
    text = render(table)
    assert "2 failed, 1 diverged" in text
    assert "failed (2), diverged (1): loss is nan" in text
    assert rows_by(table, "choices.loss")["kd"]["n"] == 0
    assert "comparison" in text and "over 0 comparisons" in text


def test_pending_runs_are_not_failures(tmp_path):
    records = [fake.result(0, 0.9, loss="none"), {"status": "pending", "overrides": ["loss=kd", "seed=0"]}]
    table = make_table(sweep(tmp_path / "s", records))
    text = render(table)
    assert "pending (1)" in text and "failed" not in text.splitlines()[0]
    assert "jobs: 2 in all, 1 finished, 1 pending." in text


def temperatures(folder):
    records = [fake.result(s, 0.9 + s / 100, loss="none", overrides=["loss=none", f"seed={s}"]) for s in range(2)]
    records += [
        fake.result(
            s,
            0.9 + t / 100 + s / 90,
            overrides=["loss=kd", f"loss.temperature={t}", f"seed={s}"],
            config__loss__temperature=float(t),
        )
        for t in (1, 4)
        for s in range(2)
    ]
    return sweep(folder, records)


def test_default_keys_are_those_that_vary(tmp_path):
    """Seeds, keys that the others determine (the teacher's seed, the folder) and keys of other options are not."""
    table = make_table(temperatures(tmp_path / "s"))
    assert [c.title for c in table.columns[:2]] == ["loss", "loss.temperature"]
    assert [(r["choices.loss"], r["config.loss.temperature"], r["n"]) for r in table.rows] == [
        ("none", None, 2),
        ("kd", 1.0, 2),
        ("kd", 4.0, 2),
    ]
    # each temperature is compared with the one baseline, which has no temperature
    np.testing.assert_allclose([r["difference"] for r in table.rows[1:]], [0.01 + 1 / 1800, 0.04 + 1 / 1800], rtol=1e-6)


def test_default_keys_of_one_method_with_many_seeds(tmp_path):
    table = make_table(sweep(tmp_path / "s", [fake.result(s, 0.9, overrides=[f"seed={s}"]) for s in range(3)]))
    assert [(r["choices.loss"], r["n"]) for r in table.rows] == [("kd", 3)]


def test_keys_not_overridden_count_where_nothing_determines_them(tmp_path):
    """`experiment=a` changes choices without naming them."""
    records = [
        fake.result(0, 0.9, overrides=["experiment=a"], choices__student="cnn"),
        fake.result(0, 0.8, overrides=["experiment=b"]),
    ]
    assert [c.name for c in make_table(sweep(tmp_path / "s", records)).columns][:1] == ["student"]


def test_baseline_with_other_keys_open(tmp_path):
    records = []
    for student, shift in (("cnn", 0.0), ("mlp", 0.05)):
        for loss, gain in (("none", 0.0), ("kd", 0.02)):
            for seed, noise in ((0, 0.0), (1, 0.003 * (loss == "kd"))):
                records.append(
                    fake.result(
                        seed,
                        0.8 + shift + gain + noise,
                        loss=loss,
                        choices__student=student,
                        overrides=[f"student={student}", f"loss={loss}", f"seed={seed}"],
                    )
                )
    frame = sweep(tmp_path / "s", records)
    table = make_table(frame, by=["student", "loss"], baseline="loss=none")
    differences = {(r["choices.student"], r["choices.loss"]): r.get("difference") for r in table.rows}
    assert differences[("cnn", "kd")] == pytest.approx(0.0215) and differences[("mlp", "kd")] == pytest.approx(0.0215)
    assert differences[("cnn", "none")] is None
    # against one fixed row instead
    table = make_table(frame, by=["student", "loss"], baseline="student=cnn,loss=none")
    assert {(r["choices.student"], r["choices.loss"]): r.get("difference") for r in table.rows}[
        ("mlp", "kd")
    ] == pytest.approx(0.0715)
    # a student without a baseline is not compared, and the footer says so
    without = frame[~((frame["choices.student"] == "mlp") & (frame["choices.loss"] == "none"))]
    table = make_table(without, by=["student", "loss"], baseline="loss=none")
    assert "difference" not in next(r for r in table.rows if r["choices.student"] == "mlp")
    assert any("1 row without a baseline row" in note for note in table.footer)


def test_an_undistilled_baseline_needs_no_teacher_and_no_own_keys(tmp_path):
    records = [
        fake.result(s, 0.9 + s / 100, loss="none", choices__teacher="none", overrides=["loss=none", "teacher=none"])
        for s in range(2)
    ]
    records += [
        fake.result(
            s,
            0.92 + s / 90,
            choices__teacher=t,
            config__loss__weight=w,
            overrides=["loss=kd", f"teacher={t}", f"loss.weight={w}"],
        )
        for s in range(2)
        for t in ("mlp", "cnn")
        for w in (0.5, 0.9)
    ]
    table = make_table(sweep(tmp_path / "s", records))
    assert len(table.rows) == 5
    assert all("difference" in row for row in table.rows if not row["baseline"])


def test_pooled_and_repeated_runs_are_told(tmp_path):
    frame = temperatures(tmp_path / "s")
    table = make_table(frame, by="loss")
    assert rows_by(table, "choices.loss")["kd"]["n"] == 4
    assert any("several runs of the same seed" in note for note in table.footer)
    # the mean of a seed's runs is what is paired
    np.testing.assert_allclose(rows_by(table, "choices.loss")["kd"]["difference"], 0.025 + 1 / 1800, rtol=1e-6)
    same = fake.result(0, 0.9)
    again = make_table(sweep(tmp_path / "t", [same, same, fake.result(1, 0.8)]))
    assert again.rows[0]["n"] == 2 and any("1 repeated run (same fingerprint" in note for note in again.footer)


def test_warnings_of_mixed_runs(tmp_path):
    records = [
        fake.result(0, 0.9, report="last"),
        fake.result(1, 0.91, report="best_val", environment__machine="other"),
        fake.result(2, 0.92, environment__commit="fedcba", environment__dirty=True, environment__jax="0.11.0"),
    ]
    notes = "\n".join(make_table(sweep(tmp_path / "s", records)).footer)
    for word in (
        "WARNING: runs report different epochs",
        "WARNING: runs mix machines or devices",
        "box cpu, other cpu",
        "WARNING: runs mix commits: abcdef, fedcba",
        "WARNING: runs mix jax versions: 0.10.2, 0.11.0",
    ):
        assert word in notes
    table = make_table(sweep(tmp_path / "t", [fake.result(0, 0.9, report="best_test")]))
    assert any("best_test: chosen on the test set, for reproducing papers only" in note for note in table.footer)


def test_equal_differences_are_told_and_not_significant(tmp_path):
    records = [
        fake.result(s, a, loss=loss)
        for loss, shift in (("none", 0.0), ("kd", 0.01))
        for s, a in enumerate([0.9 + shift, 0.8 + shift, 0.7 + shift])
    ]
    table = make_table(sweep(tmp_path / "s", records))
    assert "+1.00" in render(table) and "+1.00 [" not in render(table)
    assert any("equal differences in all seeds" in note for note in table.footer)


def test_a_metric_that_is_not_a_number_is_told(tmp_path):
    table = make_table(sweep(tmp_path / "s", [fake.result(0, 0.9), fake.result(1, float("nan"))]))
    assert table.rows[0]["n"] == 2
    assert any("WARNING: 1 finished run without test.accuracy" in note for note in table.footer)


def test_metrics_that_are_not_percent_and_bold(tmp_path, frame):
    table = make_table(frame, metric="test.cross_entropy", columns=["metric", "steps", "validation.accuracy"])
    assert "test cross entropy |" in render(table)
    assert "**0.1200 ± 0.0283**" in render(table, bold=True)
    assert "440" in render(table) and "validation accuracy (%)" in render(table)


def test_bad_requests(frame):
    cases = [
        ({"by": ["los"]}, "unknown table key 'los'; did you mean 'loss'"),
        ({"by": ["loss.temprature"]}, "did you mean 'loss.temperature'"),
        ({"baseline": "loss"}, "expected key=value such as loss=none, got 'loss'"),
        ({"baseline": "loss=non"}, r"no run has loss=non; did you mean 'none'\? \(found: dkd, kd, none\)"),
        ({"by": ["student"], "baseline": "loss=none"}, "its key 'loss' must be one of the table's keys; add it to by"),
        ({"metric": "test.acuracy"}, "unknown metric 'test.acuracy'; did you mean 'test.accuracy'"),
        ({"metrics": ["agreement"]}, "unknown metric 'test.agreement'; did you mean 'test.teacher_agreement'"),
        ({"columns": ["byte"]}, "unknown table column 'byte'; did you mean 'bytes'"),
        ({"test": "z"}, "unknown test 'z'"),
        ({"level": 95}, "level must be between 0 and 1, got 95"),
    ]
    for arguments, message in cases:
        with pytest.raises(UsageError, match=message):
            make_table(frame, **arguments)
    with pytest.raises(UsageError, match="unknown table format 'html'"):
        render(make_table(frame), "html")
    with pytest.raises(UsageError, match="no runs"):
        make_table(frame[:0])


NASTY = r"a_b 50% & #1 $x$ {y} \z ~ ^ <a> [q] | é → ± “x”"


def test_latex_escapes(tmp_path):
    records = [fake.result(0, 0.9, loss="none"), fake.failure(0, NASTY)]
    text = render(make_table(sweep(tmp_path / "s", records)), "latex", bold=True)
    assert (
        r"a\_b 50\% \& \#1 \$x\$ \{y\} \textbackslash{}z \textasciitilde{} \textasciicircum{} "
        r"$<$a$>$ {[}q] $|$ é ? $\pm$ ?x?" in text
    )
    assert r"{\boldmath\bfseries 90.00}" in text
    assert r"a\|b" not in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(tmp_path, frame):
    records = [fake.result(0, 0.9, loss="none"), fake.failure(0, NASTY)]
    tables = [make_table(sweep(tmp_path / "s", records)), make_table(frame, by=["student.widths", "loss"])]
    body = "\n\n".join(render(table, "latex", bold=True) for table in tables)
    (tmp_path / "t.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs}\begin{document}" + "\n" + body + r"\end{document}"
    )
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "t.tex"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stdout[-800:]


def test_list_values_are_keys(tmp_path):
    records = [
        fake.result(0, 0.9, config__student__widths=w, overrides=[f"student.widths={w}"]) for w in ([64, 64], [8])
    ]
    text = render(make_table(sweep(tmp_path / "s", records)))
    assert "| [64, 64] " in text and "| [8] " in text and "student.widths" in text


def test_a_metric_may_leave_out_its_split(frame):
    short = make_table(frame, columns=["n", "metric", "teacher_agreement"])
    long = make_table(frame, columns=["n", "metric", "test.teacher_agreement"])
    assert render(short) == render(long) == render(make_table(frame, columns=["n", "metric"], metrics=["teacher_agreement"]))
    assert any("agreement" in column.title for column in short.columns)


def test_the_metric_may_leave_out_its_split_too(frame):
    assert make_table(frame, metric="teacher_agreement").metric == "test.teacher_agreement"
