"""`medim-ray pretrain`: checks, Ray, the trainer, the progress line. What the workers do is in worker.py and loop.py.

The same command starts, resumes and ends a run: what there is to do follows from the newest committed checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs as pafs
import ray
import ray.train
from ray.train import DataConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from rich.console import Console
from rich.markup import escape

from medim_ray.config.loader import to_tree
from medim_ray.config.schema import RunConfig
from medim_ray.data.lease import Lease
from medim_ray.data.pipeline import ReaderFactory, execution_options
from medim_ray.data.shards import ShardSet
from medim_ray.data.storage import is_local, storage_faults
from medim_ray.session import ray_session, store_of
from medim_ray.track.aim_run import repo_of
from medim_ray.track.tracker import start_tracker
from medim_ray.train.attempts import Budgets, of_error, of_outcome
from medim_ray.train.backend import WorkerBackend
from medim_ray.train.before import Look
from medim_ray.train.build import needs_text, stream_bytes, stream_plan
from medim_ray.train.checks import absolute_paths, check
from medim_ray.train.control import RESIZE, STOP, Outcome
from medim_ray.train.fit import Estimate, estimate, resolve_stage
from medim_ray.train.growth import Growth
from medim_ray.train.progress import progress
from medim_ray.train.runs import LEASE, write_config
from medim_ray.train.signals import aside, stop_signals
from medim_ray.train.snapshots import snapshot_every
from medim_ray.train.startup import Startup
from medim_ray.train.store import Checkpoint, CheckpointStore, Start
from medim_ray.train.stream import StreamFactory, attend_factory, reader_factory, run_worker
from medim_ray.train.validation import Validate, unvalidated, validation

_NEVER_S = 1e9
_START_S = 30.0  # seconds after a stop signal in which workers that are starting may make their first step


Watch = Callable[[RunConfig, Any], Callable[[], Look] | None]
"""From the configuration and the objective of a worker to what is called before a step (before.py)."""


@dataclass(frozen=True)
class RunResult:
    """step: optimizer steps that are committed; finished: the run has reached train.steps; signal: what asked the run
    to end before, 0 where nothing did."""

    run_dir: str
    step: int
    finished: bool
    signal: int = 0


def launch(
    config: RunConfig,
    console: Console | None = None,
    validate: Validate | None = None,
    watch: Watch | None = None,
    startup: Startup | None = None,
) -> RunResult:
    """Trains to the end of the run or to `train.stop_after`, from wherever its newest checkpoint is; SIGTERM, SIGINT
    and SIGUSR1 make it commit a checkpoint and return. validate: probes a committed checkpoint, where
    `validate` names what (train/validation.py); watch: makes the look at a run's maps
    (`maps.every`). startup: of the command, where its time counts.

    ValueError for what the user can mend; RuntimeError, with the workers' error, where training failed.
    """
    console, startup = console or Console(stderr=True), startup or Startup()
    console.soft_wrap = not console.is_terminal  # a message of a log file is one line
    shards = check(config)
    if validate is not None and config.validate.is_asked:
        validate.check(config, shards)
    config = absolute_paths(config)
    with storage_faults(f"run.dir={config.run.dir}"):
        fs, root = fsspec.core.url_to_fs(config.run.dir)
        if fs.isfile(root):
            raise ValueError(f"run.dir={config.run.dir} is a file: give a folder, it is made where it is not there")
        try:
            with Lease(fs, f"{root.rstrip('/')}/{LEASE}", what=f"run.dir={config.run.dir}"):
                return _launch(config, shards, console, validate, watch, startup)
        finally:
            if is_local(fs):  # what was refused before it began leaves nothing behind
                with contextlib.suppress(OSError):
                    Path(root).rmdir()


def _launch(
    config: RunConfig,
    shards: ShardSet,
    console: Console,
    validate: Validate | None,
    watch: Watch | None,
    startup: Startup,
) -> RunResult:
    launched_at = startup.began
    newest = _newest(config, shards, lambda text: console.print(f"[yellow]{text}"))
    done = newest.step if newest is not None else 0
    if done >= config.train.last_step:
        if validate is not None and (left := unvalidated(config)):
            _validate_rest(config, validate, left, console)
        console.print(f"{config.run.dir} is at step {done} of {config.train.steps}: nothing to do")
        return RunResult(config.run.dir, done, done >= config.train.steps)
    if not needs_text(config) and config.text != type(config.text)():
        console.print(f"[yellow]text.* is set, but objective.name={config.objective.name} reads no report")
    if newest is not None:
        console.print(f"resuming {config.run.dir} from {newest.name} (step {done} of {config.train.steps})")
    startup.mark("checks")
    with ThreadPoolExecutor(1) as pool:
        # Looks at encoder and tokenizer, for which it loads timm: seconds that Ray takes to start.
        reader = pool.submit(reader_factory, config, shards)
        plan = pool.submit(estimate, config)
        with ray_session(config.run.ray_address, _cpus(config), store_of(stream_bytes(config))) as is_ours:
            startup.mark("starting Ray")
            look_at_resources(config, console)
            make_reader = reader.result()
            config, flops_per_image = _with_stage(config, plan, console)
            startup.mark("looking at the model")
            pace: dict[str, Any] = {
                "launched_at": launched_at,
                "flops_per_image": flops_per_image,
                "watch": watch and pickle.dumps(watch),  # the processes on its way to the workers load none of it
            }
            trainer_class = _LoneTrainer if is_ours else TorchTrainer
            signal_number = _attempts(
                config, shards, make_reader, newest, console, validate, startup, pace, trainer_class
            )
    step = _store(config).committed_step()
    if step < config.train.last_step and not signal_number:
        raise RuntimeError(
            f"the workers ended, but {config.run.dir} holds no checkpoint of step {config.train.last_step} here: "
            "run.dir must be storage that every node sees, such as a shared folder or s3://"
        )
    if signal_number:
        console.print(f"{signal.Signals(signal_number).name}: stopped after step {step}; the same command goes on")
    return RunResult(config.run.dir, step, step >= config.train.steps, signal_number)


def _validate_rest(config: RunConfig, validate: Validate, left: Sequence[str], console: Console) -> None:
    """Validates what a command that was killed behind the last step has left."""
    console.print(f"{config.run.dir}: validating {', '.join(left)}")
    with (
        ray_session(config.run.ray_address, _cpus(config)),
        _tracking(config, console) as tracker,
        stop_signals() as received,
        validation(config, validate, tracker, received, console),
    ):
        pass  # it waits for them


def _with_stage(config: RunConfig, plan: Future[Estimate], console: Console) -> tuple[RunConfig, float | None]:
    """Tells the memory that a worker will need, and settles `train.zero: auto` by it; operations of an image, None
    where the planner has no model of the run."""
    try:
        need = plan.result()
        config = resolve_stage(config, need)
    except ValueError:
        if config.train.zero == "auto":
            raise
        return config, None  # what the planner has no model of can be trained all the same
    console.print(need.line(config.train.stage), soft_wrap=True, highlight=False)
    return config, need.flops_per_image


def look_at_resources(config: RunConfig, console: Console) -> None:
    """ValueError where the Ray that was started here can never hold the workers; a note where a cluster may still grow
    to what they need (Ray would wait without a word), and where its object store is small for the stream."""
    have = ray.cluster_resources()
    room, wanted = have.get("object_store_memory", 0.0), stream_bytes(config)
    if room < 0.95 * wanted:
        console.print(
            f"[yellow]the object store of this Ray holds {room / 2**20:.0f} MiB, the stream has up to "
            f"{wanted / 2**20:.0f} MiB on its way: decoding may wait for room. Start Ray with --object-store-memory="
            f"{wanted}, or lower data.window_steps={config.data.window_steps}"
        )
    num = config.train.min_workers
    need = {"CPU": num * config.train.cpus_per_worker, "GPU": float(num * config.train.use_gpu)}
    lacking = [
        f"{value:g} {kind}s (has {have.get(kind, 0):g})" for kind, value in need.items() if have.get(kind, 0) < value
    ]
    if not lacking:
        return
    fix = "use fewer train.num_workers, train.use_gpu=false, or a cluster that has them (run.ray_address)"
    if not (config.run.ray_address or os.environ.get("RAY_ADDRESS")):
        raise ValueError(f"train.num_workers={num} needs {' and '.join(lacking)} on this machine: {fix}")
    console.print(f"[yellow]waiting for the cluster to grow: {num} workers need {' and '.join(lacking)}")


def _newest(config: RunConfig, shards: ShardSet, report: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that the run goes on from; ValueError where it was trained on other data."""
    newest = _store(config).newest(report)
    if newest is not None and newest.manifest["data_hash"] != shards.content_hash:
        raise ValueError(
            f"{config.run.dir} was trained on other shards: data.shards={config.data.shards} has content "
            f"{shards.content_hash}, its checkpoint {newest.manifest['data_hash']}. Give the same shards, or another "
            "run.dir"
        )
    return newest


def _store(config: RunConfig) -> CheckpointStore:
    return CheckpointStore(config.run.dir, config.train.storage_patience_s)


def _attempts(
    config: RunConfig,
    shards: ShardSet,
    reader: ReaderFactory,
    newest: Checkpoint | None,
    console: Console,
    validate: Validate | None,
    startup: Startup,
    pace: dict[str, Any],
    trainer_class: type[TorchTrainer],
) -> int:
    """Groups of workers, one after the other, until the run is where it should be; the signal that ended it before.

    pace: what the workers need to tell the run's throughput. RuntimeError where a budget is spent (attempts.py).
    """
    write_config(config, shards.content_hash)
    budgets = Budgets(config.train)
    growth = Growth(config.train)
    store = _store(config)
    start = _start(newest, store.next_attempt())
    with (
        _tracking(config, console) as tracker,
        progress(config.train.last_step, start.step, tracker, console),
        stop_signals() as received,
        validation(config, validate, tracker, received, console),
    ):
        while True:
            try:
                settings = {"start": start, "startup": startup, **pace}
                trainer = _trainer(trainer_class, config, shards, reader, tracker, settings)
                failure = of_outcome(_fit(trainer, tracker, received, growth))
            except ray.train.TrainingFailedError as error:
                failure, cause = of_error(error), error
            else:
                cause = None
            if failure is not None and received:
                console.print(f"[yellow]{escape(str(failure))}: what was not committed before is lost")
            if failure is None or received:
                return received[0] if received else 0
            startup = Startup()
            newest = store.newest(lambda text: console.print(f"[yellow]{escape(text)}", highlight=False))
            start = _start(newest, max(start.attempt + 1, store.next_attempt()))
            if start.step >= config.train.last_step:
                console.print(
                    f"[yellow]{escape(str(failure))}: after the last step was committed, which changes nothing"
                )
                return 0
            why_enough = budgets.exhausted_by(failure, start.step)
            if why_enough:
                console.print(failure.details, markup=False, highlight=False)
                raise RuntimeError(f"training ended after step {start.step}: {failure} ({why_enough})") from cause
            startup.mark("verifying the checkpoint")
            console.print(f"[yellow]{escape(str(failure))}: going on from step {start.step}")


@contextlib.contextmanager
def _tracking(config: RunConfig, console: Console) -> Iterator[Any]:
    """The run's tracker, which takes the last records in before it ends."""
    tree = to_tree(config)
    tracker = start_tracker(
        repo_of(config.run.dir, config.track.aim_repo) if config.track.aim else "", config.run.dir, tree
    )
    try:
        yield tracker
    finally:
        try:  # Aim is a view: its end must not hold up the run's
            dropped = ray.get(tracker.close.remote(), timeout=20)
            if dropped:
                console.print(f"{dropped} records did not reach Aim; metrics.jsonl is complete")
        except ray.exceptions.RayError:
            console.print("[yellow]Aim did not take the last records in time; metrics.jsonl is complete")
        ray.kill(tracker)


def _start(newest: Checkpoint | None, attempt: int) -> Start:
    return Start("", 0, attempt) if newest is None else Start(newest.name, newest.step, attempt)


def _fit(trainer: TorchTrainer, tracker: Any, received: list[int], growth: Growth) -> Outcome:
    """What the workers return; the first signal received asks them to commit a checkpoint and end, and so does room for
    a larger group."""
    with contextlib.suppress(ray.exceptions.RayError):  # the tracker is a view: it may be starting again
        ray.get(tracker.begin.remote(), timeout=20)
    growth.begin()
    future: Future[Outcome] = aside(lambda: trainer.fit().return_value)
    asked_at: float | None = None
    while not wait([future], timeout=0.2).done:
        if received:
            tracker.ask.remote(STOP)  # again and again: the actor may have been started anew
        if received and asked_at is None:
            asked_at = time.monotonic()
        elif asked_at is not None and time.monotonic() > asked_at + _START_S and _latest(tracker) is None:
            return Outcome(kind="stopped", step=0, message="no worker has started")  # there is no state to commit
        elif asked_at is None and growth.is_due():
            record = _latest(tracker)
            if record and growth.look(record["num_workers"]):
                tracker.ask.remote(RESIZE)
    return future.result()


def _latest(tracker: Any) -> dict[str, Any] | None:
    """The newest record of this group of workers, None before their first step; {} where the tracker can't tell."""
    try:
        record: dict[str, Any] | None = ray.get(tracker.latest.remote(), timeout=20)
    except ray.exceptions.RayError:
        return {}
    return record


def _cpus(config: RunConfig) -> int:
    """Logical CPUs for a Ray that is started here: the workers, the decoding actors, a validation."""
    beside = 1 + (math.ceil(config.validate.num_cpus) if config.validate.is_asked else 0)
    return max(os.cpu_count() or 1, math.ceil(config.train.max_workers * config.train.cpus_per_worker) + beside)


class _LoneTrainer(TorchTrainer):
    """In a Ray that ends with this command, so that no node of it is taken away and nothing outlives the controller:
    without the actors that watch for either (one by an option, see below), each a process that loads Ray Train."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def _trainer(
    trainer_class: type[TorchTrainer],
    config: RunConfig,
    shards: ShardSet,
    reader: ReaderFactory,
    tracker: Any,
    settings: dict[str, Any],
) -> TorchTrainer:
    """One group of workers; settings: for each, beside the configuration. Ray Train retries nothing by itself:
    attempts.py tells failures apart."""
    train = config.train
    stream = StreamFactory(
        stream_plan(config, shards),
        reader,
        settings["start"].step,
        train.last_step,
        config.data.num_actors,
        attend_factory(config),
        config.run.dir,
        snapshot_every(config),
    )
    fs, root = fsspec.core.url_to_fs(config.run.dir)
    env = {"OMP_NUM_THREADS": str(max(1, int(train.cpus_per_worker)))}
    if not train.use_gpu:
        env["DS_ACCELERATOR"] = "cpu"
    # Read by Ray Train's controller, and passed on to it, when it starts.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "2")
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = str(int(trainer_class is not _LoneTrainer))
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(train.hang_timeout_s)
    # Ray Train takes as many workers as there is room for; when to grow is decided here (growth.py).
    elastic = {} if isinstance(train.num_workers, int) else {"elastic_resize_monitor_interval_s": _NEVER_S}
    return trainer_class(
        run_worker,
        train_loop_config={"config": to_tree(config), "tracker": tracker, **settings},
        torch_config=WorkerBackend("nccl" if train.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=train.use_gpu,
            resources_per_worker={"CPU": train.cpus_per_worker, **({"GPU": 1} if train.use_gpu else {})},
            **elastic,
        ),
        run_config=ray.train.RunConfig(
            # Ray's own record is per attempt: what a run has done is told by its checkpoints alone.
            name=f"launch-{uuid.uuid4().hex[:8]}",
            storage_path=f"{root.rstrip('/')}/ray",
            storage_filesystem=pafs.PyFileSystem(pafs.FSSpecHandler(fs)),
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
            worker_runtime_env={"env_vars": env},
        ),
        datasets={"train": stream},
        dataset_config=DataConfig(execution_options=execution_options()),
    )


def summary(result: RunResult) -> str:
    """One JSON line for scripts."""
    return json.dumps({"run": result.run_dir, "step": result.step, "finished": result.finished})
