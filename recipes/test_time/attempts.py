"""How many attempts runs needed until their first success, from the rewards they logged.

    python recipes/test_time/attempts.py 16 runs/test_time/sdpo/tensorboard runs/test_time/sampling/tensorboard

prints a line a run. 16 is the number of attempts a step: `--rollout.n_samples_per_prompt`.
"""

from __future__ import annotations

import sys

from sdpo_plugin import report


def attempts(directory: str, per_step: int) -> str:
    """Attempts up to and with the first step that had a success, or all if none had."""
    rewards = [reward for _, reward in report.read_scalars(directory)["train/reward"]]
    solved = next((step for step, reward in enumerate(rewards, 1) if reward > 0), None)
    made = (solved or len(rewards)) * per_step
    return f"solved within {made} attempts" if solved else f"not solved in {made} attempts"


if __name__ == "__main__":
    for directory in sys.argv[2:]:
        print(f"{directory}: {attempts(directory, int(sys.argv[1]))}")
