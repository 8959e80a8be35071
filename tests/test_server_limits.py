"""What a client may take and what it may say about itself: 429, lying lengths, cancelling, expiry, other ranks."""
# ruff: noqa: E402 (what follows needs the extra)

import asyncio
import json
import re
import socket
import sqlite3
import time
import urllib.error
import urllib.request

import pytest

tinker = pytest.importorskip("tinker", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tinker import types

from cispo.config import ModelConfig
from cispo.server.compute import ServedModel
from cispo.server.engine import EngineSettings
from cispo.server.metrics import Metrics
from cispo.server.service import KEEP_SAMPLER, SPARE_SAMPLER, Refused, Service
from cispo.server.store import Store
from cispo.server.tenants import Limits
from tests.serving import Server, client_of, datums, serving

PROMPT = [12, 1, 2, 3]
LIMIT = 1 << 20


@pytest.fixture(scope="module")
def server(tiny_folder, tmp_path_factory):
    """Four requests of a key under way at most, a body of 1 MiB, and many small micro-batches."""
    options = {"max_requests": 4, "max_body_mib": 1, "micro_batch_tokens": 64}
    with serving(tmp_path_factory.mktemp("limits"), model=[f"tiny={tiny_folder}"], **options) as started:
        yield started


@pytest.fixture
def run(server):
    return client_of(server).create_lora_training_client(base_model="tiny", rank=4, seed=1).result()


def answers(server):
    """How many replies there were, by route and status."""
    page = server.request("GET", "/metrics")[1].decode()
    found = re.findall(r'^cispo_http_requests_total{route="(.*)",status="(\d+)"} (\S+)$', page, re.MULTILINE)
    return {(route.rpartition("/")[2], int(status)): float(count) for route, status, count in found}


def asample(server, sampler_id, seq, **params):
    """Status, headers and JSON of one plain request."""
    body = {
        "sampling_session_id": sampler_id, "seq_id": seq, "num_samples": 64, "sampling_params": params,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]},
    }  # fmt: skip
    headers = {"X-API-Key": server.key, "Content-Type": "application/json"}
    request = urllib.request.Request(server.url + "/api/v1/asample", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.headers, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.load(error)


def new_sampler(server):
    session = json.loads(server.request("POST", "/api/v1/create_session", {})[1])["session_id"]
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    return json.loads(server.request("POST", "/api/v1/create_sampling_session", body)[1])["sampling_session_id"]


# ------------------------------------------------------------------------------------------------------- requests a key


def test_more_requests_than_a_key_may_have_are_429_with_retry_after_and_change_nothing(server, run):
    long = run.forward_backward(datums(200, 0), "cispo")  # keeps the engine busy over what follows
    sampler = new_sampler(server)
    replies = [asample(server, sampler, seq, max_tokens=60, stop=[]) for seq in range(8)]
    refused = [seq for seq, (status, _, _) in enumerate(replies) if status == 429]
    assert refused and {status for status, _, _ in replies} == {200, 429}
    for seq in refused:
        _, headers, body = replies[seq]
        assert float(headers["retry-after"]) > 0 and "4 requests of this key are under way" in body["error"]
    accepted = [body["request_id"] for status, _, body in replies if status == 200]
    for request_id in accepted:
        status = 408
        while status == 408:
            status, _ = server.request("POST", "/api/v1/retrieve_future", {"request_id": request_id})
        assert status == 200
    long.result()
    status, _, body = asample(server, sampler, refused[0], max_tokens=1)  # the number was not used up
    assert status == 200 and body["request_id"] not in accepted


def test_the_sdk_goes_on_after_429(server, run):
    """Sampling and training beyond the limit: the SDK waits as it is told, and every request is done once."""
    sampler = run.save_weights_and_get_sampling_client().result()
    before = answers(server)
    backwards = [run.forward_backward(datums(40, seed), "cispo") for seed in range(6)]
    step = run.optim_step(types.AdamParams(learning_rate=1e-2))
    prompt = types.ModelInput.from_ints(PROMPT)
    samples = [sampler.sample(prompt, 8, types.SamplingParams(max_tokens=40, seed=i, stop=[])) for i in range(8)]
    saved = run.save_state("after")
    assert all(len(sample.result().sequences) == 8 for sample in samples)
    assert all(len(backward.result().loss_fn_outputs) == 40 for backward in backwards)
    assert step.result().metrics["grad_norm"] > 0
    assert saved.result().path.endswith("/weights/after")
    now = answers(server)
    refused = {route for (route, status), count in now.items() if status == 429 and count > before.get((route, 429), 0)}
    assert refused & {"forward_backward", "optim_step", "asample", "save_weights"}, now
    assert all(now[route, 429] <= 100 for route in refused)  # it waited: it did not hammer


def test_a_save_or_a_new_run_that_was_refused_can_be_sent_again(server, run):
    long = run.forward_backward(datums(200, 0), "cispo")
    sampler = new_sampler(server)
    status, seq = 200, 0
    while status == 200:
        status, _, _ = asample(server, sampler, seq, max_tokens=60, stop=[])
        seq += 1
    session = run.model_id.split(":")[0]
    create = {"session_id": session, "model_seq_id": 7, "base_model": "tiny", "lora_config": {"rank": 2}}
    save = {"model_id": run.model_id, "path": "again", "seq_id": 50}
    for path, body in (("create_model", create), ("save_weights", save)):
        assert server.request("POST", f"/api/v1/{path}", body)[0] == 429
    assert server.request("POST", "/api/v1/get_info", {"model_id": f"{session}:train:7"})[0] == 404
    long.result()
    for path, body in (("create_model", create), ("save_weights", save)):
        status = 429
        while status == 429:
            status, reply = server.request("POST", f"/api/v1/{path}", body)
        assert "error" not in server.result(json.loads(reply)["request_id"])


# -------------------------------------------------------------------------------------------------------------- lengths


def raw(server, head, body=b"", *, end=False):
    """What the server sends back to these bytes; `end`: after them the client sends no more."""
    host, port = re.fullmatch(r"http://(.+):(\d+)", server.url).groups()
    with socket.create_connection((host, int(port)), timeout=30) as line:
        line.sendall(head.encode("latin-1") + b"\r\n\r\n" + body)
        if end:
            line.shutdown(socket.SHUT_WR)
        try:
            return line.recv(1 << 16)
        except ConnectionResetError:
            return b""


def head(server, path, length, kind="application/json"):
    return (
        f"POST /api/v1/{path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {server.key}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {length}\r\nConnection: close"
    )


def check_serving(server):
    assert json.loads(server.request("GET", "/api/v1/healthz")[1]) == {"status": "ok"}
    assert not {key for key in answers(server) if key[1] >= 500}
    assert not [line for line in server.lines if '"level": "error"' in line or "Traceback" in line]


@settings(max_examples=60, deadline=None)
@given(
    path=st.sampled_from(["create_session", "optim_step", "forward_backward", "asample", "telemetry"]),
    length=st.integers(-(2**70), 2**70).map(str)
    | st.text("0123456789-+.ex, \t", max_size=6)
    | st.integers(0, 40).map(str),
    body=st.binary(max_size=40),
    kind=st.sampled_from(["application/json", "application/x-protobuf"]),
)
@example("create_session", "2", b'{"tags": ["more than two bytes"]}', "application/json")
@example("create_session", "400", b"{}", "application/json")
@example("create_session", "-1", b"{}", "application/json")
@example("create_session", "ten", b"{}", "application/json")
@example("forward_backward", str(2**63), b"", "application/x-protobuf")
@example("forward_backward", "9" * 4000, b"", "application/x-protobuf")
@example("create_session", "2\r\nContent-Length: 4", b"{}  ", "application/json")
@example("create_session", "2\r\nTransfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n\r\n", "application/json")
def test_no_length_is_the_servers_fault(server, path, length, body, kind):
    reply = raw(server, head(server, path, length, kind), body, end=True)
    assert reply == b"" or re.match(rb"HTTP/1\.1 [24]\d\d ", reply), reply[:80]


def test_lengths_that_lie_get_a_users_error_and_the_server_serves_on(server):
    assert raw(server, head(server, "create_session", 2), b"{}").startswith(b"HTTP/1.1 200 ")
    for length in (-1, "ten", "0x2", 10**30):
        assert raw(server, head(server, "create_session", length), b"{}").startswith(b"HTTP/1.1 400 "), length
    # Far too long is refused before it is sent, a little too long once it has come, and neither is kept.
    assert raw(server, head(server, "create_session", 10**12)).startswith(b"HTTP/1.1 413 ")
    assert raw(server, head(server, "create_session", 2 * LIMIT), b" " * (2 * LIMIT)).startswith(b"HTTP/1.1 413 ")
    # Shorter than said: the client goes away, and nothing is taken from it.
    sessions = json.loads(server.request("GET", "/api/v1/sessions?limit=1000")[1])["sessions"]
    reply = raw(server, head(server, "create_session", 400), b'{"tags": []}', end=True)
    assert reply == b"" or reply.startswith(b"HTTP/1.1 4")
    assert json.loads(server.request("GET", "/api/v1/sessions?limit=1000")[1])["sessions"] == sessions
    check_serving(server)


# ------------------------------------------------------------------------------------------- sampling beside training


def test_sampling_waits_for_no_more_than_a_micro_batch_of_training(server, run):
    """A forward_backward of two hundred micro-batches is under way: a sample that comes later is done first."""
    sampler = run.save_weights_and_get_sampling_client().result()
    long = run.forward_backward(datums(200, 0, length=60), "cispo")
    sampler.sample(types.ModelInput.from_ints(PROMPT), 1, types.SamplingParams(max_tokens=8, stop=[])).result()
    long.result()
    with sqlite3.connect(f"{server.options['state_dir']}/server.db") as db:
        finished = dict(db.execute("SELECT kind, max(finished) FROM requests GROUP BY kind"))
    assert finished["asample"] < finished["forward_backward"]


def test_a_cancelled_sample_fails_and_its_neighbours_do_not(server, run):
    sampler = new_sampler(server)
    long = run.forward_backward(datums(150, 0, length=60), "cispo")
    ids = [asample(server, sampler, seq, max_tokens=60, stop=[])[2]["request_id"] for seq in range(3)]
    assert server.request("POST", "/api/v1/cancel_future", {"request_id": ids[1]})[0] == 204
    assert server.result(ids[1]) == {"error": "the request was cancelled", "category": "user"}
    for request_id in (ids[0], ids[2]):
        status = 408
        while status == 408:
            status, reply = server.request("POST", "/api/v1/retrieve_future", {"request_id": request_id})
        assert status == 200 and b"cancelled" not in reply
    long.result()


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_another_rank_is_not_loaded_into_a_run(server, run):
    service = client_of(server)
    run.forward_backward(datums(2, 0), "cispo").result()
    path = run.save_state("four").result().path
    other = service.create_lora_training_client(base_model="tiny", rank=8, seed=1).result()
    before = other.forward(datums(2, 1), "cispo").result().metrics["loss:sum"]
    with pytest.raises(tinker.RequestFailedError, match="rank=4.*rank=8"):
        other.load_state(path).result()
    assert other.forward(datums(2, 1), "cispo").result().metrics["loss:sum"] == before
    attention_only = service.create_lora_training_client(base_model="tiny", rank=4, train_mlp=False).result()
    with pytest.raises(tinker.RequestFailedError, match="train_mlp"):
        attention_only.load_state(path).result()
    assert service.create_training_client_from_state(path).result().get_info().lora_rank == 4


def test_what_has_expired_is_gone_with_its_file_and_a_damaged_checkpoint_is_told(tiny_folder, tmp_path):
    server = Server(tmp_path, model=[f"tiny={tiny_folder}"]).start()
    server.wait_for_key()
    try:
        run = client_of(server).create_lora_training_client(base_model="tiny", rank=4, seed=1).result()
        run.forward_backward(datums(2, 0), "cispo").result()
        run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        short, kept, damaged = (run.save_state(name, ttl_seconds=3600).result().path for name in ("s", "k", "d"))
        assert server.stop() == 0
        with sqlite3.connect(tmp_path / "server.db") as db:
            blobs = dict(db.execute("SELECT path, blob FROM checkpoints"))
            db.execute("UPDATE checkpoints SET expires=? WHERE path=?", (time.time() - 1, short))
        file = tmp_path / "blobs" / blobs[damaged]
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
        server.start()
        service = client_of(server)
        with pytest.raises(tinker.RequestFailedError, match="does not exist"):
            service.create_training_client_from_state(short).result()
        with pytest.raises(tinker.RequestFailedError, match="damaged.*checksum"):
            service.create_training_client_from_state(damaged).result()
        assert service.create_training_client_from_state(kept).result().get_info().lora_rank == 4
        run.save_state("s").result()  # its name is free again
        deadline = time.monotonic() + 30
        while (tmp_path / "blobs" / blobs[short]).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not (tmp_path / "blobs" / blobs[short]).exists() and (tmp_path / "blobs" / blobs[kept]).exists()
    finally:
        server.stop()


def test_unnamed_samplers_that_nobody_uses_are_let_go_and_make_room(tiny_folder, tmp_path):
    """In this process, whose clock of a sampler's last use can be set back."""

    async def scenario():
        store, model = Store(tmp_path), ServedModel("tiny", str(tiny_folder), ModelConfig(device="cpu"))
        engine = EngineSettings(8192, 256, 8, 1 << 30, 200, False)
        limits = Limits(1 << 20, 64, 64, 1 << 30, 64)
        service = Service({"tiny": model}, store, engine, limits, Metrics(), hold_seconds=25.0)
        service.recover()
        service.engine.start()

        async def done(reply):
            return json.loads((await service.retrieve("me", reply["request_id"])).result)

        session = (await service.create_session("me", {}))["session_id"]
        create = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 1}}
        model_id = (await done(await service.create_model("me", create)))["model_id"]
        seq = 0

        async def save(name=None):
            nonlocal seq
            seq += 1
            body = {"model_id": model_id, "seq_id": seq, "sampling_session_seq_id": seq, "path": name}
            return await done(await service.save("me", "sampler_weights", body))

        names = [(await save())["sampling_session_id"] for _ in range(3)]
        size = service.samplers[names[0]].blob.size
        files = [store.blobs / service.samplers[name].blob.id for name in names]
        kept = (await save("kept"))["path"]
        service.limits = Limits(1 << 20, 64, 64, 4 * size, 64)
        full = await save()
        assert "delete checkpoints" in full["error"]
        for age, name in enumerate(names[:2]):
            service.samplers[name].used -= SPARE_SAMPLER + 10 - age
        newest = (await save())["sampling_session_id"]
        with pytest.raises(Refused, match="nobody used it"):
            service.sampler("me", names[0])
        assert {names[1], names[2], newest} <= set(service.samplers) and not files[0].exists() and files[1].exists()
        service.samplers[names[1]].used -= KEEP_SAMPLER
        await service.collect()
        await asyncio.wrap_future(store.write(lambda db: None))  # what was handed in before is done
        assert names[1] not in service.samplers and not files[1].exists() and files[2].exists()
        assert kept in service.checkpoints
        service.engine.stop(drain_seconds=10)
        store.close()
        return set(service.samplers)

    left = asyncio.run(scenario())
    with sqlite3.connect(tmp_path / "server.db") as db:
        assert {row[0] for row in db.execute("SELECT id FROM samplers")} == left


def test_after_all_that_the_server_still_serves(server):
    check_serving(server)
