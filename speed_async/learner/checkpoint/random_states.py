"""The random states of the learner's process, as plain data.

Updates do not use them at present, since dropout is off. They are stored so that any later use is
reproducible after a resume.
"""

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_states() -> dict[str, object]:
    """States of torch (CPU and each GPU in use), of numpy's global generator and of Python's, as
    JSON values."""
    version, state_words, gauss_next = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    key = numpy_state["state"]["key"]
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": {"version": version, "words": list(state_words), "gauss_next": gauss_next},
        "numpy": numpy_state | {"state": numpy_state["state"] | {"key": key.tolist()}},
        "torch_cpu": _to_text(torch.get_rng_state()),
        "torch_cuda": [_to_text(state) for state in gpus],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Inverse of `random_states`. States of GPUs that are not available are ignored.

    Raises KeyError, TypeError or ValueError for a malformed record.
    """
    python, numpy_state = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss_next"]))
    key = np.array(numpy_state["state"]["key"], np.uint32)
    np.random.set_state(numpy_state | {"state": numpy_state["state"] | {"key": key}})
    torch.set_rng_state(_to_tensor(states["torch_cpu"]))
    for index, state in enumerate(states["torch_cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_to_tensor(state), index)


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _to_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
