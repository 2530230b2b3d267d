"""The talk around the bytes: meeting, manifest and verdicts, and who is to blame afterwards.

Every word is a key in the sender's store: `epoch-3/joined/0/2` says that rank 2 is there for the
first transfer of epoch 3. Receivers only set keys and wait for them; the sender reads.

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
from speed_async.weight_sync.ipc_group import machine_identity, same_machine
from speed_async.weight_sync.manifest import (
    MAX_MANIFEST_BYTES,
    Agreement,
    Manifest,
    accept_manifest,
    describe,
    describes,
    digest_of,
    encode_manifest,
)
from speed_async.weight_sync.process_group import reach_store

T = TypeVar("T")

LENGTH = struct.Struct("<Q")
HEAD_BYTES = 4 * 1024
"""Size of the first message: all of a manifest that names its tensors by digest."""
GRACE_S = 0.5
"""How long, after a failure, the other side may take to say what it saw."""


def ask_all(group: EpochGroup, word: str, absence: str) -> "Future[dict[int, str]]":
    """One text from every receiver, by rank; fails naming who gave none."""
    keys = _keys_by_rank(group, word)

    def call(store: Store) -> dict[int, str]:
        if not wait_for_keys(store, [*keys.values()], group.offer.deadline_s):
            absent = [rank for rank, key in keys.items() if not store.check([key])]
            raise MemberLeft(absent, absence)
        answers = store.multi_get([*keys.values()])
        return {
            rank: answer.decode(errors="replace")
            for rank, answer in zip(keys, answers, strict=True)
        }

    return group.on_store(call)


def gather_members(group: EpochGroup, store: Store) -> None:
    """Sender: wait until every receiver is there, then make the process group with them."""
    stage = "rendezvous"
    group.wait(stage, group.connect(lambda: store))
    identities = group.wait(stage, ask_all(group, "joined", "never joined"))
    if group.offer.backend == "ipc":
        ours = machine_identity()
        wrong = {rank: same_machine(ours, theirs) for rank, theirs in identities.items()}
        if elsewhere := [f"rank {rank} {why}" for rank, why in wrong.items() if why]:
            raise sync_error(group.offer, f"rendezvous: {'; '.join(elsewhere)}")
    group.wait(stage, group.on_store(lambda store: store.set(group.key("go"), "")))
    group.wait(stage, group.build())
    group.formed = True


def announce(group: EpochGroup, manifest: Manifest) -> None:
    """Sender: broadcast the manifest; its tensors by digest where the receivers know them."""
    parts = _manifest_parts(encode_manifest(manifest, group.agreed))
    messages_B = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts]
    for future in group.broadcast(*map(group.placed, messages_B)):
        group.wait("manifest", future)
    if group.agreed is None or group.agreed.tensors != manifest.tensors:
        group.agreed = Agreement(tensors=manifest.tensors, digest=digest_of(manifest.tensors))


def hear_verdicts(group: EpochGroup) -> None:
    """Sender: every receiver's verdict on the manifest. Raises WeightSyncError for a refusal."""
    verdicts = group.wait("manifest", ask_all(group, "verdict", "did not answer"))
    refusals = {rank: f"rank {rank} refused: {text}" for rank, text in verdicts.items() if text}
    if refusals:
        reason = f"manifest: {'; '.join(refusals.values())}"
        raise sync_error(group.offer, reason, missing_ranks=[*refusals])


def refusals_of(group: EpochGroup) -> dict[int, str]:
    """Sender, after a failure: who refused this transfer meanwhile, and why; mostly nobody."""
    keys = _keys_by_rank(group, "verdict")

    def ask(store: Store) -> dict[int, str]:
        given = {rank: store.get(key) for rank, key in keys.items() if store.check([key])}
        return {
            rank: f"rank {rank} refused: {text.decode(errors='replace')}"
            for rank, text in given.items()
            if text
        }

    return _ask(group, ask, {})


def forget_verdicts(group: EpochGroup) -> None:
    """Sender: free the keys of this transfer, which nobody waits for."""
    keys = _keys_by_rank(group, "verdict")
    group.on_store(lambda store: [store.delete_key(key) for key in keys.values()])


def say_done(group: EpochGroup) -> None:
    """Receiver: leave word that it is through with this transfer, for a sender that failed."""
    done, transfer = group.key("done", group.offer.rank), str(group.num_transfers)
    group.on_store(lambda store: store.set(done, transfer))


def join_epoch(group: EpochGroup) -> None:
    """Receiver: say that it is there, wait for the go, make the process group."""
    group.wait("rendezvous", group.connect(lambda: reach_store(group.offer)))

    def call(store: Store) -> str:
        identity = machine_identity() if group.offer.backend == "ipc" else ""
        store.set(group.key("joined", 0, group.offer.rank), identity)
        if not wait_for_keys(store, [group.key("go")], group.offer.deadline_s):
            raise RuntimeError("the sender did not start this epoch")
        return store.get(group.key("go")).decode(errors="replace")

    refusal = group.wait("rendezvous", group.on_store(call))
    if refusal:
        raise sync_error(group.offer, f"rendezvous: the sender said: {refusal}")
    group.wait("rendezvous", group.build())
    group.formed = True


def receive_manifest(group: EpochGroup, expected: Sequence[NamedTensor]) -> Manifest:
    """Receiver: the announced manifest, with this receiver's verdict on it sent."""

    def receive(num_bytes: int) -> bytes:
        message_B = group.placed(torch.empty(num_bytes, dtype=torch.uint8))
        [came] = group.broadcast(message_B)
        group.wait("manifest", came)
        return message_B.cpu().numpy().tobytes()

    known = group.agreed
    is_as_before = known is not None and describes(known.expected, expected, None)
    head = receive(HEAD_BYTES)
    (num_bytes,) = LENGTH.unpack_from(head)
    if num_bytes > MAX_MANIFEST_BYTES:
        raise sync_error(group.offer, f"manifest: {num_bytes} bytes are announced")
    num_left = LENGTH.size + num_bytes - HEAD_BYTES
    payload = head[LENGTH.size :] + (receive(num_left) if num_left > 0 else b"")
    try:
        version = group.offer.policy_version
        manifest = accept_manifest(
            payload[:num_bytes], version, expected, known, is_as_before=is_as_before
        )
    except WeightSyncError as error:
        raise refuse(group, f"manifest: {error}", str(error)) from error
    if known is None or known.tensors is not manifest.tensors:
        group.agreed = Agreement(
            tensors=manifest.tensors,
            digest=digest_of(manifest.tensors),
            expected=describe(expected, None),
        )
    _answer(group, "")  # nobody here waits for it
    return manifest


def refuse(group: EpochGroup, text: str, verdict: str) -> WeightSyncError:
    """Receiver: tell the sender why it takes no part in this transfer; the error to raise."""
    group.wait("manifest", _answer(group, verdict))
    return sync_error(group.offer, text)


def _answer(group: EpochGroup, verdict: str) -> "Future[None]":
    key = group.key("verdict", group.num_transfers, group.offer.rank)
    return group.on_store(lambda store: store.set(key, verdict))


def who_is_silent(group: EpochGroup, reason: str) -> list[int]:
    """Sender, after a failure: receivers that neither finished the transfer nor say they live."""
    left = {rank: group.key("left", rank) for rank in group.receiver_ranks}

    def ask(store: Store) -> list[int]:
        finished = str(group.num_transfers).encode()
        for rank in group.receiver_ranks:
            done = group.key("done", rank)
            if store.check([done]) and store.get(done) == finished:
                del left[rank]
        if not left or wait_for_keys(store, [*left.values()], GRACE_S):
            return []
        return [rank for rank, key in left.items() if not store.check([key])]

    group.announce_end(reason)
    return _ask(group, ask, [])


def what_sender_said(group: EpochGroup, reason: str) -> str:
    """Receiver, after a failure: what the sender gives as its end of this epoch, if anything."""

    def ask(store: Store) -> str:
        over = group.key("over")
        said = wait_for_keys(store, [over], GRACE_S)
        return f"; it said: {store.get(over).decode(errors='replace')}" if said else ""

    group.announce_end(reason)
    return _ask(group, ask, "")


def _ask(group: EpochGroup, question: Callable[[Store], T], nothing: T) -> T:
    """Answer of a store that may be out of reach: then `nothing`."""
    if group.stuck:
        return nothing
    try:
        return group.wait("account", group.on_store(question), GRACE_S)
    except StageFailed:
        return nothing


def _manifest_parts(payload: bytes) -> list[bytes]:
    """Length and payload, cut after HEAD_BYTES; the head is padded, the rest may be missing."""
    message = LENGTH.pack(len(payload)) + payload
    head, rest = message[:HEAD_BYTES].ljust(HEAD_BYTES, b"\0"), message[HEAD_BYTES:]
    return [head, rest] if rest else [head]


def _keys_by_rank(group: EpochGroup, word: str) -> dict[int, str]:
    return {rank: group.key(word, group.num_transfers, rank) for rank in group.receiver_ranks}


def sync_error(
    offer: WeightOffer, text: str, *, missing_ranks: Sequence[int] = ()
) -> WeightSyncError:
    return WeightSyncError(
        f"policy version {offer.policy_version}, epoch {offer.epoch}, {text}",
        missing_ranks=missing_ranks,
    )
