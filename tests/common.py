"""What the end-to-end tests share: data, flags, and how runs are compared."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # a file of tests that needs no torch starts without it
    import torch

REWARD = '''
import torch

def reward_func(queries, prompts, labels):
    """Half of the responses succeed, by chance; the feedback tells what was expected, whatever happened."""
    assert type(prompts[0]) is str and prompts[0].split("|>")[1].split()[0] in ("say", "ask")
    reward = torch.tensor([float(sum(map(ord, query)) % 2) for query in queries])
    return {"rewards": reward, "scores": reward, "feedback": [f"expected {label}" for label in labels]}
'''
ROWS = [{"prompt": [{"role": "user", "content": f"say {i}"}], "label": str(i), "note": f"row {i}"} for i in range(8)]
SDPO = ("--algo", "sdpo", "--distill.topk", "20")
TWO_RANKS = ("--actor.num_gpus_per_node", "2", "--train.micro_batch_size", "4")
LORA = ("--ds.lora.rank", "4", "--ds.lora.target_modules", "q_proj", "v_proj", "down_proj")
ZERO = [(*TWO_RANKS, "--ds.zero_stage", stage) for stage in ("0", "1", "2", "3")]
STAGES = {f"zero{stage}": (flags,) for stage, flags in enumerate(ZERO)}


def cases(named: dict[str, tuple[Any, ...]] | Iterable[str], *soon: str) -> list[Any]:
    """Parameters of a test: arguments by id, or ids that are themselves the argument.

    `make test` runs those named in `soon`, `make check` the others.
    """
    found = named if isinstance(named, dict) else {name: (name,) for name in named}
    assert found.keys() >= set(soon)
    return [
        pytest.param(*arguments, id=name, marks=() if name in soon else pytest.mark.check)
        for name, arguments in found.items()
    ]


def same(a, b) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    assert a.weights.keys() == b.weights.keys() and a.weights
    return all(tensor.equal(b.weights[name]) for name, tensor in a.weights.items())


def motion(run, start) -> float:
    """Euclidean distance of a run's final weights from `start`."""
    return sum((run.weights[name].float() - w.float()).norm().item() ** 2 for name, w in start.items()) ** 0.5


def adapter(run) -> "dict[str, torch.Tensor]":
    """A LoRA run's final adapter; the host saves it as a pickle under ZeRO-3."""
    import torch
    from safetensors.torch import load_file

    file = run.directory / "model" / "adapter_model.bin"
    return torch.load(file) if file.exists() else load_file(file.with_suffix(".safetensors"))


class Service:
    """A reward service on this machine: `answer(request) -> bytes`, after `delay` seconds, at `url`."""

    def __init__(self, answer: Callable[[dict[str, Any]], bytes], delay: float = 0.0) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                time.sleep(delay)
                body = answer(request)
                with contextlib.suppress(OSError):  # whoever asked has gone
                    self.send_response(200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}/reward"
        threading.Thread(target=server.serve_forever, daemon=True).start()


def asked(environment, response, label, **options):
    """As OpenRLHF asks: one query at a time, in a thread that is not the main one."""
    found = {}
    reward_func = environment.make(**options)
    ask = lambda: found.update(reward_func([f"Q?{response}"], ["Q?"], [label]))  # noqa: E731
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return found["rewards"].item(), found["feedback"][0]


def processor_of(tokenizer) -> Any:
    """LLaVA's processor around a tokenizer, which gets a token for images; it needs no torchvision."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.processing_llava import LlavaProcessor

    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    return LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=14, chat_template=tokenizer.chat_template)


def vision_model(directory) -> Any:
    """The tiny model as the text part of a vision-language model."""
    import torch
    from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from sdpo_plugin.testing import tiny_model

    processor = processor_of(AutoTokenizer.from_pretrained(tiny_model(directory)))
    text = LlamaConfig.from_pretrained(directory)
    text.vocab_size = len(processor.tokenizer)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=processor.image_token_id)
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
