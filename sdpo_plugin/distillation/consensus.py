"""Label-free self-distillation (U-OPSD, arXiv 2608.06296): the answer that most siblings agree on stands for the label.

Read: two sets of notes of the paper; no code of its authors was found. Of a prompt's G responses the final answers are
compared. The most frequent one is taken for right if a fraction of at least tau = 0.5 of the G responses has it; else
the prompt is left out. The teacher is shown the shortest of the responses that agree; the student learns on the
longest of those that have another answer (their best of several choices: with all of them the result was in part worse
than no training). A response without an answer, truncated ones among them, is evidence for neither: it counts in G, is
not shown and not taught.

`--reprompt.demonstration consensus` makes this choice, for `--algo sdpo` and what builds on its contexts. Published
besides: forward KL over the whole vocabulary, clipped, the initial weights teach, G = 8, LoRA of rank 64, learning rate
5e-6, temperature 1.1; `--distill.alpha 0 --distill.mode full --distill.kl_clip 0.05 --teacher.kind base` come close.
An EMA teacher was 2.4 to 4.1 points better, the reverse KL broke training, the Jensen-Shannon divergence did nothing.

Interpretation: two answers that are equally frequent are no consensus (the paper draws one of them; above one half
there are none). Answers are compared as texts, after the hook `openrlhf_answer` has made them comparable. Length is
counted in characters. No reward is used: without a reward function OpenRLHF gets zeros.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdpo_plugin.config import RepromptConfig
    from sdpo_plugin.distillation.context import Rollout

CONSENSUS = "consensus"  # of --reprompt.demonstration


def agreeing(rollouts: Sequence[Rollout], config: RepromptConfig) -> defaultdict[Hashable, list[int]]:
    """For each group with a consensus, the indices of the rollouts that have its answer, the shortest first."""
    found: defaultdict[Hashable, list[int]] = defaultdict(list)
    for group, members in _groups(rollouts).items():
        votes = Counter(rollouts[i].answer for i in members if rollouts[i].answer).most_common(2)
        if not votes or (len(votes) == 2 and votes[0][1] == votes[1][1]):
            continue
        answer, count = votes[0]
        if count >= config.consensus_threshold * len(members):
            same = [i for i in members if rollouts[i].answer == answer]
            found[group] = sorted(same, key=lambda i: len(rollouts[i].response or ""))
    return found


def disagreeing(rollouts: Sequence[Rollout], config: RepromptConfig) -> set[int]:
    """The indices of the rollouts to teach: of each group with a consensus, the longest with another answer."""
    right = agreeing(rollouts, config)
    found: set[int] = set()
    for group, members in _groups(rollouts).items():
        if group in right:
            others = [i for i in members if rollouts[i].answer and i not in right[group]]
            others.sort(key=lambda i: -len(rollouts[i].response or ""))
            found.update(others[: config.consensus_targets])
    return found


def consensus_metrics(rollouts: Sequence[Rollout], config: RepromptConfig) -> dict[str, float]:
    """What is known of the votes: responses with an answer, and the fraction that has the most frequent one."""
    groups = _groups(rollouts).values()
    votes = [Counter(rollouts[i].answer for i in members if rollouts[i].answer) for members in groups]
    most = [max(counts.values(), default=0) / len(members) for counts, members in zip(votes, groups, strict=True)]
    return {
        "self_distillation/answer_fraction": sum(map(Counter.total, votes)) / max(len(rollouts), 1),
        "self_distillation/agreement_fraction": sum(most) / max(len(most), 1),
    }


def _groups(rollouts: Sequence[Rollout]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        groups.setdefault(rollout.group, []).append(i)
    return groups
