"""The wire: a trace of the real SDK replayed, and bodies that no SDK would send."""
# ruff: noqa: E402 (what follows needs the extra)

import http.client
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("tinker", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")

import numpy as np
import torch
import zstandard
from google.protobuf import text_format
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.response_conv import deserialize_forward_backward_output

from cispo.server import wire
from tests.serving import serving

KEY = "tml-wire-0123456789"
TRACE = [json.loads(line) for line in (Path(__file__).parent / "data" / "tinker-trace.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def server(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wire")
    (folder / "keys").write_text(f"me {KEY}\n")
    with serving(folder / "state", model=[f"Org/Tiny={tiny_folder}"], keys=str(folder / "keys"), max_body_mib=1) as it:
        it.key = KEY
        yield it


# -------------------------------------------------------------------------------------------------------- golden trace


def message_of(text, kind):
    return text_format.Parse(text.removeprefix("PROTO "), kind())


def shape_of(result):
    """What of a protobuf result does not depend on weights."""
    if isinstance(result, pb.SampleResponse):
        return len(result.sequences), len(result.prompt_logprobs), [bool(s.logprobs) for s in result.sequences]
    records = [
        (r.num_datums, {k: (len(f.data), f.offsets, f.dtype, list(f.trailing_shape)) for k, f in r.fields.items()})
        for r in result.loss_fn_outputs
    ]
    return result.loss_fn_output_type, records, "loss:sum" in result.metrics


def test_a_recorded_session_of_the_sdk_gets_answers_of_the_recorded_kind(server):
    names = {}

    def ours(text):
        for old, new in names.items():
            text = text.replace(old, new)
        return text

    for entry in TRACE:
        method, path = ours(entry["req"]).split()
        body, headers = entry["body"], {}
        if isinstance(body, str):
            data = message_of(ours(body), pb.ForwardBackwardRequest).SerializeToString()
            headers = {"Content-Type": wire.PROTOBUF}
            if entry["content_encoding"] == "zstd":
                data = zstandard.ZstdCompressor().compress(data)
                headers["Content-Encoding"] = "zstd"
        else:
            data = None if body is None else json.loads(ours(json.dumps(body)))
            if path.endswith("create_session"):
                data.pop("project_id", None)
        status, reply = server.request(method, path, data, headers=headers)
        assert status == entry["status"], (entry["req"], reply)
        if entry["type"] == wire.PROTOBUF:
            kind = pb.SampleResponse if "sequences" in entry["resp"] else pb.ForwardBackwardOutput
            found = kind()
            found.ParseFromString(reply)
            assert shape_of(found) == shape_of(message_of(entry["resp"], kind)), entry["req"]
        elif entry["resp"] is not None:
            found = json.loads(reply)
            expected = entry["resp"]
            for name in ("session_id", "request_id"):
                if name in expected and not path.endswith("retrieve_future"):
                    names[expected[name]] = found[name]
            if "client/" not in path:
                assert set(expected) <= set(found), entry["req"]
                assert found.get("type") == expected.get("type")
                for name in ("path", "model_id", "sampling_session_id", "category", "sample_sequence_ids"):
                    if name in expected:
                        assert json.dumps(found[name]) == ours(json.dumps(expected[name]))


# ---------------------------------------------------------------------------------------------------------------- fuzz


class Line:
    """One kept-alive connection: thousands of requests in seconds."""

    def __init__(self, server):
        self.address = re.fullmatch(r"http://(.+):(\d+)", server.url).groups()
        self.connection = None

    def send(self, path, body, headers):
        if self.connection is None:
            self.connection = http.client.HTTPConnection(*self.address, timeout=60)
        try:
            self.connection.request("POST", path, body, {"X-API-Key": KEY, **headers})
            reply = self.connection.getresponse()
            return reply.status, reply.read()
        except (http.client.HTTPException, ConnectionError):
            self.connection = None
            raise


@pytest.fixture(scope="module")
def line(server):
    return Line(server)


@pytest.fixture(scope="module")
def ids(server):
    session = json.loads(server.request("POST", "/api/v1/create_session", {})[1])["session_id"]
    create = {"session_id": session, "model_seq_id": 0, "base_model": "Org/Tiny", "lora_config": {"rank": 2}}
    model = json.loads(server.request("POST", "/api/v1/create_model", create)[1])["model_id"]
    sampling = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "Org/Tiny"}
    sampler = json.loads(server.request("POST", "/api/v1/create_sampling_session", sampling)[1])["sampling_session_id"]
    return {"session": session, "model": model, "sampler": sampler}


ROUTES = [
    "create_session", "session_heartbeat", "create_model", "get_info", "optim_step", "save_weights",
    "save_weights_for_sampler", "save_weights_external", "load_weights", "weights_info", "create_sampling_session",
    "join_sampling_session", "asample", "cancel_future", "sessions/search", "client/config", "telemetry",
    "create_custom_loss", "copy_weights", "retrieve_futures", "forward_backward", "sessions/x/finish",
]  # fmt: skip
FIELDS = [
    "session_id", "model_id", "model_seq_id", "seq_id", "base_model", "lora_config", "rank", "seed", "adam_params",
    "learning_rate", "path", "sampling_session_seq_id", "sampling_session_id", "ttl_seconds", "optimizer", "prompt",
    "chunks", "tokens", "type", "num_samples", "sampling_params", "max_tokens", "stop", "temperature", "top_k", "top_p",
    "prompt_logprobs", "topk_prompt_logprobs", "target_prompt_logprobs", "data", "dtype", "shape", "request_id",
    "target", "prev_cursor", "timeout", "tinker_path", "user_metadata", "display_name", "cursor", "statuses", "limit",
]  # fmt: skip
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 3),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.sampled_from(["SESSION", "MODEL", "SAMPLER", "Org/Tiny", "../../x", "tinker://a/weights/b", "encoded_text"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)
bodies = st.dictionaries(st.sampled_from(FIELDS), values, max_size=8)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(line, status, reply):
    assert 200 <= status < 500 and status not in (402, 409), (status, reply)


@quick
@given(route=st.sampled_from(ROUTES), body=bodies, mark=st.booleans())
def test_no_json_body_is_the_servers_fault(line, ids, route, body, mark):
    if mark:  # so that it gets further than the look-up of ids
        body = {"session_id": "SESSION", "model_id": "MODEL", "sampling_session_id": "SAMPLER", **body}
    text = json.dumps(body).replace("SESSION", ids["session"]).replace("MODEL", ids["model"])
    text = text.replace("SAMPLER", ids["sampler"])
    check(line, *line.send(f"/api/v1/{route}", text.encode(), {"Content-Type": "application/json"}))


@quick
@given(
    route=st.sampled_from(ROUTES),
    body=st.binary(max_size=200),
    encoding=st.sampled_from(["", "zstd", "gzip"]),
    kind=st.sampled_from([wire.PROTOBUF, "application/json", "text/plain"]),
)
@example("forward_backward", zstandard.ZstdCompressor().compress(b"x" * 1000)[:-5], "zstd", wire.PROTOBUF)
@example("forward_backward", zstandard.ZstdCompressor().compress(b"\0" * (300 << 20)), "zstd", wire.PROTOBUF)
@example("optim_step", b"[" * 100_000, "", "application/json")
@example("optim_step", b'{"seq_id": ' + b"9" * 5000 + b"}", "", "application/json")
def test_no_bytes_are_the_servers_fault(line, route, body, encoding, kind):
    headers = {"Content-Type": kind, **({"Content-Encoding": encoding} if encoding else {})}
    check(line, *line.send(f"/api/v1/{route}", body, headers))


tensors = st.builds(
    lambda dense, shape, dtype, csr: pb.Tensor(
        dtype=dtype, shape=shape, **({"sparse_csr": csr} if csr is not None else {"dense": dense})
    ),
    st.binary(max_size=64),
    st.lists(st.integers(-3, 2**31 - 1), max_size=3),
    st.sampled_from([0, 1, 2, 3, 4, 9]),
    st.none()
    | st.builds(
        lambda v, r, c: pb.SparseCsr(
            values=np.array(v, "<f4").tobytes(),
            crow_indices=np.array(r, "<i8").tobytes(),
            col_indices=np.array(c, "<i8").tobytes(),
        ),
        st.lists(st.floats(width=32), max_size=4),
        st.lists(st.integers(-2, 5), max_size=5),
        st.lists(st.integers(-2, 5), max_size=4),
    ),
)
names = st.sampled_from(["target_tokens", "weights", "logprobs", "advantages", "clip_low_threshold", "x"])
chunks = st.one_of(
    st.builds(
        lambda t: pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=np.array(t, "<i4").tobytes())),
        st.lists(st.integers(-2, 20), max_size=5),
    ),
    st.builds(lambda b: pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=b)), st.binary(max_size=9)),
    st.just(pb.Chunk()),
    st.just(pb.Chunk(image=pb.ImageChunk(data=b"x", format="png"))),
)
datums = st.builds(
    lambda c, t: pb.Datum(model_input=c, loss_fn_inputs=t),
    st.lists(chunks, max_size=3),
    st.dictionaries(names, tensors, max_size=4),
)


@quick
@given(
    seq=st.integers(0, 2**31 - 1),
    data=st.lists(datums, max_size=3),
    loss=st.sampled_from(["cross_entropy", "cispo", "gspo", "", "\x00"]),
    config=st.dictionaries(st.sampled_from(["clip_low_threshold", "beta", "y"]), st.floats(), max_size=2),
    forward_only=st.booleans(),
    cut=st.none() | st.integers(0, 60),
)
def test_no_protobuf_is_the_servers_fault(line, ids, seq, data, loss, config, forward_only, cut):
    message = pb.ForwardBackwardRequest(
        model_id=ids["model"], seq_id=seq, data=data, loss_fn=loss, loss_fn_config=config, forward_only=forward_only
    )
    body = message.SerializeToString()[:cut]
    check(line, *line.send("/api/v1/forward_backward", body, {"Content-Type": wire.PROTOBUF}))


def test_after_all_that_the_server_still_serves(server, ids):
    assert json.loads(server.request("GET", "/api/v1/healthz")[1]) == {"status": "ok"}
    body = {"model_id": ids["model"], "seq_id": 2**62 + 5, "adam_params": {"learning_rate": 0.0}}
    reply = json.loads(server.request("POST", "/api/v1/optim_step", body)[1])
    assert "metrics" in server.result(reply["request_id"])
    assert not [text for text in server.lines if '"level": "error"' in text]
    assert not any(KEY in text for text in server.lines)


# ---------------------------------------------------------------------------------------------------------------- units


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_results_come_back_as_they_were_written(shapes, random):
    logprobs = [torch.tensor([[random.random() for _ in range(k)] for _ in range(n)]) if k else
                torch.tensor([random.random() for _ in range(n)]) for n, k in shapes]  # fmt: skip
    logprobs = [x.reshape(n, k) if k else x for x, (n, k) in zip(logprobs, shapes, strict=True)]
    read = deserialize_forward_backward_output(wire.encode_train_output(logprobs, {"loss:sum": 1.5}))
    assert read.metrics == {"loss:sum": 1.5} and len(read.loss_fn_outputs) == len(logprobs)
    for sent, got in zip(logprobs, read.loss_fn_outputs, strict=True):
        assert torch.equal(got["logprobs"].to_torch().flatten(), sent.flatten())


@given(st.integers(1, 5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_csr_is_expanded_as_torch_does(rows, columns, random):
    dense = torch.tensor([[random.choice([0.0, 0.0, 1.5, -2.0]) for _ in range(columns)] for _ in range(rows)])
    csr = dense.to_sparse_csr()
    message = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[rows, columns])
    message.sparse_csr.values = csr.values().numpy().tobytes()
    message.sparse_csr.crow_indices = csr.crow_indices().numpy().astype("<i8").tobytes()
    message.sparse_csr.col_indices = csr.col_indices().numpy().astype("<i8").tobytes()
    assert torch.equal(wire.decode_tensor(message, "x"), dense)


def test_equal_requests_have_equal_bytes_whatever_the_order_of_their_maps():
    def request(names):
        message = pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cispo")
        datum = message.data.add()
        for name in names:
            datum.loss_fn_inputs[name].dense = name.encode()
        return wire.parse_train(message.SerializeToString())[1]

    names = [f"input-{i}" for i in range(20)]
    assert request(names) == request(names[::-1])


def test_a_body_never_expands_beyond_the_limit():
    bomb = zstandard.ZstdCompressor().compress(b"\0" * (64 << 20))
    with pytest.raises(wire.TooLarge, match="expands beyond 1000000"):
        wire.decompress(bomb, "zstd", 1_000_000)
    with pytest.raises(wire.Malformed, match="zstd"):
        wire.decompress(b"not zstd", "zstd", 1000)
    with pytest.raises(wire.Malformed, match="gzip"):
        wire.decompress(b"", "gzip", 1000)
