# pyright: reportMissingImports=false
"""The same transfer by Ray: an object store and a queue actor between a producer and a consumer.

The producer puts each group (the same seven arrays and a header) into the object store and its
reference into a `ray.util.queue.Queue`. The consumer gets 16 references at a time and then the
arrays. As many groups are in flight as with the service. Ray keeps no journal and validates
nothing.

Install Ray in a separate environment, never the project's: python -m venv /somewhere; pip install
ray numpy.
Usage: /somewhere/bin/python benchmarks/service_ray.py [--tokens 1024] [--seconds 5]
Prints one JSON object. `python -m benchmarks.service --ray /somewhere/bin/python` alternates it
with the service and reports both.
"""

import argparse
import json
import time

import numpy as np
import ray
from ray.util.queue import Empty, Queue

GROUP_SIZE = 24
GROUPS_A_BATCH = 16
CREDITS = 64
PROMPT_TOKENS = 128
WARM_UP_S = 2.0


def make_arrays(tokens_each: int) -> list[np.ndarray]:
    total = tokens_each * GROUP_SIZE
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 256, PROMPT_TOKENS).astype(np.int32),
        np.full(GROUP_SIZE, tokens_each, np.int32),
        np.ones(GROUP_SIZE, np.float32),
        np.zeros(GROUP_SIZE, np.int32),
        rng.integers(0, 256, total).astype(np.int32),
        -rng.random(total).astype(np.float32),
        np.zeros(total, np.int32),
    ]


class Producer:
    def run(self, queue: Queue, tokens_each: int) -> None:
        arrays = make_arrays(tokens_each)
        lease_id = 0
        while True:
            header = {"lease_id": lease_id, "prompt_id": lease_id, "num_screening": 4}
            queue.put([ray.put((header, *arrays))])  # waits while the queue is full
            lease_id += 1


class Consumer:
    def run(self, queue: Queue, seconds: float) -> float:
        """Groups per second, after the warm-up."""
        self._take(queue, WARM_UP_S)
        start_s = time.perf_counter()
        moved = self._take(queue, seconds)
        return moved / (time.perf_counter() - start_s)

    def _take(self, queue: Queue, seconds: float) -> int:
        moved, deadline_s = 0, time.perf_counter() + seconds
        while time.perf_counter() < deadline_s:
            try:
                references = [one[0] for one in queue.get_nowait_batch(GROUPS_A_BATCH)]
            except Empty:  # fewer are available
                references = [queue.get()[0]]
            moved += len(ray.get(references))
        return moved


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    queue = Queue(maxsize=CREDITS, actor_options={"num_cpus": 0})
    remote = ray.remote(num_cpus=0)
    producer, consumer = remote(Producer).remote(), remote(Consumer).remote()
    producer.run.remote(queue, arguments.tokens)
    groups_per_s = ray.get(consumer.run.remote(queue, arguments.seconds))
    ray.shutdown()
    print(json.dumps({"groups_per_s": groups_per_s}))


if __name__ == "__main__":
    main()
