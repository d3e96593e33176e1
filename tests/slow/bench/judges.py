"""How many responses a second each environment judges, in this process and in one of the pool.

    python tests/slow/bench/judges.py

One response after the other, so the second figure is that of one core; as many cores judge as there are workers.
`code.py` is not among them: its programs have a sandbox each (`sandbox.py` here).
"""

from __future__ import annotations

import importlib
import json
import time

from sdpo_plugin.environments.judge_pool import Pool

JUDGED = {  # (response, label)
    "choice": ("Both have mass, so the answer is (B).", "B"),
    "maths": ("so it is $\\boxed{\\frac{1}{2}}$", "0.5"),
    "structure": ('{"city": "Oslo", "days": 2}', json.dumps({"type": "object", "required": ["city"]})),
    "tools": ("[weather(city='Oslo', days=2)]", json.dumps([{"weather": {"city": ["Oslo"], "days": [2]}}])),
    "reasoning": ("<answer>5</answer>", json.dumps({"name": "chain_sum", "parameters": {}, "entry": {"answer": "5"}})),
}


def rate(judge, response: str, label: str) -> float:
    """Judgements a second, the best of three rounds of half a second."""
    assert judge(response, label)[0] == 1.0
    best = 0.0
    for _ in range(3):
        count, began = 0, time.perf_counter()
        while (taken := time.perf_counter() - began) < 0.5:
            judge(response, label)
            count += 1
        best = max(best, count / taken)
    return best


pool = Pool(1)
for name, (response, label) in JUDGED.items():
    try:
        here = importlib.import_module(f"sdpo_plugin.environments.{name}").make().judge
        began = time.perf_counter()
        pool.judge(name, {}, response, label)
        started = time.perf_counter() - began
        there = rate(lambda text, right, name=name: pool.judge(name, {}, text, right), response, label)
        alone = rate(here, response, label)
        print(f"{name:10} {alone:8.0f} here, {there:6.0f} in the pool; the first after {started:.2f} s", flush=True)
    except ImportError as error:
        print(f"{name:10} {error}")
