"""Running vLLM servers that score for the teacher (`--teacher.url`), over their OpenAI-compatible interface."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import torch

from sdpo_plugin.config import ConfigError, RewardConfig, from_namespace
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


class TeacherServers:
    """`interface.rollout_batch.TeacherEngines` of servers that take requests in turns.

    A request that fails goes to the next server, `--reward.max_attempts` times, with `--reward.timeout` for each.
    """

    def __init__(self, urls: Sequence[str], args: Any) -> None:
        """Raises TeacherError where a server does not answer."""
        self.config: RewardConfig = from_namespace(RewardConfig, args)
        self.servers = asyncio.run(self._found(urls))
        self.max_tokens = min(server.max_model_len for server in self.servers) - 1

    def score(self, requests: Sequence[ToScore], topk: int) -> list[Scores]:
        """The scores of each request. Raises TeacherError after the last attempt."""
        return asyncio.run(self._scores(requests, topk))

    def decoded(self, ids: Sequence[int], topk: int) -> list[str | None]:
        """The server's texts of tokens, which it returns with their scores."""
        (answer,) = asyncio.run(self._answers([ToScore(ids, 1)], topk))
        return [(at.get(str(token)) or {}).get("decoded_token") for token, at in zip(ids[1:], answer[1:], strict=True)]

    async def _found(self, urls: Sequence[str]) -> list[Server]:
        async with aiohttp.ClientSession() as session:
            return [await self._attempts([url], lambda at: _model(session, at)) for url in urls]

    async def _scores(self, requests: Sequence[ToScore], topk: int) -> list[Scores]:
        answers = await self._answers(requests, topk)
        return [scores_of(request, answer, topk) for request, answer in zip(requests, answers, strict=True)]

    async def _answers(self, requests: Sequence[ToScore], topk: int) -> list[list[Any]]:
        """`prompt_logprobs` for each request."""
        limit = asyncio.Semaphore(AT_ONCE * len(self.servers))
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

            async def ask(number: int, request: ToScore) -> list[Any]:
                first = number % len(self.servers)
                order = [*self.servers[first:], *self.servers[:first]]
                async with limit:
                    return await self._attempts(order, lambda server: _prompt_logprobs(session, server, request, topk))

            return await asyncio.gather(*(ask(*numbered) for numbered in enumerate(requests)))

    async def _attempts(self, targets: Sequence[Any], call: Any) -> Any:
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
    for url in args.teacher.url.split(","):
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
