"""Run folders of the server's training runs: a real server process, the real SDK, and the report that reads them."""
# ruff: noqa: E402 (what follows needs the extra)

import json
import shutil
import stat
import time

import pytest

tinker = pytest.importorskip("tinker", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")

import torch
import yaml
from tinker import types

from cispo.cli import main
from cispo.config import AlgorithmConfig
from cispo.metrics import read_jsonl
from cispo.report.page import page_data
from cispo.report.runs import find_runs
from tests.serving import Server, serving

PROMPTS = [[12, 1, 2, 3], [12, 4, 5, 6, 7]]
LENGTH = 5


def datum(prompt, completion, advantage, logprob=-2.5):
    tokens, before = prompt + completion, len(prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * before + [logprob] * len(completion),
            "advantages": [0.0] * before + [advantage] * len(completion),
        },
    )


def batch(seed, advantages=(0.5, -0.5)):
    """Two prompts, each with two completions."""
    g = torch.Generator().manual_seed(seed)
    return [
        datum(prompt, torch.randint(0, 10, (LENGTH,), generator=g).tolist(), advantage)
        for prompt in PROMPTS
        for advantage in advantages
    ]


def new_run(server, rank=4, seed=3):
    client = tinker.ServiceClient(base_url=server.url, api_key=server.key)
    return client.create_lora_training_client(base_model="tiny", rank=rank, seed=seed).result()


def step(run, seed, loss="cispo", **config):
    backward = run.forward_backward(batch(seed), loss, loss_fn_config=config or None)
    optim = run.optim_step(types.AdamParams(learning_rate=1e-2))
    return backward.result(), optim.result()


def lines_of(state):
    (folder,) = (state / "runs").iterdir()
    return list(read_jsonl(folder / "metrics.jsonl"))


def wait_for_steps(state, steps):
    deadline, found = time.monotonic() + 10, None
    while found != steps and time.monotonic() < deadline:
        time.sleep(0.01)
        try:
            found = [line["step"] for line in lines_of(state)]
        except (OSError, ValueError):  # not there yet
            found = None
    assert found == steps


def embedded(page):
    """The data of a report page."""
    text = page.read_text()
    start = text.index(">", text.index('id="data"')) + 1
    return json.loads(text[start : text.index("</script>", start)])


def test_the_report_shows_a_run_that_a_client_drove(tiny_folder, tmp_path):
    state = tmp_path / "state"
    with serving(state, model=[f"tiny={tiny_folder}"]) as server:
        run = new_run(server)
        results = [step(run, seed, clip_low_threshold=0.0, clip_high_threshold=3.0) for seed in range(3)]
        tokenizer = run.get_tokenizer()
        key = server.key
    assert main(["report", str(state), "--out", str(tmp_path / "page.html")]) == 0
    (shown,) = embedded(tmp_path / "page.html")["runs"]
    assert shown["name"] == run.model_id.replace(":", "-") and shown["seed"] == 3
    assert shown["objective"] == {"type": "cispo", "clip_low_threshold": 0.0, "clip_high_threshold": 3.0}
    assert shown["config"]["model.path"] == "tiny" and shown["config"]["model.lora.rank"] == 4
    assert [line["step"] for line in shown["lines"]] == [1, 2, 3] and shown["rollouts"] == [1, 2, 3]
    for line, (backward, optim) in zip(shown["lines"], results, strict=True):
        ours = backward.metrics
        for name, value in {
            "policy/loss": ours["loss:sum"],
            "ratio/mean": ours["ratio:mean"],
            "ratio/max": ours["ratio:max"],
            "clip/outside": ours["clipped_fraction:mean"],
            "ess": ours["effective_sample_size:mean"] if ours["clipped_fraction:mean"] == 0 else line["ess"],
            "kl/sampler_k1": ours["kl_sampler_trainer_k1:mean"],
            "kl/sampler_k3": ours["kl_sampler_trainer_k3:mean"],
            "optim/grad_norm": optim.metrics["grad_norm"],
        }.items():
            assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        assert line["tokens/trained"] == 4 * LENGTH and line["optim/learning_rate"] == 1e-2

    first = shown["steps"]["1"]
    assert [len(group["completions"]) for group in first["groups"]] == [2, 2]
    assert [group["prompt"] for group in first["groups"]] == [tokenizer.decode(prompt) for prompt in PROMPTS]
    completions = [c for group in first["groups"] for c in group["completions"]]
    assert [c["advantage"] for c in completions] == [0.5, -0.5, 0.5, -0.5]
    assert all(c["reward"] is None and c["correct"] is None and c["trained"] for c in completions)

    (folder,) = (state / "runs").iterdir()
    written = list(read_jsonl(folder / "rollouts" / "step-000001.jsonl"))
    logprobs = torch.cat([out["logprobs"].to_torch()[-LENGTH:] for out in results[0][0].loss_fn_outputs])
    torch.testing.assert_close(
        torch.tensor([x for row in written for x in row["logprobs"]]), logprobs, atol=2e-6, rtol=0
    )
    for row, sent in zip(written, batch(0), strict=True):
        assert row["tokens"] == sent.loss_fn_inputs["target_tokens"].data[-LENGTH:]
        assert row["completion"] == tokenizer.decode(row["tokens"]) and row["sampler_logprobs"] == [-2.5] * LENGTH
        assert row["weights"] == [1.0] * LENGTH and len(row["entropy"]) == LENGTH

    AlgorithmConfig(**yaml.safe_load((folder / "config.yaml").read_text())["algorithm"])
    for path in [state / "runs", *(state / "runs").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        assert path.is_dir() or key not in path.read_text()


@pytest.mark.parametrize("cut_every", [3, pytest.param(1000, marks=pytest.mark.slow)])
def test_after_sigkill_steps_go_on_with_none_twice_and_none_missing(tiny_folder, tmp_path, cut_every):
    server = Server(tmp_path, model=[f"tiny={tiny_folder}"], cut_every=cut_every).start()
    server.wait_for_key()
    try:
        run = new_run(server)
        for seed in range(3):
            step(run, seed)
        wait_for_steps(tmp_path, [1, 2, 3])
        for seed in range(3, 5):  # most likely not written yet
            step(run, seed)
        server.kill()
        (folder,) = (tmp_path / "runs").iterdir()
        with open(folder / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 4, "seq"')  # a line that the kill left torn
        server.start()
        for seed in range(5, 8):
            step(run, seed)
    finally:
        status = server.stop()
    assert status == 0
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 9))
    for name in ("seq", "number"):
        values = [line[name] for line in lines]
        assert values == sorted(set(values)), name
    if cut_every == 1000:  # no snapshot lay between a step's two requests
        assert [line["requests"] for line in lines] == [1] * 8
        assert len({line["policy/loss"] for line in lines}) == 8
        assert sorted(find_runs([tmp_path])[0].rollout_steps()) == list(range(1, 9))


def test_what_is_accumulated_is_one_step_and_what_is_thrown_away_is_none(tiny_folder, tmp_path):
    with serving(tmp_path, model=[f"tiny={tiny_folder}"]) as server:
        run = new_run(server)
        saved = run.save_state("start").result().path
        one = run.forward_backward(batch(1), "cispo").result().metrics["loss:sum"]
        two = run.forward_backward(batch(2), "importance_sampling").result().metrics["loss:sum"]
        run.forward(batch(3), "cispo").result()
        run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        run.forward_backward(batch(4), "cispo").result()
        run.load_state(saved).result()
        run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        first = types.Datum(
            model_input=types.ModelInput.from_ints(PROMPTS[0]),
            loss_fn_inputs={"target_tokens": [1, 2, 3, 4], "weights": [0.0, 1.0, 1.0, 1.0]},
        )
        supervised = run.forward_backward([first], "cross_entropy").result().metrics["loss:sum"]
        run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        equal = run.forward_backward(batch(5, advantages=(0.0, 0.0)), "cispo").result()
        run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        assert equal.metrics["loss:sum"] == 0
    summed, empty, imitated, untrained = lines_of(tmp_path)
    assert summed["requests"] == 2 and summed["policy/loss"] == pytest.approx(one + two, rel=1e-5)
    assert summed["tokens/trained"] == 8 * LENGTH
    assert empty["requests"] == 0 and empty["optim/grad_norm"] == 0 and "policy/loss" not in empty
    assert imitated["policy/loss"] == pytest.approx(supervised) and imitated["tokens/trained"] == 3
    assert "ratio/mean" not in imitated
    assert untrained["tokens/trained"] == 0 and "ratio/mean" not in untrained
    (found,) = find_runs([tmp_path])
    assert sorted(found.rollout_steps()) == [1, 4]
    rows = list(read_jsonl(found.rollout_steps()[4]))
    assert [row["trained"] for row in rows] == [False] * 4 and len(rows[0]["tokens"]) == LENGTH
    assert page_data([found])["runs"][0]["forks"]["steps"] == [1, 4]


def test_rollout_files_are_capped(tiny_folder, tmp_path):
    with serving(tmp_path, model=[f"tiny={tiny_folder}"]) as server:
        run = new_run(server)
        run.forward_backward([d for seed in range(50) for d in batch(seed)], "cispo").result()
        run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    (line,) = lines_of(tmp_path)
    assert line["tokens/trained"] == 200 * LENGTH
    (found,) = find_runs([tmp_path])
    assert len(list(read_jsonl(found.rollout_steps()[1]))) == 128


def test_switched_off_it_writes_nothing(tiny_folder, tmp_path):
    with serving(tmp_path, model=[f"tiny={tiny_folder}"], journal=False) as server:
        step(new_run(server), 0)
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_deleted_or_cannot_be_written_fails_no_request(tiny_folder, tmp_path):
    with serving(tmp_path, model=[f"tiny={tiny_folder}"], cut_every=1) as server:
        run = new_run(server)
        step(run, 0)
        wait_for_steps(tmp_path, [1])
        shutil.rmtree(tmp_path / "runs")
        step(run, 1)
        wait_for_steps(tmp_path, [2])
        assert find_runs([tmp_path])[0].config["model"]["path"] == "tiny"
        shutil.rmtree(tmp_path / "runs")
        (tmp_path / "runs").write_text("not a folder")
        for seed in range(2, 5):
            step(run, seed)
        assert run.save_state("c").result().path.endswith("c")
    said = [json.loads(text) for text in server.lines if "journal_failed" in text]
    assert len(said) == 1 and said[0]["run"] == run.model_id, said
