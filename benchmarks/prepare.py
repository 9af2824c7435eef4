"""Question: what does `medim-ray prepare` cost above the bare work, in images per CPU-second?

The bare loop reads, decodes, resizes and encodes the same files in one process with the same functions, and keeps
nothing. `prepare` does that in Ray tasks, hashes pixels, cuts reports, commits parts, finds copies, writes checked
Parquet files, trains the vocabulary. CPU time is user + system of every process of the tree, Ray's own included.

    python -m benchmarks.prepare --num 1500 --size 1024 --format png --pairs 5

Runs are paired and alternate in one process tree; Ray is up, and a first `prepare` of the same job (workers import
OpenCV, Pillow, PyArrow) is reported apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import ray

from benchmarks.process_tree import tree_seconds
from medim_ray.data.images import ImageEncoder, decode_file
from medim_ray.data.ingest import PrepareConfig, prepare
from medim_ray.data.sources import SOURCES


def make_corpus(root: Path, num: int, size: int, kind: str) -> Path:
    """Gray images with the smoothness of a radiograph and some noise, and their table."""
    rng = np.random.default_rng(0)
    lines = ["image_id,patient_id,file,view,sex,age,notes"]
    for k in range(num):
        smooth = cv2.resize(rng.normal(size=(24, 24)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
        image = np.clip(128 + 45 * smooth + rng.normal(scale=3, size=(size, size)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(root / f"{k}.{kind}"), image)
        lines.append(f"i{k},p{k // 2},{k}.{kind},PA,F,{k % 90},Heart size is normal. No effusion. Lungs are clear.")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return root / "metadata.csv"


def bare(files: list[Path]) -> float:
    """CPU seconds of the loop without a framework."""
    cv2.setNumThreads(1)
    encoder, start = ImageEncoder(ImageEncoder.Config()), time.process_time()
    for file in files:
        encoder.encode(encoder.prepare(decode_file(file.read_bytes())))
    return time.process_time() - start


def prepared(table: Path, out: Path) -> tuple[float, float]:
    """CPU and wall seconds of the job."""
    start, cpu = time.monotonic(), tree_seconds()
    prepare(PrepareConfig(source=SOURCES["csv"].Config(path=str(table)), out=str(out), salt="x"))
    return tree_seconds() - cpu, time.monotonic() - start


def main() -> None:
    """Prints a line a pair and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=1500)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--format", choices=("png", "jpg"), default="png")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "corpus"
        root.mkdir()
        table = make_corpus(root, args.num, args.size, args.format)
        files = sorted(root.glob(f"*.{args.format}"))
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        bare(files[:50])
        warm_cpu, warm_s = prepared(table, Path(folder) / "warm")
        print(f"warm-up: {args.num / warm_cpu:.1f} images per CPU-second, {warm_s:.1f} s")
        ratios = []
        for pair in range(args.pairs):
            alone = bare(files)
            cpu, seconds = prepared(table, Path(folder) / f"out{pair}")
            ratios.append(alone / cpu)
            print(
                f"pair {pair}: bare {args.num / alone:.1f} images per CPU-second; prepare {args.num / cpu:.1f}, "
                f"{args.num / seconds:.1f} images/s; ratio {ratios[-1]:.3f}",
                flush=True,
            )
        ray.shutdown()
    what = f"{args.num} {args.format} of {args.size} px"
    print(f"median ratio of {args.pairs} pairs, {what}: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
