import math
import warnings

import numpy as np
import pytest
import scipy.stats

from jdistill.errors import UsageError
from jdistill.report import stats

A = np.array([0.912, 0.934, 0.921, 0.945, 0.930, 0.917])
B = np.array([0.905, 0.921, 0.924, 0.931, 0.919, 0.911])


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_paired_t_against_scipy():
    c = stats.compare(A, B)
    reference = scipy.stats.ttest_rel(A, B)
    interval = reference.confidence_interval(0.95)
    assert c.n == 6
    np.testing.assert_allclose(c.p, reference.pvalue, rtol=1e-10)
    np.testing.assert_allclose([c.low, c.high], [interval.low, interval.high], rtol=1e-10)
    np.testing.assert_allclose([c.difference, c.std], [(A - B).mean(), (A - B).std(ddof=1)], rtol=1e-12)


def test_by_hand_for_two_pairs():
    # differences 1 and 3: mean 2, std sqrt(2), t = 2 with 1 degree of freedom (Cauchy): p = 1 - 2 atan(2) / pi
    c = stats.compare([1.0, 4.0], [0.0, 1.0])
    np.testing.assert_allclose(c.p, 1 - 2 * math.atan(2) / math.pi, rtol=1e-12)
    np.testing.assert_allclose(c.high - 2, math.tan(0.475 * math.pi), rtol=1e-10)


def test_sign_flip_against_scipy_and_by_hand():
    reference = scipy.stats.permutation_test((A - B,), np.mean, permutation_type="samples", n_resamples=np.inf)
    np.testing.assert_allclose(stats.sign_flip(A - B), reference.pvalue, rtol=1e-12)
    assert stats.compare(A, B, "permutation").p == stats.sign_flip(A - B)
    assert stats.sign_flip([1.0, 2.0, 3.0]) == 2 / 8
    assert stats.sign_flip([1.0, 1.0, -1.0]) == 1.0
    assert stats.sign_flip([0.1, 0.1, 0.1]) == 0.25  # sums that differ in the last digit are equal


def test_sign_flip_of_many_pairs_is_near_the_t_test():
    d = np.random.default_rng(1).normal(0.3, 1, 40)
    assert abs(stats.sign_flip(d) - scipy.stats.ttest_1samp(d, 0).pvalue) < 0.01
    assert stats.sign_flip(d) == stats.sign_flip(d)


@pytest.mark.parametrize("n", [2, 5, 12, 30])
def test_wilcoxon_against_scipy(n):
    d = np.random.default_rng(n).normal(0.4, 1, n)
    np.testing.assert_allclose(stats.wilcoxon(d), scipy.stats.wilcoxon(d, method="exact").pvalue, rtol=1e-10)


def test_wilcoxon_with_ties_is_exact():
    d = np.array([1.0, 1.0, -1.0, 2.0, 3.0, 3.0])
    ranks = scipy.stats.rankdata(np.abs(d))
    signs = np.array(np.meshgrid(*[[0, 1]] * 6)).reshape(6, -1).T
    sums = signs @ ranks
    centre = ranks.sum() / 2
    expected = np.mean(np.abs(sums - centre) >= abs(ranks[d > 0].sum() - centre) - 1e-9)
    np.testing.assert_allclose(stats.wilcoxon(d), expected, rtol=1e-12)
    np.testing.assert_allclose(stats.wilcoxon([*d, 0.0]), expected, rtol=1e-12)


def test_too_few_pairs():
    one = stats.compare([0.9], [0.8])
    assert one.n == 1 and one.difference == pytest.approx(0.1)
    assert all(math.isnan(v) for v in (one.std, one.low, one.high, one.p, one.detectable))
    none = stats.compare([], [])
    assert none.n == 0 and math.isnan(none.difference) and math.isnan(none.p)


def test_equal_differences():
    same = stats.compare([0.9, 0.8, 0.7], [0.9, 0.8, 0.7])
    assert (same.difference, same.p) == (0, 1) and math.isnan(same.low) and math.isnan(same.detectable)
    shifted = stats.compare([0.9, 0.8, 0.7], [0.8, 0.7, 0.6])  # equal but for rounding errors
    assert shifted.difference == pytest.approx(0.1) and shifted.std == 0 and math.isnan(shifted.p)
    assert stats.compare([0.9, 0.8, 0.7], [0.8, 0.7, 0.6], "permutation").p == 0.25
    assert stats.compare([0.9, 0.8, 0.7], [0.8, 0.7, 0.6], "wilcoxon").p == 0.25
    assert stats.compare([0.9, 0.8], [0.9, 0.8], "wilcoxon").p == 1


def test_pairs_are_the_seeds_in_both():
    a, b = stats.pair({0: 1.0, 2: 3.0, 1: 2.0, 4: math.nan}, {1: 20.0, 0: 10.0, 3: 30.0, 4: 1.0})
    assert a.tolist() == [1.0, 2.0] and b.tolist() == [10.0, 20.0]


def test_corrections_by_hand():
    p = [0.01, 0.04, 0.03, 0.005]
    np.testing.assert_allclose(stats.correct(p, "holm"), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(stats.correct(p, "bonferroni"), [0.04, 0.16, 0.12, 0.02])
    np.testing.assert_allclose(stats.correct(p, "bh"), scipy.stats.false_discovery_control(p))
    np.testing.assert_allclose(stats.correct(p, "none"), p)
    np.testing.assert_allclose(stats.correct([0.6, 0.7], "holm"), [1.0, 1.0])


def test_corrections_skip_nan():
    np.testing.assert_allclose(stats.correct([0.01, math.nan, 0.04]), [0.02, math.nan, 0.04])
    assert stats.correct([]).tolist() == []


def test_holm_controls_the_family_wise_error():
    rng = np.random.default_rng(0)
    wrong = [np.any(stats.correct(rng.uniform(size=8)) < 0.05) for _ in range(4000)]
    assert 0.035 < np.mean(wrong) < 0.06


# From statsmodels 0.14: TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8).
@pytest.mark.parametrize(
    ("n", "effect"), [(34, 0.4950291), (15, 0.7780225), (10, 0.9960019), (5, 1.6819971), (3, 3.2640436)]
)
def test_detectable_difference_of_statsmodels(n, effect):
    np.testing.assert_allclose(stats.minimum_detectable_difference(n, 1.0), effect, rtol=1e-5)


@pytest.mark.parametrize("n", [2, 3, 5, 50, 1000])
def test_detectable_difference_inverts_scipys_power(n):
    effect = stats.minimum_detectable_difference(n, 2.0) / 2.0
    critical = scipy.stats.t.ppf(0.975, n - 1)
    power = scipy.stats.nct.sf(critical, n - 1, effect * math.sqrt(n))
    np.testing.assert_allclose(power, 0.8, atol=1e-6)


def test_detectable_difference_by_simulation():
    delta = stats.minimum_detectable_difference(4, 0.5)
    d = np.random.default_rng(0).normal(delta, 0.5, (20000, 4))
    assert abs(np.mean(scipy.stats.ttest_1samp(d, 0, axis=1).pvalue < 0.05) - 0.8) < 0.012


def test_detectable_difference_at_the_edges():
    assert math.isnan(stats.minimum_detectable_difference(1, 1.0))
    assert math.isnan(stats.minimum_detectable_difference(5, math.nan))
    assert stats.minimum_detectable_difference(5, 0.0) == 0


def test_mean_and_interval():
    mean, std = stats.mean_std(A)
    np.testing.assert_allclose([mean, std], [A.mean(), A.std(ddof=1)])
    expected = scipy.stats.t.interval(0.9, 5, A.mean(), scipy.stats.sem(A))
    np.testing.assert_allclose(stats.mean_interval(A, 0.9), expected, rtol=1e-10)
    assert stats.mean_std([2.0])[0] == 2 and math.isnan(stats.mean_std([2.0])[1])
    assert all(map(math.isnan, stats.mean_interval([2.0])))


def test_unknown_names():
    with pytest.raises(UsageError, match="unknown test 'wilcoxn'; did you mean 'wilcoxon'"):
        stats.compare(A, B, "wilcoxn")
    with pytest.raises(UsageError, match="unknown correction 'hom'"):
        stats.correct([0.1], "hom")
