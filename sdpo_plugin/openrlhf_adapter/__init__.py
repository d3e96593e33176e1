"""All code that depends on OpenRLHF, Ray, vLLM or DeepSpeed: a folder for each process of a run, and what all need."""
