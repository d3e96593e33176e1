"""On the controller, which sees the whole batch: OpenRLHF's trainer, and the samples that engines return."""
