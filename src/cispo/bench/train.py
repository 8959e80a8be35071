"""`cispo bench train`: one whole RL step of the `think` run, synchronous and one step stale, against TRL's
`GRPOTrainer(loss_type="cispo")`.

Same model, prompts, group size, completion limit, updates per rollout, optimizer and learning rate. Contenders take
turns, each time in a fresh process with the same number of threads, and the figure is seconds per rollout with its
updates after the first (which pays for warming up). The learning rate is so small that every rollout has the same
work; with the real one, groups reach zero variance and cost us nothing while TRL goes on computing them. Left out on
purpose: reports, checkpoints and evaluation, on both sides.

    cispo bench train --rounds 3
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cispo.types import RunError

CONTENDERS = ("cispo", "cispo, max_staleness 1", "trl")
MAX_TOKENS, GROUPS, GROUP_SIZE = 10, 32, 16


@dataclass(frozen=True)
class TrainBenchOptions:
    """Seconds per rollout with its updates, ours and TRL's where it is installed (extra `bench`)."""

    rounds: int = 3
    """Times that each contender runs; they take turns."""
    rollouts: int = 8
    """Rollouts of a run; the first is not counted."""
    updates: int = 16
    """Optimizer updates per rollout."""
    learning_rate: float = 1e-7
    threads: int | None = None
    """CPU threads of each contender. None: what it chooses itself."""
    json: Path | None = None
    """Also write the figures as JSON."""


def run(options: TrainBenchOptions) -> int:
    console = Console(highlight=False)
    contenders = [name for name in CONTENDERS if name != "trl" or _installed("trl")]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    outside: list[float] = []
    for _ in range(options.rounds):
        for name in contenders:
            with console.status(f"{name}: {options.rollouts} rollouts"):
                result = _measure(name, options)
            seconds[name] += result["seconds"][1:]
            outside += result.get("outside", [])[1:] if name == "cispo" else []
    ours = statistics.median(seconds["cispo"])
    table = Table(
        title=f"{GROUPS} × {GROUP_SIZE} completions of at most {MAX_TOKENS} tokens, {options.updates} updates"
    )
    for column in ("", "s per rollout, median", "min", "max", "× cispo"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in seconds.items():
        median = statistics.median(values)
        table.add_row(name, f"{median:.3f}", f"{min(values):.3f}", f"{max(values):.3f}", f"{median / ours:.2f}")
    console.print(table)
    share = statistics.median(outside)
    console.print(f"of a cispo step, outside model, head and optimizer: {share:.1%}")
    if options.json is not None:
        record = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "date": time.strftime("%Y-%m-%d"),
            "seconds": seconds,
            "outside_share": share,
            "options": {k: v for k, v in vars(options).items() if k != "json"},
        }
        options.json.write_text(json.dumps(record, indent=1))
    return 0


def _installed(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _measure(name: str, options: TrainBenchOptions) -> dict[str, Any]:
    """One run in a fresh process. Raises RunError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        words = [name, str(options.rollouts), str(options.updates), str(options.learning_rate)]
        words.append(str(options.threads or 0))
        done = subprocess.run(
            [sys.executable, "-m", "cispo.bench.train", *words, str(out), folder],
            capture_output=True,
            text=True,
            env={**os.environ, "GOMP_SPINCOUNT": "1000", "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode:
            raise RunError(f"bench train: {name} failed:\n{done.stderr[-2000:]}")
        return json.loads(out.read_text())


# ------------------------------------------------------------------------------------------------- in a fresh process


def _cispo(
    rollouts: int, updates: int, learning_rate: float, threads: int, folder: Path, staleness: int = 0
) -> dict[str, Any]:
    from cispo import cli
    from cispo import config as configs
    from cispo.learner import LocalLearner
    from cispo.sampling.local import LocalSampler
    from cispo.trainer import Trainer

    inside = 0.0

    def timed(owner: type, name: str) -> None:
        """Count the time in a method whose work is the model, the head or the optimizer."""
        method = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                inside += time.perf_counter() - start

        setattr(owner, name, wrapped)

    for owner, name in ((LocalLearner, "forward_backward"), (LocalLearner, "optim_step"), (LocalSampler, "poll")):
        timed(owner, name)
    seconds: list[float] = []
    outside: list[float] = []
    one_step = Trainer._one_step

    def step(self: Trainer) -> Any:
        nonlocal inside
        start, inside = time.perf_counter(), 0.0
        metrics = one_step(self)
        seconds.append(time.perf_counter() - start)
        outside.append(1 - inside / seconds[-1])
        return metrics

    Trainer._one_step = step  # type: ignore[method-assign]
    overrides = {
        "run_dir": folder / "run",
        "steps": rollouts,
        **({"threads": threads} if threads else {}),
        "algorithm.updates_per_rollout": updates,
        "optimizer.learning_rate": learning_rate,
        "async.max_staleness": staleness,
        "eval.every": 0,
        "checkpoint.every": 0,
    }
    cli.train(configs.load(None, [word for k, v in overrides.items() for word in (f"--{k}", str(v))]))
    return {"seconds": seconds, "outside": outside}


def _trl(rollouts: int, updates: int, learning_rate: float, threads: int, folder: Path) -> dict[str, Any]:
    import datasets
    import torch
    import transformers
    import trl

    from cispo.tasks import think

    if threads:
        torch.set_num_threads(threads)
    task = think.ThinkTask()
    rows = [{"prompt": p.text, "answer": p.columns["answer"]} for p in task.prompts("train")]

    def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [float(think.final_answer(c) == a) for c, a in zip(completions, answer, strict=True)]

    per_update = GROUPS * GROUP_SIZE // updates
    base = think.base_model()
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(base),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
        reward_funcs=right,
        train_dataset=datasets.Dataset.from_list(rows),
        args=trl.GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=per_update,
            gradient_accumulation_steps=1,
            steps_per_generation=updates,
            num_generations=GROUP_SIZE,
            max_completion_length=MAX_TOKENS,
            max_steps=rollouts * updates,
            loss_type="cispo",
            epsilon_high=5.0,
            beta=0.0,
            temperature=1.0,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            max_grad_norm=1.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
    )
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % updates == 0:
                times.append(time.perf_counter())

    trainer.add_callback(Clock())
    start = time.perf_counter()
    trainer.train()
    return {"seconds": [b - a for a, b in zip([start, *times], times)]}  # noqa: B905 - one shorter on purpose


if __name__ == "__main__":
    contender, rollouts, updates, learning_rate, threads, out, folder = sys.argv[1:]
    work = {"cispo": _cispo, "cispo, max_staleness 1": functools.partial(_cispo, staleness=1), "trl": _trl}[contender]
    found = work(int(rollouts), int(updates), float(learning_rate), int(threads), Path(folder))
    Path(out).write_text(json.dumps(found))
