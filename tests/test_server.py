"""The real `tinker` SDK against a real server process: every kind of call, and what the numbers mean."""
# ruff: noqa: E402 (what follows needs the extra)

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

tinker = pytest.importorskip("tinker", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")

import numpy as np
import torch
from tinker import types
from tinker.proto.response_conv import deserialize_sample_response

from cispo import model as models
from cispo.config import ModelConfig
from cispo.server.tenants import hash_of
from tests.serving import serving

ALICE, BOB = "tml-alice-0123456789", "tml-bob-0123456789"
PROMPT = [12, 1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def server(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    keys = folder / "keys.txt"
    keys.write_text(f"# tenants\nalice {ALICE}\nbob {hash_of(BOB)}  # only the hash\n")
    options = {"keys": str(keys), "max_samples": 64, "max_requests": 300, "max_body_mib": 4}
    with serving(folder / "state", model=[f"Org/Tiny={tiny_folder}"], **options) as started:
        started.key = ALICE
        yield started


@pytest.fixture(scope="module")
def service(server):
    return tinker.ServiceClient(base_url=server.url, api_key=ALICE)


@pytest.fixture
def run(service):
    return service.create_lora_training_client(base_model="Org/Tiny", rank=4, seed=1).result()


def tokens_and_targets(count=4, length=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 14, (count, length + 1), generator=g)
    return ids[:, :-1], ids[:, 1:]


def datums(kind="cross_entropy", *, count=4, length=10, seed=0, lengths=None, **more):
    inputs, targets = tokens_and_targets(count, length, seed)
    g = torch.Generator().manual_seed(seed + 1)
    out = []
    for i in range(count):
        n = length if lengths is None else lengths[i]
        fields = {"target_tokens": types.TensorData.from_torch(targets[i, :n])}
        if kind == "cross_entropy":
            fields["weights"] = types.TensorData.from_torch(torch.rand(n, generator=g))
        else:
            fields["logprobs"] = types.TensorData.from_torch(-3.5 + 2 * torch.rand(n, generator=g))
            fields["advantages"] = types.TensorData.from_torch(torch.randn(n, generator=g))
        for name, value in more.items():
            fields[name] = types.TensorData.from_torch(torch.full((n,), value))
        out.append(types.Datum(model_input=types.ModelInput.from_ints(inputs[i, :n].tolist()), loss_fn_inputs=fields))
    return out


def column(data, name):
    return torch.cat([d.loss_fn_inputs[name].to_torch().float() for d in data])


def logprobs_of(result):
    return torch.cat([output["logprobs"].to_torch() for output in result.loss_fn_outputs])


def base_logprobs(folder, data):
    """Of the base model itself, by transformers alone."""
    model = models.load(ModelConfig(), folder, trainable=False).model
    out = []
    with torch.no_grad():
        for d in data:
            logits = model(input_ids=torch.tensor([d.model_input.to_ints()])).logits[0].double()
            targets = d.loss_fn_inputs["target_tokens"].to_torch()
            out.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
    return torch.cat(out)


ADAM = types.AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-12)


# ----------------------------------------------------------------------------------------------------------- training


def test_a_fresh_adapter_is_the_base_model_and_the_loss_is_a_plain_sum(run, tiny_folder):
    data = datums(lengths=[10, 3, 7, 1])
    result = run.forward_backward(data, "cross_entropy").result()
    expected = base_logprobs(tiny_folder, data)
    torch.testing.assert_close(logprobs_of(result).double(), expected, atol=1e-5, rtol=0)
    assert [len(o["logprobs"].to_torch()) for o in result.loss_fn_outputs] == [10, 3, 7, 1]
    loss = -(column(data, "weights").double() * expected).sum()
    assert result.metrics["loss:sum"] == pytest.approx(float(loss), rel=1e-5)
    assert result.metrics["tokens:sum"] == 21


FORMULAS = {
    "importance_sampling": ({}, lambda lp, q, A: -((lp - q).exp() * A)),
    "ppo": ({}, lambda lp, q, A: -torch.minimum((lp - q).exp() * A, (lp - q).exp().clamp(0.8, 1.2) * A)),
    "cispo": ({}, lambda lp, q, A: -((lp - q).exp().clamp(0.0, 4.0).detach() * A * lp)),
    "cispo 0.9 1.1": (
        {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
        lambda lp, q, A: -((lp - q).exp().clamp(0.9, 1.1).detach() * A * lp),
    ),
    "dro": ({"beta": 0.3}, lambda lp, q, A: -(lp * A - 0.15 * (lp - q) ** 2)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_every_loss_equals_its_formula_and_its_custom_form_after_one_step(service, name):
    """`cispo` and its likes against the same loss through forward_backward_custom: log-probs within 1e-3 after Adam."""
    loss_fn, (config, formula) = name.split()[0], FORMULAS[name]
    data = datums("rl", lengths=[10, 3, 7, 1])

    def custom(batch, logprobs):
        losses = [
            formula(lp, d.loss_fn_inputs["logprobs"].to_torch(), d.loss_fn_inputs["advantages"].to_torch()).sum()
            for d, lp in zip(batch, logprobs, strict=True)
        ]
        return torch.stack(losses).sum(), {"mine:mean": 1.0}

    after = []
    for call in (
        lambda run: run.forward_backward(data, loss_fn, config or None),
        lambda run: run.forward_backward_custom(data, custom),
    ):
        run = service.create_lora_training_client(base_model="Org/Tiny", rank=4, seed=3).result()
        first = call(run).result()
        second = call(run)  # gradients accumulate
        step = run.optim_step(ADAM).result()
        second.result()
        after.append((first, step, logprobs_of(run.forward(datums(lengths=[10, 3, 7, 1]), "cross_entropy").result())))
    (one, step_one, a), (other, step_other, b) = after
    assert one.metrics["loss:sum"] == pytest.approx(
        float(formula(logprobs_of(one), column(data, "logprobs"), column(data, "advantages")).sum()), rel=1e-4
    )
    assert step_one.metrics["grad_norm"] == pytest.approx(step_other.metrics["grad_norm"], rel=1e-3)
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    assert other.metrics["mine:mean"] == 1.0
    assert float((a - logprobs_of(one)).abs().max()) > 1e-3  # the step did something


def test_gspo_clips_the_sequence_ratio(run):
    data = datums("rl", lengths=[10, 3, 7, 1], sequence_ratio_mask=1.0)
    config = {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}
    result = run.forward_backward(data, "gspo", config).result()
    expected = 0.0
    for d, o in zip(data, result.loss_fn_outputs, strict=True):
        A = d.loss_fn_inputs["advantages"].to_torch()
        s = (o["logprobs"].to_torch() - d.loss_fn_inputs["logprobs"].to_torch()).mean().exp()
        expected -= float(torch.minimum(s * A, s.clamp(0.5, 2.0) * A).sum())
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-4)
    assert run.optim_step(ADAM).result().metrics["grad_norm"] > 0


def test_thresholds_may_be_given_for_each_token(run):
    data = datums("rl", clip_low_threshold=0.0, clip_high_threshold=0.5)
    result = run.forward_backward(data, "cispo").result()
    ratio = (logprobs_of(result) - column(data, "logprobs")).exp().clamp(0.0, 0.5)
    expected = -(ratio * column(data, "advantages") * logprobs_of(result)).sum()
    assert result.metrics["loss:sum"] == pytest.approx(float(expected), rel=1e-4)


def test_metrics_say_how_far_off_policy_the_tokens_are(run):
    data = datums("rl")
    metrics = run.forward_backward(data, "ppo").result().metrics
    fresh = run.forward(data, "ppo").result()
    log_ratio = logprobs_of(fresh) - column(data, "logprobs")
    ratio = log_ratio.exp()
    assert metrics["ratio:mean"] == pytest.approx(float(ratio.mean()), rel=1e-4)
    assert metrics["ratio:max"] == pytest.approx(float(ratio.max()), rel=1e-4)
    assert metrics["clipped_fraction:mean"] == pytest.approx(float(((ratio > 1.2) | (ratio < 0.8)).float().mean()))
    ess = ratio.sum() ** 2 / (len(ratio) * ratio.square().sum())
    assert metrics["effective_sample_size:mean"] == pytest.approx(float(ess), rel=1e-4)
    assert metrics["kl_sampler_trainer_k1:mean"] == pytest.approx(float(-log_ratio.mean()), rel=1e-4)
    assert all(name.count(":") == 1 for name in metrics)


def test_several_targets_per_position_dense_and_sparse(run, tiny_folder):
    inputs, _ = tokens_and_targets(2, 6)
    g = torch.Generator().manual_seed(5)
    targets = torch.randint(0, 14, (2, 6, 12), generator=g)
    weights = torch.rand(2, 6, 12, generator=g) * (torch.rand(2, 6, 12, generator=g) < 0.1)
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(inputs[i].tolist()),
            loss_fn_inputs={"target_tokens": targets[i], "weights": weights[i]},
        )
        for i in range(2)
    ]
    assert data[0].loss_fn_inputs["weights"].sparse_crow_indices is not None
    result = run.forward_backward(data, "cross_entropy").result()
    model = models.load(ModelConfig(), tiny_folder, trainable=False).model
    with torch.no_grad():
        expected = model(input_ids=inputs).logits.log_softmax(-1).gather(2, targets)
    for output, row in zip(result.loss_fn_outputs, expected, strict=True):
        torch.testing.assert_close(output["logprobs"].to_torch(), row, atol=1e-5, rtol=0)
    assert result.metrics["loss:sum"] == pytest.approx(-float((weights * expected).sum()), rel=1e-4)
    assert run.optim_step(ADAM).result().metrics["grad_norm"] > 0


def test_chunked_requests_are_one_sum(server, service):
    """1030 datums go as two chunks, whose metrics the SDK adds up by their reducers."""
    run = service.create_lora_training_client(base_model="Org/Tiny", rank=2, seed=1, train_mlp=False).result()
    data = datums(count=103, length=2) * 10
    result = run.forward_backward(data, "cross_entropy").result()
    assert len(result.loss_fn_outputs) == 1030
    expected = -(column(data, "weights") * logprobs_of(result)).sum()
    assert result.metrics["loss:sum"] == pytest.approx(float(expected), rel=1e-4)
    assert result.metrics["tokens:sum"] == 2060
    run.optim_step(ADAM).result()


def test_adam_has_every_parameter(service):
    """Against torch.optim.AdamW on the same gradient: a linear loss makes it the same at every step."""
    from cispo.server.lora import Adapter, LoraHost, LoraShape
    from cispo.types import AdamParams

    torch.manual_seed(0)

    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = torch.nn.ModuleDict({"up": torch.nn.Linear(5, 7)})

        def get_output_embeddings(self):
            return None

    host = LoraHost(Toy())
    shape = LoraShape(3, train_attn=False, train_unembed=False)
    adapter = Adapter(host, shape, torch.randn(host.parameters_of(shape)))
    parameter = torch.nn.Parameter(adapter.flat.clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.0)
    for step in range(5):
        gradient = torch.randn_like(parameter) * 10 ** (-step)
        params = AdamParams(0.1 / (step + 1), 0.8, 0.9, 1e-6, 0.05, 1.0 if step % 2 else 0.0)
        adapter.grad.copy_(gradient)
        metrics = adapter.optim_step(params)
        assert metrics["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)
        parameter.grad = gradient.clone()
        if params.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_([parameter], params.grad_clip_norm)
        group = {"lr": params.learning_rate, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.05}
        optimizer.param_groups[0].update(group)
        optimizer.step()
        torch.testing.assert_close(adapter.flat, parameter.detach(), atol=1e-6, rtol=1e-5)
    assert float(adapter.grad.abs().max()) == 0


def test_rank_parts_and_seed_are_honoured(service):
    def after_a_step(**options):
        run = service.create_lora_training_client(base_model="Org/Tiny", **options).result()
        run.forward_backward(datums(), "cross_entropy").result()
        metrics = run.optim_step(ADAM).result().metrics
        return run.get_info().lora_rank, metrics["weight_norm"], metrics["grad_norm"]

    whole = after_a_step(rank=4, seed=7)
    assert after_a_step(rank=4, seed=7) == whole
    assert after_a_step(rank=4, seed=8)[2] != whole[2]
    assert after_a_step(rank=8, seed=7)[0] == 8
    parts = [
        after_a_step(rank=4, seed=7, train_attn=a, train_mlp=m, train_unembed=u)[2]
        for a, m, u in ((True, False, False), (False, True, False), (False, False, True))
    ]
    assert all(0 < part < whole[2] for part in parts)
    assert len(set(parts)) == 3


def test_clipping_and_weight_decay_reach_the_weights(service):
    norms = {}
    for name, more in {
        "plain": {},
        "clipped": {"grad_clip_norm": 1e-9, "eps": 1.0},
        "decayed": {"weight_decay": 50.0},
    }.items():
        run = service.create_lora_training_client(base_model="Org/Tiny", rank=4, seed=7).result()
        run.forward_backward(datums(), "cross_entropy").result()
        params = types.AdamParams(**{"learning_rate": 1e-2, **more})
        norms[name] = run.optim_step(params).result().metrics
    assert norms["clipped"]["update_norm"] < 1e-8 < norms["plain"]["update_norm"]
    assert norms["decayed"]["weight_norm"] < 0.6 * norms["plain"]["weight_norm"]


# --------------------------------------------------------------------------------------------- what is refused, and how


def without(data, name):
    return [
        types.Datum(model_input=d.model_input, loss_fn_inputs={k: v for k, v in d.loss_fn_inputs.items() if k != name})
        for d in data
    ]


def with_input(data, index, name, value):
    fields = {**data[index].loss_fn_inputs, name: types.TensorData.from_torch(value)}
    bad = types.Datum(model_input=data[index].model_input, loss_fn_inputs=fields)
    return [*data[:index], bad, *data[index + 1 :]]


RL = datums("rl")
IMAGE = types.ImageChunk(data=b"x", format="png", expected_tokens=1)
BAD = {
    "token beyond the vocabulary": (
        [*RL[:3], types.Datum(model_input=types.ModelInput.from_ints([99] * 10), loss_fn_inputs=RL[3].loss_fn_inputs)],
        "cispo", None, r"data\[3\].*outside the vocabulary",
    ),
    "negative target": (with_input(RL, 2, "target_tokens", torch.full((10,), -100)), "cispo", None, r"data\[2\].*out"),
    "nan": (with_input(RL, 1, "advantages", torch.tensor([math.nan] * 10)), "cispo", None, r"\[1\].advantages is nan"),
    "infinity": (with_input(RL, 1, "logprobs", torch.tensor([-math.inf] * 10)), "cispo", None, "finite"),
    "length": (with_input(RL, 3, "advantages", torch.ones(9)), "cispo", None, r"\[9\], target_tokens \[10\]"),
    "missing input": (without(RL, "logprobs"), "cispo", None, "lacks logprobs"),
    "unknown input": (with_input(RL, 0, "clip_low_threshold", torch.ones(10)), "dro", None, "unknown to dro"),
    "unknown setting": (RL, "cispo", {"epsilon": 0.2}, "loss_fn_config.epsilon is unknown"),
    "text setting": (RL, "cispo", {"clip_high_threshold": "four"}, "send a number"),
    "thresholds": (RL, "ppo", {"clip_low_threshold": 1.3}, "out of order"),
    "offsets": (RL, "ppo", {"clip_low_threshold": -0.2}, "not offsets from 1"),
    "closed loss": (RL, "stable_reinforce", {"kl_coeff": 0.1}, "Use cispo"),
    "image": (
        [types.Datum(model_input=types.ModelInput(chunks=[IMAGE]), loss_fn_inputs=RL[0].loss_fn_inputs)],
        "cispo", None, "text only",
    ),
    "too long": (datums("rl", count=1, length=65), "cispo", None, "context is 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_a_users_error_and_changes_no_gradient(service, name):
    data, loss_fn, config, message = BAD[name]
    norms = []
    for spoilt in (False, True):
        run = service.create_lora_training_client(base_model="Org/Tiny", rank=4, seed=2).result()
        run.forward_backward(RL, "cispo").result()
        if spoilt:
            with pytest.raises(tinker.RequestFailedError, match=message) as caught:
                run.forward_backward(data, loss_fn, config).result()
            assert caught.value.category == types.RequestErrorCategory.User
        norms.append(run.optim_step(ADAM).result().metrics)
    assert norms[0] == norms[1]


def test_optimizer_settings_are_checked(run):
    for name, bad in {"learning_rate": -1.0, "beta2": 1.0, "grad_clip_norm": -1.0, "eps": 1e-3}.items():
        if name == "eps":
            run.optim_step(types.AdamParams(eps=bad)).result()
            continue
        with pytest.raises(tinker.RequestFailedError, match=f"adam_params.{name} is {bad}"):
            run.optim_step(types.AdamParams(**{name: bad})).result()
    run.optim_step(ADAM).result()


def test_a_diverged_step_is_refused_and_the_weights_stay(run):
    run.forward_backward(datums("rl", length=4, count=1), "importance_sampling").result()
    with pytest.raises(tinker.RequestFailedError, match="not finite"):
        run.optim_step(types.AdamParams(learning_rate=1e30)).result()
    fresh = run.forward(datums(), "cross_entropy").result()
    assert torch.isfinite(logprobs_of(fresh)).all()


# ------------------------------------------------------------------------------------------------- weights and sampling


def greedy(**more):
    return types.SamplingParams(**{"max_tokens": 8, "temperature": 0.0, "stop": [], **more})


def train_a_little(run, seed=0):
    run.forward_backward(datums("rl", seed=seed), "cispo").result()
    run.optim_step(types.AdamParams(learning_rate=3e-2)).result()


def test_snapshots_never_change_and_sampling_never_touches_training(service, run):
    train_a_little(run)
    prompt = types.ModelInput.from_ints(PROMPT)
    snapshot = run.save_weights_and_get_sampling_client().result()
    named = run.save_weights_for_sampler("one").result().path
    before = snapshot.compute_logprobs(prompt).result()
    training = logprobs_of(run.forward(datums(), "cross_entropy").result())
    train_a_little(run, seed=1)
    later = run.save_weights_and_get_sampling_client().result()
    assert snapshot.compute_logprobs(prompt).result() == before
    assert later.compute_logprobs(prompt).result() != before
    from_path = service.create_sampling_client(model_path=named)
    from_path = from_path.result() if hasattr(from_path, "result") else from_path
    assert from_path.compute_logprobs(prompt).result() == before
    now = logprobs_of(run.forward(datums(), "cross_entropy").result())
    assert not torch.equal(now, training)
    later.sample(prompt, 4, types.SamplingParams(max_tokens=8)).result()
    assert torch.equal(logprobs_of(run.forward(datums(), "cross_entropy").result()), now)
    assert len(before) == len(PROMPT) and before[0] is None


def test_state_with_and_without_optimizer(service, run):
    train_a_little(run)
    path = run.save_state("here").result().path
    assert path == f"tinker://{run.model_id}/weights/here"
    with_optimizer = service.create_training_client_from_state_with_optimizer(path).result()
    without_optimizer = service.create_training_client_from_state(path).result()
    after = []
    for each in (run, with_optimizer, without_optimizer):
        assert each.get_info().lora_rank == 4
        each.forward_backward(datums("rl", seed=1), "cispo").result()
        after.append(each.optim_step(ADAM).result().metrics)
    assert after[0] == after[1]
    assert after[2]["grad_norm"] == after[0]["grad_norm"]
    assert after[2]["update_norm"] != after[0]["update_norm"]
    with pytest.raises(tinker.RequestFailedError, match="exists already"):
        run.save_state("here").result()
    run.save_state("here", overwrite=True).result()
    for bad in ("../up", "a/b", "", ".hidden", "x" * 200):
        with pytest.raises(tinker.RequestFailedError, match="checkpoint name"):
            run.save_state(bad).result()


def test_samples_are_of_the_tempered_distribution_and_depend_on_seed_only(service, run):
    train_a_little(run)
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(PROMPT)
    params = types.SamplingParams(max_tokens=12, temperature=0.7, seed=2**70 + 5, stop=[])
    alone = sampler.sample(prompt, 3, params).result()
    crowd = [
        sampler.sample(types.ModelInput.from_ints(PROMPT[: 2 + i % 5]), 2, types.SamplingParams(max_tokens=9, seed=i))
        for i in range(20)
    ]
    again = sampler.sample(prompt, 3, params).result()
    for future in crowd:
        future.result()
    assert [s.tokens for s in again.sequences] == [s.tokens for s in alone.sequences]
    assert len({tuple(s.tokens) for s in alone.sequences}) > 1
    assert [s.stop_reason for s in alone.sequences] == ["length"] * 3
    assert len({s.sequence_id for s in [*alone.sequences, *again.sequences]}) == 6
    sequence = alone.sequences[0]
    whole = types.ModelInput.from_ints(PROMPT + list(sequence.tokens))
    scored = sampler.sample(whole, 1, types.SamplingParams(max_tokens=1), topk_prompt_logprobs=16,
                            include_prompt_logprobs=True).result()  # fmt: skip
    assert np.isnan(scored.prompt_logprobs_np[0])
    table = np.full((len(PROMPT) + 12, 16), -np.inf)
    for row, (ids, values) in enumerate(
        zip(scored.topk_prompt_logprobs_np.token_ids, scored.topk_prompt_logprobs_np.logprobs, strict=True)
    ):
        table[row, ids] = values
    at = np.arange(1, len(PROMPT) + 12)
    np.testing.assert_allclose(scored.prompt_logprobs_np[1:], table[at, np.array(whole.to_ints())[1:]], atol=1e-6)
    tempered = torch.log_softmax(torch.from_numpy(table[len(PROMPT) :]) / 0.7, -1).numpy()
    np.testing.assert_allclose(sequence.logprobs, tempered[np.arange(12), sequence.tokens], atol=1e-4)


def test_every_sampling_parameter(service):
    sampler = service.create_sampling_client(base_model="Org/Tiny")
    prompt = types.ModelInput.from_ints(PROMPT)
    best = sampler.sample(prompt, 1, greedy()).result().sequences[0]
    assert sampler.sample(prompt, 1, greedy(temperature=1.0, top_k=1)).result().sequences[0].tokens == best.tokens
    assert sampler.sample(prompt, 1, greedy(temperature=1.0, top_p=1e-6)).result().sequences[0].tokens == best.tokens
    stopped = sampler.sample(prompt, 1, greedy(stop=[best.tokens[2]])).result().sequences[0]
    cut = best.tokens.index(best.tokens[2]) + 1
    assert stopped.tokens == best.tokens[:cut] and stopped.stop_reason == "stop"
    text = "0123456789~=?!"
    if best.tokens[1] < len(text):
        word = text[best.tokens[1]]
        by_text = sampler.sample(prompt, 1, greedy(stop=word)).result().sequences[0]
        assert by_text.tokens[-1] == best.tokens[1] and by_text.stop_reason == "stop"
    full = sampler.sample(prompt, 1, greedy(max_tokens=None)).result().sequences[0]
    assert len(PROMPT) + len(full.tokens) == 64  # up to the context
    scored = sampler.sample(prompt, 2, greedy(temperature=0.5, max_tokens=3), topk_sample_logprobs=2).result()
    for sequence in scored.sequences:
        assert sequence.topk_logprobs_np.token_ids.shape == (3, 2)
        for token, logprob, ids, values in zip(
            sequence.tokens, sequence.logprobs, sequence.topk_logprobs_np.token_ids,
            sequence.topk_logprobs_np.logprobs, strict=True,
        ):  # fmt: skip
            assert values[0] >= values[1] and values[0] >= logprob - 1e-5
            if token in ids:
                assert values[list(ids).index(token)] == pytest.approx(logprob, abs=1e-4)


def test_the_sdk_polls_for_a_whole_sampling_session(server, service, monkeypatch):
    """`retrieve_futures`, which the SDK uses where the client config says so (ours does not)."""
    sampler = service.create_sampling_client(base_model="Org/Tiny").result()
    prompt = types.ModelInput.from_ints(PROMPT)
    expected = [s.tokens for s in sampler.sample(prompt, 3, greedy(seed=1, temperature=1.0)).result().sequences]
    config = sampler.holder.get_client_config().model_copy(update={"sample_use_retrieve_futures": True})
    with monkeypatch.context() as patch:
        patch.setattr(type(sampler.holder), "get_client_config", lambda holder: config)
        futures = [sampler.sample(prompt, 3, greedy(seed=1, temperature=1.0)) for _ in range(12)]
        assert all([s.tokens for s in future.result().sequences] == expected for future in futures)
        with pytest.raises(tinker.RequestFailedError, match="num_samples"):
            sampler.sample(prompt, 65, greedy()).result()
        assert sampler._futures_poller is not None
    body = {"target": {"type": "sampling_session", "sampling_session_id": sampler._sampling_session_id}, "timeout": 0}
    poll = "/api/v1/retrieve_futures"
    status, reply = server.request("POST", poll, body)
    found = json.loads(reply)
    assert status == 200 and found["completions"]
    again = json.loads(server.request("POST", poll, {**body, "prev_cursor": found["cursor"]})[1])
    assert again == {"completions": [], "cursor": found["cursor"]}
    assert server.request("POST", poll, body, key=BOB)[0] == 404


def test_what_is_not_served_is_refused_with_a_sentence(server, run):
    session = run.model_id.split(":")[0]
    for method, path, word in (
        ("PUT", f"/api/v1/sessions/{session}/project", b"user_metadata"),
        ("GET", f"/api/v1/sessions/{session}/trace_export", b"/metrics"),
        ("POST", "/api/v1/copy_weights", b"create_training_client_from_state"),
        ("POST", "/api/v1/create_custom_loss", b"forward_backward_custom"),
        ("GET", "/api/v1/auth/apikey/me", b"whoami"),
    ):
        status, reply = server.request(method, path, {} if method != "GET" else None)
        assert status in (404, 422) and word in reply, (method, path, status, reply)
        assert server.request(method, path, {} if method != "GET" else None, key="tml-wrong")[0] == 401


def test_prompt_scores_of_every_kind(service):
    sampler = service.create_sampling_client(base_model="Org/Tiny")
    prompt = types.ModelInput.from_ints(PROMPT)
    whole = sampler.compute_logprobs(prompt).result()
    assert len(whole) == len(PROMPT) and whole[0] is None
    last = sampler.compute_logprobs(prompt, prompt_logprobs_last_n=2).result()
    assert last[:-2] == [None] * 5 and last[-2:] == whole[-2:]
    ids = torch.full((len(PROMPT) - 1, 3), -1)
    ids[:, 1] = torch.tensor(PROMPT[1:])
    for target in (types.TensorData.from_torch(ids), types.TensorData.from_torch_sparse(ids, pad_value=-1)):
        found = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1), target_prompt_logprobs=target).result()
        values = found.target_prompt_logprobs.to_torch()
        np.testing.assert_allclose(values[:, 1], whole[1:], atol=1e-5)
        assert values[:, 0].abs().max() == 0
    drawn = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1, seed=3), prompt_alt_tokens_k=4).result()
    assert drawn.prompt_alt_tokens.tokens.shape == [len(PROMPT) - 1, 4]
    assert (drawn.prompt_alt_tokens.logprobs.to_torch() < 0).all()


def test_bad_sample_requests_are_users_errors_and_others_go_on(service):
    sampler = service.create_sampling_client(base_model="Org/Tiny")
    good = types.ModelInput.from_ints(PROMPT)
    bad = [
        (types.ModelInput.from_ints([99]), 1, greedy(), "outside the vocabulary"),
        (types.ModelInput.from_ints([1] * 64), 1, greedy(), "fills the model's context"),
        (good, 65, greedy(), "num_samples"),
        (good, 1, greedy(max_tokens=0), "max_tokens"),
        (good, 1, greedy(temperature=-1.0), "temperature"),
        (good, 1, greedy(top_p=0.0), "top_p"),
        (good, 1, greedy(top_k=-5), "top_k"),
    ]
    fine = [sampler.sample(good, 1, greedy()) for _ in range(3)]
    for prompt, number, params, message in bad:
        with pytest.raises(tinker.RequestFailedError, match=message):
            sampler.sample(prompt, number, params).result()
    assert len({tuple(f.result().sequences[0].tokens) for f in fine}) == 1


def test_inflight_samplers_of_a_run_share_its_newest_weights(server, service, run):
    prompt = types.ModelInput.from_ints(PROMPT)
    scores = []
    first = None
    for number in range(2):
        train_a_little(run, seed=number)
        seq = {
            "model_id": run.model_id,
            "kind": "inflight",
            "sampling_session_seq_id": 900 + number,
            "seq_id": 500 + number,
        }
        reply = server.request("POST", "/api/v1/save_weights_for_sampler", seq)[1]
        name = server.result(json.loads(reply)["request_id"])["sampling_session_id"]
        first = first or name
        body = {
            "sampling_session_id": first, "seq_id": number, "num_samples": 1, "prompt_logprobs": True,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]}, "sampling_params": {"max_tokens": 1},
        }  # fmt: skip
        request_id = json.loads(server.request("POST", "/api/v1/asample", body)[1])["request_id"]
        status, data = server.request("POST", "/api/v1/retrieve_future", {"request_id": request_id})
        assert status == 200
        scores.append(deserialize_sample_response(data).prompt_logprobs)
    assert scores[0] != scores[1]
    newest = run.save_weights_and_get_sampling_client().result().compute_logprobs(prompt).result()
    assert scores[1][1:] == newest[1:]


# ------------------------------------------------------------------------------------------ several clients, one engine


def test_eight_clients_at_once_get_what_each_would_get_alone(server, tiny_folder):
    """In company or alone: the same to 1e-5, though passes are shared."""

    def job(seed):
        service = tinker.ServiceClient(base_url=server.url, api_key=ALICE)
        run = service.create_lora_training_client(base_model="Org/Tiny", rank=2 + seed % 3, seed=seed).result()
        norms = []
        for step in range(3):
            data = datums("rl", count=2 + seed % 3, seed=10 * seed + step)
            future = run.forward_backward(data, "cispo")
            norms.append(run.optim_step(ADAM).result().metrics["grad_norm"])
            future.result()
        sampler = run.save_weights_and_get_sampling_client().result()
        sampled = sampler.sample(types.ModelInput.from_ints(PROMPT), 4, greedy(max_tokens=12)).result()
        return norms, [s.tokens for s in sampled.sequences]

    alone = [job(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(job, range(8)))
    for (a, one), (b, other) in zip(alone, together, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        assert one == other


def test_two_hundred_sample_requests_at_once(service, run):
    sampler = run.save_weights_and_get_sampling_client().result()
    futures = [
        sampler.sample(types.ModelInput.from_ints(PROMPT[: 1 + i % 7]), 2, types.SamplingParams(max_tokens=4, seed=i))
        for i in range(200)
    ]
    assert all(len(future.result().sequences) == 2 for future in futures)


# ------------------------------------------------------------------------------------------------- tenants and the REST


def test_a_key_is_needed_and_each_sees_only_its_own(server, service, run):
    status, body = server.request("POST", "/api/v1/client/config", {"sdk_version": "0.38.0"}, key="tml-wrong")
    assert status == 401 and b"TINKER_API_KEY" in body
    path = run.save_weights_for_sampler("mine").result().path
    sampler = service.create_sampling_client(model_path=path)
    session = run.model_id.split(":")[0]
    sampler_id = json.loads(server.request("GET", f"/api/v1/sessions/{session}")[1])["sampler_ids"][-1]
    assert sampler.get_base_model() == "Org/Tiny"
    step = {"model_id": run.model_id, "seq_id": 99, "adam_params": {}}
    tries = [
        ("GET", f"/api/v1/training_runs/{run.model_id}", None),
        ("GET", f"/api/v1/training_runs/{run.model_id}/checkpoints", None),
        ("DELETE", f"/api/v1/training_runs/{run.model_id}/checkpoints/sampler_weights/mine", None),
        ("GET", f"/api/v1/sessions/{session}", None),
        ("GET", f"/api/v1/samplers/{sampler_id}", None),
        ("POST", "/api/v1/optim_step", step),
        ("POST", "/api/v1/get_info", {"model_id": run.model_id}),
        ("POST", "/api/v1/session_heartbeat", {"session_id": session}),
        ("POST", "/api/v1/weights_info", {"tinker_path": path}),
        ("POST", "/api/v1/save_weights", {"model_id": run.model_id, "path": "x", "seq_id": 98}),
    ]
    for method, url, body in tries:
        status, reply = server.request(method, url, body, key=BOB)
        assert status == 404 and b"does not exist" in reply, (method, url, reply)
    assert run.model_id.encode() not in server.request("GET", "/api/v1/training_runs", key=BOB)[1]
    other = tinker.ServiceClient(base_url=server.url, api_key=BOB)
    with pytest.raises(tinker.RequestFailedError, match="does not exist"):
        other.create_training_client_from_state(path).result()
    run.get_info()


def test_rest_lists_publishes_expires_and_deletes(server, service, run):
    train_a_little(run)
    state, sampler = (
        run.save_state("s1").result().path,
        run.save_weights_for_sampler("w1", ttl_seconds=3600).result().path,
    )
    rest = tinker.RestClient(base_url=server.url, api_key=ALICE)
    found = {c.tinker_path: c for c in rest.list_checkpoints(run.model_id).result().checkpoints}
    assert set(found) == {state, sampler}
    assert found[sampler].expires_at is not None and found[state].checkpoint_type == "training"
    one = rest.get_training_run(run.model_id).result()
    assert one.last_checkpoint.tinker_path == state and one.lora_rank == 4 and one.base_model == "Org/Tiny"
    assert run.model_id in {r.training_run_id for r in rest.list_training_runs().result().training_runs}
    info = rest.get_weights_info_by_tinker_path(state).result()
    assert (info.base_model, info.is_lora, info.lora_rank) == ("Org/Tiny", True, 4)
    rest.set_checkpoint_ttl_from_tinker_path(state, 7200).result()
    rest.publish_checkpoint_from_tinker_path(state).result()
    bob = tinker.ServiceClient(base_url=server.url, api_key=BOB)
    assert bob.create_training_client_from_state(state).result().get_info().lora_rank == 4
    rest.unpublish_checkpoint_from_tinker_path(state).result()
    with pytest.raises(tinker.RequestFailedError, match="does not exist"):
        bob.create_training_client_from_state(state).result()
    rest.delete_checkpoint_from_tinker_path(state).result()
    assert {c.tinker_path for c in rest.list_checkpoints(run.model_id).result().checkpoints} == {sampler}
    session = run.model_id.split(":")[0]
    assert session in rest.list_sessions().result().sessions
    assert run.model_id in rest.get_session(session).result().training_run_ids


def test_an_export_is_a_peft_adapter(server, run, tmp_path, tiny_folder):
    peft = pytest.importorskip("peft")
    import urllib.request

    train_a_little(run)
    run.save_weights_external("out").result()
    url = f"/api/v1/training_runs/{run.model_id}/checkpoints/external_weights/out/external_weights_urls"
    for name, link in json.loads(server.request("GET", url)[1])["urls"].items():
        with urllib.request.urlopen(link) as reply:
            (tmp_path / name).write_bytes(reply.read())
    base = models.load(ModelConfig(), tiny_folder, trainable=False).model
    adapted = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        logits = adapted(input_ids=torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    sampler = run.save_weights_and_get_sampling_client().result()
    served = sampler.compute_logprobs(types.ModelInput.from_ints(PROMPT)).result()[1:]
    expected = logits[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    np.testing.assert_allclose(served, expected, atol=1e-4)
    assert server.request("GET", link.removeprefix(server.url)[:-1] + "0")[0] in (404, 200)


def test_limits(server, service):
    status, body = server.request("POST", "/api/v1/telemetry", b"x" * (5 << 20))
    assert status == 413
    sampler = service.create_sampling_client(base_model="Org/Tiny")
    assert sampler is not None
    assert server.request("POST", "/api/v1/telemetry", {"events": [{"x-api-key": ALICE}]}) == (
        200,
        b'{"status": "accepted"}',
    )


def test_operations_say_how_it_goes_and_no_secret(server, run):
    train_a_little(run)
    status, body = server.request("GET", "/metrics", key="none")
    assert status == 200
    text = body.decode()
    assert 'cispo_requests_finished_total{kind="optim_step",status="json"}' in text
    assert "cispo_trained_tokens_total" in text and run.model_id not in text
    assert json.loads(server.request("GET", "/healthz", key="none")[1]) == {"status": "ok"}
    page = server.request("GET", "/", key="none")[1].decode()
    assert page.startswith("<!doctype html>")
    overview = json.loads(server.request("GET", "/api/v1/overview")[1])
    mine = next(r for r in overview["runs"] if r["training_run_id"] == run.model_id)
    assert mine["curve"][-1]["loss:sum"] and "grad_norm" in mine["curve"][-1]
    assert not any(key in line for line in server.lines for key in (ALICE, BOB))
    rest = json.loads(server.request("GET", "/api/v1/overview", key=BOB)[1])
    assert run.model_id not in json.dumps(rest)


def test_status_of_a_running_server_and_of_none(server, capsys):
    from cispo.cli import main
    from cispo.server import ServeOptions, status

    assert status(ServeOptions(port=server.options["port"])) == 0
    assert "ok" in capsys.readouterr().out
    assert status(ServeOptions(port=1)) == 1
    assert "no server answers" in capsys.readouterr().out
    for words in (["--status"], ["--status", "True"]):
        assert main(["serve", *words, "--port", str(server.options["port"])]) == 0
        assert "sessions alive" in capsys.readouterr().out


def test_the_benchmark_tells_overhead_where_the_server_says_how_long_it_computed(server):
    from cispo.bench.server import ServerBenchOptions, compute_clock, measure

    clock = compute_clock(server.url)
    options = ServerBenchOptions(
        base_model="Org/Tiny", rank=2, batch=2, length=8, max_tokens=4, repeats=3, clients=2, steps=1, rounds=1,
        concurrent_samples=4,
    )  # fmt: skip
    before = clock()
    numbers = measure(options, lambda: tinker.ServiceClient(base_url=server.url, api_key=ALICE), clock)
    assert clock() > before
    for verb in ("forward_backward", "optim_step", "save + sampler", "sample"):
        assert 0 < numbers[f"{verb}, overhead"] < numbers[f"{verb}, median"] + 1
    assert compute_clock("http://127.0.0.1:9") is None  # a server that does not say
    foreign = measure(options, lambda: tinker.ServiceClient(base_url=server.url, api_key=ALICE), None)
    assert set(numbers) - set(foreign) == {name for name in numbers if name.endswith("overhead")}
