"""Orders for the storeroom: `python recipes/multi_turn/orders.py NUMBER > DATA.jsonl`."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from typing import Any

ITEMS = ("tea", "salt", "rope", "soap", "nails", "paper", "candles", "wire")
SHELVES = "ABCDEFGH"
ASKED = (
    "You fetch orders from a storeroom by commands, one a turn and nothing else. The storeroom answers. The order: {}. "
    "What is your command?"
)


def rows(number: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The chat under `prompt`, order and shelves as JSON under `label`."""
    rng = random.Random(seed)
    for _ in range(number):
        shelves = dict(zip(rng.sample(ITEMS, 4), rng.sample(SHELVES, 4), strict=True))
        order = {item: rng.randint(1, 9) for item in rng.sample(sorted(shelves), 2)}
        asked = ASKED.format(", ".join(f"{pieces} {item}" for item, pieces in order.items()))
        yield {
            "prompt": [{"role": "user", "content": asked}],
            "label": json.dumps({"order": order, "shelves": shelves}),
        }


if __name__ == "__main__":
    for row in rows(int(sys.argv[1])):
        print(json.dumps(row))
