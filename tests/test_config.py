"""Configs: what is refused, how it is said, and that a resolved config reads back as itself."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cispo import config as configs
from cispo.types import ConfigError


def problem(*overrides):
    with pytest.raises(ConfigError) as caught:
        configs.load(None, overrides)
    return str(caught.value)


def test_the_embedded_default_is_the_think_run_of_the_readme():
    config = configs.load()
    assert config.task.type == "think"
    assert (config.rollout.groups_per_step, config.rollout.group_size) == (32, 16)
    assert config.algorithm.updates_per_rollout == 16
    assert config.algorithm.reduction == "prompt"
    assert configs.warnings(config) == []


def test_a_resolved_config_reads_back_as_itself():
    config = configs.load(None, ["--algorithm.objective.clip_high_threshold", ".inf", "--model.lora.rank", "4"])
    assert configs.validate(yaml.safe_load(configs.to_yaml(config))) == config


@given(
    low=st.floats(0, 10),
    high=st.floats(0, 10),
    rate=st.floats(1e-9, 1.0),
    staleness=st.integers(0, 9),
)
def test_overrides_arrive_exactly(low, high, rate, staleness):
    words = [
        "--algorithm.objective.clip_low_threshold", repr(low), "--algorithm.objective.clip_high_threshold", repr(high),
        f"--optimizer.learning-rate={rate!r}", "--async.max_staleness", str(staleness),
    ]  # fmt: skip
    if low > high:
        assert "low ≤ high" in problem(*words)
        return
    config = configs.load(None, words)
    assert config.algorithm.objective.clip_low_threshold == low
    assert config.algorithm.objective.clip_high_threshold == high
    assert config.optimizer.learning_rate == rate
    assert config.asynchrony.max_staleness == staleness


def test_all_mistakes_are_reported_at_once_with_the_nearest_key():
    message = problem(
        "--algorithm.objective.clip_high_treshold", "3", "--optimizer.learning_rate", "-1",
        "--rollot.group_size", "3", "--algorithm.advantage", "grop",
    )  # fmt: skip
    assert "4 problem(s)" in message
    assert "did you mean clip_high_threshold?" in message
    assert "optimizer.learning_rate: -1" in message
    assert "did you mean rollout?" in message
    assert "'grop' is not one of" in message and "nearest: group" in message


def test_a_key_of_another_variant_says_which_type_it_needs():
    assert "with type: ppo_clip" in problem("--algorithm.objective.dual_clip", "3")


def test_a_new_type_replaces_the_section():
    config = configs.load(None, ["--algorithm.objective.type", "ppo_clip"])
    assert (config.algorithm.objective.clip_low_threshold, config.algorithm.objective.clip_high_threshold) == (0.8, 1.2)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["--rollout.group_size", "1"], "use a group_size of at least 2"),
        (["--algorithm.updates_per_rollout", "15"], "use updates_per_rollout: 16"),
        (["--algorithm.objective.clip_low_threshold", "-0.1"], "clip_low_threshold: -0.1"),
        (["--algorithm.objective.clip_low_threshold", "5"], "low ≤ high"),
        (["--async.max_staleness", "1", "--algorithm.anchor", "proximal"], "use algorithm.anchor: sampler"),
        (["--algorithm.constant", "3"], "use reduction: constant"),
        (["--task.type", "jsonl", "--task.path", "x", "--task.rewards", "[{type: exact}]"], "model.path: missing"),
        (["--task.type", "jsnl"], "nearest: jsonl"),
        (["lr=3"], "unexpected argument 'lr=3'"),
        (["--seed", "[1"], "not a valid value"),
    ],
)
def test_contradictions_name_the_field_and_the_fix(overrides, says):
    assert says in problem(*overrides)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["--algorithm.anchor", "proximal", "--algorithm.updates_per_rollout", "1"], "clip inert"),
        (["--algorithm.objective.clip_high_threshold", "0.2"], "below 1"),
        (["--algorithm.objective.clip_low_threshold", "0.8"], "tinker-cookbook #763"),
        (["--rollout.top_p", "0.9"], "truncate"),
    ],
)
def test_what_is_legal_and_probably_not_meant_is_warned_about(overrides, says):
    (warning,) = configs.warnings(configs.load(None, overrides))
    assert says in warning


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "torn.yaml").write_text("model: {path: [\n")
    for name, says in (("list.yaml", "not a mapping"), ("torn.yaml", "not valid YAML"), ("lost.yaml", "no such file")):
        with pytest.raises(ConfigError, match=says):
            configs.load(tmp_path / name)


RECIPES = configs.Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize(
    "recipe", sorted([*RECIPES.glob("*.yaml"), *RECIPES.glob("like/*.yaml")]), ids=lambda p: p.name
)
def test_every_recipe_is_a_config(recipe):
    raw = configs.read_yaml(recipe)
    assert configs.validate(raw, source=str(recipe))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--vllm.weight_transfer broadcast",
            "vllm.weight_transfer: broadcast with cluster.kind: ray, .*, or use cluster.weight_transfer: broadcast",
        ),
        ("--vllm.weight_transfer ipc", "vllm.weight_transfer: ipc with cluster.kind: ray"),
        (
            "--cluster.colocate true --async.max_staleness 1",
            "colocate: true with async.max_staleness: 1, .* use max_st",
        ),
        (
            "--cluster.colocate true --cluster.learner_ranks 3 --cluster.samplers 2",
            "2 do not share 3 learner ranks' GPUs",
        ),
        (
            "--cluster.colocate true --cluster.weight_transfer broadcast",
            "no two members on one GPU; use weight_transfer",
        ),
        ("--cluster.colocate true --vllm.tensor_parallel 2", "vllm.tensor_parallel: 2 .* use fewer samplers, or .*: 1"),
        ("--cluster.colocate true --vllm.url http://a:1", "vllm.url: a server cannot be put to sleep"),
        (
            "--cluster.colocate true --cluster.kind none",
            "colocate: true with cluster.kind: none.* use cluster.kind: ray",
        ),
        (
            "--vllm.url http://a:1 --cluster.samplers 2",
            "vllm.url: http://a:1 with cluster.samplers: 2, .* use samplers: 1",
        ),
    ],
)
def test_what_a_pool_of_vllm_samplers_cannot_do_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        configs.load(None, ["--cluster", "ray", "--async.sampler", "vllm", *words.split()])
