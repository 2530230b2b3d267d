import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speed_async.environments.dataset.reading import (
    dataset_rows,
    file_format,
    first_record,
    open_hub,
    read_rows,
)
from speed_async.errors import DataError
from tests.fakes.published_files import write_json_array, write_json_lines

RECORDS = [{"prompt": "1+1?", "answer": "2"}, {"prompt": 'a, "b"\nc', "answer": "3"}]


def write_csv(path: Path) -> Path:
    path.write_text('prompt,answer\n1+1?,2\n"a, ""b""\nc",3\n')
    return path


def write_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(RECORDS), path)
    return path


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_json_lines(folder / "data.txt", RECORDS),
        lambda folder: write_json_array(folder / "data.json", RECORDS),
        lambda folder: write_csv(folder / "data.csv"),
        lambda folder: write_parquet(folder / "data"),
    ],
)
@pytest.mark.parametrize("compress", [None, gzip.compress, bz2.compress, lzma.compress, zstd])
def test_every_format_is_read_compressed_or_not(
    write: Callable[[Path], Path], compress: Callable[[bytes], bytes] | None, tmp_path: Path
) -> None:
    path = write(tmp_path)
    if compress is not None:
        compressed = path.with_name(path.name + ".z")
        compressed.write_bytes(compress(path.read_bytes()))
        path = compressed
    rows = list(read_rows(path))
    assert [row.record for row in rows] == RECORDS
    assert [row.number for row in rows] == [1, 2]


def test_only_the_chosen_columns_of_a_parquet_file_are_read(tmp_path: Path) -> None:
    rows = read_rows(write_parquet(tmp_path / "data.parquet"), ["answer"])
    assert [row.record for row in rows] == [{"answer": "2"}, {"answer": "3"}]


def test_rows_that_cannot_be_read_keep_their_numbers_and_reasons(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": 1}\n\n{"prompt": \n[1]\n{"prompt": "\xff"}\n')
    rows = {row.number: row.error for row in read_rows(path)}
    assert rows == {
        1: "",
        3: "the line is not valid JSON",
        4: "the row is a list, not an object",
        5: "the line is not valid JSON",
    }


def test_a_csv_row_of_another_length_is_an_error_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,answer\na,1\nb\nc,1,2\n")
    assert [bool(row.error) for row in read_rows(path)] == [False, True, True]


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x89PNG"])
def test_an_unknown_format_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not parquet, a JSON array, JSON lines or CSV"):
        file_format(path)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_a_damaged_compressed_file_is_refused(
    compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl.z"
    lines = "".join(json.dumps({"prompt": str(n), "answer": n}) + "\n" for n in range(9999))
    whole = compress(lines.encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rows(path))


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "data.parquet")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="download it again"):
        list(read_rows(path))


def test_a_missing_file_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        file_format(tmp_path / "data.json")
    with pytest.raises(DataError, match="no rows"):
        first_record(write_json_array(tmp_path / "data.json", []))


def test_a_folder_of_a_data_set_is_loaded_like_one_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    write_json_lines(folder / "train.jsonl", RECORDS)
    write_json_lines(folder / "test.jsonl", RECORDS[:1])
    rows = dataset_rows(open_hub(str(folder), split="test"))
    assert [row.record for row in rows] == RECORDS[:1]


def test_a_data_set_that_cannot_be_reached_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'no/such-set'.*: pass a file"):
        open_hub("no/such-set", remedy="pass a file")
