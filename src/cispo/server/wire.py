"""Between the wire and our records: protobuf and JSON bodies in, protobuf results out.

The protobuf module and the request types are the `tinker` package's own. A body that is not what the protocol says
raises `Malformed` (HTTP 422); a well-formed request that asks for something wrong raises `UserError` (a failed future,
category "user"). Left out on purpose: routes (`app.py`), and what the numbers mean (`losses.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zstandard
from google.protobuf.message import DecodeError
from tinker.proto import tinker_public_pb2 as pb
from torch import Tensor

from cispo.types import CispoError

PROTOBUF = "application/x-protobuf"

_NUMPY = {pb.DTYPE_FLOAT32: np.dtype("<f4"), pb.DTYPE_INT64: np.dtype("<i8"), pb.DTYPE_INT32: np.dtype("<i4")}


class Malformed(CispoError, ValueError):
    """The body is not what the protocol says: HTTP 422, nothing was accepted."""


class TooLarge(CispoError, ValueError):
    """The body is larger than the server takes: HTTP 413, nothing was accepted."""


class UserError(CispoError, ValueError):
    """A well-formed request that cannot be done: answered by a failed future of category "user"."""


@dataclass(frozen=True)
class Datum:
    """One row: S model-input tokens (long) and the loss's inputs, each of N = S rows, [N] or [N, K]."""

    tokens: Tensor
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class TrainRequest:
    """A decoded `forward_backward`: K datums, one loss with its settings, with or without gradient."""

    model_id: str
    seq_id: int
    loss_fn: str
    config: Mapping[str, float | str]
    forward_only: bool
    data: tuple[Datum, ...]


@dataclass
class SampledSequence:
    tokens: Sequence[int]
    logprobs: Sequence[float]
    stop_reason: str
    topk: tuple[np.ndarray, np.ndarray] | None = None


@dataclass
class SampleOutput:
    """What a sample request gives: sequences, and what was asked about the prompt."""

    sequences: list[SampledSequence]
    prompt_logprobs: np.ndarray | None = None
    topk_prompt: tuple[np.ndarray, np.ndarray] | None = None
    target_prompt: pb.Tensor | None = None
    alternatives: tuple[np.ndarray, np.ndarray] | None = None


# ------------------------------------------------------------------------------------------------------------- bodies


def decompress(body: bytes, encoding: str | None, limit: int) -> bytes:
    """Undo `Content-Encoding` (zstd or none), never holding more than `limit` bytes. Raises Malformed, TooLarge."""
    if encoding in (None, "", "identity"):
        return body
    if encoding != "zstd":
        raise Malformed(f"Content-Encoding {encoding!r} is unknown; send zstd or nothing")
    pieces, size = [], 0
    try:
        stream = zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(body, read_across_frames=True)
        while piece := stream.read(1 << 20):
            size += len(piece)
            if size > limit:
                raise TooLarge(f"the body expands beyond {limit} bytes; send smaller chunks")
            pieces.append(piece)
    except (zstandard.ZstdError, MemoryError) as error:
        raise Malformed(f"the body is not valid zstd: {error}") from None
    out = b"".join(pieces)
    if not out:
        raise Malformed("the zstd body is empty or truncated")
    return out


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises Malformed."""
    try:
        value = json.loads(body) if body else {}
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Malformed("the body must be a JSON object")
    return value


def canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), default=str).encode()


def digest(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=16).digest()


# --------------------------------------------------------------------------------------------------- forward_backward


def parse_train(body: bytes) -> tuple[pb.ForwardBackwardRequest, bytes]:
    """The message and its canonical bytes (map entries sorted, so that equal requests are equal bytes)."""
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except (DecodeError, RuntimeError) as error:
        raise Malformed(f"the body is not a ForwardBackwardRequest: {error}") from None
    if not message.model_id:
        raise Malformed("model_id is missing")
    if message.seq_id < 1:
        raise Malformed(f"seq_id is {message.seq_id}; it starts at 1")
    return message, message.SerializeToString(deterministic=True)


def decode_train(message: pb.ForwardBackwardRequest, *, vocabulary: int, context_length: int | None) -> TrainRequest:
    """Every datum checked before any is used: a request with one bad datum does nothing. Raises UserError."""
    if not message.data:
        raise UserError("data is empty: send at least one datum")
    config: dict[str, float | str] = dict(message.loss_fn_config)
    if message.loss_fn_config_v2:
        config = {}
        for key, value in message.loss_fn_config_v2.items():
            arm = value.WhichOneof("value")
            if arm is None:
                raise UserError(f"loss_fn_config.{key} has no value")
            config[key] = getattr(value, arm)
    for key, value in config.items():
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"loss_fn_config.{key} is NaN")
    data = tuple(_decode_datum(datum, f"data[{i}]", vocabulary, context_length) for i, datum in enumerate(message.data))
    return TrainRequest(message.model_id, message.seq_id, message.loss_fn, config, message.forward_only, data)


def _decode_datum(datum: pb.Datum, where: str, vocabulary: int, context_length: int | None) -> Datum:
    pieces = []
    for j, chunk in enumerate(datum.model_input):
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise UserError(
                f"{where}.model_input[{j}] is {kind or 'empty'}: this server trains text only; send encoded_text chunks"
            )
        pieces.append(_buffer(chunk.encoded_text.tokens, np.dtype("<i4"), f"{where}.model_input[{j}].tokens"))
    tokens = np.concatenate(pieces).astype(np.int64) if pieces else np.empty(0, np.int64)
    check_tokens(tokens, f"{where}.model_input", vocabulary, context_length)
    inputs = {
        name: decode_tensor(tensor, f"{where}.loss_fn_inputs.{name}") for name, tensor in datum.loss_fn_inputs.items()
    }
    return Datum(torch.from_numpy(tokens), inputs)


def check_tokens(tokens: np.ndarray, where: str, vocabulary: int, context_length: int | None) -> None:
    """Raises UserError for no tokens, too many, or one that the vocabulary lacks."""
    if len(tokens) == 0:
        raise UserError(f"{where} has no tokens")
    if context_length is not None and len(tokens) > context_length:
        raise UserError(f"{where} has {len(tokens)} tokens; the model's context is {context_length}")
    bad = (tokens < 0) | (tokens >= vocabulary)
    if bad.any():
        at = int(bad.argmax())
        raise UserError(f"{where}: token {int(tokens[at])} at position {at} is outside the vocabulary of {vocabulary}")


def decode_tensor(tensor: pb.Tensor, where: str) -> Tensor:
    """A dense tensor of one or two dimensions; CSR is expanded with zeros. Raises UserError."""
    dtype = _NUMPY.get(tensor.dtype)
    if dtype is None:
        raise UserError(f"{where}: dtype {tensor.dtype} is not supported; send float32 or int64")
    shape = tuple(tensor.shape)
    if tensor.WhichOneof("encoding") == "sparse_csr":
        array = _expand_csr(tensor, dtype, shape, where)
    else:
        array = _buffer(tensor.dense, dtype, where)
        if shape:
            if any(n < 0 for n in shape) or math.prod(shape) != array.size:
                raise UserError(f"{where}: shape {list(shape)} does not hold {array.size} values")
            array = array.reshape(shape)
    if array.ndim not in (1, 2):
        raise UserError(f"{where} has {array.ndim} dimensions; send one (N) or two (N, K)")
    return torch.from_numpy(array.astype(np.float32 if dtype.kind == "f" else np.int64))


def _expand_csr(tensor: pb.Tensor, dtype: np.dtype, shape: tuple[int, ...], where: str) -> np.ndarray:
    csr = tensor.sparse_csr
    values = _buffer(csr.values, dtype, f"{where}.values")
    rows = _buffer(csr.crow_indices, np.dtype("<i8"), f"{where}.crow_indices")
    columns = _buffer(csr.col_indices, np.dtype("<i8"), f"{where}.col_indices")
    if len(shape) != 2 or min(shape) < 0:
        raise UserError(f"{where}: a sparse tensor needs a shape of two dimensions, not {list(shape)}")
    if math.prod(shape) > 2**28:
        raise UserError(f"{where}: {list(shape)} is too large to expand")
    counts = np.diff(rows)
    if len(rows) != shape[0] + 1 or rows[0] != 0 or rows[-1] != len(values) or (counts < 0).any():
        raise UserError(f"{where}: crow_indices does not describe {shape[0]} rows of {len(values)} values")
    if len(columns) != len(values) or (columns < 0).any() or (columns >= shape[1]).any():
        raise UserError(f"{where}: col_indices does not fit {len(values)} values in {shape[1]} columns")
    dense = np.zeros(shape, dtype)
    dense[np.repeat(np.arange(shape[0]), counts), columns] = values
    return dense


def _buffer(raw: bytes, dtype: np.dtype, where: str) -> np.ndarray:
    if len(raw) % dtype.itemsize:
        raise UserError(f"{where}: {len(raw)} bytes are no whole number of {dtype.name}")
    return np.frombuffer(raw, dtype)


def encode_train_output(logprobs: Sequence[Tensor], metrics: Mapping[str, float]) -> bytes:
    """`ForwardBackwardOutput`: the log-probs of each datum, [N] or [N, K], in runs of equal trailing shape."""
    out = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    start = 0
    while start < len(logprobs):
        trailing = tuple(logprobs[start].shape[1:])
        stop = start
        while stop < len(logprobs) and tuple(logprobs[stop].shape[1:]) == trailing:
            stop += 1
        arrays = [t.detach().to(torch.float32).contiguous().numpy() for t in logprobs[start:stop]]
        record = out.loss_fn_outputs.add(num_datums=stop - start)
        field_ = record.fields["logprobs"]
        field_.data = b"".join(a.tobytes() for a in arrays)
        field_.offsets = np.cumsum([0] + [a.nbytes for a in arrays], dtype="<i8").tobytes()
        field_.dtype = pb.DTYPE_FLOAT32
        field_.trailing_shape.extend(trailing)
        start = stop
    for name, value in metrics.items():
        out.metrics[name] = float(value)
    return out.SerializeToString()


# ------------------------------------------------------------------------------------------------------------- sample


def encode_sample_output(output: SampleOutput) -> bytes:
    message = pb.SampleResponse()
    for sequence in output.sequences:
        item = message.sequences.add(
            stop_reason=pb.STOP_REASON_LENGTH if sequence.stop_reason == "length" else pb.STOP_REASON_STOP,
            tokens=np.asarray(sequence.tokens, "<i4").tobytes(),
            logprobs=np.asarray(sequence.logprobs, "<f4").tobytes(),
        )
        if sequence.topk is not None:
            _fill_topk(item.topk_sampled_logprobs, sequence.topk)
    if output.prompt_logprobs is not None:
        message.prompt_logprobs = output.prompt_logprobs.astype("<f4").tobytes()
    if output.topk_prompt is not None:
        _fill_topk(message.topk_prompt_logprobs, output.topk_prompt)
    if output.target_prompt is not None:
        message.target_prompt_logprobs.CopyFrom(output.target_prompt)
    if output.alternatives is not None:
        tokens, logprobs = output.alternatives
        for tensor, array, dtype in (
            (message.prompt_alt_tokens.tokens, tokens.astype("<i4"), pb.DTYPE_INT32),
            (message.prompt_alt_tokens.logprobs, logprobs.astype("<f4"), pb.DTYPE_FLOAT32),
        ):
            tensor.dense = array.tobytes()
            tensor.dtype = dtype
            tensor.shape.extend(array.shape)
    return message.SerializeToString()


def _fill_topk(message: pb.TopkLogprobs, topk: tuple[np.ndarray, np.ndarray]) -> None:
    """Row-major [N, K] ids and log-probs; a row without values is (0, -99999)."""
    ids, logprobs = topk
    message.token_ids = ids.astype("<i4").tobytes()
    message.logprobs = logprobs.astype("<f4").tobytes()
    message.length, message.k = ids.shape


def prompt_tokens(chunks: Sequence[Any], where: str = "prompt") -> list[int]:
    """The ids of a prompt made of text chunks. Raises UserError for images and audio."""
    tokens: list[int] = []
    for j, chunk in enumerate(chunks):
        if chunk.type != "encoded_text":
            raise UserError(f"{where}.chunks[{j}] is {chunk.type}: this server takes text only; send encoded_text")
        tokens += chunk.tokens
    return tokens
