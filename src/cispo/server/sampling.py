"""`LocalSampler` with an adapter per request: rows of several adapters decode together.

Left out on purpose: batching itself and the random draws (`cispo.sampling`), and log-probs of prompts (`compute.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cispo.sampling.local import LocalSampler
from cispo.server.compute import ServedModel
from cispo.server.lora import FrozenAdapter, SampleRoute
from cispo.types import SampleRequest


class AdapterSampler(LocalSampler):
    """Each request brings its adapter, or None for the base model. Weights never change under a request."""

    def __init__(self, served: ServedModel, *, max_batch_rows: int, steps_per_poll: int):
        self._host = served.host
        self._adapters: dict[int, FrozenAdapter | None] = {}
        self._prefilling: FrozenAdapter | None = None
        self._in_prefill = False
        self._routes: dict[tuple[int, ...], SampleRoute] = {}
        super().__init__(
            served.model,
            served.tokenizer,
            max_batch_rows=max_batch_rows,
            steps_per_poll=steps_per_poll,
            eos_token_ids=served.eos,
            check_model=True,
        )

    def submit_with(self, request: SampleRequest, adapter: FrozenAdapter | None) -> None:
        """`submit`, sampling from `adapter`."""
        self.submit(request)
        self._adapters[request.request_id] = adapter

    def forget(self, request_id: int) -> None:
        """The request has been returned or cancelled: its adapter need not be kept for it."""
        self._adapters.pop(request_id, None)
        if not self._adapters:
            self._routes.clear()

    def knows(self, request_id: int) -> bool:
        """Whether the request is under way or waits to be returned."""
        return request_id in self._jobs or any(result.request_id == request_id for result in self._done)

    def _adapter_of(self, row: object) -> FrozenAdapter | None:
        return None if row is None else self._adapters.get(row.job.request.request_id)

    def _prefill(self, chosen: Sequence) -> None:
        """Prompts of one adapter at a time: equal prompts under two adapters are two sequences."""
        groups: dict[int, tuple[FrozenAdapter | None, list]] = {}
        for item in chosen:
            adapter = self._adapter_of(item[1][0])
            groups.setdefault(id(adapter), (adapter, []))[1].append(item)
        self._in_prefill = True
        try:
            for self._prefilling, items in groups.values():
                super()._prefill(items)
        finally:
            self._in_prefill, self._prefilling = False, None

    def _forward(self, *args, **kwargs) -> Tensor:
        with self._host.routed(self._route()):
            return super()._forward(*args, **kwargs)

    def _route(self) -> SampleRoute | None:
        if self._in_prefill:
            return None if self._prefilling is None else self._route_of([self._prefilling]).rows(None)
        rows = [self._adapter_of(row) for row in self._slots.rows[: self._slots.n]]
        present = list({id(adapter): adapter for adapter in rows if adapter is not None}.values())
        if not present:
            return None
        route = self._route_of(present)
        if len(present) == 1 and all(adapter is present[0] for adapter in rows):
            return route.rows(None)
        index = {id(adapter): i for i, adapter in enumerate(route.adapters)}
        return route.rows(torch.tensor([-1 if adapter is None else index[id(adapter)] for adapter in rows]))

    def _route_of(self, adapters: Sequence[FrozenAdapter]) -> SampleRoute:
        key = tuple(sorted(id(adapter) for adapter in adapters))
        route = self._routes.get(key)
        if route is None:
            if len(self._routes) > 32:
                self._routes.clear()
            route = self._routes[key] = SampleRoute(self._host, sorted(adapters, key=id))
        return route
