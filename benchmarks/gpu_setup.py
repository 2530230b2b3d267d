"""Options, random models and clocks of the parts of benchmarks/gpu_check.py."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import MODEL_SHAPES

Options = argparse.Namespace
Row = dict[str, object]


def add_options(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--size", choices=MODEL_SHAPES, default="1.5B")
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=16)


def row(what: str, unit: str, value: float, aim: str = "") -> Row:
    return {"what": what, "unit": unit, "measured": value, "aim": aim}


def now_s(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(device: str, call: Callable[[], object]) -> float:
    """Seconds of the second call."""
    call()
    began_s = now_s(device)
    call()
    return now_s(device) - began_s


def indexed(device: str) -> torch.device:
    return torch.device(device, 0) if device == "cuda" else torch.device(device)


def dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def random_model(options: Options, *, context: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        **MODEL_SHAPES[options.size],
        max_position_embeddings=context,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(options.device):
        model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def matmul_flops_per_s(device: str, seconds_limit: float = 2.0) -> float:
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    _ = left @ right
    num_done, began_s = 0, now_s(device)
    while (passed_s := now_s(device) - began_s) < seconds_limit:
        for _ in range(10):
            _ = left @ right
        num_done += 10
    return num_done * 2 * size**3 / passed_s
