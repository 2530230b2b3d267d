"""The handshake of a transfer: rendezvous, manifest, verdicts, and failure attribution.

Every message is a key in the sender's store: `epoch-3/joined/0/2` means that rank 2 has joined the
first transfer of epoch 3. Receivers only set keys and wait for them; the sender reads them.

Shape legend: B bytes of one message.
"""

import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch
from torch._C._distributed_c10d import Store

from speed_async.errors import WeightSyncError
from speed_async.types import WeightOffer
from speed_async.weight_sync.channel import NamedTensor
from speed_async.weight_sync.epoch_group import EpochGroup, MemberLeft, StageFailed, wait_for_keys
from speed_async.weight_sync.ipc_group import machine_identity, machine_mismatch
from speed_async.weight_sync.manifest import (
    MAX_MANIFEST_BYTES,
    Agreement,
    Manifest,
    accept_manifest,
    describe,
    digest_of,
    encode_manifest,
    matches,
)
from speed_async.weight_sync.process_group import reach_store

T = TypeVar("T")

LENGTH = struct.Struct("<Q")
HEAD_BYTES = 4 * 1024
"""Size of the first message, enough for a manifest that refers to its tensors by digest."""
GRACE_S = 0.5
"""Time after a failure that peers have to report their state."""


def gather_answers(group: EpochGroup, message: str, absence: str) -> "Future[dict[int, str]]":
    """One value from every receiver, keyed by rank; fails naming the ranks without one."""
    keys = _keys_by_rank(group, message)

    def call(store: Store) -> dict[int, str]:
        if not wait_for_keys(store, [*keys.values()], group.offer.deadline_s):
            missing = [rank for rank, key in keys.items() if not store.check([key])]
            raise MemberLeft(missing, absence)
        answers = store.multi_get([*keys.values()])
        return {
            rank: answer.decode(errors="replace")
            for rank, answer in zip(keys, answers, strict=True)
        }

    return group.on_store(call)


def gather_members(group: EpochGroup, store: Store) -> None:
    """Sender: waits until every receiver has joined, then creates the process group."""
    stage = "rendezvous"
    group.wait(stage, group.connect(lambda: store))
    identities = group.wait(stage, gather_answers(group, "joined", "never joined"))
    if group.offer.backend == "ipc":
        ours = machine_identity()
        problems = {rank: machine_mismatch(ours, theirs) for rank, theirs in identities.items()}
        if remote := [f"rank {rank} {problem}" for rank, problem in problems.items() if problem]:
            raise sync_error(group.offer, f"rendezvous: {'; '.join(remote)}")
    group.wait(stage, group.on_store(lambda store: store.set(group.key("go"), "")))
    group.wait(stage, group.build())
    group.formed = True


def announce(group: EpochGroup, manifest: Manifest) -> None:
    """Sender: broadcasts the manifest, with a digest in place of tensors that receivers know."""
    parts = _manifest_parts(encode_manifest(manifest, group.agreed))
    messages_B = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts]
    for future in group.broadcast(*map(group.to_transfer_device, messages_B)):
        group.wait("manifest", future)
    if group.agreed is None or group.agreed.tensors != manifest.tensors:
        group.agreed = Agreement(tensors=manifest.tensors, digest=digest_of(manifest.tensors))


def collect_verdicts(group: EpochGroup) -> None:
    """Sender: waits for all verdicts on the manifest. Raises WeightSyncError for a refusal."""
    verdicts = group.wait("manifest", gather_answers(group, "verdict", "did not answer"))
    refusals = {rank: f"rank {rank} refused: {text}" for rank, text in verdicts.items() if text}
    if refusals:
        reason = f"manifest: {'; '.join(refusals.values())}"
        raise sync_error(group.offer, reason, missing_ranks=[*refusals])


def collect_refusals(group: EpochGroup) -> dict[int, str]:
    """Sender, after a failure: the ranks that refused this transfer, with their reasons."""
    keys = _keys_by_rank(group, "verdict")

    def query(store: Store) -> dict[int, str]:
        verdicts = {rank: store.get(key) for rank, key in keys.items() if store.check([key])}
        return {
            rank: f"rank {rank} refused: {text.decode(errors='replace')}"
            for rank, text in verdicts.items()
            if text
        }

    return _query_store(group, query, {})


def delete_verdicts(group: EpochGroup) -> None:
    """Sender: deletes the keys of this transfer, without waiting."""
    keys = _keys_by_rank(group, "verdict")
    group.on_store(lambda store: [store.delete_key(key) for key in keys.values()])


def mark_done(group: EpochGroup) -> None:
    """Receiver: records that it has completed this transfer, for a sender that fails."""
    done, transfer = group.key("done", group.offer.rank), str(group.num_transfers)
    group.on_store(lambda store: store.set(done, transfer))


def join_epoch(group: EpochGroup) -> None:
    """Receiver: joins the epoch, waits for the sender's start, creates the process group."""
    group.wait("rendezvous", group.connect(lambda: reach_store(group.offer)))

    def call(store: Store) -> str:
        identity = machine_identity() if group.offer.backend == "ipc" else ""
        store.set(group.key("joined", 0, group.offer.rank), identity)
        if not wait_for_keys(store, [group.key("go")], group.offer.deadline_s):
            raise RuntimeError("the sender did not start this epoch")
        return store.get(group.key("go")).decode(errors="replace")

    refusal = group.wait("rendezvous", group.on_store(call))
    if refusal:
        raise sync_error(group.offer, f"rendezvous: the sender reported: {refusal}")
    group.wait("rendezvous", group.build())
    group.formed = True


def receive_manifest(group: EpochGroup, expected: Sequence[NamedTensor]) -> Manifest:
    """Receiver: receives the manifest, verifies it and sends the verdict."""

    def receive(num_bytes: int) -> bytes:
        message_B = group.to_transfer_device(torch.empty(num_bytes, dtype=torch.uint8))
        [received] = group.broadcast(message_B)
        group.wait("manifest", received)
        return message_B.cpu().numpy().tobytes()

    known = group.agreed
    is_unchanged = known is not None and matches(known.expected, expected, None)
    head = receive(HEAD_BYTES)
    (num_bytes,) = LENGTH.unpack_from(head)
    if num_bytes > MAX_MANIFEST_BYTES:
        raise sync_error(
            group.offer, f"manifest: {num_bytes} bytes announced, more than {MAX_MANIFEST_BYTES}"
        )
    num_left = LENGTH.size + num_bytes - HEAD_BYTES
    payload = head[LENGTH.size :] + (receive(num_left) if num_left > 0 else b"")
    try:
        version = group.offer.policy_version
        manifest = accept_manifest(
            payload[:num_bytes], version, expected, known, is_unchanged=is_unchanged
        )
    except WeightSyncError as error:
        raise refuse(group, f"manifest: {error}", str(error)) from error
    if known is None or known.tensors is not manifest.tensors:
        group.agreed = Agreement(
            tensors=manifest.tensors,
            digest=digest_of(manifest.tensors),
            expected=describe(expected, None),
        )
    _set_verdict(group, "")  # asynchronous
    return manifest


def refuse(group: EpochGroup, text: str, verdict: str) -> WeightSyncError:
    """Receiver: sends the reason of the refusal to the sender. Returns the error to raise."""
    group.wait("manifest", _set_verdict(group, verdict))
    return sync_error(group.offer, text)


def _set_verdict(group: EpochGroup, verdict: str) -> "Future[None]":
    key = group.key("verdict", group.num_transfers, group.offer.rank)
    return group.on_store(lambda store: store.set(key, verdict))


def find_unresponsive(group: EpochGroup, reason: str) -> list[int]:
    """Sender, after a failure: receivers that neither finished nor left the transfer."""
    left = {rank: group.key("left", rank) for rank in group.receiver_ranks}

    def query(store: Store) -> list[int]:
        finished = str(group.num_transfers).encode()
        for rank in group.receiver_ranks:
            done = group.key("done", rank)
            if store.check([done]) and store.get(done) == finished:
                del left[rank]
        if not left or wait_for_keys(store, [*left.values()], GRACE_S):
            return []
        return [rank for rank, key in left.items() if not store.check([key])]

    group.announce_end(reason)
    return _query_store(group, query, [])


def sender_failure_reason(group: EpochGroup, reason: str) -> str:
    """Receiver, after a failure: the sender's reason for the end of this epoch, if any."""

    def query(store: Store) -> str:
        over = group.key("over")
        if not wait_for_keys(store, [over], GRACE_S):
            return ""
        return f"; it reported: {store.get(over).decode(errors='replace')}"

    group.announce_end(reason)
    return _query_store(group, query, "")


def _query_store(group: EpochGroup, query: Callable[[Store], T], default: T) -> T:
    """Result of a query of the store, or `default` when the store is unreachable."""
    if group.stuck:
        return default
    try:
        return group.wait("query", group.on_store(query), GRACE_S)
    except StageFailed:
        return default


def _manifest_parts(payload: bytes) -> list[bytes]:
    """Length and payload, split after HEAD_BYTES. The head is padded; the rest is optional."""
    message = LENGTH.pack(len(payload)) + payload
    head, rest = message[:HEAD_BYTES].ljust(HEAD_BYTES, b"\0"), message[HEAD_BYTES:]
    return [head, rest] if rest else [head]


def _keys_by_rank(group: EpochGroup, message: str) -> dict[int, str]:
    return {rank: group.key(message, group.num_transfers, rank) for rank in group.receiver_ranks}


def sync_error(
    offer: WeightOffer, text: str, *, missing_ranks: Sequence[int] = ()
) -> WeightSyncError:
    return WeightSyncError(
        f"policy version {offer.policy_version}, epoch {offer.epoch}, {text}",
        missing_ranks=missing_ranks,
    )
