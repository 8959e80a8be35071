"""miles (slime's fork): argparse flags in, our config out.

The ratio is clipped to [1 − eps_clip, 1 + eps_clip_high]; `--eps-clip-high` unset copies `--eps-clip`, so that the
defaults give [0.8, 1.2]. Read in miles of August 2026 with its CISPO estimator (PR #1331). Left out on purpose: the
critic (`ppo`), and Megatron's, SGLang's and Ray's own flags, which are listed as ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

from cispo import config as c
from cispo.dialects.datasets import place_dataset, place_rewards, place_updates, without_dataset, without_evaluation
from cispo.dialects.draft import OURS, Draft, Given, Setting, Table, Translation, read_flags, split_arguments

ESTIMATORS = ("grpo", "gspo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo", "cispo")
_SWITCH_NAMES = """
use_tis use_opsm use_rollout_logprobs calculate_per_token_loss use_kl_loss normalize_advantages use_opd
disable_grpo_std_normalization disable_rewards_normalization apply_chat_template skip_actor_forward_only
use_unbiased_kl colocate balance_data use_dynamic_batch_size rollout_shuffle sequence_parallel use_wandb
accumulate_allreduce_grads_in_fp32 attention_softmax_in_fp32 get_mismatch_metrics observe_training_entropy
use_rollout_entropy use_routing_replay use_rollout_routing_replay optimizer_cpu_offload reset_optimizer_states
overlap_cpu_optimizer_d2h_h2d use_precision_aware_optimizer disable_compute_advantages_and_returns
use_tensorboard use_distributed_optimizer bf16 fp16 untie_embeddings_and_output_weights gradient_checkpointing
partial_rollout mask_offpolicy_in_partial_rollout use_fault_tolerance use_dynamic_global_batch_size
"""
_SWITCHES = frozenset(_SWITCH_NAMES.split())

_SETTINGS = [
    Setting("advantage_estimator", "str", "grpo", choices=ESTIMATORS),
    Setting("eps_clip", "float", 0.2),
    Setting("eps_clip_high", "float"),
    Setting("eps_clip_c", "float"),
    Setting("use_tis", "bool", False),
    Setting("tis_clip", "float", 2.0),
    Setting("tis_clip_low", "float", 0.0),
    Setting("custom_tis_function_path", "str"),
    Setting("use_opsm", "bool", False),
    Setting("opsm_delta", "float", 1e-4),
    Setting("use_rollout_logprobs", "bool", False),
    Setting("n_samples_per_prompt", "int", 1),
    Setting("rollout_batch_size", "int"),
    Setting("global_batch_size", "int"),
    Setting("num_steps_per_rollout", "int"),
    Setting("calculate_per_token_loss", "bool", False),
    Setting("use_kl_loss", "bool", False),
    Setting("kl_loss_coef", "float", 0.0),
    Setting("kl_loss_type", "str", "k1", choices=("k1", "k2", "k3", "low_var_kl")),
    Setting("kl_coef", "float", 0.0),
    Setting("use_unbiased_kl", "bool", False),
    Setting("entropy_coef", "float", 0.0),
    Setting("normalize_advantages", "bool", False),
    Setting("disable_grpo_std_normalization", "bool", False),
    Setting("disable_rewards_normalization", "bool", False),
    Setting("loss_type", "str", "policy_loss", choices=("policy_loss", "sft_loss", "custom_loss")),
    Setting("rollout_temperature", "float", 1.0),
    Setting("rollout_top_p", "float", 1.0),
    Setting("rollout_top_k", "int", -1),
    Setting("rollout_max_response_len", "int"),
    Setting("rollout_stop", "list"),
    Setting("rollout_stop_token_ids", "list"),
    Setting("num_rollout", "int"),
    Setting("lr", "float", 1e-6),
    Setting("lr_decay_style", "str", "linear", choices=("constant", "linear", "cosine")),
    Setting("lr_warmup_iters", "int", 0),
    Setting("adam_beta1", "float", 0.9),
    Setting("adam_beta2", "float", 0.999),
    Setting("adam_eps", "float", 1e-8),
    Setting("weight_decay", "float", 0.01),
    Setting("clip_grad", "float", 1.0),
    Setting("seed", "int", 1234),
    Setting("hf_checkpoint", "str"),
    Setting("prompt_data", "list"),
    Setting("input_key", "str", "input"),
    Setting("label_key", "str"),
    Setting("apply_chat_template", "bool", False),
    Setting("rm_type", "str"),
    Setting("custom_rm_path", "str"),
    Setting("dynamic_sampling_filter_path", "str"),
    Setting("save", "str"),
    Setting("lora_rank", "int", 0),
    Setting("lora_alpha", "float", 32.0),
    Setting("target_modules", "list"),
]

_IGNORED = {
    "the sampling engine is cispo's own": (
        "sglang_*", "rollout_num_gpus*", "rollout_function_path", "custom_generate_function_path",
        "use_miles_router", "rollout_max_context_len", "rollout_max_prompt_len", "rollout_skip_special_tokens",
        "rollout_external*", "router_*", "over_sampling_batch_size", "rollout_health_*", "fp8_rollout",
        "partial_rollout", "update_weight*", "colocate", "mask_offpolicy_in_partial_rollout", "rollout_shuffle",
        "rollout_seed", "server_concurrency",
    ),
    "placement, parallelism and memory; cannot change the result": (
        "*_parallel_size", "sequence_parallel", "actor_num_*", "critic_num_*", "num_nodes", "num_gpus_per_node",
        "offload*", "use_dynamic_batch_size", "use_dynamic_global_batch_size", "max_tokens_per_gpu",
        "micro_batch_size", "balance_data", "recompute_*", "optimizer_cpu_offload", "overlap_*",
        "use_precision_aware_optimizer", "use_distributed_optimizer", "accumulate_allreduce_grads_in_fp32",
        "attention_softmax_in_fp32", "attention_backend", "train_backend", "bf16", "fp16", "megatron_*",
        "decoder_*_pipeline_num_layers", "gradient_checkpointing", "attn_implementation", "ci_*",
        "no_gradient_accumulation_fusion", "no_check_for_nan_in_loss_and_grad", "deterministic_mode", "ref_load",
        "log_probs_*", "train_env_vars", "runtime_env_json", "use_fault_tolerance", "debug_*", "qkv_format",
    ),
    "the model folder says how the model is built": (
        "model_name", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
        "swiglu", "group_query_attention", "use_rotary_position_embeddings", "disable_bias_linear", "add_qkv_bias",
        "normalization", "norm_epsilon", "rotary_*", "vocab_size", "kv_channels", "qk_layernorm",
        "untie_embeddings_and_output_weights", "moe_*", "num_experts", "hidden_dropout", "attention_dropout",
        "mtp_*", "spec", "max_position_embeddings", "tokenizer_*",
    ),
    "every step is logged (metrics.jsonl, rollouts/)": (
        "use_wandb", "wandb_*", "use_tensorboard", "tb_*", "log_*", "disable_wandb_random_suffix",
        "get_mismatch_metrics", "observe_training_entropy", "use_rollout_entropy", "profile_*", "memory_*",
        "record_*", "dump_*", "tensorboard_*",
    ),
    "checkpoints are cispo's own (checkpoint.every, atomic, resumable)": (
        "load", "save_interval", "start_rollout_id", "no_save_optim", "no_load_*", "async_save", "ckpt_*",
        "finetune",
    ),
    "evaluation is cispo's own (eval.every, mean@k and pass@k)": (
        "eval_*", "n_samples_per_eval_prompt", "skip_eval_before_train", "enable_eval",
    ),
    "parameters of a part that is off": (
        "critic_*", "value_clip", "num_critic_only_steps", "gamma", "lambd", "opd_*", "custom_loss_function_path",
    ),
    "only AdamW is here": ("optimizer",),
    "the number of rollouts needs the dataset's size: set --num-rollout": ("num_epoch",),
    "data columns are reward functions' arguments": ("metadata_key", "tool_key", "multimodal_keys", "reward_key"),
}  # fmt: skip
_NO_EQUAL = "changes the algorithm and has no equal here"
_UNSUPPORTED = {
    "ref_update_interval": (None, f"moves the reference model, which {_NO_EQUAL}"),
    "use_opd": (
        False,
        "distils from a teacher that it serves elsewhere; here name it: --algorithm.distillation.teacher MODEL",
    ),
    "reset_optimizer_states": (False, f"forgets the optimizer's moments, which {_NO_EQUAL}"),
    "use_routing_replay": (False, f"replays MoE routing, which {_NO_EQUAL}"),
    "use_rollout_routing_replay": (False, f"replays MoE routing, which {_NO_EQUAL}"),
    "disable_compute_advantages_and_returns": (False, "trains without advantages; only RL is here"),
    "skip_actor_forward_only": (False, f"makes the ratio exactly 1, which {_NO_EQUAL}; use one update per rollout"),
    "custom_pg_loss_reducer_function_path": (None, f"is a reducer of your own, which {_NO_EQUAL}"),
    "custom_reward_post_process_path": (None, f"changes rewards after the fact, which {_NO_EQUAL}"),
}

MILES = Table("miles", "miles", {s.name: s for s in _SETTINGS}, _IGNORED, _UNSUPPORTED)


def translate(arguments: Sequence[str]) -> Translation:
    draft = Draft(MILES)
    theirs, ours = split_arguments(arguments)
    given = MILES.accept(read_flags(theirs, draft, switches=_SWITCHES), draft)
    _objective(draft, given)
    _anchor(draft, given)
    _penalties(draft, given)
    _batches(draft, given)
    _optimizer(draft, given)
    _data(draft, given)
    draft.override(ours)
    return draft.finish(given)


def _objective(draft: Draft, given: Given) -> None:
    estimator, origin = given["advantage_estimator"], given.origin("advantage_estimator")
    low, high = given["eps_clip"], given["eps_clip_high"]
    high_origin = given.origin("eps_clip_high") if high is not None else f"{given.origin('eps_clip')} (copied by miles)"
    high = low if high is None else high
    if given["loss_type"] != "policy_loss":
        draft.problem(
            f"--loss-type {given['loss_type']}: only policy_loss is here; name an own one in algorithm.objective"
        )
    if estimator == "ppo":
        draft.problem("--advantage-estimator ppo: needs a critic, which is not here; use cispo or grpo")
        return
    draft.set("algorithm.objective.type", {"cispo": "cispo", "gspo": "gspo"}.get(estimator, "ppo_clip"), origin)
    draft.set("algorithm.objective.clip_low_threshold", max(0.0, 1 - low), given.origin("eps_clip"))
    draft.set("algorithm.objective.clip_high_threshold", 1 + high, high_origin)
    if given["eps_clip_c"] is not None:
        if estimator in ("cispo", "gspo"):
            draft.problem(f"--eps-clip-c with --advantage-estimator {estimator}: dual clip is PPO's; remove one")
        else:
            draft.take("algorithm.objective.dual_clip", given, "eps_clip_c")
    group = "group_mean" if given["disable_grpo_std_normalization"] or given["n_samples_per_prompt"] == 1 else "group"
    kind = {"reinforce_plus_plus": "none", "reinforce_plus_plus_baseline": "group_mean"}.get(estimator, group)
    if given["disable_rewards_normalization"]:
        kind = "none"
    if given["n_samples_per_prompt"] == 1:
        kind = "none" if kind != "none" and "n_samples_per_prompt" not in given else kind
    if given["normalize_advantages"]:
        whitened = {"none": "reinforce_plus_plus", "group_mean": "reinforce_plus_plus_baseline"}
        if kind not in whitened:
            draft.problem(
                f"--normalize-advantages with --advantage-estimator {estimator} divides twice, which is not here; add "
                "--disable-grpo-std-normalization"
            )
        kind = whitened.get(kind, kind)
    draft.set("algorithm.advantage", kind, given.origin("advantage_estimator", "disable_grpo_std_normalization"))
    per_token = given["calculate_per_token_loss"]
    draft.take("algorithm.reduction", given, "calculate_per_token_loss", "token" if per_token else "sequence")


def _anchor(draft: Draft, given: Given) -> None:
    rollout, tis = given["use_rollout_logprobs"], given["use_tis"]
    if rollout and tis:
        draft.problem(
            "--use-tis and --use-rollout-logprobs exclude each other: the ratio to the rollout's log-probs already is "
            "the correction; keep one"
        )
        return
    draft.set(
        "algorithm.anchor",
        "sampler" if rollout else "proximal",
        given.origin("use_rollout_logprobs") if rollout else "miles recomputes log-probs",
    )
    if tis:
        path = given["custom_tis_function_path"]
        kind = "icepop" if path is not None and path.endswith("icepop_function") else "tis"
        if path is not None and kind == "tis":
            draft.problem(f"--custom-tis-function-path {path}: not known here; use algorithm.correction")
        draft.correction(
            given.origin("use_tis", "tis_clip", "tis_clip_low"),
            type=kind,
            low=given["tis_clip_low"],
            high=given["tis_clip"],
        )
    if given["use_opsm"]:
        draft.set("algorithm.opsm_delta", given["opsm_delta"], given.origin("use_opsm", "opsm_delta"))


def _penalties(draft: Draft, given: Given) -> None:
    in_loss = given["use_kl_loss"] and given["kl_loss_coef"]
    if in_loss and given["kl_coef"]:
        draft.problem("--kl-coef and --use-kl-loss both penalise the KL, in the reward and in the loss; keep one")
        return
    if not in_loss and not given["kl_coef"]:
        return
    form = given["kl_loss_type"]
    names = ("use_kl_loss", "kl_loss_coef") if in_loss else ("kl_coef",)
    draft.set("algorithm.kl.coef", given["kl_loss_coef"] if in_loss else given["kl_coef"], given.origin(*names))
    draft.set("algorithm.kl.place", "loss" if in_loss else "reward", given.origin(*names))
    draft.take("algorithm.kl.form", given, "kl_loss_type", "k3" if form == "low_var_kl" else form)
    if given["use_unbiased_kl"] and in_loss:
        draft.take("algorithm.kl.ratio_weighted", given, "use_unbiased_kl")
    if form == "low_var_kl":
        draft.set("algorithm.kl.input_clamp", 20.0, "miles' low_var_kl")
        draft.set("algorithm.kl.output_clamp", 10.0, "miles' low_var_kl")
    elif form == "k1" and in_loss:
        draft.warn("--kl-loss-type k1 in the loss: its gradient is that of log π and does not depend on the reference")


def _batches(draft: Draft, given: Given) -> None:
    samples, prompts = given["n_samples_per_prompt"], given["rollout_batch_size"]
    for name in ("n_samples_per_prompt", "rollout_batch_size", "global_batch_size", "num_steps_per_rollout"):
        if given[name] is not None and given[name] < 1:
            draft.problem(f"{given.origin(name)} = {given[name]}: must be at least 1")
            return
    if "n_samples_per_prompt" in given:
        draft.take("rollout.group_size", given, "n_samples_per_prompt")
    elif draft.raw["algorithm"].get("advantage") is not None:
        draft.warn("--n-samples-per-prompt is not given, and miles' default of 1 leaves no group: ours is taken")
        draft.set("rollout.group_size", c.Config().rollout.group_size, OURS)
        draft.set("algorithm.advantage", "group", given.origin("advantage_estimator"))
        samples = c.Config().rollout.group_size
    if prompts is None:
        prompts = c.Config().rollout.groups_per_step
        draft.set("rollout.groups_per_step", prompts, OURS)
    batch, steps = given["global_batch_size"], given["num_steps_per_rollout"]
    if batch is not None and steps is not None and prompts * samples != batch * steps:
        draft.problem(
            f"--global-batch-size {batch} and --num-steps-per-rollout {steps} contradict each other: "
            f"{prompts} × {samples} samples make {prompts * samples / batch:g} updates; keep one"
        )
        return
    updates = steps if steps is not None else prompts * samples / batch if batch is not None else 1
    place_updates(
        draft,
        given,
        groups=prompts,
        updates=updates,
        names=("rollout_batch_size", "n_samples_per_prompt", "global_batch_size", "num_steps_per_rollout"),
    )
    if given["entropy_coef"]:
        draft.take("algorithm.entropy_bonus", given, "entropy_coef")
    if given["num_rollout"] is not None:
        draft.take("steps", given, "num_rollout")


def _optimizer(draft: Draft, given: Given) -> None:
    for key, name in (
        ("learning_rate", "lr"),
        ("schedule", "lr_decay_style"),
        ("warmup_updates", "lr_warmup_iters"),
        ("beta1", "adam_beta1"),
        ("beta2", "adam_beta2"),
        ("eps", "adam_eps"),
        ("weight_decay", "weight_decay"),
        ("grad_clip_norm", "clip_grad"),
    ):
        draft.take(f"optimizer.{key}", given, name)
    draft.take("seed", given, "seed")
    if given["save"] is not None:
        draft.take("run_dir", given, "save")


def _data(draft: Draft, given: Given) -> None:
    draft.take("rollout.temperature", given, "rollout_temperature")
    draft.take("rollout.top_p", given, "rollout_top_p")
    draft.take("rollout.top_k", given, "rollout_top_k", max(0, given["rollout_top_k"] or 0))
    if given["rollout_max_response_len"] is not None:
        draft.take("rollout.max_tokens", given, "rollout_max_response_len")
    if given["rollout_stop"] is not None:
        draft.take("rollout.stop", given, "rollout_stop")
    if given["rollout_stop_token_ids"] is not None:
        try:
            draft.take(
                "rollout.stop_token_ids",
                given,
                "rollout_stop_token_ids",
                [int(i) for i in given["rollout_stop_token_ids"]],
            )
        except ValueError:
            draft.problem(f"--rollout-stop-token-ids {' '.join(given['rollout_stop_token_ids'])}: not token ids")
    path = given["dynamic_sampling_filter_path"]
    if path is not None and path.endswith("check_reward_nonzero_std"):
        draft.take("rollout.zero_variance", given, "dynamic_sampling_filter_path", "resample")
    elif path is not None:
        draft.problem(f"--dynamic-sampling-filter-path {path}: only …check_reward_nonzero_std is here")
    if given["hf_checkpoint"] is not None:
        draft.take("model.path", given, "hf_checkpoint")
    if given["lora_rank"]:
        draft.take("model.lora.rank", given, "lora_rank")
        draft.take("model.lora.alpha", given, "lora_alpha")
        if given["target_modules"] and given["target_modules"] != ["all-linear"]:
            draft.take("model.lora.target_modules", given, "target_modules")
    files = given["prompt_data"]
    if not files:
        without_dataset(draft)
        return
    files = files[1::2] if len(files) > 1 and len(files) % 2 == 0 else files  # "name path" pairs
    if len(files) > 1:
        draft.problem(f"--prompt-data: {len(files)} files; join them into one")
    place_dataset(draft, files[0], given.origin("prompt_data"))
    draft.take("task.prompt_column", given, "input_key")
    draft.take("task.chat_template", given, "apply_chat_template")
    column = given["label_key"] or "label"
    known = {name: {"type": "math", "column": column} for name in ("math", "deepscaler", "dapo")}
    if given["custom_rm_path"] is not None:
        place_rewards(draft, [given["custom_rm_path"]], None, given.origin("custom_rm_path"), {})
    elif given["rm_type"] is not None:
        place_rewards(draft, [given["rm_type"]], None, given.origin("rm_type"), known)
    else:
        draft.problem("--prompt-data without --rm-type or --custom-rm-path: say how completions are rewarded")
    without_evaluation(draft)
