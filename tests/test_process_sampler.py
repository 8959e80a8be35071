"""The sampler in a process of its own: the same samples, versions, and nothing lost when it is killed."""

import os
import signal
import time

import pytest
import torch

from cispo import cli, model
from cispo import config as configs
from cispo.config import ModelConfig
from cispo.metrics import read_jsonl
from cispo.sampling.local import LocalSampler
from cispo.sampling.process import ProcessOptions, ProcessSampler
from cispo.types import RunError, SampleRequest, SamplingParams

LONG = SamplingParams(max_tokens=50, stop_token_ids=(), seed=7)


@pytest.fixture
def sampler(tiny_folder):
    sampler = ProcessSampler(ProcessOptions(path=tiny_folder, model=ModelConfig()))
    yield sampler
    sampler.close()


def requests(count, params=LONG):
    return [SampleRequest(i, (14, *range(1 + i % 5)), 4, params) for i in range(count)]


def collect(sampler, count, seconds=120):
    found = {}
    deadline = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < deadline:
        for result in sampler.poll():
            assert result.request_id not in found, "a result came twice"
            found[result.request_id] = result
    assert len(found) == count
    return found


def expected(folder, asked):
    loaded = model.load(ModelConfig(), folder)
    return {r.request_id: r for r in LocalSampler(loaded.model, loaded.tokenizer).sample(asked)}


def tokens(results):
    return {i: [c.tokens for c in r.completions] for i, r in results.items()}


def test_it_samples_what_the_sampler_in_process_samples(sampler, tiny_folder):
    asked = requests(6)
    for request in asked:
        sampler.submit(request)
    assert sampler.pending == 6
    assert tokens(collect(sampler, 6)) == tokens(expected(tiny_folder, asked))
    assert sampler.pending == 0


def test_polling_without_waiting_returns_at_once_and_loses_nothing(sampler):
    sampler.submit(requests(1)[0])
    assert sampler.poll(wait=False) == []  # the child is still importing torch
    collect(sampler, 1)


def test_a_killed_child_is_started_again_and_samples_the_same(sampler, tiny_folder):
    asked = requests(8)
    for request in asked[:4]:
        sampler.submit(request)
    first = collect(sampler, 4)
    for request in asked[4:]:
        sampler.submit(request)
    os.kill(sampler._process.pid, signal.SIGKILL)
    results = first | collect(sampler, 4)
    assert tokens(results) == tokens(expected(tiny_folder, asked))


def test_a_child_that_dies_too_often_ends_the_run(tiny_folder):
    sampler = ProcessSampler(ProcessOptions(path=tiny_folder, model=ModelConfig()), max_restarts=0)
    sampler.submit(requests(1)[0])
    os.kill(sampler._process.pid, signal.SIGKILL)
    with pytest.raises(RunError, match="died .exit status -9."):
        collect(sampler, 1)
    sampler.close()


def test_an_error_in_the_child_is_an_error_here(tmp_path):
    sampler = ProcessSampler(ProcessOptions(path=tmp_path / "lost", model=ModelConfig()))
    sampler.submit(requests(1)[0])
    with pytest.raises(RunError, match="does not exist"):
        collect(sampler, 1)
    sampler.close()


def test_new_weights_reach_it_with_their_version(sampler, tiny_folder):
    loaded = model.load(ModelConfig(), tiny_folder)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(1.5)
    sampler.update_weights(model.merged_weights(loaded.model), 3)
    asked = requests(3)
    for request in asked:
        sampler.submit(request)
    results = collect(sampler, 3)
    there = LocalSampler(loaded.model, loaded.tokenizer).sample(asked)
    assert tokens(results) == tokens({r.request_id: r for r in there})
    assert {v for r in results.values() for c in r.completions for v in c.versions} == {3}
    with pytest.raises(RunError, match=r"learner.weights\(\)"):
        sampler.update_weights(None, 4)


@pytest.mark.parametrize("drain", [False, True])
def test_updates_in_flight_are_told_apart_by_token_or_drained(tiny_folder, drain):
    sampler = ProcessSampler(
        ProcessOptions(path=tiny_folder, model=ModelConfig(), sampler={"steps_per_poll": 1}, drain=drain)
    )
    weights = model.merged_weights(model.load(ModelConfig(), tiny_folder).model)
    sampler.submit(requests(1)[0])
    collect(sampler, 1)  # the child is up
    for request in requests(40):
        sampler.submit(request)
    for version in range(1, 30):
        sampler.update_weights(weights, version)
    results = collect(sampler, 40)
    sampler.close()
    spans = [c.versions for r in results.values() for c in r.completions]
    assert all(list(s) == sorted(s) for s in spans)
    mixed = sum(len(set(s)) > 1 for s in spans)
    assert mixed == 0 if drain else mixed > 0


@pytest.mark.parametrize("staleness", [1, pytest.param(3, marks=pytest.mark.slow), 8])
def test_asynchronous_training_keeps_its_bound_and_learns(base_folder, tmp_path, staleness):
    words = ["--run_dir", str(tmp_path / "run"), "--async.max_staleness", str(staleness), "--steps", "20",
             "--eval.every", "20", "--eval.max_prompts", "256", "--threads", "1"]  # fmt: skip
    records = list(read_jsonl(cli.train(configs.load(None, words)) / "metrics.jsonl"))[1:]
    assert max(r["staleness/steps_max"] for r in records) == staleness
    assert records[-1]["eval/accuracy"] >= 0.95


def test_draining_more_than_a_pipe_holds_does_not_stop(tiny_folder):
    """The child hands over while the parent waits for it to take the weights."""
    sampler = ProcessSampler(ProcessOptions(path=tiny_folder, model=ModelConfig(), drain=True))
    weights = model.merged_weights(model.load(ModelConfig(), tiny_folder).model)
    for request in requests(400, SamplingParams(max_tokens=50, stop_token_ids=(), seed=7)):
        sampler.submit(request)
    for version in range(1, 4):
        sampler.update_weights(weights, version)
    results = collect(sampler, 400)
    sampler.close()
    assert {v for r in results.values() for c in r.completions for v in c.versions} == {0}
