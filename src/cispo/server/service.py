"""What requests mean: checked, written to the log, handed to the engine, and answered.

Everything here runs in the event loop. A method for each verb takes the tenant and a parsed body, and gives back the
reply's JSON; `Refused` carries the HTTP status of one that is not accepted. A request that is accepted but asks for
something wrong becomes a failed future, which is the way in which the SDK can tell its user.
Left out on purpose: HTTP (`app.py`) and tensors (`engine.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from tinker import types as wire_types
from tinker.proto import tinker_public_pb2 as pb
from tinker.types.futures_retrieve_request import FuturesRetrieveRequest

from cispo.server import wire
from cispo.server.compute import ScoreRequest, ServedModel
from cispo.server.engine import Engine, EngineSettings, Saved, orphans
from cispo.server.lora import LoraShape
from cispo.server.losses import prepare
from cispo.server.metrics import Metrics
from cispo.server.records import (
    Checkpoint,
    CreateWork,
    LoadWork,
    Request,
    Run,
    Sampler,
    SampleWork,
    SaveWork,
    Session,
    Work,
    failure,
)
from cispo.server.store import BlobRow, Corrupted, DiskFull, Store
from cispo.server.tenants import Limits
from cispo.server.wire import Malformed, UserError
from cispo.types import AdamParams, CispoError, ConfigError, DataError, SampleRequest, SamplingParams

log = logging.getLogger("cispo.server")

KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
MAX_RANK = 1024
KEEP_DELIVERED = 600.0  # seconds that a fetched result is kept for a repeated request
KEEP_UNFETCHED = 86400.0
KEEP_SAMPLER = 86400.0  # that an unnamed one is kept after its last use,
SPARE_SAMPLER = 600.0  # and where its key stores too much
CLONE_SEQS = 1_000_000_000  # the SDK counts the requests of its n-th client of a sampling session from n times this
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+@-]{0,127}")


class Refused(CispoError):
    """Not accepted: an HTTP status, a sentence, and for 429 and 503 when to try again."""

    def __init__(self, status: int, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


def unknown(what: str, name: str) -> Refused:
    """The same for what does not exist and for what is another tenant's."""
    return Refused(404, f"{what} {name} does not exist")


class Service:
    """One server's state. Construct, `recover`, then call the verbs from the event loop."""

    def __init__(
        self,
        served: dict[str, ServedModel],
        store: Store,
        settings: EngineSettings,
        limits: Limits,
        metrics: Metrics,
        *,
        hold_seconds: float,
    ):
        self.served, self.store, self.limits, self.metrics = served, store, limits, metrics
        self.hold_seconds = hold_seconds
        self.sessions: dict[str, Session] = {}
        self.runs: dict[str, Run] = {}
        self.samplers: dict[str, Sampler] = {}
        self.checkpoints: dict[str, Checkpoint] = {}
        self.requests: dict[str, Request] = {}
        self._by_seq: dict[tuple[str, int], Request] = {}
        self._pending: dict[str, int] = {}
        self._saving: set[str] = set()
        self._top: dict[str, int] = {}  # by scope, the largest seq_id that the log has
        self._finished: dict[str, dict[str, tuple[int, Request]]] = {}
        self._finishing: dict[str, asyncio.Event] = {}
        self._order = 0
        self.draining = False
        self.engine = Engine(served, self.runs, store, settings, metrics, self._saved)

    # -------------------------------------------------------------------------------------------------------- recovery

    def recover(self) -> None:
        """Read what the log holds, and queue what snapshots do not. Raises ConfigError for a base that is not served.

        In the event loop, before anything is asked.
        """
        self._loop = asyncio.get_running_loop()
        blobs = {
            row["id"]: BlobRow(row["id"], row["size"], row["sha256"]) for row in self.store.read("SELECT * FROM blobs")
        }
        present = {path.name for path in self.store.blobs.iterdir()}
        self.store.delete_blobs(sorted(present - set(blobs)))  # written, but never committed
        for row in self.store.read("SELECT * FROM sessions"):
            finished = json.loads(row["finished"]) if row["finished"] else None
            self.sessions[row["id"]] = Session(
                row["id"], row["owner"], row["created"], row["seen"], json.loads(row["body"]), finished
            )
        for row in self.store.read("SELECT * FROM models"):
            body = json.loads(row["body"])
            run = Run(
                row["id"], row["session"], row["owner"], row["base"], LoraShape(**body["shape"]), body, row["created"],
                row["seen"], blobs.get(row["blob"]), row["done"], row["done"],
            )  # fmt: skip
            if run.base not in self.served:
                raise ConfigError(
                    f"--model: {run.base} has training runs in --state-dir {self.store.folder} but is not served; "
                    f"add --model {run.base}=PATH, or use another state directory"
                )
            if run.blob is not None:
                try:
                    self.store.read_bytes(run.blob)
                except Corrupted as error:
                    run.corrupted = str(error)
                    log.error("run_corrupted", extra={"data": {"run": run.id, "error": str(error)}})
            self.runs[run.id] = run
        for row in self.store.read("SELECT * FROM samplers"):
            model = self.runs.get(row["model"])
            shape = LoraShape(**json.loads(row["shape"])) if row["shape"] else None
            self.samplers[row["id"]] = Sampler(
                row["id"], row["session"], row["owner"], row["base"], row["path"], model and model.id,
                blobs.get(row["blob"]), shape, row["kind"], row["created"], row["clients"],
            )  # fmt: skip
        for row in self.store.read("SELECT * FROM checkpoints"):
            self.checkpoints[row["path"]] = Checkpoint(
                row["path"], row["model"], row["owner"], row["kind"], row["name"], blobs[row["blob"]], row["created"],
                row["expires"], bool(row["public"]), json.loads(row["body"]),
            )  # fmt: skip
        again = 0
        for row in self.store.read(
            "SELECT number, id, owner, kind, scope, seq, digest, created, together, status, finished, delivered, blob, "
            "payload FROM requests WHERE status = 'accepted' OR payload IS NOT NULL OR finished > ? ORDER BY number",
            time.time() - KEEP_UNFETCHED,
        ):
            again += self._recover_request(row, blobs)
        self._top = {row[0]: row[1] for row in self.store.read("SELECT scope, max(seq) FROM requests GROUP BY scope")}
        log.info("recovered", extra={"data": {"runs": len(self.runs), "requests_again": again}})

    def _recover_request(self, row: sqlite3.Row, blobs: Mapping[str, BlobRow]) -> bool:
        """Whether it runs again."""
        request = Request(row["id"], row["owner"], row["kind"], row["scope"], row["seq"], row["digest"], None)
        request.number, request.together, request.status = row["number"], row["together"], row["status"]
        request.created, request.finished, request.delivered = row["created"], row["finished"], row["delivered"]
        request.replayed = request.resolved
        self.requests[request.id] = request
        self._by_seq[request.scope, request.seq] = request
        if request.kind == "asample" and request.resolved:
            self._note_finished(request)
        if row["payload"] is None:
            return False
        payload = bytes(row["payload"])
        if request.kind == "asample":
            sampler = self.samplers.get(request.scope)
            if sampler is None:
                request.resolve("failed", failure("the sampling session is gone", "server"))
                return False
            request.work = self._sample_work(sampler, json.loads(payload))[0]
            self._count(request.owner, 1)
            request.attach(self._loop, self._resolved)
            self.engine.sample(sampler.base, request, sampler.blob, sampler.shape)
            return True
        run = self.runs[request.scope]
        if request.number <= run.done:
            return False
        request.work = self._work_again(run, request.kind, payload, blobs.get(row["blob"]))
        if isinstance(request.work, SaveWork) and request.work.name and not request.resolved:
            self._saving.add(_path(run.id, request.work.kind, request.work.name))
        if not request.resolved:
            self._count(request.owner, 1)
            request.attach(self._loop, self._resolved)
        self.engine.enqueue(request)
        return True

    def _work_again(self, run: Run, kind: str, payload: bytes, blob: BlobRow | None) -> Work:
        """The work of a logged request, which was checked when it was accepted."""
        if kind == "forward_backward":
            message, _ = wire.parse_train(payload)
            return self._train_work(run, message)
        body = json.loads(payload)
        match kind:
            case "create_model":
                return CreateWork(body["seed"])
            case "load_weights":
                return LoadWork(body["path"], blob, body["optimizer"])
            case "optim_step":
                return AdamParams(**body)
            case "save":
                return SaveWork(**body)
        raise AssertionError(kind)

    # ------------------------------------------------------------------------------------------------------- acceptance

    async def _accept(
        self,
        request: Request,
        payload: bytes | None,
        *,
        also: Callable[[sqlite3.Connection], None] | None = None,
        blob: BlobRow | None = None,
        start: Callable[[], None] | None = None,
    ) -> Request:
        """Into the log, then to the engine. A repeated request gets the first one, whose future it shares."""
        key = (request.scope, request.seq)
        known = self._known(request.scope, request.seq)
        if known is not None:
            if known.digest != request.digest or known.owner != request.owner:
                raise Refused(422, f"seq_id {request.seq} of {request.scope} was another request; each is used once")
            if known.accepted is not None:
                await asyncio.shield(known.accepted)
            return known
        if self.draining:
            raise Refused(503, "the server is stopping; it will be back with everything it has accepted", 2)
        if self._pending.get(request.owner, 0) >= self.limits.requests:
            raise Refused(429, f"{self.limits.requests} requests of this key are under way; wait for some of them", 1)
        self.store.check_space()
        loop = asyncio.get_running_loop()
        request.accepted = loop.create_future()
        self.requests[request.id] = request
        self._by_seq[key] = request
        self._top[request.scope] = max(request.seq, self._top.get(request.scope, -1))
        counted = not request.resolved
        if counted:
            self._count(request.owner, 1)
            request.attach(loop, self._resolved)

        def insert(db: sqlite3.Connection) -> int:
            if also is not None:
                also(db)
            return db.execute(
                "INSERT INTO requests (id, owner, kind, scope, seq, digest, payload, created, blob, status, result, "
                "finished) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
                (request.id, request.owner, request.kind, request.scope, request.seq, request.digest, payload,
                 request.created, blob and blob.id, request.status, request.result, request.finished),
            ).lastrowid  # fmt: skip

        def committed(number: int) -> None:
            request.number = number
            if start is not None:
                start()

        try:
            await asyncio.shield(asyncio.wrap_future(self.store.write(insert, committed)))
        except (DiskFull, sqlite3.IntegrityError) as error:
            del self.requests[request.id], self._by_seq[key]
            if counted:
                self._count(request.owner, -1)
            refusal = Refused(503, str(error), 5)
            request.accepted.set_exception(refusal)
            request.accepted.exception()  # it need not be fetched by a repeated request
            raise refusal from None
        request.accepted.set_result(None)
        if not counted and request.kind == "asample":
            self._note_finished(request)
        return request

    def _resolved(self, request: Request) -> None:
        self._count(request.owner, -1)
        if request.kind == "asample":
            self._note_finished(request)

    def _count(self, owner: str, by: int) -> None:
        self._pending[owner] = self._pending.get(owner, 0) + by

    def _known(self, scope: str, seq: int) -> Request | None:
        """The request that has this number already; from the log, where memory has let go of it."""
        found = self._by_seq.get((scope, seq))
        if found is None and seq <= self._top.get(scope, -1):
            for row in self.store.read("SELECT * FROM requests WHERE scope=? AND seq=?", scope, seq):
                found = Request(row["id"], row["owner"], row["kind"], scope, seq, row["digest"], None)
                found.status, found.finished = row["status"], row["finished"]
                self.requests[found.id] = self._by_seq[scope, seq] = found
        return found

    async def _accept_training(
        self,
        run: Run,
        kind: str,
        seq: int,
        digest: bytes,
        make: Callable[[], tuple[Work, bytes]],
        *,
        blob: BlobRow | None = None,
        also: Callable[[sqlite3.Connection], None] | None = None,
        undo: Callable[[], None] = lambda: None,
    ) -> Request:
        """`make` gives the work and what the log keeps of it; its UserError becomes a failed future.

        `undo` takes back what `make` has noted, where the request is then not accepted: it will be sent again.
        """
        request = Request(secrets.token_hex(16), run.owner, kind, run.id, seq, digest, None)
        payload = None
        if self._known(run.id, seq) is None:
            try:
                request.work, payload = make()
            except UserError as error:
                request.resolve("failed", failure(str(error)))
                also = None
        run.seen = time.time()
        start = (lambda: self.engine.enqueue(request)) if payload is not None else None
        try:
            return await self._accept(request, payload, also=also, blob=blob, start=start)
        except (Refused, DiskFull):
            undo()
            raise

    async def retrieve(self, owner: str, request_id: str) -> Request | None:
        """The request once it is resolved, or None while it is not (408). Raises Refused 404, 410."""
        request = self.requests.get(request_id)
        if request is None or request.owner != owner:
            raise unknown("request", request_id)
        if not await request.wait(self.hold_seconds):
            return None
        if request.result is None:
            rows = await asyncio.to_thread(self.store.read, "SELECT result FROM requests WHERE id=?", request.id)
            if not rows or rows[0][0] is None:
                raise Refused(410, f"the result of request {request_id} was fetched a while ago and is gone")
            request.result = bytes(rows[0][0])
        request.delivered = time.time()
        return request

    async def retrieve_many(self, owner: str, body: Mapping[str, Any]) -> dict:
        """What of a sampling session has finished since `prev_cursor`; held open until there is something.

        The cursor is the place in the order of finishing. What was retrieved is reported no more.
        """
        message = _parse(FuturesRetrieveRequest, body)
        sampler = self.sampler(owner, message.target.sampling_session_id)
        hold = self.hold_seconds if message.timeout is None else message.timeout
        if not (np.isfinite(hold) and hold >= 0):
            raise Malformed("timeout: it is 0 or more seconds")
        deadline = time.monotonic() + min(hold, self.hold_seconds)
        known = self._finished.setdefault(sampler.id, {})
        for request_id in message.retrieved_request_ids:
            known.pop(request_id, None)
        while True:
            new = [
                (order, request) for order, request in known.values()
                if order > message.prev_cursor and request.seq // CLONE_SEQS == message.target.cloned_sampler_id
            ]  # fmt: skip
            left = deadline - time.monotonic()
            if new or left <= 0:
                break
            event = self._finishing.setdefault(sampler.id, asyncio.Event())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), left)
        completions = []
        for _, request in new:
            if request.status == "failed":
                completions.append({"state": "failed", "request_id": request.id})
            else:
                size = None if request.result is None else len(request.result)
                completions.append(
                    {"state": "finished", "request_id": request.id, "response_payload_uncompressed_size": size}
                )
        return {"completions": completions, "cursor": max([message.prev_cursor, *(order for order, _ in new)])}

    def _note_finished(self, request: Request) -> None:
        """For those who ask for a sampling session as a whole. Orders go up over restarts too, by the clock."""
        self._order = max(self._order + 1, int(1e6 * time.time()))
        self._finished.setdefault(request.scope, {})[request.id] = (self._order, request)
        event = self._finishing.pop(request.scope, None)
        if event is not None:
            event.set()

    async def cancel(self, owner: str, body: Mapping[str, Any]) -> dict:
        request = self.requests.get(_text(body, "request_id"))
        if request is None or request.owner != owner:
            raise unknown("request", str(body.get("request_id")))
        if request.kind == "asample" and not request.resolved:
            self.engine.cancel(request)
        return {}

    # --------------------------------------------------------------------------------------------------------- sessions

    async def create_session(self, owner: str, body: Mapping[str, Any]) -> dict:
        keep = {k: body.get(k) for k in ("tags", "user_metadata", "display_name", "project_id", "sdk_version")}
        now = time.time()
        session = Session(secrets.token_hex(16), owner, now, now, keep)
        await self._write(
            "INSERT INTO sessions (id, owner, created, seen, body) VALUES (?,?,?,?,?)",
            session.id, owner, now, now, json.dumps(keep),
        )  # fmt: skip
        self.sessions[session.id] = session
        return {"type": "create_session", "session_id": session.id}

    def session(self, owner: str, session_id: Any) -> Session:
        session = self.sessions.get(session_id) if isinstance(session_id, str) else None
        if session is None or session.owner != owner:
            raise unknown("session", str(session_id))
        return session

    def heartbeat(self, owner: str, body: Mapping[str, Any]) -> dict:
        self.session(owner, body.get("session_id")).seen = time.time()
        return {"type": "session_heartbeat"}

    async def finish_session(self, owner: str, session_id: str, body: Mapping[str, Any]) -> None:
        session = self.session(owner, session_id)
        session.finished = {"reason": body.get("reason"), "detail": body.get("detail"), "time": time.time()}
        await self._write("UPDATE sessions SET finished=? WHERE id=?", json.dumps(session.finished), session.id)

    async def _write(self, sql: str, *arguments: Any) -> None:
        try:
            await asyncio.wrap_future(self.store.write(lambda db: db.execute(sql, arguments).rowcount))
        except DiskFull as error:
            raise Refused(503, str(error), 5) from None

    # --------------------------------------------------------------------------------------------------------- training

    def run(self, owner: str, model_id: Any) -> Run:
        run = self.runs.get(model_id) if isinstance(model_id, str) else None
        if run is None or run.owner != owner:
            raise unknown("training run", str(model_id))
        return run

    def base(self, name: Any) -> ServedModel:
        served = self.served.get(name)
        if served is None:
            raise UserError(f"base_model {name!r} is not served here; choose from {', '.join(self.served)}")
        return served

    async def create_model(self, owner: str, body: Mapping[str, Any]) -> dict:
        message = _parse(wire_types.CreateModelRequest, body)
        session = self.session(owner, message.session_id)
        model_id = f"{session.id}:train:{message.model_seq_id}"
        digest = wire.digest(wire.canonical({**body, "lora_config": {**(body.get("lora_config") or {})}}))
        known = self._known(model_id, 0)
        if known is not None:
            return await self._model_reply(self._repeat(known, digest, owner))
        lora = message.lora_config
        try:
            served = self.base(message.base_model)
            if message.optimizer_config.type != "adamw":
                raise UserError(f"optimizer_config.type {message.optimizer_config.type!r} is not served; use adamw")
            if lora is None:
                raise UserError("lora_config is missing: this server trains LoRA adapters; send a rank")
            if not 1 <= lora.rank <= MAX_RANK:
                raise UserError(f"lora_config.rank is {lora.rank}; choose 1 to {MAX_RANK}")
            shape = LoraShape(lora.rank, lora.train_attn, lora.train_mlp, lora.train_unembed)
            served.host.adapted(shape)
            self._check_runs(owner)
        except (UserError, ConfigError) as error:
            return await self._model_reply(await self._failed(owner, "create_model", model_id, 0, digest, str(error)))
        seed = secrets.randbits(62) if lora.seed is None else lora.seed
        run = self._new_run(
            model_id, session, message.base_model, shape, {"user_metadata": message.user_metadata, "seed": seed}
        )
        request = await self._accept_training(
            run, "create_model", 0, digest,
            lambda: (CreateWork(seed), json.dumps({"seed": seed}).encode()), also=_insert_run(run),
            undo=lambda: self.runs.pop(model_id, None),
        )  # fmt: skip
        return await self._model_reply(request)

    def _new_run(self, model_id: str, session: Session, base: str, shape: LoraShape, body: dict) -> Run:
        now = time.time()
        body = {**body, "shape": {"rank": shape.rank, "train_attn": shape.train_attn, "train_mlp": shape.train_mlp,
                                  "train_unembed": shape.train_unembed}}  # fmt: skip
        run = Run(model_id, session.id, session.owner, base, shape, body, now, now)
        self.runs[model_id] = run
        return run

    def _check_runs(self, owner: str) -> None:
        if sum(run.owner == owner for run in self.runs.values()) >= self.limits.runs:
            raise UserError(f"this key has {self.limits.runs} training runs, the most it may have")

    def _repeat(self, known: Request, digest: bytes, owner: str) -> Request:
        if known.digest != digest or known.owner != owner:
            raise Refused(422, f"seq_id {known.seq} of {known.scope} was another request; each is used once")
        return known

    async def _failed(self, owner: str, kind: str, scope: str, seq: int, digest: bytes, message: str) -> Request:
        """An accepted request whose future has failed from the start."""
        request = Request(secrets.token_hex(16), owner, kind, scope, seq, digest, None)
        request.resolve("failed", failure(message))
        return await self._accept(request, None)

    async def _model_reply(self, request: Request) -> dict:
        if request.accepted is not None:
            await asyncio.shield(request.accepted)
        return {"request_id": request.id, "model_id": request.scope}

    async def forward_backward(self, owner: str, message: pb.ForwardBackwardRequest, canonical: bytes) -> dict:
        run = self.run(owner, message.model_id)
        request = await self._accept_training(
            run, "forward_backward", message.seq_id, wire.digest(canonical),
            lambda: (self._train_work(run, message), canonical),
        )  # fmt: skip
        return {"request_id": request.id, "model_id": run.id}

    def _train_work(self, run: Run, message: pb.ForwardBackwardRequest) -> Work:
        served = self.served[run.base]
        decoded = wire.decode_train(message, vocabulary=served.vocabulary, context_length=served.context_length)
        return prepare(decoded, served.vocabulary)

    async def optim_step(self, owner: str, body: Mapping[str, Any]) -> dict:
        message = _parse(wire_types.OptimStepRequest, body)
        run = self.run(owner, message.model_id)

        def make() -> tuple[Work, bytes]:
            params = _adam(message.optim_params)
            fields = {name: getattr(params, name) for name in AdamParams.__slots__}
            return params, json.dumps(fields).encode()

        request = await self._accept_training(run, "optim_step", _seq(message), wire.digest(wire.canonical(body)), make)
        return {"request_id": request.id, "model_id": run.id}

    def get_info(self, owner: str, body: Mapping[str, Any]) -> dict:
        run = self.run(owner, body.get("model_id"))
        served = self.served[run.base]
        return {
            "type": "get_info",
            "model_id": run.id,
            "is_lora": True,
            "lora_rank": run.shape.rank,
            "model_name": run.base,
            "model_data": {"arch": served.architecture, "model_name": run.base, "tokenizer_id": served.path},
        }

    # ---------------------------------------------------------------------------------------------------------- weights

    def _name(self, name: Any) -> str:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(f"the checkpoint name {name!r} must be letters, digits and . _ = + @ - (at most 128)")
        return name

    def checkpoint(self, owner: str, path: Any) -> Checkpoint:
        """Raises Refused 404 for what is not this tenant's, unless it is public."""
        found = self._live(path)
        if found is None or (found.owner != owner and not found.public):
            raise unknown("checkpoint", str(path))
        return found

    def _live(self, path: Any) -> Checkpoint | None:
        """What has expired is gone from then on, whenever its file goes."""
        found = self.checkpoints.get(path) if isinstance(path, str) else None
        return None if found is None or found.expired else found

    async def save(self, owner: str, kind: str, body: Mapping[str, Any]) -> dict:
        """`save_weights`, `save_weights_for_sampler`, `save_weights_external`."""
        model = {
            "weights": wire_types.SaveWeightsRequest,
            "sampler_weights": wire_types.SaveWeightsForSamplerRequest,
            "external_weights": wire_types.SaveWeightsExternalRequest,
        }[kind]
        message = _parse(model, body)
        run = self.run(owner, message.model_id)
        path = None

        def make() -> tuple[Work, bytes]:
            nonlocal path
            sampler = None
            if message.path is None and kind == "sampler_weights":
                if message.sampling_session_seq_id is None:
                    raise UserError("path or sampling_session_seq_id is needed: under which name shall it be saved?")
                sampler = f"{run.session}:sample:{message.sampling_session_seq_id}"
                if sampler in self.samplers:
                    raise UserError(f"the sampling session {sampler} exists already")
                name = None
            else:
                name = self._name(message.path)
                path = _path(run.id, kind, name)
                taken = self._live(path) is not None or path in self._saving
                if taken and kind != "sampler_weights" and not getattr(message, "overwrite", False):
                    raise UserError(f"{path} exists already; choose another name, or pass overwrite=True")
            if getattr(message, "age_encryption_recipients", None):
                raise UserError(
                    "age_encryption_recipients is not supported; leave it out and encrypt the files yourself"
                )
            ttl = _ttl(message.ttl_seconds)
            self._make_room(owner)
            if self._stored(owner) >= self.limits.stored_bytes:
                raise UserError(f"this key stores {self._stored(owner) >> 20} MiB, the most it may; delete checkpoints")
            work = SaveWork(
                kind, name, sampler, getattr(message, "kind", "snapshot") == "inflight", ttl,
                getattr(message, "user_metadata", None),
            )  # fmt: skip
            fields = {name: getattr(work, name) for name in SaveWork.__dataclass_fields__}
            if path is not None:
                self._saving.add(path)
            return work, json.dumps(fields).encode()

        request = await self._accept_training(
            run, "save", _seq(message), wire.digest(wire.canonical(body)), make, undo=lambda: self._saving.discard(path)
        )
        return {"request_id": request.id, "model_id": run.id}

    def _stored(self, owner: str) -> int:
        held = [c.blob for c in self.checkpoints.values() if c.owner == owner]
        held += [s.blob for s in self.samplers.values() if s.owner == owner and s.blob and s.path is None]
        return sum({blob.id: blob.size for blob in held}.values())

    def _make_room(self, owner: str) -> None:
        """A loop makes an unnamed sampler at every step, which no client can delete: over the limit, the oldest go."""
        over = self._stored(owner) - self.limits.stored_bytes
        idle = [s for s in self._unnamed(SPARE_SAMPLER) if s.owner == owner] if over >= 0 else []
        gone = []
        for sampler in sorted(idle, key=lambda s: s.used):
            if over < 0:
                break
            gone.append(sampler)
            over -= sampler.blob.size
        self._let_go(gone)

    def _unnamed(self, idle: float) -> list[Sampler]:
        """Samplers of weights that have no name, which nobody has used for so many seconds."""
        before = time.time() - idle
        return [s for s in self.samplers.values() if s.blob is not None and s.path is None and s.used < before]

    def _let_go(self, gone: list[Sampler]) -> None:
        for sampler in gone:
            del self.samplers[sampler.id]
            self._finished.pop(sampler.id, None)
        names = [(sampler.id,) for sampler in gone]

        def commit(db: sqlite3.Connection) -> list[str]:
            db.executemany("DELETE FROM samplers WHERE id=?", names)
            return orphans(db)

        if gone:
            self.store.write(commit, self.store.delete_blobs)

    def _saved(self, saved: Saved) -> None:
        """A disk thread has written the file: make it somebody's, and only then tell the client."""
        request, run, work, blob = saved.request, saved.run, saved.work, saved.blob
        now = time.time()
        path = _path(run.id, work.kind, work.name) if work.name is not None else None
        checkpoint = sampler = None
        reply: dict[str, Any] = {
            "type": f"save_{'weights_for_sampler' if work.kind == 'sampler_weights' else work.kind}"
        }
        if work.kind == "external_weights":
            reply = {"type": "save_weights_external", "size_bytes": blob.size}
        if path is not None:
            expires = None if work.expires_in is None else now + work.expires_in
            body = {"user_metadata": work.metadata}
            checkpoint = Checkpoint(path, run.id, run.owner, work.kind, work.name, blob, now, expires, False, body)
            reply["path"] = path
        else:
            kind = "inflight" if work.inflight else "snapshot"
            sampler = Sampler(work.sampler, run.session, run.owner, run.base, None, run.id, blob, run.shape, kind, now)
            reply["sampling_session_id"] = sampler.id
        result = json.dumps(reply).encode()

        def commit(db: sqlite3.Connection) -> list[str]:
            db.execute("INSERT INTO blobs VALUES (?,?,?,?)", (blob.id, run.owner, blob.size, blob.sha256))
            if checkpoint is not None:
                db.execute(
                    "INSERT OR REPLACE INTO checkpoints VALUES (?,?,?,?,?,?,?,?,?,?)",
                    (path, run.id, run.owner, work.kind, work.name, blob.id, now, checkpoint.expires, 0,
                     json.dumps(checkpoint.body)),
                )  # fmt: skip
            if sampler is not None:
                if sampler.kind == "inflight":
                    db.execute("UPDATE samplers SET blob=? WHERE model=? AND kind='inflight'", (blob.id, run.id))
                _insert_sampler(sampler)(db)
            db.execute("UPDATE requests SET status='json', result=?, finished=? WHERE id=?", (result, now, request.id))
            return orphans(db)

        def committed(garbage: list[str]) -> None:
            if checkpoint is not None:
                self.checkpoints[path] = checkpoint
                self._saving.discard(path)
            if sampler is not None:
                if sampler.kind == "inflight":
                    for other in list(self.samplers.values()):
                        if other.model == run.id and other.kind == "inflight":
                            other.blob = blob
                self.samplers[sampler.id] = sampler
            self.store.delete_blobs(garbage)
            request.resolve("json", result)
            self.metrics.observe(request)

        try:
            self.store.write(commit, committed).result()
        except (DiskFull, sqlite3.IntegrityError) as error:
            self.store.delete_blobs([blob.id])
            self._saving.discard(path)
            request.resolve("failed", failure(str(error), "server"))

    async def load(self, owner: str, body: Mapping[str, Any]) -> dict:
        """`load_weights`: into a run, or (with `session_id`) as the first request of a new one."""
        message = _parse(wire_types.LoadWeightsRequest, body)
        digest = wire.digest(wire.canonical(body))
        create = message.session_id is not None
        if create == (message.model_id is not None):
            raise Malformed("send either session_id with model_seq_id, or model_id with seq_id")
        if create:
            session = self.session(owner, message.session_id)
            if message.model_seq_id is None:
                raise Malformed("model_seq_id is missing")
            model_id, seq = f"{session.id}:train:{message.model_seq_id}", 0
        else:
            model_id, seq = self.run(owner, message.model_id).id, _seq(message)
        known = self._known(model_id, seq)
        if known is not None:
            return await self._model_reply(self._repeat(known, digest, owner))
        try:
            found = self._live(message.path)
            if found is None or (found.owner != owner and not found.public):
                raise UserError(f"checkpoint {message.path} does not exist")
            if found.kind == "external_weights":
                raise UserError(f"{message.path} is an export for other tools; load a weights/ checkpoint")
            if message.optimizer and found.kind != "weights":
                raise UserError(
                    f"{message.path} has no optimizer state; pass optimizer=False, or load a weights/ checkpoint"
                )
            if message.optimizer_config is not None and message.optimizer_config.type != "adamw":
                raise UserError(f"optimizer_config.type {message.optimizer_config.type!r} is not served; use adamw")
            source = self.runs[found.model]
            if create:
                if message.base_model not in (None, source.base):
                    raise UserError(
                        f"base_model {message.base_model} is not the checkpoint's, {source.base}; leave it out"
                    )
                self._check_runs(owner)
                run = self._new_run(
                    model_id, session, source.base, source.shape, {"user_metadata": message.user_metadata}
                )
            else:
                run = self.runs[model_id]
                if (run.base, run.shape) != (source.base, source.shape):
                    raise UserError(
                        f"{message.path} is of {source.base} with {source.shape}; this run: {run.base}, {run.shape}"
                    )
        except UserError as error:
            return await self._model_reply(await self._failed(owner, "load_weights", model_id, seq, digest, str(error)))
        payload = json.dumps({"path": message.path, "optimizer": message.optimizer}).encode()
        request = await self._accept_training(
            run, "load_weights", seq, digest,
            lambda: (LoadWork(message.path, found.blob, message.optimizer), payload),
            blob=found.blob, also=_insert_run(run) if create else None,
            undo=(lambda: self.runs.pop(model_id, None)) if create else lambda: None,
        )  # fmt: skip
        return await self._model_reply(request)

    # --------------------------------------------------------------------------------------------------------- sampling

    async def create_sampling_session(self, owner: str, body: Mapping[str, Any]) -> dict:
        message = _parse(wire_types.CreateSamplingSessionRequest, body)
        session = self.session(owner, message.session_id)
        sampler_id = f"{session.id}:sample:{message.sampling_session_seq_id}"
        reply = {"type": "create_sampling_session", "sampling_session_id": sampler_id}
        known = self.samplers.get(sampler_id)
        if known is not None:
            if (known.path, known.base) != (message.model_path, message.base_model or known.base):
                raise Refused(422, f"the sampling session {sampler_id} exists already, and is another")
            return reply
        now = time.time()
        if message.model_path is not None:
            found = self.checkpoint(owner, message.model_path)
            if found.kind == "external_weights":
                raise Refused(422, f"{message.model_path} is an export for other tools; sample from sampler_weights/")
            run = self.runs[found.model]
            sampler = Sampler(
                sampler_id, session.id, owner, run.base, found.path, run.id, found.blob, run.shape, "snapshot", now
            )
        else:
            if message.base_model not in self.served:
                raise Refused(
                    404, f"base_model {message.base_model!r} is not served here; choose from {', '.join(self.served)}"
                )
            sampler = Sampler(sampler_id, session.id, owner, message.base_model, None, None, None, None, "base", now)
        self.samplers[sampler_id] = sampler
        try:
            await asyncio.wrap_future(self.store.write(_insert_sampler(sampler)))
        except (DiskFull, sqlite3.IntegrityError) as error:
            del self.samplers[sampler_id]
            raise Refused(503, str(error), 5) from None
        return reply

    def sampler(self, owner: str, sampler_id: Any) -> Sampler:
        sampler = self.samplers.get(sampler_id) if isinstance(sampler_id, str) else None
        if sampler is None or sampler.owner != owner:
            raise Refused(
                404, f"sampler {sampler_id} does not exist, or its weights have no name and nobody used it for a day"
            )
        sampler.used = time.time()
        return sampler

    def get_sampler(self, owner: str, sampler_id: str) -> dict:
        sampler = self.sampler(owner, sampler_id)
        return {"sampler_id": sampler.id, "base_model": sampler.base, "model_path": sampler.path}

    async def join_sampling_session(self, owner: str, body: Mapping[str, Any]) -> dict:
        sampler = self.sampler(owner, body.get("sampling_session_id"))
        sampler.clients += 1
        await self._write("UPDATE samplers SET clients=? WHERE id=?", sampler.clients, sampler.id)
        return {"type": "join_sampling_session", "client_counter": sampler.clients}

    async def asample(self, owner: str, body: Mapping[str, Any]) -> dict:
        if body.get("sampling_session_id") is None:
            raise Refused(422, "sampling_session_id is missing: create a sampling session first")
        sampler = self.sampler(owner, body["sampling_session_id"])
        seq = body.get("seq_id")
        if not isinstance(seq, int) or isinstance(seq, bool) or not 0 <= seq < 2**63:
            raise Malformed(f"seq_id is {seq!r}; it is an integer from 0")
        request = Request(
            secrets.token_hex(16), owner, "asample", sampler.id, seq, wire.digest(wire.canonical(body)), None
        )
        payload, start = None, None
        if self._known(sampler.id, seq) is None:
            try:
                request.work, payload = self._sample_work(sampler, body)
                start = lambda: self.engine.sample(sampler.base, request, sampler.blob, sampler.shape)  # noqa: E731
            except (UserError, DataError, ConfigError) as error:
                request.resolve("failed", failure(str(error)))
        request = await self._accept(request, payload, start=start)
        number = body.get("num_samples", 1)
        number = number if isinstance(number, int) and 0 <= number <= self.limits.num_samples else 0
        return {"request_id": request.id, "sample_sequence_ids": [f"{request.id}:{i}" for i in range(number)]}

    def _sample_work(self, sampler: Sampler, body: Mapping[str, Any]) -> tuple[SampleWork, bytes]:
        """The work, and the body with its seed fixed, as the log keeps it. Raises UserError, Malformed."""
        message = _parse(wire_types.SampleRequest, body)
        served = self.served[sampler.base]
        params = message.sampling_params
        tokens = tuple(wire.prompt_tokens(message.prompt.chunks))
        try:
            ids = np.asarray(tokens, np.int64)
        except OverflowError:
            raise UserError(f"prompt: a token is outside the vocabulary of {served.vocabulary}") from None
        wire.check_tokens(ids, "prompt", served.vocabulary, served.context_length)
        room = None if served.context_length is None else served.context_length - len(tokens)
        if not 1 <= message.num_samples <= self.limits.num_samples:
            raise UserError(f"num_samples is {message.num_samples}; choose 1 to {self.limits.num_samples}")
        max_tokens = params.max_tokens
        if max_tokens is None:
            max_tokens = room if room is not None else 1024
        scoring = bool(
            message.prompt_logprobs or message.topk_prompt_logprobs or message.target_prompt_logprobs
            or message.prompt_alt_tokens_k
        )  # fmt: skip
        if max_tokens < 1:
            raise UserError(f"sampling_params.max_tokens is {max_tokens}; the least is 1")
        if room is not None and room < 1 and not scoring:
            raise UserError(
                f"the prompt has {len(tokens)} tokens and fills the model's context of {served.context_length}"
            )
        if room is not None:
            max_tokens = min(max_tokens, max(room, 1))
        if room is not None and room < 1:  # only the prompt can be scored
            tokens_to_sample = tokens[:-1]
        else:
            tokens_to_sample = tokens
        if not (np.isfinite(params.temperature) and params.temperature >= 0):
            raise UserError(f"sampling_params.temperature is {params.temperature}; it must be 0 or more")
        if not 0 < params.top_p <= 1:
            raise UserError(f"sampling_params.top_p is {params.top_p}; choose more than 0, up to 1")
        if params.top_k < -1:
            raise UserError(f"sampling_params.top_k is {params.top_k}; choose -1 (all tokens) or more")
        stop, stop_ids = _stops(params.stop, served.eos)
        seed = secrets.randbits(62) if params.seed is None else params.seed
        limit = 256
        for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
            if not 0 <= getattr(message, name) <= limit:
                raise UserError(f"{name} is {getattr(message, name)}; choose 0 to {limit}")
        last = message.prompt_logprobs_last_n
        if last is not None and not (message.prompt_logprobs and 1 <= last <= len(tokens) - 1):
            raise UserError(f"prompt_logprobs_last_n is {last}; it needs prompt_logprobs and 1 to {len(tokens) - 1}")
        request = SampleRequest(
            0, tokens_to_sample, message.num_samples,
            SamplingParams(
                max_tokens=max_tokens, temperature=params.temperature, top_k=max(params.top_k, 0), top_p=params.top_p,
                stop=stop, stop_token_ids=stop_ids, seed=seed,
            ),
        )  # fmt: skip
        score = None
        if scoring:
            target, target_ids = _target(message.target_prompt_logprobs, len(tokens), served.vocabulary)
            score = ScoreRequest(
                tokens, bool(message.prompt_logprobs), message.topk_prompt_logprobs, target, target_ids,
                message.prompt_alt_tokens_k, last, params.temperature, seed,
            )  # fmt: skip
        kept = {**body, "sampling_params": {**(body.get("sampling_params") or {}), "seed": seed}}
        return SampleWork(request, score, message.topk_sample_logprobs), json.dumps(kept).encode()

    # ------------------------------------------------------------------------------------------------------------ REST

    def _time(self, seconds: float | None) -> str | None:
        if seconds is None:
            return None
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1e6):06d}Z"

    def _checkpoint_json(self, c: Checkpoint) -> dict:
        return {
            "checkpoint_id": f"{c.kind}/{c.name}",
            "checkpoint_type": KINDS[c.kind],
            "time": self._time(c.created),
            "tinker_path": c.path,
            "size_bytes": c.blob.size,
            "public": c.public,
            "user_metadata": c.body.get("user_metadata"),
            "expires_at": self._time(c.expires),
        }

    def _run_json(self, run: Run) -> dict:
        mine = sorted(
            (c for c in self.checkpoints.values() if c.model == run.id and not c.expired), key=lambda c: c.created
        )
        last = {kind: next((c for c in reversed(mine) if c.kind == kind), None) for kind in KINDS}
        return {
            "training_run_id": run.id,
            "base_model": run.base,
            "model_owner": run.owner,
            "is_lora": True,
            "lora_rank": run.shape.rank,
            "corrupted": run.corrupted is not None,
            "last_request_time": self._time(run.seen),
            "last_checkpoint": last["weights"] and self._checkpoint_json(last["weights"]),
            "last_sampler_checkpoint": last["sampler_weights"] and self._checkpoint_json(last["sampler_weights"]),
            "user_metadata": _strings(run.body.get("user_metadata")),
        }

    def list_runs(self, owner: str, limit: int, offset: int) -> dict:
        mine = sorted((r for r in self.runs.values() if r.owner == owner), key=lambda r: -r.created)
        page = [self._run_json(run) for run in mine[offset : offset + limit]]
        return {"training_runs": page, "cursor": {"offset": offset, "limit": limit, "total_count": len(mine)}}

    def list_checkpoints(self, owner: str, model_id: str | None, limit: int, offset: int) -> dict:
        if model_id is not None:
            self.run(owner, model_id)
        mine = [
            c for c in self.checkpoints.values() if c.owner == owner and model_id in (None, c.model) and not c.expired
        ]
        mine.sort(key=lambda c: -c.created)
        page = [self._checkpoint_json(c) for c in mine[offset : offset + limit]]
        return {"checkpoints": page, "cursor": {"offset": offset, "limit": limit, "total_count": len(mine)}}

    def own_checkpoint(self, owner: str, model_id: str, kind: str, name: str) -> Checkpoint:
        self.run(owner, model_id)
        found = self._live(_path(model_id, kind, name))
        if found is None:
            raise unknown("checkpoint", f"{kind}/{name}")
        return found

    async def delete_checkpoint(self, owner: str, model_id: str, kind: str, name: str) -> None:
        await self._forget([self.own_checkpoint(owner, model_id, kind, name)])

    async def _forget(self, gone: list[Checkpoint]) -> None:
        for checkpoint in gone:
            self.checkpoints.pop(checkpoint.path, None)

        def commit(db: sqlite3.Connection) -> list[str]:
            db.executemany("DELETE FROM checkpoints WHERE path=?", [(c.path,) for c in gone])
            return orphans(db)

        try:
            garbage = await asyncio.wrap_future(self.store.write(commit))
        except DiskFull as error:
            raise Refused(503, str(error), 5) from None
        await asyncio.to_thread(self.store.delete_blobs, garbage)

    async def set_ttl(self, owner: str, model_id: str, kind: str, name: str, body: Mapping[str, Any]) -> None:
        found = self.own_checkpoint(owner, model_id, kind, name)
        try:
            ttl = _ttl(body.get("ttl_seconds"))
        except UserError as error:
            raise Refused(422, str(error)) from None
        found.expires = None if ttl is None else time.time() + ttl
        await self._write("UPDATE checkpoints SET expires=? WHERE path=?", found.expires, found.path)

    async def publish(self, owner: str, model_id: str, kind: str, name: str, public: bool) -> None:
        found = self.own_checkpoint(owner, model_id, kind, name)
        found.public = public
        await self._write("UPDATE checkpoints SET public=? WHERE path=?", int(public), found.path)

    def weights_info(self, owner: str, body: Mapping[str, Any]) -> dict:
        run = self.runs[self.checkpoint(owner, body.get("tinker_path")).model]
        return {
            "base_model": run.base,
            "is_lora": True,
            "lora_rank": run.shape.rank,
            "train_unembed": run.shape.train_unembed,
            "train_mlp": run.shape.train_mlp,
            "train_attn": run.shape.train_attn,
        }

    def list_sessions(self, owner: str, limit: int, offset: int) -> dict:
        mine = sorted((s for s in self.sessions.values() if s.owner == owner), key=lambda s: -s.created)
        return {"sessions": [s.id for s in mine[offset : offset + limit]]}

    def get_session(self, owner: str, session_id: str) -> dict:
        session = self.session(owner, session_id)
        return {
            "training_run_ids": [r.id for r in self.runs.values() if r.session == session.id],
            "sampler_ids": [s.id for s in self.samplers.values() if s.session == session.id],
            "user_metadata": _strings(session.body.get("user_metadata")),
            "display_name": session.body.get("display_name"),
        }

    def search_sessions(self, owner: str, body: Mapping[str, Any]) -> dict:
        message = _parse(wire_types.SessionSearchRequest, body)
        mine = [s for s in self.sessions.values() if s.owner == owner and self._matches(s, message)]
        mine.sort(key=lambda s: (-s.created, s.id))
        if message.cursor is not None:
            after = (-message.cursor.last_created_at.timestamp(), message.cursor.last_session_id)
            mine = [s for s in mine if (-round(s.created, 6), s.id) > after]
        page = mine[: message.limit]
        cursor = None
        if len(mine) > len(page):
            cursor = {"last_created_at": self._time(page[-1].created), "last_session_id": page[-1].id}
        return {"sessions": [self._summary(s) for s in page], "next_cursor": cursor}

    def _matches(self, session: Session, message: Any) -> bool:
        metadata = _strings(session.body.get("user_metadata")) or {}
        if any(metadata.get(key) != value for key, value in message.user_metadata.items()):
            return False
        if message.project_ids is not None and session.body.get("project_id") not in message.project_ids:
            return False
        if message.statuses is not None:
            status = self._status(session)["type"]
            if not any(query.type == status for query in message.statuses):
                return False
        wanted = []
        if message.session_id is not None:
            wanted.append(session.id == message.session_id)
        if message.display_name is not None:
            name = (session.body.get("display_name") or "").lower()
            wanted.append(all(word in name for word in message.display_name.lower().split()))
        return any(wanted) if wanted else True

    def _status(self, session: Session) -> dict:
        if session.finished is None:
            return {"type": "active"}
        reason = session.finished.get("reason")
        reason = reason if isinstance(reason, dict) and "type" in reason else {"type": "success"}
        return {"type": "client_finished", "reason": reason, "detail": session.finished.get("detail")}

    def _summary(self, session: Session) -> dict:
        runs = {r.id for r in self.runs.values() if r.session == session.id}
        held = [c for c in self.checkpoints.values() if c.model in runs]
        return {
            "session_id": session.id,
            "created_at": self._time(session.created),
            "owner": session.owner,
            "project_id": session.body.get("project_id") or "default",
            "status": self._status(session),
            "checkpoints_count": len(held),
            "display_name": session.body.get("display_name"),
            "user_metadata": _strings(session.body.get("user_metadata")),
            "checkpoint_storage_bytes": sum(c.blob.size for c in held),
        }

    def capabilities(self) -> dict:
        return {
            "supported_models": [
                {"model_name": name, "max_context_length": m.context_length, "trainable": True, "sampleable": True}
                for name, m in self.served.items()
            ]
        }

    def external_file(self, model_id: str, name: str) -> BlobRow | None:
        found = self._live(_path(model_id, "external_weights", name))
        return found and found.blob

    def overview(self, owner: str) -> dict:
        """What the page at `/` shows of one tenant."""
        now = time.time()
        mine = [r for r in self.requests.values() if r.owner == owner and not r.resolved]
        return {
            "models": list(self.served),
            "uptime": now - self.metrics.started,
            "queued": len(mine),
            "trained_tokens": self.metrics.trained_tokens._value.get(),
            "sampled_tokens": self.metrics.sampled_tokens._value.get(),
            "sessions": [
                {**self._summary(s), "live": now - s.seen < 60 and s.finished is None}
                for s in sorted(self.sessions.values(), key=lambda s: -s.created)
                if s.owner == owner
            ][:50],
            "runs": [
                {**self._run_json(run), "curve": run.curve[-200:], "session_id": run.session}
                for run in sorted(self.runs.values(), key=lambda r: -r.seen)
                if run.owner == owner
            ][:50],
        }

    # ----------------------------------------------------------------------------------------------------- housekeeping

    async def collect(self) -> None:
        """Expired checkpoints, unnamed samplers that nobody uses, results that were fetched a while ago, and the files
        that nothing names any more."""
        now = time.time()
        expired = [c for c in self.checkpoints.values() if c.expired]
        old = [
            r for r in self.requests.values()
            if r.resolved and r.work is None and r.finished is not None
            and ((r.delivered or now) < now - KEEP_DELIVERED or r.finished < now - KEEP_UNFETCHED)
        ]  # fmt: skip
        for request in old:
            self.requests.pop(request.id)
            self._by_seq.pop((request.scope, request.seq), None)
            self._finished.get(request.scope, {}).pop(request.id, None)
        for request in self.requests.values():  # the log has it: memory need not
            if request.resolved and request.delivered is not None and request.delivered < now - 60:
                request.result = None
        gone = [(request.id,) for request in old]
        seen = [(session.seen, session.id) for session in self.sessions.values()]

        def commit(db: sqlite3.Connection) -> None:
            db.executemany("UPDATE requests SET result=NULL WHERE id=?", gone)
            db.executemany("UPDATE sessions SET seen=? WHERE id=?", seen)

        await asyncio.wrap_future(self.store.write(commit))
        if expired:
            await self._forget(expired)
        self._let_go(self._unnamed(KEEP_SAMPLER))


# ------------------------------------------------------------------------------------------------------------- parsing


def _parse(model: type[BaseModel], body: Mapping[str, Any]) -> Any:
    """Raises Malformed, naming the field and not its value (it may be a prompt)."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise Malformed(f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise Malformed(f"the body does not fit {model.__name__}: {type(error).__name__}") from None


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise Malformed(f"{name}: a string is needed")
    return value


def _seq(message: Any) -> int:
    if message.seq_id is None or not 1 <= message.seq_id < 2**63:
        raise Malformed(f"seq_id is {message.seq_id}; it starts at 1")
    return message.seq_id


def _ttl(seconds: Any) -> float | None:
    if seconds is None:
        return None
    if not isinstance(seconds, int) or isinstance(seconds, bool) or not 3600 <= seconds <= 10 * 366 * 86400:
        raise UserError(f"ttl_seconds is {seconds}; choose 3600 (an hour) to ten years, or None")
    return float(seconds)


def _adam(params: Any) -> AdamParams:
    if not isinstance(params, wire_types.AdamParams):
        raise UserError(f"optimizer {getattr(params, 'type', '?')!r} is not served; use AdamParams")
    values = {name: getattr(params, name) for name in AdamParams.__slots__}
    for name, value in values.items():
        if not np.isfinite(value) or value < 0:
            raise UserError(f"adam_params.{name} is {value}; it must be a finite number, 0 or more")
    for name in ("beta1", "beta2"):
        if values[name] >= 1:
            raise UserError(f"adam_params.{name} is {values[name]}; it must be below 1")
    if max(values["learning_rate"], values["learning_rate"] * values["weight_decay"]) > 1e30:
        raise UserError("adam_params: learning_rate, and its product with weight_decay, must be at most 1e30")
    return AdamParams(**values)


def _stops(stop: Any, eos: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Stop strings, and stop ids (None: the model's EOS). `[]` never stops; other lists come on top of EOS."""
    if stop is None:
        return (), None
    if isinstance(stop, str):
        return (stop,), None
    if not stop:
        return (), ()
    if all(isinstance(item, str) for item in stop):
        return tuple(stop), None
    return (), (*eos, *(int(item) for item in stop))


def _target(tensor: Any, length: int, vocabulary: int) -> tuple[pb.Tensor | None, torch.Tensor | None]:
    """`target_prompt_logprobs` as a message and as dense ids [S − 1, K], −1 where nothing is asked."""
    if tensor is None:
        return None, None
    message = pb.Tensor(dtype=pb.DTYPE_INT64, shape=tensor.shape or [])
    values = np.asarray(tensor.data, "<i8")
    if tensor.sparse_crow_indices is not None:
        message.sparse_csr.crow_indices = np.asarray(tensor.sparse_crow_indices, "<i8").tobytes()
        message.sparse_csr.col_indices = np.asarray(tensor.sparse_col_indices or [], "<i8").tobytes()
        message.sparse_csr.values = (values + 1).tobytes()  # expanded with zeros, and −1 asks nothing
        ids = wire.decode_tensor(message, "target_prompt_logprobs") - 1
        message.sparse_csr.values = values.tobytes()
    else:
        message.dense = values.tobytes()
        ids = wire.decode_tensor(message, "target_prompt_logprobs")
    if ids.ndim != 2 or len(ids) != length - 1:
        raise UserError(f"target_prompt_logprobs has shape {list(ids.shape)}; its first dimension must be {length - 1}")
    if ids.numel() > 1 << 22:
        raise UserError(f"target_prompt_logprobs asks for {ids.numel()} cells; the most is {1 << 22}")
    if bool(((ids < -1) | (ids >= vocabulary)).any()):
        raise UserError(f"target_prompt_logprobs names a token outside the vocabulary of {vocabulary}")
    return message, ids


def _strings(metadata: Any) -> dict[str, str] | None:
    if not isinstance(metadata, dict):
        return None
    return {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}


def _path(model_id: str, kind: str, name: str) -> str:
    return f"tinker://{model_id}/{kind}/{name}"


def _insert_run(run: Run) -> Callable[[sqlite3.Connection], None]:
    values = (run.id, run.session, run.owner, run.base, json.dumps(run.body), run.created, run.seen)

    def insert(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO models (id, session, owner, base, body, created, seen) VALUES (?,?,?,?,?,?,?)", values)

    return insert


def _insert_sampler(s: Sampler) -> Callable[[sqlite3.Connection], None]:
    shape = None
    if s.shape is not None:
        shape = json.dumps({name: getattr(s.shape, name) for name in LoraShape.__dataclass_fields__})
    values = (s.id, s.session, s.owner, s.base, s.path, s.model, s.blob and s.blob.id, shape, s.kind, s.created)

    def insert(db: sqlite3.Connection) -> None:
        db.execute(
            "INSERT INTO samplers (id, session, owner, base, path, model, blob, shape, kind, created) "
            "VALUES (?,?,?,?,?,?,?,?,?,?)",
            values,
        )

    return insert
