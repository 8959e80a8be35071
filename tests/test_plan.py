"""The plan's arithmetic, against models that are built and numbers that are computed by hand."""

import pytest
import torch
import transformers

from cispo import config as configs
from cispo import plan
from cispo.types import ConfigError

RECIPES = ("recipes/async-lag1-qwen3-30ba3b.yaml", "recipes/scalerl-8b.yaml")


def options(recipe=RECIPES[0], *, gpus=24, gpu_memory=80.0, **others):
    return plan.PlanOptions(recipe, gpus, gpu_memory, **others)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("experts", [0, 8])
def test_a_shape_counts_the_weights_that_the_model_has(experts, tied, tmp_path):
    dense = {
        "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": tied,
    }  # fmt: skip
    if experts:
        moe = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        config = transformers.Qwen3MoeConfig(**dense, **moe)
        build = transformers.Qwen3MoeForCausalLM
    else:
        config, build = transformers.Qwen3Config(**dense), transformers.Qwen3ForCausalLM
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = build(config)
    counted = sum(p.numel() for p in model.parameters())
    shape = plan.shape_of(configs.load(RECIPES[0]), str(tmp_path))
    head_norms = 3 * 2 * 32  # Qwen3 norms queries and keys of a head
    assert shape.weights == counted - head_norms
    if experts:
        unmet = 3 * (experts - 2) * 3 * 64 * 48
        norms = 2 * 64 * 3 + 64 + head_norms
        assert shape.active == counted - unmet - norms - (0 if tied else 1000 * 64)


@pytest.mark.parametrize(("name", "billions"), [("Qwen/Qwen3-8B", 8.19), ("Qwen/Qwen3-30B-A3B", 30.53)])
def test_known_shapes_have_their_published_sizes(name, billions):
    assert plan.KNOWN[name].weights / 1e9 == pytest.approx(billions, abs=0.01)


def test_memory_is_16_bytes_a_weight_over_the_ranks_and_falls_with_them():
    config = configs.load(RECIPES[1])
    shape = plan.shape_of(config, None)
    memory = plan.learner_memory(config, shape, 8)
    states = sum(size for name, size in memory.items() if name.startswith(("weights", "gradients", "optimizer")))
    assert states == pytest.approx(16 * shape.weights / 8)
    assert sum(plan.learner_memory(config, shape, 16).values()) < sum(memory.values())
    kept = plan.configs_with(config, model={"gradient_checkpointing": False})
    assert sum(plan.learner_memory(kept, shape, 8).values()) > 2 * sum(memory.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_fit_where_they_say(recipe, capsys):
    assert plan.plan(options(recipe)) == 0
    text = capsys.readouterr().out
    for word in ("optimizer", "to sample", "to train", "weights to reach all engines", "assumed"):
        assert word in text


@pytest.mark.parametrize(
    ("gpu_memory", "changes", "remedy"),
    [
        (60.0, {"model": {"gradient_checkpointing": False}}, "model.gradient_checkpointing: true makes it fit"),
        (34.0, {}, "32 learner ranks (cluster.learner_ranks) make it fit"),
        (12.0, {}, "no number of ranks does: a single layer or sequence is too large"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(gpu_memory, changes, remedy):
    config = plan.configs_with(configs.load(RECIPES[0]), **changes)
    with pytest.raises(ConfigError) as refusal:
        plan.make_plan(config, options(gpu_memory=gpu_memory))
    assert "a learner rank needs" in str(refusal.value)
    assert remedy in str(refusal.value)


def test_an_engine_that_does_not_fit_names_its_parallelism():
    config = plan.configs_with(configs.load(RECIPES[0]), vllm={"tensor_parallel": 1})
    with pytest.raises(ConfigError, match="vllm.tensor_parallel: 2 makes it fit"):
        plan.make_plan(config, options(gpu_memory=60.0))


def test_more_gpus_are_not_slower_and_the_division_is_the_quickest():
    config = plan.configs_with(configs.load(RECIPES[1]), cluster={"kind": "none"})
    steps = [plan.make_plan(config, options(RECIPES[1], gpus=n)).step_s for n in (16, 32, 64)]
    assert steps == sorted(steps, reverse=True)
    best = plan.make_plan(config, options(RECIPES[1], gpus=24))
    for ranks, engines in plan.divisions(config, options(RECIPES[1], gpus=24)):
        other = plan.estimate(config, best.shape, options(RECIPES[1], gpus=24), ranks, engines)
        assert best.step_s <= other.step_s or plan.problems(config, best.shape, options(RECIPES[1]), other)


def test_a_cluster_larger_than_the_gpus_is_refused():
    with pytest.raises(ConfigError, match="need 24 GPUs, and --gpus is 16"):
        plan.make_plan(configs.load(RECIPES[0]), options(gpus=16))


def in_turn(**changes):
    layout = {"colocate": True, "learner_ranks": 8, "samplers": 8, "kind": "ray"}
    sections = {"cluster": layout, "asynchrony": {"max_staleness": 0}} | changes
    raw = configs.load(RECIPES[1]).model_dump(mode="python", by_alias=True)
    for name, fields in sections.items():
        name = {"asynchrony": "async"}.get(name, name)
        raw[name] = {**raw[name], **fields}
    return configs.validate(raw)


def test_learner_and_engines_in_turn_need_one_set_of_gpus_with_room_for_what_stays():
    config = in_turn(vllm={"gpu_memory_utilization": 0.8})
    found = plan.make_plan(config, options(RECIPES[1], gpus=8))
    weights = found.shape.weights
    assert plan.resident(found.learner) == pytest.approx(12 * weights / 8 + 1.5 * 2**30)  # no gradients, no activations
    assert found.turns_s == pytest.approx(2 * 2 * weights / 20e9)
    assert found.step_s == pytest.approx(
        max(found.sample_s, found.tail_s) + found.train_s + found.transfer_s + found.turns_s
    )
    with pytest.raises(ConfigError, match="vllm.gpu_memory_utilization: 0.84 makes both fit"):
        plan.make_plan(in_turn(), options(RECIPES[1], gpus=8))
    with pytest.raises(ConfigError, match="learner_ranks: 8, each on a GPU, and --gpus is 4"):
        plan.make_plan(config, options(RECIPES[1], gpus=4))


def test_a_broadcast_does_not_grow_with_the_engines_and_the_object_store_does():
    config = configs.load(RECIPES[1])
    shape = plan.shape_of(config, None)

    def transfer(transfer, engines):
        changed = plan.configs_with(config, cluster={"weight_transfer": transfer})
        return plan.estimate(changed, shape, options(RECIPES[1], gpus=1024), 64, engines).transfer_s

    assert transfer("broadcast", 16) == transfer("broadcast", 512) < transfer("object_store", 16)
    assert transfer("object_store", 512) > 10 * transfer("object_store", 16)
