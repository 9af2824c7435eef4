"""`medim-ray checkpoint list|verify|prune RUN`: what a run could go on from, whether it is whole, and what may go."""

from __future__ import annotations

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from medim_ray.train.runs import open_config
from medim_ray.train.store import CheckpointStore


def run_checkpoint(action: str, run_dir: str, keep: int = 2) -> int:
    """Exit code: 1 where `verify` finds a checkpoint that can't be used, otherwise 0. ValueError: `run_dir` is no run.

    list: facts from the manifests; verify: every file against its checksum; prune: all but the newest `keep` that can
    be used, with whatever was never committed.
    """
    open_config(run_dir)
    store = CheckpointStore(run_dir)
    if action == "prune":
        return _prune(store, keep)
    table = Table("checkpoint", "steps", "workers", "ZeRO", "size", "state", title=run_dir)
    problems = 0
    for name in store.names():
        problem = store.problem(name) if action == "verify" or not store.is_committed(name) else None
        problems += problem is not None
        facts = store.open(name).manifest if store.is_committed(name) else None
        if facts is None:
            table.add_row(name, "", "", "", "", str(problem))
            continue
        size = decimal(sum(file["bytes"] for file in facts["files"].values()))
        state = problem or ("every checksum holds" if action == "verify" else "committed")
        table.add_row(name, str(facts["step"]), str(facts["world_size"]), str(facts["zero"]), size, state)
    Console().print(table if table.row_count else f"{run_dir} has no checkpoint")
    return 1 if action == "verify" and problems else 0


def _prune(store: CheckpointStore, keep: int) -> int:
    if keep < 1:
        raise ValueError(f"--keep {keep}: must be at least 1, the run goes on from what is kept")
    newest = store.newest(print)
    if newest is None:
        print("no checkpoint can be used: nothing is removed")
        return 0
    before = set(store.names())
    store.prune(keep, newest.name)
    for name in sorted(before - set(store.names())):
        print(f"removed {name}")
    return 0
