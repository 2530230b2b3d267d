"""Whether the weights of a model folder are those that its config.json describes.

The learner refuses others when it loads the model, long after the run has started. Reads the
headers of the weight files only, except to compare a head with the embeddings.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from speed_async.launcher.preflight.weights import StoredTensor, Weights, have_equal_values
from speed_async.observability.notation import counted

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose tensors are known here. Those of other families are not checked."""
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
PREFIX = "model."
"""Of the names of all tensors but the head. The folder of a base model lacks it."""
EMBEDDINGS, HEAD = "embed_tokens.weight", "lm_head.weight"
REMEDY = "download the folder again, or correct its config.json"


def tensor_faults(
    record: Mapping[str, Any], weights: Weights, *, num_learners: int
) -> Iterator[str]:
    """What the learner would refuse, each with its remedy. `record`: config.json.

    Raises OSError.
    """
    stored = {name.removeprefix(PREFIX): tensor for name, tensor in weights.tensors.items()}
    if record.get("tie_word_embeddings") is True and HEAD in stored:
        # As transformers: one of the two tables is enough, and two equal ones are tied.
        embeddings = stored.setdefault(EMBEDDINGS, stored[HEAD])
        if num_learners > 1 and not have_equal_values(embeddings, stored[HEAD]):
            yield (
                f"its weight files have a head of its own ({HEAD}), although its config.json sets "
                "tie_word_embeddings, and several learners load a model by config.json; correct "
                "it, or set cluster.learners to 1"
            )
    yield from _shape_faults(expected_shapes(record), stored)


def _shape_faults(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor]
) -> Iterator[str]:
    missing = [name for name in expected if name not in stored]
    if missing:
        yield (
            f"its weight files lack {counted(len(missing), 'tensor')} that its config.json "
            f"describes, such as {missing[0]}; {REMEDY}"
        )
    others = [name for name in expected if name in stored and stored[name].shape != expected[name]]
    if others:
        name = others[0]
        yield (
            f"its weight files have {counted(len(others), 'tensor')} of another shape than its "
            f"config.json describes, such as {name}: {list(stored[name].shape)} instead of "
            f"{list(expected[name])}; {REMEDY}"
        )


def expected_shapes(record: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a model by their names without PREFIX. `record`: config.json.

    Empty if they do not follow from it: other families, quantized weights, and sizes that it leaves
    to the model class.
    """
    family = record.get("model_type")
    if family not in FAMILIES or record.get("quantization_config"):
        return {}
    sizes = [size for name in SIZES if isinstance(size := record.get(name), int) and size > 0]
    if len(sizes) < len(SIZES):
        return {}
    vocabulary, hidden, intermediate, num_layers, num_heads, num_kv_heads = sizes
    head_dim = record.get("head_dim")
    if head_dim is None and family != "qwen3":  # whose default is a constant
        head_dim = hidden // num_heads
    if not isinstance(head_dim, int):
        return {}
    queries, keys = num_heads * head_dim, num_kv_heads * head_dim
    linear_layers = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    layer = {f"{name}.weight": shape for name, shape in linear_layers.items()}
    layer |= {f"{name}.bias": linear_layers[name][:1] for name in _biased(record, linear_layers)}
    layer |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if family == "qwen3":
        layer |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    shapes = {EMBEDDINGS: (vocabulary, hidden), "norm.weight": (hidden,)}
    for index in range(num_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    if record.get("tie_word_embeddings") is not True:
        shapes[HEAD] = (vocabulary, hidden)
    return shapes


def _biased(record: Mapping[str, Any], linear_layers: Mapping[str, Any]) -> list[str]:
    """Those of the linear layers that have a bias."""
    family = record["model_type"]
    if family == "qwen2":
        return [f"self_attn.{name}_proj" for name in "qkv"]
    parts = []
    if family in ("llama", "qwen3") and record.get("attention_bias") is True:
        parts.append("self_attn.")
    if family == "llama" and record.get("mlp_bias") is True:
        parts.append("mlp.")
    return [name for name in linear_layers if name.startswith(tuple(parts))]
