"""Serialization of a numpy random generator."""

import json

import numpy as np
from numpy.typing import NDArray


def pack_rng(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Serialize a generator whose state is plain numbers (numpy's default is) to JSON bytes."""
    return np.frombuffer(json.dumps(rng.bit_generator.state).encode(), np.uint8)


def unpack_rng(rng: np.random.Generator, packed: NDArray[np.generic]) -> None:
    """Load that state into a generator. Raises ValueError when it is of another kind."""
    rng.bit_generator.state = json.loads(packed.tobytes())
