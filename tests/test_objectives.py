"""Every objective against hand-computed numbers, float64 autograd, and the laws that tie them together."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cispo import objectives as o
from cispo.types import ConfigError

A3 = torch.tensor([1.0, -1.0, 2.0])
ANCHOR3 = torch.full((3,), -1.0)
LOGP3 = torch.tensor([-1.69315, -1.0, -0.59453])
BOUNDS = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

finite = st.floats(-8.0, 0.0, width=32)
ROWS = st.lists(st.tuples(finite, finite, st.floats(-3, 3, width=32)), min_size=1, max_size=8)


def token_mean(objective, logprobs, **columns):
    logprobs = logprobs.clone().requires_grad_()
    loss = objective(logprobs, **columns)
    assert loss.shape == logprobs.shape
    (grad,) = torch.autograd.grad(loss.mean(), logprobs)
    return loss.mean().item(), grad


def coefficients(objective, rows, dtype=torch.float64, **options):
    logprobs, anchor, A = torch.tensor(rows, dtype=dtype).T
    logprobs = logprobs.clone().requires_grad_()
    loss = objective(logprobs, anchor_logprobs=anchor, advantages=A, **options)
    return torch.autograd.grad(loss.sum(), logprobs)[0], (logprobs - anchor).exp().detach(), A


def test_cispo_by_hand():
    loss, grad = token_mean(partial(o.cispo, **BOUNDS), LOGP3, anchor_logprobs=ANCHOR3, advantages=A3)
    assert loss == pytest.approx(0.593797, abs=2e-6)
    torch.testing.assert_close(grad, torch.tensor([-0.266667, 0.333333, -0.8]), atol=2e-6, rtol=0)


def test_ppo_by_hand():
    loss, _ = token_mean(partial(o.ppo_clip, **BOUNDS), LOGP3, anchor_logprobs=ANCHOR3, advantages=A3)
    assert loss == pytest.approx(-0.63333, abs=1e-5)


@pytest.mark.parametrize("A", [1.5, -1.5])
def test_above_the_cap_the_weight_is_the_cap_for_both_signs(A):
    loss, grad = token_mean(
        o.cispo, torch.tensor([-1.0, -1.0]), anchor_logprobs=torch.tensor([-9.0, -1.0]), advantages=torch.tensor([A, 0])
    )
    assert loss == 4.0 * A / 2
    assert grad.tolist() == [-4.0 * A / 2, 0.0]


def test_a_small_ratio_stays_small():
    _, grad = token_mean(
        o.cispo, torch.tensor([-1.0 + math.log(0.01)]), anchor_logprobs=-torch.ones(1), advantages=torch.ones(1)
    )
    assert grad.item() == pytest.approx(-0.01, rel=1e-5)


def test_dual_clip_bounds_the_loss_of_negative_tokens():
    columns = {"anchor_logprobs": torch.tensor([-5.0, -5.0, -1.0]), "advantages": torch.tensor([-2.0, 2.0, -2.0])}
    logprobs = -torch.ones(3)
    assert o.ppo_clip(logprobs, **columns, dual_clip=3.0).tolist() == pytest.approx([6.0, -2.4, 2.0])
    _, grad = token_mean(partial(o.ppo_clip, dual_clip=3.0), logprobs, **columns)
    assert grad.tolist() == pytest.approx([0.0, 0.0, 2 / 3])
    with pytest.raises(ConfigError, match="dual_clip = 1"):
        o.ppo_clip(logprobs, **columns, dual_clip=1)


def test_reinforce_cross_entropy_and_dro_by_hand():
    assert o.reinforce(LOGP3, advantages=A3).tolist() == pytest.approx([1.69315, -1.0, 1.18906])
    assert o.cross_entropy(LOGP3).tolist() == pytest.approx([1.69315, 1.0, 0.59453])
    loss, grad = token_mean(partial(o.dro, beta=0.5), LOGP3[:1], anchor_logprobs=ANCHOR3[:1], advantages=A3[:1])
    assert loss == pytest.approx(1.69315 + 0.25 * 0.69315**2)
    assert grad.item() == pytest.approx(-1.0 - 0.5 * 0.69315)


@given(ROWS)
def test_the_coefficient_of_cispo_is_its_formula(rows):
    got, ratio, A = coefficients(o.cispo, rows, **BOUNDS)
    torch.testing.assert_close(got, -ratio.clamp(0.8, 1.2) * A)


@given(ROWS)
def test_cispo_with_both_bounds_one_is_reinforce(rows):
    got, _, A = coefficients(o.cispo, rows, clip_low_threshold=1.0, clip_high_threshold=1.0)
    torch.testing.assert_close(got, -A)


@given(ROWS)
def test_cispo_without_bounds_has_the_gradient_of_importance_sampling(rows):
    got, ratio, A = coefficients(o.cispo, rows, clip_low_threshold=0.0, clip_high_threshold=math.inf)
    want, _, _ = coefficients(o.importance_sampling, rows)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got, -ratio * A)


@given(ROWS)
def test_the_mask_at_a_large_cap_is_ppo_away_from_ties(rows):
    got, ratio, _ = coefficients(o.unified, rows, mask_low_threshold=0.8, mask_high_threshold=1.2)
    want, _, _ = coefficients(o.ppo_clip, rows, **BOUNDS)
    away = ((ratio - 0.8).abs() > 1e-9) & ((ratio - 1.2).abs() > 1e-9)
    torch.testing.assert_close(got[away], want[away])


@given(ROWS)
def test_the_unified_form_without_its_mask_is_cispo(rows):
    got, _, _ = coefficients(o.unified, rows, clip_high_threshold=4.0)
    want, _, _ = coefficients(o.cispo, rows)
    assert torch.equal(got, want)


ALL = {
    "cispo": o.cispo,
    "unified": partial(o.unified, mask_low_threshold=0.8, mask_high_threshold=1.2),
    "ppo_clip": o.ppo_clip,
    "ppo_dual_clip": partial(o.ppo_clip, dual_clip=3.0),
    "importance_sampling": o.importance_sampling,
    "dro": partial(o.dro, beta=0.1),
}


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=30)
@given(rows=ROWS)
def test_float32_agrees_with_float64(name, rows):
    wide, ratio, _ = coefficients(ALL[name], rows)
    narrow, _, _ = coefficients(ALL[name], rows, dtype=torch.float32)
    assert narrow.dtype == torch.float32
    # at a bound of the ratio the two precisions may fall on different sides
    away = torch.stack([(ratio - b).abs() > 1e-4 for b in (0.8, 1.2, 3.0)]).all(0)
    torch.testing.assert_close(narrow[away].double(), wide[away], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_columns_get_no_gradient_and_bf16_is_computed_in_float32(name):
    logprobs, anchor, A = (x.bfloat16().requires_grad_() for x in (LOGP3, ANCHOR3, A3))
    loss = ALL[name](logprobs, anchor_logprobs=anchor, advantages=A)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert logprobs.grad is not None and anchor.grad is None and A.grad is None


@pytest.mark.parametrize("objective", [o.cispo, o.reinforce, o.cross_entropy])
def test_an_unknown_column_is_refused(objective):
    with pytest.raises(TypeError, match="teacher_logprobs"):
        objective(LOGP3, teacher_logprobs=LOGP3)


@pytest.mark.parametrize(
    ("form", "value", "slope"), [("k1", -1.0, 1.0), ("k2", 0.5, -1.0), ("k3", math.e - 2, 1 - math.e)]
)
def test_kl_estimators_by_hand(form, value, slope):
    logprobs = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    kl = o.kl_estimate(logprobs, torch.tensor([-1.0], dtype=torch.float64), form)
    assert kl.item() == pytest.approx(value)
    kl.backward()
    assert logprobs.grad.item() == pytest.approx(slope)


def test_kl_clamps():
    far = torch.tensor([-40.0]), torch.tensor([-1.0])
    assert o.kl_estimate(*far, "k1", input_clamp=20.0).item() == -20.0
    assert o.kl_estimate(*far, "k3", input_clamp=20.0, output_clamp=10.0).item() == 10.0
    with pytest.raises(ConfigError, match="'k4'"):
        o.kl_estimate(*far, "k4")


@given(ROWS)
def test_k3_is_never_negative_and_zero_at_the_reference(rows):
    logprobs, reference, _ = torch.tensor(rows, dtype=torch.float64).T
    assert (o.kl_estimate(logprobs, reference, "k3") >= -1e-15).all()
    assert (o.kl_estimate(logprobs, logprobs, "k3") == 0).all()


def test_with_kl_adds_the_penalty_and_reads_one_more_column():
    objective = o.with_kl(o.cispo, coef=0.1, form="k1")
    columns = {"anchor_logprobs": ANCHOR3, "advantages": A3}
    got = objective(LOGP3, reference_logprobs=ANCHOR3, **columns)
    torch.testing.assert_close(got, o.cispo(LOGP3, **columns) + 0.1 * (LOGP3 - ANCHOR3))
    with pytest.raises(TypeError, match="reference_logprobs"):
        objective(LOGP3, **columns)
