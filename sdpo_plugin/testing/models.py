"""Small models for tests on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def _characters(special: list[str]) -> Any:
    """A tokenizer with a token for each printable ASCII character, after these."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*special, "\n", *map(chr, range(32, 127))])}
    characters = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=[token for token in special if "|" in token],
    )  # fmt: skip


def tiny_model(
    directory: str | Path, *, tied: bool = False, seed: int = 0, hidden: int = 128, layers: int = 2,
    positions: int = 512,
) -> Path:  # fmt: skip
    """An untrained Llama with a character tokenizer and a chat template, small enough for a laptop's CPU.

    354,432 parameters untied, if not wider or deeper; head size 64, which vLLM's CPU attention needs.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _characters(["<pad>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<unk>"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64,
            max_position_embeddings=positions, tie_word_embeddings=tied,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


VISION_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_vision_model(directory: str | Path, *, seed: int = 0, layers: int = 2, positions: int = 512) -> Path:
    """An untrained Qwen2.5-VL of some 0.6M parameters with a character tokenizer; needs torchvision.

    An image of 56 x 56 pixels is 4 tokens.
    """
    import torch
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = _characters([
        "<pad>", "<eos>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|vision_start|>", "<|vision_end|>",
        "<|image_pad|>", "<|video_pad|>",
    ])  # fmt: skip
    vocab = tokenizer.get_vocab()
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    images = Qwen2VLImageProcessor(**patches, size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112})
    videos = Qwen2VLVideoProcessor(**patches)
    processor = Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=VISION_TEMPLATE)
    text = {
        "vocab_size": len(vocab), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": positions,
        "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=False, image_token_id=vocab["<|image_pad|>"],
            video_token_id=vocab["<|video_pad|>"], vision_start_token_id=vocab["<|vision_start|>"],
            vision_end_token_id=vocab["<|vision_end|>"],
        )  # fmt: skip
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    processor.save_pretrained(directory)
    return Path(directory)
