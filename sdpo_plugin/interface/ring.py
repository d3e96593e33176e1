"""Where the tokens of a micro-batch are: on this rank, or, with ring attention, in slices on the ranks of a ring.

B samples, S tokens of a sequence; N response tokens of the micro-batch, n of them on this rank.
"""

from __future__ import annotations

import torch


class OneRank:
    """Without ring attention: this rank has all tokens of its micro-batches, and n is N.

    Attributes:
        size: the number of ranks that a micro-batch is spread over.
    """

    size = 1

    def local(self, rows: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Those of `rows` whose hidden states are on this rank: bool [B, S], as are both arguments.

        Args:
            attended: all tokens of the forward pass.
        """
        return rows

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Of a tensor on each rank of the ring, without a gradient. Collective."""
        return values

    def gather(self, values: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """[N, ...] from each rank's [n, ...], without a gradient. Collective.

        Args:
            local: bool [N], the n of them that are on this rank.
        """
        return values
