"""On-policy self-distillation (SDPO, SDFT, OPSD) for OpenRLHF."""

__version__ = "0.1.0"
