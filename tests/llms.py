"""Tiny language models with random weights, of real architectures and with real tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = (
    "Decide which of the labels fits best. Answer with the label alone. Labels: Text: First text: Second text: Label: "
    "the card payment was charged twice calendar update timer sports food money a goal in the match stir the soup "
)
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tiny_tokenizer(
    *, chat: bool = False, metaspace: bool = False, words: str = WORDS, vocab_size: int = 380
) -> PreTrainedTokenizerFast:
    """A byte-level BPE as LLaMA 3 has, or one over `▁` with byte fallback as LLaMA 2 has; trained on `words`."""
    specials = ["<s>", "</s>", "<|start|>", "<|end|>"]
    if metaspace:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        specials = ["<unk>", *specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    alphabet = [] if metaspace else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + 260 * metaspace, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([words] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = CHAT
    return fast


def tiny_llama(
    directory: Path, *, chat: bool = False, metaspace: bool = False, words: str = "", seed: int = 0, **config: Any
) -> Path:
    """Save a LLaMA of two layers and width 32, with grouped keys and values, to a directory; the directory."""
    tokenizer = tiny_tokenizer(
        chat=chat, metaspace=metaspace, words=WORDS + words, vocab_size=380 + len(set(words.split()))
    )
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.3,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **(shape | config)))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
