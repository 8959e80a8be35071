"""Every backend of the head against the float64 reference: one grid of backends × dtypes × awkward shapes.

A CUDA device adds rows to the grid, and so does Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest`.
"""

import importlib.util
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from cispo import objectives as o
from cispo.head import linear_logprobs, linear_policy_loss
from cispo.head.matmul import onednn_is_better
from cispo.types import ConfigError, DataError, NonFiniteError

BACKENDS = [("reference", "cpu"), ("chunked", "cpu")]
if importlib.util.find_spec("triton") is None:
    BACKENDS += [pytest.param("triton", "cpu", marks=pytest.mark.skip("the package triton is not installed"))]
elif os.environ.get("TRITON_INTERPRET") == "1":
    BACKENDS += [("triton", "cpu")]
elif not torch.cuda.is_available():
    BACKENDS += [pytest.param("triton", "cpu", marks=pytest.mark.skip("needs CUDA, or TRITON_INTERPRET=1"))]
if torch.cuda.is_available():
    BACKENDS += [("chunked", "cuda"), ("triton", "cuda")]

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""Allowed relative error (Frobenius norm) of loss, dHidden and dHead against float64 on the same inputs."""

OBJECTIVES = {
    "cispo": o.cispo,
    "unified": partial(o.unified, mask_low_threshold=0.8, mask_high_threshold=1.2),
    "ppo_clip": o.ppo_clip,
    "ppo_dual_clip": partial(o.ppo_clip, dual_clip=3.0),
    "importance_sampling": o.importance_sampling,
    "dro": partial(o.dro, beta=0.1),
    "reinforce": lambda logprobs, *, anchor_logprobs, advantages: o.reinforce(logprobs, advantages=advantages),
    "cross_entropy": lambda logprobs, *, anchor_logprobs, advantages: o.cross_entropy(logprobs),
    "user": lambda logprobs, *, anchor_logprobs, advantages: (logprobs - anchor_logprobs).square() * advantages,
}


def make(T=37, D=24, V=101, dtype=torch.float32, device="cpu", seed=0, scale=1.0, bias=False, spread=0.5):
    """Inputs whose ratios to the anchor spread around 1 by about exp(±spread)."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=g).to(dtype)
    head = (torch.randn(V, D, generator=g) * scale / D**0.5).to(dtype)
    targets = torch.randint(V, (T,), generator=g)
    inputs = {"hidden_TD": hidden, "head_VD": head, "targets_T": targets}
    inputs["bias_V"] = torch.randn(V, generator=g).to(dtype) if bias else None
    with torch.no_grad():
        logprobs, _ = linear_logprobs(**inputs, backend="reference")
    columns = {
        "anchor_logprobs": (logprobs + spread * torch.randn(T, generator=g)).float(),
        "advantages": torch.randn(T, generator=g),
    }
    weights = torch.rand(T, generator=g) / T
    move = lambda x: None if x is None else x.to(device)  # noqa: E731
    return (
        {k: move(v) for k, v in inputs.items()},
        {"columns": {k: move(v) for k, v in columns.items()}, "weights_T": move(weights)},
    )


def run(inputs, call, **options):
    """Value, detached outputs and gradients of one call."""
    inputs = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in inputs.items() if v is not None}
    out = linear_policy_loss(**inputs, **call, **options)
    out.loss.backward()
    grads = {k: v.grad for k, v in inputs.items() if v.is_floating_point()}
    assert all(grads[k].dtype == inputs[k].dtype for k in grads)
    return out, grads


def in_float64(inputs, call):
    wide = lambda x: x if x is None or not x.is_floating_point() else x.double().cpu()  # noqa: E731
    cpu = {k: None if v is None else wide(v).cpu() for k, v in inputs.items()}
    return cpu, {"columns": {k: v.cpu() for k, v in call["columns"].items()}, "weights_T": wide(call["weights_T"])}


def relative(got, want):
    want = want.double()
    return ((got.double().cpu() - want).norm() / want.norm().clamp_min(1e-30)).item()


def assert_matches_float64(inputs, call, tolerance, **options):
    backend = options.pop("backend")
    out, grads = run(inputs, call, backend=backend, **options)
    want, want_grads = run(*in_float64(inputs, call), backend="reference", **options)
    assert relative(out.logprobs_T, want.logprobs_T) <= tolerance
    # the entropy is a log-sum-exp minus a mean logit: its error is measured against the largest logits
    size = out.logprobs_T.abs().max().item() + 1
    assert (out.entropy_T.cpu() - want.entropy_T).abs().max() <= size * tolerance
    # the loss is a signed sum: its error is measured against the sum of magnitudes
    magnitude = (call["weights_T"].cpu().double() * want.loss_T).abs().sum().clamp_min(1e-30)
    assert abs(out.loss.item() - want.loss.item()) / magnitude <= tolerance
    for name, grad in grads.items():
        assert relative(grad, want_grads[name]) <= tolerance, name
    return out, grads


SHAPES = {
    "plain": {},
    "one token": {"T": 1},
    "one token of vocabulary": {"V": 1},
    "V a power of two": {"V": 128},
    "V larger than a block": {"T": 8, "D": 32, "V": 300_001},
    "bias": {"bias": True},
    "confident": {"scale": 20.0},
    "ratios far from one": {"spread": 6.0},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_value_and_gradient_match_float64(backend, device, dtype, shape):
    inputs, call = make(dtype=dtype, device=device, **SHAPES[shape])
    # a logit of 60 is known in float32 to 4e-6, and its softmax no better
    inherent = 4 if shape == "confident" and dtype != torch.bfloat16 else 1
    assert_matches_float64(inputs, call, inherent * DTYPES[dtype], backend=backend, objective=o.cispo)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_every_objective_runs_on_every_backend(backend, device, dtype, name):
    inputs, call = make(dtype=dtype, device=device)
    # a ratio at a clip bound may fall on different sides in two precisions: keep ratios away from 0.8, 1.2 and 3
    logp = linear_logprobs(**inputs, backend="reference")[0].detach().float()
    away = torch.tensor([0.5, 1.0, 2.0, 5.0], device=device)[torch.arange(len(logp), device=device) % 4]
    call["columns"]["anchor_logprobs"] = logp - away.log()
    assert_matches_float64(inputs, call, DTYPES[dtype], backend=backend, objective=OBJECTIVES[name])


@pytest.mark.parametrize("entropy_coef", [0.0, 0.03])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_chunking_temperature_and_entropy_bonus(backend, device, rows, temperature, entropy_coef):
    inputs, call = make(device=device, bias=True)
    call["weights_T"][::5] = 0
    call["columns"]["advantages"][::3] = 0
    options = {"temperature": temperature, "entropy_coef": entropy_coef, "memory_budget": rows * 101 * 4}
    assert_matches_float64(inputs, call, 2e-6, backend=backend, objective=o.cispo, **options)


@pytest.mark.parametrize("shape", ["plain", "bias", "one token", "V a power of two", "confident"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_budget_of_a_single_row(backend, device, dtype, shape):
    inputs, call = make(dtype=dtype, device=device, **SHAPES[shape])
    tolerance = DTYPES[dtype] * (4 if shape == "confident" and dtype != torch.bfloat16 else 1)
    assert_matches_float64(inputs, call, tolerance, backend=backend, objective=o.cispo, memory_budget=1)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_one_logit_may_be_minus_infinity(backend, device):
    inputs, call = make(device=device, bias=True)
    inputs["bias_V"][5] = -torch.inf
    inputs["targets_T"][inputs["targets_T"] == 5] = 6
    inputs["targets_T"][0] = 100  # V - 1
    call["columns"]["anchor_logprobs"] = linear_logprobs(**inputs, backend="reference")[0].detach() + 0.3
    _, grads = assert_matches_float64(inputs, call, 2e-6, backend=backend, objective=o.cispo, entropy_coef=0.01)
    assert grads["bias_V"][5] == 0 and not grads["head_VD"][5].any()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_logits_of_ten_thousand(backend, device):
    inputs, call = make(device=device)
    inputs["head_VD"] *= 1e4
    call["columns"]["anchor_logprobs"] = torch.zeros(37, device=device)
    _, grads = run(inputs, call, backend=backend, objective=OBJECTIVES["reinforce"])
    _, want = run(*in_float64(inputs, call), backend="reference", objective=OBJECTIVES["reinforce"])
    for name in grads:
        assert relative(grads[name], want[name]) <= 1e-5


@pytest.mark.parametrize("nonfinite", ["raise", "drop"])
@pytest.mark.parametrize("garbage", [1e4, -1e4, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_garbage_at_untrained_rows_changes_nothing_bit_for_bit(backend, device, garbage, nonfinite):
    inputs, call = make(device=device)
    call["weights_T"][3::4] = 0
    options = {"backend": backend, "objective": o.cispo, "nonfinite": nonfinite, "entropy_coef": 0.01}
    clean, clean_grads = run(inputs, call, **options)
    for x in (inputs["hidden_TD"], *call["columns"].values()):
        x[3::4] = garbage
    inputs["targets_T"][3::4] = -100
    out, grads = run(inputs, call, **options)
    assert out.dropped == 0
    for got, want in zip((out.loss, out.logprobs_T, out.entropy_T), (clean.loss, clean.logprobs_T, clean.entropy_T)):
        assert torch.equal(got, want)
    for name in grads:
        assert torch.equal(grads[name], clean_grads[name])
    assert not grads["hidden_TD"][3::4].any() and not out.logprobs_T[3::4].any()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_all_rows_masked(backend, device):
    inputs, call = make(device=device)
    inputs["hidden_TD"][:] = torch.nan
    call["weights_T"][:] = 0
    out, grads = run(inputs, call, backend=backend, objective=o.cispo)
    assert out.loss.item() == 0 and not any(g.any() for g in grads.values())
    empty = {k: v if k == "head_VD" else v[:0] for k, v in inputs.items() if v is not None}
    none = {"columns": {k: v[:0] for k, v in call["columns"].items()}, "weights_T": call["weights_T"][:0]}
    out, grads = run(empty, none, backend=backend, objective=o.cispo)
    assert out.loss.item() == 0 and out.logprobs_T.shape == (0,) and not grads["head_VD"].any()


POISON = {
    "columns['anchor_logprobs']": lambda inputs, call: call["columns"]["anchor_logprobs"].__setitem__(7, torch.nan),
    "columns['advantages']": lambda inputs, call: call["columns"]["advantages"].__setitem__(7, torch.inf),
    "weights_T": lambda inputs, call: call["weights_T"].__setitem__(7, torch.nan),
    "log-prob": lambda inputs, call: inputs["hidden_TD"][7].__setitem__(0, torch.nan),
}


@pytest.mark.parametrize("quantity", POISON)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_non_finite_value_at_a_trained_row_stops_or_is_dropped(backend, device, quantity):
    inputs, call = make(device=device)
    without = call["weights_T"].clone()
    without[7] = 0
    want, want_grads = run(inputs, call | {"weights_T": without}, backend=backend, objective=o.cispo)
    POISON[quantity](inputs, call)
    with pytest.raises(NonFiniteError, match=r"row 7\b") as e:
        run(inputs, call, backend=backend, objective=o.cispo)
    assert quantity in str(e.value)
    out, grads = run(inputs, call, backend=backend, objective=o.cispo, nonfinite="drop")
    assert out.dropped == 1
    torch.testing.assert_close(out.loss, want.loss)
    assert torch.equal(out.logprobs_T, want.logprobs_T)
    assert not grads["hidden_TD"][7].any()
    for name in grads:
        torch.testing.assert_close(grads[name], want_grads[name])


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_non_finite_loss_or_derivative_is_named(backend, device):
    inputs, call = make(device=device)
    with pytest.raises(NonFiniteError, match="the loss is nan at row 0"):
        run(inputs, call, backend=backend, objective=lambda x, **_: x.sqrt())
    with pytest.raises(NonFiniteError, match="derivative in the log-prob is not finite at row 0"):
        run(inputs, call, backend=backend, objective=lambda x, **_: (x - x.detach()).sqrt())


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_evaluate_chooses_rows_beyond_the_trained_ones(backend, device):
    inputs, call = make(device=device)
    call["weights_T"][::2] = 0
    call["columns"]["advantages"][::2] = torch.nan
    call["columns"]["advantages"][1] = 0
    evaluate = torch.ones(37, dtype=torch.bool, device=device)
    evaluate[1] = False
    out, grads = run(inputs, call, backend=backend, objective=o.cispo, evaluate_T=evaluate)
    want, want_grads = run(inputs, call, backend=backend, objective=o.cispo)
    torch.testing.assert_close(out.loss, want.loss)
    for name in grads:
        torch.testing.assert_close(grads[name], want_grads[name])
    full, _ = linear_logprobs(**inputs, backend=backend)
    full[1] = 0
    torch.testing.assert_close(out.logprobs_T, full.detach())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), parts=st.integers(1, 5))
def test_gradients_add_over_micro_batches(seed, parts):
    inputs, call = make(seed=seed, dtype=torch.float64)
    _, want = run(inputs, call, backend="chunked", objective=o.cispo)
    total = torch.zeros_like(want["head_VD"])
    for rows in torch.arange(37).chunk(parts):
        part = {k: v if k == "head_VD" else v[rows] for k, v in inputs.items() if v is not None}
        columns = {k: v[rows] for k, v in call["columns"].items()}
        _, grads = run(part, {"columns": columns, "weights_T": call["weights_T"][rows]}, objective=o.cispo)
        total += grads["head_VD"]
        torch.testing.assert_close(grads["hidden_TD"], want["hidden_TD"][rows])
    torch.testing.assert_close(total, want["head_VD"])


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_an_upstream_gradient_scales_and_retain_graph_works(backend, device):
    inputs, call = make(device=device)
    _, want = run(inputs, call, backend=backend, objective=o.cispo)
    hidden, head = (inputs[k].clone().requires_grad_() for k in ("hidden_TD", "head_VD"))
    out = linear_policy_loss(hidden, head, inputs["targets_T"], **call, backend=backend, objective=o.cispo)
    (out.loss * -3).backward(retain_graph=True)
    torch.testing.assert_close(head.grad, -3 * want["head_VD"])
    out.loss.backward()
    torch.testing.assert_close(hidden.grad, -2 * want["hidden_TD"])


def test_only_what_requires_a_gradient_gets_one():
    inputs, call = make()
    hidden = inputs["hidden_TD"].clone().requires_grad_()
    out = linear_policy_loss(hidden, inputs["head_VD"], inputs["targets_T"], **call, objective=o.cispo)
    out.loss.backward()
    _, want = run(inputs, call, objective=o.cispo)
    assert torch.equal(hidden.grad, want["hidden_TD"]) and inputs["head_VD"].grad is None
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            evaluated = linear_policy_loss(hidden, inputs["head_VD"], inputs["targets_T"], **call, objective=o.cispo)
        assert not evaluated.loss.requires_grad and torch.equal(evaluated.loss, out.loss)


def test_the_gradient_becomes_grad_without_a_copy():
    inputs, call = make()
    head = inputs["head_VD"].requires_grad_()
    out = linear_policy_loss(inputs["hidden_TD"], head, inputs["targets_T"], **call, objective=o.cispo)
    (kept,) = (x for x in out.loss.grad_fn.saved_tensors if x is not None)
    address = kept.data_ptr()
    del kept
    out.loss.backward()
    assert head.grad.data_ptr() == address


def test_a_tied_head_gets_the_sum_of_both_gradients():
    inputs, call = make()
    embedding = inputs["head_VD"].clone().requires_grad_()
    tokens = torch.arange(37) % 101
    grads = []
    for backend in ("reference", "chunked"):
        out = linear_policy_loss(
            embedding[tokens], embedding.view(101, 24), inputs["targets_T"], **call, objective=o.cispo, backend=backend
        )
        grads += torch.autograd.grad(out.loss, embedding)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_are_differentiable_for_sequence_level_objectives(backend, device, dtype):
    inputs, _ = make(dtype=dtype, device=device, bias=True)
    grads = []
    for name, x in ((backend, inputs), ("reference", in_float64(inputs, make()[1])[0])):
        x = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in x.items()}
        logp, entropy = linear_logprobs(**x, temperature=1.3, backend=name, memory_budget=9 * 404)
        assert not entropy.requires_grad
        # GSPO's shape: the exponential of a mean over half of the rows
        (logp[::2].mean().exp() * 7).backward()
        grads.append([logp.detach()] + [x[k].grad for k in ("hidden_TD", "head_VD", "bias_V")])
    for got, want in zip(*grads):
        assert relative(got, want) <= DTYPES[dtype]


def test_a_bf16_head_can_run_in_float32_and_autocast_is_followed():
    inputs, call = make(dtype=torch.bfloat16, scale=5.0)
    assert_matches_float64(inputs, call, 4e-3, backend="chunked", objective=o.cispo, compute_dtype=torch.float32)
    mixed = inputs | {"head_VD": inputs["head_VD"].float()}
    with pytest.raises(DataError, match="head_VD: dtype torch.float32 differs"):
        run(mixed, call, objective=o.cispo)
    run(mixed, call, objective=o.cispo, compute_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = run(mixed, call, objective=o.cispo)
    want, want_grads = run(inputs, call, objective=o.cispo)
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(grads["head_VD"].bfloat16(), want_grads["head_VD"])


def test_gradient_checkpointing_around_the_head():
    inputs, call = make()
    hidden = inputs["hidden_TD"].clone().requires_grad_()

    def body(hidden):
        return linear_policy_loss(hidden * 2, inputs["head_VD"], inputs["targets_T"], **call, objective=o.cispo).loss

    (want,) = torch.autograd.grad(body(hidden), hidden)
    torch.utils.checkpoint.checkpoint(body, hidden, use_reentrant=False).backward()
    assert torch.equal(hidden.grad, want)


def test_inside_a_compiled_function():
    inputs, call = make()
    hidden = inputs["hidden_TD"].clone().requires_grad_()

    def body(hidden):
        return linear_policy_loss(hidden * 2, inputs["head_VD"], inputs["targets_T"], **call, objective=o.cispo).loss

    (want,) = torch.autograd.grad(body(hidden), hidden)
    (got,) = torch.autograd.grad(torch.compile(body, backend="aot_eager")(hidden), hidden)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_three_products_and_fewer_where_coefficients_are_zero(dtype):
    inputs, call = make(T=40, dtype=dtype)
    one = 2 * 40 * 24 * 101
    onednn_is_better()  # its check multiplies too, once

    def products(**options):
        with FlopCounterMode(display=False) as counter:
            run(inputs, call, objective=o.cispo, **options)
        return counter.get_total_flops() / one

    assert products() == 3
    assert products(memory_budget=7 * 101 * 4) == 3
    call["columns"]["advantages"][::2] = 0
    assert products() == 1 + 2 * 0.5
    assert products(evaluate_T=call["columns"]["advantages"] != 0) == 3 * 0.5
    call["columns"]["advantages"][:] = 0
    assert products() == 1


def test_a_sharded_head_is_refused_with_the_remedy(tmp_path):
    inputs, call = make()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        head = torch.distributed.tensor.distribute_tensor(inputs["head_VD"], mesh)
        with pytest.raises(DataError, match="head_VD: is a sharded DTensor; gather it first"):
            linear_policy_loss(**inputs | {"head_VD": head}, **call, objective=o.cispo)
    finally:
        torch.distributed.destroy_process_group()


PEAK = """
import torch
from pathlib import Path
from cispo import cispo, linear_policy_loss
T, D, V, budget = 6000, 32, 20000, 64 << 20
def peak(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) << 10
def step(T):
    hidden, head = torch.randn(T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    columns = {"anchor_logprobs": torch.zeros(T), "advantages": torch.ones(T)}
    Path("/proc/self/clear_refs").write_text("5")
    before = peak("VmRSS")
    linear_policy_loss(hidden, head, torch.zeros(T, dtype=torch.int64), objective=cispo, columns=columns,
                       weights_T=torch.ones(T), memory_budget=budget).loss.backward()
    return peak("VmHWM") - before - 4 * (T + V) * D
step(8)
print(step(T) / budget)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak resident set")
def test_memory_stays_within_the_budget_whatever_the_number_of_rows():
    """The logits alone would take 7.5 times the budget.

    Each tensor gets a mapping of its own: from its heap, malloc keeps a freed block resident in one run of fifteen.
    """
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run([sys.executable, "-c", PEAK], env=env, capture_output=True, text=True, check=True)
    assert 0.3 < float(done.stdout) < 1.2


def test_double_backward_is_refused():
    inputs, call = make()
    hidden = inputs["hidden_TD"].clone().requires_grad_()
    rest = {k: inputs[k] for k in ("head_VD", "targets_T")}
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(
            linear_policy_loss(hidden, **rest, **call, objective=o.cispo).loss, hidden, create_graph=True
        )
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(linear_logprobs(hidden, **rest)[0].sum(), hidden, create_graph=True)


BAD = {
    "hidden_TD: shape": {"hidden_TD": torch.zeros(1, 37, 24)},
    "hidden_TD: dtype": {"hidden_TD": torch.zeros(37, 24, dtype=torch.int64)},
    "head_VD: shape": {"head_VD": torch.zeros(101, 23)},
    "head_VD: has no rows": {"head_VD": torch.zeros(0, 24)},
    "head_VD: dtype": {"head_VD": torch.zeros(101, 24, dtype=torch.float64)},
    "head_VD: is on meta": {"head_VD": torch.zeros(101, 24, device="meta")},
    "bias_V: shape": {"bias_V": torch.zeros(100)},
    "targets_T: dtype": {"targets_T": torch.zeros(37)},
    "targets_T: shape": {"targets_T": torch.zeros(36, dtype=torch.int64)},
    "targets_T: 101 at row 0 is not a token id": {"targets_T": torch.full((37,), 101)},
    "weights_T: shape": {"weights_T": torch.zeros(37, 1)},
    r"columns\['advantages'\]: shape": {"columns": {"advantages": torch.zeros(1)}},
    r"columns\['advantages'\]: is float": {"columns": {"advantages": 1.0}},
    "evaluate_T: dtype": {"evaluate_T": torch.ones(37)},
    r"objective: returned \(\)": {"objective": lambda x, **_: x.sum()},
    "objective: returned NoneType": {"objective": lambda x, **_: None},
    "objective: returned a tensor that does not depend": {"objective": lambda x, **_: x.detach()},
    "temperature = 0": {"temperature": 0.0},
    "backend = 'cuda'": {"backend": "cuda"},
    "nonfinite = 'ignore'": {"nonfinite": "ignore"},
    "memory_budget = 0": {"memory_budget": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    inputs, call = make()
    with pytest.raises((DataError, ConfigError), match=f"^{message}"):
        linear_policy_loss(**(inputs | call | {"objective": o.cispo} | BAD[message]))


def test_a_column_the_objective_does_not_name_is_refused():
    inputs, call = make()
    with pytest.raises(TypeError, match="teacher_logprobs"):
        call["columns"]["teacher_logprobs"] = call["columns"]["advantages"]
        linear_policy_loss(**inputs, **call, objective=o.cispo)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter runs on CPU tensors")
def test_triton_without_cuda_is_refused():
    inputs, call = make()
    with pytest.raises(ConfigError, match="^backend = 'triton'"):
        linear_policy_loss(**inputs, **call, objective=o.cispo, backend="triton")
