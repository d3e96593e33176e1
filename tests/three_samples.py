"""Three samples for units: a micro-batch with the teacher's prompts, on a fake worker."""

import torch

# Prompts of 2, 3 and 1 tokens; the second sample is an agent's: two actions, an observation (9, 9), one action.
SEQUENCES = torch.tensor([[1, 2, 11, 12, 13, 0, 0, 0], [3, 4, 5, 21, 22, 9, 9, 23], [6, 0, 1, 0, 0, 0, 0, 0]])
ATTENTION = torch.tensor([[1] * 5 + [0] * 3, [1] * 8, [1] * 3 + [0] * 5])
ACTION = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0]])
PROMPTS = [torch.tensor([7, 7, 7, 7, 2]), torch.tensor([8, 5]), torch.tensor([], dtype=torch.long)]
MASKS = [ACTION[i].bool() & (len(PROMPTS[i]) > 0) for i in range(3)]


def gradient(worker, loss) -> torch.Tensor:
    worker.actor.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in worker.actor.parameters()])
