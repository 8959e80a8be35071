"""Other systems' configurations: exact numbers, what is refused and how, and no traceback for any mutated one.

The expected numbers are computed here from each system's published formulas, written out, and not by our objectives.
"""

import json
import math
import random
import shlex
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cispo import advantages, corrections, objectives
from cispo import config as c
from cispo.batching import with_reduction
from cispo.dialects import SYSTEMS, explain, explain_config, tiny, translate
from cispo.dialects.documented import EXAMPLES, outputs, translated
from cispo.head import linear_logprobs, linear_policy_loss
from cispo.learner import sequence_loss
from cispo.metrics import ratio_metrics
from cispo.types import Batch, ConfigError

ROOT = Path(__file__).parents[1]
LIKE = ROOT / "recipes" / "like"

A = torch.tensor([1.0, -1.0, 2.0])
PREV = torch.tensor([-1.0, -1.0, -1.0])
CURR = torch.tensor([-1.69315, -1.0, -0.59453])
GEN = torch.tensor([-1.2, -0.8, -1.0])
LENGTHS = [1, 2]  # two sequences, of one and of two tokens


def like(system: str, words: str) -> c.Config:
    return translate(system, shlex.split(words)).config


def loss_and_gradient(config: c.Config, logprobs: Tensor = CURR, **columns: Tensor) -> tuple[float, Tensor]:
    """The loss of the two sequences under a config: objective, correction, KL and reduction as in the trainer."""
    algorithm = config.algorithm
    given = {"advantages": A, "proximal_logprobs": PREV, "sampler_logprobs": GEN, **columns}
    given["anchor_logprobs"] = given[f"{algorithm.anchor}_logprobs"]
    given["rows"] = torch.tensor([0.0, 1.0, 1.0])
    if algorithm.correction is not None:
        given["correction_weights"] = corrections.compute(
            algorithm.correction,
            given["proximal_logprobs"],
            given["sampler_logprobs"],
            torch.ones(3, dtype=torch.bool),
            LENGTHS,
        ).weights_T
    batch = Batch(tuple(torch.zeros(n, dtype=torch.long) for n in LENGTHS), torch.zeros(3).long(), torch.ones(3), {})
    weights = with_reduction(batch, algorithm.reduction, [0, 0], constant=algorithm.constant or 4.0).weights_T
    logprobs = logprobs.clone().requires_grad_()
    loss = (weights * objectives.bind(algorithm)(logprobs, **given)).sum()
    return loss.item(), torch.autograd.grad(loss, logprobs)[0]


# --------------------------------------------------------------------------------------------------------- exactness


def test_nemo_rl_cispo_and_ppo_numbers():
    """Its unit test's numbers: CISPO 0.593797, PPO −0.63333, token mean, ε 0.2/0.2."""
    kl = "loss_fn.reference_policy_kl_penalty=0"
    loss, gradient = loss_and_gradient(like("nemo-rl", f"loss_fn.use_cispo=true {kl}"))
    assert loss == pytest.approx(0.593797, abs=2e-6)
    torch.testing.assert_close(gradient, torch.tensor([-0.266667, 0.333333, -0.8]), atol=2e-6, rtol=0)
    assert loss_and_gradient(like("nemo-rl", kl))[0] == pytest.approx(-0.63333, abs=1e-5)


def test_nemo_rl_correction_and_kl_by_its_formula():
    """w = exp(prev − gen) clamped, times −A·sg(clip(r))·curr; plus β·clamp(kl·exp(curr − sg curr)), over 3 tokens."""
    config = like(
        "nemo-rl",
        "loss_fn.use_cispo=true loss_fn.ratio_clip_min=1.0 loss_fn.ratio_clip_max=5.0 "
        "loss_fn.use_importance_sampling_correction=true loss_fn.truncated_importance_sampling_type=tis "
        "loss_fn.truncated_importance_sampling_ratio=1.1 loss_fn.reference_policy_kl_penalty=0.5",
    )
    reference = torch.tensor([-1.5, -1.0, -0.7])
    loss, gradient = loss_and_gradient(config, reference_logprobs=reference)
    weight = (PREV - GEN).exp().clamp(0, 1.1)
    ratio = (CURR - PREV).exp().clamp(0, 6)
    log_ratio = reference - CURR
    kl = log_ratio.exp() - 1 - log_ratio
    assert loss == pytest.approx(((-A * weight * ratio * CURR).sum() + 0.5 * kl.sum()).item() / 3, rel=1e-6)
    score_and_path = kl + 1 - log_ratio.exp()
    torch.testing.assert_close(gradient, (-A * weight * ratio + 0.5 * score_and_path) / 3)


def test_trl_cispo_numbers_and_metric():
    """−clamp(r, max=ε_high)·A·logp over all tokens: no floor, an absolute cap."""
    config = like("trl", "--loss_type cispo --epsilon_high 1.3 --epsilon 0.1")
    loss, gradient = loss_and_gradient(config)
    weight = (CURR - PREV).exp().clamp(max=1.3)
    assert loss == pytest.approx((-weight * A * CURR).sum().item() / 3, rel=1e-6)
    torch.testing.assert_close(gradient, -weight * A / 3)
    measured = ratio_metrics(
        (CURR - PREV).exp(), A, *translate("trl", ["--loss_type=cispo", "--epsilon_high=1.3"]).band
    )
    assert measured["clip/above_and_positive"] == pytest.approx(1 / 3)  # r = 0.5, 1, 1.5


def test_trl_weights_its_kl_by_the_ratio():
    """per_token_kl · r with r's gradient, TRL 1.16's default `use_bias_correction_kl`."""
    reference = torch.tensor([-1.5, -1.0, -0.7])
    config = like("trl", "--loss_type cispo --epsilon_high 5 --beta 0.5")
    loss, gradient = loss_and_gradient(config, reference_logprobs=reference)
    ratio, log_ratio = (CURR - PREV).exp(), reference - CURR
    k3 = log_ratio.exp() - 1 - log_ratio
    assert loss == pytest.approx((-ratio * A * CURR + 0.5 * ratio * k3).sum().item() / 3, rel=1e-6)
    torch.testing.assert_close(gradient, (-ratio * A + 0.5 * ratio * (k3 + 1 - log_ratio.exp())) / 3)
    plain = like("trl", "--loss_type cispo --epsilon_high 5 --beta 0.5 --use_bias_correction_kl false")
    assert not plain.algorithm.kl.ratio_weighted


def test_swift_shares_trl_s_loss_and_corrects_by_the_geometric_mean():
    config = like(
        "swift",
        "--loss_type cispo --epsilon_high 5.0 --beta 0 --use_vllm true --per_device_train_batch_size 8 "
        "--rollout_importance_sampling_mode sequence_mask --rollout_importance_sampling_threshold 0.95",
    )
    loss, _ = loss_and_gradient(config)
    w = (PREV - GEN).exp()
    kept = torch.tensor([0.0, 1.0, 1.0])  # exp(0.2) is above 0.95; the second sequence's mean exp(−0.1) is not
    ratio = (CURR - PREV).exp()
    assert loss == pytest.approx((-ratio * A * CURR * w * kept).sum().item() / 3, rel=1e-6)


def test_trl_corrects_by_the_product_of_the_sequence():
    config = like("trl", "--loss_type cispo --epsilon_high 5.0 --use_vllm --vllm_importance_sampling_clip_max 1.0")
    loss, _ = loss_and_gradient(config)
    sequence = torch.tensor([0.0, math.exp(-0.2), math.exp(-0.2)])  # exp(Σ) of the second; the first is masked
    assert loss == pytest.approx((-(CURR - PREV).exp() * A * CURR * sequence).sum().item() / 3, rel=1e-6)


def test_miles_numbers_and_clipfrac():
    """−sg(clip(r, 1 − eps, 1 + eps_high))·A·logp, mean of per-sample means; clipfrac counts both sides, any sign."""
    flags = "--advantage-estimator cispo --eps-clip 0.4 --eps-clip-high 0.2 --n-samples-per-prompt 8"
    weight = (CURR - PREV).exp().clamp(0.6, 1.2)
    per_token = -weight * A * CURR
    expected = (per_token[0] + per_token[1:].mean()) / 2
    loss, gradient = loss_and_gradient(like("miles", flags))
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, -weight * A * torch.tensor([0.5, 0.25, 0.25]))
    by_token = loss_and_gradient(like("miles", f"{flags} --calculate-per-token-loss"))[0]
    assert by_token == pytest.approx(per_token.mean().item(), rel=1e-6)
    measured = ratio_metrics((CURR - PREV).exp(), A, *translate("miles", shlex.split(flags)).band)
    assert measured["clip/outside"] == pytest.approx(2 / 3)  # 0.5 below, 1.5 above
    assert measured["clip/above_and_positive"] == pytest.approx(1 / 3)


def test_miles_tis_multiplies_and_the_kl_does_not_see_it():
    flags = (
        "--advantage-estimator cispo --eps-clip 1.0 --eps-clip-high 4.0 --n-samples-per-prompt 8 --use-tis "
        "--tis-clip 1.1 --use-kl-loss --kl-loss-coef 0.5 --kl-loss-type k2"
    )
    reference = torch.tensor([-1.5, -1.0, -0.7])
    per_token = -(CURR - PREV).exp() * A * CURR * (PREV - GEN).exp().clamp(0, 1.1) + 0.25 * (reference - CURR) ** 2
    loss, _ = loss_and_gradient(like("miles", flags), reference_logprobs=reference)
    assert loss == pytest.approx((per_token[0] / 2 + per_token[1:].sum() / 4).item(), rel=1e-6)


def test_verl_and_skyrl_offsets():
    ratio = (CURR - PREV).exp()
    verl = like("verl", "loss_mode=cispo clip_ratio_low=0.3 clip_ratio_high=0.1 n=4")
    assert loss_and_gradient(verl)[0] == pytest.approx((-ratio.clamp(0.7, 1.1) * A * CURR).sum().item() / 3, rel=1e-6)
    skyrl = like("skyrl", "policy_loss_type=cispo cispo_eps_clip_low=0 cispo_eps_clip_high=5 use_kl_loss=false")
    assert loss_and_gradient(skyrl)[0] == pytest.approx((-ratio.clamp(1, 6) * A * CURR).sum().item() / 3, rel=1e-6)
    rollout = like("skyrl", "policy_loss_type=cispo cispo_anchor=rollout use_kl_loss=false")
    expected = (-(CURR - GEN).exp().clamp(0, 5) * A * CURR).sum().item() / 3
    assert loss_and_gradient(rollout)[0] == pytest.approx(expected, rel=1e-6)


def test_tinker_s_loss_sum():
    """loss:sum = −Σ sg(clip(p/q, low, high))·A·log p, anchored on the sampler."""
    config = like("tinker", """--loss_fn cispo --loss_fn_config '{"clip_high_threshold": 1.2}'""")
    loss, gradient = loss_and_gradient(config)
    weight = (CURR - GEN).exp().clamp(0.0, 1.2)
    assert loss == pytest.approx((-weight * A * CURR).sum().item(), rel=1e-6)
    torch.testing.assert_close(gradient, -weight * A)
    dro = like("tinker", """--loss_fn dro --loss_fn_config '{"beta": 0.3}'""")
    expected = (-(CURR * A - 0.15 * (CURR - GEN) ** 2)).sum().item()
    assert loss_and_gradient(dro)[0] == pytest.approx(expected, rel=1e-6)
    ppo = like("tinker", "--loss_fn ppo")
    r = (CURR - GEN).exp()
    assert loss_and_gradient(ppo)[0] == pytest.approx(
        -torch.minimum(r * A, r.clamp(0.8, 1.2) * A).sum().item(), rel=1e-6
    )


def test_each_system_s_own_advantages():
    rewards = [[1.0, 0.0, 0.0, 4.0]]
    values, others = torch.tensor(rewards[0]), torch.tensor([0.0, 0.0, 4.0])

    def of(config: c.Config) -> float:
        return advantages.compute(config.algorithm.advantage, rewards, std_eps=config.algorithm.advantage_eps)[0][0]

    trl = like("trl", "--loss_type cispo --epsilon_high 5")
    assert of(trl) == pytest.approx(((1 - values.mean()) / (values.std() + 1e-4)).item())
    miles = like("miles", "--advantage-estimator cispo --n-samples-per-prompt 4")
    assert of(miles) == pytest.approx(((1 - values.mean()) / (values.std() + 1e-6)).item())
    nemo = like("nemo-rl", "loss_fn.use_cispo=true")
    assert of(nemo) == pytest.approx(((1 - others.mean()) / (others.std() + 1e-6)).item())
    rloo = like("swift", "--loss_type cispo --epsilon_high 5 --advantage_estimator rloo --beta 0")
    assert of(rloo) == pytest.approx((1 - others.mean()).item())
    assert of(like("tinker", "--loss_fn cispo")) == pytest.approx(1 - 1.25)


@pytest.mark.parametrize("junk", [-math.inf, math.nan])
@pytest.mark.parametrize(
    "correction", ["tis", "icepop", "importance", "seq_mask_tis", "sequence_truncate", "sequence_mask"]
)
def test_a_neginf_logit_at_a_masked_token_reaches_nothing(correction, junk):
    """miles' regression, through head, proximal log-probs, every correction, masks and KL: all stay finite."""
    torch.manual_seed(0)
    T, D, V = 6, 5, 7
    hidden, head = torch.randn(T, D), torch.randn(V, D)
    bias = torch.zeros(V)
    bias[3] = -math.inf
    targets = torch.tensor([0, 3, 1, 2, 3, 4])  # the masked positions 1 and 4 target the impossible token
    mask = torch.tensor([True, False, True, True, False, True])
    words = ["--algorithm.anchor", "proximal", "--algorithm.correction.type", correction]
    words += ["--algorithm.trust_mask_delta", "0.5", "--algorithm.kl.coef", "0.1"]
    if correction in ("icepop", "seq_mask_tis"):
        words += ["--algorithm.correction.low", "0.0", "--algorithm.correction.high", "99"]
    proximal, _ = linear_logprobs(hidden, head, targets, bias_V=bias)
    assert proximal[1] == -math.inf
    sampler = torch.where(mask, proximal - 0.1, junk)
    for extra in ([], ["--algorithm.opsm_delta", "0.01"]):
        algorithm = c.load(None, words + extra).algorithm
        weights = corrections.compute(algorithm.correction, proximal, sampler, mask, [3, 3]).weights_T
        columns = {
            "anchor_logprobs": proximal,
            "sampler_logprobs": sampler,
            "reference_logprobs": torch.where(mask, proximal, junk),
            "advantages": torch.where(mask, torch.tensor([1.0, 0, -1, 1, 0, -1]), junk),
            "correction_weights": weights,
            "rows": torch.tensor([0.0, 0, 0, 1, 1, 1]),
        }
        bound = objectives.bind(algorithm)
        inputs = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        if bound.sequence_level:
            logprobs, entropy = linear_logprobs(inputs[0][mask], inputs[1], targets[mask], bias_V=bias)
            kept = {name: column[mask] for name, column in columns.items()}
            ones = torch.ones(int(mask.sum()))
            result = sequence_loss(bound, logprobs, entropy, columns=kept, weights_T=ones, nonfinite="raise")
        else:
            result = linear_policy_loss(
                *inputs, targets, objective=bound, columns=columns, weights_T=mask.float(), bias_V=bias
            )
        result.loss.backward()
        assert result.loss.isfinite()
        assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in inputs)


# ----------------------------------------------------------------------------------------------------- what it means


@pytest.mark.parametrize(
    ("system", "words", "band"),
    [
        ("swift", "--loss_type cispo --epsilon_high 5.0", (0, 5)),
        ("trl", "--loss_type cispo --epsilon_high 5.0", (0, 5)),
        ("trl", "trl grpo --loss-type=cispo --epsilon-high=5.0", (0, 5)),
        ("miles", "--advantage-estimator cispo --n-samples-per-prompt 8", (0.8, 1.2)),
        ("miles", "--advantage-estimator cispo --eps-clip 1.0 --eps-clip-high 5 --n-samples-per-prompt 8", (0, 6)),
        ("nemo-rl", "loss_fn.use_cispo=true loss_fn.ratio_clip_min=1 loss_fn.ratio_clip_max=5", (0, 6)),
        ("verl", "loss_mode=cispo", (0.8, 1.2)),
        ("verl", "loss_mode=cispo clip_ratio_low=10 clip_ratio_high=0.2", (0, 1.2)),
        ("skyrl", "policy_loss_type=cispo", (0, 5)),
        ("skyrl", "--cispo_eps_clip_low 0 --cispo_eps_clip_high 5", (1, 6)),
        ("tinker", "--loss_fn cispo", (0, 4)),
    ],
)
def test_the_band_of_each_convention(system, words, band):
    assert translate(system, shlex.split(words)).band == pytest.approx(band)


def test_where_each_number_came_from():
    t = translate(
        "trl", shlex.split("--loss_type cispo --epsilon_high 5.0 --learning_rate 3e-6 --steps 3 --deepspeed z")
    )
    text = explain(t)
    for key, value, origin in (
        ("algorithm.objective.clip_high_threshold", "5", "--epsilon_high"),
        ("optimizer.learning_rate", "3e-06", "--learning_rate"),
        ("optimizer.beta2", "0.999", "TRL's default"),
        ("learner.head_backend", "auto", "ours"),
    ):
        line = next(line.rstrip() for line in text.splitlines() if line.startswith(key))
        assert line.split(None, 2)[1:] == [value, origin], line
    assert "--deepspeed: placement" in text
    assert "[0, 5]" in text.splitlines()[1]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_documented_recipes_are_what_the_command_gives(example):
    for path, text in outputs(ROOT).items():
        if path.stem in (example.name, "conventions"):
            assert path.read_text(encoding="utf-8") == text(), "run python -m cispo.dialects.documented"
    t = translated(example, LIKE)
    assert c.load(LIKE / f"{example.name}.yaml") == t.config
    small = tiny(t.config)
    assert small.algorithm.model_dump(exclude={"updates_per_rollout"}) == t.config.algorithm.model_dump(
        exclude={"updates_per_rollout"}
    )
    assert small.asynchrony.max_staleness == t.config.asynchrony.max_staleness
    assert c.validate(json.loads(explain(t, "json"))["config"]) == t.config


def test_the_async_lag_1_recipe_of_nemo_rl():
    config = c.load(LIKE / "nemo-rl-async-lag1.yaml")
    rollout, algorithm = config.rollout, config.algorithm
    assert (rollout.groups_per_step, rollout.group_size, algorithm.updates_per_rollout) == (32, 16, 16)
    assert (algorithm.objective.clip_low_threshold, algorithm.objective.clip_high_threshold) == (0, 6)
    assert (algorithm.kl, algorithm.correction.type, config.asynchrony.max_staleness) == (None, "importance", 1)


def test_infinite_bounds_survive_the_recipe():
    t = translate("trl", shlex.split("--loss_type cispo --epsilon_high inf"))
    assert t.band == (0.0, math.inf)
    assert c.validate(__import__("yaml").safe_load(explain(t, "yaml"))) == t.config


def test_our_own_recipes_are_explained_too():
    config = c.load(None, ["--rollout.group_size", "8"])
    text = explain_config(config, {"rollout": {"group_size": 8}})
    line = next(line for line in text.splitlines() if line.startswith("rollout.group_size"))
    assert line.split()[1:] == ["8", "recipe"]
    assert "[0, 4]" in text


@pytest.mark.parametrize(
    ("system", "words", "warning"),
    [
        ("trl", "--loss_type cispo --epsilon_high 5.0", "inert"),
        ("trl", "--loss_type cispo --epsilon_high 0.2", "below 1"),
        ("skyrl", "policy_loss_type=cispo cispo_eps_clip_low=0", "#1928"),
        ("verl", "loss_mode=cispo n=4 data.train_batch_size=512", "#763"),
        ("trl", "--loss_type cispo --epsilon_high 5.0 --top_p 0.9", "top_p"),
        ("nemo-rl", "loss_fn.ratio_clip_max=5.0", "trains PPO"),
        ("swift", "--loss_type cispo --epsilon_high 5.0 --rollout_importance_sampling_mode token_mask", "use_vllm"),
    ],
)
def test_warnings(system, words, warning):
    assert any(warning in w for w in translate(system, shlex.split(words)).warnings)


@pytest.mark.parametrize(
    ("system", "words", "parts"),
    [
        ("trl", "--loss_type cispo", ["epsilon = 0.2", "pass --epsilon_high 5.0"]),
        ("swift", "--loss_type cispo", ["every weight at 0.2", "pass --epsilon_high 5.0"]),
        ("trl", "--loss_typ cispo --epsilonhigh 5", ["--loss_typ", "did you mean --loss_type", "--epsilon_high"]),
        ("trl", "--vllm_importance_samplng_mode x", ["did you mean --vllm_importance_sampling_mode"]),
        (
            "trl",
            "--loss_type cispo --epsilon_high 5 --importance_sampling_level sequence",
            ["CISPO's weight is of a token"],
        ),
        (
            "trl",
            "--generation_batch_size 8 --steps_per_generation 2",
            ["--generation_batch_size and --steps_per_generation"],
        ),
        ("trl", "--model a --model_name_or_path b", ["--model = a and --model_name_or_path = b contradict"]),
        ("miles", "--advantage-estimator on_policy_distillation", ["invalid choice", "choose from 'grpo', 'gspo'"]),
        ("miles", "--use-tis --use-rollout-logprobs", ["--use-tis and --use-rollout-logprobs exclude"]),
        ("miles", "--advantage-estimator cispo --eps-clip-c 3 --n-samples-per-prompt 4", ["--eps-clip-c", "dual clip"]),
        ("nemo-rl", "loss_fn.use_cisp=true", ["loss_fn.use_cisp: unknown", "loss_fn.use_cispo"]),
        ("nemo-rl", "loss_fn.use_cispo=true loss_fn.ratio_clip_c=3", ["ratio_clip_c", "dual clip"]),
        ("nemo-rl", "loss_fn.use_cispo=true loss_fn.force_on_policy_ratio=true", ["force_on_policy_ratio", "inert"]),
        ("nemo-rl", "loss_fn.use_cispo=true loss_fn.token_level_loss=false", ["token_level_loss"]),
        ("nemo-rl", "loss_fn.use_cispo=true loss_fn.truncated_importance_sampling_type=tis", ["needs loss_fn.use_imp"]),
        ("nemo-rl", "grpo.async_grpo.enabled=true", ["needs loss_fn.use_importance_sampling_correction"]),
        ("skyrl", "cispo_anchor=rollout tis_ratio_type=token", ["corrects twice"]),
        (
            "skyrl",
            "policy_loss_type=regular cispo_eps_clip_low=1",
            ["policy_loss_type = regular and cispo_eps_clip_low"],
        ),
        ("verl", "loss_mode=cispo clip_ratio_hig=4", ["clip_ratio_hig: unknown", "clip_ratio_high"]),
        ("tinker", "--loss_fn stable_reinforce", ["no published formula", "use cispo"]),
        ("tinker", """--loss_fn cispo --loss_fn_config '{"clip_high": 4}'""", ["loss_fn_config.clip_high: unknown"]),
        ("tinker", "--loss_fn cispo --loss_fn_config {", ["not JSON"]),
        ("swfit", "", ["unknown system", "nearest: swift"]),
    ],
)
def test_what_is_refused_says_what_to_do(system, words, parts):
    with pytest.raises(ConfigError) as error:
        translate(system, shlex.split(words))
    for part in parts:
        assert part in str(error.value)


def test_all_problems_come_together():
    with pytest.raises(ConfigError) as error:
        translate("trl", shlex.split("--loss_type cispo --num_generation 4 --temperature 0 --learning_rate -1"))
    text = str(error.value)
    for part in (
        "--epsilon_high 5.0",
        "--num_generation:",
        "[from --temperature]",
        "[from --learning_rate]",
        "4 problem",
    ):
        assert part in text


# ---------------------------------------------------------------------------------------------------- NeMo RL's files


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_defaults_inherit_depth_first_and_interpolate(tmp_path):
    (tmp_path / "base").mkdir()
    write(
        tmp_path,
        "base/grandparent.yaml",
        "grpo: {num_prompts_per_step: 64, num_generations_per_prompt: 8}\nloss_fn: {ratio_clip_max: 0.2}\n"
        "policy: "
        "{train_global_batch_size: '${mul:${grpo.num_prompts_per_step}, ${grpo.num_generations_per_prompt}}'}\n",
    )
    write(tmp_path, "parent.yaml", "defaults: base/grandparent.yaml\nloss_fn: {use_cispo: true, ratio_clip_min: 1.0}\n")
    write(tmp_path, "other.yaml", "loss_fn: {ratio_clip_max: 3.0}\n")
    child = write(tmp_path, "child.yaml", "defaults: [parent.yaml, other.yaml]\ngrpo: {num_prompts_per_step: 16}\n")
    config = translate("nemo-rl", [child, "grpo.num_generations_per_prompt=4"]).config
    assert (config.rollout.groups_per_step, config.rollout.group_size) == (16, 4)
    assert config.algorithm.updates_per_rollout == 1  # 16·4 samples in a batch of ${mul:16, 4}
    assert config.algorithm.objective.clip_high_threshold == 4.0
    replaced = write(tmp_path, "r.yaml", "defaults: child.yaml\nloss_fn: {_override_: true, use_cispo: true}\n")
    assert translate("nemo-rl", [replaced]).config.algorithm.objective.clip_high_threshold == 1.2


def test_a_cycle_or_a_missing_parent_names_the_files(tmp_path):
    a = write(tmp_path, "a.yaml", "defaults: b.yaml\n")
    write(tmp_path, "b.yaml", "defaults: a.yaml\n")
    with pytest.raises(ConfigError, match=r"b\.yaml: `defaults` go in a circle.*a\.yaml → .*b\.yaml → .*a\.yaml"):
        translate("nemo-rl", [a])
    lost = write(tmp_path, "lost.yaml", "defaults: ../nowhere.yaml\n")
    with pytest.raises(ConfigError, match=r"lost\.yaml: `defaults` names .*nowhere\.yaml, which is no file"):
        translate("nemo-rl", [lost])
    loop = write(tmp_path, "loop.yaml", "grpo: {num_prompts_per_step: '${grpo.num_prompts_per_step}'}\n")
    with pytest.raises(ConfigError, match=r"num_prompts_per_step.*circle"):
        translate("nemo-rl", [loop])


# ---------------------------------------------------------------------------------------------------------- mutations

FULL = {
    "swift": "--rlhf_type grpo --loss_type cispo --epsilon_high 5.0 --model Q --dataset d.jsonl#500 "
    "--reward_funcs accuracy "
    "format --num_generations 8 --per_device_train_batch_size 8 --steps_per_generation 4 --beta 0.04 --temperature 0.9 "
    "--use_vllm true --rollout_importance_sampling_mode token_truncate --learning_rate 1e-6 --warmup_ratio 0.05 "
    "--overlong_filter true --dynamic_sample true --deepspeed zero3 --scale_rewards group",
    "trl": "--loss_type cispo --epsilon_high 5.0 --model_name_or_path Q --dataset_name d/e --reward_funcs "
    "accuracy_reward "
    "--num_generations 8 --steps_per_generation 4 --gradient_accumulation_steps 1 --scale_rewards batch --use_vllm "
    "--vllm_importance_sampling_mode sequence_truncate --num_iterations 2 --max_steps 100 --warmup_steps 0.1 "
    "--use_peft "
    "--cast_lm_head_to_fp32 --report_to wandb --bf16 --off_policy_mask_threshold 0.1 --lr_scheduler_type cosine",
    "miles": "--advantage-estimator cispo --eps-clip 1.0 --eps-clip-high 4.0 --use-tis --tis-clip 2.0 --tis-clip-low 0 "
    "--hf-checkpoint Q --use-opsm --opsm-delta 1e-4 --n-samples-per-prompt 8 --rollout-batch-size 32 "
    "--global-batch-size 64 "
    "--use-kl-loss "
    "--kl-loss-coef 0.01 --kl-loss-type low_var_kl --prompt-data d.jsonl --rm-type math --label-key label "
    "--calculate-per-token-loss --lr 1e-6 --colocate --sglang-mem-fraction-static 0.7 --rollout-max-response-len 1024",
    "nemo-rl": "loss_fn.use_cispo=true loss_fn.ratio_clip_min=1.0 loss_fn.ratio_clip_max=5.0 "
    "loss_fn.use_importance_sampling_correction=true loss_fn.truncated_importance_sampling_type=icepop "
    "loss_fn.truncated_importance_sampling_ratio=5 loss_fn.truncated_importance_sampling_ratio_min=0.5 "
    "grpo.num_prompts_per_step=32 grpo.num_generations_per_prompt=16 policy.train_global_batch_size=32 "
    "grpo.async_grpo.enabled=true grpo.async_grpo.max_trajectory_age_steps=1 policy.optimizer.kwargs.lr=1e-6 "
    "policy.generation.temperature=1.0 cluster.num_nodes=2 policy.generation.stop_token_ids=[1,2]",
    "verl": "algorithm.adv_estimator=grpo actor_rollout_ref.actor.policy_loss.loss_mode=cispo clip_ratio_low=1 "
    "clip_ratio_high=4 data.train_batch_size=256 ppo_mini_batch_size=64 actor_rollout_ref.rollout.n=8 use_kl_loss=True "
    "kl_loss_coef=0.001 algorithm.rollout_correction.rollout_is=token trainer.total_training_steps=10 "
    "actor_rollout_ref.actor.optim.betas=[0.9,0.95] actor_rollout_ref.rollout.gpu_memory_utilization=0.8",
    "skyrl": "policy_loss_type=cispo cispo_eps_clip_low=1.0 cispo_eps_clip_high=4.0 cispo_anchor=old "
    "tis_ratio_type=token "
    "trainer.train_batch_size=64 trainer.policy_mini_batch_size=16 n_samples_per_prompt=8 use_kl_loss=false "
    "dynamic_sampling.type=filter trainer.fully_async.enabled=true trainer.algorithm.loss_reduction=prompt_mean "
    "trainer.policy.optimizer_config.lr=1e-6 generator.backend=vllm",
    "tinker": """--loss_fn cispo --loss_fn_config '{"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}' """
    "--learning_rate 1e-4 --group_size 8 --groups_per_batch 32 --num_substeps 4 --max_tokens 64 --lora_rank 16",
}
JUNK = [
    "", "nan", "inf", "-inf", "-1", "0", "1e400", "1e-400", "true", "None", "null", "[]", "{}", "[1, [2", "{a: 1}", "'",
    "${grpo.x}", "${", "${mul:1,0}", "${div:1,0}", "${.a}", "\x00", "é✓", "--", "a b", "=", "!!python/object:x", "no",
    "999999999999999999999", "*x", "&x", "- 1", "@", "cispo", "x.y:z", ".", "..", "[1,2,3]", "{\"a\": 1}", "/",
]  # fmt: skip


def mutate(words: list[str], rng: random.Random) -> list[str]:
    words = list(words)
    for _ in range(rng.randint(1, 3)):
        if not words:
            return [rng.choice(JUNK)]
        i = rng.randrange(len(words))
        word = words[i]
        match rng.randrange(8):
            case 0:
                del words[i]
            case 1:
                words.insert(i, rng.choice(words))
            case 2:
                words.insert(i, rng.choice(JUNK))
            case 3:
                words[i] = rng.choice(JUNK)
            case 4 if word:
                k = rng.randrange(len(word))
                words[i] = word[:k] + word[k + 1 :]
            case 5 if word:
                k = rng.randrange(len(word))
                words[i] = word[:k] + rng.choice("abz_-.=0{}[]$ ") + word[k:]
            case 6:
                head, equals, _ = word.partition("=")
                words[i] = f"{head}={rng.choice(JUNK)}" if equals else rng.choice(JUNK)
            case _:
                j = rng.randrange(len(words))
                words[i], words[j] = words[j], words[i]
    return words


@pytest.mark.parametrize("system", SYSTEMS)
def test_200_mutated_configs_end_in_a_config_or_a_message(system, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, words = random.Random(f"{system}-7"), shlex.split(FULL[system])
    translate(system, words)  # the unmutated one is right
    resolved = 0
    for _ in range(200):
        mutated = mutate(words, rng)
        try:
            t = translate(system, mutated)
        except ConfigError as error:
            assert str(error).strip() and "Traceback" not in str(error), mutated
            continue
        resolved += 1
        assert "importance" in explain(t) or "ratio" in explain(t)
        assert c.validate(json.loads(explain(t, "json"))["config"]) == t.config, mutated
    assert 1 <= resolved < 200


def test_100_mutated_yaml_files_of_nemo_rl(tmp_path):
    rng, text = random.Random(3), (LIKE / "nemo-rl" / "cispo.yml").read_text()
    for _ in range(100):
        lines = text.splitlines()
        for _ in range(rng.randint(1, 3)):
            i = rng.randrange(len(lines))
            key, colon, _ = lines[i].partition(":")
            lines[i] = rng.choice(
                [
                    f"{key}: {rng.choice(JUNK)}",
                    lines[i] + rng.choice(JUNK),
                    lines[i][rng.randint(0, 3) :],
                    f"x{colon}{key}",
                    "",
                ]
            )
        path = write(tmp_path, "m.yaml", "\n".join(lines))
        try:
            explain(translate("nemo-rl", [path]))
        except ConfigError as error:
            assert str(error).strip()


def train_tiny(example, tmp_path, *overrides: str) -> list[dict]:
    from cispo import cli

    recipe = write(tmp_path, "tiny.yaml", c.to_yaml(tiny(c.load(LIKE / f"{example}.yaml"))))
    run = tmp_path / "run"
    assert cli.main(["train", recipe, "--run_dir", str(run), *overrides]) == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_async_recipe_trains_with_its_correction(tmp_path):
    metrics = train_tiny(
        "nemo-rl-async-lag1", tmp_path, "--steps", "2", "--rollout.group_size", "4", "--eval.every", "0"
    )
    last = metrics[-1]
    assert last["updates"] == 32 and last["staleness/steps_max"] <= 1
    assert last["correction/weight_mean"] == pytest.approx(1.0, abs=0.5)
    assert last["mismatch/token_mult_prob_error"] >= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_every_documented_recipe_runs_on_the_embedded_model(example, tmp_path):
    metrics = train_tiny(example.name, tmp_path)
    assert metrics[-1]["step"] == 6
    assert all(math.isfinite(m["policy/loss"]) for m in metrics if "policy/loss" in m)
