"""One vLLM server over HTTP: what it is asked, and what its answers mean. All calls come from one event
loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping
from typing import Any

import httpx

from megatron_sd.errors import RolloutError
from megatron_sd.records import TokenIds
from megatron_sd.rollout.vllm.request import ReplicaLost

logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request

_log = logging.getLogger(__name__)

POLL_S = 1.0
UNTRAINED = "default"  # vLLM's name for the weights it was started with
UPDATING = "updating"
GENERATE = "/inference/v1/generate"  # token ids in, token ids out
CONNECT_TIMEOUT_S = 20.0
KEEPALIVE_S = 2.0  # vLLM closes idle connections after 5


class Replica:
    """A vLLM server. version: the weights it serves, by vLLM's label. failure: why it is left alone until
    the next publish."""

    def __init__(self, url: str, *, timeout_s: float):
        self.url = url.rstrip("/")
        self.version = UNTRAINED
        self.failure: str | None = None
        self._timeout_s = timeout_s
        self._sampling = self._client(num_kept=256)
        # rare calls, some after an error, with which vLLM closes the connection
        self._control = self._client(num_kept=0)

    def _client(self, *, num_kept: int) -> httpx.AsyncClient:
        limits = httpx.Limits(
            max_connections=None, max_keepalive_connections=num_kept, keepalive_expiry=KEEPALIVE_S
        )
        timeout = httpx.Timeout(self._timeout_s, connect=CONNECT_TIMEOUT_S)
        return httpx.AsyncClient(base_url=self.url, trust_env=False, limits=limits, timeout=timeout)

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON answer; raises as `post` does."""
        return await self._answer(path, self._control.get(path))

    async def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON answer. Raises ReplicaLost without one or for an error of the server, RolloutError for a
        refused request."""
        return await self._answer(path, self._control.post(path, json=body))

    async def _answer(self, path: str, request: Awaitable[httpx.Response]) -> dict[str, Any]:
        try:
            answer = await request
        except httpx.TimeoutException as error:
            raise ReplicaLost(f"{self.url} did not answer {path} within {self._timeout_s:g} s") from error
        except httpx.HTTPError as error:
            raise ReplicaLost(
                f"{self.url} broke the connection of {path} ({type(error).__name__}: {error})"
            ) from error
        if answer.status_code >= 500:
            raise ReplicaLost(f"{self.url} answered {path} with {answer.status_code}: {_message(answer)}")
        if answer.status_code >= 400:
            raise RolloutError(f"{self.url} refused {path} ({answer.status_code}): {_message(answer)}")
        return answer.json() if answer.content else {}

    async def close(self) -> None:
        """Close the connections."""
        await self._sampling.aclose()
        await self._control.aclose()

    # ---- what it serves ----

    async def wait_until_there(self, timeout_s: float) -> None:
        """A server elsewhere may still be loading. Raises RolloutError when it does not answer in time."""
        deadline, is_told = time.monotonic() + timeout_s, False
        while True:
            try:
                await self.get("/health")
                return
            except ReplicaLost as error:
                if time.monotonic() > deadline:
                    raise RolloutError(
                        f"{error}, nor within {timeout_s:g} s (rollout.vllm.start_timeout_s): is it started,"
                        " and is the address right?"
                    ) from error
                if not is_told:
                    _log.warning("waiting for the vLLM server at %s: %s", self.url, error)
                is_told = True
                await asyncio.sleep(POLL_S)

    async def learn(self) -> int:
        """Note the version it serves; returns the tokens a sequence may have."""
        self.version = (await self.get("/weight_info"))["weight_version"]
        model, *_ = (await self.get("/v1/models"))["data"]
        return model["max_model_len"]

    async def generate(self, prompt_ids: TokenIds, sampling: Mapping[str, Any]) -> Mapping[str, Any]:
        """vLLM's choice for one request: token_ids, logprobs, finish_reason, stop_reason, weight_versions."""
        body = {"token_ids": list(prompt_ids), "sampling_params": sampling}
        answer = await self._answer(GENERATE, self._sampling.post(GENERATE, json=body))
        return answer["choices"][0]

    # ---- weights ----

    async def introduce(self, policy: Mapping[str, Any]) -> None:
        """Compare the trainer's model with the one it serves. Raises RolloutError when they differ."""
        await self.post("/init_weight_transfer_engine", {"init_info": {"policy": policy}})

    async def begin_update(self) -> None:
        """Stop serving, forget every cache, and expect weights. An update that nobody finished is
        abandoned."""
        await self.post("/pause?mode=abort")
        await self.post("/update_weight_version", {"new_version": UPDATING})
        self.version = UPDATING
        try:
            await self.post("/start_weight_update")
        except ReplicaLost:
            await self.abandon()
            await self.post("/start_weight_update")

    async def update(self, **update_info: Any) -> None:
        """Make every worker of the server take a bucket, or its shards."""
        await self.post("/update_weights", {"update_info": update_info})

    async def abandon(self) -> None:
        """End an update without a new version: the workers answer with an error, which is the way to
        end one."""
        try:
            await self.update(abandon=True)
        except ReplicaLost:
            return

    async def finish_update(self, version: str) -> None:
        """Serve again, under the new version, with empty caches."""
        await self.post("/finish_weight_update", {"weight_version": version})
        await self.serve_again(version)

    async def serve_again(self, version: str) -> None:
        """Resume under a version whose weights are whole."""
        await self.post("/update_weight_version", {"new_version": version})
        await self.post("/reset_prefix_cache")
        await self.post("/resume")
        self.version = version
        await self._sampling.aclose()
        # whatever happened before, no connection of then is used again
        self._sampling = self._client(num_kept=256)


def _message(answer: httpx.Response) -> str:
    """The server's own words, on one line."""
    try:
        found = answer.json()
        found = found.get("error", found)
        text = found.get("message", found) if isinstance(found, dict) else found
    except ValueError:
        text = answer.text
    return " ".join(str(text).split())[:600]
