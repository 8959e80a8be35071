"""A server that is killed at any moment loses nothing that it acknowledged: real processes, the real SDK, SIGKILL."""
# ruff: noqa: E402 (what follows needs the extra)

import json
import random
import resource
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

tinker = pytest.importorskip("tinker", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")

import torch
from tinker import types

from cispo.server.store import BlobRow, Corrupted, Store
from cispo.types import ConfigError
from tests.serving import Server, client_of, datums, serving


def stored(server, path):
    """The tensors of a checkpoint, read from the state directory itself."""
    from safetensors.torch import load_file

    with sqlite3.connect(f"{server.options['state_dir']}/server.db") as db:
        (blob,) = db.execute("SELECT blob FROM checkpoints WHERE path=?", (path,)).fetchone()
    return load_file(f"{server.options['state_dir']}/blobs/{blob}")


def train_two(server, steps, after_step=lambda step: None):
    """Two runs in turn, with accumulation, pipelining and saves in between. Returns both final states."""
    service = client_of(server)
    runs = [service.create_lora_training_client(base_model="tiny", rank=rank, seed=rank).result() for rank in (4, 8)]
    for step in range(steps):
        futures = []
        for i, run in enumerate(runs):
            for part in range(2):
                futures.append(run.forward_backward(datums(3, 100 * step + 10 * i + part), "cispo"))
            futures.append(run.optim_step(types.AdamParams(learning_rate=1e-2, weight_decay=0.01, grad_clip_norm=5.0)))
            if step == steps // 2:
                futures.append(run.save_state(f"middle-{i}"))
            for future in futures:  # one run at a time, so that no pass depends on who was quicker
                future.result()
        after_step(step)
    paths = [run.save_state("end").result().path for run in runs]
    return [stored(server, path) for path in paths]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert set(a) == set(b)
        for name in a:
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    "cut_every", [pytest.param(3, id="snapshots"), pytest.param(1000, id="log only", marks=pytest.mark.slow)]
)
def test_weights_after_sigkill_are_those_of_an_uninterrupted_run_bit_for_bit(tiny_folder, tmp_path, cut_every):
    with serving(tmp_path / "whole", model=[f"tiny={tiny_folder}"], cut_every=1000) as server:
        whole = train_two(server, 4)

    server = Server(tmp_path / "killed", model=[f"tiny={tiny_folder}"], cut_every=cut_every).start()
    server.wait_for_key()
    chance = random.Random(cut_every)
    kills = []

    def killer():
        for _ in range(2):
            time.sleep(chance.uniform(0.05, 0.6))
            server.kill()
            kills.append(time.monotonic())
            server.start()

    thread = threading.Thread(target=killer)
    try:
        killed = train_two(server, 4, lambda step: thread.start() if step == 0 else None)
        thread.join()
        assert len(kills) == 2
        assert_same(whole, killed)
    finally:
        thread.join()
        assert server.stop() == 0


def test_passes_that_clients_shared_are_shared_again_after_sigkill_bit_for_bit(tiny_folder, tmp_path):
    """Four clients at once, whose requests ran in passes of several adapters, in halves on two threads."""
    server = Server(tmp_path, model=[f"tiny={tiny_folder}"], cut_every=1000).start()
    server.wait_for_key()
    try:
        service = client_of(server)
        runs = [service.create_lora_training_client(base_model="tiny", rank=4 + i, seed=i).result() for i in range(4)]

        def job(i):
            for step in range(6):
                backward = runs[i].forward_backward(datums(2 + i, 10 * step + i), "cispo")
                runs[i].optim_step(types.AdamParams(learning_rate=1e-2)).result()
                backward.result()
            return runs[i].save_state("before").result().path

        with ThreadPoolExecutor(4) as pool:
            before = [stored(server, path) for path in pool.map(job, range(4))]
        with sqlite3.connect(tmp_path / "server.db") as db:
            groups = db.execute("SELECT count(*) FROM requests WHERE together IS NOT NULL GROUP BY together").fetchall()
            assert db.execute("SELECT max(done) FROM models").fetchone() == (0,)  # all of it runs again
        assert max(size for (size,) in groups) >= 3, groups
        server.kill()
        server.start()
        assert_same(before, [stored(server, run.save_state("after").result().path) for run in runs])
    finally:
        server.stop()


def test_a_repeated_request_is_answered_with_the_first_result_after_a_restart_too(tiny_folder, tmp_path):
    server = Server(tmp_path, model=[f"tiny={tiny_folder}"]).start()
    server.wait_for_key()
    try:
        _, reply = server.request("POST", "/api/v1/create_session", {"type": "create_session"})
        session = json.loads(reply)["session_id"]
        create = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
        first = json.loads(server.request("POST", "/api/v1/create_model", create)[1])
        assert json.loads(server.request("POST", "/api/v1/create_model", create)[1]) == first
        assert first["model_id"] == f"{session}:train:0"
        step = {"model_id": first["model_id"], "seq_id": 1, "adam_params": {"learning_rate": 0.1}}
        one = json.loads(server.request("POST", "/api/v1/optim_step", step)[1])["request_id"]
        result = server.result(one)
        server.kill()
        server.start()
        again = json.loads(server.request("POST", "/api/v1/optim_step", step)[1])["request_id"]
        assert again == one
        assert server.result(again) == result
        status, reply = server.request("POST", "/api/v1/optim_step", {**step, "adam_params": {"learning_rate": 0.2}})
        assert status == 422 and b"each is used once" in reply
        assert server.request("POST", "/api/v1/create_model", create)[0] == 200
    finally:
        server.stop()


@pytest.mark.slow
def test_sigterm_finishes_what_was_accepted_and_the_client_goes_on_after_a_restart(tiny_folder, tmp_path):
    server = Server(tmp_path, model=[f"tiny={tiny_folder}"]).start()
    server.wait_for_key()
    try:
        run = client_of(server).create_lora_training_client(base_model="tiny", rank=4, seed=1).result()
        run.forward_backward(datums(2, 0), "cispo").result()
        accepted = run.optim_step(types.AdamParams(learning_rate=0.1))
        accepted.result()
        path = run.save_state("kept").result().path
        sampler = run.save_weights_and_get_sampling_client().result()
        prompt = types.ModelInput.from_ints([12, 1, 2, 3])
        before = sampler.compute_logprobs(prompt).result()
        assert server.stop() == 0
        server.start()
        assert sampler.compute_logprobs(prompt).result() == before
        run.forward_backward(datums(2, 1), "cispo").result()
        assert run.optim_step(types.AdamParams(learning_rate=0.1)).result().metrics["grad_norm"] > 0
        again = client_of(server).create_training_client_from_state_with_optimizer(path).result()
        assert again.get_info().lora_rank == 4
    finally:
        server.stop()


def test_a_second_server_on_the_same_state_directory_is_refused(tmp_path):
    store = Store(tmp_path)
    try:
        with pytest.raises(ConfigError, match=r"is in use by the server with pid \d+"):
            Store(tmp_path)
    finally:
        store.close()
    Store(tmp_path).close()


@pytest.mark.slow
def test_a_damaged_snapshot_is_told_and_the_other_runs_go_on(tiny_folder, tmp_path):
    with serving(tmp_path, model=[f"tiny={tiny_folder}"]) as server:
        service = client_of(server)
        runs = [service.create_lora_training_client(base_model="tiny", rank=4, seed=i).result() for i in range(2)]
        path = runs[0].save_state("good").result().path
        ids = [run.model_id for run in runs]
    with sqlite3.connect(tmp_path / "server.db") as db:
        (blob,) = db.execute("SELECT blob FROM models WHERE id=?", (ids[0],)).fetchone()
    file = tmp_path / "blobs" / blob
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with serving(tmp_path, model=[f"tiny={tiny_folder}"], port=server.options["port"]) as again:
        again.key = server.key
        with pytest.raises(tinker.RequestFailedError, match="damaged"):
            runs[0].forward_backward(datums(1, 0), "cispo").result()
        runs[1].forward_backward(datums(1, 0), "cispo").result()
        info = json.loads(again.request("GET", f"/api/v1/training_runs/{ids[0]}")[1])
        assert info["corrupted"] is True
        rescued = tinker.ServiceClient(base_url=again.url, api_key=again.key).create_training_client_from_state(path)
        rescued.result().forward_backward(datums(1, 0), "cispo").result()


@pytest.mark.slow
def test_a_full_disk_refuses_new_requests_and_keeps_what_was_accepted(tiny_folder, tmp_path):
    """No file may grow beyond 3 MB: the log's commit fails as it does on a full disk."""

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))

    server = Server(tmp_path, model=[f"tiny={tiny_folder}"]).start(preexec=small_files)
    server.wait_for_key()
    try:
        _, reply = server.request("POST", "/api/v1/create_session", {"type": "create_session"})
        session = json.loads(reply)["session_id"]
        sampler = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
        sampler_id = json.loads(server.request("POST", "/api/v1/create_sampling_session", sampler)[1])
        statuses = set()
        for seq in range(60):
            # Accepted at once as failed, and 200 kB each in the log for its long prompt's sake.
            body = {
                "sampling_session_id": sampler_id["sampling_session_id"],
                "seq_id": seq,
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
                "sampling_params": {"max_tokens": 2, "stop": ["x" * 200_000]},
            }
            status, reply = server.request("POST", "/api/v1/asample", body)
            statuses.add(status)
            if status == 503:
                assert b"nothing was accepted" in reply
                break
        assert statuses == {200, 503}
        assert server.request("GET", "/healthz")[0] == 200
    finally:
        server.kill()
    with sqlite3.connect(tmp_path / "server.db") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT count(*) FROM requests").fetchone()[0] == seq
    server.start()
    assert server.stop() == 0


def test_a_write_that_fails_takes_back_only_itself_and_files_have_checksums(tmp_path):
    store = Store(tmp_path)
    try:
        blob = store.write_blob({"flat": torch.arange(4.0)}, {"kind": "weights"})
        assert torch.equal(store.read_blob(blob)["flat"], torch.arange(4.0))
        with pytest.raises(Corrupted, match="checksum"):
            store.read_blob(BlobRow(blob.id, blob.size, "0" * 64))
        with pytest.raises(Corrupted, match="cannot be read"):
            store.read_blob(BlobRow("missing", 1, "0" * 64))
        written = [store.write(lambda db, n=n: db.execute("INSERT INTO meta VALUES (?, 'x')", (str(n),)).rowcount)
                   for n in (1, 2, 1, 3)]  # fmt: skip
        assert [f.exception() is None for f in written] == [True, True, False, True]
        assert isinstance(written[2].exception(), sqlite3.IntegrityError)
        assert {row[0] for row in store.read("SELECT key FROM meta WHERE value='x'")} == {"1", "2", "3"}
    finally:
        store.close()


@pytest.mark.slow
def test_adapters_that_memory_does_not_hold_come_back_from_disk_unseen(tiny_folder, tmp_path):
    """Room for about one adapter, three runs in turn: the same weights as with room for all."""
    finals = []
    for name, room in (("roomy", 1.0), ("tight", 1e-4)):
        with serving(tmp_path / name, model=[f"tiny={tiny_folder}"], adapter_memory_gib=room) as server:
            service = client_of(server)
            runs = [service.create_lora_training_client(base_model="tiny", rank=4, seed=i).result() for i in range(3)]
            for step in range(6):
                for i, run in enumerate(runs):
                    run.forward_backward(datums(2, 10 * step + i), "cispo").result()
                    if step % 2:  # a gradient waits through evictions too
                        run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
            finals.append([stored(server, run.save_state("end").result().path) for run in runs])
            metrics = server.request("GET", "/metrics")[1].decode()
        loads = float(next(x for x in metrics.splitlines() if x.startswith("cispo_adapter_loads_total")).split()[1])
        assert (loads > 0) == (name == "tight")
    assert_same(*finals)
