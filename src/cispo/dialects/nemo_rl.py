"""NeMo RL: its YAML (with `defaults:` inheritance) and `a.b=c` overrides in, our config out.

`ratio_clip_min` and `ratio_clip_max` are offsets: the band is [1 − min, 1 + max]. NeMo RL's loss config allows unknown
keys, so that a misspelt `use_cispo` trains PPO; here it is refused. A key that no file sets has the value of NeMo RL's
`grpo_math_1B.yaml`. Left out on purpose: environments and datasets beyond a name, and the parts of `policy` that say
where and not what.

    cispo explain --like nemo-rl run.yaml grpo.num_prompts_per_step=16
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cispo.dialects import trees
from cispo.dialects.datasets import place_updates, without_dataset
from cispo.dialects.draft import Draft, Given, Setting, Table, Translation, split_arguments
from cispo.types import ConfigError

_L, _G, _P = "loss_fn.", "grpo.", "policy."
_SETTINGS = [
    Setting(_L + "use_cispo", "bool", False),
    Setting(_L + "ratio_clip_min", "float", 0.2),
    Setting(_L + "ratio_clip_max", "float", 0.2),
    Setting(_L + "ratio_clip_c", "float"),
    Setting(_L + "disable_ppo_ratio", "bool", False),
    Setting(_L + "force_on_policy_ratio", "bool", False),
    Setting(_L + "token_level_loss", "bool", True),
    Setting(_L + "sequence_level_importance_ratios", "bool", False),
    Setting(_L + "reference_policy_kl_penalty", "float", 0.01),
    Setting(_L + "reference_policy_kl_type", "str", "k3", choices=("k1", "k2", "k3")),
    Setting(_L + "kl_input_clamp_value", "float", 20.0, nullable=True),
    Setting(_L + "kl_output_clamp_value", "float", 10.0, nullable=True),
    Setting(_L + "use_kl_in_reward", "bool", False),
    Setting(_L + "use_on_policy_kl_approximation", "bool", False),
    Setting(_L + "use_importance_sampling_correction", "bool", False),
    Setting(_L + "truncated_importance_sampling_type", "str", choices=("tis", "icepop", "seq-mask-tis")),
    Setting(_L + "truncated_importance_sampling_ratio", "float"),
    Setting(_L + "truncated_importance_sampling_ratio_min", "float"),
    Setting(_G + "num_prompts_per_step", "int", 32),
    Setting(_G + "num_generations_per_prompt", "int", 16),
    Setting(_G + "max_num_steps", "int"),
    Setting(_G + "seed", "int", 42),
    Setting(_G + "val_period", "int", 10),
    Setting(_G + "normalize_rewards", "bool", True),
    Setting(_G + "use_leave_one_out_baseline", "bool", True),
    Setting(_G + "adv_estimator.name", "str", "grpo", choices=("grpo", "reinforce_plus_plus", "gdpo", "raw_reward")),
    Setting(_G + "adv_estimator.normalize_rewards", "bool"),
    Setting(_G + "adv_estimator.use_leave_one_out_baseline", "bool"),
    Setting(_G + "adv_estimator.minus_baseline", "bool", True),
    Setting(_G + "overlong_filtering", "bool", False),
    Setting(_G + "use_dynamic_sampling", "bool", False),
    Setting(_G + "dynamic_sampling_max_gen_batches", "int", 10),
    Setting(_G + "async_grpo.enabled", "bool", False),
    Setting(_G + "async_grpo.max_trajectory_age_steps", "int", 1),
    Setting(_P + "model_name", "str"),
    Setting(_P + "train_global_batch_size", "int", 512),
    Setting(_P + "max_total_sequence_length", "int", 512),
    Setting(_P + "precision", "str", None, choices=("bfloat16", "float32", "float16")),
    Setting(_P + "max_grad_norm", "float", 1.0, nullable=True),
    Setting(_P + "generation.temperature", "float", 1.0),
    Setting(_P + "generation.top_p", "float", 1.0),
    Setting(_P + "generation.top_k", "int"),
    Setting(_P + "generation.max_new_tokens", "int"),
    Setting(_P + "generation.stop_strings", "list"),
    Setting(_P + "generation.stop_token_ids", "list"),
    Setting(_P + "optimizer.name", "str", "torch.optim.AdamW"),
    Setting(_P + "optimizer.kwargs.lr", "float", 5e-6, (_P + "megatron_cfg.optimizer.lr",)),
    Setting(_P + "optimizer.kwargs.weight_decay", "float", 0.01, (_P + "megatron_cfg.optimizer.weight_decay",)),
    Setting(_P + "optimizer.kwargs.eps", "float", 1e-8, (_P + "megatron_cfg.optimizer.adam_eps",)),
    Setting(_P + "optimizer.kwargs.betas", "list", ["0.9", "0.999"]),
    Setting(_P + "megatron_cfg.scheduler.lr_warmup_iters", "int", 0),
    Setting("data.max_input_seq_length", "int"),
    Setting("checkpointing.save_period", "int", 10),
]

_IGNORED = {
    "placement, parallelism and memory; cannot change the result": (
        "cluster", "cluster.*", "policy.dtensor_cfg*", "policy.megatron_cfg*", "policy.dynamic_batching*",
        "policy.sequence_packing*", "policy.train_micro_batch_size", "policy.generation_batch_size",
        "policy.logprob_*", "policy.offload_*", "policy.make_sequence_length_divisible_by",
        "policy.optimizer.kwargs.*", "policy.refit_buffer_size_gb", "policy.optimizer",
        "policy.fsdp_offload_enabled", "policy.activation_checkpointing_enabled",
    ),
    "the schedule is ours: set --optimizer.schedule": ("policy.scheduler*",),
    "the sampling engine is cispo's own": (
        "policy.generation.*", "policy.draft*", "grpo.async_grpo.*", "policy.generation", "policy.router_replay*",
    ),
    "every step is logged (metrics.jsonl, rollouts/)": ("logger", "logger.*"),
    "checkpoints are cispo's own (checkpoint.every, atomic, resumable)": ("checkpointing", "checkpointing.*"),
    "evaluation is cispo's own (eval.every, mean@k and pass@k)": (
        "grpo.val_*", "grpo.max_val_samples", "grpo.stop_at_validation_*",
    ),
    "datasets and environments are ours: set --task.type and its fields": (
        "data", "data.*", "env", "env.*", "policy.tokenizer*", "policy.hf_config_overrides*", "reward_penalties*",
        "grpo.max_rollout_turns",
    ),
    "the number of steps is grpo.max_num_steps": ("grpo.max_num_epochs",),
    "without dynamic sampling no further batch is drawn": ("grpo.batch_multiplier",),
}  # fmt: skip
_NO_EQUAL = "changes the algorithm and has no equal here"
_UNSUPPORTED = {
    _L + "positive_example_nll_weight": (0.0, f"adds a supervised loss, which {_NO_EQUAL}"),
    _G + "advantage_clip_low": (None, f"clips advantages, which {_NO_EQUAL}"),
    _G + "advantage_clip_high": (None, f"clips advantages, which {_NO_EQUAL}"),
    _G + "reward_shaping.enabled": (False, "shapes rewards; use the `length` reward of task.rewards"),
    _G + "reward_scaling.enabled": (False, f"rescales rewards, which {_NO_EQUAL}"),
    _G + "seq_logprob_error_threshold": (
        None,
        f"drops sequences by log-prob error, which {_NO_EQUAL}; use a correction",
    ),
    _G + "invalid_tool_call_advantage": (None, f"sets advantages by hand, which {_NO_EQUAL}"),
    _G + "malformed_thinking_advantage": (None, f"sets advantages by hand, which {_NO_EQUAL}"),
    _G + "skip_reference_policy_logprobs_calculation": (None, "is decided by the KL penalty here"),
}
_SHAPING = ("overlong_buffer_length", "overlong_buffer_penalty", "max_response_length", "stop_properly_penalty_coef")
_OFF = {
    "parameters of a part that is off": (
        *(f"{_G}reward_shaping.{n}" for n in _SHAPING),
        *(f"{_G}reward_scaling.{n}" for n in ("source_min", "source_max", "target_min", "target_max")),
    )
}

NEMO_RL = Table(
    "nemo-rl",
    "NeMo RL",
    {s.name: s for s in _SETTINGS},
    _IGNORED | _OFF,
    _UNSUPPORTED,
    dash="",
    defaults_from="NeMo RL's grpo_math_1B.yaml",
)


def translate(arguments: Sequence[str]) -> Translation:
    draft = Draft(NEMO_RL)
    theirs, ours = split_arguments(arguments)
    tree: dict = {}
    while theirs and "=" not in theirs[0] and not theirs[0].startswith("--"):
        tree = trees.merge(tree, trees.load(_file(theirs.pop(0))))
    if len(theirs) > 1 and theirs[0] == "--config":
        tree = trees.merge(tree, trees.load(_file(theirs[1])))
        theirs = theirs[2:]
    trees.override(tree, theirs, draft)
    values = []
    for key, value in trees.leaves(tree):
        if key in NEMO_RL.spelled or key in NEMO_RL.unsupported:
            try:
                value = trees.resolve(tree, key, value)
            except ConfigError as error:
                draft.problem(str(error))
                continue
        values.append((key, value, key))
    given = NEMO_RL.accept(_one_optimizer(tree, values), draft)
    _objective(draft, given)
    _correction(draft, given)
    _advantages(draft, given)
    _rollout(draft, given)
    _optimizer(draft, given)
    draft.override(ours)
    return draft.finish(given)


def _file(word: str) -> str:
    if not Path(word).is_file():
        raise ConfigError(f"--like nemo-rl: {word}: no such file; give NeMo RL's YAML first, then a.b=value")
    return word


def _one_optimizer(tree: dict, values: list) -> list:
    """Megatron's optimizer where Megatron is on, else torch's: the other one is not read."""
    megatron = tree.get("policy", {}).get("megatron_cfg", {}) if isinstance(tree.get("policy"), dict) else {}
    on = isinstance(megatron, dict) and megatron.get("enabled") is True
    unread = "policy.optimizer.kwargs." if on else "policy.megatron_cfg."
    kept = [v for v in values if not (v[0].startswith(unread) and v[0] in NEMO_RL.spelled)]
    betas = [megatron.get("optimizer", {}).get(f"adam_beta{i}") for i in (1, 2)] if on else [None]
    if on and None not in betas:
        kept.append((_P + "optimizer.kwargs.betas", betas, _P + "megatron_cfg.optimizer.adam_beta1, adam_beta2"))
    return kept


def _objective(draft: Draft, given: Given) -> None:
    low, high, dual = (given[_L + n] for n in ("ratio_clip_min", "ratio_clip_max", "ratio_clip_c"))
    cispo, sequence = given[_L + "use_cispo"], given[_L + "sequence_level_importance_ratios"]
    reinforce, forced = given[_L + "disable_ppo_ratio"], given[_L + "force_on_policy_ratio"]
    token = given[_L + "token_level_loss"]
    draft.set("algorithm.anchor", "proximal", "NeMo RL recomputes log-probs (prev_logprobs)")
    if cispo:
        for name, wrong, why in (
            ("disable_ppo_ratio", reinforce, "CISPO needs the ratio"),
            ("force_on_policy_ratio", forced, "it makes the ratio 1 and the weight inert"),
            ("sequence_level_importance_ratios", sequence, "CISPO's weight is of a token"),
            ("ratio_clip_c", dual is not None, "dual clip is PPO's, and would overwrite CISPO's loss"),
            ("token_level_loss", not token, "CISPO is averaged over tokens; set it true"),
        ):
            if wrong:
                draft.problem(f"{_L}use_cispo with {_L}{name} = {given[_L + name]}: {why} (NeMo RL refuses it too)")
    if sequence and token:
        draft.problem(
            f"{_L}sequence_level_importance_ratios with {_L}token_level_loss: NeMo RL refuses both; set one false"
        )
    if forced and not cispo:
        draft.problem(f"{_L}force_on_policy_ratio: has no equal here; use one update per rollout, where the ratio is 1")
    kind = "cispo" if cispo else "reinforce" if reinforce else "gspo" if sequence else "ppo_clip"
    decided = given.origin(_L + "use_cispo", _L + "disable_ppo_ratio", _L + "sequence_level_importance_ratios")
    draft.set("algorithm.objective.type", kind, decided)
    if kind != "reinforce":
        draft.take("algorithm.objective.clip_low_threshold", given, _L + "ratio_clip_min", max(0.0, 1 - low))
        draft.take("algorithm.objective.clip_high_threshold", given, _L + "ratio_clip_max", 1 + high)
    if kind == "ppo_clip" and dual is not None:
        draft.take("algorithm.objective.dual_clip", given, _L + "ratio_clip_c")
    if not cispo and _L + "use_cispo" not in given and kind == "ppo_clip":
        draft.warn("loss_fn.use_cispo is not set: NeMo RL trains PPO's clip with this config")
    draft.take("algorithm.reduction", given, _L + "token_level_loss", "token" if token else "sequence")
    if given[_L + "reference_policy_kl_penalty"]:
        draft.take("algorithm.kl.coef", given, _L + "reference_policy_kl_penalty")
        draft.take("algorithm.kl.form", given, _L + "reference_policy_kl_type")
        draft.take("algorithm.kl.input_clamp", given, _L + "kl_input_clamp_value")
        draft.take("algorithm.kl.output_clamp", given, _L + "kl_output_clamp_value")
        in_reward = given[_L + "use_kl_in_reward"]
        draft.take("algorithm.kl.place", given, _L + "use_kl_in_reward", "reward" if in_reward else "loss")
        draft.set("algorithm.kl.score_gradient", not in_reward, "NeMo RL's KL loss")
        if given[_L + "use_on_policy_kl_approximation"]:
            draft.problem(f"{_L}use_on_policy_kl_approximation: weights the KL by curr/gen, which has no equal here")


def _correction(draft: Draft, given: Given) -> None:
    on, kind, high, low = (
        given[_L + n]
        for n in (
            "use_importance_sampling_correction",
            "truncated_importance_sampling_type",
            "truncated_importance_sampling_ratio",
            "truncated_importance_sampling_ratio_min",
        )
    )
    if kind is not None and not on:
        draft.problem(
            f"{_L}truncated_importance_sampling_type = {kind} needs {_L}use_importance_sampling_correction: true"
        )
        return
    if kind is not None and (high is None or high <= 0):
        draft.problem(
            f"{_L}truncated_importance_sampling_type = {kind} needs a positive truncated_importance_sampling_ratio"
        )
        return
    if kind in ("icepop", "seq-mask-tis") and low is None:
        draft.problem(f"{_L}truncated_importance_sampling_type = {kind} needs truncated_importance_sampling_ratio_min")
        return
    if not on:
        return
    shown = given.origin(_L + "use_importance_sampling_correction", _L + "truncated_importance_sampling_type")
    if kind is None:
        draft.correction(shown, type="importance")
        return
    draft.correction(shown, type=kind.replace("-", "_"), low=0.0 if low is None else low, high=high)


def _advantages(draft: Draft, given: Given) -> None:
    def chosen(name: str) -> bool:
        own = given[_G + "adv_estimator." + name]
        return given[_G + name] if own is None else own

    name = given[_G + "adv_estimator.name"]
    normalize, others = chosen("normalize_rewards"), chosen("use_leave_one_out_baseline")
    match name:
        case "grpo":
            kinds = {(True, True): "leave_one_out_std", (True, False): "group"}
            kind = kinds.get((normalize, others), "leave_one_out" if others else "group_mean")
        case "reinforce_plus_plus":
            kind = (
                "reinforce_plus_plus_baseline" if given[_G + "adv_estimator.minus_baseline"] else "reinforce_plus_plus"
            )
        case _:
            draft.problem(f"{_G}adv_estimator.name = {name}: has no equal here; use grpo or reinforce_plus_plus")
            return
    names = ("normalize_rewards", "use_leave_one_out_baseline", "adv_estimator.name", "adv_estimator.minus_baseline")
    draft.set("algorithm.advantage", kind, given.origin(*(_G + n for n in names)))
    draft.set("algorithm.advantage_eps", 1e-6, "NeMo RL's formula")


def _rollout(draft: Draft, given: Given) -> None:
    prompts, samples, batch = (
        given[n]
        for n in (_G + "num_prompts_per_step", _G + "num_generations_per_prompt", _P + "train_global_batch_size")
    )
    draft.take("rollout.group_size", given, _G + "num_generations_per_prompt")
    if _P + "train_global_batch_size" not in given:
        batch = prompts * samples
        draft.warn(f"{_P}train_global_batch_size is not given: one update per rollout is taken")
    names = (_G + "num_prompts_per_step", _G + "num_generations_per_prompt", _P + "train_global_batch_size")
    if batch < 1:
        draft.problem(f"{names[2]} = {batch}: must be at least 1")
    else:
        place_updates(draft, given, groups=prompts, updates=prompts * samples / batch, names=names)
    if given[_G + "async_grpo.enabled"]:
        age = given[_G + "async_grpo.max_trajectory_age_steps"]
        shown = given.origin(_G + "async_grpo.enabled", _G + "async_grpo.max_trajectory_age_steps")
        draft.set("async.max_staleness", age, shown)
        if not given[_L + "use_importance_sampling_correction"]:
            draft.problem(
                f"{_G}async_grpo.enabled needs {_L}use_importance_sampling_correction: true (NeMo RL refuses it too)"
            )
    tokens = given[_P + "generation.max_new_tokens"]
    if tokens is not None:
        draft.take("rollout.max_tokens", given, _P + "generation.max_new_tokens")
    else:
        draft.take("rollout.max_tokens", given, _P + "max_total_sequence_length")
    for name in ("temperature", "top_p"):
        draft.take(f"rollout.{name}", given, f"{_P}generation.{name}")
    draft.take("rollout.top_k", given, _P + "generation.top_k", max(0, given[_P + "generation.top_k"] or 0))
    if given[_P + "generation.stop_strings"]:
        draft.take("rollout.stop", given, _P + "generation.stop_strings")
    ids = [i for i in given[_P + "generation.stop_token_ids"] or [] if i != "None"]
    if ids:
        draft.take("rollout.stop_token_ids", given, _P + "generation.stop_token_ids", ids)
    if given[_G + "overlong_filtering"]:
        draft.take("rollout.truncated", given, _G + "overlong_filtering", "mask")
    if given[_G + "use_dynamic_sampling"]:
        draft.take("rollout.zero_variance", given, _G + "use_dynamic_sampling", "resample")
        draft.take("rollout.max_resample_rounds", given, _G + "dynamic_sampling_max_gen_batches")
    if given[_G + "max_num_steps"] is not None:
        draft.take("steps", given, _G + "max_num_steps")
    draft.take("seed", given, _G + "seed")
    draft.take("checkpoint.every", given, "checkpointing.save_period")
    if given[_P + "model_name"] is not None:
        draft.take("model.path", given, _P + "model_name")
    if given[_P + "precision"] == "float16":
        draft.problem(f"{_P}precision = float16: not here; use bfloat16 or float32")
    elif given[_P + "precision"] is not None:
        draft.take("model.dtype", given, _P + "precision")
    without_dataset(draft)
    draft.take("eval.every", given, _G + "val_period", max(0, given[_G + "val_period"] or 0))


def _optimizer(draft: Draft, given: Given) -> None:
    name = given[_P + "optimizer.name"]
    if name is not None and not name.endswith("AdamW"):
        draft.problem(f"{_P}optimizer.name = {name}: only AdamW is here")
    for key, theirs in (("learning_rate", "lr"), ("weight_decay", "weight_decay"), ("eps", "eps")):
        draft.take(f"optimizer.{key}", given, f"{_P}optimizer.kwargs.{theirs}")
    try:
        beta1, beta2 = (float(b) for b in given[_P + "optimizer.kwargs.betas"])
        draft.take("optimizer.beta1", given, _P + "optimizer.kwargs.betas", beta1)
        draft.take("optimizer.beta2", given, _P + "optimizer.kwargs.betas", beta2)
    except (TypeError, ValueError):
        draft.problem(f"{_P}optimizer.kwargs.betas = {given[_P + 'optimizer.kwargs.betas']}: must be two numbers")
    draft.take("optimizer.grad_clip_norm", given, _P + "max_grad_norm", given[_P + "max_grad_norm"] or 0.0)
    draft.take("optimizer.warmup_updates", given, _P + "megatron_cfg.scheduler.lr_warmup_iters")
