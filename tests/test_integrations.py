"""The drop-ins against the real packages; each part is skipped, with the reason, where its package is not installed."""

import importlib.util
import math

import pytest
import torch

from cispo.types import ConfigError

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
needs_verl = pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed")


# --------------------------------------------------------------------------------------------------------------- TRL


def reward_digits(completions, **_):
    return [sum(character.isdigit() for character in text) / 8 + 0.1 * (len(text) % 3) for text in completions]


def make(trainer_class, tmp_path, **settings):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig

    from cispo.tasks import think

    torch.manual_seed(0)
    tokenizer = think.make_tokenizer()
    tokenizer.padding_side = "left"
    folder = tmp_path / "model"
    think.make_model(think.BaseRecipe()).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)  # TRL loads the reference from where the model came from
    prompts = [f"{n:06d}" for n in range(111111, 111111 + 64)]
    args = GRPOConfig(
        **{
            "output_dir": str(tmp_path),
            "loss_type": "cispo",
            "epsilon_high": 1.5,
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "max_completion_length": 8,
            "learning_rate": 1e-3,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "max_steps": 2,
            "save_strategy": "no",
            "seed": 3,
            **settings,
        }
    )
    return trainer_class(
        model,
        reward_digits,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )


def batch(trainer, *, old: bool, reference: bool = False) -> dict:
    """Inputs as `_prepare_inputs` gives them, with ragged prompts and completions."""
    torch.manual_seed(1)
    B, P, C, V = 8, 6, 5, 12
    completion_mask = (torch.arange(C) < torch.tensor([5, 3, 1, 4, 5, 2, 3, 5])[:, None]).long()
    prompt_mask = (torch.arange(P) >= torch.tensor([0, 0, 2, 2, 1, 1, 0, 0])[:, None]).long()
    inputs = {
        "prompt_ids": torch.randint(3, V, (B, P)),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, V, (B, C)),
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, -0.3, 0.7, -2.0]),
        "num_items_in_batch": completion_mask.sum(),
    }
    if old:
        inputs["old_per_token_logps"] = -torch.rand(B, C) * 6
    if reference:
        inputs["ref_per_token_logps"] = -torch.rand(B, C) * 6
    return inputs


def loss_and_gradients(trainer, inputs):
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    trainer._buffered_inputs = [inputs]
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@needs_trl
@pytest.mark.parametrize(("old", "beta", "temperature"), [(True, 0.0, 1.0), (False, 0.0, 1.0), (True, 0.1, 0.7)])
def test_the_trl_trainer_has_trl_s_loss_gradient_and_metric(tmp_path, old, beta, temperature):
    from trl import GRPOTrainer

    from cispo.integrations.trl import CISPOTrainer

    theirs, ours = (make(cls, tmp_path, beta=beta, temperature=temperature) for cls in (GRPOTrainer, CISPOTrainer))
    ours.model.load_state_dict(theirs.model.state_dict())
    inputs = batch(theirs, old=old, reference=beta > 0)
    expected, expected_gradients = loss_and_gradients(theirs, inputs)
    loss, gradients = loss_and_gradients(ours, inputs)
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=2e-3, atol=2e-5)
    for metric in ("cispo_clip_ratio", "entropy"):
        assert ours._metrics["train"][metric] == pytest.approx(theirs._metrics["train"][metric], rel=1e-4, abs=1e-5)
    if old:
        assert ours._metrics["train"]["cispo_clip_ratio"][0] > 0


@needs_trl
def test_the_trl_trainer_normalises_by_the_optimizer_window(tmp_path):
    """Four micro-batches in two updates: each update's weights sum to its own token count's inverse (TRL #5619)."""
    from cispo.integrations.trl import CISPOTrainer

    trainer = make(CISPOTrainer, tmp_path, steps_per_generation=4, gradient_accumulation_steps=2)
    masks = [torch.ones(2, n) for n in (1, 2, 3, 4)]
    trainer._buffered_inputs = [{"completion_mask": mask.long()} for mask in masks]
    trainer.model.train()
    seen = []
    for step, mask in enumerate(masks):
        trainer._step = step
        seen.append(trainer._window_tokens(mask.bool()))
    assert seen == [6.0, 6.0, 14.0, 14.0]


@needs_trl
def test_the_trl_trainer_trains_and_logs(tmp_path):
    from cispo.integrations.trl import CISPOTrainer

    trainer = make(CISPOTrainer, tmp_path, steps_per_generation=2, num_iterations=2, max_steps=4)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "cispo/ratio/mean" in entry]
    assert len(logs) == 4 and all(math.isfinite(entry["loss"]) for entry in logs)
    assert logs[-1]["cispo/ess"] <= 1.0 + 1e-9
    assert any(not torch.equal(before[n], p.detach()) for n, p in trainer.model.named_parameters())


@needs_trl
def test_the_trl_trainer_refuses_what_would_silently_differ(tmp_path):
    from cispo.integrations.trl import CISPOTrainer

    with pytest.raises(ConfigError, match="epsilon = 0.2; pass epsilon_high=5.0"):
        make(CISPOTrainer, tmp_path, epsilon_high=None)
    with pytest.raises(ConfigError, match="(?s)loss_type = 'dapo'.*top_entropy_quantile = 0.5"):
        make(CISPOTrainer, tmp_path, loss_type="dapo", top_entropy_quantile=0.5)


# -------------------------------------------------------------------------------------------------------------- verl


@needs_verl
def test_the_verl_loss_is_registered_and_is_verl_s_own_inside_the_band():
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    import cispo.integrations.verl as integration

    ours, theirs = get_policy_loss_fn(integration.NAME), get_policy_loss_fn("cispo")
    torch.manual_seed(0)
    old, A = -torch.rand(3, 5) * 3, torch.randn(3, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    config = ActorConfig(strategy="fsdp", rollout_n=1, clip_ratio_low=1.0, clip_ratio_high=0.5, use_dynamic_bsz=True)
    integration.configure(0.0, 1.5)
    gradients = []
    for function in (ours, theirs):
        new = (-torch.rand(3, 5, generator=torch.Generator().manual_seed(2)) * 3).requires_grad_()
        loss, metrics = function(old, new, A, mask, "token-mean", config)
        gradients.append((loss.item(), metrics["actor/pg_clipfrac"], torch.autograd.grad(loss, new)[0]))
    torch.testing.assert_close(gradients[0], gradients[1])
    broken = torch.where(mask.bool(), -torch.rand(3, 5), -math.inf).requires_grad_()
    loss, metrics = ours(old, broken, A, mask)
    assert loss.isfinite() and torch.autograd.grad(loss, broken)[0].isfinite().all()
    assert all(math.isfinite(value) for value in metrics.values())
    with pytest.raises(ConfigError, match="clip_low_threshold = 3"):
        integration.configure(3.0, 1.0)
    integration.configure()
