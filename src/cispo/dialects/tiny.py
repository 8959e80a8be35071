"""`--tiny`: the same algorithm at a size that runs on a laptop in under a minute.

Left out on purpose: changing anything of `algorithm`, except that the number of updates must divide fewer prompts.
"""

from __future__ import annotations

from cispo import config as c

PROMPTS = 32
GROUP = 16
STEPS = 6


def tiny(config: c.Config) -> c.Config:
    """`config` on the embedded model and task.

    Changes: the model (the embedded one in float32; LoRA and head_dtype stay), the task (think), at most 32 prompts of
    16 completions of 10 tokens a step, at most 6 steps, a learning rate of at least 1e-4 (a 0.3-million-parameter model
    needs more than a large one), no warm-up longer than a step's updates, and an evaluation on 128 prompts before and
    after. The algorithm, the anchor, the staleness and, where 32 prompts divide, the updates of a rollout stay. So does
    a cluster's topology: Ray on this machine, at most 2 learner ranks (gloo), one local sampler, one reward worker.
    """
    algorithm, rollout = config.algorithm, config.rollout
    prompts = min(rollout.groups_per_step, PROMPTS)
    updates = max(n for n in range(1, min(algorithm.updates_per_rollout, prompts) + 1) if prompts % n == 0)
    steps = min(config.steps, STEPS)
    raw = config.model_dump(mode="python", by_alias=True)
    raw["model"] |= {"path": None, "dtype": "float32", "attn_implementation": None, "gradient_checkpointing": False}
    raw["task"] = {"type": "think"}
    raw["rollout"] |= {
        "groups_per_step": prompts,
        "group_size": min(rollout.group_size, GROUP),
        "max_tokens": min(rollout.max_tokens, 10),
        "stop": (),
        "stop_token_ids": None,
    }
    raw["algorithm"]["updates_per_rollout"] = updates
    raw["optimizer"]["learning_rate"] = max(config.optimizer.learning_rate, 1e-4)
    raw["optimizer"]["warmup_updates"] = min(config.optimizer.warmup_updates, updates)
    if config.asynchrony.sampler == "vllm":
        raw["async"]["sampler"] = "process"
    if config.cluster.kind == "ray":
        raw["cluster"] |= {
            "address": None,
            "learner_ranks": min(config.cluster.learner_ranks, 2),
            "samplers": 1,
            "reward_workers": min(config.cluster.reward_workers, 1),
            **{f"{who}_cpus": 0.5 for who in ("learner", "sampler")},
            **{f"{who}_gpus": 0.0 for who in ("learner", "sampler")},
        }
    raw |= {"steps": steps, "eval": {"every": steps, "max_prompts": 128}, "checkpoint": {"every": 0, "keep": 1}}
    return c.validate(raw, source="--tiny")
