"""Tiny random causal LMs of two families, tied and untied, and model folders with them."""

from pathlib import Path
from typing import Any

import torch

from speed_async.launcher.preflight.memory_budget import ModelSizes

VOCABULARY = ("<pad>", "<bos>", "<eos>", "<unk>", *"0123456789+=abcdefghijklmnopqrstuvwxyz ")
EOS_TOKEN_ID = 2
CONTEXT_LENGTH = 96
FAMILIES = [("llama", True), ("llama", False), ("qwen3", True), ("qwen3", False)]


def tiny_model(
    family: str, *, tied: bool, seed: int = 0, attention: str = "sdpa", head_dim: int = 8
) -> Any:
    """A float32 model with two layers, two KV heads and four query heads, in eval mode."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    sizes: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": tied,
        # Large, so that the distributions are far from uniform and errors are visible.
        "initializer_range": 0.3,
        "attn_implementation": attention,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": EOS_TOKEN_ID,
    }
    torch.manual_seed(seed)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    if family == "qwen3_moe":
        experts: dict[str, Any] = {
            "num_experts": 8,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
        }
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()


def save_tokenizer(folder: Path, *, eos: bool = True) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<bos>"}
    if eos:
        names["eos_token"] = "<eos>"
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)


def save_tiny_folder(
    folder: Path,
    *,
    family: str = "llama",
    tied: bool = True,
    head_dim: int = 8,
    max_shard_size: str = "50GB",
) -> Path:
    model = tiny_model(family, tied=tied, head_dim=head_dim)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(folder)
    return folder


def sizes_of(config: Any, num_parameters: int) -> ModelSizes:
    return ModelSizes(
        num_parameters=num_parameters,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or 1,
        head_dim=config.head_dim or 1,
        vocab_size=config.vocab_size,
    )
