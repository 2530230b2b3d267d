"""The tables of docs/scaling.md, computed by scaling_constants.py and scaling_model.py.

python -m benchmarks.scaling            print them
python -m benchmarks.scaling --write    write them to docs/scaling.md, after its marker
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace

from benchmarks import scaling_constants as c
from benchmarks.harness import ROOT
from benchmarks.scaling_constants import MODELS, Batch, Lengths, Model
from benchmarks.scaling_model import (
    DIRECT,
    ENGINES,
    FREE,
    LARGE_BUCKETS,
    LEARNER,
    PRESENT,
    RESPONSE,
    SHARDS,
    WHILE_SAMPLING,
    Engine,
    Plan,
    Split,
    best,
    linear_s,
    transfer_s,
)

DOCUMENT = ROOT / "docs" / "scaling.md"
MARKER = "<!-- made by `python -m benchmarks.scaling --write` -->"
GPUS = (8, 64, 256, 1024)
LENGTHS = (Lengths(4096), Lengths(16384))
SMALL = Batch(groups=16, n_init=4, n_cont=20)
LARGE = Batch(groups=512, n_init=4, n_cont=12)
LIMITS = {LEARNER: "learner", ENGINES: "engines", RESPONSE: "response"}
MANY_VERSIONS = 8
MORE_GROUPS = 4

GIGA, TERA = 1e9, 1e12
MEASURED, PUBLISHED, ASSUMED, CODE = "measured", "published", "assumed", "code"

OTHERS = (
    ("verl, NCCL, Qwen3-30B-A3B, 30 receivers, 400 Gb/s", 61e9, 7.0, "verl/checkpoint_engine"),
    ("SGLang and Miles, NCCL broadcast, Kimi-K2 (FP8)", 1e12, 53.0, "lmsys.org, 2026-04-29"),
    ("the same, RDMA point to point", 1e12, 7.2, "lmsys.org, 2026-04-29"),
    ("checkpoint-engine, broadcast, 256 H20, Kimi-K2 (FP8)", 1e12, 16.0, "its README"),
    ("checkpoint-engine, broadcast, 8 H800, Qwen3-235B-A22B", 470e9, 6.2, "its README"),
    ("RDMA writes, 256 to 128 GPUs, Kimi-K2", 1e12, 1.3, "le.qun.ch, 2025-09-17"),
)
"""System, bytes of one copy, seconds per update, source."""


def rows_of(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def number(value: float) -> str:
    """Two significant digits, or a whole number from 10 on."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def pair(values: Iterable[str]) -> str:
    return " / ".join(values)


# --- tables ---------------------------------------------------------------------------------------


def constants() -> list[str]:
    kept = f"{1000 * c.PAUSE_BEYOND_TRANSFER_S:.0f} ms"
    rows = [
        ("H100: bf16, memory", f"{c.PEAK_FLOPS / TERA:.0f} TFLOP/s; {c.HBM_BYTES / GIGA:.0f} GB at"
         f" {c.HBM_BYTES_PER_S / TERA:.2f} TB/s", PUBLISHED, "data sheet"),
        ("one 400 Gb/s card", f"{c.NIC_BYTES_PER_S / GIGA:.0f} GB/s", PUBLISHED,
         "NVIDIA in nccl-tests#290: 46 to 48"),
        ("packed over flat broadcast", f"{c.PACKED_OVER_FLAT}", MEASURED,
         "`benchmarks.weights`, gloo on two cores (0.6 to 0.75); a GPU packs faster"),
        ("verdicts of n receivers", line(c.VERDICTS_S), MEASURED,
         "`benchmarks.rendezvous`, 8 to 128 receivers; beyond, extrapolated"),
        ("rendezvous of n receivers", line(c.RENDEZVOUS_S), MEASURED,
         "the same; excludes connecting and creating the NCCL group"),
        ("pause beyond the transfer", kept, MEASURED, "`running_at_update = keep`, 0.35 M model"),
        ("tokens generated per trained token", f"{c.GENERATED_PER_TRAINED}", MEASURED,
         "tokens per update, SPEED over RLOO, at the real spread"),
        ("service, one core", f"{number(c.SERVICE_MESSAGES_PER_S)} messages/s of 256 tokens;"
         f" {c.SERVICE_BYTES_PER_S / 1e6:.0f} MB/s", MEASURED, "ZeroMQ on loopback, 32,768 tokens"),
        ("bucket, NCCL poll", f"{c.BUCKET_BYTES // c.MIB} MiB, {1000 * c.NCCL_POLL_S} ms", CODE,
         "`weights.bucket_bytes`, `nccl.py`"),
        ("`max_staleness`", f"{c.MAX_STALENESS}", CODE, "default"),
        ("NVLink, one GPU, one direction", f"{c.NVLINK_BYTES_PER_S / GIGA:.0f} GB/s", ASSUMED,
         "two thirds of the nominal 450"),
        ("ring: chunk, hop", f"{c.CHUNK_BYTES // 1024} KiB; {1e6 * c.NODE_HOP_S:.0f} us between"
         f" nodes, {1e6 * c.GPU_HOP_S:.0f} us inside", ASSUMED, "NCCL's simple protocol"),
        ("learner", f"MFU {c.MFU}, {c.TRAINING_BYTES_PER_PARAMETER} bytes a parameter", ASSUMED,
         "fp32 master and AdamW, sharded; 6 x active parameters x tokens, without attention"),
        ("decoding", f"{percent(c.HBM_EFFICIENCY)} of memory's and"
         f" {percent(c.DECODE_FLOPS_EFFICIENCY)} of arithmetic's peak,"
         f" {1000 * c.STEP_OVERHEAD_S:.0f} ms overhead per step", ASSUMED, "bf16, no speculation"),
        ("responses", "mean 4,096 or 16,384 tokens, exponential, truncated at"
         f" {c.CAP_OVER_MEAN} means; prompts of {c.PROMPT_TOKENS}", ASSUMED, ""),
    ]  # fmt: skip
    return rows_of(("constant", "value", "kind", "from"), rows)


def line(fit: tuple[float, float]) -> str:
    return f"{1000 * fit[0]:.1f} ms + {1000 * fit[1]:.3f} ms x n"


def engines() -> list[str]:
    head = ("model", "weights", "engine", "minimum learner GPUs", "sequences per engine")
    head += ("tokens/s per GPU, full", "seconds per mean response, full", "KV recompute, full")
    rows = []
    for model in MODELS:
        both = [Engine(model=model, lengths=lengths) for lengths in LENGTHS]
        full_s = [engine.step_s(engine.max_running) for engine in both]
        rates = [engine.rate(engine.max_running) / model.engine_gpus for engine in both]
        means_s = [lengths.mean * step_s for lengths, step_s in zip(LENGTHS, full_s, strict=True)]
        rows.append((
            model.name, f"{number(model.weight_bytes / GIGA)} GB", f"{model.engine_gpus} GPU",
            str(model.learner_gpus), pair(number(engine.max_running) for engine in both),
            pair(map(number, rates)), pair(map(number, means_s)),
            f"{number(both[0].recompute_s)} s",
        ))  # fmt: skip
    return rows_of(head, rows)


def transfers() -> list[str]:
    schemes = (PRESENT, LARGE_BUCKETS, SHARDS, DIRECT)
    head = ("model", "GPUs", "verdicts, ms", *(f"{scheme.name}, s" for scheme in schemes))
    rows = []
    for model in MODELS:
        for gpus in GPUS:
            learners = model.learner_gpus if gpus <= 8 else max(8, model.learner_gpus)
            actors = (gpus - learners) // model.engine_gpus * model.engine_gpus
            if actors < 1:
                continue
            seconds = [transfer_s(scheme, model, learners, actors) for scheme in schemes]
            verdicts_ms = 1000 * linear_s(c.VERDICTS_S, actors)
            cells = [number(verdicts_ms), *map(number, seconds)]
            rows.append((model.name, f"{gpus:,} ({learners} learn)", *cells))
    return rows_of(head, rows)


def others() -> list[str]:
    rows = [
        (what, f"{seconds} s", number(num_bytes / seconds / GIGA), source)
        for what, num_bytes, seconds, source in OTHERS
    ]
    model = MODELS[-1]
    for gpus in (256, 1024):
        ours_s = transfer_s(PRESENT, model, model.learner_gpus, gpus - model.learner_gpus)
        ours = f"this project, present, {model.name}, {gpus:,} GPUs, computed"
        rows.append((ours, f"{number(ours_s)} s", number(model.weight_bytes / ours_s / GIGA), ""))
    return rows_of(("system", "one update", "GB of one copy per second", "source"), rows)


def runs(batch: Batch) -> list[str]:
    head = ("model", "GPUs", "learner GPUs", "update, s", "limit", "transfer, s")
    head += ("engines paused", "engine rate, of full", "learner waits", "versions per group")
    rows = []
    for model in MODELS:
        for gpus in GPUS:
            found = outcomes(model, gpus, batch)
            cells = ("does not fit", *[""] * 7) if found is None else _cells(found)
            rows.append((model.name, f"{gpus:,}", *cells))
    return rows_of(head, rows)


def outcomes(model: Model, gpus: int, batch: Batch) -> list[Split] | None:
    """One split per response length. None when the model does not fit."""
    found = [
        best(Plan(model=model, gpus=gpus, batch=batch, lengths=lengths)) for lengths in LENGTHS
    ]
    return [one for one in found if one] or None


def _cells(found: list[Split]) -> tuple[str, ...]:
    return (
        pair(str(one.learner_gpus) for one in found),
        pair(number(one.update_s) for one in found),
        pair(dict.fromkeys(LIMITS[one.limit] for one in found)),
        pair(number(one.transfer_s) for one in found),
        pair(percent(one.paused_share) for one in found),
        pair(percent(one.engine_share) for one in found),
        pair(percent(one.learner_wait_share) for one in found),
        pair(f"{one.group_versions:.1f}" for one in found),
    )


def steps() -> list[str]:
    """The gain of each step over the previous ones."""
    window, many = c.MAX_STALENESS, MANY_VERSIONS
    more = replace(LARGE, groups=MORE_GROUPS * LARGE.groups)
    variants = (
        ("present", PRESENT, window, LARGE),
        ("weights at no cost, all else as present", FREE, window, LARGE),
        (f"`max_staleness` = {many}, transfer as at present", PRESENT, many, LARGE),
        ("+ buckets of 1 GiB", LARGE_BUCKETS, many, LARGE),
        ("+ every learner rank sends its shard", SHARDS, many, LARGE),
        (f"+ {MORE_GROUPS} times the groups per update", SHARDS, many, more),
        ("or received while sampling, groups as before", WHILE_SAMPLING, many, LARGE),
    )
    columns = [(model, gpus) for gpus in (256, 1024) for model in MODELS]
    head = ("step", *(f"{model.name}, {gpus:,}" for model, gpus in columns))
    rows = []
    for name, scheme, staleness, batch in variants:
        cells = []
        for model, gpus in columns:
            plan = Plan(
                model=model, gpus=gpus, batch=batch, lengths=LENGTHS[0],
                scheme=scheme, staleness=staleness,
            )  # fmt: skip
            found = best(plan)
            rate = number(batch.completions / found.update_s) if found else "does not fit"
            cells.append(f"{rate} ({LIMITS[found.limit]})" if found else rate)
        rows.append((name, *cells))
    return rows_of(head, rows)


def service() -> list[str]:
    head = ("model", "actors", "reports/s", "other messages/s", "of one core's messages")
    head += ("MB/s", "of one core's bytes", "batch to the learner, s", "buffer, GB")
    rows = []
    for model in MODELS:
        found = outcomes(model, 1024, LARGE)
        assert found is not None
        one = found[0]
        refused = (c.GENERATED_PER_TRAINED - 1) * (LARGE.n_init + LARGE.n_cont) / LARGE.n_init
        group_messages = LARGE.groups * (4 + 3 * refused) / one.update_s
        weight_messages = 2 * one.num_engines / one.update_s
        reports = c.REPORTS_PER_S * one.num_engines
        messages = reports + group_messages + weight_messages
        batch_bytes = LARGE.completions * LENGTHS[0].mean * c.BYTES_PER_TOKEN
        bytes_s = 2 * batch_bytes / one.update_s
        rows.append((
            model.name, str(one.num_engines), number(reports),
            number(group_messages + weight_messages),
            percent(messages / c.SERVICE_MESSAGES_PER_S), number(bytes_s / 1e6),
            percent(bytes_s / c.SERVICE_BYTES_PER_S), number(batch_bytes / c.SERVICE_BYTES_PER_S),
            number((c.MAX_STALENESS + 1) * batch_bytes / GIGA),
        ))  # fmt: skip
    return rows_of(head, rows)


def tables() -> str:
    """All tables, as they appear in the document after its marker."""
    parts = {
        "Constants": constants(),
        "One engine, one copy (responses of 4k / 16k)": engines(),
        "Seconds to send all weights once": transfers(),
        "Published measurements": others(),
        "Runs: 512 groups of 16 per update, present design (4k / 16k)": runs(LARGE),
        "Runs: 16 groups of 24 per update, present design (4k / 16k)": runs(SMALL),
        "Steps: completions trained per second, 512 groups of 16, 4k, each with the previous ones":
            steps(),
        "The service at 1,024 GPUs, 512 groups of 16, 4k": service(),
    }  # fmt: skip
    lines = [MARKER]
    for title, table in parts.items():
        lines += ["", f"### {title}", "", *table]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write to docs/scaling.md")
    if not parser.parse_args().write:
        print(tables())
        return
    text, found, _ = DOCUMENT.read_text().partition(MARKER)
    if not found:
        raise ValueError(f"{DOCUMENT} has no marker line: {MARKER}")
    DOCUMENT.write_text(text + tables())


if __name__ == "__main__":
    main()
