"""`medim-ray pretrain`: checks, Ray, the trainer, the progress line. What the workers do is in worker.py and loop.py.

The same command starts, resumes and ends a run: what there is to do follows from the newest committed checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs as pafs
import ray
import ray.train
from ray.train import DataConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medim_ray.config.loader import leaves, to_tree
from medim_ray.config.schema import RunConfig
from medim_ray.data.pipeline import ReaderFactory, execution_options
from medim_ray.data.shards import ShardSet
from medim_ray.data.sources.base import absolute
from medim_ray.models.vit import INITS
from medim_ray.track.tracker import FailureNotes, start_tracker
from medim_ray.train.build import build_masking, needs_text, stream_plan
from medim_ray.train.runs import read_config, write_config
from medim_ray.train.store import CheckpointStore
from medim_ray.train.stream import StreamFactory, reader_factory, run_worker


@dataclass(frozen=True)
class RunResult:
    """step: optimizer steps that are committed; finished: the run has reached train.steps."""

    run_dir: str
    step: int
    finished: bool


def launch(config: RunConfig, console: Console | None = None) -> RunResult:
    """Trains to the end of the run or to `train.stop_after`, from wherever its newest checkpoint is.

    ValueError for what the user can mend; RuntimeError, with the workers' error, where training failed.
    """
    console = console or Console(stderr=True)
    shards = check(config)
    config = absolute_paths(config)
    store = CheckpointStore(config.run.dir)
    newest = store.newest(lambda text: console.print(f"[yellow]{text}"))
    if newest is not None and newest.manifest["data_hash"] != shards.content_hash:
        raise ValueError(
            f"{config.run.dir} was trained on other shards: data.shards={config.data.shards} has content "
            f"{shards.content_hash}, its checkpoint {newest.manifest['data_hash']}. Give the "
            "same shards, or another run.dir"
        )
    done = newest.step if newest is not None else 0
    if done >= config.train.last_step:
        console.print(f"{config.run.dir} is at step {done} of {config.train.steps}: nothing to do")
        return RunResult(config.run.dir, done, done >= config.train.steps)
    if not needs_text(config) and config.text != type(config.text)():
        console.print(f"[yellow]text.* is set, but objective.name={config.objective.name} reads no report")
    if newest is not None:
        console.print(f"resuming {config.run.dir} from {newest.name} (step {done} of {config.train.steps})")
    with ThreadPoolExecutor(1) as pool:
        # Looks at encoder and tokenizer, for which it loads timm: seconds that Ray takes to start.
        reader = pool.submit(reader_factory, config, shards)
        with ray_session(config.run.ray_address, _cpus(config)):
            _fit(config, shards, reader.result(), done, console)
    newest = store.newest()
    step = newest.step if newest is not None else 0
    if step < config.train.last_step:
        raise RuntimeError(
            f"the workers ended, but {config.run.dir} holds no checkpoint of step {config.train.last_step} here: "
            "run.dir must be storage that every node sees, such as a shared folder or s3://"
        )
    return RunResult(config.run.dir, step, step >= config.train.steps)


def absolute_paths(config: RunConfig) -> RunConfig:
    """Local paths from the root: workers have working folders of their own, and a run folder outlives this one."""
    init, path = config.encoder.init, config.text.path
    return replace(
        config,
        data=replace(config.data, shards=absolute(config.data.shards)),
        run=replace(config.run, dir=absolute(config.run.dir)),
        track=replace(config.track, aim_repo=config.track.aim_repo and absolute(config.track.aim_repo)),
        encoder=replace(config.encoder, init=init if init in INITS or not Path(init).exists() else absolute(init)),
        text=replace(config.text, path=absolute(path) if path is not None and Path(path).exists() else path),
    )


def check(config: RunConfig) -> ShardSet:
    """What can be known in a moment, before Ray is asked for anything; ValueError with the fix."""
    if not config.run.dir:
        raise ValueError("run.dir is empty: give the folder or URL of the run, e.g. run.dir=runs/first")
    if not config.data.shards:
        raise ValueError("data.shards is empty: give what `medim-ray prepare` wrote, e.g. data.shards=shards/cxr")
    shards = ShardSet.open(config.data.shards)
    stream_plan(config, shards)
    build_masking(config)
    old = read_config(config.run.dir)
    if old is not None and CheckpointStore(config.run.dir).names():
        changed = _changed(old, absolute_paths(config))
        if changed:
            raise ValueError(
                f"{config.run.dir} holds another run: {'; '.join(changed)}. Choose another run.dir, or go back to "
                f"these values to resume"
            )
    return shards


def _changed(old: RunConfig, new: RunConfig) -> list[str]:
    """Options that may not change in a resumed run and do."""
    before = {key: value for key, value, meta in leaves(old) if meta.get("fixed", True)}
    after = {key: value for key, value, meta in leaves(new) if meta.get("fixed", True)}
    keys = sorted(key for key in before | after if before.get(key) != after.get(key))
    return [f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in keys]


def _cpus(config: RunConfig) -> int:
    """Logical CPUs for a Ray that is started here: the workers, the decoding actors, the trial of a sweep."""
    return max(os.cpu_count() or 1, int(config.train.num_workers * config.train.cpus_per_worker) + 1)


@contextlib.contextmanager
def ray_session(address: str, num_cpus: int) -> Iterator[None]:
    """Joins the cluster at `address` or RAY_ADDRESS, or starts Ray here; leaves a running session alone."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    address = address or os.environ.get("RAY_ADDRESS", "")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level="WARNING")
    else:
        ray.init(
            num_cpus=num_cpus,
            object_store_memory=512 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="WARNING",
        )
    try:
        yield
    finally:
        ray.shutdown()


def _aim_repo(config: RunConfig) -> str:
    """Runs beside each other share one repository; a run on object storage has it in the working directory."""
    beside = Path(config.run.dir).resolve().parent if "://" not in config.run.dir else Path.cwd()
    return config.track.aim_repo or str(beside)


def _fit(config: RunConfig, shards: ShardSet, reader: ReaderFactory, done: int, console: Console) -> None:
    write_config(config, shards.content_hash)
    tree = to_tree(config)
    repo = _aim_repo(config) if config.track.aim else ""
    tracker = start_tracker(repo, config.run.dir, tree)
    stream = StreamFactory(
        stream_plan(config, shards),
        reader,
        config.run.dir,
        config.train.last_step,
        config.data.num_actors,
    )
    fs, root = fsspec.core.url_to_fs(config.run.dir)
    env = {"OMP_NUM_THREADS": str(max(1, int(config.train.cpus_per_worker)))}
    if not config.train.use_gpu:
        env["DS_ACCELERATOR"] = "cpu"
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"config": tree, "tracker": tracker},
        torch_config=TorchConfig(backend=None if config.train.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.train.num_workers,
            use_gpu=config.train.use_gpu,
            resources_per_worker={"CPU": config.train.cpus_per_worker, **({"GPU": 1} if config.train.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            # Ray's own record is per launch: what a run has done is told by its checkpoints alone.
            name=f"launch-{uuid.uuid4().hex[:8]}",
            storage_path=f"{root.rstrip('/')}/ray",
            storage_filesystem=pafs.PyFileSystem(pafs.FSSpecHandler(fs)),
            failure_config=FailureConfig(max_failures=config.train.max_failures),
            worker_runtime_env={"env_vars": env},
            callbacks=[FailureNotes(tracker)],
        ),
        datasets={"train": stream},
        dataset_config=DataConfig(execution_options=execution_options()),
    )
    try:
        with progress(config, done, tracker, console):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise RuntimeError(f"training failed: {error}") from error
    finally:
        with contextlib.suppress(ray.exceptions.RayError):  # Aim is a view: its end must not hold up the run's
            dropped = ray.get(tracker.close.remote(), timeout=20)
            if dropped:
                console.print(f"{dropped} records did not reach Aim; metrics.jsonl is complete")
        ray.kill(tracker)


@contextlib.contextmanager
def progress(config: RunConfig, done: int, tracker: Any, console: Console) -> Iterator[None]:
    """A line with step, loss terms, rate, data-wait share and time left, fed by the tracker."""
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[terms]}"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,
    )
    task = bar.add_task("pretrain", total=config.train.last_step, completed=done, terms="starting workers")
    stop = threading.Event()

    def show() -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            record, notes = ray.get([tracker.latest.remote(), tracker.take_notes.remote()], timeout=5)
            for note in notes:
                console.print(f"[yellow]{escape(note)}")
            if record is not None:
                bar.update(task, completed=record["step"] + 1, terms=describe(record))

    def poll() -> None:
        while not stop.wait(0.5):
            show()

    thread = threading.Thread(target=poll, daemon=True)
    with bar:
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            show()


def describe(record: dict[str, Any]) -> str:
    """The numbers of a record that fit on a line."""
    hidden = {"step", "epoch", "lr", "grad_norm", "samples_per_s", "step_s", "data_wait_ratio"}
    terms = [f"{k} {v:.4g}" for k, v in record.items() if k not in hidden and isinstance(v, float) and "/" not in k]
    return " ".join([*terms[:6], f"{record['samples_per_s']:.1f} samples/s", f"wait {record['data_wait_ratio']:.0%}"])


def summary(result: RunResult) -> str:
    """One JSON line for scripts."""
    return json.dumps({"run": result.run_dir, "step": result.step, "finished": result.finished})
