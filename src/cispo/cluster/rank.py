"""One rank of the learner, whoever started it: join the process group, load the model, shard it.

Left out on purpose: how verbs reach the rank (`torchrun.py`, `learners.py`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from cispo import model as models
from cispo.config import Config
from cispo.sharded import ShardedLearner, join


def build_rank(config: Config, path: str | Path, **rendezvous: Any) -> ShardedLearner:
    """This process's rank of the sharded learner. rendezvous: as of `init_process_group`; none: torchrun's."""
    # Adapters start at random: with one seed, every rank makes the same ones.
    torch.manual_seed(config.seed)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = models.device_of(config.model)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    mesh = join(device=device, timeout_s=config.cluster.learner_timeout_s, **rendezvous)
    # FSDP moves layer by layer to the device, so that no device ever holds the whole model.
    on_cpu = config.model.model_copy(update={"device": "cpu"})
    reference = None
    if config.algorithm.kl is not None and config.model.lora is None:
        reference = models.load(on_cpu, path, trainable=False).model
    return ShardedLearner(
        models.load(on_cpu, path),
        config.learner,
        mesh=mesh,
        head_dtype=torch.float32 if config.model.head_dtype == "float32" else None,
        reference=reference,
        head_gather_bytes=int(config.cluster.head_gather_gib * 2**30),
    )
