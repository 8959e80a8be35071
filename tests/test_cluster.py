"""Ray for real, on one machine: two learner ranks (gloo) and samplers learn `think`, and survive what is killed.

python -m pytest tests/test_cluster.py       (needs the extra `ray`)
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("ray", reason="the cluster needs Ray: pip install 'cispo[ray]'")

import psutil
import ray
import torch
from ray import cloudpickle

from cispo import cli, cluster, objectives
from cispo import config as configs
from cispo.cluster.start import demand, with_transfer
from cispo.cluster.weights import LiveWeights, pack, unpack
from cispo.metrics import read_jsonl
from cispo.tasks.think import ThinkTask
from cispo.types import (
    AdamParams,
    Batch,
    CispoError,
    ConfigError,
    LearnerLost,
    NonFiniteError,
    RunError,
    SampleRequest,
    SamplingParams,
)

COMMON = [
    "--cluster", "ray", "--cluster.learner_ranks", "2", "--cluster.learner_cpus", "0.5",
    "--cluster.sampler_cpus", "0.5", "--threads", "1",
]  # fmt: skip
WORDS = [*COMMON, "--async.max_staleness", "1", "--cluster.learner_gpus", "0", "--cluster.sampler_gpus", "0"]


def load(*words):
    return configs.load(None, [*WORDS, *words])


@pytest.fixture(scope="module", autouse=True)
def machine():
    """One Ray for all tests; each run joins it, as a run joins a cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "CUDA_VISIBLE_DEVICES", "0,1"
        )  # they are only Ray's word, for the one test that places actors there
        ray.init(num_cpus=6, num_gpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def parts(base_folder):
    """Two learner ranks, two samplers, for the tests up to the first that ends one of the two for good."""
    built = cluster.compose(load("--cluster.samplers", "2", "--cluster.address", "auto"), base_folder, ThinkTask())
    yield built
    built.close()


@pytest.fixture
def parts_of_one_sampler(base_folder):
    built = cluster.compose(load("--cluster.learner_ranks", "1", "--cluster.address", "auto"), base_folder, ThinkTask())
    yield built
    built.close()


def test_weights_travel_as_they_are():
    weights = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2, dtype=torch.int64),
    }
    found = unpack(ray.get(ray.put(pack(weights))))
    assert list(found) == list(weights)
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def requests(count, *, first=0, samples=4):
    prompts = ThinkTask().prompts("train")
    return [
        SampleRequest(first + i, prompts[i].tokens, samples, SamplingParams(max_tokens=10, seed=i))
        for i in range(count)
    ]


def actors(title):
    """This Ray's processes with a title, oldest first. Another Ray on the machine has nothing to do with it."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if (process.cmdline() or [""])[0].startswith(title):
                found.append(process)
    return sorted(found, key=psutil.Process.create_time)


def all_of(sampler):
    """Every result, by request; a result that came twice is a failure."""
    found = {}
    while sampler.pending:
        for result in sampler.poll():
            assert result.request_id not in found
            found[result.request_id] = result.completions
    return found


def drawn(completions):
    """What was drawn, without the last bits of log-probs, which depend on the neighbours in a batch."""
    return [(c.tokens, c.versions, c.stop_reason) for c in completions]


def test_samplers_that_die_or_fall_silent_lose_nothing(parts):
    sampler = parts.sampler
    for request in requests(24):
        sampler.submit(request)
    expected = all_of(sampler)
    assert set(expected) == set(range(24))
    for request in requests(24):
        sampler.submit(request)
    assert {seat.load for seat in sampler._seats} == {48}  # shared out by load
    os.kill(sampler.processes()[0], signal.SIGKILL)
    found = all_of(sampler)
    assert sampler.restarts == 1
    assert {n: drawn(c) for n, c in found.items()} == {n: drawn(c) for n, c in expected.items()}

    frozen = sampler.processes()[1]
    os.kill(frozen, signal.SIGSTOP)
    try:
        sampler._config = load("--cluster.sampler_timeout_s", "3")
        for request in requests(24):
            sampler.submit(request)
        found = all_of(sampler)
    finally:
        with contextlib.suppress(ProcessLookupError):  # the pool has done it
            os.kill(frozen, signal.SIGKILL)
        sampler._config = load()
    assert sampler.restarts == 2
    assert {n: drawn(c) for n, c in found.items()} == {n: drawn(c) for n, c in expected.items()}


def test_every_sampler_is_probed_though_one_dies_meanwhile(parts):
    sampler, before = parts.sampler, parts.sampler.restarts
    for request in requests(24):
        sampler.submit(request)
    os.kill(sampler.processes()[1], signal.SIGKILL)
    sampler.update_weights(parts.learner.weights(), 6)
    assert sampler.restarts == before + 1
    assert sampler.parity.version == 6 and 0 < sampler.parity.max <= 1e-4
    assert sampler.parity.tokens == 2 * 4 * 16
    assert set(all_of(sampler)) == set(range(24))  # what came during the probe was kept


def test_a_sampler_with_other_weights_than_the_learners_ends_the_run(parts):
    sampler = parts.sampler
    other = {name: tensor * 1.5 for name, tensor in parts.learner.weights().items()}
    sampler._tell(sampler._seats[1], "stored", ((ray.put(pack(other)),), sampler.version))
    with pytest.raises(RunError, match="sampler 1: at version 6 its log-probs differ from the learner's by up to"):
        sampler.probe()
    sampler.update_weights(parts.learner.weights(), 6)
    assert sampler.probe().max <= 1e-4


def test_a_new_sampler_has_the_newest_weights_and_their_version(parts):
    weights = dict(parts.learner.weights())
    head = weights["lm_head.weight"]
    only = torch.zeros_like(head)
    with pytest.raises(RunError, match="sampler 0: at version 7"):  # for these are not the learner's
        parts.sampler.update_weights({**weights, "lm_head.weight": only}, 7)  # all tokens equally likely
    os.kill(parts.sampler.processes()[0], signal.SIGKILL)
    for request in requests(8):
        parts.sampler.submit(request)
    for completions in all_of(parts.sampler).values():
        for c in completions:
            assert set(c.versions) == {7}
            assert c.logprobs == pytest.approx([-torch.tensor(float(len(head))).log().item()] * len(c.tokens))


def test_a_request_that_cannot_be_sampled_ends_the_run_with_its_own_error(parts):
    parts.sampler.submit(SampleRequest(1, (99,), 1, SamplingParams(max_tokens=5)))
    with pytest.raises(CispoError, match="99"):
        all_of(parts.sampler)


def test_a_dead_rank_is_a_lost_learner_and_an_agreed_error_is_not(parts):
    learner = parts.learner
    batch = Batch((torch.tensor([1, 2, 3]),), torch.tensor([2, 3, 4]), torch.ones(3), {"advantages": torch.ones(3)})
    nan = {"advantages": torch.tensor([1.0, torch.nan, 1.0])}
    with pytest.raises(NonFiniteError, match="advantages"):
        learner.forward_backward(dataclasses.replace(batch, columns=nan), objectives.reinforce)
    assert learner.forward_backward(batch, objectives.reinforce).loss > 0
    ray.kill(learner.ranks[1])
    with pytest.raises(LearnerLost, match="rank 1 died"):
        learner.optim_step(AdamParams(1e-3))
    with pytest.raises(LearnerLost, match="not been started again"):
        learner.optim_step(AdamParams(1e-3))


def test_resources_that_are_not_there_are_named(base_folder):
    config = load("--cluster.address", "auto", "--cluster.learner_ranks", "64", "--cluster.learner_gpus", "1")
    with pytest.raises(ConfigError, match="need 32.5 CPU and 64 GPU; the cluster has 6 CPU and 2 GPU"):
        cluster.compose(config, base_folder, ThinkTask())


def test_the_trainer_needs_no_ray():
    code = "import sys; sys.modules['ray'] = None; import cispo.trainer, cispo.cluster, cispo.cli, cispo.rollout"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def parts_by_broadcast(base_folder):
    words = ["--cluster.samplers", "2", "--cluster.address", "auto", "--cluster.weight_transfer", "broadcast"]
    built = cluster.compose(load(*words), base_folder, ThinkTask())
    yield built
    built.close()


def test_a_broadcast_reaches_every_sampler_and_those_that_die_lose_nothing(parts_by_broadcast):
    sampler, learner = parts_by_broadcast.sampler, parts_by_broadcast.learner
    batch = Batch((torch.tensor([1, 2, 3]),), torch.tensor([2, 3, 4]), torch.ones(3), {"advantages": torch.ones(3)})

    def train():
        learner.forward_backward(batch, objectives.reinforce)
        learner.optim_step(AdamParams(1e-2))

    def submit():
        for request in requests(24):
            sampler.submit(request)

    def versions(found):
        return {v for completions in found.values() for c in completions for v in c.versions}

    train()
    weights = learner.weights()
    sampler.update_weights(weights, 1)
    assert sampler.parity.version == 1 and sampler.parity.tokens >= 32 and sampler.parity.max <= 1e-4
    before = {name: tensor.clone() for name, tensor in weights.items()}
    submit()
    expected = all_of(sampler)

    submit()
    os.kill(sampler.processes()[0], signal.SIGKILL)  # the learner still has what was published
    assert {n: drawn(c) for n, c in all_of(sampler).items()} == {n: drawn(c) for n, c in expected.items()}
    assert sampler.restarts == 1

    submit()
    stale = learner.weights()
    train()
    with pytest.raises(RunError, match="has other weights by now"):
        dict(stale)
    os.kill(sampler.processes()[1], signal.SIGKILL)  # the learner has gone on: what this one has must wait for it
    found = {}
    while not all(seat.ready for seat in sampler._seats) or sampler.restarts < 2:
        found |= {result.request_id: result for result in sampler.poll()}
    assert sampler._seats[1].waits and sampler._seats[1].requests
    sampler.update_weights(learner.weights(), 2)
    assert any(not torch.equal(before[name], tensor) for name, tensor in learner.weights().items())
    rest = all_of(sampler)
    assert sorted([*found, *rest]) == list(range(24)) and 2 in versions(rest)

    train()
    stopped = sampler.processes()[0]
    os.kill(stopped, signal.SIGSTOP)
    submit()
    meeting = sampler._meeting

    def kill():  # once the broadcast waits for it
        while sampler._meeting == meeting:
            time.sleep(0.005)
        os.kill(stopped, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    sampler.update_weights(learner.weights(), 3)
    assert sampler.restarts == 3
    found = all_of(sampler)
    assert sorted(found) == list(range(24)) and 3 in versions(found)

    class DiesAtTheEnd:
        """The learner, whose broadcast succeeds just before a sampler dies."""

        changes, meet = learner.changes, learner.meet

        def send(self, meeting, *, meanwhile):
            learner.send(meeting, meanwhile=meanwhile)
            if sampler.restarts == 3:  # the first time
                os.kill(sampler.processes()[1], signal.SIGKILL)
            while sampler.restarts == 3:
                meanwhile()

    sampler.update_weights(LiveWeights(DiesAtTheEnd()), 4)
    submit()
    assert versions(all_of(sampler)) == {4}  # none by the weights that a new sampler starts with

    learner._timeout_s = 10.0
    ranks = actors("ray::Rank")[-2:]
    stopped, meeting = sampler.processes()[0], sampler._meeting
    os.kill(stopped, signal.SIGSTOP)

    def stop_ranks_too():  # which then answer nobody, not even those who knock at their store
        while sampler._meeting == meeting:
            time.sleep(0.005)
        for rank in ranks:
            rank.suspend()
        os.kill(stopped, signal.SIGKILL)

    threading.Thread(target=stop_ranks_too, daemon=True).start()
    with pytest.raises(LearnerLost, match="send: rank 0, 1 hung for 10 s"):
        sampler.update_weights(learner.weights(), 5)
    for rank in ranks:
        rank.kill()


def test_weights_go_by_broadcast_where_all_have_gpus_of_their_own():
    def chosen(*words):
        config = configs.load(None, [*COMMON, *words])
        return with_transfer(config, demand(config, 3)).cluster.weight_transfer

    assert chosen() == "broadcast"
    assert chosen("--cluster.samplers", "2") == "object_store"  # too few GPUs, so none are used
    assert chosen("--cluster.sampler_gpus", "0") == "object_store"
    assert chosen("--cluster.colocate", "true") == "object_store"
    assert chosen("--cluster.learner_gpus", "0.5", "--cluster.sampler_gpus", "0.5") == "object_store"
    assert chosen("--async.sampler", "vllm", "--vllm.url", "http://a:1") == "object_store"
    with pytest.raises(ConfigError, match="a learner rank has 1 GPUs and a sampler 0; NCCL wants a whole one"):
        chosen("--cluster.weight_transfer", "broadcast", "--cluster.sampler_gpus", "0")


def test_who_takes_turns_shares_a_bundle():
    words = ["--cluster.learner_ranks", "4", "--cluster.samplers", "2", "--cluster.colocate", "true"]
    wanted = demand(configs.load(None, [*COMMON, *words, "--cluster.sampler_cpus", "3"]), 4)
    assert wanted.bundles == [{"CPU": 3.0, "GPU": 2.0}] * 2  # not 4.0: never at the same time
    assert [index for index, _ in wanted.ranks] == [0, 0, 1, 1] and [index for index, _ in wanted.samplers] == [0, 1]
    assert wanted.ranks[0][1] == {"CPU": 0.5, "GPU": 1.0}


@pytest.fixture
def parts_in_turn(base_folder):
    words = ["--cluster.colocate", "true", "--cluster.address", "auto", "--cluster.learner_gpus", "1"]
    words += ["--model.device", "cpu"]
    built = cluster.compose(configs.load(None, [*COMMON, *words]), base_folder, ThinkTask())
    yield built
    built.close()


def test_samplers_sleep_while_the_learner_works_and_one_that_dies_asleep_loses_nothing(parts_in_turn):
    sampler, learner = parts_in_turn.sampler, parts_in_turn.learner
    batch = Batch((torch.tensor([1, 2, 3]),), torch.tensor([2, 3, 4]), torch.ones(3), {"advantages": torch.ones(3)})
    (seat,) = sampler._seats
    assert sorted(seat.devices) == ["0", "1"]  # those of the two ranks

    def train():
        learner.forward_backward(batch, objectives.reinforce)
        learner.optim_step(AdamParams(1e-2))

    for version in (1, 2):
        for request in requests(24):
            sampler.submit(request)
        train()  # finishes what was asked for first
        assert seat.state[0] == "asleep"
        found = all_of(sampler)
        assert set(found) == set(range(24)) and seat.state[0] == "asleep"
        sampler.update_weights(learner.weights(), version)
        assert sampler.parity.version == version and sampler.parity.max <= 1e-4
    train()
    os.kill(sampler.processes()[0], signal.SIGKILL)
    sampler.update_weights(learner.weights(), 3)
    for request in requests(24):
        sampler.submit(request)
    assert {v for completions in all_of(sampler).values() for c in completions for v in c.versions} == {3}
    train()
    os.kill(sampler.processes()[0], signal.SIGKILL)
    while seat.state[0] != "gone":
        sampler.poll()
    train()  # nobody is there to disturb it
    assert sampler.restarts == 2
    sampler.update_weights(learner.weights(), 4)
    assert sampler.probe().version == 4


def test_weights_beyond_the_object_store_are_spilled_and_arrive(parts_of_one_sampler):
    """Between publications the store is filled several times over by what somebody else keeps there."""
    sampler, weights = parts_of_one_sampler.sampler, dict(parts_of_one_sampler.learner.weights())
    kept = []
    for version in range(1, 11):
        kept.append(ray.put(torch.zeros(100 << 18)))  # 100 MiB, of a store of 200
        sampler.update_weights(weights, version)
    for request in requests(4):
        sampler.submit(request)
    assert {v for completions in all_of(sampler).values() for c in completions for v in c.versions} == {10}


# ------------------------------------------------------------------------------------------------------- reward workers

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file


class Deadly(ThinkTask):
    """Scoring ends or stops the worker, `times` times in all; a file in `folder` remembers each."""

    def __init__(self, folder, signal_number, times):
        super().__init__()
        self._folder, self._signal, self._times = folder, signal_number, times

    async def score(self, prompt, completions, *, completion_ids=None):
        done = len(list(self._folder.iterdir()))
        if done < self._times:
            (self._folder / str(done)).touch()
            os.kill(os.getpid(), self._signal)
        return await super().score(prompt, completions, completion_ids=completion_ids)


def test_a_run_whose_learner_and_sampler_take_turns_equals_one_in_a_single_process(base_folder, tmp_path):
    """Where they are makes no difference to what is sampled first, nor to how it is rewarded."""
    words = [
        "--steps", "3", "--eval.every", "3", "--eval.max_prompts", "32", "--rollout.groups_per_step", "8",
        "--algorithm.updates_per_rollout", "2", "--cluster.colocate", "true", "--cluster.address", "auto",
    ]  # fmt: skip
    run_dir = cli.train(configs.load(None, [*COMMON, *words, "--run_dir", str(tmp_path / "run")]))
    alone = words[: words.index("--cluster.colocate")]
    other = cli.train(configs.load(None, ["--threads", "1", *alone, "--run_dir", str(tmp_path / "alone")]))
    mine, theirs = (list(read_jsonl(folder / "metrics.jsonl")) for folder in (run_dir, other))
    assert [r["step"] for r in mine] == [0, 1, 2, 3] and all(r["staleness/steps_max"] == 0 for r in mine[1:])
    assert mine[0]["eval/accuracy"] == theirs[0]["eval/accuracy"]
    assert mine[1]["reward/mean"] == pytest.approx(theirs[1]["reward/mean"])
    assert mine[1]["policy/loss"] == pytest.approx(theirs[1]["policy/loss"], rel=1e-3)


def small_run(tmp_path, *words):
    return load(
        "--cluster.address", "auto", "--cluster.reward_workers", "1", "--cluster.learner_ranks", "1", "--steps", "2",
        "--eval.every", "0", "--rollout.groups_per_step", "8", "--algorithm.updates_per_rollout", "2",
        "--run_dir", str(tmp_path / "run"), "--cluster.reward_timeout_s", "5", *words,
    )  # fmt: skip


@pytest.mark.parametrize("how", [pytest.param("SIGKILL", marks=pytest.mark.slow), "SIGSTOP"])
def test_a_reward_worker_that_dies_or_hangs_is_replaced_and_nothing_is_lost(base_folder, tmp_path, caplog, how):
    (tmp_path / "seen").mkdir()
    run_dir = cli.train(small_run(tmp_path), task=Deadly(tmp_path / "seen", getattr(signal, how), 1))
    assert ("died" if how == "SIGKILL" else "hung for 5 s") in caplog.text
    records = list(read_jsonl(run_dir / "metrics.jsonl"))
    assert [r["step"] for r in records] == [1, 2] and all(r["reward/none"] == 0 for r in records)
    assert sum(len(path.read_text().splitlines()) for path in (run_dir / "rollouts").iterdir()) == 2 * 8 * 16


def test_completions_that_take_every_reward_worker_down_end_the_run(base_folder, tmp_path):
    (tmp_path / "seen").mkdir()
    with pytest.raises(RunError, match="took 3 reward workers down"):
        cli.train(small_run(tmp_path), task=Deadly(tmp_path / "seen", signal.SIGKILL, 10**9))


# ----------------------------------------------------------------------------------------------------------- whole runs


def kill_after(run_dir, lines, title):
    """In a thread: once metrics.jsonl has so many lines, SIGKILL one of the actors with this title."""

    def work():
        path = run_dir / "metrics.jsonl"
        while not (path.exists() and path.read_bytes().count(b"\n") >= lines):
            time.sleep(0.005)
        actors(title)[-1].kill()  # older ones are other tests'
        killed.append(title)

    killed = []
    threading.Thread(target=work, daemon=True).start()
    return killed


@pytest.mark.parametrize("transfer", ["broadcast", pytest.param("object_store", marks=pytest.mark.slow)])
def test_a_run_learns_think_though_a_sampler_and_a_rank_are_killed(base_folder, tmp_path, caplog, transfer):
    run_dir = tmp_path / "run"
    config = load(
        "--cluster.address", "auto", "--run_dir", str(run_dir), "--checkpoint.every", "2", "--eval.every", "12",
        "--cluster.reward_workers", "1", "--cluster.weight_transfer", transfer,
    )  # fmt: skip
    killed = kill_after(run_dir, 4, "ray::Worker"), kill_after(run_dir, 7, "ray::Rank")
    assert cli.train(config) == run_dir
    assert all(killed)
    assert "a sampler died" in caplog.text and "rank" in caplog.text
    records = list(read_jsonl(run_dir / "metrics.jsonl"))
    assert [r["step"] for r in records] == list(range(13))
    assert records[-1]["eval/accuracy"] >= 0.95
    assert all(r["staleness/steps_max"] <= 1 for r in records[1:])
    seen = [
        record["admission"]
        for path in (run_dir / "rollouts").glob("step-*.jsonl")
        for record in map(json.loads, path.read_text().splitlines())
        if record["sample"] == 0
    ]
    assert sorted(seen) == list(range(12 * config.rollout.groups_per_step))  # every group once, none lost


@pytest.mark.slow
def test_the_lag_1_recipe_in_small_tells_cispo_from_ppo(base_folder, tmp_path):
    """Its nightly check asks for gradient on tokens that PPO's clip silences; under PPO's clip there is none."""
    check = ["--step", "3", "max(clip/gradient_on_silenced) > 0.001", "max(staleness/steps_max) == 1"]
    for name, words, status in (
        ("cispo", [], 0),
        ("ppo", ["--algorithm.objective.type", "ppo_clip"], 1),
    ):
        run_dir = str(tmp_path / name)
        recipe = ["train", "recipes/async-lag1-qwen3-30ba3b.yaml", "--tiny", "--steps", "3", "--run_dir", run_dir]
        assert cli.main([*recipe, "--cluster.address", "auto", "--eval.every", "0", *words]) == 0
        assert cli.main(["check", run_dir, *check]) == status
