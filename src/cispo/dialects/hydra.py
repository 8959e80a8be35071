"""verl and SkyRL: `a.b=c` overrides (or a YAML file) in, our config out. A field's unique last name is enough.

Both clip to [1 − low, 1 + high] with additive offsets. verl's defaults give [0.8, 1.2], and its own CISPO example
[−9, 1.2]; SkyRL's CISPO offsets 1 and 4 give [0, 5]. Left out on purpose: critics, and everything about workers,
engines and data that does not change the algorithm.

    cispo explain --like skyrl policy_loss_type=cispo cispo_eps_clip_low=1 cispo_eps_clip_high=4 cispo_anchor=rollout
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cispo.dialects import trees
from cispo.dialects.datasets import place_updates, without_dataset
from cispo.dialects.draft import Draft, Given, Setting, Table, Translation, split_arguments
from cispo.types import ConfigError

_NO_EQUAL = "changes the algorithm and has no equal here"
_A, _R = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."
_AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
_VERL_SETTINGS = [
    Setting(_A + "policy_loss.loss_mode", "str", "vanilla"),
    Setting(_A + "clip_ratio", "float", 0.2),
    Setting(_A + "clip_ratio_low", "float", 0.2, nullable=True),
    Setting(_A + "clip_ratio_high", "float", 0.2, nullable=True),
    Setting(_A + "clip_ratio_c", "float", 3.0),
    Setting(_A + "loss_agg_mode", "str", "token-mean", choices=_AGGREGATIONS),
    Setting(_A + "entropy_coeff", "float", 0.0),
    Setting(_A + "use_kl_loss", "bool", False),
    Setting(_A + "kl_loss_coef", "float", 0.001),
    Setting(_A + "kl_loss_type", "str", "low_var_kl", choices=("kl", "k1", "mse", "k2", "low_var_kl", "k3")),
    Setting(_A + "ppo_mini_batch_size", "int", 256),
    Setting(_A + "ppo_epochs", "int", 1),
    Setting(_A + "use_rollout_log_probs", "bool", False),
    Setting(_A + "optim.lr", "float", 1e-6),
    Setting(_A + "optim.weight_decay", "float", 0.01),
    Setting(_A + "optim.betas", "list", ["0.9", "0.999"]),
    Setting(_A + "optim.clip_grad", "float", 1.0, (_A + "grad_clip",)),
    Setting(_A + "optim.lr_warmup_steps", "int", -1, nullable=True),
    Setting(_A + "optim.lr_scheduler_type", "str", "constant", (_A + "optim.warmup_style",), ("constant", "cosine")),
    Setting(_R + "n", "int", 1),
    Setting(_R + "temperature", "float", 1.0),
    Setting(_R + "top_p", "float", 1.0),
    Setting(_R + "top_k", "int", -1),
    Setting("actor_rollout_ref.model.path", "str"),
    Setting("algorithm.adv_estimator", "str", "gae"),
    Setting("algorithm.norm_adv_by_std_in_grpo", "bool", True),
    Setting("algorithm.use_kl_in_reward", "bool", False),
    Setting("algorithm.kl_penalty", "str", "kl", choices=("kl", "k1", "mse", "k2", "low_var_kl", "k3")),
    Setting("algorithm.kl_ctrl.kl_coef", "float", 0.001),
    Setting("algorithm.rollout_correction.rollout_is", "str", None, choices=("token", "sequence")),
    Setting("algorithm.rollout_correction.rollout_is_threshold", "float", 2.0),
    Setting("algorithm.rollout_correction.bypass_mode", "bool", False),
    Setting("data.train_batch_size", "int", 1024),
    Setting("data.max_response_length", "int", 512),
    Setting("trainer.total_training_steps", "int"),
    Setting("trainer.default_local_dir", "str"),
]
_VERL_IGNORED = {
    "placement, parallelism and memory; cannot change the result": (
        _A + "ppo_micro_batch_size*", _A + "ppo_max_token_len_per_gpu", _A + "use_dynamic_bsz", _A + "fsdp_config*",
        _A + "megatron*", _A + "strategy", _A + "ulysses_sequence_parallel_size", _A + "use_torch_compile",
        _A + "shuffle", _A + "entropy_from_logits_with_chunking", _A + "entropy_checkpointing", _A + "checkpoint*",
        _A + "profiler*", _A + "use_remove_padding", _A + "data_loader_seed", _A + "optim.*",
        "actor_rollout_ref.model.*", "actor_rollout_ref.ref.*", "actor_rollout_ref.hybrid_engine", "ray_kwargs*",
        "global_profiler*",
    ),
    "the sampling engine is cispo's own": (_R + "*",),
    "datasets are ours: set --task.type and its fields": ("data.*", "reward*", "custom_reward_function*"),
    "placement, logging and checkpoints are cispo's own": ("trainer.*",),
    "there is no critic here": ("critic*", "algorithm.gamma", "algorithm.lam"),
    "parameters of a part that is off": (
        "algorithm.kl_ctrl.*", "algorithm.pf_ppo*", "algorithm.use_pf_ppo", "algorithm.rollout_correction.*",
        _A + "policy_loss.*", _A + "tau_pos", _A + "tau_neg", _A + "loss_scale_factor", "algorithm._target_",
    ),
}  # fmt: skip
VERL = Table(
    "verl",
    "verl",
    {s.name: s for s in _VERL_SETTINGS},
    _VERL_IGNORED,
    {
        "algorithm.rollout_correction.rollout_rs": (None, f"rejects samples by its own rule, which {_NO_EQUAL}"),
        "algorithm.rollout_correction.rollout_is_batch_normalize": (False, f"rescales weights, which {_NO_EQUAL}"),
        "actor_rollout_ref.model.lora_rank": (0, "is set here as --model.lora.rank"),
    },
    dash="",
)

_S, _O = "trainer.algorithm.", "trainer.algorithm.off_policy_correction."
_SKYRL_SETTINGS = [
    Setting(_S + "policy_loss_type", "str", "regular"),
    Setting(_S + "cispo.cispo_eps_clip_low", "float", 1.0),
    Setting(_S + "cispo.cispo_eps_clip_high", "float", 4.0),
    Setting(_S + "cispo.cispo_anchor", "str", "old", choices=("old", "rollout")),
    Setting(_S + "eps_clip_low", "float", 0.2),
    Setting(_S + "eps_clip_high", "float", 0.2),
    Setting(_S + "clip_ratio_c", "float", 3.0),
    Setting(_S + "sapo.tau_pos", "float", 1.0),
    Setting(_S + "sapo.tau_neg", "float", 1.05),
    Setting(_S + "advantage_estimator", "str", "grpo"),
    Setting(_S + "advantage_batch_normalize", "bool", False),
    Setting(_S + "grpo_norm_by_std", "bool", True),
    Setting(_S + "loss_reduction", "str", "token_mean"),
    Setting(_S + "max_seq_len", "int"),
    Setting(_S + "use_kl_loss", "bool", True),
    Setting(_S + "use_kl_in_reward", "bool", False),
    Setting(_S + "kl_loss_coef", "float", 0.001),
    Setting(_S + "kl_estimator_type", "str", "k3", choices=("k1", "k2", "k3", "abs")),
    Setting(_S + "use_entropy_loss", "bool", False),
    Setting(_S + "entropy_loss_coef", "float", 0.01),
    Setting(_S + "zero_variance_filter", "bool", False),
    Setting(_S + "dynamic_sampling.type", "str", None, choices=("filter", "replace")),
    Setting(_S + "dynamic_sampling.max_sample_batches", "int", 30),
    Setting(_O + "tis_ratio_type", "str", None, choices=("token", "sequence")),
    Setting(_O + "token_tis_ratio_clip_high", "float", 2.0),
    Setting(_O + "sequence_tis_ratio_clip_high", "float", 5.0),
    Setting(_O + "sequence_mask_metric", "str", None, choices=("product", "geometric")),
    Setting(_O + "geo_mask_high", "float", 1.01),
    Setting(_O + "geo_mask_low", "float", 0.99),
    Setting(_O + "product_mask_high", "float", 2.0),
    Setting(_O + "product_mask_low", "float", 0.5),
    Setting("trainer.train_batch_size", "int", 1024),
    Setting("trainer.policy_mini_batch_size", "int", 256),
    Setting("trainer.update_epochs_per_batch", "int", 1),
    Setting("trainer.policy.model.path", "str"),
    Setting("trainer.policy.model.lora.rank", "int", 0),
    Setting("trainer.policy.model.lora.alpha", "float", 16.0),
    Setting("trainer.policy.optimizer_config.lr", "float", 1e-6),
    Setting("trainer.policy.optimizer_config.adam_betas", "list", ["0.9", "0.999"]),
    Setting("trainer.policy.optimizer_config.weight_decay", "float", 0.01),
    Setting("trainer.policy.optimizer_config.max_grad_norm", "float", 1.0),
    Setting("trainer.policy.optimizer_config.num_warmup_steps", "int", 0),
    Setting("trainer.policy.optimizer_config.scheduler", "str", "constant_with_warmup"),
    Setting("trainer.fully_async.enabled", "bool", False),
    Setting("trainer.fully_async.max_staleness_steps", "int", 4),
    Setting("trainer.seed", "int", 42),
    Setting("generator.n_samples_per_prompt", "int", 5),
    Setting("generator.sampling_params.temperature", "float", 1.0),
    Setting("generator.sampling_params.top_p", "float", 1.0),
    Setting("generator.sampling_params.top_k", "int", -1),
    Setting("generator.sampling_params.min_p", "float", 0.0),
    Setting("generator.sampling_params.max_generate_length", "int", 1024),
]
_SKYRL_IGNORED = {
    "the sampling engine is cispo's own": ("generator.*",),
    "datasets and environments are ours: set --task.type and its fields": ("data.*", "environment.*"),
    "there is no critic here": ("trainer.critic*", _S + "lambd", _S + "gamma", _S + "value_*"),
    "the reference is the model that the run starts from": ("trainer.ref.*",),
    "parameters of a part that is off": (
        _S + "clip_cov*", _S + "kl_cov*", _S + "dppo*", _S + "kl_ctrl*", _S + "zero_variance_filter_tol",
        _S + "temperature", _S + "dynamic_sampling.*", _S + "max_sample_batches",
    ),
    "placement, logging and checkpoints are cispo's own": (
        "trainer.placement*", "trainer.strategy", "trainer.policy.fsdp_config*", "trainer.policy.megatron_config*",
        "trainer.epochs", "trainer.eval_*", "trainer.ckpt_*", "trainer.hf_save_interval", "trainer.export_path",
        "trainer.logger", "trainer.project_name", "trainer.run_name", "trainer.resume_*", "trainer.micro_*",
        "trainer.bf16", "trainer.flash_attn", "trainer.use_sample_packing", "trainer.gradient_checkpointing*",
        "trainer.max_prompt_length", "trainer.tracker_commit*", "trainer.dump_*", "trainer.critic_mini_batch_size",
        "trainer.policy.optimizer_config.offload*", "trainer.policy.sequence_parallel_size",
        "trainer.policy.model.*", "trainer.fully_async.*", "trainer.update_ref_every_epoch",
        "trainer.max_tokens_per_microbatch",
    ),
}  # fmt: skip
SKYRL = Table(
    "skyrl",
    "SkyRL",
    {s.name: s for s in _SKYRL_SETTINGS},
    _SKYRL_IGNORED,
    {
        _O + "outlier_token_is_threshold_low": (None, f"drops sequences by one token, which {_NO_EQUAL}"),
        _O + "outlier_token_is_threshold_high": (None, f"drops sequences by one token, which {_NO_EQUAL}"),
        _O + "token_mask_is_threshold_low": (
            None,
            f"masks tokens without weighting them, which {_NO_EQUAL}; icepop is near",
        ),
        _O + "token_mask_is_threshold_high": (
            None,
            f"masks tokens without weighting them, which {_NO_EQUAL}; icepop is near",
        ),
        _S + "use_tis": (False, "is deprecated in SkyRL; use off_policy_correction.tis_ratio_type=token"),
        _S + "tis_imp_ratio_cap": (-1.0, "is deprecated in SkyRL; use token_tis_ratio_clip_high"),
    },
    dash="",
)


def translate_verl(arguments: Sequence[str]) -> Translation:
    draft, given, ours = _read(VERL, arguments)
    _verl_objective(draft, given)
    _verl_rest(draft, given)
    draft.override(ours)
    return draft.finish(given)


def translate_skyrl(arguments: Sequence[str]) -> Translation:
    draft, given, ours = _read(SKYRL, arguments)
    _skyrl_objective(draft, given)
    _skyrl_correction(draft, given)
    _skyrl_rest(draft, given)
    draft.override(ours)
    return draft.finish(given)


def _read(table: Table, arguments: Sequence[str]) -> tuple[Draft, Given, list[str]]:
    draft = Draft(table)
    theirs, ours = _split(table, arguments)
    tree: dict = {}
    while theirs and "=" not in theirs[0] and not theirs[0].startswith("--"):
        path = theirs.pop(0)
        if not Path(path).is_file():
            raise ConfigError(f"--like {table.system}: {path}: no such file; give a YAML file or a.b=value")
        tree = trees.merge(tree, trees.load(path))
    trees.override(tree, theirs, draft)
    values = []
    for key, value in trees.leaves(tree):
        try:
            value = trees.resolve(tree, key, value)
        except ConfigError as error:
            if key in table.spelled:
                draft.problem(str(error))
                continue
        names = [name for name in table.spelled if name.endswith(f".{key}")] if key not in table.spelled else []
        if len(names) > 1:
            draft.problem(f"{key}: is one of {', '.join(names)}; write it in full")
            continue
        values.append((names[0] if names else key, value, key))
    return draft, table.accept(values, draft), ours


def _split(table: Table, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Their tree and ours share the section `algorithm` in verl: a key that they know is theirs."""
    known = {*table.spelled, *table.unsupported}
    theirs, ours = split_arguments(arguments)
    kept: list[str] = []
    target = ours
    for word in list(ours):
        if word.startswith("--"):
            target = theirs if word[2:].partition("=")[0] in known else kept
        target.append(word)
    return theirs, kept


_VERL_KL = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def _verl_objective(draft: Draft, given: Given) -> None:
    mode, origin = given[_A + "policy_loss.loss_mode"], given.origin(_A + "policy_loss.loss_mode")
    low, high = given[_A + "clip_ratio_low"], given[_A + "clip_ratio_high"]
    low = given[_A + "clip_ratio"] if low is None else low
    high = given[_A + "clip_ratio"] if high is None else high
    kinds = {"cispo": "cispo", "vanilla": "ppo_clip", "gspo": "gspo", "sapo": "sapo"}
    if mode not in kinds:
        draft.problem(f"policy_loss.loss_mode = {mode}: has no equal here; use cispo, vanilla or gspo")
        return
    if kinds[mode] == "sapo":
        draft.problem("policy_loss.loss_mode = sapo: use --like skyrl or --algorithm.objective.type sapo")
        return
    draft.set("algorithm.objective.type", kinds[mode], origin)
    draft.take("algorithm.objective.clip_low_threshold", given, _A + "clip_ratio_low", max(0.0, 1 - low))
    draft.take("algorithm.objective.clip_high_threshold", given, _A + "clip_ratio_high", 1 + high)
    if mode == "vanilla":
        draft.take("algorithm.objective.dual_clip", given, _A + "clip_ratio_c")
        if _A + "policy_loss.loss_mode" not in given:
            draft.warn("policy_loss.loss_mode is not set: verl trains PPO's clip; pass policy_loss.loss_mode=cispo")
    elif _A + "clip_ratio_c" in given:
        draft.ignore(given.origin(_A + "clip_ratio_c"), f"verl does not read it with loss_mode {mode}")
    reductions = {"token-mean": "token", "seq-mean-token-mean": "sequence", "seq-mean-token-sum-norm": "constant"}
    aggregation = given[_A + "loss_agg_mode"]
    if aggregation not in reductions:
        draft.problem(
            f"loss_agg_mode = {aggregation}: sums a sequence's tokens, which has no equal here; use token-mean"
        )
    else:
        draft.take("algorithm.reduction", given, _A + "loss_agg_mode", reductions[aggregation])
    rollout = given[_A + "use_rollout_log_probs"] or given["algorithm.rollout_correction.bypass_mode"]
    names = (_A + "use_rollout_log_probs", "algorithm.rollout_correction.bypass_mode")
    draft.set("algorithm.anchor", "sampler" if rollout else "proximal", given.origin(*names))
    level, cap = (
        given["algorithm.rollout_correction.rollout_is"],
        given["algorithm.rollout_correction.rollout_is_threshold"],
    )
    if level is not None:
        section = {"type": "tis"} if level == "token" else {"type": "sequence_truncate", "ratio": "product"}
        draft.correction(given.origin("algorithm.rollout_correction.rollout_is"), **section, low=0.0, high=cap)
    if given[_A + "use_kl_loss"] and given["algorithm.use_kl_in_reward"]:
        draft.problem("use_kl_loss and use_kl_in_reward both penalise the KL; keep one")
    elif given[_A + "use_kl_loss"] and given[_A + "kl_loss_coef"]:
        form = given[_A + "kl_loss_type"]
        draft.take("algorithm.kl.coef", given, _A + "kl_loss_coef")
        draft.take("algorithm.kl.form", given, _A + "kl_loss_type", _VERL_KL[form])
        if form in ("low_var_kl", "k3"):
            draft.set("algorithm.kl.input_clamp", 20.0, "verl's low_var_kl")
            draft.set("algorithm.kl.output_clamp", 10.0, "verl's low_var_kl")
    elif given["algorithm.use_kl_in_reward"] and given["algorithm.kl_ctrl.kl_coef"]:
        draft.take("algorithm.kl.coef", given, "algorithm.kl_ctrl.kl_coef")
        draft.take("algorithm.kl.place", given, "algorithm.use_kl_in_reward", "reward")
        draft.take("algorithm.kl.form", given, "algorithm.kl_penalty", _VERL_KL[given["algorithm.kl_penalty"]])
    if given[_A + "entropy_coeff"]:
        draft.take("algorithm.entropy_bonus", given, _A + "entropy_coeff")


def _verl_rest(draft: Draft, given: Given) -> None:
    estimator, origin = given["algorithm.adv_estimator"], given.origin("algorithm.adv_estimator")
    if estimator == "gae":
        if "algorithm.adv_estimator" in given:
            draft.problem("algorithm.adv_estimator = gae: needs a critic, which is not here; use grpo")
        draft.warn(
            "algorithm.adv_estimator is not set, and verl's gae needs a critic, which is not here: grpo is taken"
        )
        estimator, origin = "grpo", "ours"
    by_std = given["algorithm.norm_adv_by_std_in_grpo"]
    kinds = {
        "grpo": "group" if by_std else "group_mean",
        "rloo": "leave_one_out",
        "reinforce_plus_plus": "reinforce_plus_plus",
        "reinforce_plus_plus_baseline": "reinforce_plus_plus_baseline",
    }
    if estimator not in kinds:
        draft.problem(f"algorithm.adv_estimator = {estimator}: has no equal here; use {', '.join(kinds)}")
    else:
        draft.set("algorithm.advantage", kinds[estimator], origin)
    _group(draft, given, _R + "n", 1)
    prompts, mini = given["data.train_batch_size"], given[_A + "ppo_mini_batch_size"]
    _updates(draft, given, prompts, mini, ("data.train_batch_size", _A + "ppo_mini_batch_size"))
    draft.take("algorithm.epochs_per_rollout", given, _A + "ppo_epochs")
    draft.take("rollout.max_tokens", given, "data.max_response_length")
    for name in ("temperature", "top_p"):
        draft.take(f"rollout.{name}", given, _R + name)
    draft.take("rollout.top_k", given, _R + "top_k", max(0, given[_R + "top_k"] or 0))
    draft.take("optimizer.learning_rate", given, _A + "optim.lr")
    draft.take("optimizer.weight_decay", given, _A + "optim.weight_decay")
    draft.take("optimizer.grad_clip_norm", given, _A + "optim.clip_grad")
    draft.take("optimizer.schedule", given, _A + "optim.lr_scheduler_type")
    draft.take(
        "optimizer.warmup_updates",
        given,
        _A + "optim.lr_warmup_steps",
        max(0, given[_A + "optim.lr_warmup_steps"] or 0),
    )
    _betas(draft, given, _A + "optim.betas")
    _common(draft, given, model="actor_rollout_ref.model.path", steps="trainer.total_training_steps")
    if given["trainer.default_local_dir"] is not None:
        draft.take("run_dir", given, "trainer.default_local_dir")


def _skyrl_objective(draft: Draft, given: Given) -> None:
    kind, origin = given[_S + "policy_loss_type"], given.origin(_S + "policy_loss_type")
    fields = [n for n in given.values if n.startswith(_S + "cispo.")]
    if kind != "cispo" and fields:
        shown = ", ".join(given.origin(n) for n in fields)
        if _S + "policy_loss_type" in given:
            draft.problem(f"{origin} = {kind} and {shown} contradict each other; SkyRL reads cispo.* with cispo only")
        else:
            draft.warn(
                f"{shown} without policy_loss_type: SkyRL's default `regular` would not read it; read here as "
                "policy_loss_type=cispo"
            )
            kind = "cispo"
    anchor = given[_S + "cispo.cispo_anchor"] if kind == "cispo" else "old"
    match kind:
        case "cispo":
            low, high = given[_S + "cispo.cispo_eps_clip_low"], given[_S + "cispo.cispo_eps_clip_high"]
            draft.set("algorithm.objective.type", "cispo", origin)
            name = _S + "cispo.cispo_eps_clip_{}"
            draft.take("algorithm.objective.clip_low_threshold", given, name.format("low"), max(0.0, 1 - low))
            draft.take("algorithm.objective.clip_high_threshold", given, name.format("high"), 1 + high)
            if low <= 0:
                draft.warn(
                    f"{given.origin(name.format('low'))} = {low:g}: an offset, so that every weight is at least "
                    f"{1 - low:g} "
                    "(SkyRL #1928); 1 means no floor"
                )
        case "regular" | "dual_clip" | "gspo":
            low, high = given[_S + "eps_clip_low"], given[_S + "eps_clip_high"]
            draft.set("algorithm.objective.type", "gspo" if kind == "gspo" else "ppo_clip", origin)
            draft.take("algorithm.objective.clip_low_threshold", given, _S + "eps_clip_low", max(0.0, 1 - low))
            draft.take("algorithm.objective.clip_high_threshold", given, _S + "eps_clip_high", 1 + high)
            if kind == "dual_clip":
                draft.take("algorithm.objective.dual_clip", given, _S + "clip_ratio_c")
        case "sapo":
            draft.set("algorithm.objective.type", "sapo", origin)
            draft.take("algorithm.objective.positive_temperature", given, _S + "sapo.tau_pos")
            draft.take("algorithm.objective.negative_temperature", given, _S + "sapo.tau_neg")
        case "importance_sampling":
            draft.set("algorithm.objective.type", "importance_sampling", origin)
            anchor = "rollout"
        case _:
            draft.problem(
                f"policy_loss_type = {kind}: has no equal here; use cispo, regular, dual_clip, gspo, sapo or "
                "importance_sampling"
            )
    draft.set(
        "algorithm.anchor",
        "sampler" if anchor == "rollout" else "proximal",
        given.origin(_S + "cispo.cispo_anchor"),
    )
    reductions = {"token_mean": "token", "sequence_mean": "sequence", "prompt_mean": "prompt",
                  "seq_mean_token_sum_norm": "constant"}  # fmt: skip
    reduction = given[_S + "loss_reduction"]
    if reduction not in reductions:
        draft.problem(f"loss_reduction = {reduction}: has no equal here; use {', '.join(reductions)}")
    else:
        draft.take("algorithm.reduction", given, _S + "loss_reduction", reductions[reduction])
        if reduction == "seq_mean_token_sum_norm" and given[_S + "max_seq_len"] is not None:
            draft.take("algorithm.constant", given, _S + "max_seq_len", float(given[_S + "max_seq_len"]))
    if kind == "gspo" and _S + "loss_reduction" not in given:
        draft.set("algorithm.reduction", "sequence", "gspo averages over sequences")
    use_loss, in_reward = given[_S + "use_kl_loss"], given[_S + "use_kl_in_reward"]
    if use_loss and in_reward and _S + "use_kl_loss" in given:
        draft.problem("use_kl_loss and use_kl_in_reward exclude each other; keep one")
    elif (use_loss or in_reward) and given[_S + "kl_loss_coef"]:
        draft.take("algorithm.kl.coef", given, _S + "kl_loss_coef")
        draft.set(
            "algorithm.kl.place",
            "reward" if in_reward else "loss",
            given.origin(_S + "use_kl_loss", _S + "use_kl_in_reward"),
        )
        if given[_S + "kl_estimator_type"] == "abs":
            draft.problem("kl_estimator_type = abs: has no equal here; use k1, k2 or k3")
        else:
            draft.take("algorithm.kl.form", given, _S + "kl_estimator_type")
    if given[_S + "use_entropy_loss"]:
        draft.set("algorithm.entropy_bonus", given[_S + "entropy_loss_coef"], given.origin(_S + "use_entropy_loss"))


def _skyrl_correction(draft: Draft, given: Given) -> None:
    tis, mask = given[_O + "tis_ratio_type"], given[_O + "sequence_mask_metric"]
    if tis is not None and mask is not None:
        draft.problem("tis_ratio_type and sequence_mask_metric together have no equal here; keep one")
    elif tis is not None and draft.raw["algorithm"]["anchor"] == "sampler":
        draft.problem(
            f"cispo_anchor = rollout with tis_ratio_type = {tis} corrects twice (SkyRL refuses it too); keep one"
        )
    elif tis is not None:
        section = {"type": "tis"} if tis == "token" else {"type": "sequence_truncate", "ratio": "product"}
        draft.correction(
            given.origin(_O + "tis_ratio_type"), **section, low=0.0, high=given[_O + f"{tis}_tis_ratio_clip_high"]
        )
    elif mask is not None:
        prefix = {"geometric": "geo", "product": "product"}[mask]
        bounds = {"low": given[f"{_O}{prefix}_mask_low"], "high": given[f"{_O}{prefix}_mask_high"]}
        draft.correction(
            given.origin(_O + "sequence_mask_metric"), type="sequence_mask", ratio=mask, weight="one", **bounds
        )


def _skyrl_rest(draft: Draft, given: Given) -> None:
    estimator = given[_S + "advantage_estimator"]
    by_std = given[_S + "grpo_norm_by_std"]
    kinds = {"grpo": "group" if by_std else "group_mean", "rloo": "leave_one_out", "reinforce++": "reinforce_plus_plus"}
    if given[_S + "advantage_batch_normalize"]:
        kinds = {"grpo": "reinforce_plus_plus_baseline" if not by_std else None, "reinforce++": "reinforce_plus_plus"}
    if kinds.get(estimator) is None:
        draft.problem(
            f"advantage_estimator = {estimator}, advantage_batch_normalize = "
            f"{given[_S + 'advantage_batch_normalize']}: "
            f"has no equal here; use {', '.join(k for k, v in kinds.items() if v)}"
        )
    else:
        names = (_S + "advantage_estimator", _S + "grpo_norm_by_std", _S + "advantage_batch_normalize")
        draft.set("algorithm.advantage", kinds[estimator], given.origin(*names))
    _group(draft, given, "generator.n_samples_per_prompt", 5)
    prompts, mini = given["trainer.train_batch_size"], given["trainer.policy_mini_batch_size"]
    if given["trainer.fully_async.enabled"]:
        prompts = mini
        draft.set(
            "async.max_staleness",
            given["trainer.fully_async.max_staleness_steps"],
            given.origin("trainer.fully_async.enabled"),
        )
    _updates(draft, given, prompts, mini, ("trainer.train_batch_size", "trainer.policy_mini_batch_size"))
    draft.take("algorithm.epochs_per_rollout", given, "trainer.update_epochs_per_batch")
    sampling = "generator.sampling_params."
    draft.take("rollout.max_tokens", given, sampling + "max_generate_length")
    for name in ("temperature", "top_p", "min_p"):
        draft.take(f"rollout.{name}", given, sampling + name)
    draft.take("rollout.top_k", given, sampling + "top_k", max(0, given[sampling + "top_k"] or 0))
    sampled = given[_S + "dynamic_sampling.type"]
    if sampled == "replace":
        draft.problem("dynamic_sampling.type = replace: has no equal here; use filter")
    elif sampled == "filter":
        draft.take("rollout.zero_variance", given, _S + "dynamic_sampling.type", "resample")
        draft.take("rollout.max_resample_rounds", given, _S + "dynamic_sampling.max_sample_batches")
    elif given[_S + "zero_variance_filter"]:
        draft.take("rollout.zero_variance", given, _S + "zero_variance_filter", "drop")
    optimizer = "trainer.policy.optimizer_config."
    draft.take("optimizer.learning_rate", given, optimizer + "lr")
    draft.take("optimizer.weight_decay", given, optimizer + "weight_decay")
    draft.take("optimizer.grad_clip_norm", given, optimizer + "max_grad_norm")
    draft.take("optimizer.warmup_updates", given, optimizer + "num_warmup_steps")
    scheduler = (given[optimizer + "scheduler"] or "constant").removesuffix("_with_warmup")
    draft.take("optimizer.schedule", given, optimizer + "scheduler", scheduler)
    _betas(draft, given, optimizer + "adam_betas")
    if given["trainer.policy.model.lora.rank"]:
        draft.take("model.lora.rank", given, "trainer.policy.model.lora.rank")
        draft.take("model.lora.alpha", given, "trainer.policy.model.lora.alpha")
    draft.take("seed", given, "trainer.seed")
    _common(draft, given, model="trainer.policy.model.path", steps=None)


def _group(draft: Draft, given: Given, name: str, default: int) -> None:
    if name in given or default > 1:
        draft.take("rollout.group_size", given, name)
    else:
        draft.warn(
            f"{name} is not given, and {draft.table.title}'s default of {default} leaves no group: ours is taken"
        )


def _updates(draft: Draft, given: Given, prompts: int, mini: int, names: tuple[str, str]) -> None:
    if not prompts or not mini or prompts < 1 or mini < 1:
        draft.problem(f"{names[0]} = {prompts}, {names[1]} = {mini}: both must be at least 1")
    else:
        place_updates(draft, given, groups=prompts, updates=prompts / mini, names=names)


def _betas(draft: Draft, given: Given, name: str) -> None:
    try:
        beta1, beta2 = (float(b) for b in given[name])
    except (TypeError, ValueError):
        draft.problem(f"{name} = {given[name]}: must be two numbers")
        return
    draft.take("optimizer.beta1", given, name, beta1)
    draft.take("optimizer.beta2", given, name, beta2)
    draft.set("optimizer.eps", 1e-8, "torch's AdamW")


def _common(draft: Draft, given: Given, *, model: str, steps: str | None) -> None:
    if given[model] is not None:
        draft.take("model.path", given, model)
    if steps is not None and given[steps] is not None:
        draft.take("steps", given, steps)
    without_dataset(draft)
