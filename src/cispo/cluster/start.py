"""Joining or starting Ray, and placing what a run needs on it before anything is loaded.

Left out on purpose: what the actors do (`learners.py`, `samplers.py`, `rewards.py`).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cispo.cluster import Parts
from cispo.config import Config
from cispo.types import ConfigError, RunError, Task

Bundle = dict[str, float]


def bundles(config: Config, gpus: float) -> tuple[list[Bundle], list[Bundle], list[Bundle]]:
    """Resources of each learner rank, sampler and reward worker. gpus: how many the cluster has."""
    cluster = config.cluster
    tensor_parallel = config.vllm.tensor_parallel if config.asynchrony.sampler == "vllm" else 1
    device = config.model.device
    wanted = cluster.learner_ranks + cluster.samplers * tensor_parallel
    use_gpus = device.startswith("cuda") or (device == "auto" and gpus >= wanted)
    learner_gpus = cluster.learner_gpus if cluster.learner_gpus is not None else float(use_gpus)
    sampler_gpus = cluster.sampler_gpus if cluster.sampler_gpus is not None else float(use_gpus * tensor_parallel)

    def bundle(cpus: float, gpus: float) -> Bundle:
        # A placement group refuses an empty bundle.
        return {"CPU": max(cpus, 0.001)} | ({"GPU": gpus} if gpus else {})

    return (
        [bundle(cluster.learner_cpus, learner_gpus)] * cluster.learner_ranks,
        [bundle(cluster.sampler_cpus, sampler_gpus)] * cluster.samplers,
        [bundle(1.0, 0.0)] * cluster.reward_workers,
    )


@dataclass
class Place:
    """The resources of a run. `options(i)` puts an actor into the i-th bundle."""

    group: PlacementGroup
    bundles: list[Bundle]
    ours: bool  # this run started Ray, and ends it

    def options(self, index: int) -> dict[str, Any]:
        bundle = self.bundles[index]
        return {
            "num_cpus": bundle["CPU"],
            "num_gpus": bundle.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index),
        }

    def close(self) -> None:
        if self.ours:
            ray.shutdown()
        elif ray.is_initialized():
            remove_placement_group(self.group)


def place(config: Config) -> Place:
    """Join or start Ray and reserve everything at once. Raises ConfigError where the resources are not there."""
    cluster = config.cluster
    ours = cluster.address is None and not ray.is_initialized()
    if not ray.is_initialized():
        _init(config, ours)
    have = ray.cluster_resources()
    wanted = [bundle for kind in bundles(config, have.get("GPU", 0.0)) for bundle in kind]
    total = _total(wanted)
    missing = {name: amount - have.get(name, 0.0) for name, amount in total.items() if have.get(name, 0.0) < amount}
    if missing:
        place_ = Place(None, wanted, ours)
        if ours:
            place_.close()
        raise ConfigError(
            f"cluster: {cluster.learner_ranks} learner ranks, {cluster.samplers} samplers and {cluster.reward_workers} "
            f"reward workers need {_words(total)}; the cluster has {_words({n: have.get(n, 0.0) for n in total})}, so "
            f"{_words(missing)} is missing. Use fewer ranks or samplers, or lower cluster.*_cpus and cluster.*_gpus"
        )
    group = placement_group(wanted, strategy=cluster.placement)
    if not group.wait(cluster.start_timeout_s):
        free = ray.available_resources()
        remove_placement_group(group)
        raise RunError(
            f"cluster: {_words(total)} could not be reserved within {cluster.start_timeout_s:g} s "
            f"(cluster.start_timeout_s) with cluster.placement: {cluster.placement}; free are "
            f"{_words({n: free.get(n, 0.0) for n in total})}, the rest is other jobs'"
        )
    return Place(group, wanted, ours)


def with_transfer(config: Config, learner: Bundle, sampler: Bundle) -> Config:
    """The config with its `weight_transfer` chosen. Raises ConfigError for a broadcast that has no common network."""
    gpus = [bool(bundle.get("GPU")) for bundle in (learner, sampler)]
    chosen = config.cluster.weight_transfer or ("broadcast" if all(gpus) else "object_store")
    if chosen == "broadcast" and gpus[0] != gpus[1]:
        have, lack = ("learner ranks", "samplers") if gpus[0] else ("samplers", "learner ranks")
        raise ConfigError(
            f"cluster.weight_transfer: broadcast, but the {have} have GPUs and the {lack} have none, so NCCL does not "
            "reach them; use weight_transfer: object_store"
        )
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"weight_transfer": chosen})})


def compose_ray(config: Config, path: str | Path, task: Task) -> Parts:
    from cispo.cluster.learners import RayLearnerGroup
    from cispo.cluster.rewards import ScoredElsewhere
    from cispo.cluster.samplers import RaySamplerPool
    from cispo.sampling.probe import learner_logprobs

    cluster = config.cluster
    where = place(config)
    try:
        ranks = [where.options(i) for i in range(cluster.learner_ranks)]
        first = cluster.learner_ranks
        config = with_transfer(config, where.bundles[0], where.bundles[first])
        learner = RayLearnerGroup(config, path, ranks)
        seats = [where.options(first + i) for i in range(cluster.samplers)]
        sampler = RaySamplerPool(config, path, seats, learner_logprobs(learner))
        first += cluster.samplers
        workers = [where.options(first + i) for i in range(cluster.reward_workers)]
        scored = ScoredElsewhere(task, workers, timeout_s=cluster.reward_timeout_s) if workers else task
        learner.wait_until_ready()
        sampler.wait_until_ready()
        if config.vllm.probe_updates:
            sampler.probe()  # before the first rollout: both have read the same folder
    except BaseException:
        where.close()
        raise

    def close() -> None:
        learner.close()
        sampler.close()
        if scored is not task:
            scored.close()
        where.close()

    return Parts(learner, sampler, scored, close)


def _init(config: Config, ours: bool) -> None:
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "WARNING"}
    if ours:
        needed = _total([b for kind in bundles(config, 0.0) for b in kind])["CPU"]
        options["num_cpus"] = max(os.cpu_count() or 1, math.ceil(needed))
    try:
        ray.init(address="local" if ours else config.cluster.address, **({} if not ours else options))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cluster.address: {config.cluster.address}: no Ray cluster answers there ({error}); start one with "
            "`ray start --head`, or leave the address out"
        ) from error


def _total(wanted: list[Bundle]) -> Bundle:
    names = {name for bundle in wanted for name in bundle}
    return {name: sum(bundle.get(name, 0.0) for bundle in wanted) for name in sorted(names)}


def _words(resources: Bundle) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"
