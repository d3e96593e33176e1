"""Everything that knows OpenRLHF, Ray, vLLM or DeepSpeed."""
