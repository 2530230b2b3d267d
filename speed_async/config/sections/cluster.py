"""`[cluster]`: roles, addresses, keys and time limits."""

import ipaddress
from typing import Literal

from speed_async.config.sections.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class ClusterConfig(Section):
    learners: PositiveInt = 1
    """Learner ranks, the first ranks; all others are actors. Several learners shard parameters,
    gradients and optimiser (FSDP), and divide each batch."""
    actors: PositiveInt = 1
    """Actor ranks of a run, unless the number of processes determines it (torchrun,
    --nproc-per-node)."""
    host: str = "127.0.0.1"
    """Address of the node of the first learner, to which the service binds."""
    service_port: NonNegativeInt = 0
    """0 picks a free port; a run on several nodes needs a fixed port, the same on all nodes."""
    advertised_port: NonNegativeInt = 0
    """Port on `host` of a forwarder in front of the service (a tunnel or proxy), used by actors and
    learner; 0: the port of the service."""
    learner_port: NonNegativeInt = 0
    """Port on `host` at which several learner ranks find the first one. 0 picks a free port;
    learners on several nodes need a fixed port."""
    feed_port: NonNegativeInt = 0
    """Port of the read-only metrics feed; 0 picks a free port."""
    max_restarts: NonNegativeInt = 0
    """Maximum restarts of all ranks by `speed-async train`, from the last checkpoint, after a rank
    failed (torchrun has its own --max-restarts)."""
    security: Literal["auto", "curve", "insecure"] = "auto"
    """`auto`: sockets use CURVE with the keys in `keys`, except on loopback. `curve`: always.
    `insecure`: never; sockets are unencrypted and open to every client that reaches them."""
    keys: str | None = None
    """Folder made by `speed-async keys`."""
    connect_timeout_s: PositiveFloat = 120.0
    """Maximum wait of the roles for each other at the start."""
    peer_timeout_s: PositiveFloat = 60.0
    """Time without messages after which a peer is considered dead."""
    stall_timeout_s: PositiveFloat = 600.0
    """Time without any new token of any actor after which the run fails, or ends without the result
    of its last evaluation. Also the limit of one engine start, and of the time in which none of
    as many prompts in a row as a run has credits (`buffer.credits`) enters the buffer."""
    drain_timeout_s: PositiveFloat = 20.0
    """Longest time that an ending process waits for running requests and acknowledgements."""

    @property
    def is_loopback(self) -> bool:
        """Whether `host` is reachable only from its own machine; names other than localhost are
        assumed to be reachable from other machines."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def uses_curve(self) -> bool:
        """Whether sockets are encrypted and accept only allowed keys."""
        return self.security == "curve" or (self.security == "auto" and not self.is_loopback)
