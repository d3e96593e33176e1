"""A storeroom that obeys commands, one a turn, until an order is complete: an agent for `--train.agent_func_path`.

    find ITEM       the shelf it is on
    take N SHELF    takes so many of what is there
    close           the order is complete

Nobody tells the student these commands, and to a wrong one the storeroom answers "Error." alone. What was wrong with it
is feedback on that turn, and what the order still lacked is feedback on the trajectory.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

TURNS = 8
COMMANDS = "The commands are find ITEM, take N SHELF and close."
ERROR = "Error."


class Storeroom:
    """An order (pieces by item) and where items are (shelf by item)."""

    def __init__(self, order: dict[str, int], shelves: dict[str, str]) -> None:
        self.order, self.shelves = Counter(order), shelves
        self.taken: Counter[str] = Counter()
        self.closed = False

    def call(self, line: str) -> tuple[str, str | None]:
        """Its answer to a command, and what was wrong with that."""
        match line.split():
            case ["find", item]:
                if item in self.shelves:
                    return f"Shelf {self.shelves[item]}.", None
                return ERROR, f"There is no {item} here, only {', '.join(self.shelves)}."
            case ["take", number, shelf] if number.isdecimal():
                item = next((item for item, place in self.shelves.items() if place == shelf), None)
                if item is None:
                    return ERROR, f"There is no shelf {shelf}. Ask for an item's shelf with find ITEM."
                wanted = (self.order - self.taken)[item]
                self.taken[item] += int(number)
                return "Taken.", None if int(number) == wanted else f"Of {item}, which is there, {wanted} were wanted."
            case ["close"]:
                self.closed = True
                return "Closed.", self.lacking()
        return ERROR, f"That is no command. {COMMANDS}"

    def lacking(self) -> str | None:
        missing = self.order - self.taken
        return f"Still to be taken: {', '.join(f'{n} {item}' for item, n in missing.items())}." if missing else None


class Agent(AgentInstanceBase):
    """One trajectory: 1 for an order that was closed with all of its pieces and no other."""

    between = "{}"  # of two commands in the chat, with the answer for {}

    def __init__(self) -> None:
        self.turns = 0

    async def reset(self, states: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        self.room = Storeroom(**json.loads(states["label"]))
        return states

    async def step(self, states: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        self.turns += 1
        answer, mistake = self.room.call(states["action_text"].strip())
        done = self.room.closed or self.turns == TURNS
        return {
            "rewards": torch.tensor(float(self.room.closed and self.room.taken == self.room.order)),
            "environment_feedback": "" if done else self.between.replace("{}", answer),
            "done": done,
            "extra_logs": {"turn_feedback": mistake, "feedback": self.room.lacking() if done else None},
        }


class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self) -> None:
        super().__init__(Agent)

    async def execute(self, hf_tokenizer: Any, **given: Any) -> dict[str, Any]:
        Agent.between = between(hf_tokenizer)
        return await super().execute(hf_tokenizer=hf_tokenizer, **given)


def between(tokenizer: Any) -> str:
    """What the chat template puts behind an answer of the assistant, up to the next one; {} is the user's turn."""
    contents = [("user", "?"), ("assistant", "COMMAND"), ("user", "{}")]
    chat = [{"role": role, "content": content} for role, content in contents]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return text.split("COMMAND")[1].removeprefix(tokenizer.eos_token)  # which the student has written itself
