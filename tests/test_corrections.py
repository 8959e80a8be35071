"""Mismatch corrections against hand-computed numbers, and the laws that tie them to the objectives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from cispo import advantages, objectives
from cispo import config as c
from cispo import corrections as k
from cispo.types import ConfigError, NonFiniteError

# Two rows: three trained tokens and one that is not, then two trained tokens.
LENGTHS = [4, 2]
W = torch.tensor([0.5, 2.0, 4.0, 1.0, 0.25, 1.0], dtype=torch.float64)
SAMPLER = torch.tensor([-1.0, -3.0, -2.0, float("nan"), -1.0, -2.0], dtype=torch.float64)
PROXIMAL = torch.where(SAMPLER.isnan(), -math.inf, SAMPLER + W.log())
MASK = torch.tensor([True, True, True, False, True, True])
GEOMETRIC = [4.0 ** (1 / 3), 0.5]  # (0.5·2·4)^(1/3), (0.25·1)^(1/2)


def weights(correction: k.Correction) -> list[float]:
    return correction.weights_T.tolist()


def test_importance_is_the_raw_ratio_and_0_where_masked():
    result = k.importance(PROXIMAL, SAMPLER, MASK)
    assert weights(result) == pytest.approx([0.5, 2.0, 4.0, 0.0, 0.25, 1.0])
    assert result.statistics["weight_mean"] == pytest.approx(7.75 / 5)
    assert (result.statistics["ratio_max"], result.statistics["ratio_min"]) == pytest.approx((4.0, 0.25))


def test_tis_clamps_and_counts_what_was_outside():
    result = k.tis(PROXIMAL, SAMPLER, MASK, low=0.4, high=3.0)
    assert weights(result) == pytest.approx([0.5, 2.0, 3.0, 0.0, 0.4, 1.0])
    assert result.statistics["out_of_band"] == pytest.approx(2 / 5)
    assert weights(k.tis(PROXIMAL, SAMPLER, MASK)) == pytest.approx([0.5, 2.0, 2.0, 0.0, 0.25, 1.0])


def test_icepop_drops_outside():
    result = k.icepop(PROXIMAL.float(), SAMPLER.float(), MASK, low=0.4, high=3.0)
    assert weights(result) == pytest.approx([0.5, 2.0, 0.0, 0.0, 0.0, 1.0])
    assert result.statistics["out_of_band"] == pytest.approx(2 / 5)


def test_seq_mask_tis_drops_whole_sequences_by_geometric_mean_and_keeps_token_weights():
    result = k.seq_mask_tis(PROXIMAL, SAMPLER, MASK, LENGTHS, low=1.0, high=2.0)
    assert weights(result) == pytest.approx([0.5, 2.0, 4.0, 0.0, 0.0, 0.0])
    assert result.statistics["out_of_band"] == pytest.approx(1 / 2)


def test_the_two_published_sequence_ratios_differ():
    product = k.sequence_truncate(PROXIMAL, SAMPLER, MASK, LENGTHS, high=3.0, ratio="product")
    assert weights(product) == pytest.approx([3.0, 3.0, 3.0, 0.0, 0.25, 0.25])  # TRL: 0.5·2·4 = 4 → 3
    geometric = k.sequence_truncate(PROXIMAL, SAMPLER, MASK, LENGTHS, high=3.0, ratio="geometric")
    assert weights(geometric) == pytest.approx([GEOMETRIC[0]] * 3 + [0.0] + [GEOMETRIC[1]] * 2)  # ms-swift


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("sequence", [0, 0, 0, 0, 0.25, 0.25]),  # TRL
        ("token", [0, 0, 0, 0, 0.25, 1.0]),  # ms-swift's shape
        ("one", [0, 0, 0, 0, 1.0, 1.0]),  # SkyRL
    ],
)
def test_sequence_mask_in_each_system_s_form(weight, expected):
    result = k.sequence_mask(PROXIMAL, SAMPLER, MASK, LENGTHS, high=3.0, ratio="product", weight=weight)
    assert weights(result) == pytest.approx(expected)


def test_opsm_drops_negative_tokens_of_drifted_sequences_only():
    anchor = torch.tensor([-1.0, -1.0, -1.0, math.nan, -1.0, -1.0])
    now = torch.tensor([-1.5, -1.5, -1.2, -math.inf, -0.9, -1.0])  # mean drifts 0.4 and −0.05
    A = torch.tensor([-1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
    result = k.opsm(now, anchor, A, MASK, LENGTHS, delta=0.1)
    assert weights(result) == [0.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert result.statistics["out_of_band"] == pytest.approx(1 / 2)
    assert weights(k.opsm(now, anchor, A, MASK, LENGTHS, delta=0.5)) == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]


def test_the_trust_mask_drops_negative_tokens_whose_probability_fell_by_delta():
    sampled = torch.tensor([0.9, 0.9, 0.9, 0.5, 0.4, 0.4]).log()
    now = torch.tensor([0.3, 0.3, 0.45, 0.0, 0.1, 0.9]).log()
    A = torch.tensor([-1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
    result = k.negative_trust_mask(now, sampled, A, MASK, delta=0.5)
    assert weights(result) == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    loss = objectives.with_trust_mask(
        objectives.BoundObjective(objectives.cispo, ("anchor_logprobs", "advantages")), delta=0.5
    )(now[MASK], sampler_logprobs=sampled[MASK], advantages=A[MASK], anchor_logprobs=sampled[MASK])
    assert (loss == 0).tolist() == [True, False, False, False, False]


def test_mismatch_metrics_of_nemo_rl_by_hand():
    proximal, sampler = torch.tensor([math.log(0.5), 9.0]), torch.tensor([math.log(0.25), math.nan])
    metrics = k.mismatch(proximal, sampler, torch.tensor([True, False]))
    assert metrics["token_mult_prob_error"] == pytest.approx(2.0)
    assert metrics["gen_kl_error"] == pytest.approx(2.0 - 1 - math.log(2))  # ℓ = log π − log μ
    assert metrics["policy_kl_error"] == pytest.approx(0.5 - 1 + math.log(2))
    half = 0.5 * (0.5 / 0.375 - 1 - math.log(0.5 / 0.375)) + 0.5 * (0.25 / 0.375 - 1 - math.log(0.25 / 0.375))
    assert metrics["js_divergence_error"] == pytest.approx(half)
    assert k.mismatch(proximal, sampler, torch.tensor([False, False])) == {}


ALL = [
    c.ImportanceCorrection(),
    c.TisCorrection(),
    c.IcePopCorrection(),
    c.SeqMaskTisCorrection(),
    c.SequenceTruncateCorrection(),
    c.SequenceTruncateCorrection(ratio="geometric"),
    c.SequenceMaskCorrection(),
    c.SequenceMaskCorrection(ratio="geometric", weight="token"),
]


@pytest.mark.parametrize("correction", ALL, ids=lambda x: x.type)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.floats(-9, 0), st.floats(-9, 0), st.booleans()), min_size=1, max_size=5), max_size=4
    ),
    junk=st.sampled_from([math.nan, -math.inf, math.inf, 1e4]),
)
@settings(max_examples=40, deadline=None)
def test_what_is_masked_changes_nothing_and_weights_are_finite(correction, rows, junk):
    proximal, sampler, mask = torch.tensor([token for row in rows for token in row], dtype=torch.float32).view(-1, 3).T
    mask = mask.bool()
    lengths = [len(row) for row in rows]
    clean = k.compute(correction, proximal, sampler, mask, lengths)
    dirty = k.compute(correction, proximal.masked_fill(~mask, junk), sampler.masked_fill(~mask, -junk), mask, lengths)
    assert torch.equal(clean.weights_T, dirty.weights_T)
    assert clean.statistics == dirty.statistics
    assert clean.weights_T.isfinite().all() and (clean.weights_T >= 0).all()
    assert (clean.weights_T[~mask] == 0).all()


@pytest.mark.parametrize("correction", ALL, ids=lambda x: x.type)
def test_agreement_leaves_every_weight_at_1(correction):
    result = k.compute(correction, SAMPLER, SAMPLER.clone(), MASK, LENGTHS)
    assert weights(result) == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert result.statistics["out_of_band"] == 0.0


def test_a_nonfinite_trained_token_raises_or_is_dropped_and_counted():
    proximal = PROXIMAL.clone()
    proximal[1] = -math.inf
    with pytest.raises(NonFiniteError, match="position 1.*nonfinite: drop"):
        k.tis(proximal, SAMPLER, MASK)
    result = k.tis(proximal, SAMPLER, MASK, nonfinite="drop")
    assert weights(result) == pytest.approx([0.5, 0.0, 2.0, 0.0, 0.25, 1.0])
    assert result.statistics["nonfinite"] == 1


def test_reinforce_with_tis_is_cispo_anchored_on_the_sampler():
    """The remark on miles #1331: both are sg(clip(π_θ/μ))·A·log π when tis is taken at the current policy."""
    torch.manual_seed(0)
    logprobs = (-torch.rand(50) * 6).requires_grad_()
    sampler, A = -torch.rand(50) * 6, torch.randn(50)
    tis = k.tis(logprobs.detach(), sampler, torch.ones(50, dtype=torch.bool), low=0.0, high=5.0)
    corrected = objectives.with_weights(objectives.reinforce)(
        logprobs, advantages=A, correction_weights=tis.weights_T
    ).sum()
    cispo = objectives.cispo(logprobs, anchor_logprobs=sampler, advantages=A, clip_high_threshold=5.0).sum()
    torch.testing.assert_close(corrected, cispo)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logprobs)[0] for loss in (corrected, cispo)))


def test_a_correction_multiplies_the_cispo_term_as_nemo_rl_does():
    """−A · w · sg(clip(r)) · log π by hand: A = 2, w = 0.5, r = 2 capped at 1.5, log π = −1."""
    loss = objectives.with_weights(objectives.cispo)(
        torch.tensor([-1.0, -math.inf]),
        anchor_logprobs=torch.tensor([-1.0 - math.log(2), -1.0]),
        advantages=torch.tensor([2.0, 1.0]),
        correction_weights=torch.tensor([0.5, 0.0]),
    )
    assert loss.tolist() == [4.0 * 0.5, 0.0]  # the cap is 4 by default, r = 2
    bound = objectives.bind(
        c.load(None, ["--algorithm.anchor", "proximal", "--algorithm.correction.type", "tis"]).algorithm
    )
    assert bound.columns == ("anchor_logprobs", "advantages", "correction_weights")


def test_double_correction_and_bad_bounds_are_refused():
    with pytest.raises(ConfigError, match="twice.*anchor: proximal"):
        c.load(None, ["--algorithm.correction.type", "tis"])
    with pytest.raises(ConfigError, match="low 3 is above high 2"):
        c.load(None, ["--algorithm.anchor", "proximal", "--algorithm.correction", "{type: tis, low: 3, high: 2}"])
    with pytest.raises(ConfigError, match="low <= high"):
        k.tis(PROXIMAL, SAMPLER, MASK, low=3.0, high=2.0)
    reinforce = ["--algorithm.objective.type", "reinforce", "--algorithm.correction.type", "tis"]
    assert c.load(None, reinforce).algorithm.correction == c.TisCorrection()
    with pytest.raises(ConfigError, match="opsm_delta.*reinforce"):
        c.load(None, [*reinforce[:2], "--algorithm.opsm_delta", "1e-4"])


def test_every_correction_of_the_config_has_a_function():
    adapter = TypeAdapter(c.CorrectionConfig)
    tags = [d["properties"]["type"]["const"] for d in adapter.json_schema()["$defs"].values()]
    assert sorted(tags) == sorted({x.type for x in ALL})


# ------------------------------------------------------------------------------------- the objectives that came along


def test_gspo_by_hand_and_its_gradient_is_of_the_whole_sequence():
    rows = torch.tensor([7.0, 7.0, 9.0])
    logprobs = torch.tensor([-1.0, -1.2, -2.0], dtype=torch.float64, requires_grad=True)
    anchor = torch.tensor([-1.1, -1.0, -2.1], dtype=torch.float64)
    A = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    s = torch.tensor([math.exp(-0.05), math.exp(-0.05), math.exp(0.1)], dtype=torch.float64)
    loss = objectives.gspo(logprobs, anchor_logprobs=anchor, advantages=A, rows=rows)
    torch.testing.assert_close(loss.detach(), -torch.minimum(s * A, s.clamp(1 - 3e-4, 1 + 4e-4) * A))
    (grad,) = torch.autograd.grad(loss.sum(), logprobs)
    torch.testing.assert_close(grad, torch.tensor([-math.exp(-0.05), -math.exp(-0.05), math.exp(0.1)]).double())
    assert objectives.is_sequence_level(objectives.gspo) and not objectives.is_sequence_level(objectives.cispo)


def test_opsm_as_an_objective_follows_the_current_policy():
    bound = objectives.bind(c.load(None, ["--algorithm.opsm_delta", "0.1"]).algorithm)
    assert bound.sequence_level and "rows" in bound.columns
    loss = bound(
        torch.tensor([-1.5, -1.5, -1.0]),
        anchor_logprobs=torch.tensor([-1.0, -1.0, -1.0]),
        advantages=torch.tensor([-1.0, 1.0, -1.0]),
        rows=torch.tensor([0.0, 0.0, 1.0]),
        sampler_logprobs=torch.zeros(3),
    )
    assert (loss == 0).tolist() == [True, False, False]


def test_sapo_by_hand():
    loss = objectives.sapo(
        torch.tensor([-1.0, -1.0]),
        anchor_logprobs=torch.tensor([-1.0 - math.log(2), -1.0]),
        advantages=torch.tensor([1.0, -1.0]),
    )
    assert loss.tolist() == pytest.approx([-4 / (1 + math.exp(-1)), 4 / 1.05 * 0.5])
    slope = torch.zeros(1, requires_grad=True)
    on_policy = objectives.sapo(slope, anchor_logprobs=torch.zeros(1), advantages=torch.tensor([3.0]))
    assert torch.autograd.grad(on_policy.sum(), slope)[0].item() == pytest.approx(-3.0)  # REINFORCE's at r = 1


def test_dispo_clips_each_sign_of_the_advantage_by_its_own_bounds():
    overrides = ["--algorithm.objective.clip_low_threshold", "0.5", "--algorithm.objective.clip_high_threshold", "3"]
    config = c.load(
        None,
        [*overrides]
        + ["--algorithm.objective.negative_clip_low_threshold", "0.9"]
        + ["--algorithm.objective.negative_clip_high_threshold", "1.1"],
    )
    ratio, A = torch.tensor([0.1, 9.0, 0.1, 9.0]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss = objectives.bind(config.algorithm)(-torch.ones(4), anchor_logprobs=-1 - ratio.log(), advantages=A)
    assert loss.tolist() == pytest.approx([0.5, 3.0, -0.9, -1.1])
    same = objectives.bind(c.load(None, overrides).algorithm)
    assert same.loss.func is objectives.cispo
    with pytest.raises(ConfigError, match="negative_clip_low_threshold 5 is above"):
        c.load(None, ["--algorithm.objective.negative_clip_low_threshold", "5"])


def own_objective(logprobs, *, advantages, sampler_logprobs, scale=1.0):
    return -scale * advantages * (logprobs - sampler_logprobs)


def test_a_user_s_own_objective_with_options_and_columns():
    path = f"{__name__}:own_objective"
    algorithm = c.AlgorithmConfig(
        objective=c.FunctionObjective(path=path, options={"scale": 2.0}, columns=("advantages", "sampler_logprobs"))
    )
    loss = objectives.bind(algorithm)(
        torch.tensor([-1.0]), advantages=torch.tensor([3.0]), sampler_logprobs=torch.tensor([-2.0])
    )
    assert loss.tolist() == [-6.0]
    missing = c.AlgorithmConfig(objective=c.FunctionObjective(path=f"{__name__}:not_there"))
    with pytest.raises(ConfigError, match="not_there.*does not import"):
        objectives.bind(missing)


def test_kl_with_the_score_gradient_is_nemo_rl_s():
    logprobs = torch.tensor([-1.0, -40.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.0], dtype=torch.float64)
    kl = objectives.kl_estimate(logprobs, reference, "k3", input_clamp=20, score_gradient=True)
    k3 = math.exp(-0.5) - 1 + 0.5
    assert kl[0].item() == pytest.approx(k3)
    (grad,) = torch.autograd.grad(kl.sum(), logprobs)
    assert grad.tolist() == pytest.approx([k3 + 1 - math.exp(-0.5), 0.0])  # score + pathwise; clamped: neither
    clamped = objectives.kl_estimate(logprobs, reference, "k3", input_clamp=20, output_clamp=10)
    assert clamped[1].item() == 10.0


# ---------------------------------------------------------------------------------------------- advantage estimators


def test_leave_one_out_std_is_nemo_rl_s():
    values = advantages.compute("leave_one_out_std", [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0]])
    others = math.sqrt(1 / 3)  # of {0, 0, 1}, unbiased
    assert values[0][0] == pytest.approx((1 - 1 / 3) / (others + 1e-6))
    assert values[1] == pytest.approx([-1 / 3 / (others + 1e-6)] * 3 + [1.0])  # the others of the last are all equal
    assert values[2] == [0.0, 0.0]


def test_batch_reward_std_is_trl_s():
    rewards = [[1.0, 0.0], [4.0, 1.0]]
    std = torch.tensor(rewards).flatten().std().item()
    values = advantages.compute("batch_reward_std", rewards, std_eps=1e-4)
    assert values[1] == pytest.approx([1.5 / (std + 1e-4), -1.5 / (std + 1e-4)])


def test_reinforce_plus_plus_whitens_over_tokens():
    rewards, lengths = [[1.0, None], [0.0, 4.0]], [[3, 9], [1, 4]]
    tokens = torch.tensor([1.0] * 3 + [0.0] + [4.0] * 4, dtype=torch.float64)
    white = (tokens - tokens.mean()) / tokens.var(unbiased=False).sqrt()
    values = advantages.compute("reinforce_plus_plus", rewards, lengths=lengths)
    assert values == [
        [pytest.approx(white[0].item()), 0.0],
        [pytest.approx(white[3].item()), pytest.approx(white[4].item())],
    ]
    baseline = advantages.compute("reinforce_plus_plus_baseline", [[1.0, 3.0]])
    assert baseline[0] == pytest.approx([-1.0, 1.0])
    assert advantages.compute("reinforce_plus_plus", [[None]]) == [[0.0]]


def test_distillation_subtracts_the_log_ratio_to_the_teacher():
    student = torch.tensor([-1.0], requires_grad=True)
    A = advantages.distilled(torch.tensor([0.5]), student, torch.tensor([-3.0]), coef=0.1)
    assert A.item() == pytest.approx(0.5 - 0.1 * 2.0) and not A.requires_grad
