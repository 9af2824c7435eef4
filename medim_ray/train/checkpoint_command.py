"""`medim-ray checkpoint list|verify|prune RUN`: what a run could go on from, whether it is whole, and what may go."""

from __future__ import annotations

import fsspec
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from medim_ray.data.lease import Lease
from medim_ray.train.runs import LEASE, open_config
from medim_ray.train.store import CheckpointStore
from medim_ray.train.validation import read_best


def run_checkpoint(action: str, run_dir: str, keep: int = 2) -> int:
    """Exit code: 1 where `verify` finds a checkpoint that can't be used, otherwise 0. ValueError: `run_dir` is no run,
    or `prune` while a job trains there.

    list: facts from the manifests; verify: every file against its checksum; prune: removes all but the newest `keep`
    that can be used and the best one, with whatever was never committed.
    """
    open_config(run_dir)
    store = CheckpointStore(run_dir)
    if action == "prune":
        if keep < 1:
            raise ValueError(f"--keep {keep}: must be at least 1, the run goes on from what is kept")
        fs, root = fsspec.core.url_to_fs(run_dir)
        with Lease(fs, f"{root.rstrip('/')}/{LEASE}", what=f"run.dir={run_dir}"):
            return _prune(store, read_best(run_dir), keep)
    table = Table("checkpoint", "steps", "workers", "ZeRO", "size", "state", title=run_dir)
    problems = 0
    for name in store.names():
        problem = store.problem(name) if action == "verify" or not store.is_committed(name) else None
        facts = None
        if store.is_committed(name):
            try:
                facts = store.manifest(name)
            except ValueError as error:
                problem = str(error)
        problems += problem is not None
        if facts is None:
            table.add_row(name, "", "", "", "", str(problem))
            continue
        if store.is_newer(name):
            table.add_row(name, "", "", "", "", problem or "of a newer medim-ray")
            continue
        size = decimal(sum(file.get("bytes", 0) for file in facts["files"].values()))
        state = problem or ("every checksum holds" if action == "verify" else "committed")
        told = (str(facts.get(key, "")) for key in ("step", "world_size", "zero"))
        table.add_row(name, *told, size, state)
    Console().print(table if table.row_count else f"{run_dir} has no checkpoint")
    return 1 if action == "verify" and problems else 0


def _prune(store: CheckpointStore, best: str, keep: int) -> int:
    names, usable = store.names(), list[str]()
    for name in names:
        if problem := store.problem(name):
            print(f"{name}: {problem}")
            if store.is_newer(name):
                print("nothing is removed: update medim-ray first")
                return 0
        else:
            usable.append(name)
    if not usable:
        print("no checkpoint can be used: nothing is removed")
        return 0
    for name in sorted(set(names) - {*usable[:keep], best}):
        store.remove(name)
        print(f"removed {name}")
    return 0
