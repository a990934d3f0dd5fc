"""The retrieval service over HTTP: a corpus behind Search-R1's `/retrieve`, for as many ranks as ask.

    POST /retrieve   see wire.py        GET /healthz   the process lives
    GET  /info       corpus and limits  GET /readyz    200 when it can search, else 503 and what it is doing
    GET  /metrics    Prometheus text

The port is open while the corpus is still being verified. A request over a limit gets a 4xx, one that finds
the queue full a 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request, Response

from megatron_sd.durable.files import write_whole
from megatron_sd.errors import ConfigError
from megatron_sd.retrieval.service.state import RetrievalService
from megatron_sd.retrieval.service.wire import RequestError, parse_order

_RETRY_AFTER_S = "1"


class Routes:
    """What each path answers. Probes (healthz, readyz) carry no token."""

    def __init__(self, service: RetrievalService) -> None:
        token = service.settings.token
        self._service = service
        self._token = None if token is None else token.encode()

    async def retrieve(self, request: Request) -> Response:
        """POST /retrieve."""
        started = time.perf_counter()
        status, num_queries = 500, 0
        try:
            self._check_token(request)
            body = await _read_body(request, self._service.settings.max_body_bytes)
            order = parse_order(body, self._service.request_limits)
            num_queries = len(order.queries)
            content, headers = await self._service.answer(order)
            status = 200
            return _json(content, headers=headers)
        except RequestError as error:
            status = error.status
            raise
        finally:
            self._service.metrics.record(
                status=status, num_queries=num_queries, seconds=time.perf_counter() - started
            )

    async def healthz(self) -> Response:
        """GET /healthz."""
        return _json(b'{"alive":true}')

    async def readyz(self) -> Response:
        """GET /readyz."""
        is_ready = self._service.queue is not None
        content = json.dumps({"ready": is_ready, "stage": self._service.stage}).encode()
        return _json(content, status=200 if is_ready else 503)

    async def info(self, request: Request) -> Response:
        """GET /info."""
        self._check_token(request)
        return _json(json.dumps(self._service.info()).encode())

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        self._check_token(request)
        queue = self._service.queue
        gauges = {"ready": float(queue is not None)}
        if queue is not None:
            gauges |= {"queued_queries": queue.num_queued, "search_batches": queue.num_batches}
        return Response(self._service.metrics.render(gauges), media_type="text/plain; version=0.0.4")

    def _check_token(self, request: Request) -> None:
        """By header, or in the address for clients that can set nothing else."""
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        given = value if scheme == "Bearer" else request.query_params.get("token", "")
        if self._token is not None and not hmac.compare_digest(given.encode(), self._token):
            message = (
                "the header 'Authorization: Bearer TOKEN', or ?token=TOKEN in the address, is missing or"
                " wrong"
            )
            raise RequestError(401, message)


def build_app(service: RetrievalService, stop: Callable[[], None]) -> FastAPI:
    """The application. stop: ends the server when the corpus cannot be opened."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(service.run(stop))
        yield
        task.cancel()

    app = FastAPI(
        title="megatron_sd retriever", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.add_exception_handler(RequestError, _refuse)
    routes = Routes(service)
    app.add_route("/retrieve", routes.retrieve, methods=["POST"])
    for route in (routes.healthz, routes.readyz, routes.info, routes.metrics):
        app.add_api_route(f"/{route.__name__}", route, methods=["GET"])
    return app


async def _refuse(_request: Request, error: RequestError) -> Response:
    headers = {"retry-after": _RETRY_AFTER_S} if error.status == 503 else {}
    return _json(json.dumps({"error": str(error)}).encode(), status=error.status, headers=headers)


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """The body, refused as soon as it is known to be too long."""
    message = f"the body is longer than {max_bytes} bytes; send several requests"
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise RequestError(413, message)
    body = bytearray()
    async for block in request.stream():
        body += block
        if len(body) > max_bytes:
            raise RequestError(413, message)
    return bytes(body)


def _json(content: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(content, status_code=status, media_type="application/json", headers=headers)


def serve(service: RetrievalService, port_file: Path | None, say: Callable[[str], None]) -> None:
    """Listen until SIGINT or SIGTERM. port_file: gets the address, for a port of 0. Raises ConfigError for
    a port in use, and what opening the corpus raised."""
    settings = service.settings
    listener = _listen(settings.host, settings.port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    server: uvicorn.Server

    def stop() -> None:
        server.should_exit = True

    server = uvicorn.Server(
        uvicorn.Config(
            build_app(service, stop),
            log_level="warning",
            access_log=False,
            timeout_keep_alive=settings.idle_timeout_s,
            limit_concurrency=settings.max_connections,
        )
    )
    if port_file is not None:
        port_file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(port_file, f"{address}\n")
    say(f"listening on {address}")
    server.run(sockets=[listener])
    if service.failure is not None:
        raise service.failure


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"port: cannot listen on {host}:{port} ({error}); choose another, or 0 for any free one"
        ) from error
    return listener
