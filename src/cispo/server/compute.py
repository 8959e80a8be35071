"""The passes: training micro-batches of one or several adapters, and the scores of prompts.

Left out on purpose: who asked and in what order (`engine.py`), and drawing tokens (`sampling.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch
from tinker.proto import tinker_public_pb2 as pb
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cispo import model as models
from cispo.batching import micro_batches, pad_rows
from cispo.config import ModelConfig
from cispo.head import linear_logprobs, linear_policy_loss
from cispo.head.matmul import fast_float32_matmul
from cispo.objectives import is_sequence_level
from cispo.sampling.draw import inverse_cdf, row_seed, uniforms
from cispo.server.lora import Adapter, FrozenAdapter, LoraHost, LoraShape, SampleRoute, TrainRoute
from cispo.server.losses import TrainWork, metrics_of, prepare
from cispo.server.wire import Datum, TrainRequest
from cispo.types import AdamParams

_LOGITS_BYTES = 64 << 20
_MAX_PADDING_SHARE = 0.25
_SHORT = 256


class ServedModel:
    """A base model in memory, under the name that clients use for it."""

    def __init__(self, name: str, path: str, config: ModelConfig):
        loaded = models.load(config, path, trainable=False)
        self.name, self.path = name, path
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.context_length = loaded.context_length
        self.vocabulary = self.model.get_input_embeddings().weight.shape[0]
        self.architecture = self.model.config.get_text_config().model_type
        self.eos = models.eos_token_ids(self.model, self.tokenizer)
        self.temperature = 1.0 / models.logit_scale_of(self.model)
        self.host = LoraHost(self.model)

    def hidden(self, rows: Sequence[Tensor]) -> Tensor:
        """Last hidden states of right-padded rows: [B, S, D]."""
        tokens_BS, mask_BS = pad_rows(rows)
        positions_BS = torch.arange(tokens_BS.shape[1]).expand(len(rows), -1)
        return models.hidden_states(self.model, tokens_BS, mask_BS, positions_BS)

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()


def warm(served: ServedModel) -> None:
    """One training pass and step on a throw-away adapter of the SDK's usual rank, so that no client pays for what
    libraries do at first use."""
    shape = LoraShape(32, "attn" in served.host.parts, "mlp" in served.host.parts, "unembed" in served.host.parts)
    adapter = Adapter(served.host, shape, served.host.initial(shape, 0))
    S = min(64, served.context_length or 64)
    for loss_fn in ("cross_entropy", "cispo"):
        inputs = {"target_tokens": torch.zeros(S, dtype=torch.long)}
        if loss_fn == "cispo":
            inputs |= {"logprobs": torch.zeros(S), "advantages": torch.ones(S)}
        data = (Datum(torch.zeros(S, dtype=torch.long), inputs),) * 8
        work = prepare(TrainRequest("", 1, loss_fn, {}, False, data), served.vocabulary)
        for _ in train(served, [TrainPart(adapter, work)], micro_batch_tokens=8 * S):
            pass
    adapter.optim_step(AdamParams(learning_rate=0.0))


@dataclass(frozen=True)
class TrainPart:
    """One request's share of a pass."""

    adapter: Adapter
    work: TrainWork


@dataclass(frozen=True)
class TrainResult:
    """logprobs: per datum, in the shape of its targets. entropy: per datum, flat, of each target's distribution."""

    logprobs: list[Tensor]
    entropy: list[Tensor]
    metrics: dict[str, float]


def train(
    served: ServedModel, parts: Sequence[TrainPart], *, micro_batch_tokens: int, kernels_are_set: bool = False
) -> Iterator[list[TrainResult]]:
    """Run the parts together, adding each one's gradient to its adapter's.

    A generator: it yields an empty list between two micro-batches, so that others can have the model there, and the
    results at last, in the order of the parts. Where it raises, every adapter's accumulated gradient is what it was.
    Parts are all forward-only, or none is. With `kernels_are_set` the caller has chosen them for short rows.
    """
    forward_only = parts[0].work.forward_only
    before = [None if forward_only or not p.adapter.accumulated else p.adapter.grad.clone() for p in parts]
    try:
        yield from _train(served, parts, forward_only, micro_batch_tokens, kernels_are_set)
    except BaseException:
        if not forward_only:
            for part, gradient in zip(parts, before, strict=True):
                part.adapter.grad.zero_() if gradient is None else part.adapter.grad.copy_(gradient)
        raise
    if not forward_only:
        for part in parts:
            part.adapter.accumulated = True


def _train(
    served: ServedModel,
    parts: Sequence[TrainPart],
    forward_only: bool,
    micro_batch_tokens: int,
    kernels_are_set: bool,
) -> Iterator[list[TrainResult]]:
    rows = [(p, r) for p, part in enumerate(parts) for r in range(len(part.work.rows))]
    lengths = [len(parts[p].work.rows[r].tokens) for p, r in rows]
    outputs = [_Output(part.work) for part in parts]
    batches = micro_batches(lengths, budget=micro_batch_tokens, max_padding_share=_MAX_PADDING_SHARE)
    for number, chosen in enumerate(batches):
        if number:
            yield []
        micro = sorted(rows[i] for i in chosen)
        kernels = contextlib.nullcontext() if kernels_are_set else _kernels(max(lengths[i] for i in chosen))
        with torch.set_grad_enabled(not forward_only), kernels:
            losses = _micro_batch(served, parts, micro, outputs)
            if not forward_only:
                torch.stack(losses).sum().backward()
    yield [output.done() for output in outputs]


def can_be_halved(parts: Sequence[TrainPart]) -> bool:
    """Whether `train_halves` takes these parts: several, of short rows only: kernels are chosen process-wide."""
    return len(parts) > 1 and all(len(row.tokens) <= _SHORT for part in parts for row in part.work.rows)


def train_halves(
    served: ServedModel, parts: Sequence[TrainPart], *, micro_batch_tokens: int, helper: Executor
) -> list[TrainResult | Exception]:
    """`train`, one half of the parts in this thread and the other in the helper's, at the same time.

    Small models leave cores idle where one pass's operations are too short to be shared among threads; two passes are
    not. Which half a part is in depends on its place alone, so that a group that runs again runs in the same halves.
    The results, or for each part of a half that failed its exception, are in the order of the parts.
    """
    middle = (len(parts) + 1) // 2

    def run(half: Sequence[TrainPart]) -> list[TrainResult | Exception]:
        try:
            *_, results = train(served, half, micro_batch_tokens=micro_batch_tokens, kernels_are_set=True)
        except Exception as error:
            return [error] * len(half)
        return results

    with _kernels(_SHORT):
        other = helper.submit(run, parts[middle:])
        mine = run(parts[:middle])
        return mine + other.result()


@contextlib.contextmanager
def _kernels(longest: int) -> Iterator[None]:
    """For short rows, plain attention and the CPU's faster product library, which flash attention's many small products
    would make slower. Both depend on the shape alone, so that a pass that runs again is the same pass."""
    if longest > _SHORT:
        yield
        return
    with fast_float32_matmul(), sdpa_kernel(SDPBackend.MATH):
        yield


def _micro_batch(
    served: ServedModel, parts: Sequence[TrainPart], micro: list[tuple[int, int]], outputs: list[_Output]
) -> list[Tensor]:
    counts: dict[int, int] = {}
    for p, _ in micro:
        counts[p] = counts.get(p, 0) + 1
    route = TrainRoute([(parts[p].adapter, count) for p, count in counts.items()])
    with served.host.routed(route):
        hidden_BSD = served.hidden([parts[p].work.rows[r].tokens for p, r in micro])
    losses, start = [], 0
    for p, count in counts.items():
        numbers = [r for _, r in micro[start : start + count]]
        pieces = [hidden_BSD[start + i, : len(parts[p].work.rows[r].tokens)] for i, r in enumerate(numbers)]
        losses.append(_head_loss(served, parts[p], numbers, torch.cat(pieces), outputs[p]))
        start += count
    return losses


def _head_loss(served: ServedModel, part: TrainPart, numbers: list[int], hidden_TD: Tensor, output: _Output) -> Tensor:
    """Loss of one part's rows, differentiable; log-probs go to `output`. A position with K targets counts K times."""
    work = part.work
    rows = [work.rows[r] for r in numbers]
    if any(len(row.shape) == 2 for row in rows):
        copies = torch.cat([torch.full((len(row.tokens),), (row.shape[1:] or (1,))[0]) for row in rows])
        hidden_TD = hidden_TD.repeat_interleave(copies, dim=0)
    targets_T = torch.cat([row.targets for row in rows])
    weights_T = torch.cat([row.weights for row in rows])
    columns = {name: torch.cat([row.columns[name] for row in rows]) for name in rows[0].columns}
    head_VD, hidden_TD = _adapted_head(served, part.adapter, hidden_TD)
    bias_V, temperature = getattr(served.head, "bias", None), served.temperature
    if work.forward_only or is_sequence_level(work.objective):
        logprobs_T, entropy_T = linear_logprobs(hidden_TD, head_VD, targets_T, bias_V=bias_V, temperature=temperature)
        used_T = weights_T != 0
        loss_T = work.objective(logprobs_T[used_T], **{name: column[used_T] for name, column in columns.items()})
        loss = (weights_T[used_T] * loss_T).sum()
    else:
        result = linear_policy_loss(
            hidden_TD,
            head_VD,
            targets_T,
            objective=work.objective,
            columns=columns,
            weights_T=weights_T,
            bias_V=bias_V,
            temperature=temperature,
            evaluate_T=torch.ones(len(targets_T), dtype=torch.bool),
        )
        loss, logprobs_T, entropy_T = result.loss, result.logprobs_T, result.entropy_T
    output.add(rows, numbers, float(loss.detach()), logprobs_T.detach(), entropy_T)
    return loss


def _adapted_head(served: ServedModel, adapter: Adapter, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Head and hidden states with the adapter's rank beside the model's width: W h + B·(s·A h) = [W B]·[h; s·A h]."""
    head_VD = served.head.weight
    pair = adapter.leaves.get(served.head.index) if hasattr(served.head, "index") else None
    if pair is None:
        return head_VD, hidden_TD
    A, B = pair
    u_TR = nn.functional.linear(hidden_TD.to(A.dtype), A) * adapter.shape.scale
    return torch.cat([head_VD, B.to(head_VD.dtype)], 1), torch.cat([hidden_TD, u_TR.to(hidden_TD.dtype)], 1)


class _Output:
    """Collects a part's results over micro-batches, in the order of its rows."""

    def __init__(self, work: TrainWork):
        self.work = work
        self.logprobs: list[Tensor | None] = [None] * len(work.rows)
        self.entropy: list[Tensor | None] = [None] * len(work.rows)
        self.losses: list[float] = []

    def add(self, rows: Sequence, numbers: list[int], loss: float, logprobs_T: Tensor, entropy_T: Tensor) -> None:
        sizes = [row.targets.numel() for row in rows]
        for r, logprobs, entropy in zip(numbers, logprobs_T.split(sizes), entropy_T.split(sizes), strict=True):
            self.logprobs[r], self.entropy[r] = logprobs.float(), entropy.detach().float()
        self.losses.append(loss)

    def done(self) -> TrainResult:
        shaped = [x.view(row.shape) for x, row in zip(self.logprobs, self.work.rows, strict=True)]
        metrics = metrics_of(self.work, sum(self.losses), torch.cat(self.logprobs), torch.cat(self.entropy))
        return TrainResult(shaped, self.entropy, metrics)


# ------------------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class ScoreRequest:
    """What is asked about one row of S tokens; entry s is about token s, given those before it.

    prompt_logprobs: of the tokens themselves. topk: the k most likely. target: int64 [S − 1, K], −1 asks nothing, and
    whether it came as CSR. alternatives: draws per position. last_n: only the last n tokens. first: only from here on.
    """

    tokens: tuple[int, ...]
    prompt_logprobs: bool = False
    topk: int = 0
    target: pb.Tensor | None = None
    target_ids: Tensor | None = None
    alternatives: int = 0
    last_n: int | None = None
    temperature: float = 1.0
    seed: int = 0


@dataclass
class ScoreResult:
    logprobs: np.ndarray | None = None
    topk: tuple[np.ndarray, np.ndarray] | None = None
    target: pb.Tensor | None = None
    alternatives: tuple[np.ndarray, np.ndarray] | None = None


@torch.inference_mode()
def score(
    served: ServedModel, requests: Sequence[ScoreRequest], route: SampleRoute | None, which_B: Tensor | None
) -> list[ScoreResult]:
    """One pass over the rows; adapter `which_B[b]` of the route acts on row b (-1: none)."""
    with served.host.routed(None if route is None else route.rows(which_B)):
        hidden_BSD = served.hidden([torch.tensor(request.tokens) for request in requests])
    out = []
    for b, request in enumerate(requests):
        row_route = None if route is None else route.rows(None if which_B is None else which_B[b : b + 1])
        with served.host.routed(row_route):
            out.append(_score_row(served, request, hidden_BSD[b : b + 1, : len(request.tokens)]))
    return out


def _score_row(served: ServedModel, request: ScoreRequest, hidden_1SD: Tensor) -> ScoreResult:
    S, V = len(request.tokens), served.vocabulary
    first = 1 if request.last_n is None else max(1, S - request.last_n)
    result = ScoreResult()
    tokens = torch.tensor(request.tokens)
    if request.prompt_logprobs:
        result.logprobs = np.full(S, np.nan, np.float32)
    if request.topk:
        k = min(request.topk, V)
        result.topk = (np.zeros((S, request.topk), np.int32), np.full((S, request.topk), -99999.0, np.float32))
    target_values = None if request.target_ids is None else torch.zeros(request.target_ids.shape)
    if request.alternatives:
        n = request.alternatives
        result.alternatives = (np.zeros((S - 1, n), np.int32), np.zeros((S - 1, n), np.float32))
    chunk = max(1, _LOGITS_BYTES // (4 * V))
    for start in range(1, S, chunk):
        at = torch.arange(start, min(S, start + chunk))
        logits = served.head(hidden_1SD[:, at - 1])[0].float() / served.temperature
        logprobs_CV = logits.log_softmax(-1)
        scored = at >= first
        where = at[scored].numpy()
        if result.logprobs is not None:
            result.logprobs[where] = logprobs_CV.gather(1, tokens[at, None])[scored, 0].numpy()
        if request.topk:
            tempered = (
                (logits / request.temperature).log_softmax(-1) if request.temperature not in (0, 1) else logprobs_CV
            )
            values, ids = tempered[scored].topk(k)
            result.topk[0][where, :k], result.topk[1][where, :k] = ids.numpy(), values.numpy()
        if target_values is not None:
            ids = request.target_ids[at - 1]
            values = logprobs_CV.gather(1, ids.clamp(min=0))
            target_values[at - 1] = torch.where(ids >= 0, values, 0.0)
        if request.alternatives:
            tempered = (logits / request.temperature).softmax(-1) if request.temperature else logits.softmax(-1)
            for j in range(request.alternatives):
                seeds = torch.full((len(at),), row_seed(request.seed, j), dtype=torch.int64)
                drawn = inverse_cdf(tempered, uniforms(seeds, at))
                result.alternatives[0][at.numpy() - 1, j] = drawn.numpy()
                result.alternatives[1][at.numpy() - 1, j] = logprobs_CV.gather(1, drawn[:, None])[:, 0].numpy()
    if target_values is not None:
        result.target = _like(request.target, request.target_ids, target_values)
    return result


def _like(request: pb.Tensor, ids: Tensor, values: Tensor) -> pb.Tensor:
    """The values in the layout in which the ids came."""
    out = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=list(ids.shape))
    if request.WhichOneof("encoding") == "sparse_csr":
        rows = np.frombuffer(request.sparse_csr.crow_indices, "<i8")
        columns = np.frombuffer(request.sparse_csr.col_indices, "<i8")
        at = np.repeat(np.arange(len(rows) - 1), np.diff(rows))
        out.sparse_csr.crow_indices = request.sparse_csr.crow_indices
        out.sparse_csr.col_indices = request.sparse_csr.col_indices
        out.sparse_csr.values = values.numpy()[at, columns].astype("<f4").tobytes()
    else:
        out.dense = values.numpy().astype("<f4").tobytes()
    return out


def frozen(adapter: Adapter) -> FrozenAdapter:
    """The adapter's weights as they are now."""
    return FrozenAdapter(adapter.host, adapter.shape, adapter.flat.clone())
