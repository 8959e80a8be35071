"""Our trainer on a Tinker-compatible endpoint: the four verbs, spoken by the `tinker` SDK. Needs only the SDK.

The endpoint may be `cispo serve` or any other. Token-local objectives that the API knows go as its own losses, one pass
each; every other objective goes through `forward_backward_custom`, which runs it here. Both are sums, and our per-token
weights carry the reduction. Left out on purpose: temperatures other than 1 and entropy bonuses, which the API cannot
train with, and exports, which the endpoint makes (`save_weights_external`).

    learner, sampler = connect("tinker://localhost:8000", base_model="think", rank=32, seed=0)
"""

from __future__ import annotations

import concurrent.futures
import json
import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cispo import objectives
from cispo.types import (
    AdamParams,
    Batch,
    Completion,
    ConfigError,
    DataError,
    LossOutput,
    NonFiniteError,
    Objective,
    RunError,
    SampleRequest,
    SampleResult,
)

if TYPE_CHECKING:
    import tinker

_Place = tuple[int, slice]
"""A row's number and where its positions stand in the batch's T."""

_WAIT_SECONDS = 0.1
_SERVER_LOSSES = {
    objectives.cispo: ("cispo", {"clip_low_threshold", "clip_high_threshold"}),
    objectives.ppo_clip: ("ppo", {"clip_low_threshold", "clip_high_threshold"}),
    objectives.importance_sampling: ("importance_sampling", set()),
}


def connect(
    url: str, *, base_model: str, rank: int = 32, seed: int | None = None, api_key: str | None = None
) -> tuple[TinkerLearner, TinkerSampler]:
    """A new training run at `tinker://host:port` (or an http URL), and a sampler of its weights.

    api_key: None takes TINKER_API_KEY. Raises ConfigError without the SDK or for a URL of another kind.
    """
    try:
        import tinker
    except ModuleNotFoundError:
        raise ConfigError(f"--learner {url}: needs the tinker SDK; run pip install 'cispo[server]'") from None
    if url.startswith("tinker://"):
        url = "http://" + url.removeprefix("tinker://")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--learner {url}: expected tinker://HOST:PORT, or an http or https URL")
    service = tinker.ServiceClient(base_url=url, api_key=api_key)
    run = service.create_lora_training_client(base_model=base_model, rank=rank, seed=seed).result()
    return TinkerLearner(service, run, base_model), TinkerSampler(run)


class TinkerLearner:
    """A `Learner` whose weights live at the endpoint.

    entropy_T of its results is −log π of the token at hand, whose mean over on-policy tokens is the entropy: the API
    tells no entropies.
    """

    def __init__(self, service: tinker.ServiceClient, run: tinker.TrainingClient, base_model: str):
        self._service, self.run, self._base_model = service, run, base_model
        self._reference: tinker.SamplingClient | None = None

    def forward_backward(
        self,
        batch: Batch,
        objective: Objective,
        *,
        temperature: float = 1.0,
        nonfinite: str = "raise",
        entropy_bonus: float = 0.0,
    ) -> LossOutput:
        """Add the gradient of Σ weights·objective. Raises ConfigError for what the API cannot do, NonFiniteError."""
        self._check(temperature, entropy_bonus)
        if nonfinite != "raise":
            raise ConfigError(f"nonfinite: {nonfinite!r} is not possible with a remote learner; use 'raise'")
        rows = _rows_of(batch)
        if not rows:
            return self._output(batch, [], [], 0.0)
        for name, column in batch.columns.items():
            if not bool(torch.isfinite(column[batch.weights_T != 0]).all()):
                raise NonFiniteError(f"{name} holds NaN or infinity at a trained token; nothing was trained")
        found = _server_loss(objective, batch)
        if found is not None:
            loss_fn, config, inputs = found
            result = self.run.forward_backward(_datums(batch, rows, inputs), loss_fn, config).result()
        else:
            result = self._custom(batch, rows, objective)
        return self._output(batch, rows, result.loss_fn_outputs, result.metrics["loss:sum"])

    def _custom(self, batch: Batch, rows: list[_Place], objective: Objective) -> Any:
        trained_T = batch.weights_T != 0
        at = torch.cat([trained_T[where].nonzero().squeeze(1) + where.start for _, where in rows])
        columns = {name: column[at] for name, column in batch.columns.items()}

        def loss(data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
            picked = torch.cat([lp[trained_T[where]] for lp, (_, where) in zip(logprobs, rows, strict=True)])
            total = (batch.weights_T[at] * objective(picked, **columns)).sum()
            return total, {"loss:sum": float(total.detach())}

        return self.run.forward_backward_custom(_datums(batch, rows, {}), loss).result()

    def forward(self, batch: Batch, *, temperature: float = 1.0, reference: bool = False) -> LossOutput:
        """Log-probs at the trained positions, under the policy or (`reference`) the base model."""
        self._check(temperature, 0.0)
        rows = _rows_of(batch)
        if not rows:
            return self._output(batch, [], [], 0.0)
        if not reference:
            weights = {"weights": torch.zeros_like(batch.weights_T)}
            result = self.run.forward(_datums(batch, rows, weights), "cross_entropy").result()
            return self._output(batch, rows, result.loss_fn_outputs, 0.0)
        from tinker import types

        if self._reference is None:
            self._reference = self._service.create_sampling_client(base_model=self._base_model)
        futures = []
        for b, where in rows:
            tokens = [*batch.rows[b].tolist(), int(batch.targets_T[where.stop - 1])]
            if tokens[1:] != batch.targets_T[where].tolist():
                raise DataError("a remote reference scores rows whose targets are their own next tokens, and no others")
            futures.append(self._reference.compute_logprobs(types.ModelInput.from_ints(tokens)))
        outputs = [{"logprobs": torch.tensor(future.result()[1:])} for future in futures]
        return self._output(batch, rows, outputs, 0.0)

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        from tinker import types

        fields = {name: getattr(params, name) for name in AdamParams.__slots__}
        metrics = self.run.optim_step(types.AdamParams(**fields)).result().metrics or {}
        return {"grad_norm": float("nan"), **metrics}

    def save(self, folder: Path) -> None:
        """A checkpoint at the endpoint; `tinker.json` names it."""
        folder.mkdir(parents=True, exist_ok=True)
        path = self.run.save_state(f"cispo-{secrets.token_hex(8)}").result().path
        (folder / "tinker.json").write_text(json.dumps({"path": path, "base_model": self._base_model}) + "\n")

    def load(self, folder: Path) -> None:
        try:
            path = json.loads((folder / "tinker.json").read_text())["path"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: holds no checkpoint of a remote learner ({error})") from None
        self.run.load_state_with_optimizer(path).result()

    def export(self, folder: Path) -> None:
        raise ConfigError("a remote learner exports at its endpoint: TrainingClient.save_weights_external")

    def weights(self) -> Mapping[str, Tensor]:
        raise ConfigError("a remote learner's weights stay at its endpoint; sample there too")

    @staticmethod
    def _check(temperature: float, entropy_bonus: float) -> None:
        if temperature != 1.0:
            raise ConfigError(f"rollout.temperature: {temperature:g} cannot be trained through the Tinker API; use 1")
        if entropy_bonus:
            raise ConfigError(f"algorithm.entropy_bonus: {entropy_bonus:g} is not in the Tinker API; use 0")

    @staticmethod
    def _output(batch: Batch, rows: list[_Place], outputs: Sequence[Mapping[str, Any]], loss: float) -> LossOutput:
        logprobs_T = torch.zeros(len(batch.targets_T))
        for (_, where), output in zip(rows, outputs, strict=True):
            values = output["logprobs"]
            logprobs_T[where] = (values if isinstance(values, Tensor) else values.to_torch()).float()
        evaluated_T = batch.weights_T != 0
        logprobs_T = torch.where(evaluated_T, logprobs_T, 0.0)
        return LossOutput(loss, logprobs_T, -logprobs_T, evaluated_T)


class TinkerSampler:
    """A `Sampler` at the endpoint. `update_weights(None, version)` takes a snapshot of the run; requests under way
    go on with the weights that they began with."""

    share_weights = True

    def __init__(self, run: tinker.TrainingClient, version: int = 0):
        self._run, self.version = run, version
        self._client = run.save_weights_and_get_sampling_client().result()
        self._pending: dict[int, tuple[concurrent.futures.Future, int]] = {}

    @property
    def pending(self) -> int:
        return len(self._pending)

    def submit(self, request: SampleRequest) -> None:
        from tinker import types

        params = request.params
        if params.min_p:
            raise ConfigError("rollout.min_p is not in the Tinker API; use 0")
        if params.stop and params.stop_token_ids:
            raise ConfigError("stop strings and stop token ids do not go together in the Tinker API; use one of them")
        stop: Any = list(params.stop) or None
        if not params.stop and params.stop_token_ids is not None:
            stop = list(params.stop_token_ids)
        sampling = types.SamplingParams(
            max_tokens=params.max_tokens, seed=params.seed, stop=stop, temperature=params.temperature,
            top_k=params.top_k or -1, top_p=params.top_p,
        )  # fmt: skip
        future = self._client.sample(types.ModelInput.from_ints(list(request.prompt)), request.num_samples, sampling)
        self._pending[request.request_id] = (future.future(), self.version)

    def poll(self, *, wait: bool = True) -> list[SampleResult]:
        """What has finished; with `wait`, after a moment if nothing has. Raises RunError where a request failed."""
        futures = [future for future, _ in self._pending.values()]
        if wait and futures:
            concurrent.futures.wait(futures, _WAIT_SECONDS, concurrent.futures.FIRST_COMPLETED)
        done = [number for number, (future, _) in self._pending.items() if future.done()]
        return [self._result(number, *self._pending.pop(number)) for number in done]

    def cancel(self, request_id: int) -> None:
        found = self._pending.pop(request_id, None)
        if found is not None:
            found[0].cancel()

    def update_weights(self, weights: Mapping[str, Tensor] | None, version: int) -> None:
        if weights is not None:
            raise ConfigError("a remote sampler takes its weights at the endpoint: pass None")
        self._client = self._run.save_weights_and_get_sampling_client().result()
        self.version = version

    @staticmethod
    def _result(request_id: int, future: concurrent.futures.Future, version: int) -> SampleResult:
        error = future.exception()
        if error is not None:
            raise RunError(f"sampling at the endpoint failed: {error}") from error
        completions = tuple(
            Completion(
                tuple(s.tokens), tuple(s.logprobs or ()), (version,) * len(s.tokens),
                "stop" if s.stop_reason == "stop" else "length",
            )
            for s in future.result().sequences
        )  # fmt: skip
        return SampleResult(request_id, completions)


# ---------------------------------------------------------------------------------------------------- batches to datums


def _rows_of(batch: Batch) -> list[_Place]:
    """The rows with a trained position: the others would cost a pass and change nothing."""
    out, start = [], 0
    for b, length in enumerate(batch.lengths):
        where = slice(start, start + length)
        if bool((batch.weights_T[where] != 0).any()):
            out.append((b, where))
        start += length
    return out


def _datums(batch: Batch, rows: list[_Place], inputs: Mapping[str, Tensor]) -> list[Any]:
    from tinker import types

    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(batch.rows[b].tolist()),
            loss_fn_inputs={
                "target_tokens": types.TensorData.from_torch(batch.targets_T[where]),
                **{name: types.TensorData.from_torch(value[where].float()) for name, value in inputs.items()},
            },
        )
        for b, where in rows
    ]


def _server_loss(objective: Objective, batch: Batch) -> tuple[str, dict[str, float] | None, dict[str, Tensor]] | None:
    """Loss, settings and inputs of the API that have the same gradient, or None.

    These losses are proportional to the advantage, so that a weight ≥ 0 is folded into it (untrained tokens: 0).
    """
    settings: dict[str, Any] = {}
    while isinstance(objective, partial):
        if objective.args:
            return None
        settings = {**objective.keywords, **settings}
        objective = objective.func
    found = _SERVER_LOSSES.get(objective)
    settings = {name: value for name, value in settings.items() if value is not None}
    if found is None or set(settings) - found[1] or set(batch.columns) != {"anchor_logprobs", "advantages"}:
        return None
    if any(isinstance(v, Tensor) for v in settings.values()) or bool((batch.weights_T < 0).any()):
        return None
    trained_T = batch.weights_T != 0
    inputs = {
        "logprobs": torch.where(trained_T, batch.columns["anchor_logprobs"], 0.0),
        "advantages": torch.where(trained_T, batch.columns["advantages"] * batch.weights_T, 0.0),
    }
    return found[0], settings or None, inputs
