"""Buckets of whole parameters, offered to vLLM's workers over HTTP. They fetch, so a dead worker never
blocks the trainer."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

ALIGNMENT_BYTES = 64


class BucketServer:
    """Offers one bucket at a time under a secret address. host: the name under which the workers reach this
    process."""

    def __init__(self, host: str, *, timeout_s: float):
        self._secret = secrets.token_urlsafe(16)
        self._timeout_s = timeout_s
        self._bytes = memoryview(b"")
        self._server = ThreadingHTTPServer(("127.0.0.1" if host == "127.0.0.1" else "", 0), self._answering())
        self._url = f"http://{host}:{self._server.server_port}/{self._secret}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def offer(self, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Any]:
        """Copy the parameters into host memory; returns what a worker needs to fetch them
        (weight_worker.fetch_bucket)."""
        weights = list(weights)
        offsets, num_bytes = [], 0
        for _, tensor in weights:
            offsets.append(num_bytes)
            num_bytes += -(-tensor.numel() * tensor.element_size() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        for (_, tensor), offset in zip(weights, offsets):
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            buffer[offset : offset + flat.numel()].copy_(flat)
        self._bytes = memoryview(buffer.numpy())
        parameters = [
            (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset)
            for (name, tensor), offset in zip(weights, offsets)
        ]
        return {
            "url": self._url,
            "num_bytes": num_bytes,
            "timeout_s": self._timeout_s,
            "parameters": parameters,
        }

    def withdraw(self) -> None:
        """Free the bucket's memory."""
        self._bytes = memoryview(b"")

    def close(self) -> None:
        """Stop listening."""
        self.withdraw()
        self._server.shutdown()
        self._server.server_close()

    def _answering(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # noqa: N802, the name http.server calls
                offered = outer._bytes
                self.send_response(200 if self.path == f"/{outer._secret}" else 404)
                self.send_header("Content-Length", str(len(offered)))
                self.end_headers()
                if self.path == f"/{outer._secret}":
                    self.wfile.write(offered)

            def log_message(self, *_: object) -> None:
                """One line a bucket would say nothing."""

        return Answer
