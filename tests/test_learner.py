"""The learner: gradients that no layout can change, and states that come back bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cispo import model as models
from cispo import objectives
from cispo.batching import make_batch, take_rows, with_columns, with_reduction
from cispo.config import AlgorithmConfig, KLConfig, LearnerConfig, LoraConfig, ModelConfig
from cispo.learner import LocalLearner
from cispo.types import AdamParams, NonFiniteError, Trajectory

OBJECTIVE = objectives.bind(AlgorithmConfig())


def rollout(lengths, *, seed=0, prompt=3, vocabulary=14):
    """Random trajectories with unequal lengths and nearly on-policy sampler log-probs."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        total = prompt + length
        rows.append(
            Trajectory(
                tokens=torch.randint(0, vocabulary, (total,), generator=generator),
                action_mask=torch.arange(total) >= prompt,
                sampler_logprobs=-3.0 + torch.rand(total, generator=generator),
                versions=torch.zeros(total, dtype=torch.long),
                text="",
                reward=0.0,
                rewards={},
                truncated=False,
            )
        )
    advantages = torch.randn(len(lengths), generator=generator).tolist()
    batch = make_batch(rows, advantages)
    batch = with_columns(batch, anchor_logprobs=batch.columns["sampler_logprobs"])
    return with_reduction(batch, "prompt", [i // 2 for i in range(len(rows))])


def gradients(learner):
    return {name: p.grad.clone() for name, p in learner.model.named_parameters() if p.grad is not None}


def relative(a, b):
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-12)) for n in b)


def reference_gradients(model, batch, objective):
    """Float64 autograd over full logits, one row at a time, without any of our layout or head."""
    model = model.double()
    model.zero_grad()
    start = 0
    for row in batch.rows:
        stop = start + len(row)
        logprobs = model(row[None]).logits[0].log_softmax(-1).gather(1, batch.targets_T[start:stop, None])[:, 0]
        keep = batch.weights_T[start:stop] != 0
        columns = {n: batch.columns[n][start:stop][keep].double() for n in ("anchor_logprobs", "advantages")}
        (batch.weights_T[start:stop][keep].double() * objective(logprobs[keep], **columns)).sum().backward()
        start = stop
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradients_equal_float64_autograd(tiny_folder):
    batch = rollout([1, 5, 9, 2, 30])
    loaded = models.load(ModelConfig(), tiny_folder)
    learner = LocalLearner(loaded)
    learner.forward_backward(batch, OBJECTIVE)
    expected = reference_gradients(models.load(ModelConfig(), tiny_folder).model, batch, OBJECTIVE)
    assert relative({n: g.double() for n, g in gradients(learner).items()}, expected) < 1e-5


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 25), min_size=2, max_size=9),
    tokens=st.integers(10, 400),
    share=st.floats(0, 1),
    cut=st.integers(0, 9),
)
def test_micro_batches_accumulation_and_padding_do_not_change_the_gradient(tiny, lengths, tokens, share, cut):
    batch = rollout(lengths)
    whole = LocalLearner(tiny)
    whole.zero_grad()
    loss = whole.forward_backward(batch, OBJECTIVE).loss
    expected = gradients(whole)
    parts = LocalLearner(tiny, LearnerConfig(micro_batch_tokens=tokens, max_padding_share=share))
    parts.zero_grad()
    cut = min(cut, len(lengths))
    halves = [take_rows(batch, range(cut)), take_rows(batch, range(cut, len(lengths)))]
    total = sum(parts.forward_backward(half, OBJECTIVE).loss for half in halves)
    assert relative(gradients(parts), expected) < 1e-4
    assert total == pytest.approx(loss, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("garbage", [1e4, -1e4, float("nan"), float("inf"), float("-inf")])
def test_garbage_at_untrained_positions_changes_nothing_bit_for_bit(tiny, garbage):
    batch = rollout([4, 7])
    learner = LocalLearner(tiny)
    clean = learner.forward_backward(batch, OBJECTIVE)
    expected = gradients(learner)
    learner.zero_grad()
    untrained = batch.weights_T == 0
    dirty = with_columns(batch, **{n: torch.where(untrained, garbage, c) for n, c in batch.columns.items()})
    output = learner.forward_backward(dirty, OBJECTIVE)
    assert output.loss == clean.loss
    assert torch.equal(output.logprobs_T, clean.logprobs_T)
    assert all(torch.equal(gradients(learner)[n], expected[n]) for n in expected)


def test_a_non_finite_value_at_a_trained_position_stops_or_is_dropped_and_counted(tiny):
    batch = rollout([4, 7])
    anchor = batch.columns["anchor_logprobs"].clone()
    anchor[5] = float("nan")
    batch = with_columns(batch, anchor_logprobs=anchor)
    learner = LocalLearner(tiny)
    with pytest.raises(NonFiniteError, match="anchor_logprobs"):
        learner.forward_backward(batch, OBJECTIVE)
    assert not gradients(learner)
    output = learner.forward_backward(batch, OBJECTIVE, nonfinite="drop")
    assert output.dropped == 1
    assert not output.evaluated_T[5] and int(output.evaluated_T.sum()) == 10  # and so in no metric
    assert all(bool(torch.isfinite(g).all()) for g in gradients(learner).values())


def test_log_probs_and_entropy_equal_the_models_own(tiny):
    batch = rollout([3, 8])
    output = LocalLearner(tiny).forward(batch, temperature=0.7)
    start = 0
    for row in batch.rows:
        stop = start + len(row)
        logits = tiny.model(row[None]).logits[0].double() / 0.7
        logprobs = logits.log_softmax(-1)
        keep = output.evaluated_T[start:stop]
        expected = logprobs.gather(1, batch.targets_T[start:stop, None])[:, 0]
        assert torch.allclose(output.logprobs_T[start:stop][keep].double(), expected[keep], atol=1e-5)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        assert torch.allclose(output.entropy_T[start:stop][keep].double(), entropy[keep], atol=1e-5)
        start = stop


def test_a_step_is_adamw_with_decay_on_matrices_only(tiny):
    learner = LocalLearner(tiny)
    twin = {n: p.detach().clone().requires_grad_() for n, p in tiny.model.named_parameters()}
    groups = [
        {"params": [p for p in twin.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in twin.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-15)
    for _ in range(3):
        learner.forward_backward(rollout([4, 7, 2]), OBJECTIVE)
        for name, gradient in gradients(learner).items():
            twin[name].grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(twin.values(), 0.01)
        optimizer.step()
        stats = learner.optim_step(AdamParams(1e-3, weight_decay=0.1, grad_clip_norm=0.01))
        assert stats["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    for name, parameter in tiny.model.named_parameters():
        assert torch.allclose(parameter, twin[name], rtol=1e-4, atol=1e-6), name


def test_save_and_load_continue_bit_for_bit(tiny_folder, tmp_path):
    batches = [rollout([4, 7, 2], seed=s) for s in range(4)]

    def steps(learner, chosen):
        for batch in chosen:
            learner.forward_backward(batch, OBJECTIVE)
            learner.optim_step(AdamParams(1e-3))

    straight = LocalLearner(models.load(ModelConfig(), tiny_folder))
    steps(straight, batches[:2])
    straight.save(tmp_path)
    steps(straight, batches[2:])
    resumed = LocalLearner(models.load(ModelConfig(), tiny_folder))
    resumed.load(tmp_path)
    steps(resumed, batches[2:])
    for (name, a), b in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_bfloat16_weights_train_through_float32_masters(tiny_folder):
    """An update far below bfloat16's resolution is not lost, and accumulates."""
    loaded = models.load(ModelConfig(dtype="bfloat16"), tiny_folder)
    learner = LocalLearner(loaded, head_dtype=torch.float32)
    before = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    batch = rollout([4, 7, 2])
    for _ in range(100):
        learner.forward_backward(batch, OBJECTIVE)
        learner.optim_step(AdamParams(1e-5))
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (dict(loaded.model.named_parameters())[name] - before[name]).abs().max()
    assert loaded.model.dtype == torch.bfloat16
    assert 1e-4 < float(moved) < 1e-2


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
def test_lora_trains_only_its_adapter_and_the_reference_is_the_model_without_it(tiny_folder, tmp_path, targets):
    pytest.importorskip("peft")
    plain = LocalLearner(models.load(ModelConfig(), tiny_folder))
    torch.manual_seed(0)
    loaded = models.load(ModelConfig(lora=LoraConfig(rank=2, target_modules=targets)), tiny_folder)
    learner = LocalLearner(loaded)
    batch = rollout([4, 7, 2])
    base = plain.forward(batch).logprobs_T
    for _ in range(3):
        learner.forward_backward(batch, OBJECTIVE)
        assert all("lora_" in name for name in gradients(learner))
        learner.optim_step(AdamParams(1e-2))
    tuned = learner.forward(batch).logprobs_T
    assert float((tuned - base).abs().max()) > 1e-3
    assert torch.allclose(learner.forward(batch, reference=True).logprobs_T, base, atol=1e-5)

    learner.export(tmp_path / "merged")
    merged = LocalLearner(models.load(ModelConfig(), tmp_path / "merged"))
    assert torch.allclose(merged.forward(batch).logprobs_T, tuned, atol=1e-4)
    learner.save(tmp_path / "saved")
    again = LocalLearner(models.load(ModelConfig(lora=LoraConfig(rank=2, target_modules=targets)), tiny_folder))
    again.load(tmp_path / "saved")
    assert torch.equal(again.forward(batch).logprobs_T, tuned)


def test_gradient_checkpointing_does_not_change_the_gradient(tiny_folder):
    batch = rollout([4, 7, 2])
    found = []
    for checkpointing in (False, True):
        learner = LocalLearner(models.load(ModelConfig(gradient_checkpointing=checkpointing), tiny_folder))
        learner.forward_backward(batch, OBJECTIVE)
        found.append(gradients(learner))
    assert relative(found[1], found[0]) < 1e-5


def test_a_kl_penalty_reads_the_reference_column(tiny):
    batch = rollout([4, 7])
    learner = LocalLearner(tiny)
    own = learner.forward(batch).logprobs_T
    penalised = objectives.bind(AlgorithmConfig(kl=KLConfig(coef=0.5, form="k2")))
    plain = learner.forward_backward(batch, OBJECTIVE).loss
    learner.zero_grad()
    loss = learner.forward_backward(with_columns(batch, reference_logprobs=own - 0.2), penalised).loss
    assert loss - plain == pytest.approx(0.5 * 0.2**2 / 2, rel=1e-3)
