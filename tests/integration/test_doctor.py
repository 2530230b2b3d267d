"""`speed-async doctor` with real rank processes: one machine, and two nodes on this machine."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from speed_async import __version__
from tests.fakes.command_line import run_command
from tests.fakes.run_process import Run, free_port, own_address, start, write_config

ONLY_LOOPBACK = own_address() == "127.0.0.1"


def several_nodes(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(ONLY_LOOPBACK, reason="this machine has only loopback addresses")
    return pytest.mark.multinode(skip(test))


LONG = ("--timeout", "200")
"""The nodes wait for each other; reached only on a failure."""


def section(lines: list[str], heading: str) -> list[str]:
    """Lines of the section with this heading."""
    found = []
    for line in lines[lines.index(heading) + 1 :]:
        if not line.startswith("  "):
            break
        found.append(line.strip())
    return found


def errors(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("error: ")]


def start_node(folder: Path, *options: str) -> Run:
    command = [sys.executable, "-m", "speed_async", "doctor", str(write_config(folder))]
    return start(folder, [*command, *options])


def two_nodes(*options: str) -> list[str]:
    host = own_address()
    return [
        *("--nnodes", "2", "--nproc-per-node", "1", "--cluster.host", host),
        *("--cluster.security", "insecure", "--cluster.service_port", str(free_port(host))),
        *options,
    ]


def test_without_a_configuration_two_ranks_are_measured_and_torch_stays_out_of_the_parent(
    tmp_path: Path,
) -> None:
    code = (
        "import sys\nfrom speed_async.cli import main\nsys.argv = ['speed-async', 'doctor']\n"
        "try:\n    main()\nfinally:\n"
        "    print(sorted({'torch', 'transformers'} & {*sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr + done.stdout
    *lines, outcome, imported = done.stdout.splitlines()
    assert (outcome.partition(",")[0], imported) == ("ok", "[]")
    assert f"speed_async {__version__}" in section(lines, "versions")
    assert any(line.startswith("cores: ") for line in section(lines, "machine"))
    ranks = section(lines, "ranks")
    assert ranks[0] == "2 ranks on 1 node"
    assert any(line.startswith("gloo: all-reduce of 16.0 MiB in ") for line in ranks)
    assert [*tmp_path.iterdir()] == []


def test_json_is_one_object_with_the_checks_and_the_figures_as_numbers(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    options = ("--json", "--run.folder", str(tmp_path / "file" / "run"))
    (tmp_path / "file").write_text("")
    status, out, err = run_command(tmp_path, "doctor", str(config), *options)
    record: dict[str, Any] = json.loads(out)
    assert (status, err, record["ok"]) == (1, "", False)
    [error] = record["errors"]
    assert (error["field"], error["value"]) == ("run.folder", str(tmp_path / "file" / "run"))
    assert error["remedy"] in error["text"]
    assert "11 tokens" in str(record["sections"]["first prompt"])
    measured = record["measured"]
    assert measured["versions"]["speed_async"] == __version__
    assert measured["machine"]["num_cores"] > 0
    first, second = measured["ranks"]
    assert (first["rank"], first["round_trip_s"]) == (0, None)
    assert second["round_trip_s"] > 0
    assert second["all_reduce_s"]["gloo"] > 0
    assert second["faults"] == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "file"]


def test_all_errors_of_a_configuration_are_listed_beside_the_machine(tmp_path: Path) -> None:
    text = 'algorithm = "speed-rloo"\n[task]\nname = "arithmetic"\n[gate]\nlow = 0.9\nhigh = 0.1\n'
    config = write_config(tmp_path, text)
    status, out, _ = run_command(tmp_path, "doctor", str(config), "--lr", "1")
    lines = out.splitlines()
    assert (status, lines[-1]) == (1, "3 errors")
    for message in ("'gate.low' = 0.9", "'model' = None: is required", "did you mean --learner.lr"):
        assert message in "".join(errors(lines))
    assert section(lines, "versions")
    assert section(lines, "ranks") == ["not started: the configuration has errors"]


def test_json_is_also_printed_for_a_file_that_does_not_exist(tmp_path: Path) -> None:
    status, out, err = run_command(tmp_path, "doctor", "absent.toml", "--json")
    record = json.loads(out)
    assert (status, err) == (1, "")
    assert [error["value"] for error in record["errors"]] == ["absent.toml"]


def test_every_rank_of_the_configuration_is_started_despite_other_errors(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    overrides = ("--learner.lr", "fast", "--cluster.actors", "2")
    status, out, _ = run_command(tmp_path, "doctor", str(config), *overrides)
    lines = out.splitlines()
    assert (status, lines[-1]) == (1, "1 error")
    assert section(lines, "ranks")[0] == "3 ranks on 1 node"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nnodes", "2"), "several nodes need a CONFIG"),
        (("--learner.lr", "1"), "overrides need a CONFIG"),
    ],
)
def test_what_needs_a_configuration_says_so(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    status, _, err = run_command(tmp_path, "doctor", *arguments)
    assert status == 2
    assert message in err


def run_nodes(folder: Path, *options: str, second: Sequence[str] = ()) -> list[list[str]]:
    """Lines of two nodes with a rank each; `second`: further options of node 1."""
    arguments = two_nodes(*LONG, *options)
    nodes = []
    for index, own in enumerate([(), second]):
        (folder / f"node-{index}").mkdir()
        options = (*arguments, "--node-rank", str(index), *own)
        nodes.append(start_node(folder / f"node-{index}", *options))
    try:
        ends = [node.finish() for node in nodes]
        assert [err for _, _, err in ends] == ["", ""]
        assert all((status == 1) == bool(errors(out.splitlines())) for status, out, _ in ends)
        assert nodes[0].processes() == nodes[1].processes() == {}
        return [out.splitlines() for _, out, _ in ends]
    finally:
        for node in nodes:
            node.kill()


@several_nodes
def test_two_nodes_form_one_group_and_compare_their_clocks(tmp_path: Path) -> None:
    first, second = run_nodes(tmp_path)
    for lines in (first, second):
        assert lines[-1].startswith("ok"), lines
        ranks = section(lines, "ranks")
        assert ranks[0] == "2 ranks on 2 nodes"
        assert " from node 0" in ranks[2]
        assert any(line.startswith("gloo: all-reduce of 16.0 MiB in ") for line in ranks)
    assert "disk" in first
    assert "disk" not in second  # the run folder is that of node 0


@several_nodes
def test_nodes_with_other_data_both_report_it(tmp_path: Path) -> None:
    for lines in run_nodes(tmp_path, second=("--task.max_digits", "3")):
        [error] = errors(lines)
        assert error.startswith("error: data differs between nodes: ")
        assert "correct task.path on one of them" in error


@several_nodes
@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (0, "1 of 2 nodes answered within 2 s: node 1 is missing; start `speed-async doctor ..."),
        (1, "cannot reach node 0 at {address} ("),
    ],
)
def test_a_missing_node_is_named_within_the_timeout(
    tmp_path: Path, present: int, expected: str
) -> None:
    options = two_nodes("--node-rank", str(present), "--timeout", "2")
    address = f"{own_address()}:{options[options.index('--cluster.service_port') + 1]}"
    status, out, _ = run_command(tmp_path, "doctor", str(write_config(tmp_path)), *options)
    [error] = errors(out.splitlines())
    assert status == 1
    assert error.removeprefix("error: ").startswith(expected.format(address=address))
    assert f"open port {address.rpartition(':')[2]} from " in error
    assert f"--node-rank {1 - present}`" in error


@several_nodes
def test_port_in_use_is_an_error_and_starts_no_rank(tmp_path: Path) -> None:
    options = two_nodes()
    port = int(options[options.index("--cluster.service_port") + 1])
    with socket.create_server((own_address(), port)):
        status, out, _ = run_command(tmp_path, "doctor", str(write_config(tmp_path)), *options)
    assert status == 1
    assert any("the ranks cannot meet at " in error for error in errors(out.splitlines()))
