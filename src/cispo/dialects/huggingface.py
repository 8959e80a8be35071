"""TRL (`trl grpo`) and ms-swift (`swift rlhf --rlhf_type grpo`): flags in, our config out.

Both cap the weight absolutely (`epsilon_high`), have no floor, and anchor on the trainer's own recomputed log-probs.
Read in TRL 1.16 and ms-swift 4.x. Left out on purpose: losses that are no ratio objective (luspo, vespo, fipo, real),
and everything about devices, engines, logging and hubs, which is listed as ignored.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace

from cispo import config as c
from cispo.dialects.datasets import (
    ANSWER_FORMAT,
    THINK_FORMAT,
    place_dataset,
    place_rewards,
    place_updates,
    whole_steps,
    without_dataset,
    without_evaluation,
)
from cispo.dialects.draft import Draft, Given, Setting, Table, Translation, read_flags, split_arguments
from cispo.types import ConfigError

_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
_SCHEDULES = ("constant", "constant_with_warmup", "cosine", "linear", "cosine_with_min_lr")

_COMMON = [
    Setting("loss_type", "str"),
    Setting("epsilon", "float", 0.2),
    Setting("epsilon_high", "float"),
    Setting("delta", "float"),
    Setting("num_generations", "int", 8),
    Setting("num_iterations", "int", 1),
    Setting("steps_per_generation", "int"),
    Setting("generation_batch_size", "int"),
    Setting("per_device_train_batch_size", "int"),
    Setting("gradient_accumulation_steps", "int", 1),
    Setting("num_processes", "int", 1, ("nproc_per_node", "world_size")),
    Setting("beta", "float"),
    Setting("temperature", "float"),
    Setting("top_p", "float", 1.0),
    Setting("top_k", "int"),
    Setting("min_p", "float"),
    Setting("max_completion_length", "int", 512, ("max_new_tokens",)),
    Setting("scale_rewards", "str"),
    Setting("reward_funcs", "list"),
    Setting("reward_weights", "list"),
    Setting("mask_truncated_completions", "bool", False, ("overlong_filter",)),
    Setting("importance_sampling_level", "str", "token", choices=("token", "sequence")),
    Setting("use_vllm", "bool", False),
    Setting("learning_rate", "float"),
    Setting("weight_decay", "float"),
    Setting("adam_beta1", "float", 0.9),
    Setting("adam_beta2", "float"),
    Setting("adam_epsilon", "float", 1e-8),
    Setting("max_grad_norm", "float", 1.0),
    Setting("optim", "str", "adamw_torch", choices=("adamw_torch", "adamw_torch_fused")),
    Setting("lr_scheduler_type", "str", choices=_SCHEDULES),
    Setting("warmup_steps", "float", 0.0),
    Setting("warmup_ratio", "float"),
    Setting("max_steps", "int", -1),
    Setting("seed", "int", 42),
    Setting("output_dir", "str"),
    Setting("save_total_limit", "int"),
    Setting("report_to", "list", ["none"]),
    Setting("model", "str", None, ("model_name_or_path",)),
    Setting("dtype", "str", None, ("torch_dtype",), ("float32", "bfloat16", "auto", "float16")),
    Setting("attn_implementation", "str", None, ("attn_impl",)),
    Setting("dataset", "list", None, ("dataset_name",)),
    Setting("use_peft", "bool", False),
    Setting("gradient_checkpointing", "bool", None),
    Setting("use_cpu", "bool", False),
    Setting("eval_strategy", "str", "no"),
    Setting("off_policy_mask_threshold", "float", None, ("off_policy_sequence_mask_delta",)),
    Setting("config", "str", None),
]
_CLIPPED = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "constant"}

_ENGINE = "the sampling engine is cispo's own"
_PLACEMENT = "placement and memory; cannot change the result"
_LOGGING = "every step is logged (metrics.jsonl, rollouts/)"
_IGNORED = {
    _ENGINE: (
        "vllm_*", "sglang_*", "use_transformers_paged", "use_transformers_continuous_batching", "infer_backend",
        "transformers_continuous_batching_config", "cache_implementation", "ds3_gather_for_generation",
        "sleep_level", "offload_optimizer", "offload_model", "move_model_batches", "use_cache", "max_batch_size",
    ),
    _PLACEMENT: (
        "deepspeed", "ddp_*", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config", "local_rank",
        "dataloader_*", "torch_compile*", "torch_empty_cache_steps", "auto_find_batch_size", "skip_memory_metrics",
        "gradient_checkpointing_kwargs", "activation_checkpointing*", "use_liger_kernel", "liger_kernel_config",
        "padding_free", "packing", "sequence_parallel_size", "device_map", "max_memory", "zero_hpz_partition_size",
        "deepspeed_autotp_size", "pad_to_multiple_of", "tf32", "bf16", "fp16", "bf16_full_eval", "fp16_full_eval",
        "bnb_4bit_*", "use_bnb_nested_quant", "per_device_eval_batch_size", "eval_accumulation_steps",
        "full_determinism", "data_seed", "average_tokens_across_devices", "dataset_num_proc", "lazy_tokenize",
        "streaming", "load_from_cache_file", "dataset_streaming", "use_flash_ckpt", "enable_jit_checkpoint", "debug",
        "tp_size",
    ),
    _LOGGING: (
        "logging_*", "log_*", "disable_tqdm", "run_name", "project", "trackio_*", "swanlab_*", "wandb_*",
        "num_completions_to_print", "include_num_input_tokens_seen", "include_for_metrics", "num_completions_to_log",
    ),
    "checkpoints are cispo's own (checkpoint.every, atomic, resumable)": (
        "save_*", "create_checkpoint_symlink", "resume_from_checkpoint", "resume_only_model", "ignore_data_skip",
        "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
        "restore_callback_states_from_checkpoint", "add_version", "overwrite_output_dir",
    ),
    "no hub is written to": ("push_to_hub", "hub_*", "use_hf", "hub_token", "check_model", "ignore_bias_buffers"),
    "evaluation is cispo's own (eval.every, mean@k and pass@k)": (
        "eval_*", "do_eval", "do_train", "do_predict", "num_generations_eval", "prediction_loss_only",
        "batch_eval_metrics", "per_device_eval_batch_size", "val_dataset*", "dataset_test_split",
    ),
    "the number of steps needs the dataset's size: set max_steps, or --steps": ("num_train_epochs", "max_epochs"),
    "supervised training only": (
        "label_names", "label_smoothing_factor", "neftune_noise_alpha", "loss_scale", "length_column_name",
        "train_sampling_strategy", "remove_unused_columns", "group_by_length",
    ),
    "the template comes with the model folder": (
        "model_revision", "model_type", "task_type", "template*", "chat_template_kwargs", "use_chat_template",
        "trust_remote_code", "model_init_kwargs", "response_prefix", "enable_thinking", "truncation_strategy",
        "max_length", "max_model_len", "max_pixels", "agent_template", "dataset_config", "dataset_train_split",
        "dataset_shuffle", "shuffle_dataset", "train_dataloader_shuffle", "external_plugins", "custom_register_path",
        "columns", "model_kwargs", "disable_dropout", "lora_dropout", "lora_bias", "lora_task_type", "init_weights",
    ),
    "parameters of a part that is off": (
        "cosine_*", "repetition_n_grams", "repetition_max_penalty", "chord_*", "ref_model_mixup_alpha", "rlsd_*",
        "ref_model_sync_steps", "vespo_*", "fipo_*", "real_tau", "entropy_coef_min", "entropy_coef_max", "lisa_*",
        "entropy_coef_delta", "entropy_target", "sdar_gate_beta", "teacher_*", "galore_*", "galore_rank",
        "max_tool_calling_iterations", "reward_model_plugin", "gym_env", "completion_length_limit_scope",
        "max_turns", "multi_turn_scheduler", "router_aux_loss_coef", "ref_model*", "ref_adapters",
    ),
}  # fmt: skip
_NO_EQUAL = "changes the algorithm and has no equal here"
_UNSUPPORTED = {
    "top_entropy_quantile": (1.0, f"masks all but high-entropy tokens, which {_NO_EQUAL}"),
    "sync_ref_model": (False, f"moves the reference model, which {_NO_EQUAL}"),
    "use_adaptive_entropy": (False, f"adapts the entropy bonus, which {_NO_EQUAL}"),
    "repetition_penalty": (1.0, f"changes the sampled distribution, which {_NO_EQUAL}"),
    "multi_objective_aggregation": ("sum_then_normalize", f"normalises each reward by itself, which {_NO_EQUAL}"),
    "load_in_8bit": (False, f"quantises the weights, which {_NO_EQUAL}"),
    "load_in_4bit": (False, f"quantises the weights, which {_NO_EQUAL}"),
    "use_rslora": (False, f"scales the adapter otherwise, which {_NO_EQUAL}"),
    "use_dora": (False, f"is another adapter, which {_NO_EQUAL}"),
    "generation_kwargs": (None, f"changes sampling, which {_NO_EQUAL}"),
    "reward_model_name_or_path": (None, "reward models are not loaded here; wrap one as package.module.function"),
    "lr_scheduler_kwargs": (None, f"bends the schedule, which {_NO_EQUAL}; see --optimizer.min_learning_rate_share"),
    "optim_args": (None, f"is of another optimizer, which {_NO_EQUAL}"),
    "optim_target_modules": (None, f"is of another optimizer, which {_NO_EQUAL}"),
    "lora_target_parameters": (None, f"is another adapter, which {_NO_EQUAL}"),
    "lora_modules_to_save": (None, f"trains modules beside the adapter, which {_NO_EQUAL}"),
}


def _table(system: str, title: str, changed: dict[str, dict], more: Sequence[Setting], **kwargs) -> Table:
    settings = {s.name: replace(s, **changed.get(s.name, {})) for s in _COMMON} | {s.name: s for s in more}
    return Table(system, title, settings, _IGNORED, **kwargs)


TRL = _table(
    "trl",
    "TRL",
    {
        "loss_type": {
            "default": "dapo",
            "choices": ("cispo", "dapo", "grpo", "bnpo", "dr_grpo", "sapo", "luspo", "vespo"),
        },
        "per_device_train_batch_size": {"default": 8},
        "beta": {"default": 0.0},
        "temperature": {"default": 1.0},
        "top_k": {"default": 0},
        "scale_rewards": {"default": "group", "choices": ("group", "batch", "none", "True", "False", "true", "false")},
        "learning_rate": {"default": 1e-6},
        "weight_decay": {"default": 0.0},
        "adam_beta2": {"default": 0.999},
        "lr_scheduler_type": {"default": "linear"},
    },
    [
        Setting("vllm_importance_sampling_correction", "bool", True),
        Setting("vllm_importance_sampling_mode", "str", "sequence_mask", choices=_MODES),
        Setting("vllm_importance_sampling_clip_max", "float", 3.0, ("vllm_importance_sampling_cap",), nullable=True),
        Setting("vllm_importance_sampling_clip_min", "float", None),
        Setting("cast_lm_head_to_fp32", "bool", False),
        Setting("entropy_coef", "float", 0.0),
        Setting("use_bias_correction_kl", "bool", True),
        Setting("lora_r", "int", 16, ("lora_rank",)),
        Setting("lora_alpha", "float", 32.0),
        Setting("lora_target_modules", "list", None),
        Setting("sapo_temperature_pos", "float", 1.0),
        Setting("sapo_temperature_neg", "float", 1.05),
    ],
    unsupported=_UNSUPPORTED,
)

SWIFT = _table(
    "swift",
    "ms-swift",
    {
        "loss_type": {
            "default": "grpo",
            "choices": ("cispo", "grpo", "bnpo", "dr_grpo", "dapo", "sapo", "real", "fipo"),
        },
        "per_device_train_batch_size": {"default": 1},
        "beta": {"default": 0.04},
        "temperature": {"default": 0.9},
        "top_k": {"default": -1},
        "scale_rewards": {"choices": ("group", "batch", "none", "gdpo")},
        "weight_decay": {"default": 0.1},
        "adam_beta2": {"default": 0.95},
        "lr_scheduler_type": {"default": "cosine"},
        "importance_sampling_level": {"choices": ("token", "sequence", "sequence_token")},
    },
    [
        Setting("rlhf_type", "str", "grpo"),
        Setting("rollout_importance_sampling_mode", "str", None, ("vllm_importance_sampling_mode",), _MODES),
        Setting("rollout_importance_sampling_threshold", "float", 2.0, ("vllm_importance_sampling_clip_max",)),
        Setting("dynamic_sample", "bool", False),
        Setting("max_resample_times", "int", 3),
        Setting("soft_max_length", "int"),
        Setting("soft_cache_length", "int"),
        Setting("advantage_estimator", "str", "grpo", choices=("grpo", "rloo", "reinforce_plus_plus")),
        Setting("kl_in_reward", "bool"),
        Setting("tau_pos", "float", 1.0),
        Setting("tau_neg", "float", 1.05),
        Setting("tuner_type", "str", "lora", ("train_type", "sft_type"), ("lora", "full")),
        Setting("lora_rank", "int", 8, ("lora_r",)),
        Setting("lora_alpha", "float", 32.0),
        Setting("target_modules", "list", None, ("lora_target_modules",)),
        Setting("system", "str"),
        Setting("stop_words", "list", []),
        Setting("split_dataset_ratio", "float", 0.0),
        Setting("async_generate", "bool", False),
    ],
    unsupported=_UNSUPPORTED
    | {
        "advantage_reweight": (None, f"reweights advantages, which {_NO_EQUAL}"),
        "sdar_loss_coef": (0.0, f"adds a distillation loss, which {_NO_EQUAL}"),
        "use_gym_env": (False, "environments of ms-swift are not here"),
        "reward_model": (None, "reward models are not loaded here; wrap one as package.module.function"),
        "cast_lm_head_to_fp32": (False, "is TRL's flag; in ms-swift's recipes set --model.head_dtype float32"),
    },
)

_MATH = {"type": "math", "column": "solution"}
_NO_LENGTHS = "depends on the tokenised length in a way that has no equal here"
_TRL_REWARDS = {
    "accuracy_reward": _MATH,
    "reasoning_accuracy_reward": "reads the answer after the thinking; not here",
    "think_format_reward": {"type": "format", "pattern": THINK_FORMAT, "mode": "search"},
    "get_soft_overlong_punishment": {"type": "length", "max_tokens": 1280, "cache_tokens": 256},
}
_SWIFT_REWARDS = {
    "accuracy": _MATH,
    "format": {"type": "format", "pattern": ANSWER_FORMAT, "mode": "search"},
    **dict.fromkeys(("cosine", "repetition"), f"ms-swift's own, {_NO_LENGTHS}"),
    **dict.fromkeys(("toolbench", "math", "react_format", "external_countdown"), "ms-swift's own"),
}


def translate_trl(arguments: Sequence[str]) -> Translation:
    return _translate(TRL, arguments, ("trl", "grpo"))


def translate_swift(arguments: Sequence[str]) -> Translation:
    return _translate(SWIFT, arguments, ("swift", "rlhf"))


def _translate(table: Table, arguments: Sequence[str], command: tuple[str, ...]) -> Translation:
    draft = Draft(table)
    theirs, ours = split_arguments(arguments)
    while theirs and theirs[0] in command:
        theirs.pop(0)
    given = table.accept(_with_file(read_flags(theirs, draft), draft), draft)
    _objective(draft, given)
    _batches(draft, given)
    _advantages(draft, given)
    _correction(draft, given)
    _optimizer(draft, given)
    _model(draft, given)
    _sampling(draft, given)
    _data(draft, given)
    draft.override(ours)
    return draft.finish(given)


def _with_file(flags: list, draft: Draft) -> list:
    """`--config recipe.yaml`: its keys are flags, below those of the command line."""
    named = [words[0] for name, words, _ in flags if name == "config" and words]
    if not named:
        return flags
    try:
        values = c.read_yaml(named[-1])
    except ConfigError as error:
        draft.problem(str(error))
        return flags
    spelled = draft.table.spelled
    on_top = {spelled.get(name, name) for name, _, _ in flags}
    under = [
        (str(k).replace("-", "_"), v if isinstance(v, list) else [v], f"{named[-1]}: {k}") for k, v in values.items()
    ]
    return [f for f in under if spelled.get(f[0], f[0]) not in on_top] + flags


def _objective(draft: Draft, given: Given) -> None:
    loss, origin = given["loss_type"], given.origin("loss_type")
    draft.set("algorithm.anchor", "proximal", f"{draft.table.title} recomputes log-probs")
    sequence = given["importance_sampling_level"] != "token"
    high_origin = given.origin("epsilon_high") if given["epsilon_high"] is not None else given.origin("epsilon")
    low, high = given["epsilon"], given["epsilon_high"]
    match loss:
        case "cispo":
            draft.set("algorithm.objective.type", "cispo", origin)
            draft.set("algorithm.objective.clip_low_threshold", 0.0, f"{draft.table.title} has no floor")
            draft.set("algorithm.reduction", "token", origin)
            if sequence:
                shown = f"--importance_sampling_level {given['importance_sampling_level']}"
                draft.problem(f"{shown} with --loss_type cispo: CISPO's weight is of a token; use token")
            if high is None:
                draft.problem(
                    f"--loss_type cispo without --epsilon_high: {draft.table.title} falls back to epsilon = {low:g} "
                    f"and caps every weight at {low:g}; pass --epsilon_high 5.0 (ScaleRL)"
                )
            else:
                draft.set("algorithm.objective.clip_high_threshold", high, high_origin)
            for name in ("epsilon", "delta"):
                if name in given:
                    draft.ignore(given.origin(name), f"{draft.table.title} does not read it with loss_type cispo")
                    given.values.pop(name)
        case "sapo":
            names = ("tau_pos", "tau_neg") if draft.table is SWIFT else ("sapo_temperature_pos", "sapo_temperature_neg")
            draft.set("algorithm.objective.type", "sapo", origin)
            draft.take("algorithm.objective.positive_temperature", given, names[0])
            draft.take("algorithm.objective.negative_temperature", given, names[1])
            draft.set("algorithm.reduction", "sequence", origin)
        case "grpo" | "bnpo" | "dapo" | "dr_grpo":
            draft.set("algorithm.objective.type", "gspo" if sequence else "ppo_clip", origin)
            draft.set("algorithm.objective.clip_low_threshold", max(0.0, 1 - low), given.origin("epsilon"))
            draft.set("algorithm.objective.clip_high_threshold", 1 + (low if high is None else high), high_origin)
            if given["delta"] is not None and sequence:
                draft.problem(
                    f"{given.origin('delta')}: two-sided clipping of a sequence's ratio is not here; remove it"
                )
            elif given["delta"] is not None:
                draft.take("algorithm.objective.dual_clip", given, "delta")
            draft.set("algorithm.reduction", _CLIPPED[loss], origin)
            if given["importance_sampling_level"] == "sequence_token":
                draft.problem(
                    "--importance_sampling_level sequence_token: GSPO-token is not here; use sequence or token"
                )
        case _:
            draft.problem(f"--loss_type {loss}: has no equal here; use cispo, dapo, grpo, bnpo, dr_grpo or sapo")
    if given["beta"]:
        draft.take("algorithm.kl.coef", given, "beta")
        draft.set("algorithm.kl.form", "k3", f"{draft.table.title}'s KL")
        if draft.table is TRL and given["use_bias_correction_kl"]:
            draft.take("algorithm.kl.ratio_weighted", given, "use_bias_correction_kl")
    if given["off_policy_mask_threshold"] is not None:
        draft.take("algorithm.opsm_delta", given, "off_policy_mask_threshold")
    if draft.table is TRL and given["entropy_coef"]:
        draft.take("algorithm.entropy_bonus", given, "entropy_coef")


def _batches(draft: Draft, given: Given) -> None:
    """A generation batch of whole groups, cut into optimizer updates."""
    device, accumulation, generations = (
        given[n] for n in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    )
    iterations, processes = given["num_iterations"], given["num_processes"]
    per_generation, batch = given["steps_per_generation"], given["generation_batch_size"]
    draft.take("rollout.group_size", given, "num_generations")
    names = [
        "per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "steps_per_generation",
        "generation_batch_size", "num_processes",
    ]  # fmt: skip
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "num_iterations",
                 "num_processes", "steps_per_generation", "generation_batch_size"):  # fmt: skip
        if given[name] is not None and given[name] < 1:
            draft.problem(f"{given.origin(name)} = {given[name]}: must be at least 1")
            return
    if per_generation is not None and batch is not None:
        draft.problem(
            f"{given.origin('generation_batch_size')} and {given.origin('steps_per_generation')} say the same thing "
            "twice; keep one"
        )
        return
    draft.take("algorithm.epochs_per_rollout", given, "num_iterations")
    if device * accumulation * processes % generations and not any(n in given for n in (*names[:2], *names[3:])):
        draft.warn(
            f"{draft.table.title}'s default batch of {device} holds no whole group of {generations} and it would "
            "refuse to run; the number of prompts is ours"
        )
        draft.set("algorithm.updates_per_rollout", 1, given.origin("gradient_accumulation_steps"))
        return
    if batch is not None:
        per_generation = batch / (device * processes)
    elif per_generation is None:
        per_generation = accumulation
    if accumulation > per_generation and accumulation % per_generation == 0 and iterations == 1:
        per_generation = accumulation  # several generations of one policy make one update: the same as one larger one
    place_updates(
        draft,
        given,
        groups=device * processes * per_generation / generations,
        updates=per_generation / accumulation,
        names=names,
    )
    if per_generation > accumulation and given["loss_type"] in ("cispo", "dapo"):
        draft.warn(
            f"{draft.table.title} divides each update's loss by the tokens of the whole generation (TRL #5619), so its "
            f"gradients are {per_generation / accumulation:g} times smaller than ours; under Adam only max_grad_norm "
            "sees it"
        )


def _advantages(draft: Draft, given: Given) -> None:
    scale, origin = given["scale_rewards"], given.origin("scale_rewards")
    draft.set("algorithm.advantage_eps", 1e-4, f"{draft.table.title}'s formula")
    if draft.table is TRL:
        kinds = {
            "group": "group",
            "true": "group",
            "batch": "batch_reward_std",
            "none": "group_mean",
            "false": "group_mean",
        }
        draft.set("algorithm.advantage", kinds[scale.lower()], origin)
        return
    estimator = given["advantage_estimator"]
    scale = scale or {"grpo": "group", "rloo": "none", "reinforce_plus_plus": "batch"}[estimator]
    kinds = {
        ("grpo", "group"): "group",
        ("grpo", "batch"): "batch_reward_std",
        ("grpo", "none"): "group_mean",
        ("rloo", "none"): "leave_one_out",
        ("reinforce_plus_plus", "batch"): "batch_std",
        ("reinforce_plus_plus", "group"): "group",
        ("reinforce_plus_plus", "none"): "group_mean",
    }
    origin = given.origin("advantage_estimator", "scale_rewards")
    if (estimator, scale) not in kinds:
        draft.problem(f"--advantage_estimator {estimator} with --scale_rewards {scale}: has no equal here; use none")
    else:
        draft.set("algorithm.advantage", kinds[estimator, scale], origin)
    in_reward = given["kl_in_reward"] if given["kl_in_reward"] is not None else estimator != "grpo"
    if in_reward and given["beta"]:
        draft.set("algorithm.kl.place", "reward", given.origin("kl_in_reward", "advantage_estimator"))
        draft.set("algorithm.kl.form", "k1", "ms-swift's KL in the reward")
        draft.warn(
            "ms-swift subtracts a completion's summed KL from its reward before the baseline; here each token's KL is "
            "subtracted from its own advantage"
        )


def _correction(draft: Draft, given: Given) -> None:
    if draft.table is TRL:
        if not (given["use_vllm"] and given["vllm_importance_sampling_correction"]):
            return
        mode, low = given["vllm_importance_sampling_mode"], given["vllm_importance_sampling_clip_min"] or 0.0
        high = given["vllm_importance_sampling_clip_max"]
        high = float("inf") if high is None else high
        names = [f"vllm_importance_sampling_{n}" for n in ("mode", "clip_min", "clip_max")]
        kinds = {
            "token_truncate": {"type": "tis"},
            "token_mask": {"type": "icepop"},
            "sequence_truncate": {"type": "sequence_truncate", "ratio": "product"},
            "sequence_mask": {"type": "sequence_mask", "ratio": "product", "weight": "sequence"},
        }
    else:
        mode, high, low = given["rollout_importance_sampling_mode"], given["rollout_importance_sampling_threshold"], 0.0
        if mode is None:
            return
        if not given["use_vllm"]:
            draft.warn(
                "rollout_importance_sampling_mode without use_vllm: ms-swift has no sampler log-probs to correct with "
                "and applies none; neither do we"
            )
            return
        names = ["rollout_importance_sampling_mode", "rollout_importance_sampling_threshold"]
        kinds = {
            "token_truncate": {"type": "tis"},
            "token_mask": {"type": "icepop"},
            "sequence_truncate": {"type": "sequence_truncate", "ratio": "geometric"},
            "sequence_mask": {"type": "sequence_mask", "ratio": "geometric", "weight": "token"},
        }
        if given["beta"]:
            draft.warn("ms-swift's correction weights the KL penalty too; here, as in TRL, it does not")
    draft.correction(given.origin("use_vllm", *names), **kinds[mode], low=low, high=high)


def _optimizer(draft: Draft, given: Given) -> None:
    rate = given["learning_rate"]
    if rate is None:
        lora = given["tuner_type"] == "lora"
        draft.set("optimizer.learning_rate", 1e-4 if lora else 1e-5, f"{draft.table.title}'s default")
    else:
        draft.take("optimizer.learning_rate", given, "learning_rate")
    for key, name in (("weight_decay", "weight_decay"), ("beta1", "adam_beta1"), ("beta2", "adam_beta2"),
                      ("eps", "adam_epsilon"), ("grad_clip_norm", "max_grad_norm")):  # fmt: skip
        draft.take(f"optimizer.{key}", given, name)
    _ = given["optim"]  # either spelling is AdamW
    schedule = given["lr_scheduler_type"]
    if schedule == "cosine_with_min_lr":
        draft.problem("--lr_scheduler_type cosine_with_min_lr: use cosine and --optimizer.min_learning_rate_share")
        return
    draft.take("optimizer.schedule", given, "lr_scheduler_type", schedule.removesuffix("_with_warmup"))
    updates = int(draft.raw["algorithm"].get("updates_per_rollout", 1)) * given["num_iterations"]
    if given["max_steps"] > 0:
        draft.take("steps", given, "max_steps", whole_steps(given["max_steps"], updates))
    warmup, ratio = given["warmup_steps"], given["warmup_ratio"]
    if warmup and ratio:
        draft.problem(
            f"{given.origin('warmup_steps')} and {given.origin('warmup_ratio')} contradict each other; keep one"
        )
        return
    if not math.isfinite(warmup or 0) or not math.isfinite(ratio or 0):
        draft.problem(f"{given.origin('warmup_steps', 'warmup_ratio')}: must be finite")
        return
    if 0 < (warmup or 0) < 1:
        ratio, warmup = warmup, 0
    if warmup:
        draft.take("optimizer.warmup_updates", given, "warmup_steps", int(warmup))
    elif ratio:
        steps = draft.raw.get("steps", c.Config().steps)
        draft.set("optimizer.warmup_updates", whole_steps(ratio * steps * updates, 1), given.origin("warmup_ratio"))


def _model(draft: Draft, given: Given) -> None:
    for key, name in (("path", "model"), ("attn_implementation", "attn_implementation"),
                      ("gradient_checkpointing", "gradient_checkpointing")):  # fmt: skip
        if given[name] is not None:
            draft.take(f"model.{key}", given, name)
    if given["dtype"] == "float16":
        draft.problem(f"{given.origin('dtype')} = float16: not here; use bfloat16 or float32")
    elif given["dtype"] is not None:
        draft.take("model.dtype", given, "dtype")
    if given["use_cpu"]:
        draft.take("model.device", given, "use_cpu", "cpu")
    if draft.table is TRL and given["cast_lm_head_to_fp32"]:
        draft.take("model.head_dtype", given, "cast_lm_head_to_fp32", "float32")
    lora = given["use_peft"] if draft.table is TRL else given["tuner_type"] == "lora"
    if draft.table is SWIFT and "use_peft" in given and "tuner_type" in given and given["use_peft"] != lora:
        draft.problem(f"{given.origin('use_peft')} and {given.origin('tuner_type')} contradict each other; keep one")
    if lora:
        rank, modules = ("lora_r", "lora_target_modules") if draft.table is TRL else ("lora_rank", "target_modules")
        draft.take("model.lora.rank", given, rank)
        draft.take("model.lora.alpha", given, "lora_alpha")
        chosen = given[modules]
        if chosen and chosen != ["all-linear"]:
            draft.take("model.lora.target_modules", given, modules)


def _sampling(draft: Draft, given: Given) -> None:
    draft.take("rollout.max_tokens", given, "max_completion_length")
    draft.take("rollout.temperature", given, "temperature")
    draft.take("rollout.top_p", given, "top_p")
    draft.take("rollout.top_k", given, "top_k", max(0, given["top_k"] or 0))
    if given["min_p"] is not None:
        draft.take("rollout.min_p", given, "min_p")
    if given["mask_truncated_completions"]:
        draft.take("rollout.truncated", given, "mask_truncated_completions", "mask")
    if draft.table is SWIFT:
        if given["rlhf_type"] != "grpo":
            draft.problem(f"--rlhf_type {given['rlhf_type']}: only grpo is here")
        if given["stop_words"]:
            draft.take("rollout.stop", given, "stop_words")
        if given["dynamic_sample"]:
            draft.take("rollout.zero_variance", given, "dynamic_sample", "resample")
            draft.take("rollout.max_resample_rounds", given, "max_resample_times")
        if given["async_generate"]:
            draft.take("async.max_staleness", given, "async_generate", 1)
    draft.take("seed", given, "seed")
    if given["output_dir"] is not None:
        draft.take("run_dir", given, "output_dir")
    if given["save_total_limit"] is not None:
        draft.take("checkpoint.keep", given, "save_total_limit")
    trackers = [name for name in given["report_to"] if name in ("tensorboard", "wandb", "trackio")]
    for name in set(given["report_to"]) - {"none", "all", *trackers}:
        draft.ignore(f"{given.origin('report_to')} {name}", "no such tracker here")
    if trackers:
        draft.take("track", given, "report_to", trackers)


def _data(draft: Draft, given: Given) -> None:
    names = given["dataset"]
    if not names:
        without_dataset(draft)
        if given["reward_funcs"]:
            draft.ignore(given.origin("reward_funcs"), "no dataset is given, and the embedded task brings its reward")
        return
    if len(names) > 1:
        draft.problem(f"{given.origin('dataset')}: {len(names)} datasets; join them into one file or hub dataset")
    name = names[0]
    if draft.table is SWIFT:
        name = name.removeprefix("hf::").removeprefix("ms::").removeprefix("HF::").removeprefix("MS::")
        name, sampled, count = name.partition("#")
        if sampled:
            draft.ignore(f"#{count} of the dataset", "a subset is not drawn; cut the file")
    place_dataset(draft, name, given.origin("dataset"))
    weights = given["reward_weights"]
    try:
        weights = None if weights is None else [float(w) for w in weights]
    except ValueError:
        draft.problem(f"{given.origin('reward_weights')} = {' '.join(weights)}: not numbers")
        weights = None
    rewards = _SWIFT_REWARDS if draft.table is SWIFT else _TRL_REWARDS
    if draft.table is SWIFT:
        cap = given["soft_max_length"] or given["max_completion_length"]
        soft = {"type": "length", "max_tokens": cap, "cache_tokens": given["soft_cache_length"]}
        rewards = rewards | {"soft_overlong": soft}
        draft.set("task.chat_template", True, "ms-swift applies the chat template")
        if given["system"] is not None:
            text = given["system"]
            if os.path.isfile(text):
                draft.problem(f"{given.origin('system')} = {text}: a file; pass its text")
            draft.take("task.system", given, "system")
        if "soft_overlong" in (given["reward_funcs"] or ()) and given["soft_cache_length"] is None:
            draft.problem("--reward_funcs soft_overlong needs --soft_cache_length")
            rewards = rewards | {"soft_overlong": "needs --soft_cache_length"}
    if given["reward_funcs"]:
        place_rewards(draft, given["reward_funcs"], weights, given.origin("reward_funcs"), rewards)
    else:
        draft.problem(
            "a dataset without --reward_funcs: say how completions are rewarded (accuracy, format, pkg.mod.fn)"
        )
    share = given["split_dataset_ratio"] if draft.table is SWIFT else 0.0
    if share:
        draft.take("task.eval_fraction", given, "split_dataset_ratio")
    elif given["eval_strategy"] != "no" and draft.raw["task"]["type"] == "hub":
        draft.set("task.eval_split", "test", given.origin("eval_strategy"))
    else:
        without_evaluation(draft)
