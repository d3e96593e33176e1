"""Running vLLM servers that score for the teacher (`--teacher.url`), over their OpenAI-compatible interface."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import itertools
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import torch

from sdpo_plugin.config import ConfigError, RewardConfig, TeacherConfig, from_namespace, is_server
from sdpo_plugin.distillation.loss import LOG_ZERO
from sdpo_plugin.distillation.prompts import PROBE, text_tokenizer
from sdpo_plugin.interface.rollout_batch import Scores, ToScore
from sdpo_plugin.openrlhf_adapter.engine.calls import described, tried, within
from sdpo_plugin.openrlhf_adapter.failures import TeacherError

AT_ONCE = 64  # requests to a server
CHECKED_TOKENS = 200  # of the vocabulary, evenly spread


class Rejected(ValueError):
    """A server's answer is not what was asked for."""


@dataclass(frozen=True)
class Server:
    """A server, the name of its model, and the longest sequence that it takes, in tokens."""

    url: str
    model: str
    max_model_len: int


class Requests:
    """Requests that may be sent ahead: the answer to one is found by its tokens, whoever has sent it.

    Attributes:
        max_tokens: of a request.
        begun: what `_send` returned, by request, until the next `score` has ended.
    """

    max_tokens: int

    def __init__(self) -> None:
        self.begun: dict[bytes, Any] = {}

    def begin(self, requests: Sequence[ToScore], topk: int) -> None:
        for request in requests:
            if (key := _key(request)) not in self.begun:
                self.begun[key] = self._send(request, topk)

    def score(self, requests: Sequence[ToScore], topk: int) -> list[Scores]:
        self.begin(requests, topk)
        try:
            return self._received([self.begun[_key(request)] for request in requests])
        finally:
            self.begun = {}  # the teacher's weights may change before the next rollout

    def _send(self, request: ToScore, topk: int) -> Any:
        raise NotImplementedError

    def _received(self, sent: Sequence[Any]) -> list[Scores]:
        raise NotImplementedError


def _key(request: ToScore) -> bytes:
    digest = hashlib.blake2b(np.array(request.ids, dtype=np.int64).tobytes(), digest_size=16)
    return digest.digest() + request.start.to_bytes(8, "big")


class TeacherServers(Requests):
    """`interface.rollout_batch.TeacherEngines` of servers that take requests in turns.

    A request that fails goes to the next server, `--reward.max_attempts` times, with `--reward.timeout` for each.
    """

    def __init__(self, urls: Sequence[str], args: Any) -> None:
        """Raises TeacherError where a server does not answer."""
        super().__init__()
        self.config: RewardConfig = from_namespace(RewardConfig, args)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.limit = asyncio.Semaphore(AT_ONCE * len(urls))
        self.numbers = itertools.count()
        self.session, self.servers = self._run(self._found(urls)).result()
        self.max_tokens = min(server.max_model_len for server in self.servers) - 1

    def _run(self, call: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(call, self.loop)

    def _send(self, request: ToScore, topk: int) -> concurrent.futures.Future[Any]:
        return self._run(self._scores(request, topk))

    def _received(self, sent: Sequence[concurrent.futures.Future[Any]]) -> list[Scores]:
        """Raises TeacherError after a request's last attempt."""
        return [future.result() for future in sent]

    def decoded(self, ids: Sequence[int], topk: int) -> list[str | None]:
        """The server's texts of tokens but the first, which it returns with their scores."""
        answer = self._run(self._answer(ToScore(ids, 1), topk)).result()
        return [answer[at][str(token)].get("decoded_token") for at, token in enumerate(ids) if at]

    async def _found(self, urls: Sequence[str]) -> tuple[aiohttp.ClientSession, list[Server]]:
        session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        return session, [await self._attempts([url], lambda at: _model(session, at)) for url in urls]

    async def _scores(self, request: ToScore, topk: int) -> Scores:
        return scores_of(request, await self._answer(request, topk), topk)

    async def _answer(self, request: ToScore, topk: int) -> list[Any]:
        """`prompt_logprobs`."""
        first = next(self.numbers) % len(self.servers)
        order = [*self.servers[first:], *self.servers[:first]]
        async with self.limit:
            return await self._attempts(order, lambda at: _prompt_logprobs(self.session, at, request, topk))

    async def _attempts(self, targets: Sequence[Any], call: Callable[[Any], Awaitable[Any]]) -> Any:
        failure = ""
        async for attempt in tried(self.config):
            target = targets[attempt % len(targets)]
            try:
                return await within(self.config.timeout, call(target))
            except Exception as error:
                failure = f"--teacher.url {getattr(target, 'url', target)}: {described(error).splitlines()[0]}"
        attempts = f"{self.config.max_attempts} attempts (--reward.max_attempts)"
        raise TeacherError(f"{failure}; the teacher's server gave no scores in {attempts}")


async def _model(session: aiohttp.ClientSession, url: str) -> Server:
    async with session.get(f"{url.rstrip('/')}/v1/models") as response:
        response.raise_for_status()
        found = await response.json()
    try:
        return Server(url.rstrip("/"), str(found["data"][0]["id"]), int(found["data"][0]["max_model_len"]))
    except (LookupError, TypeError, ValueError) as error:
        raise Rejected(f"its /v1/models names no model of a vLLM server: {found!r:.200}") from error


async def _prompt_logprobs(session: aiohttp.ClientSession, server: Server, request: ToScore, topk: int) -> list[Any]:
    asked = {
        "model": server.model, "prompt": list(request.ids), "max_tokens": 1, "temperature": 0.0,
        "prompt_logprobs": topk,
    }  # fmt: skip
    async with session.post(f"{server.url}/v1/completions", json=asked) as response:
        if response.status != 200:
            raise Rejected(f"status {response.status}: {(await response.text())[:500]}")
        found = await response.json()
    try:
        answer = found["choices"][0]["prompt_logprobs"]
    except (LookupError, TypeError) as error:
        raise Rejected(f"its answer has no prompt_logprobs: {found!r:.200}") from error
    if not isinstance(answer, list) or len(answer) != len(request.ids):
        raise Rejected(f"prompt_logprobs of {len(request.ids)} tokens are {answer!r:.200}")
    each = zip(request.ids[1:], answer[1:], strict=True)
    if not all(isinstance(at, dict) and str(token) in at for token, at in each):
        raise Rejected("prompt_logprobs lacks one of the tokens that were sent")
    return answer


def scores_of(request: ToScore, answer: Sequence[Any], topk: int) -> Scores:
    """An answer's entries, `{token id: {"logprob": ...}}` for each position, as tensors."""
    n = len(request.ids) - request.start
    found = Scores(torch.zeros(n), torch.zeros(n, topk, dtype=torch.int32), torch.full((n, topk), LOG_ZERO))
    for row, position in enumerate(range(request.start, len(request.ids))):
        known = {int(token): float(entry["logprob"]) for token, entry in answer[position].items()}
        likeliest = sorted(known.items(), key=lambda entry: -entry[1])[:topk]
        found.sampled[row] = known[request.ids[position]]
        found.ids[row, : len(likeliest)] = torch.tensor([token for token, _ in likeliest], dtype=torch.int32)
        found.log_probs[row, : len(likeliest)] = torch.tensor([log_prob for _, log_prob in likeliest])
    return found


def check(args: Any, tokenizer: Any, topk: int) -> None:
    """Before a run: the servers answer, return as many tokens as the loss needs, and have the student's vocabulary.

    Raises:
        ConfigError: one does not.
    """
    tokenizer = text_tokenizer(tokenizer)
    spread = range(0, len(tokenizer), max(len(tokenizer) // CHECKED_TOKENS, 1))
    ids = [*tokenizer(PROBE, add_special_tokens=False)["input_ids"], *spread]
    config: TeacherConfig = from_namespace(TeacherConfig, args)
    sources = [source for source in config.sources("").values() if is_server(source)]
    for url in ",".join(sources).split(",") if sources else ():
        try:
            theirs = TeacherServers([url], args).decoded(ids, topk)
        except TeacherError as error:
            raise ConfigError(
                f"{error}; start it with vllm serve MODEL --max-logprobs {topk}, or correct the address"
            ) from error
        for token, text in zip(ids[1:], theirs, strict=True):
            own = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if text is not None and "\ufffd" not in text + own and text.strip() != own.strip():
                raise ConfigError(
                    f"--teacher.url {url}: token {token} is {text!r} there and {own!r} in the student's tokenizer, so "
                    "this teacher cannot score the student's tokens; give a model of the same family"
                )
