"""What a run logged, as a page (`openrlhf-sdpo report`) and in the terminal (`--text`)."""

from sdpo_plugin.report.events import read_scalars

__all__ = ["read_scalars"]
