"""Time and memory of one response of n tokens in each part of a step, on CPU.

    python tests/slow/bench/lengths.py [--lengths 4096 16384 65536] [--vocab 8192] [--hidden 64]

    controller   two siblings: texts, contexts, the teacher's prompt of n tokens and more, the recorder's lines
    worker       teacher's states (toy model), loss and gradient over the vocabulary, top-k 100, and what is recorded
    teacher      the forward pass of a Llama (2 layers, width 128) over prompt and response, 2 n tokens, one row
    report       the page with both samples

Each in a process of its own: CPU seconds, and the peak of its memory above what the process began with. The teacher's
attention is quadratic in time, as every model's; nothing else is. Writes runs/bench/lengths.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tests"))
import long_responses  # noqa: E402
import made_run  # noqa: E402

from sdpo_plugin.testing import tiny_model  # noqa: E402


def teacher(n: int, model: Any) -> None:
    from sdpo_plugin.openrlhf_adapter.worker.actor import PolicyActor

    class Engine(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.module = model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    actor = PolicyActor(Engine())
    actor.packing_samples = False
    actor.tap_head()
    sequences = torch.randint(model.config.vocab_size, (1, 2 * n))
    rows = torch.zeros_like(sequences, dtype=torch.bool)
    rows[0, n - 1 : -1] = True
    assert len(actor.hidden_states(sequences, torch.ones_like(sequences), rows, 32_768)) == n


def measured(function: Callable[..., Any], *args: Any) -> tuple[float, float]:
    """CPU seconds and MiB of a call, in a fork of this process."""
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe()

    def run() -> None:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        function(*args)
        its.send((time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))

    process = context.Process(target=run)
    process.start()
    process.join()
    return ours.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)  # and no threads that a fork would miss
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sdpo_plugin.openrlhf_adapter.platform import cpu

    cpu.enable()
    directory, rows = Path(tempfile.mkdtemp()), []
    made = tiny_model(directory / "model", positions=2 * max(options.lengths))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
    for n in options.lengths:
        own = directory / str(n)
        made_run.log(own, made_run.curves(3))
        for name, function, *args in (
            ("controller", long_responses.controller, n, tokenizer, own),
            ("worker", long_responses.worker, n, options.vocab, options.hidden, 100),
            ("teacher", teacher, n, model),
            ("report", long_responses.report, own, own / "report.html"),
        ):
            seconds, mib = measured(function, *args)
            rows.append({"part": name, "tokens": n, "cpu_s": seconds, "peak_mib": mib})
            print(f"{name:>12} {n:>7} tokens {seconds:8.2f} s {mib:8.0f} MiB", flush=True)
    out = ROOT / "runs" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    (out / "lengths.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
