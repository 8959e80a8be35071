"""Our trainer on a Tinker endpoint: the four verbs through the real SDK, against a real server."""
# ruff: noqa: E402 (what follows needs the extra)

import json
from functools import partial

import pytest

pytest.importorskip("tinker", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")

import torch

from cispo import cli, objectives
from cispo import config as configs
from cispo import model as models
from cispo.learner import LocalLearner
from cispo.server.remote import connect
from cispo.types import (
    AdamParams,
    Batch,
    ConfigError,
    Learner,
    NonFiniteError,
    Sampler,
    SampleRequest,
    SamplingParams,
)
from tests.serving import serving

ADAM = AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def server(base_folder, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("remote"), model=[f"think={base_folder}"]) as started:
        yield started


def machines(server, seed=0, rank=4):
    return connect(server.url, base_model="think", rank=rank, seed=seed, api_key=server.key)


def batch_of(seed=0, lengths=(9, 5, 7, 3)):
    g = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, 14, (n + 1,), generator=g) for n in lengths]
    T = sum(lengths)
    weights_T = torch.rand(T, generator=g) * (torch.rand(T, generator=g) < 0.7)
    weights_T[9:14] = 0  # a whole row
    anchor_T = -3 + torch.rand(T, generator=g)
    anchor_T[weights_T == 0] = float("nan")
    return Batch(
        rows=tuple(row[:-1] for row in tokens),
        targets_T=torch.cat([row[1:] for row in tokens]),
        weights_T=weights_T,
        columns={"anchor_logprobs": anchor_T, "advantages": torch.randn(T, generator=g)},
    )


def test_log_probs_are_those_of_the_local_learner(server, base_folder):
    learner, sampler = machines(server)
    assert isinstance(learner, Learner) and isinstance(sampler, Sampler)
    batch = batch_of()
    local = LocalLearner(models.load(configs.ModelConfig(), base_folder)).forward(batch)
    for found in (learner.forward(batch), learner.forward(batch, reference=True)):
        torch.testing.assert_close(found.logprobs_T, local.logprobs_T, atol=1e-5, rtol=0)
        assert torch.equal(found.evaluated_T, batch.weights_T != 0)


@pytest.mark.parametrize(
    "objective",
    [
        partial(objectives.cispo, clip_high_threshold=2.0),
        partial(objectives.ppo_clip, clip_low_threshold=0.5, clip_high_threshold=1.5),
        objectives.importance_sampling,
    ],
    ids=["cispo", "ppo_clip", "importance_sampling"],
)
def test_the_endpoints_own_losses_and_ours_have_one_gradient(server, base_folder, objective):
    def ours(logprobs, **columns):  # the same formula, under a name that the API does not know
        return objective(logprobs, **columns)

    batch, after = batch_of(), []
    local = LocalLearner(models.load(configs.ModelConfig(), base_folder)).forward_backward(batch, objective)
    for each in (objective, ours):
        learner, _ = machines(server, seed=5)
        output = learner.forward_backward(batch, each)
        assert output.loss == pytest.approx(local.loss, rel=1e-4)
        norm = learner.optim_step(ADAM)["grad_norm"]
        after.append((norm, learner.forward(batch_of(1)).logprobs_T))
    assert after[0][0] == pytest.approx(after[1][0], rel=1e-3)
    torch.testing.assert_close(after[0][1], after[1][1], atol=1e-3, rtol=0)


def test_samples_carry_their_version_and_their_log_probs(server):
    learner, sampler = machines(server)
    learner.forward_backward(batch_of(), objectives.importance_sampling)
    learner.optim_step(ADAM)
    sampler.update_weights(None, 7)
    prompt = (12, 1, 2, 3, 4, 5, 6)
    sampler.submit(SampleRequest(1, prompt, 3, SamplingParams(max_tokens=6, stop_token_ids=(), seed=1)))
    assert sampler.pending == 1
    results = []
    while not results:
        results = sampler.poll()
    (result,) = results
    assert sampler.pending == 0 and result.request_id == 1
    for completion in result.completions:
        assert completion.versions == (7,) * 6 and completion.stop_reason == "length"
        tokens = torch.tensor([*prompt, *completion.tokens])
        weights = torch.zeros(len(tokens) - 1)
        weights[len(prompt) - 1 :] = 1
        found = learner.forward(Batch((tokens[:-1],), tokens[1:], weights, {}))
        torch.testing.assert_close(
            found.logprobs_T[len(prompt) - 1 :], torch.tensor(completion.logprobs), atol=1e-4, rtol=0
        )


def test_a_checkpoint_brings_weights_and_optimizer_back(server, tmp_path):
    learner, _ = machines(server)
    learner.forward_backward(batch_of(), objectives.importance_sampling)
    learner.optim_step(ADAM)
    learner.save(tmp_path / "at-1")
    steps = []
    for _ in range(2):
        learner.forward_backward(batch_of(1), objectives.importance_sampling)
        steps.append(learner.optim_step(ADAM))
        learner.load(tmp_path / "at-1")
    assert steps[0] == steps[1]


def test_what_the_api_cannot_do_is_refused(server):
    learner, sampler = machines(server)
    batch = batch_of()
    with pytest.raises(ConfigError, match="temperature"):
        learner.forward_backward(batch, objectives.cispo, temperature=0.7)
    with pytest.raises(ConfigError, match="entropy_bonus"):
        learner.forward_backward(batch, objectives.cispo, entropy_bonus=0.1)
    batch.columns["advantages"][batch.weights_T != 0] = float("inf")
    with pytest.raises(NonFiniteError, match="advantages"):
        learner.forward_backward(batch, objectives.cispo)
    with pytest.raises(ConfigError, match="pass None"):
        sampler.update_weights({}, 1)
    with pytest.raises(ConfigError, match="expected tinker"):
        connect("ftp://x", base_model="think")


@pytest.mark.slow
def test_the_think_run_through_the_server_reaches_what_the_local_run_reaches(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", server.key)
    settings = ["--run_dir", str(tmp_path / "run"), "--learner", server.url.replace("http://", "tinker://"),
                "--eval.max_prompts", "256", "--optimizer.learning_rate", "5e-4", "--steps", "16"]  # fmt: skip
    run_dir = cli.train(configs.load(None, settings))
    records = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["eval/accuracy"] <= 0.2
    assert records[-1]["eval/accuracy"] >= 0.95
    assert all(r["kl/sampler_max_abs"] <= 1e-4 for r in records[1:] if "kl/sampler_max_abs" in r)
