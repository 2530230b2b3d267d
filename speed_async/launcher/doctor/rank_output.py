"""Lines that a rank process prints and its parent reads. Libraries may print others between."""

from speed_async.launcher.doctor.records import EXCHANGE, Exchange

STAGE, RESULT = "@doctor-stage ", "@doctor-result "


def print_stage(stage: str) -> None:
    print(f"{STAGE}{stage}", flush=True)


def print_result(result: Exchange) -> None:
    print(f"{RESULT}{EXCHANGE.dump_json(result).decode()}", flush=True)


def read_stage(line: str) -> str | None:
    return line.removeprefix(STAGE).strip() if line.startswith(STAGE) else None


def read_result(line: str) -> Exchange | None:
    return EXCHANGE.validate_json(line.removeprefix(RESULT)) if line.startswith(RESULT) else None
