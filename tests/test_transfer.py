"""Weights by broadcast between real members: threads of this process over gloo's sockets, and one that is killed."""

import dataclasses
import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cispo import transfer
from cispo.sampling.vllm import _transfer_folder
from cispo.transfer import Incoming, Layout, Receivers, Sender, TransferLost

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)


def sender(**options):
    return Sender("127.0.0.1", CPU, **{"patience_s": 30.0, "timeout_s": 30.0, **options})


def weights():
    torch.manual_seed(0)
    embedding = torch.randn(11, 3)
    return {
        "embedding": embedding,
        "half": torch.randn(7).bfloat16(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2, dtype=torch.int64),
        "large": torch.randn(100, 5),
        "head": embedding,  # tied
    }


def receive(receivers, meeting, rank):
    receivers.arrive(meeting, rank)
    return dict(receivers.receive(meeting, rank, CPU))


def publish(post, meeting, sent, **options):
    layout = Layout.of(sent, **options)
    post.open(meeting, layout)
    post.send(layout, (sent[name] for name in layout.names))


def equal(found, sent):
    assert set(found) == set(sent)
    for name, tensor in sent.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("limit", [1, 300, 1 << 20])
def test_every_receiver_gets_every_tensor_as_it_is_and_a_meeting_serves_again(limit):
    post = sender()
    meeting, sent = post.meet((1, 1)), weights()
    receivers = [Receivers(), Receivers()]
    with ThreadPoolExecutor(2) as pool:
        for round_ in range(3):
            sent = {name: tensor + round_ for name, tensor in sent.items()} | {"head": sent["embedding"]}
            found = [pool.submit(receive, receivers[i], meeting, i + 1) for i in (0, 1)]
            publish(post, meeting, sent, limit=limit)
            for future in found:
                equal(future.result(), sent)
            meeting = meeting.again()


def test_weights_go_in_the_dtype_asked_for_and_tied_ones_once():
    sent = weights() | {"head": weights()["embedding"]}
    layout = Layout.of(weights(), {"embedding": torch.bfloat16})
    assert layout.aliases == {"head": "embedding"} and "head" not in layout.names
    post = sender()
    meeting = post.meet((1,))
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: dict(Incoming(Receivers(), meeting, 1, CPU)))
        post.open(meeting, layout, doors=False)
        post.send(layout, (sent[name] for name in layout.names))
        equal(found.result(), weights() | {n: sent["embedding"].bfloat16() for n in ("embedding", "head")})


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=12),
    st.integers(1, 500),
)
def test_a_layout_has_room_for_every_tensor_and_survives_its_text(kinds, limit):
    sent = {f"w{i}": torch.ones(shape).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    layout = Layout.of(sent, limit=limit)
    assert Layout.from_json(layout.to_json()) == layout
    assert [*layout.names] == list(sent)
    for bucket in layout.buckets:
        size = transfer.size_of(bucket)
        assert len(bucket) == 1 or size - bucket[-1].offset <= size <= limit + 63
        buffer = torch.zeros(size, dtype=torch.uint8)
        for entry in bucket:
            transfer.write(buffer, entry, sent[entry.name])
        for entry in bucket:
            assert torch.equal(transfer.read(buffer, entry), sent[entry.name])


def test_a_receiver_that_does_not_come_is_named():
    post = sender(patience_s=0.5)
    meeting = post.meet((2, 1))  # one door with two members behind it, as of an engine on two devices, and another
    seen = []
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(Receivers().arrive, meeting, 1, lambda: seen.append(1))
        with pytest.raises(TransferLost, match="receiver 3 did not come within 0.5 s"):
            post.open(meeting, Layout.of(weights()))
        with pytest.raises(TransferLost, match="the sender's word did not come within 0.5 s"):
            other.result()
    assert seen  # whoever watches it saw that it lived


def test_whoever_watches_can_end_the_waiting_of_both_ends():
    post = sender()
    meeting = post.meet((1, 1))
    with ThreadPoolExecutor(2) as pool:
        ends = [
            pool.submit(post.open, meeting, Layout.of(weights())),
            pool.submit(Receivers().arrive, meeting, 1),
        ]
        transfer.give_up(meeting, "sampler 1 died")
        for end in ends:
            with pytest.raises(TransferLost, match="sampler 1 died"):
                end.result()
    with pytest.raises(TransferLost, match="is over"):
        next_meeting = post.meet((1,))
        post.open(meeting, Layout.of(weights()))
    with ThreadPoolExecutor(1) as pool:  # a new one is not burdened by the old one's end
        found = pool.submit(receive, Receivers(), next_meeting, 1)
        publish(post, next_meeting, weights())
        equal(found.result(), weights())


DIES = """
import json, os, signal, sys, torch
from cispo.transfer import Meeting, Receivers
meeting, receivers = Meeting(**json.loads(sys.argv[1])), Receivers()
receivers.arrive(meeting, 2)
for name, tensor in receivers.receive(meeting, 2, torch.device("cpu")):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_receiver_that_dies_in_the_middle_ends_the_transfer_for_all():
    post = sender(timeout_s=5.0)
    meeting, sent = post.meet((1, 1)), weights()
    dying = subprocess.Popen([sys.executable, "-c", DIES, json.dumps(dataclasses.asdict(meeting))])
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(receive, Receivers(), meeting, 1)
        # Small parts, and so many that its death comes before the last of them.
        many = sent | {f"w{i}": torch.randn(1000) for i in range(20000)}
        with pytest.raises(TransferLost, match="a member was lost"):
            publish(post, meeting, many, limit=1)
        post.meet(())  # ends the group, and with it the other's waiting
        with pytest.raises(TransferLost):
            other.result()
    assert dying.wait() == -signal.SIGKILL


def test_a_sender_that_is_gone_ends_the_waiting():
    post = sender()
    meeting = post.meet((1,))
    receivers = Receivers()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(receive, receivers, meeting, 1)
        publish(post, meeting, weights())
        equal(found.result(), weights())
        waiting = pool.submit(receive, receivers, meeting.again(), 1)
        del post  # and its store
        with pytest.raises(TransferLost, match="the sender's store was lost"):
            waiting.result()


OWNER = """
import os, signal, sys
from cispo.sampling.vllm import _transfer_folder
folder, lock = _transfer_folder(sys.argv[1], 0)
(folder / "weights-000001.safetensors").write_bytes(b"...")
print(folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_weight_files_of_a_sampler_that_was_killed_are_removed_by_the_next_and_no_others(tmp_path):
    dead = subprocess.run([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert dead.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert str(left) == dead.stdout.strip() and (left / "weights-000001.safetensors").exists()
    mine, lock = _transfer_folder(str(tmp_path), 0)
    assert list(tmp_path.iterdir()) == [mine]
    other, other_lock = _transfer_folder(str(tmp_path), 0)
    assert sorted(tmp_path.iterdir()) == sorted([mine, other])
    lock.close()
    other_lock.close()
