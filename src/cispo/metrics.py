"""What a run measures and where it goes: names, statistics, `metrics.jsonl`, and the trackers.

Names are `section/what`; a name's meaning stands in `NAMES`, which the docs and the report read. One JSON object a step
is appended and flushed, so a run that is killed leaves whole lines, and `read_jsonl` says when the last one is torn.
Left out on purpose: pictures (`report/`).
"""

from __future__ import annotations

import html
import importlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cispo.types import ConfigError, DataError

log = logging.getLogger(__name__)

NAMES: dict[str, str] = {
    "step": "RL steps done when the line was written; 0 is before training",
    "updates": "optimizer updates done",
    "time/step_s": "wall seconds of the step",
    "time/sample_s": "of these, sampling (with asynchronous rollouts: waiting for them)",
    "time/reward_s": "of these, waiting for reward functions",
    "time/sampler_idle_s": "since the step before was taken, in which the sampler had nothing to do",
    "time/forward_s": "of these, log-probs under other policies (proximal, reference)",
    "time/train_s": "of these, forward and backward",
    "time/optim_s": "of these, optimizer steps and weight publication",
    "time/eval_s": "held-out evaluation, outside step_s",
    "tokens/sampled": "sampled tokens of the step",
    "tokens/trained": "sampled tokens that went through the model in training, summed over updates",
    "tokens/total": "sampled tokens since the run began",
    "tokens/sample_per_s": "sampled tokens per second of sampling (with asynchronous rollouts: of the whole step)",
    "tokens/train_per_s": "model input tokens per second of forward and backward",
    "reward/mean": "mean reward of the step's completions, before any is dropped",
    "reward/std": "standard deviation over completions",
    "reward/correct": "share of completions whose first reward function gave at least 0.5",
    "reward/none": "share of completions without a reward",
    "reward/function/NAME": "mean of one reward function",
    "task/NAME": "the task's own metrics; `task/think_rate` for think",
    "rollout/length_mean": "sampled tokens per completion",
    "rollout/length_max": "longest completion",
    "rollout/length_correct": "mean length of correct completions",
    "rollout/length_incorrect": "mean length of the others",
    "rollout/truncated": "share of completions that ran into max_tokens",
    "rollout/zero_variance": "share of groups whose rewards are all equal",
    "rollout/dropped_groups": "groups sampled and not trained on (zero variance under drop or resample)",
    "rollout/stragglers": "of these, groups dropped by async.straggler_timeout_s",
    "rollout/prompts_retired": "prompts that left by rollout.pass_rate_ceiling, so far",
    "rollout/nonfinite_dropped": "tokens dropped by algorithm.nonfinite: drop",
    "staleness/steps_mean": "RL steps between the policy that wrote a token and the one that first trains on it",
    "staleness/steps_max": "largest of these; never above async.max_staleness",
    "staleness/updates_mean": "optimizer updates between the policy that wrote a token and the one that trains on it",
    "staleness/updates_max": "largest of these, at the last update of the step",
    "staleness/histogram": "tokens by staleness in RL steps, from 0",
    "ratio/mean": "importance ratio over trained tokens of the step's updates, unclipped",
    "ratio/p50": "its median",
    "ratio/p99": "its 99th percentile",
    "ratio/max": "its maximum",
    "ratio/first_update_max": "maximum at the step's first update, where it had a gradient: 1 unless stale",
    "ratio/last_update_mean": "mean at the step's last update",
    "ratio/last_update_max": "maximum at the step's last update",
    "clip/above": "share of trained tokens above the cap",
    "clip/above_positive": "share of tokens with A > 0 above the cap (TRL's cispo_clip_ratio counts these over all)",
    "clip/above_negative": "share of tokens with A < 0 above the cap",
    "clip/below": "share of trained tokens below the floor",
    "clip/below_positive": "share of tokens with A > 0 below the floor",
    "clip/below_negative": "share of tokens with A < 0 below the floor",
    "clip/outside": "share of trained tokens outside the band, either side, any sign of A (miles' and verl's clipfrac)",
    "clip/above_and_positive": "share of trained tokens with A > 0 and above the cap (TRL's cispo_clip_ratio)",
    "clip/ppo_silenced": "share of trained tokens whose gradient PPO's 0.8/1.2 clip would have removed",
    "clip/gradient_on_silenced": "share of the gradient, Σ|∂loss/∂log π|, on those tokens; 0 under that PPO",
    "ess": "effective sample size (Σw)²/(N Σw²) of the clipped weights w, a share of N",
    "kl/sampler_k1": "sampler to trainer, k1: mean of log μ − log π at the first update",
    "kl/sampler_k3": "the same by k3, exp(d) − 1 − d with d = log π − log μ",
    "kl/sampler_max_abs": "largest |log π − log μ| at the first update",
    "kl/reference": "the KL estimate that the penalty uses",
    "correction/weight_mean": "mean weight of algorithm.correction (NeMo RL's sampling_importance_ratio)",
    "correction/ratio_max": "largest exp(proximal − sampler log-prob) before it",
    "correction/ratio_min": "smallest of these",
    "correction/out_of_band": "share of tokens (or sequences) outside its bounds (NeMo RL's is_oob_ratio)",
    "correction/nonfinite": "tokens without a finite weight, under algorithm.nonfinite: drop",
    "mismatch/token_mult_prob_error": "mean exp|proximal − sampler log-prob| (NeMo RL)",
    "mismatch/gen_kl_error": "KL of the sampler to the trainer by k3 (NeMo RL)",
    "mismatch/policy_kl_error": "KL of the trainer to the sampler by k3 (NeMo RL)",
    "mismatch/js_divergence_error": "Jensen-Shannon divergence by k3 to the mixture (NeMo RL)",
    "kl/teacher": "mean of log π − log π_teacher over the rollout's trained tokens (algorithm.distillation)",
    "policy/entropy": "mean entropy of the trained tokens' distributions, nats",
    "policy/loss": "mean loss of the step's updates",
    "optim/grad_norm": "mean gradient norm before clipping",
    "optim/grad_norm_max": "largest of the step",
    "optim/learning_rate": "at the last update",
    "eval/accuracy": "held-out mean@k: share of completions that are correct",
    "eval/reward": "held-out mean reward",
    "eval/pass@K": "held-out share of prompts with at least one correct completion among K",
    "eval/length_mean": "held-out sampled tokens per completion",
    "eval/truncated": "held-out share that ran into max_tokens",
    "eval/task/NAME": "the task's own metrics on held-out prompts",
}


# -------------------------------------------------------------------------------------------------------- statistics


def ratio_metrics(
    ratio_N: Tensor,
    advantages_N: Tensor,
    low: float | Tensor,
    high: float | Tensor,
    *,
    ppo_bounds: tuple[float, float] = (0.8, 1.2),
) -> dict[str, float]:
    """Ratio, clip and effective-sample-size metrics (DESIGN §6) of N trained tokens. Empty N gives no metrics.

    `clip/*_positive` and `_negative` are shares of the tokens with that sign of advantage. `ess` is of the clipped
    weights (miles' ess_ratio, over all tokens instead of per sample).
    """
    if not len(ratio_N):
        return {}
    ratio_N, advantages_N = ratio_N.double(), advantages_N.double()
    positive, negative = advantages_N > 0, advantages_N < 0
    above, below = ratio_N > high, ratio_N < low
    weight_N = ratio_N.clamp(low, high)
    quantiles = torch.quantile(_thinned(ratio_N), torch.tensor([0.5, 0.99], dtype=torch.float64))
    silenced = ppo_silences(ratio_N, advantages_N, ppo_bounds)
    metrics = {
        "ratio/mean": ratio_N.mean(),
        "ratio/p50": quantiles[0],
        "ratio/p99": quantiles[1],
        "ratio/max": ratio_N.max(),
        "clip/above": above.double().mean(),
        "clip/below": below.double().mean(),
        "clip/outside": (above | below).double().mean(),
        "clip/above_and_positive": (above & positive).double().mean(),
        "clip/ppo_silenced": silenced.double().mean(),
        "ess": weight_N.sum() ** 2 / (len(weight_N) * (weight_N**2).sum()).clamp_min(1e-300),
    }
    for sign, rows in (("positive", positive), ("negative", negative)):
        if rows.any():
            metrics[f"clip/above_{sign}"] = above[rows].double().mean()
            metrics[f"clip/below_{sign}"] = below[rows].double().mean()
    return {name: float(value) for name, value in metrics.items()}


def ppo_silences(ratio_N: Tensor, advantages_N: Tensor, bounds: tuple[float, float] = (0.8, 1.2)) -> Tensor:
    """Where PPO's clip leaves no gradient: A > 0 above the upper bound, A < 0 below the lower one."""
    return ((advantages_N > 0) & (ratio_N > bounds[1])) | ((advantages_N < 0) & (ratio_N < bounds[0]))


def sampler_kl_metrics(logprobs_N: Tensor, sampler_logprobs_N: Tensor) -> dict[str, float]:
    """Sampler/trainer KL by Schulman's k1 and k3 and the largest difference, over N trained tokens."""
    if not len(logprobs_N):
        return {}
    delta_N = logprobs_N.double() - sampler_logprobs_N.double()
    return {
        "kl/sampler_k1": float(-delta_N.mean()),
        "kl/sampler_k3": float((delta_N.exp() - 1 - delta_N).mean()),
        "kl/sampler_max_abs": float(delta_N.abs().max()),
    }


def _thinned(values_N: Tensor, most: int = 1_000_000) -> Tensor:
    """torch.quantile takes at most 2²⁴ values; every k-th is enough for a percentile."""
    return values_N[:: max(1, math.ceil(len(values_N) / most))]


# ------------------------------------------------------------------------------------------------------------- JSONL


class JsonlWriter:
    """Appends one JSON object a line and flushes it. `position` is where the next line begins, for a checkpoint."""

    def __init__(self, path: Path, *, position: int | None = None) -> None:
        """Opens `path` for appending; `position` cuts off what was written after a checkpoint that is resumed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()
        if position is not None:
            if position > path.stat().st_size:
                raise DataError(f"{path}: shorter ({path.stat().st_size} bytes) than its checkpoint says ({position})")
            self._file.truncate(position)

    @property
    def position(self) -> int:
        return self._file.seek(0, os.SEEK_END)

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(dump_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def dump_line(record: Mapping[str, Any]) -> bytes:
    """One JSON line. Non-finite floats become null, which every JSON reader understands."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSONL file. A torn last line (a kill in the middle of a write) is left out with a warning.

    Raises DataError for a line in the middle that is not JSON.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    log.warning("%s: the last line (%d) is incomplete and was left out", path, number)
                    return
                raise DataError(f"{path}, line {number}: not JSON: {error}") from None


# ---------------------------------------------------------------------------------------------------------- trackers


class Tracker(Protocol):
    """Where metrics go besides `metrics.jsonl`."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None: ...

    def completions(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Some of a step's completions, as a table: each row has the keys of COMPLETION_COLUMNS."""

    def close(self) -> None: ...


COMPLETION_COLUMNS = ("prompt", "completion", "reward", "advantage", "correct", "truncated")


class TensorBoardTracker:
    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        writer = _door("tensorboard", "torch.utils.tensorboard")
        self._writer = writer.SummaryWriter(str(run_dir / "tensorboard"))
        self._writer.add_text("config", "```json\n" + json.dumps(config, indent=2) + "\n```")

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        for name, value in _scalars(metrics):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def completions(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """A Markdown table under Text, which is what TensorBoard has."""
        lines = ["|" + "|".join(COMPLETION_COLUMNS) + "|", "|" + "---|" * len(COMPLETION_COLUMNS)]
        for row in rows:
            cells = [html.escape(str(row[name])).replace("|", "&#124;") for name in COMPLETION_COLUMNS]
            lines.append("|" + "|".join(cell.replace("\n", "<br>") for cell in cells) + "|")
        self._writer.add_text("completions", "\n".join(lines), step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases, and trackio, which keeps its interface."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], module: str = "wandb") -> None:
        self._module = _door(module, module)
        where = {"dir": str(run_dir)} if module == "wandb" else {}
        self._module.init(project="cispo", name=run_dir.name, config=dict(config), **where)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._module.log(dict(_scalars(metrics)), step=step)

    def completions(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        data = [[row[name] for name in COMPLETION_COLUMNS] for row in rows]
        table = self._module.Table(columns=list(COMPLETION_COLUMNS), data=data)
        self._module.log({"completions": table}, step=step)

    def close(self) -> None:
        self._module.finish()


def open_trackers(names: Sequence[str], run_dir: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Raises ConfigError where a tracker that was asked for is not installed."""
    return [
        TensorBoardTracker(run_dir, config) if name == "tensorboard" else WandbTracker(run_dir, config, name)
        for name in names
    ]


def _door(package: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"track: {package} is not installed ({error}); run pip install 'cispo[{package}]', or leave it out of track"
        ) from None


def _scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, int | float) and math.isfinite(value):
            yield name, value
