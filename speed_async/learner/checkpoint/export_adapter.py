"""Export of the adapters (LoRA) of a checkpoint in the format of peft, which vLLM also loads."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from speed_async.config.local_model import model_folder
from speed_async.config.schema import Config
from speed_async.errors import ModelError
from speed_async.learner.adapters import AdaptedLinear, add_adapters, is_factor
from speed_async.learner.checkpoint.captured import MASTER
from speed_async.learner.checkpoint.export import check_export, new_folder
from speed_async.learner.checkpoint.shards import SavedRows, load_weights, saved_paths
from speed_async.learner.checkpoint.store import TRAINING_FOLDER
from speed_async.learner.model import load_model

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def export_adapter(checkpoint: Path, out: Path, config: Config) -> None:
    """Writes the adapters in float32 to `out`, which must not exist. `config` is that of the run.

    Raises ModelError for a damaged checkpoint or one without adapters, SpeedAsyncError if `out`
    exists, and OSError.
    """
    check_export(checkpoint, out)
    if not config.learner.lora_rank:
        raise ModelError(f"checkpoint '{checkpoint}' has no adapters: learner.lora_rank was 0")
    try:
        model = load_model(checkpoint, device="cpu")
        add_adapters(model, config.learner, seed=0)
        load_weights(model, SavedRows(saved_paths(checkpoint / TRAINING_FOLDER, MASTER)))
    except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"checkpoint '{checkpoint}' cannot be exported: {error}") from error
    layers = [name for name, each in model.named_modules() if isinstance(each, AdaptedLinear)]
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model_folder(config.model.path)),
        "r": config.learner.lora_rank,
        "lora_alpha": config.learner.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "inference_mode": True,
    }
    tensors = {
        f"base_model.model.{name}.weight": parameter.detach()
        for name, parameter in model.named_parameters()
        if is_factor(name)
    }
    with new_folder(out) as partial:
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        (partial / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (partial / WEIGHTS_FILE).chmod((partial / CONFIG_FILE).stat().st_mode)
