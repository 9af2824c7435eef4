"""Faults of archives, tables and storage: no row is lost without a word, good rows don't end in quarantine."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medim_ray.data.sources import SOURCES, columnar
from medim_ray.data.sources.base import Sample
from tests.unit.data.test_dicom_everywhere import StumblingFileSystem
from tests.unit.data.test_sources_generic import png, rows_of, samples_of, source


def tar_of(*names: str) -> bytes:
    """A tar whose image members have different pixels."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for value, name in enumerate(names):
            info = tarfile.TarInfo(name)
            data = png(value + 1) if name.endswith("png") else b"Clear."
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def dataset_of(path: Path, data: bytes) -> Any:
    path.write_bytes(data)
    return source("webdataset", path)


def test_dicom_uids_are_keys(tmp_path: Path) -> None:
    members = [f"x/1.2.840.{k}.{ending}" for k in range(5) for ending in ("png", "txt")]
    made = dataset_of(tmp_path / "a.tar", tar_of(*members))
    assert [row["image_id"] for row in rows_of(made)] == [f"a.tar:x/1.2.840.{k}" for k in range(5)]
    assert [int(sample.image_HW[0, 0]) for sample in samples_of(made) if not isinstance(sample, str)] == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["k.png", "k.txt", "k.png"], r"a\.tar: the key 'k' has a second image, 'k\.png', and one would be lost"),
        (["scan.one.png", "scan.two.png"], r"'scan\.one\.png' and 'scan\.two\.png' are of one key, 'scan'"),
    ],
)
def test_members_of_which_an_image_would_be_lost(members: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        dataset_of(tmp_path / "a.tar", tar_of(*members)).plan()


def test_masks_beside_an_image_are_no_images(tmp_path: Path) -> None:
    made = dataset_of(tmp_path / "a.tar", tar_of("k.left.png", "k.right.png", "k.png"))
    (sample,) = samples_of(made)
    assert not isinstance(sample, str) and int(sample.image_HW[0, 0]) == 3


def test_a_tar_that_is_damaged_in_its_middle(tmp_path: Path) -> None:
    data = bytearray(tar_of(*(f"k{k}.png" for k in range(10))))
    at = data.index(b"k3.png")
    data[at : at + 200] = b"\xff" * 200
    with pytest.raises(ValueError, match=rf"a\.tar is damaged at byte {at}, .*: restore or pack it anew"):
        dataset_of(tmp_path / "a.tar", bytes(data)).plan()


def test_tars_put_together_with_cat(tmp_path: Path) -> None:
    made = dataset_of(tmp_path / "a.tar", tar_of("a.png", "b.png") + tar_of("c.png", "d.png"))
    assert [row["image_id"] for row in rows_of(made)] == [f"a.tar:{key}" for key in "abcd"]
    assert [int(sample.image_HW[0, 0]) for sample in samples_of(made) if not isinstance(sample, str)] == [1, 2, 1, 2]


@pytest.mark.parametrize("ending", ["gz", "xz"])
@pytest.mark.parametrize("fault", ["cut off", "damaged"])
def test_a_packed_table_that_is_cut_off_or_damaged(ending: str, fault: str, tmp_path: Path) -> None:
    rows = "".join(f"{k},{np.random.default_rng(k).bytes(9).hex()}\n" for k in range(5000))
    text = f"image_id,file\n{rows}".encode()
    packed = gzip.compress(text) if ending == "gz" else lzma.compress(text)
    half = len(packed) // 2
    damaged = packed[:half] + bytes(byte ^ 0x5A for byte in packed[half : half + 64]) + packed[half + 64 :]
    (tmp_path / f"t.csv.{ending}").write_bytes(packed[:half] if fault == "cut off" else damaged)
    config = SOURCES["csv"].Config(
        path=str(tmp_path / f"t.csv.{ending}"), patient_column="", report_column="", view_column="", label_columns=()
    )
    with pytest.raises(ValueError, match=r"is cut off or damaged: download or copy it again"):
        SOURCES["csv"](config).plan()


def test_parquet_on_storage_that_stumbles_loses_no_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(k + 1) for k in range(3)]}), tmp_path / "t.parquet")
    with fsspec.open("stumbling://set/t.parquet", "wb") as file:
        file.write((tmp_path / "t.parquet").read_bytes())
    made = SOURCES["parquet"](SOURCES["parquet"].Config(path="stumbling://set/t.parquet"))
    rows = made.plan().to_pylist()
    for function in (columnar._parquet, columnar._shape_of, columnar._read):
        function.cache_clear()
    StumblingFileSystem.num_faults = 1
    assert int(made.sample(rows[1]).image_HW[0, 0]) == 2
    for function in (columnar._parquet, columnar._shape_of, columnar._read):
        function.cache_clear()
    StumblingFileSystem.num_faults = 99
    with pytest.raises(RuntimeError, match="the storage keeps failing"):
        made.sample(rows[1])
    StumblingFileSystem.num_faults = 0


def test_a_folder_with_the_ending_of_a_file(tmp_path: Path) -> None:
    """As Spark writes tables."""
    (tmp_path / "t.parquet").mkdir()
    pq.write_table(pa.table({"image": [png()]}), tmp_path / "t.parquet/part-0.parquet")
    assert len(rows_of(source("parquet", tmp_path / "t.parquet"))) == 1
    (tmp_path / "t.tar").mkdir()
    (tmp_path / "t.tar/a.tar").write_bytes(tar_of("k.png"))
    assert len(rows_of(source("webdataset", tmp_path / "t.tar"))) == 1


def test_plans_on_storage_that_stumbles(tmp_path: Path) -> None:
    """Each opening fails once, or for ever."""
    pq.write_table(pa.table({"image": [png()], "txt": ["Clear."]}), tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("image_id,file\n1,1.png\n")
    (tmp_path / "t.tar").write_bytes(tar_of("k.png", "k.txt"))
    plain = {"patient_column": "", "report_column": "", "view_column": "", "label_columns": ()}
    for name, ending, options in (("parquet", "parquet", {}), ("csv", "csv", plain), ("webdataset", "tar", {})):
        url = f"stumbling://plans/t.{ending}"
        with fsspec.open(url, "wb") as file:
            file.write((tmp_path / f"t.{ending}").read_bytes())
        for num_faults in (1, 99):
            for function in (columnar._parquet, columnar._shape_of, columnar._read):
                function.cache_clear()
            StumblingFileSystem.num_faults = num_faults
            try:
                made = SOURCES[name](SOURCES[name].Config(path=url, **options))
                if num_faults == 1:
                    assert len(rows_of(made)) == 1 and StumblingFileSystem.num_faults == 0
                else:
                    with pytest.raises(ValueError, match=rf"{url} can't be read: the storage keeps failing"):
                        made.plan()
            finally:
                StumblingFileSystem.num_faults = 0


class Answers(BaseHTTPRequestHandler):
    """A web server that answers every request with its `status`."""

    status = 503

    def _answer(self) -> None:
        self.send_response(Answers.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = _answer

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (503, r"can't be read: the storage keeps failing \(HTTP status 503\); try again when it answers"),
        (400, "can't be read: the server answers 400"),
        (403, "no permission to read it"),
        (404, "there is no such file or folder"),
    ],
)
@pytest.mark.parametrize(("name", "ending"), [("csv", "csv"), ("parquet", "parquet"), ("webdataset", "tar")])
def test_what_a_web_server_answers(
    name: str, ending: str, status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(Answers, "status", status)
    try:
        with pytest.raises(ValueError, match=message):
            SOURCES[name](SOURCES[name].Config(path=f"http://127.0.0.1:{server.server_port}/t.{ending}")).plan()
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", ["folder", "dicom"])
def test_names_that_are_not_utf_8(name: str, tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"Th\xf6rax.png" if name == "folder" else b"Th\xf6rax.dcm")
    file.write_bytes(png())
    with pytest.raises(ValueError, match=r"the name .*Th\\udcf6rax.* is not UTF-8: rename it"):
        source(name, tmp_path).plan()
    file.rename(tmp_path / f"Th\xf6rax{file.suffix}")
    assert len(rows_of(source(name, tmp_path))) == 1


def test_a_local_name_may_hold_what_chains_urls(tmp_path: Path) -> None:
    (tmp_path / "PACS::2").mkdir()
    (tmp_path / "PACS::2/a::b.png").write_bytes(png(7))
    (sample,) = samples_of(source("folder", tmp_path / "PACS::2"))
    assert isinstance(sample, Sample) and int(sample.image_HW[0, 0]) == 7
    (tmp_path / "PACS::2/t.csv").write_text("image_id,file\n1,a::b.png\n")
    plain = {"patient_column": "", "report_column": "", "view_column": "", "label_columns": ()}
    (sample,) = samples_of(source("csv", tmp_path / "PACS::2/t.csv", **plain))
    assert isinstance(sample, Sample)
    (tmp_path / "PACS::2/t.tar").write_bytes(tar_of("k.png"))
    (sample,) = samples_of(source("webdataset", tmp_path / "PACS::2/t.tar"))
    assert isinstance(sample, Sample)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_closed_folder_in_a_tree_is_named(tmp_path: Path) -> None:
    (tmp_path / "a/closed").mkdir(parents=True)
    (tmp_path / "a/closed").chmod(0)
    with pytest.raises(ValueError, match=rf"no permission to read {tmp_path}/a/closed; check"):
        source("folder", tmp_path).plan()


def test_a_tar_of_dotted_names_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the ending of 'a\.left\.png' begins at its first dot, so it is no image"):
        dataset_of(tmp_path / "a.tar", tar_of("a.left.png", "b.left.png")).plan()


def test_a_tar_whose_first_header_is_damaged(tmp_path: Path) -> None:
    data = tar_of("a.png", "b.png")
    with pytest.raises(ValueError, match=r"a\.tar is damaged at byte 0, .*: restore or pack it anew"):
        dataset_of(tmp_path / "a.tar", b"\xff" * 200 + data[200:]).plan()


def test_json_that_is_none_names_its_tar(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.tar: k\.json is no JSON"):
        dataset_of(tmp_path / "a.tar", tar_of("k.png", "k.json")).plan()
