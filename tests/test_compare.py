"""Paired statistics against hand-computed numbers and SciPy, and a real comparison of two small runs.

python -m pytest tests/test_compare.py
"""

import json
import math
import shutil

import numpy as np
import pytest

from cispo.report.compare import CompareOptions, arms, compare
from cispo.report.paired import (
    Steps,
    area,
    bootstrap_mean,
    paired_difference,
    paired_ratio,
    sign_test,
    steps_to,
)
from cispo.types import ConfigError, RunError


def test_steps_to_a_threshold_and_censoring():
    curve = [(0, 0.1), (2, 0.5), (4, 0.92), (6, 0.7), (8, 0.95)]
    assert steps_to(curve, 0.9, 8) == Steps(4.0, False)
    assert steps_to(curve, 0.99, 8) == Steps(8.0, True)
    assert steps_to(curve, 0.94, 6) == Steps(6.0, True)


def test_area_is_the_trapezoid_mean_whatever_the_spacing():
    assert area([(0, 0.0), (10, 1.0)]) == pytest.approx(0.5)
    assert area([(0, 0.0), (1, 1.0), (10, 1.0)]) == pytest.approx(0.95)
    assert math.isnan(area([(0, 1.0)]))


def test_paired_differences_use_the_pairing():
    a, b = [1.0, 10.0, 20.0, 30.0], [2.0, 11.0, 21.0, 31.0]
    found = paired_difference(a, b)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)  # unpaired, the interval would span ± 20
    assert bootstrap_mean(a).low < 8 and bootstrap_mean(a).high > 22
    doubled = paired_ratio(a, [2 * x for x in a])
    assert (doubled.value, doubled.low, doubled.high) == pytest.approx((2, 2, 2))


def test_the_bootstrap_interval_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    x = np.random.default_rng(3).normal(5, 2, size=20)
    ours = bootstrap_mean(x, resamples=20_000)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0))
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.03)


@pytest.mark.parametrize("wins, losses", [(8, 0), (6, 2), (4, 4), (0, 5)])
def test_the_sign_test_agrees_with_scipy(wins, losses):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    a = [0.0] * (wins + losses) + [1.0]
    b = [1.0] * wins + [-1.0] * losses + [1.0]  # the last pair ties
    assert sign_test(a, b) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)


def test_arms_are_recipes_times_values(tmp_path):
    recipe = tmp_path / "grpo.yaml"
    recipe.write_text("algorithm: {objective: {type: ppo_clip}}\n")
    options = CompareOptions(
        recipes=(str(recipe),), vary=("algorithm.updates_per_rollout=1,4", "optimizer.learning_rate=1e-4,3e-4")
    )
    found = arms(options)
    assert [a.label for a in found][:2] == [
        "grpo, updates_per_rollout 1, learning_rate 1e-4",
        "grpo, updates_per_rollout 1, learning_rate 3e-4",
    ]
    assert found[3].config.optimizer.learning_rate == 3e-4 and found[3].config.algorithm.updates_per_rollout == 4


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"vary": ("steps",)}, "path=value"),
        ({"vary": ("steps=3,3",)}, "are the same"),
        ({"seeds": 1}, "at least 2"),
        ({"set": ("eval.every=0",)}, "never measured"),
        ({"vary": ("optimizer.lr=1",)}, "unknown key"),
    ],
)
def test_bad_input_is_named_before_anything_runs(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        compare(CompareOptions(out=tmp_path / "c", **wrong))
    assert not (tmp_path / "c").exists()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Two caps, two seeds, two steps of the real `think`: about ten seconds a core."""
    out = tmp_path_factory.mktemp("compare") / "c"
    options = CompareOptions(
        vary=("algorithm.objective.clip_high_threshold=4,8",),
        set=("steps=2", "eval.every=1", "eval.max_prompts=32", "rollout.groups_per_step=8",
             "algorithm.updates_per_rollout=4"),
        seeds=2, out=out, resamples=100, threshold=0.05,
    )  # fmt: skip
    assert compare(options) == 0
    return options


def test_a_comparison_runs_writes_its_tables_and_pairs_its_seeds(comparison):
    results = json.loads((comparison.out / "comparison.json").read_text())
    assert [r["label"] for r in results] == ["clip_high_threshold 4", "clip_high_threshold 8"]
    assert results[0]["seeds"] == [0, 1] and results[1]["difference"] is not None
    assert "clip_high_threshold 8" in (comparison.out / "comparison.md").read_text()
    assert (comparison.out / "report.html").stat().st_size < 15e6
    before = {
        arm: json.loads((comparison.out / "runs" / f"clip_high_threshold-{arm}-s1" / "metrics.jsonl").open().readline())
        for arm in (4, 8)
    }
    assert before[4] == before[8] or before[4]["eval/accuracy"] == before[8]["eval/accuracy"]


def test_a_comparison_goes_on_where_it_was(comparison):
    runs = comparison.out / "runs"
    kept = (runs / "clip_high_threshold-4-s0" / "metrics.jsonl").stat().st_mtime_ns
    torn = runs / "clip_high_threshold-8-s1"
    (torn / "metrics.jsonl").write_text((torn / "metrics.jsonl").open().readline())  # as if killed after step 0
    for checkpoint in (torn / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    assert compare(comparison) == 0
    assert (runs / "clip_high_threshold-4-s0" / "metrics.jsonl").stat().st_mtime_ns == kept
    assert len((torn / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_run_that_fails_ends_the_comparison_with_its_message(tmp_path):
    with pytest.raises(RunError, match="seed 0: .*/nowhere/at/all"):
        compare(CompareOptions(out=tmp_path / "c", set=("model.path=/nowhere/at/all", "eval.every=1"), seeds=2, jobs=1))
