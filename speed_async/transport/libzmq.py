"""The libzmq that pyzmq uses."""

import zmq


def libzmq_version() -> str:
    return zmq.zmq_version()


def has_curve() -> bool:
    """Whether it can encrypt sockets, which runs on several machines need."""
    return zmq.has("curve")
