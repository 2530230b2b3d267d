"""A numpy random generator as bytes, and back."""

import json

import numpy as np
from numpy.typing import NDArray


def pack_rng(rng: np.random.Generator) -> NDArray[np.uint8]:
    """State of a generator whose state is plain numbers (numpy's default is), as JSON bytes."""
    return np.frombuffer(json.dumps(rng.bit_generator.state).encode(), np.uint8)


def unpack_rng(rng: np.random.Generator, packed: NDArray[np.generic]) -> None:
    """Set a generator of the same kind to that state. ValueError: it is of another kind."""
    rng.bit_generator.state = json.loads(packed.tobytes())
