"""From trajectories to batches, and reductions as data: one weight per token, set once from the whole optimizer window.

Because the weights carry the normaliser, micro-batches, accumulation and ranks only ever add up, and cannot change a
gradient (TRL #5619 and ms-swift #10117 are what happens otherwise). Left out on purpose: padding and the order of rows,
which are the learner's own affair (`learner.py`), and advantages (`advantages.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cispo.types import Batch, ConfigError, Trajectory


def make_batch(
    trajectories: Sequence[Trajectory], advantages: Sequence[float], *, mask_truncated: bool = False
) -> Batch:
    """One batch of whole trajectories. Position s of a row predicts token s + 1: S tokens have S − 1 targets.

    weights_T is 1 where the policy wrote the target (0 everywhere in truncated rows under `mask_truncated`) and 0
    elsewhere: a plain mask until `with_reduction` turns it into a reduction. columns: advantages, sampler_logprobs.
    """
    rows, targets, weights, sampler, spread = [], [], [], [], []
    for trajectory, advantage in zip(trajectories, advantages, strict=True):
        rows.append(trajectory.tokens[:-1])
        targets.append(trajectory.tokens[1:])
        mask = trajectory.action_mask[1:]
        weights.append(mask & (not (mask_truncated and trajectory.truncated)))
        sampler.append(trajectory.sampler_logprobs[1:])
        spread.append(torch.full((len(mask),), advantage, dtype=torch.float32))
    return Batch(
        rows=tuple(rows),
        targets_T=torch.cat(targets),
        weights_T=torch.cat(weights).float(),
        columns={"advantages": torch.cat(spread), "sampler_logprobs": torch.cat(sampler)},
    )


def with_columns(batch: Batch, **columns: Tensor) -> Batch:
    """The batch with further columns of length T."""
    return replace(batch, columns={**batch.columns, **columns})


def row_index_T(lengths: Sequence[int]) -> Tensor:
    """Which row each of the T positions belongs to: long [T]."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))


def take_rows(batch: Batch, indices: Sequence[int]) -> Batch:
    """The batch of these rows, in this order."""
    lengths_B = torch.tensor(batch.lengths, dtype=torch.long)
    chosen = torch.tensor(indices, dtype=torch.long)
    starts, taken = (lengths_B.cumsum(0) - lengths_B)[chosen], lengths_B[chosen]
    # Position t of the result, in a row that begins at `before`, stands at start + (t − before) of the batch.
    before = taken.cumsum(0) - taken
    where = torch.arange(int(taken.sum())) + torch.repeat_interleave(starts - before, taken)
    return Batch(
        rows=tuple(batch.rows[i] for i in indices),
        targets_T=batch.targets_T[where],
        weights_T=batch.weights_T[where],
        columns={name: column[where] for name, column in batch.columns.items()},
    )


def with_reduction(batch: Batch, kind: str, groups: Sequence[int], *, constant: float | None = None) -> Batch:
    """The batch of one whole optimizer window, its mask turned into the weights of a reduction.

    groups: each row's prompt, by number. With N the rows that have trained tokens, n_i their counts, and P the prompts
    among them:

    - token: 1 / Σ n. DAPO, Tinker-like means.
    - prompt: 1 / (P · Σ n over the prompt's rows). MiniMax-M1 (arXiv:2506.13585) eq. 4 for each prompt; ScaleRL
      (arXiv:2510.13786) "prompt average".
    - sequence: 1 / (N · n_i). GRPO (arXiv:2402.03300) eq. 3.
    - constant: 1 / (N · constant). Dr. GRPO (arXiv:2503.20783).
    - sum: 1. The Tinker API.

    Raises ConfigError for an unknown kind.
    """
    lengths = batch.lengths
    row_T = row_index_T(lengths)
    mask_T = (batch.weights_T != 0).double()
    count_B = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, row_T, mask_T)
    group_B = torch.tensor(groups, dtype=torch.long)
    present_B = count_B > 0
    rows = present_B.sum().clamp_min(1)
    if kind == "token":
        weight_B = torch.ones_like(count_B) / count_B.sum().clamp_min(1)
    elif kind == "prompt":
        _, group_B = torch.unique(group_B, return_inverse=True)
        count_P = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, group_B, count_B)
        weight_B = 1 / ((count_P > 0).sum().clamp_min(1) * count_P[group_B].clamp_min(1))
    elif kind == "sequence":
        weight_B = 1 / (rows * count_B.clamp_min(1))
    elif kind == "constant":
        if constant is None:
            raise ConfigError("algorithm.constant: missing; reduction: constant divides every sequence by it")
        weight_B = torch.full_like(count_B, 1 / (float(rows) * constant))
    elif kind == "sum":
        weight_B = torch.ones_like(count_B)
    else:
        raise ConfigError(
            f"algorithm.reduction: {kind!r} is unknown; choose from token, prompt, sequence, constant, sum"
        )
    return replace(batch, weights_T=(mask_T * weight_B[row_T]).float())


def micro_batches(lengths: Sequence[int], *, budget: int, max_padding_share: float) -> list[list[int]]:
    """Row indices of each micro-batch: sorted by length, at most `budget` padded tokens, padding at most the share.

    A row longer than the budget stands alone. Padding share is 1 − Σ lengths / (rows · longest).
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    longest = tokens = 0
    for i in order:
        padded = longest * (len(batches[-1]) + 1) if batches else 0
        fits = batches and padded <= budget and padded - tokens - lengths[i] <= max_padding_share * padded
        if not fits:
            batches.append([])
            longest, tokens = lengths[i], 0
        batches[-1].append(i)
        tokens += lengths[i]
    return batches


def pad_rows(rows: Sequence[Tensor], fill: int = 0) -> tuple[Tensor, Tensor | None]:
    """Right-padded rows, long [B, S], and the attention mask [B, S] or None where nothing is padded."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens_BS = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)
    if bool((lengths == lengths[0]).all()):
        return tokens_BS, None
    return tokens_BS, (torch.arange(tokens_BS.shape[1])[None, :] < lengths[:, None]).long()
