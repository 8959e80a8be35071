"""The one loop, run for real: what it learns, what it writes, and that a kill costs nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from cispo import checkpoint, cli
from cispo import config as configs
from cispo.metrics import NAMES, read_jsonl
from cispo.types import ConfigError, DataError

SMALL = [
    "--rollout.groups_per_step", "8", "--rollout.group_size", "8", "--algorithm.updates_per_rollout", "4",
    "--eval.max_prompts", "32", "--eval.every", "3", "--threads", "1",
]  # fmt: skip
TIMES = ("time/", "tokens/sample_per_s", "tokens/train_per_s")


def lines(run_dir):
    return list(read_jsonl(run_dir / "metrics.jsonl"))


def timeless(record):
    return {key: value for key, value in record.items() if not key.startswith(TIMES)}


def explained(name):
    """Whether `NAMES` says what a metric means; its capitals stand for names of the task's or the reward's own."""
    return any(re.fullmatch(re.sub(r"[A-Z]+$", ".+", known), name) for known in NAMES)


def train(run_dir, *words):
    return cli.train(configs.load(None, ["--run_dir", str(run_dir), *SMALL, *words]))


def process(run_dir, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "cispo", "train", "--run_dir", str(run_dir), *SMALL, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )


def wait_for_lines(run_dir, count, running, seconds=120):
    """Block until metrics.jsonl has `count` whole lines; a process that ends before is a failure."""
    deadline = time.monotonic() + seconds
    path = run_dir / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert running.poll() is None, running.stdout.read()
        time.sleep(0.005)
    raise AssertionError(f"{path} did not reach {count} lines in {seconds} s")


def test_the_default_run_discovers_thinking(base_folder, tmp_path):
    run_dir = cli.train(configs.load(None, ["--run_dir", str(tmp_path / "run"), "--eval.max_prompts", "256"]))
    records = lines(run_dir)
    assert [r["step"] for r in records] == list(range(13))
    assert records[0]["eval/accuracy"] <= 0.2 and records[0]["eval/task/think_rate"] <= 0.05
    assert records[-1]["eval/accuracy"] >= 0.95 and records[-1]["eval/task/think_rate"] >= 0.95
    assert records[-1]["updates"] == 12 * 16
    assert all(r["staleness/steps_max"] == 0 for r in records[1:])
    # On-policy at the first update of a step: sampler and trainer agree (fp32).
    assert all(r["kl/sampler_max_abs"] <= 1e-4 for r in records[1:] if "kl/sampler_max_abs" in r)
    assert records[2]["ratio/last_update_max"] > records[2]["ratio/first_update_max"]
    # Synchronous: while the learner worked on the step before, the sampler had nothing to do.
    for before, record in zip(records[1:], records[2:], strict=False):
        worked = before["time/train_s"] + before["time/optim_s"]
        assert (
            worked
            <= record["time/sampler_idle_s"]
            <= before["time/step_s"] + record["time/step_s"] + before.get("time/eval_s", 0)
        )
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["run_dir"] == str(run_dir)


def test_rollout_files_say_what_every_token_saw(base_folder, tmp_path):
    run_dir = train(tmp_path / "run", "--steps", "2")
    rows = [json.loads(line) for line in (run_dir / "rollouts" / "step-000002.jsonl").read_text().splitlines()]
    assert len(rows) == 64
    record = lines(run_dir)[2]
    assert sum(len(r["tokens"]) for r in rows) == record["tokens/sampled"]
    assert sum(r["reward"] for r in rows) / 64 == pytest.approx(record["reward/mean"])
    trained = [r for r in rows if r["trained"]]
    assert trained and all(r["advantage"] != 0 for r in trained)
    assert all(r["advantage"] == 0 for r in rows if not r["trained"])
    for r in trained:
        assert len(r["tokens"]) == len(r["logprobs"]) == len(r["entropy"]) == len(r["weights"]) == len(r["versions"])
        assert "".join(r["pieces"]).startswith(r["completion"])
        assert set(r["versions"]) == {1}
    # Every weight of an update's window is 1 / (prompts · tokens of the prompt's group).
    for update in range(4):
        window = [r for r in rows if r["update"] == update]
        for prompt in {r["prompt_id"] for r in window}:
            tokens = sum(len(r["tokens"]) for r in rows if r["prompt_id"] == prompt)
            weights = [w for r in window if r["prompt_id"] == prompt for w in r["weights"]]
            assert weights == pytest.approx([1 / (2 * tokens)] * len(weights))


def test_a_killed_and_resumed_run_writes_what_an_uninterrupted_one_does(base_folder, tmp_path):
    steps = ["--steps", "9", "--checkpoint.every", "2"]
    straight = process(tmp_path / "straight", *steps)
    output, _ = straight.communicate(timeout=300)
    assert straight.returncode == 0, output

    killed = process(tmp_path / "killed", *steps)
    wait_for_lines(tmp_path / "killed", 6, killed)  # steps 0 to 5: past the checkpoint of step 4
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    at = checkpoint.latest(tmp_path / "killed").name
    (tmp_path / "killed" / "checkpoints" / ".writing-step-000099").mkdir()  # what a kill in the middle leaves

    again = subprocess.run(
        [sys.executable, "-m", "cispo", "train", "--resume", str(tmp_path / "killed")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"after step {int(at.removeprefix('step-'))}" in again.stdout
    first, second = lines(tmp_path / "straight"), lines(tmp_path / "killed")
    assert [timeless(r) for r in first] == [timeless(r) for r in second]
    for path in (tmp_path / "straight" / "rollouts").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / "rollouts" / path.name).read_bytes(), path.name
    assert not list((tmp_path / "killed" / "checkpoints").glob(".writing-*"))


def test_ctrl_c_once_saves_and_says_how_to_resume(base_folder, tmp_path):
    running = process(tmp_path / "run", "--steps", "1000", "--eval.every", "0")
    wait_for_lines(tmp_path / "run", 2, running)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 130
    done = lines(tmp_path / "run")[-1]["step"]
    assert f"go on with: cispo train --resume {tmp_path / 'run'}" in output.replace("\n", "")
    assert checkpoint.latest(tmp_path / "run").name == f"step-{done:06d}"


def test_cispo_leaves_gradient_on_tokens_that_ppo_silences(base_folder, tmp_path):
    words = ["--rollout.groups_per_step", "16", "--algorithm.updates_per_rollout", "16", "--steps", "2",
             "--eval.every", "0", "--optimizer.learning_rate", "3e-4"]  # fmt: skip
    for name, kind in (("cispo", []), ("ppo", ["--algorithm.objective.type", "ppo_clip"])):
        record = lines(train(tmp_path / name, *words, *kind))[-1]
        assert record["clip/ppo_silenced"] > 0.01
        assert (record["clip/gradient_on_silenced"] > 0.01) is (name == "cispo")


def test_a_run_interrupted_before_its_first_step_evaluates_once(base_folder, tmp_path):
    running = process(tmp_path / "run", "--steps", "1", "--rollout.groups_per_step", "512")
    wait_for_lines(tmp_path / "run", 1, running)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode == 130
    cli.train(configs.load(tmp_path / "run" / "config.yaml"), resume=True)
    assert [r["step"] for r in lines(tmp_path / "run")] == [0, 1]


def test_the_same_step_is_saved_once_and_pruning_leaves_no_half_of_one(base_folder, tmp_path):
    run_dir = train(tmp_path / "run", "--steps", "3", "--eval.every", "0", "--checkpoint.every", "1",
                    "--checkpoint.keep", "1")  # fmt: skip
    (only,) = (run_dir / "checkpoints").iterdir()
    before = (only / "state.json").stat().st_mtime_ns
    cli.train(configs.load(run_dir / "config.yaml"), resume=True)
    assert only.name == "step-000003" and (only / "state.json").stat().st_mtime_ns == before


def test_stale_rollouts_stay_within_the_bound_and_still_learn(base_folder, tmp_path):
    run_dir = cli.train(
        configs.load(
            None,
            ["--run_dir", str(tmp_path / "run"), "--async.max_staleness", "2", "--eval.max_prompts", "128",
             "--steps", "14", "--eval.every", "14"],
        )
    )  # fmt: skip
    records = lines(run_dir)[1:]
    assert max(r["staleness/steps_max"] for r in records) == 2
    assert records[5]["staleness/updates_max"] > 16
    assert records[-1]["eval/accuracy"] >= 0.9
    # sampling goes on while the learner works, so its rate is over the step and not over what was waited
    assert all(r["tokens/sample_per_s"] <= 1.5 * r["tokens/sampled"] / r["time/step_s"] for r in records)


@pytest.mark.parametrize(
    "words",
    [
        ["--algorithm.anchor", "proximal"],
        ["--algorithm.kl.coef", "0.01"],
        ["--rollout.zero_variance", "drop", "--algorithm.advantage", "batch_std"],
        ["--rollout.zero_variance", "resample", "--rollout.max_resample_rounds", "2"],
        ["--rollout.truncated", "mask", "--rollout.max_tokens", "4", "--algorithm.reduction", "constant"],
        ["--rollout.truncated", "penalize", "--rollout.max_tokens", "4", "--algorithm.reduction", "sequence"],
        ["--algorithm.epochs_per_rollout", "2", "--algorithm.objective.type", "ppo_clip"],
        ["--optimizer.schedule", "cosine", "--optimizer.warmup_updates", "3", "--eval.samples_per_prompt", "4"],
        ["--algorithm.objective.type", "reinforce", "--algorithm.updates_per_rollout", "1"],
        ["--model.lora.rank", "4", "--algorithm.kl.coef", "0.01", "--optimizer.learning_rate", "1e-3"],
        ["--model.dtype", "bfloat16", "--model.head_dtype", "float32"],
        ["--model.gradient_checkpointing", "true"],
        ["--track", "[tensorboard]"],
    ],
    ids=lambda words: words[0].rsplit(".", 1)[-1] + "=" + words[1],
)
def test_every_way_to_train_runs_and_writes_finite_numbers(base_folder, tmp_path, words):
    run_dir = train(tmp_path / "run", "--steps", "2", "--eval.every", "2", *words)
    records = lines(run_dir)
    assert [r["step"] for r in records] == [0, 1, 2]
    for record in records:
        assert None not in record.values(), [k for k, v in record.items() if v is None]
        assert not [name for name in record if not explained(name)]
    if words[0] == "--track":
        assert list((run_dir / "tensorboard").iterdir())
    if words[0] == "--rollout.zero_variance" and words[1] == "drop":
        assert records[1]["rollout/dropped_groups"] == round(8 * records[1]["rollout/zero_variance"])
    if words[0] == "--algorithm.kl.coef":
        assert records[2]["kl/reference"] >= 0


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_metrics_and_completions(base_folder, tmp_path, monkeypatch, name):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip(name, reason=f"needs the extra `{name}`")
    run_dir = train(tmp_path / "run", "--steps", "1", "--eval.every", "0", "--track", name)
    kept = [path for root in (run_dir, tmp_path / "trackio") for path in root.rglob("*") if path.is_file()]
    assert [path for path in kept if path.suffix in (".wandb", ".db")], kept


def test_a_teacher_teaches_without_any_reward(base_folder, tmp_path):
    """On-policy distillation from a model that thinks; every reward is 0, so all gradient is the teacher's."""
    teacher = cli.train(configs.load(None, ["--run_dir", str(tmp_path / "teacher"), "--eval.every", "0"]))
    words = ["--algorithm.distillation.teacher", str(checkpoint.latest(teacher) / "model"), "--algorithm.advantage",
             "group", "--task.type", "jsonl", "--task.path", str(tmp_path / "p.jsonl"), "--eval.every", "0",
             "--task.rewards", "[{type: exact, column: nothing}]", "--model.path", str(base_folder), "--steps", "4",
             "--run_dir", str(tmp_path / "run"), "--rollout.groups_per_step", "16"]  # fmt: skip
    rows = [{"prompt": f"?{n:06d}", "nothing": "never"} for n in range(0, 100000, 997)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = lines(cli.train(configs.load(None, words)))
    assert all(r["reward/mean"] == 0 for r in records)
    assert records[-1]["kl/teacher"] < 0.2 * records[0]["kl/teacher"]


def test_lora_runs_resume_and_export(base_folder, tmp_path):
    words = ["--model.lora.rank", "4", "--optimizer.learning_rate", "1e-3", "--checkpoint.every", "1"]
    run_dir = train(tmp_path / "run", "--steps", "2", *words)
    cli.train(configs.load(run_dir / "config.yaml", ["--steps", "3"]), resume=True)
    assert [r["step"] for r in lines(run_dir)] == [0, 1, 2, 3]
    for out, extra in (("merged", []), ("adapter", ["--adapter"])):
        assert cli.main(["export", str(run_dir), str(tmp_path / out), *extra]) == 0
    assert (tmp_path / "merged" / "config.json").exists()
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert cli.main(["eval", str(run_dir), "--eval.max_prompts", "8"]) == 0


def test_what_cannot_be_resumed_says_why(base_folder, tmp_path):
    run_dir = train(tmp_path / "run", "--steps", "1", "--eval.every", "0")
    with pytest.raises(ConfigError, match="exists and is not empty; go on with cispo train --resume"):
        train(run_dir, "--steps", "1")
    changed = configs.load(run_dir / "config.yaml", ["--optimizer.learning_rate", "3e-4", "--steps", "2"])
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: the run has 0.0001, now 0.0003"):
        cli.train(changed, resume=True)
    with pytest.raises(DataError, match="no complete checkpoint"):
        cli.train(configs.load(None, ["--run_dir", str(tmp_path / "other")]), resume=True)
