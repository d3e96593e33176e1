"""How many short programs a second the code environment judges.

    python tests/slow/bench/sandbox.py [WORKERS ...]

A program reads a number and prints its double, and has three tests; each has its own sandbox. Workers are threads, as
OpenRLHF calls reward functions; without arguments there are as many as cores. Prints the best of three rounds of each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from sdpo_plugin.environments import code

PROGRAMS = 100
LABEL = json.dumps([{"input": f"{i}\n", "output": f"{2 * i}\n"} for i in (1, 2, 30)])
RESPONSES = {
    "plain": "```python\nprint(2 * int(input()))\n```",
    "with typing": "```python\nseen: Dict[int, List[int]] = defaultdict(list)\nprint(2 * int(input()))\n```",
    "that raises": "```python\nprint(1 // (int(input()) - 1))\n```",
}


def rate(response: str, workers: int) -> float:
    began = time.monotonic()
    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(lambda _: code.judge(response, LABEL), range(PROGRAMS)))
    return PROGRAMS / (time.monotonic() - began)


for workers in [int(n) for n in sys.argv[1:]] or [os.cpu_count()]:
    for name, response in RESPONSES.items():
        best = max(rate(response, workers) for _ in range(3))
        print(f"{best:5.1f} programs a second ({name}), {workers} workers on {os.cpu_count()} cores", flush=True)
