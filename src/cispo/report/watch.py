"""`cispo watch`: the report's page live, on loopback, updating as the run goes.

Three routes: the page, one step's tokens on demand, and server-sent events. A run that begins in a watched folder joins
the page, which is loaded again for it. `Hub` reads the run folders:
each byte of metrics.jsonl once, and each rollout file once, after the step's metrics have been written (the trainer
writes rollouts first, so the file is then whole). Left out on purpose: listening anywhere but on loopback (use ssh -L,
or `--tui`), and everything the page does (`assets/`).

    cispo watch runs/think-20260101-120000 [--port 8765] [--tui]
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import webbrowser
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console

from cispo.report.page import COUNTED_STEPS, READ_BYTES, TOKEN_BUDGET, embed, objective, page_data, render
from cispo.report.runs import Run, find_runs, new_runs
from cispo.report.tokens import ForkCounter, choose_steps, encode_step, read_lines
from cispo.types import ConfigError

if TYPE_CHECKING:
    from starlette.applications import Starlette

log = logging.getLogger(__name__)

HOSTS = ["127.0.0.1", "localhost", "[::1]"]
"""Names that a request may call this server by: a page elsewhere cannot reach it through a name of its own."""
HEARTBEAT_S = 15.0


@dataclass(frozen=True)
class WatchOptions:
    """Watch runs while they go: a live page on loopback, or a dashboard in the terminal."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders of runs."""
    port: int = 8765
    """0 takes any free one."""
    tui: bool = False
    """Draw in the terminal instead (for ssh)."""
    open: bool = False
    """Open the page in a browser."""
    every: float = 1.0
    """Seconds between looks at the run folders."""


def watch(options: WatchOptions) -> int:
    """Serve (or draw) until Ctrl-C. Raises DataError for what is not a run, ConfigError for a port that is taken."""
    if not options.every > 0:
        raise ConfigError(f"every: {options.every:g} is not a time in seconds; use 1")
    runs = find_runs(options.runs)

    def begun(known: Sequence[Run]) -> list[Run]:
        return new_runs(options.runs, known)

    if options.tui:
        from cispo.report.tui import draw

        return draw(runs, every=options.every, begun=begun)
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError(
            f"watch: {error.name} is not installed; run pip install 'cispo[server]', or use --tui"
        ) from None
    app = make_app(Hub(runs, begun), every=options.every)
    listening = _listen(options.port)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    Console().print(f"watching {', '.join(run.name for run in runs)} at {url} (Ctrl-C ends)", soft_wrap=True)
    if options.open:
        webbrowser.open(url)
    # event streams end only with their clients: do not wait for them
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        log.debug("stopped by Ctrl-C")
    return 0


def _listen(port: int) -> socket.socket:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise ConfigError(f"port: {port} cannot be used ({error}); choose another, or 0 for any free one") from None
    return listening


# ------------------------------------------------------------------------------------------------------------ the hub


@dataclass
class _Watched:
    run: Run
    counter: ForkCounter
    counted: set[int] = field(default_factory=set)
    forks: dict[str, Any] | None = None
    epoch: int = 0
    """Grows when the run was resumed from before what had been read, or new forks are known."""
    restarts: int = 0


class Hub:
    """The runs as read so far. `refresh` reads what is new; not for two threads at once.

    begun: from the runs that are known to those that have begun since, which come after them.
    """

    def __init__(self, runs: Sequence[Run], begun: Callable[[Sequence[Run]], Sequence[Run]] = lambda known: ()) -> None:
        self.runs: list[Run] = []
        self._watched: list[_Watched] = []
        self._begun, self._looked = begun, 0.0
        self._add(runs)

    def _add(self, runs: Sequence[Run]) -> None:
        self.runs += runs
        self._watched += [_Watched(run, ForkCounter(objective(run))) for run in runs]

    def refresh(self, *, at_most_every: float = 0.0) -> None:
        """Read what is new, unless the last look was less than `at_most_every` seconds ago."""
        if time.monotonic() - self._looked < at_most_every:
            return
        for watched in self._watched:
            watched.run.refresh()
            if watched.run.restarted:
                watched.restarts += 1
                watched.counter, watched.counted = ForkCounter(objective(watched.run)), set()
            self._count(watched)
        self._add(self._begun(self.runs))  # whoever asks next reads their files
        self._looked = time.monotonic()

    def _count(self, watched: _Watched) -> None:
        files = {step: path for step, path in self.whole(watched.run).items() if step not in watched.counted}
        if not files:
            return
        for step, path in choose_steps(files, most=COUNTED_STEPS, most_bytes=READ_BYTES).steps.items():
            watched.counter.add(step, list(read_lines(path)))
        watched.counted |= set(files)
        watched.forks = watched.counter.forks()
        watched.epoch += 1

    @staticmethod
    def whole(run: Run) -> dict[int, Path]:
        """Rollout files that are written to their end."""
        return {step: path for step, path in run.rollout_steps().items() if step <= run.last_step}

    def news(self, index: int, since: Cursor) -> dict[str, Any] | None:
        """What run `index` has that `since` has not seen, which is moved on; None where there is nothing."""
        watched = self._watched[index]
        restarted = since.restarts != watched.restarts
        start = 0 if restarted else since.lines
        lines = watched.run.metrics[start:]
        if not lines and since.epoch == watched.epoch and not restarted:
            return None
        since.lines, since.epoch, since.restarts = len(watched.run.metrics), watched.epoch, watched.restarts
        return {
            "run": index,
            "restarted": restarted,
            "lines": lines,
            "rollouts": sorted(self.whole(watched.run)),
            "notes": watched.run.notes(),
            "forks": watched.forks,
        }

    def cursor(self, index: int) -> Cursor:
        return Cursor(restarts=self._watched[index].restarts)

    def step(self, index: int, step: int) -> dict[str, Any] | None:
        """One step's tokens for the page; None where there is no such run or step."""
        if not 0 <= index < len(self.runs):
            return None
        run = self.runs[index]
        path = run.rollout_steps().get(step)
        if path is None:
            return None
        return encode_step(list(read_lines(path)), objective(run), token_budget=TOKEN_BUDGET)


@dataclass
class Cursor:
    """How much of a run a client has been sent."""

    lines: int = 0
    epoch: int = -1
    restarts: int = 0


# --------------------------------------------------------------------------------------------------------- the server


def make_app(hub: Hub, *, every: float = 1.0) -> Starlette:
    """The page, its steps and its events. Needs starlette."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route

    reading = asyncio.Lock()

    async def refresh(at_most_every: float) -> None:
        async with reading:
            await run_in_threadpool(hub.refresh, at_most_every=at_most_every)

    async def page(request: Request) -> Response:
        await refresh(every)
        return HTMLResponse(await run_in_threadpool(lambda: render(page_data(hub.runs, live=True))))

    async def step(request: Request) -> Response:
        index, number = request.path_params["run"], request.path_params["step"]
        found = await run_in_threadpool(hub.step, index, number)
        if found is None:
            return PlainTextResponse(f"run {index} has no rollout file of step {number}", 404)
        return Response(embed(found), media_type="application/json")

    async def events(request: Request) -> Response:
        return StreamingResponse(stream(request), media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def stream(request: Request) -> AsyncIterator[str]:
        """Consumes the hub's news; waits for the next look; unblocked by time; produces events while the client is
        there."""
        cursors = [hub.cursor(i) for i in range(len(hub.runs))]
        quiet = 0.0
        while not await request.is_disconnected():
            await refresh(every)
            if len(hub.runs) > len(cursors):  # the page is laid out for the runs that it was made with
                yield "event: reload\ndata: {}\n\n"
                return
            found = [news for i, cursor in enumerate(cursors) if (news := hub.news(i, cursor))]
            for news in found:
                yield f"event: run\ndata: {embed(news)}\n\n"
            quiet = 0.0 if found else quiet + every
            if quiet >= HEARTBEAT_S:
                yield ": still here\n\n"
                quiet = 0.0
            await asyncio.sleep(every)

    return Starlette(
        routes=[
            Route("/", page),
            Route("/api/run/{run:int}/step/{step:int}", step),
            Route("/api/events", events),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)],
    )
