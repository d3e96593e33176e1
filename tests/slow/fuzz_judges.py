"""Every environment that judges in the pool, on odd responses: none raises, none gets a reward, none takes long.

    python tests/slow/fuzz_judges.py [EXAMPLES]

tries those of `tests/hostile.py`, and EXAMPLES (default 500) that hypothesis makes of their pieces and of any text.
"""

from __future__ import annotations

import json
import sys
import time

sys.path.insert(0, "tests")

from hostile import HOSTILE, NEVER_END, PIECES  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from sdpo_plugin.environments.judge_pool import Pool  # noqa: E402

EXAMPLES = int(sys.argv[1]) if len(sys.argv) > 1 else 500
LABELS = {
    "choice": "AC",
    "maths": "\\frac{\\pi}{7}",
    "structure": json.dumps({"schema": {"type": "object", "required": ["city"]}, "value": {"city": "Oslo", "days": 2}}),
    "tools": json.dumps([{"weather": {"city": ["Oslo"], "days": [2]}}]),
    "reasoning": json.dumps({"name": "countdown", "parameters": {}, "entry": {"answer": "1 + 2", "metadata": {
        "numbers": [1, 2], "target": 3}}}),
}  # fmt: skip
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
    st.tuples(st.sampled_from(PIECES), st.integers(1, 3_000)).map(lambda pair: pair[0] * pair[1]),
    st.text(max_size=300),
    st.lists(st.sampled_from(PIECES), max_size=20).map(lambda parts: f"\\boxed{{{''.join(parts)}}}"),
)



def fuzz(name: str, label: str) -> str:
    pool, seconds, rewarded = Pool(1), [], []

    def ask(response: str) -> None:
        began = time.perf_counter()
        reward, told = pool.judge(name, {}, response, label)
        seconds.append(time.perf_counter() - began)
        if reward > 0.05 or not told:  # reasoning-gym gives 0.01 to 0.05 for any answer to some tasks
            rewarded.append((response[:80], reward, told))

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(TEXTS)
    def check(response: str) -> None:
        ask(response)

    try:
        pool.judge(name, {}, "", label)
    except RuntimeError as error:
        return str(error)
    for response in HOSTILE + NEVER_END:
        ask(response)
    check()
    return f"{len(seconds)} responses, the longest {max(seconds):.2f} s; rewarded: {rewarded}"


for name, label in LABELS.items():
    print(f"{name:10} {fuzz(name, label)}", flush=True)
