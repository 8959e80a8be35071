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


@dataclass(frozen=True)
class Demand:
    """What a run needs: bundles to reserve, and for each actor the bundle it sits in and what it takes of it."""

    bundles: list[Bundle]
    ranks: list[tuple[int, Bundle]]
    samplers: list[tuple[int, Bundle]]
    rewards: list[tuple[int, Bundle]]

    @property
    def total(self) -> Bundle:
        names = {name for bundle in self.bundles for name in bundle}
        return {name: sum(bundle.get(name, 0.0) for bundle in self.bundles) for name in sorted(names)}


def demand(config: Config, gpus: float) -> Demand:
    """gpus: how many the cluster has."""
    cluster = config.cluster
    tensor_parallel = config.vllm.tensor_parallel if config.asynchrony.sampler == "vllm" else 1
    device = config.model.device
    wanted = cluster.learner_ranks + (0 if cluster.colocate else cluster.samplers * tensor_parallel)
    use_gpus = device.startswith("cuda") or (device == "auto" and gpus >= wanted)
    learner_gpus = cluster.learner_gpus if cluster.learner_gpus is not None else float(use_gpus)
    sampler_gpus = cluster.sampler_gpus if cluster.sampler_gpus is not None else float(use_gpus * tensor_parallel)
    rank, reward = _bundle(cluster.learner_cpus, learner_gpus), _bundle(1.0, 0.0)
    if cluster.colocate:
        share = cluster.learner_ranks // cluster.samplers
        # In turns: whichever of the two takes more. Ray would not let an actor have parts of several GPUs, so the
        # ranks take them, and a sampler is told which they are.
        together = _bundle(max(share * cluster.learner_cpus, cluster.sampler_cpus), share * learner_gpus)
        bundles = [together] * cluster.samplers
        ranks = [(i // share, rank) for i in range(cluster.learner_ranks)]
        samplers = [(i, {}) for i in range(cluster.samplers)]
    else:
        sampler = _bundle(cluster.sampler_cpus, sampler_gpus)
        bundles = [rank] * cluster.learner_ranks + [sampler] * cluster.samplers
        ranks = [(i, rank) for i in range(cluster.learner_ranks)]
        samplers = [(cluster.learner_ranks + i, sampler) for i in range(cluster.samplers)]
    rewards = [(len(bundles) + i, reward) for i in range(cluster.reward_workers)]
    return Demand([*bundles, *[reward] * cluster.reward_workers], ranks, samplers, rewards)


def _bundle(cpus: float, gpus: float) -> Bundle:
    # A placement group refuses an empty bundle.
    return {"CPU": max(cpus, 0.001)} | ({"GPU": gpus} if gpus else {})


@dataclass
class Place:
    """The resources of a run. `options(seat)` puts an actor into its bundle."""

    group: PlacementGroup | None
    demand: Demand
    ours: bool  # this run started Ray, and ends it

    def options(self, seat: tuple[int, Bundle]) -> dict[str, Any]:
        index, takes = seat
        return {
            "num_cpus": takes.get("CPU", 0),
            "num_gpus": takes.get("GPU", 0),
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
    wanted = demand(config, have.get("GPU", 0.0))
    total = wanted.total
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
    group = placement_group(wanted.bundles, strategy=cluster.placement)
    if not group.wait(cluster.start_timeout_s):
        free = ray.available_resources()
        remove_placement_group(group)
        raise RunError(
            f"cluster: {_words(total)} could not be reserved within {cluster.start_timeout_s:g} s "
            f"(cluster.start_timeout_s) with cluster.placement: {cluster.placement}; free are "
            f"{_words({n: free.get(n, 0.0) for n in total})}, the rest is other jobs'"
        )
    return Place(group, wanted, ours)


def with_transfer(config: Config, wanted: Demand) -> Config:
    """The config with its `weight_transfer` chosen. Raises ConfigError for a broadcast that has no common network."""
    cluster = config.cluster
    learner, sampler = (seat[1].get("GPU", 0) for seat in (wanted.ranks[0], wanted.samplers[0]))
    apart = not cluster.colocate and config.vllm.url is None
    chosen = cluster.weight_transfer or ("broadcast" if min(learner, sampler) >= 1 and apart else "object_store")
    if chosen == "broadcast" and (learner or sampler) and min(learner, sampler) < 1:
        raise ConfigError(
            f"cluster.weight_transfer: broadcast, but a learner rank has {learner:g} GPUs and a sampler {sampler:g}; "
            "NCCL wants a whole one at either end; use weight_transfer: object_store"
        )
    return config.model_copy(update={"cluster": cluster.model_copy(update={"weight_transfer": chosen})})


def compose_ray(config: Config, path: str | Path, task: Task) -> Parts:
    from cispo.cluster.learners import RayLearnerGroup
    from cispo.cluster.rewards import ScoredElsewhere
    from cispo.cluster.samplers import RaySamplerPool
    from cispo.cluster.turns import LearnerInTurn
    from cispo.sampling.probe import learner_logprobs

    cluster = config.cluster
    where = place(config)
    ranks, seats, workers = (
        [where.options(seat) for seat in kind]
        for kind in (where.demand.ranks, where.demand.samplers, where.demand.rewards)
    )
    try:
        config = with_transfer(config, where.demand)
        group = RayLearnerGroup(config, path, ranks)
        devices = []
        if cluster.colocate:
            share, given = cluster.learner_ranks // cluster.samplers, group.devices()
            devices = [sum(given[i : i + share], []) for i in range(0, len(given), share)]
        learner = LearnerInTurn(group) if cluster.colocate else group
        sampler = RaySamplerPool(config, path, seats, learner_logprobs(learner), devices=devices)
        if cluster.colocate:
            learner.samplers = sampler
            sampler.before_waking = group.rest
        scored = ScoredElsewhere(task, workers, timeout_s=cluster.reward_timeout_s) if workers else task
        group.wait_until_ready()
        sampler.wait_until_ready()
        if config.vllm.probe_updates:
            sampler.probe()  # before the first rollout: both have read the same folder
    except BaseException:
        where.close()
        raise

    def close() -> None:
        group.close()
        sampler.close()
        if scored is not task:
            scored.close()
        where.close()

    return Parts(learner, sampler, scored, close)


def _init(config: Config, ours: bool) -> None:
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "WARNING"}
    if ours:
        options["num_cpus"] = max(os.cpu_count() or 1, math.ceil(demand(config, 0.0).total["CPU"]))
    try:
        ray.init(address="local" if ours else config.cluster.address, **({} if not ours else options))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cluster.address: {config.cluster.address}: no Ray cluster answers there ({error}); start one with "
            "`ray start --head`, or leave the address out"
        ) from error


def _words(resources: Bundle) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"
