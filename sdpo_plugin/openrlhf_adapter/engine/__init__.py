"""In the rollout engines: vLLM, reward functions and agents."""
