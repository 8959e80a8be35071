"""vLLM actors in a Ray pool, for real: whole runs, what is killed in their middle, and what is refused.

Run by `make test-engines` (docs/vllm.md). A pool takes 20 to 60 s to start on two cores. Left out: GPUs.
"""

import contextlib
import json
import threading
import time

import pytest

pytest.importorskip("vllm")
pytest.importorskip("ray")

import psutil
import ray

from cispo import cli, cluster
from cispo import config as configs
from cispo.cluster.weights import pack
from cispo.metrics import read_jsonl
from cispo.tasks.think import BaseRecipe, ThinkTask, make_base
from cispo.types import ConfigError, RunError, SampleRequest, SamplingParams

PARITY = 1e-4
COMMON = [
    "--cluster", "ray", "--cluster.address", "auto", "--cluster.learner_cpus", "0.5", "--cluster.sampler_cpus", "0.5",
    "--threads", "1", "--async.sampler", "vllm", "--vllm.kv_cache_gib", "0.5", "--vllm.probe_tolerance", str(PARITY),
]  # fmt: skip
WORDS = [*COMMON, "--async.max_staleness", "1"]
ENGINE, ACTOR = "VLLM::EngineCore", "ray::Worker"


@pytest.fixture(scope="module", autouse=True)
def machine():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base(folder, recipe=BaseRecipe(heads=3))  # attention heads of 32, which vLLM runs on CPUs
    return folder


def processes(title: str) -> list[psutil.Process]:
    """Ours with this title, oldest first: below this process, or orphans, as an engine whose actor was killed."""
    here, found = psutil.Process(), []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            titled = (process.info["cmdline"] or [""])[0].startswith(title)
            orphan = process.ppid() == 1 and process.create_time() > here.create_time()
            if titled and (orphan or here in process.parents()):
                found.append(process)
    return sorted(found, key=psutil.Process.create_time)


def until(condition, what: str, limit: float = 30) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"{what} after {limit} s"
        time.sleep(0.05)


@pytest.mark.parametrize("transfer", ["object_store", "broadcast"])
def test_a_run_goes_on_though_an_engine_and_then_its_actor_are_killed(base, tmp_path, caplog, transfer):
    """Two learner ranks, one vLLM actor, updates in flight. By broadcast, an engine's death ends its actor too."""
    run_dir = tmp_path / "run"
    config = configs.load(
        None,
        [*WORDS, "--cluster.learner_ranks", "2", "--model.path", str(base), "--run_dir", str(run_dir), "--steps", "10",
         "--eval.every", "10", "--eval.max_prompts", "64", "--vllm.probe_every", "1",
         "--cluster.weight_transfer", transfer],
    )  # fmt: skip
    killed = []

    def kill() -> None:
        path = run_dir / "metrics.jsonl"
        for lines, title in ((3, ENGINE), (6, ACTOR)):
            while not (path.exists() and path.read_bytes().count(b"\n") >= lines):
                time.sleep(0.005)
            (victim,) = processes(title)
            victim.kill()
            killed.append((title, victim.pid))

    threading.Thread(target=kill, daemon=True).start()
    assert cli.train(config) == run_dir
    assert [title for title, _ in killed] == [ENGINE, ACTOR]
    assert "a sampler died" in caplog.text
    until(lambda: not processes(ENGINE), "an engine core is left")
    records = list(read_jsonl(run_dir / "metrics.jsonl"))
    assert [record["step"] for record in records] == list(range(11))
    assert all(record["staleness/steps_max"] <= 1 for record in records[1:])
    assert records[-1]["eval/accuracy"] > records[0]["eval/accuracy"] + 0.3
    written = [
        json.loads(line) for path in (run_dir / "rollouts").glob("step-*.jsonl") for line in path.open(encoding="utf-8")
    ]
    groups = sorted(record["admission"] for record in written if record["sample"] == 0)
    assert groups == list(range(10 * config.rollout.groups_per_step))  # every group once, none lost


def test_two_samplers_share_the_work_update_in_flight_and_are_both_probed(base):
    words = ["--cluster.samplers", "2", "--model.path", str(base), "--vllm.max_sequences", "4"]
    parts = cluster.compose(configs.load(None, [*WORDS, *words]), base, ThinkTask())
    sampler = parts.sampler
    try:
        assert sampler.parity.version == 0 and sampler.parity.max <= PARITY  # before the first rollout
        for number in range(200):
            params = SamplingParams(max_tokens=60, seed=number, stop_token_ids=())
            sampler.submit(SampleRequest(number, (number % 10, 3), 2, params))
        found = []
        for version in (1, 2, 3):
            while len(found) < 30 * version:
                found += sampler.poll()
            sampler.update_weights(parts.learner.weights(), version)  # probes, and keeps what comes meanwhile
            assert sampler.parity.version == version and sampler.parity.max <= PARITY
        while sampler.pending:
            found += sampler.poll()
        assert sorted(result.request_id for result in found) == list(range(200))
        versions = [c.versions for result in found for c in result.completions]
        assert {v for row in versions for v in row} == {0, 1, 2, 3}
        assert any(len(set(row)) > 1 for row in versions), "no completion saw its weights change"
        assert all(list(row) == sorted(row) and len(row) == 60 for row in versions)

        other = {name: tensor * 1.5 for name, tensor in parts.learner.weights().items()}
        sampler._tell(sampler._seats[1], "stored", ((ray.put(pack(other)),), 3))
        with pytest.raises(RunError, match="sampler 1: at version 3 its log-probs differ from the learner's by up to"):
            sampler.probe()
    finally:
        parts.close()
    until(lambda: not processes(ENGINE), "an engine core is left")


def test_a_learner_and_an_engine_that_take_turns_learn_though_the_engine_is_killed(base, tmp_path):
    run_dir = tmp_path / "run"
    words = ["--cluster.colocate", "true", "--model.path", str(base), "--run_dir", str(run_dir), "--steps", "8",
             "--eval.every", "8", "--eval.max_prompts", "64", "--vllm.probe_every", "1"]  # fmt: skip
    config = configs.load(None, [*COMMON, *words])

    def kill() -> None:  # during a step, whoever's turn it is
        path = run_dir / "metrics.jsonl"
        while not (path.exists() and path.read_bytes().count(b"\n") >= 3):
            time.sleep(0.005)
        (engine,) = processes(ENGINE)
        engine.kill()

    threading.Thread(target=kill, daemon=True).start()
    cli.train(config)
    until(lambda: not processes(ENGINE), "an engine core is left")
    records = list(read_jsonl(run_dir / "metrics.jsonl"))
    assert [record["step"] for record in records] == list(range(9))
    assert all(record["staleness/steps_max"] == 0 for record in records[1:])
    assert records[-1]["eval/accuracy"] > records[0]["eval/accuracy"] + 0.3


def test_a_model_that_vllm_cannot_run_is_refused_before_the_run_has_a_folder(tmp_path):
    config = configs.load(None, [*WORDS, "--run_dir", str(tmp_path / "run")])  # the embedded base has heads of 24
    with pytest.raises(ConfigError, match=r"attention heads of 32, 64, .* has 24; use async.sampler: process"):
        cli.train(config)
    assert not (tmp_path / "run").exists()
