"""The algorithms of `--algo`: one file per paper, their common base (`base.py`) and the teachers (`teacher.py`)."""
