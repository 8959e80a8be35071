"""The sharded learner on 1, 2 and 4 real ranks (gloo): the gradients of one process, whatever the ranks.

    python -m pytest tests/test_fsdp.py

Each number of ranks is one launch, in which all cases run one after another; the tests then compare what it wrote with
`LocalLearner` in this process.
"""

import dataclasses
import gc
import multiprocessing
import os
import random
import signal
import socket

import pytest
import torch
import torch.multiprocessing as mp

from cispo import cluster, objectives
from cispo import config as configs
from cispo import model as models
from cispo.batching import make_batch, take_rows, with_columns, with_reduction
from cispo.config import AlgorithmConfig, GspoObjective, KLConfig, LearnerConfig, LoraConfig, ModelConfig
from cispo.learner import LocalLearner
from cispo.sharded import ShardedLearner, join
from cispo.tasks import think
from cispo.types import AdamParams, LearnerLost, NonFiniteError, Trajectory

STEP = AdamParams(1e-3, weight_decay=0.1, grad_clip_norm=0.05)


def rollout(lengths, *, seed=0, prompt=3, reduction="prompt"):
    """Random trajectories of unequal lengths, nearly on-policy; a length of 0 is a row without a trained token."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        total = prompt + length
        rows.append(
            Trajectory(
                tokens=torch.randint(0, 14, (total,), generator=generator),
                action_mask=torch.arange(total) >= prompt,
                sampler_logprobs=-3.0 + torch.rand(total, generator=generator),
                versions=torch.zeros(total, dtype=torch.long),
                text="",
                reward=0.0,
                rewards={},
                truncated=False,
            )
        )
    batch = make_batch(rows, torch.randn(len(lengths), generator=generator).tolist())
    batch = with_columns(
        batch,
        anchor_logprobs=batch.columns["sampler_logprobs"],
        reference_logprobs=batch.columns["sampler_logprobs"] - 0.1,
        rows=torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(batch.lengths)).float(),
    )
    return with_reduction(batch, reduction, [i // 2 for i in range(len(rows))])


@dataclasses.dataclass(frozen=True)
class Case:
    """One model, one batch (in `calls` pieces), one way to lay it out."""

    lengths: tuple[int, ...]
    tokens: int = 16384
    share: float = 0.25
    calls: int = 1
    model: str = "plain"
    algorithm: AlgorithmConfig = AlgorithmConfig()
    entropy_bonus: float = 0.0
    gather_bytes: int = 1 << 30
    nonfinite: int | None = None  # a position whose anchor is NaN, and is dropped

    def batches(self):
        batch = rollout(self.lengths, reduction=self.algorithm.reduction)
        if self.nonfinite is not None:
            anchor = batch.columns["anchor_logprobs"].clone()
            anchor[(batch.weights_T != 0).nonzero()[self.nonfinite]] = float("nan")
            batch = with_columns(batch, anchor_logprobs=anchor)
        order = list(range(len(self.lengths)))
        return [take_rows(batch, order[i :: self.calls]) for i in range(self.calls)]

    def run(self, learner):
        """The outputs of the calls and, in full, the gradients that they left."""
        learner._layout = LearnerConfig(micro_batch_tokens=self.tokens, max_padding_share=self.share)
        learner._head_gather_bytes = self.gather_bytes
        learner.zero_grad()
        outputs = [
            learner.forward_backward(
                batch,
                objectives.bind(self.algorithm),
                temperature=0.9,
                nonfinite="raise" if self.nonfinite is None else "drop",
                entropy_bonus=self.entropy_bonus,
            )
            for batch in self.batches()
        ]
        return outputs, gradients(learner)


def gradients(learner):
    found = {name: master.grad for name, master in learner._named_masters() if master.grad is not None}
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for name, g in found.items()}


def cases():
    """Laws by many draws, and each thing that could change the sum once."""
    draw = random.Random(0)
    found = {
        f"draw{i}": Case(
            tuple(draw.randint(0, 25) for _ in range(draw.randint(1, 9))),
            tokens=draw.randint(10, 300),
            share=draw.random(),
            calls=draw.randint(1, 2),
        )
        for i in range(8)
    }
    gspo = AlgorithmConfig(objective=GspoObjective(), reduction="sequence")
    return found | {
        "one row": Case((7,)),
        "no trained token": Case((0, 0, 0)),
        "padding": Case((1, 2, 30, 4), share=1.0),
        "kl": Case((4, 9, 2), algorithm=AlgorithmConfig(kl=KLConfig(coef=0.5))),
        "whole sequences": Case((4, 9, 2), tokens=20, algorithm=gspo),
        "entropy bonus": Case((4, 9, 2), tokens=20, entropy_bonus=0.1),
        "dropped": Case((4, 9, 2), tokens=20, nonfinite=5),
        "spread head": Case((4, 9, 2, 12), tokens=20, gather_bytes=1),
        "spread head, one row": Case((7,), gather_bytes=1),
        "spread head, kl": Case((4, 9, 2), tokens=20, gather_bytes=1, algorithm=AlgorithmConfig(kl=KLConfig(coef=0.5))),
        "spread head, whole sequences": Case((4, 9, 2), tokens=20, gather_bytes=1, algorithm=gspo),
        "spread head, entropy bonus": Case((4, 9, 2), tokens=20, gather_bytes=1, entropy_bonus=0.1),
        "spread head, dropped": Case((4, 9, 2), tokens=20, gather_bytes=1, nonfinite=5),
        "tied": Case((4, 9, 2, 12), tokens=20, model="tied"),
        "recomputed": Case((4, 9, 2, 12), tokens=20, model="checkpointed"),
        "bfloat16": Case((4, 9, 2, 12), tokens=20, model="bfloat16"),
        "lora": Case((4, 9, 2, 12), tokens=20, model="lora"),
    }


CASES = cases()


def load(kind, folders):
    torch.manual_seed(0)
    config = {
        "checkpointed": ModelConfig(gradient_checkpointing=True),
        "bfloat16": ModelConfig(dtype="bfloat16"),
        "lora": ModelConfig(lora=LoraConfig(rank=2)),
    }.get(kind, ModelConfig())
    loaded = models.load(config, folders["tied" if kind == "tied" else "plain"])
    if kind == "lora":  # peft starts with B = 0, where A has no gradient
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return loaded


def steps(learner, seeds):
    return [
        (learner.forward_backward(rollout([4, 7, 2, 9], seed=s), objectives.bind(AlgorithmConfig())).loss,
         learner.optim_step(STEP)["grad_norm"])
        for s in seeds
    ]  # fmt: skip


def worker(rank, ranks, folders, out):
    """Everything that is measured on `ranks` ranks; rank 0 writes it down."""
    torch.set_num_threads(1)
    mesh = join(
        device=torch.device("cpu"), timeout_s=120, rank=rank, world_size=ranks, init_method=f"file://{out}/rendezvous"
    )
    found = {"cases": {}}
    learners = dict.fromkeys(dict.fromkeys(case.model for case in CASES.values()))
    for kind in learners:
        learner = learners[kind] = ShardedLearner(load(kind, folders), mesh=mesh)
        for name, case in CASES.items():
            if case.model == kind:
                found["cases"][name] = case.run(learner)
    plain = learners["plain"]
    plain.zero_grad()
    # An error at one rank's row is everybody's error, leaves no gradient, and the next call works.
    bad = rollout([4, 7, 2, 9])
    bad = with_columns(bad, anchor_logprobs=torch.where(torch.arange(len(bad.targets_T)) == 4, torch.nan, -1.0))
    found["errors"] = []
    for plain._head_gather_bytes in (1, 1 << 30):
        try:
            plain.forward_backward(bad, objectives.bind(AlgorithmConfig()))
        except NonFiniteError as error:
            found["errors"].append((str(error), gradients(plain)))
    found["forward"] = plain.forward(rollout([3, 8, 1]), temperature=0.7)
    found["steps"] = steps(plain, (0, 1))
    plain.save(out)
    found["later steps"] = steps(plain, (2, 3))
    found["weights"] = dict(plain.weights())
    found["lora"] = dict(learners["lora"].weights())
    learners["lora"].export(out / "adapter", merge=False)
    learners["lora"].export(out / "merged")
    other = folders.get("saved")
    if other:
        plain.load(other)
        found["continued"] = steps(plain, (2, 3))
    if rank == 0:
        torch.save(found, out / "found.pt")
    torch.distributed.barrier()
    del learner, learners, plain, mesh
    gc.collect()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may abort an ordinary exit


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_folder):
    tied = tmp_path_factory.mktemp("tied")
    torch.manual_seed(0)
    think.make_model(think.BaseRecipe(tied=True)).save_pretrained(tied)
    think.make_tokenizer().save_pretrained(tied)
    return {"plain": tiny_folder, "tied": tied}


@pytest.fixture(scope="module")
def expected(folders):
    """The same of one process."""
    found = {name: case.run(LocalLearner(load(case.model, folders))) for name, case in CASES.items()}
    learner = LocalLearner(load("plain", folders))
    forward = learner.forward(rollout([3, 8, 1]), temperature=0.7)
    return {"cases": found, "forward": forward, "steps": steps(learner, range(4)), "weights": learner.weights()}


@pytest.fixture(scope="module")
def launches(folders, tmp_path_factory):
    """Results by number of ranks. Each launch but the first also continues what the one before has saved."""
    found = {}
    multiprocessing.set_forkserver_preload(["cispo.sharded", "cispo.tasks.think", "peft", "pytest"])  # imports once
    for ranks in (2, 1, 4):
        out = tmp_path_factory.mktemp(f"ranks{ranks}")
        previous = {"saved": found[max(found, key=list(found).index)]["folder"]} if found else {}
        mp.start_processes(worker, (ranks, folders | previous, out), nprocs=ranks, start_method="forkserver")
        found[ranks] = torch.load(out / "found.pt", weights_only=False) | {"folder": out}
    return found


def relative(a, b):
    return max((float((a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-12)) for n in b), default=0.0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(name, ranks, launches, expected):
    outputs, found = launches[ranks]["cases"][name]
    own_outputs, own = expected["cases"][name]
    tolerance = 0.05 if CASES[name].model == "bfloat16" else 1e-4
    assert set(found) >= set(own)
    assert relative(found, own) < tolerance
    assert all(not bool(found[n].any()) for n in set(found) - set(own))
    for output, own_output in zip(outputs, own_outputs, strict=True):
        assert output.loss == pytest.approx(own_output.loss, rel=tolerance, abs=tolerance / 100)
        assert torch.equal(output.evaluated_T, own_output.evaluated_T)
        assert output.dropped == own_output.dropped
        for values, own_values in (
            (output.logprobs_T, own_output.logprobs_T),
            (output.entropy_T, own_output.entropy_T),
        ):
            assert torch.allclose(values, own_values, atol=tolerance)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_error_on_one_rank_is_raised_by_all_and_the_next_call_works(ranks, launches, expected):
    assert len(launches[ranks]["errors"]) == 2  # with a head that is gathered, and one that is not
    for message, left in launches[ranks]["errors"]:
        assert "anchor_logprobs" in message and not left
    found = launches[ranks]["forward"]
    assert torch.allclose(found.logprobs_T, expected["forward"].logprobs_T, atol=1e-5)
    assert torch.equal(found.evaluated_T, expected["forward"].evaluated_T)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_steps_norms_and_weights_are_those_of_one_process(ranks, launches, expected):
    found = launches[ranks]
    for (loss, norm), (own_loss, own_norm) in zip(
        found["steps"] + found["later steps"], expected["steps"], strict=True
    ):
        assert loss == pytest.approx(own_loss, rel=1e-3, abs=1e-5)
        assert norm == pytest.approx(own_norm, rel=1e-3)
    assert set(found["weights"]) == set(expected["weights"])
    for name, weight in expected["weights"].items():
        assert torch.allclose(found["weights"][name], weight, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(2, 1), (1, 4)])
def test_a_checkpoint_loads_at_another_number_of_ranks(saved_at, loaded_at, launches):
    there, here = launches[saved_at]["later steps"], launches[loaded_at]["continued"]
    for (loss, norm), (own_loss, own_norm) in zip(here, there, strict=True):
        assert loss == pytest.approx(own_loss, rel=1e-4, abs=1e-6)
        assert norm == pytest.approx(own_norm, rel=1e-4)


def test_a_checkpoint_holds_an_ordinary_model_folder(launches):
    found = launches[2]
    stored = LocalLearner(models.load(ModelConfig(), found["folder"] / "model")).forward(rollout([3, 8, 1]))
    assert bool(stored.evaluated_T.any())
    plain = models.load(ModelConfig(), found["folder"] / "merged").model.state_dict()
    for name, weight in found["lora"].items():
        assert torch.allclose(plain[name], weight, atol=1e-6), name
    assert (found["folder"] / "adapter" / "adapter_model.safetensors").is_file()


def conducted(rank, folder, out):
    """Two ranks as torchrun starts them: the first has the verbs, the second follows, and is killed in the end."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": (out / "port").read_text()}
    config = configs.load(None, ["--cluster", "torchrun", "--threads", "1"])
    (out / f"pid{rank}").write_text(str(os.getpid()))
    if cluster.follows(config):
        cluster.follow(config, folder)
        os._exit(0)
    learner = cluster.compose(config, folder, None).learner
    found = {"steps": steps(learner, (0, 1)), "weights": dict(learner.weights())}
    os.kill(int((out / "pid1").read_text()), signal.SIGKILL)
    try:
        steps(learner, (2,))
    except LearnerLost as error:
        found["lost"] = str(error)
    torch.save(found, out / "found.pt")
    os._exit(0)


def test_a_conductor_takes_the_ranks_of_torchrun_along_and_names_their_loss(folders, expected, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=conducted, args=(r, folders["plain"], tmp_path)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    assert [process.exitcode for process in ranks] == [0, -signal.SIGKILL]
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    for (loss, norm), (own_loss, own_norm) in zip(found["steps"], expected["steps"][:2], strict=True):
        assert loss == pytest.approx(own_loss, rel=1e-3, abs=1e-5)
        assert norm == pytest.approx(own_norm, rel=1e-3)
    assert set(found["weights"]) == set(expected["weights"])
    assert "a rank of the learner was lost" in found["lost"]
