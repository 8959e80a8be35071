"""The command line as a person meets it: exit statuses, messages, help."""

import json
import shutil
import subprocess
import sys

import pytest

from cispo import cli


def run(*words):
    return subprocess.run([sys.executable, "-m", "cispo", *words], capture_output=True, text=True, timeout=120)


def test_usage_names_every_command():
    result = run()
    assert result.returncode == 2
    assert all(name in result.stdout for name in cli.COMMANDS)
    assert run("--help").returncode == 0


def test_a_mistake_is_one_message_without_a_traceback():
    result = run("train", "--optimizer.lerning_rate", "1")
    assert result.returncode == 2
    assert "did you mean learning_rate?" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in run("train", "--debug", "--optimizer.lerning_rate", "1").stderr
    assert run("trian").returncode == 2


def test_help_shows_every_setting_with_its_default():
    result = run("train", "--help")
    assert result.returncode == 0
    for name in ("--algorithm.objective.clip_high_threshold", "--async.max_staleness", "--optimizer.eps"):
        assert name in result.stdout


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: None, "does not exist"),
        (lambda d: d.mkdir(), "no config.json"),
        (lambda d: (d.mkdir(), (d / "config.json").write_text("{")), "is not JSON"),
        (lambda d: (d.mkdir(), (d / "config.json").write_text("{}")), "no tokenizer"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_before_weights(tmp_path, capsys, make, says):
    folder = tmp_path / "model"
    make(folder)
    assert cli.main(["train", "--model.path", str(folder), "--run_dir", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_a_prompt_longer_than_the_context_is_refused(tiny_folder, tmp_path, capsys):
    status = cli.main(
        ["train", "--model.path", str(tiny_folder), "--rollout.max_tokens", "60", "--run_dir", str(tmp_path / "r")]
    )
    assert status == 2
    assert "exceed the model's context of 64" in capsys.readouterr().err.replace("\n", " ")


def test_sample_continues_a_prompt(base_folder, capsys):
    assert cli.main(["sample", "--prompt", "!123456", "--n", "3", "--seed", "1", "--max_tokens", "12"]) == 0
    written = capsys.readouterr().out.split()
    assert len(written) == 3
    assert all(text.startswith("~") for text in written)


def test_sample_reads_prompts_until_the_end_of_input(base_folder):
    result = subprocess.run(
        [sys.executable, "-m", "cispo", "sample", "--max_tokens", "12"],
        input="!123456\n!000000\n", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("~") == 2


def test_eval_prints_what_training_would_have_measured(base_folder, tmp_path, capsys):
    assert cli.main(["eval", "--eval.max_prompts", "64", "--eval.samples_per_prompt", "2"]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out and "pass@2" in out and "64 × 2" in out


def test_jsonl_end_to_end(base_folder, tmp_path):
    data = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"!{n:06d}", "answer": f"{sum(map(int, f'{n:06d}')) % 10}"} for n in range(0, 999, 9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = tmp_path / "last_digit.py"
    reward.write_text(
        "def last(prompts, completions, answer, **columns):\n"
        "    return [float(c[-1:] == a) for c, a in zip(completions, answer)]\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "cispo", "train", "--task.type", "jsonl", "--task.path", str(data),
         "--task.rewards", "[{type: function, path: 'last_digit:last'}]", "--task.eval_fraction", "0.1",
         "--model.path", str(base_folder), "--steps", "1", "--rollout.groups_per_step", "4",
         "--rollout.group_size", "4", "--algorithm.updates_per_rollout", "1", "--run_dir", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (last,) = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    assert last["eval/accuracy"] > 0.9


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model.device", "foo"], "model.device: 'foo' is not here"),
        (["--model.attn_implementation", "flash_attention_2"], "cannot be loaded"),
        (["--seed", "99999999999999999999"], "seed"),
        (["--rollout.truncated_reward", ".nan"], "truncated_reward"),
        (["--async.max_staleness", "1", "--async.sampler", "inline", "--async.in_flight_weight_updates", "false"],
         "use async.sampler: process"),
        (["--algorithm.objective", "{type: function, path: 'a:b', columns: [anchor]}"], "anchor_logprobs"),
    ],
)  # fmt: skip
def test_bad_settings_end_in_one_message(base_folder, tmp_path, capsys, words, says):
    assert cli.main(["train", "--run_dir", str(tmp_path / "run"), *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_folder_below_a_file_is_refused_at_the_door(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["train", "--run_dir", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_tiny_keeps_what_was_asked_for(base_folder, tmp_path):
    words = ["train", "--tiny", "--run_dir", str(tmp_path / "run"), "--steps", "1", "--eval.every", "0"]
    assert cli.main(words) == 0
    assert [json.loads(x)["step"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1]


def test_a_torn_model_file_is_a_message(tiny_folder, tmp_path, capsys):
    folder = tmp_path / "torn"
    shutil.copytree(tiny_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert cli.main(["train", "--model.path", str(folder), "--run_dir", str(tmp_path / "run")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
