"""Question: how long from the command to the first step, after a worker was killed, and when a run goes on?

    python -m benchmarks.restarts --turns 3         what is missing in jobs/results/restarts.jsonl, then the table
    python -m benchmarks.restarts --compare         the table, from the file

MAE, ViT-Small at 224 px, ZeRO 0, a checkpoint every two steps, Ray included. A turn: torchrun + DDP to its first step
(the plain loop of engine_peer.py); `medim-ray pretrain` to its first step; one of its workers is killed (SIGKILL)
behind a committed checkpoint, and the next step counts that the new workers make; SIGTERM, and the same command to its
first step. The ratio to the plain loop is what a machine does not change; the parts are those of `startup_s`. The files
that a process loads are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engine import ROOT, command_of, environment, run_plain, shards_of
from benchmarks.plan_steps import machine, rows_of

OUT = ROOT / "jobs" / "results" / "restarts.jsonl"
STARTS = ("first_step", "killed", "resumed")
_LONGEST_S = 600.0


def records_of(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl so far."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def wait_for(run: Path, wanted: Callable[[dict[str, Any]], bool], process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The first record that is wanted. RuntimeError: the command ended, or it takes too long."""
    until = time.monotonic() + _LONGEST_S
    while time.monotonic() < until:
        if found := next((record for record in records_of(run) if wanted(record)), None):
            return found
        if process.poll() is not None:
            raise RuntimeError(f"the command ended ({process.returncode}): {(run / 'output.log').read_text()[-2000:]}")
        time.sleep(0.05)
    raise RuntimeError(f"no such step in {_LONGEST_S:.0f} s: {(run / 'output.log').read_text()[-2000:]}")


def worker_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    """A worker of Ray Train below the command."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if any("RayTrainWorker" in part for part in child.cmdline()):
            return child
    raise RuntimeError("no worker of Ray Train is there")


def start(command: Sequence[str], run: Path) -> tuple[subprocess.Popen[bytes], float]:
    """The command in the background, and when it began (Unix time)."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "output.log").open("a") as log:
        began = time.time()
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT), began


def measure(shards: str, workers: int) -> dict[str, Any]:
    """One turn: seconds of each start, and what they went to."""
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="medim-ray-restarts-") as folder:
        plain, run = Path(folder) / "plain", Path(folder) / "run"
        began = time.time()
        run_plain(shards, plain, workers, 2)
        row["plain_s"] = records_of(plain)[0]["ended_at"] - began
        command = command_of(shards, run, workers, 10_000, 0, checkpoint_every=2)
        process, began = start(command, run)
        try:
            first = wait_for(run, lambda record: True, process)
            row |= told("first_step", first, began)
            wait_for(run, lambda record: record["step"] >= 4, process)
            worker_of(process).kill()
            killed_at = time.time()
            later = wait_for(run, lambda r: "startup_s" in r and r["ended_at"] > killed_at, process)
            row |= told("killed", later, killed_at)
            process.send_signal(signal.SIGTERM)
            process.wait(_LONGEST_S)
            process, began = start(command, run)
            row |= told("resumed", wait_for(run, lambda r: r["ended_at"] > began, process), began)
            process.send_signal(signal.SIGTERM)
            process.wait(_LONGEST_S)
        finally:
            process.kill()
    return row


def told(start: str, record: dict[str, Any], began: float) -> dict[str, Any]:
    """The seconds of a start, and its parts."""
    return {f"{start}_s": record["ended_at"] - began, f"{start}_parts": record["startup_s"]}


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Medians over the turns, and over the plain loop's start in the same turn."""
    print("| workers | turns | start | seconds, median (each) | over plain's start | what it went to |")
    print("|---|---|---|---|---|---|")
    for workers in sorted({row["workers"] for row in rows}):
        own = [row for row in rows if row["workers"] == workers]
        for name in ("plain", *STARTS):
            seconds = [row[f"{name}_s"] for row in own]
            ratio = statistics.median(row[f"{name}_s"] / row["plain_s"] for row in own)
            parts = own[-1].get(f"{name}_parts", {})
            print(
                f"| {workers} | {len(own)} | {name} "
                f"| {statistics.median(seconds):.1f} ({', '.join(f'{s:.1f}' for s in seconds)}) | {ratio:.2f} "
                f"| {', '.join(f'{part} {s:.1f}' for part, s in parts.items())} |"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", nargs="+", type=int, default=[2])
    parser.add_argument("--shards", type=Path, default=Path(tempfile.gettempdir()) / "medim-ray-engine-shards")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--compare", action="store_true", help="measure nothing, print the table of --out")
    args = parser.parse_args(arguments)
    rows = rows_of(args.out)
    if not args.compare:
        shards = shards_of(args.shards)
        done = {(row["workers"], row["turn"]) for row in rows}
        for turn in range(args.turns):
            for workers in args.workers:
                if (workers, turn) not in done:
                    rows.append({"workers": workers, "turn": turn, **machine(), **measure(shards, workers)})
                    with args.out.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    table(rows)


if __name__ == "__main__":
    main()
