"""Small models for tests on a CPU."""

from __future__ import annotations

from pathlib import Path


def tiny_model(
    directory: str | Path, *, tied: bool = False, seed: int = 0, hidden: int = 128, layers: int = 2,
    positions: int = 512,
) -> Path:  # fmt: skip
    """An untrained Llama with a character tokenizer and a chat template, small enough for a laptop's CPU.

    354,432 parameters untied, if not wider or deeper; head size 64, which vLLM's CPU attention needs.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, "\n", *map(chr, range(32, 127))])}
    characters = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=special[2:5],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocab), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64,
            max_position_embeddings=positions, tie_word_embeddings=tied,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
