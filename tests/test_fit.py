"""The forecast against closed forms, SciPy and the figures of ScaleRL (arXiv:2510.13786).

python -m pytest tests/test_fit.py
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cispo.report.fit import Sigmoid, bootstrap_seeds, fit_power_law, fit_sigmoid, profile_A
from cispo.report.forecast import FitOptions, fit, forecast
from cispo.report.runs import find_runs, read_run, recipes
from cispo.types import ConfigError, DataError

TABLE_1 = [(2542, 1.92, 0.610), (11272, 1.89, 0.645), (4242, 1.65, 0.710), (2818, 1.77, 0.605)]  # C_mid, B, A
PAPER = Sigmoid(A=0.645, B=1.70, C_mid=10909.0, R_0=0.40)


def write_run(folder, curve, *, seed=0, cap=4.0, noise=0.0, points=40, last=1e5, steps=40):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"seed: {seed}\nsteps: {steps}\nalgorithm:\n  objective: {{type: cispo, clip_high_threshold: {cap}}}\n"
    )
    with open(folder / "metrics.jsonl", "w") as file:
        for step, C in enumerate(np.linspace(0, last, points + 1)):
            R = curve(C) if C else curve.R_0
            line = {"step": step, "tokens/total": C, "tokens/sampled": last / points if C else 0, "tokens/trained": 0}
            line |= {"time/step_s": 36.0 if C else 0.0, "eval/accuracy": float(R + noise * rng.normal())}
            file.write(json.dumps(line) + "\n")
    return folder


# ------------------------------------------------------------------------------------------------- the paper's checks


@pytest.mark.parametrize("low, high", [(1500, 50_000), (5000, 50_000), (30_000, 60_000), (0, 100_000)])
def test_the_sigmoid_recovers_its_parameters_from_any_window(low, high):
    C = np.linspace(max(low, 1), high, 75)
    found = fit_sigmoid(C, PAPER(C), R_0=0.40)
    assert (found.A, found.B, found.C_mid) == pytest.approx((0.645, 1.70, 10909), rel=1e-4)


@pytest.mark.parametrize("low, high, A", [(1500, 50_000, 1.000), (5000, 50_000, 0.738), (30_000, 60_000, 0.648)])
def test_the_power_law_overestimates_until_the_bend_is_behind(low, high, A):
    C = np.linspace(low, high, 75)
    assert pytest.approx(A, abs=2e-3) == fit_power_law(C, PAPER(C)).A


@pytest.mark.parametrize("C_mid, B, A", TABLE_1)
def test_every_row_of_table_1_is_recovered_though_none_lies_on_the_papers_grid(C_mid, B, A):
    truth = Sigmoid(A, B, C_mid, 0.3)
    C = np.linspace(1000, 40_000, 40)
    found = fit_sigmoid(C, truth(C), R_0=0.3)
    assert (found.A, found.B, found.C_mid) == pytest.approx((A, B, C_mid), rel=1e-3)


# ---------------------------------------------------------------------------------------------------- closed forms


def test_the_curve_is_half_way_at_its_midpoint_and_starts_at_R_0():
    assert PAPER(10909.0) == pytest.approx((0.40 + 0.645) / 2)
    assert PAPER(0.0) == pytest.approx(0.40)
    assert PAPER(1e12) == pytest.approx(0.645)


def test_agrees_with_scipy_on_noisy_data():
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    rng = np.random.default_rng(1)
    C = np.linspace(1500, 100_000, 60)
    R = PAPER(C) + 0.01 * rng.normal(size=60)
    ours = fit_sigmoid(C, R, R_0=0.40)
    (A, B, C_mid), _ = optimize.curve_fit(
        lambda C, A, B, C_mid: 0.4 + (A - 0.4) / (1 + (C_mid / C) ** B), C, R, p0=(0.6, 1.5, 9000.0)
    )
    assert (ours.A, ours.B, ours.C_mid) == pytest.approx((A, B, C_mid), rel=1e-3)
    power = fit_power_law(C, R, A_max=10)
    (A, D, b), _ = optimize.curve_fit(lambda C, A, D, b: A - D / (C / 1500) ** b, C, R, p0=(0.7, 0.3, 0.5))
    assert (power.A, power.D, power.b) == pytest.approx((A, D * 1500**b, b), rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(A=st.floats(0.5, 0.99), B=st.floats(0.6, 4), C_mid=st.floats(200, 5000), unit=st.sampled_from([1e-3, 1.0, 1e18]))
def test_recovers_any_noiseless_sigmoid_in_any_unit_of_compute(A, B, C_mid, unit):
    truth = Sigmoid(A, B, C_mid * unit, 0.1)
    C = np.linspace(100, 20_000, 50) * unit
    found = fit_sigmoid(C, truth(C), R_0=0.1)
    assert found.sse < 1e-8
    assert (found.A, found.C_mid) == pytest.approx((A, C_mid * unit), rel=2e-2)


def test_A_can_be_fixed_and_is_bounded():
    C = np.linspace(1000, 50_000, 40)
    assert fit_sigmoid(C, PAPER(C), R_0=0.4, A=0.7).A == 0.7
    assert pytest.approx(0.6) == fit_sigmoid(C, PAPER(C), R_0=0.4, A_max=0.6).A
    with pytest.raises(ConfigError, match="a_max"):
        fit_sigmoid(C, PAPER(C), R_0=0.4, A_max=0.3)
    with pytest.raises(DataError, match="2 points"):
        fit_sigmoid(C[:2], PAPER(C[:2]), R_0=0.4)


# --------------------------------------------------------------------------------------------------------- intervals


def test_the_profile_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    C = np.linspace(1500, 60_000, 40)
    covered = 0
    for _ in range(16):
        R = PAPER(C) + 0.01 * rng.normal(size=40)
        low, high, _ = profile_A(C, R, fit_sigmoid(C, R, R_0=0.4))
        covered += low <= 0.645 <= high
    assert covered >= 13  # of 16; below 13 has probability 0.7 % at 95 %


def test_the_seed_bootstrap_spans_the_seeds():
    C = np.linspace(1500, 60_000, 40)
    curves = [(C, Sigmoid(A, 1.7, 10909, 0.4)(C)) for A in (0.60, 0.64, 0.68)]
    best = fit_sigmoid(np.tile(C, 3), np.concatenate([R for _, R in curves]), R_0=0.4)
    found = sorted(f.A for f in bootstrap_seeds(curves, best, resamples=60))
    assert pytest.approx(0.64, abs=1e-3) == best.A
    assert found[0] == pytest.approx(0.60, abs=0.02) and found[-1] == pytest.approx(0.68, abs=0.02)
    assert bootstrap_seeds(curves[:1], best) == []


# ------------------------------------------------------------------------------------------------------- honest words


def test_a_bent_curve_of_three_seeds_supports_its_forecast(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"s{seed}", PAPER, seed=seed, noise=0.003)
    ((label, runs),) = recipes(find_runs([tmp_path]))
    found = forecast(label, runs, FitOptions(runs=()))
    assert found.supported and "3 seeds agree" in found.verdict
    assert found.A_range[0] <= found.sigmoid.A <= found.A_range[1]
    assert found.skipped == 0 and found.points == 120
    C, R, low, high = found.line[-1]
    assert pytest.approx(4e5) == C and low <= R <= high


def test_a_curve_without_a_bend_gets_an_honest_word(tmp_path):
    run = read_run(write_run(tmp_path / "r", PAPER, noise=0.005, last=5000, points=20))
    found = forecast("r", [run], FitOptions(runs=()))
    assert not found.supported
    assert "No bend yet" in found.verdict or "not pinned down" in found.verdict


def test_too_few_points_and_no_rise_are_refused(tmp_path):
    few = read_run(write_run(tmp_path / "few", PAPER, points=4))
    assert "Too few points" in forecast("few", [few], FitOptions(runs=())).verdict
    flat = read_run(write_run(tmp_path / "flat", Sigmoid(0.2, 1, 100, 0.4)))
    assert "never rose" in forecast("flat", [flat], FitOptions(runs=())).verdict


def test_what_was_held_back_tests_the_forecast(tmp_path):
    run = read_run(write_run(tmp_path / "r", PAPER))
    found = forecast("r", [run], FitOptions(runs=(), upto=5e4))
    assert found.points == 20 and found.held_out_error < 1e-4


@pytest.mark.parametrize("compute, C_mid", [("tokens", 10909), ("hours", 10909 / 2500 * 0.01), ("steps", 10909 / 2500)])
def test_units_of_compute(tmp_path, compute, C_mid):
    run = read_run(write_run(tmp_path / "r", PAPER))
    assert forecast("r", [run], FitOptions(runs=(), compute=compute)).sigmoid.C_mid == pytest.approx(C_mid, rel=1e-3)


def test_the_command_compares_recipes_at_A_fixed_and_writes_json(tmp_path, capsys):
    for cap, B in ((4.0, 1.2), (8.0, 2.0)):
        for seed in range(2):
            write_run(tmp_path / f"c{cap}-{seed}", Sigmoid(0.64, B, 10909, 0.4), seed=seed, cap=cap, noise=0.002)
    assert fit(FitOptions(runs=(tmp_path,), json=tmp_path / "fit.json", resamples=20)) == 0
    written = json.loads((tmp_path / "fit.json").read_text())
    assert [round(f["sigmoid"]["B"], 1) for f in written] == [1.2, 2.0]
    assert "Efficiency at A fixed" in capsys.readouterr().out


def test_bad_input_is_named(tmp_path):
    with pytest.raises(DataError, match="not a run folder"):
        fit(FitOptions(runs=(tmp_path,)))
    run = write_run(tmp_path / "r", PAPER)
    with pytest.raises(DataError, match="eval/nothing"):
        fit(FitOptions(runs=(run,), metric="eval/nothing"))
    with pytest.raises(ConfigError, match="model-params"):
        fit(FitOptions(runs=(run,), compute="flops"))
