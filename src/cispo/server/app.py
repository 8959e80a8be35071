"""The routes: HTTP in, the service's verbs, HTTP out. The only door to FastAPI.

Status codes are chosen for what the SDK does with them: 401, 404 and 422 end a call at once; 429 and 503 are tried
again after `retry-after`; 408 says that a result is not there yet; 409 and 402 are never sent. Keys, prompts and tokens
are never logged, and telemetry is dropped unread. Left out on purpose: what anything means (`service.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cispo.server import external, wire
from cispo.server.service import KINDS, Refused, Service
from cispo.server.store import DiskFull
from cispo.server.tenants import Keys
from cispo.server.wire import Malformed, TooLarge, UserError

log = logging.getLogger("cispo.server")

CLIENT_CONFIG = {
    "pjwt_auth_enabled": False,
    "parallel_fwdbwd_chunks": True,
    "proto_compress_fwdbwd": False,
    "fwdbwd_max_chunk_len": 1024,
    "fwdbwd_max_chunk_bytes_count": 5_000_000,
    "sample_max_concurrent_requests": 2000,
    "sample_use_retrieve_futures": False,
    "custom_loss_server_side": False,
    "sample_join_sampling_session": True,
}
DYNAMIC_CONFIG = {"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64}
URL_SECONDS = 3600


def create_app(service: Service, keys: Keys) -> ASGIApp:
    """The ASGI application of one service."""
    app = FastAPI(title="cispo serve", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(Exception, _unexpected)
    app.add_exception_handler(HTTPException, _http_error)
    app.include_router(_open_routes(service))
    api = _api(service, keys)
    app.include_router(api, prefix="/api/v1")
    posts = {f"/api/v1{r.path}": r.endpoint for r in api.routes if "POST" in r.methods and "{" not in r.path}
    return _Outer(app, posts, service)


# --------------------------------------------------------------------------------------------------------------- bodies


async def _body(request: Request, limit: int) -> bytes:
    """The whole body, uncompressed. Raises TooLarge, and never holds more than the limit.

    What is too large is read on for a while and dropped, because a client that is still sending sees no reply. One that
    announces far too much is not heard out.
    """
    pieces, size = [], 0
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 15 or int(announced) > 4 * limit):
        raise TooLarge(f"the body has {announced} bytes, more than {limit}; send smaller chunks")
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > 4 * limit:
                break
            if size <= limit:
                pieces.append(piece)
            else:
                pieces.clear()
    except ClientDisconnect:
        raise Malformed("the body ended before its announced length") from None
    if size > limit:
        raise TooLarge(f"the body has more than {limit} bytes; send smaller chunks")
    body = b"".join(pieces)
    encoding = request.headers.get("content-encoding")
    if len(body) > 1 << 18 and encoding:
        return await asyncio.to_thread(wire.decompress, body, encoding, limit)
    return wire.decompress(body, encoding, limit)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(value), status, headers, "application/json")


def _refusal(error: Exception) -> Response:
    match error:
        case Refused():
            status, after = error.status, error.retry_after
        case TooLarge():
            status, after = 413, None
        case Malformed() | UserError():
            status, after = 422, None
        case DiskFull():
            status, after = 503, 5
        case _:
            raise error
    headers = None if after is None else {"retry-after": f"{after:g}"}
    return _json({"error": str(error), "detail": str(error)}, status, headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("http_failed", exc_info=error, extra={"data": {"path": request.url.path}})
    return _json({"error": "internal error; the server's log has it"}, 500)


async def _http_error(request: Request, error: HTTPException) -> Response:
    return _json({"error": str(error.detail)}, error.status_code, dict(error.headers or {}))


def _not_served(instead: str) -> Callable[[str, Request], None]:
    """A route of the SDK's that is refused by a sentence, once the key is known."""

    def handler(owner: str, request: Request) -> None:
        raise Refused(404, f"not served: {instead}")

    return handler


class _Outer:
    """Counts requests by route, and turns what no handler expected into a 500.

    The verbs, POSTs without parameters in their paths, go to their handlers by a look-up: FastAPI asks one route after
    the other and then solves dependencies, which none has, and took more time for that than the handlers.
    """

    def __init__(self, app: ASGIApp, posts: dict[str, Callable[[Request], Awaitable[Response]]], service: Service):
        self.app, self.posts, self.service = app, posts, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        endpoint = self.posts.get(scope["path"]) if scope["method"] == "POST" else None
        if endpoint is not None:
            request = Request(scope, receive)
            try:
                response = await endpoint(request)
            except Exception as error:
                response = await _unexpected(request, error)
            self.service.metrics.http.labels(scope["path"], str(response.status_code)).inc()
            await response(scope, receive, send)
            return
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            route = scope.get("route")
            name = getattr(route, "path", "unknown")
            self.service.metrics.http.labels(name, str(status)).inc()


# --------------------------------------------------------------------------------------------------------- open routes


def _open_routes(service: Service) -> APIRouter:
    """What needs no key, and tells nothing of any tenant."""
    router = APIRouter()

    @router.get("/")
    async def page() -> Response:
        html = resources.files("cispo.server").joinpath("assets/index.html").read_text()
        policy = "default-src 'self' 'unsafe-inline'; img-src 'self' data:"
        return HTMLResponse(html, headers={"content-security-policy": policy})

    @router.get("/metrics")
    async def metrics() -> Response:
        now, m = time.time(), service.metrics
        m.resident.set(service.engine.resident)
        m.queued.set(service.engine.queued)
        m.sessions.set(sum(now - s.seen < 60 for s in service.sessions.values()))
        return PlainTextResponse(m.page(), media_type="text/plain; version=0.0.4")

    @router.get("/healthz")
    @router.get("/api/v1/healthz")
    async def healthz() -> Response:
        if service.engine.failure is not None:
            return _json({"status": "failed"}, 503)
        return _json({"status": "stopping" if service.draining else "ok"})

    return router


# ------------------------------------------------------------------------------------------------------------------ API


def _api(service: Service, keys: Keys) -> APIRouter:
    router = APIRouter()
    limit = service.limits.body_bytes
    url_secret = secrets.token_bytes(32)

    def owner_of(request: Request) -> str:
        owner = keys.owner(request.headers.get("x-api-key"))
        if owner is None:
            raise Refused(401, "X-API-Key is missing or unknown; set TINKER_API_KEY to a key of this server")
        return owner

    def post(path: str, status: int = 200) -> Callable:
        """A POST whose JSON body and tenant go to `handler(owner, body)`."""

        def register(handler: Callable[[str, dict], Any]) -> None:
            async def endpoint(request: Request) -> Response:
                try:
                    owner = owner_of(request)
                    value = handler(owner, wire.parse_json(await _body(request, limit)))
                    if isinstance(value, Awaitable):
                        value = await value
                except (Refused, Malformed, TooLarge, UserError, DiskFull) as error:
                    return _refusal(error)
                return Response(status_code=204) if status == 204 else _json(value)

            router.add_api_route(path, endpoint, methods=["POST"], response_model=None)

        return register

    def route(method: str, path: str) -> Callable:
        """Any route with parameters: `handler(owner, request)` gives a value, or None for 204."""

        def register(handler: Callable[[str, Request], Any]) -> None:
            async def endpoint(request: Request) -> Response:
                try:
                    value = handler(owner_of(request), request)
                    if isinstance(value, Awaitable):
                        value = await value
                except (Refused, Malformed, TooLarge, UserError, DiskFull) as error:
                    return _refusal(error)
                if isinstance(value, Response):
                    return value
                return Response(status_code=204) if value is None else _json(value)

            router.add_api_route(path, endpoint, methods=[method], response_model=None)

        return register

    # Construction
    post("/client/config")(lambda owner, body: CLIENT_CONFIG)
    post("/client/dynamic_config")(lambda owner, body: DYNAMIC_CONFIG)
    post("/create_session")(service.create_session)
    post("/session_heartbeat")(service.heartbeat)
    post("/telemetry")(lambda owner, body: {"status": "accepted"})
    route("GET", "/get_server_capabilities")(lambda owner, request: service.capabilities())

    # Futures
    @router.post("/retrieve_future")
    async def retrieve_future(request: Request) -> Response:
        try:
            owner = owner_of(request)
            body = wire.parse_json(await _body(request, limit))
            if not isinstance(body.get("request_id"), str):
                raise Malformed("request_id: a string is needed")
            found = await service.retrieve(owner, body["request_id"])
        except (Refused, Malformed, TooLarge) as error:
            return _refusal(error)
        if found is None:
            return _json({"queue_state": "active", "request_id": body["request_id"]}, 408)
        return Response(found.result, media_type=wire.PROTOBUF if found.status == "proto" else "application/json")

    post("/retrieve_futures")(service.retrieve_many)
    post("/cancel_future", 204)(service.cancel)

    # Training
    post("/create_model")(service.create_model)
    post("/get_info")(service.get_info)
    post("/optim_step")(service.optim_step)

    @router.post("/forward_backward")
    async def forward_backward(request: Request) -> Response:
        try:
            owner = owner_of(request)
            if wire.PROTOBUF not in request.headers.get("content-type", ""):
                raise Malformed(f"forward_backward takes {wire.PROTOBUF} only; use the tinker SDK from 0.38 on")
            message, canonical = wire.parse_train(await _body(request, limit))
            return _json(await service.forward_backward(owner, message, canonical))
        except (Refused, Malformed, TooLarge, UserError, DiskFull) as error:
            return _refusal(error)

    @post("/create_custom_loss")
    def create_custom_loss(owner: str, body: dict) -> dict:
        raise UserError("losses are not traced to this server; forward_backward_custom runs them on the client")

    @post("/copy_weights")
    def copy_weights(owner: str, body: dict) -> dict:
        raise UserError("weights are not copied here; create_training_client_from_state loads them into a new run")

    # Weights
    post("/save_weights")(lambda owner, body: service.save(owner, "weights", body))
    post("/save_weights_for_sampler")(lambda owner, body: service.save(owner, "sampler_weights", body))
    post("/save_weights_external")(lambda owner, body: service.save(owner, "external_weights", body))
    post("/load_weights")(service.load)
    post("/weights_info")(service.weights_info)

    # Sampling
    post("/create_sampling_session")(service.create_sampling_session)
    post("/join_sampling_session")(service.join_sampling_session)
    post("/asample")(service.asample)
    route("GET", "/samplers/{sampler_id}")(lambda o, r: service.get_sampler(o, r.path_params["sampler_id"]))

    # Lists
    def paged(request: Request, default: int) -> tuple[int, int]:
        try:
            size = int(request.query_params.get("limit", default))
            offset = int(request.query_params.get("offset", 0))
        except ValueError:
            raise Malformed("limit and offset are integers") from None
        if not (0 <= size <= 1000 and 0 <= offset < 2**31):
            raise Malformed("limit is 0 to 1000, and offset not negative")
        return size, offset

    route("GET", "/training_runs")(lambda o, r: service.list_runs(o, *paged(r, 20)))
    route("GET", "/training_runs/{run_id}")(lambda o, r: service._run_json(service.run(o, r.path_params["run_id"])))
    route("GET", "/training_runs/{run_id}/checkpoints")(
        lambda o, r: service.list_checkpoints(o, r.path_params["run_id"], *paged(r, 1000))
    )
    route("GET", "/checkpoints")(lambda o, r: service.list_checkpoints(o, None, *paged(r, 100)))

    def named(request: Request) -> tuple[str, str, str]:
        p = request.path_params
        if p["kind"] not in KINDS:
            raise Refused(404, f"{p['kind']} is no kind of checkpoint; there are {', '.join(KINDS)}")
        return p["run_id"], p["kind"], p["name"]

    one = "/training_runs/{run_id}/checkpoints/{kind}/{name}"
    route("DELETE", one)(lambda o, r: service.delete_checkpoint(o, *named(r)))
    route("POST", one + "/publish")(lambda o, r: service.publish(o, *named(r), True))
    route("DELETE", one + "/publish")(lambda o, r: service.publish(o, *named(r), False))

    @route("PUT", one + "/ttl")
    async def ttl(owner: str, request: Request) -> None:
        await service.set_ttl(owner, *named(request), wire.parse_json(await _body(request, limit)))

    def signature(run_id: str, name: str, file: str, expires: int) -> str:
        text = f"{run_id}/{name}/{file}/{expires}".encode()
        return hmac.new(url_secret, text, hashlib.sha256).hexdigest()

    @route("GET", one + "/external_weights_urls")
    def urls(owner: str, request: Request) -> dict:
        run_id, kind, name = named(request)
        service.own_checkpoint(owner, run_id, kind, name)
        if kind != "external_weights":
            raise Refused(404, f"{kind}/{name} is no export; save_weights_external makes one")
        expires = int(time.time()) + URL_SECONDS
        base = f"{request.base_url}api/v1/external/{run_id}/{name}"
        found = {
            file: f"{base}/{file}?expires={expires}&signature={signature(run_id, name, file, expires)}"
            for file in external.FILES
        }
        return {"urls": found, "expires": service._time(expires)}

    @router.get("/external/{run_id}/{name}/{file}")
    async def download(run_id: str, name: str, file: str, request: Request) -> Response:
        expires, given = request.query_params.get("expires", ""), request.query_params.get("signature", "")
        valid = expires.isdigit() and int(expires) >= time.time()
        if not valid or not hmac.compare_digest(given.encode(), signature(run_id, name, file, int(expires)).encode()):
            return _json({"error": "this link has expired; ask for another"}, 404)
        blob = service.external_file(run_id, name)
        data = (
            None if blob is None else external.read_file(await asyncio.to_thread(service.store.read_bytes, blob), file)
        )
        if data is None:
            return _json({"error": "the file is gone"}, 404)
        return Response(data, media_type="application/octet-stream")

    # Sessions
    route("GET", "/sessions")(lambda o, r: service.list_sessions(o, *paged(r, 20)))
    post("/sessions/search")(service.search_sessions)
    route("GET", "/sessions/{session_id}")(lambda o, r: service.get_session(o, r.path_params["session_id"]))

    @route("POST", "/sessions/{session_id}/finish")
    async def finish(owner: str, request: Request) -> None:
        body = wire.parse_json(await _body(request, limit))
        await service.finish_session(owner, request.path_params["session_id"], body)

    no_traces = "no traces are kept here; /metrics and the page at / show times"
    for method, path, instead in (
        ("PUT", "/sessions/{session_id}/project", "this server has no projects; user_metadata can name one"),
        ("GET", "/sessions/{session_id}/trace_export", no_traces),
        ("POST", "/sessions/{session_id}/trace_export", no_traces),
        ("GET", "/audit", "there is no audit log here; the server's own log is on its stderr"),
        ("GET", "/billing/usage/events", "nothing is billed here; /metrics counts tokens"),
        ("GET", "/billing/usage/checkpoints/current", "nothing is billed here; list_checkpoints gives sizes"),
        ("POST", "/auth/token", "there are no accounts here; send a key of this server as X-API-Key"),
        ("GET", "/auth/apikey/me", "there are no accounts here; GET /api/v1/whoami says whose a key is"),
        ("DELETE", "/auth/apikey/me", "keys are not deleted over the wire; take the line out of the keys file"),
    ):
        route(method, path)(_not_served(instead))

    route("GET", "/whoami")(lambda owner, request: {"user_urn": f"urn:cispo:{owner}", "org_urn": "urn:cispo:local"})
    route("GET", "/overview")(lambda owner, request: service.overview(owner))
    return router
