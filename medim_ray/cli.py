"""The commands of `medim-ray`. A command's subject may be positional, switches are --options, and all that changes a
result is `key=value`, parsed into the command's own typed root. Work is done elsewhere; imports are made when needed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from medim_ray import __version__
from medim_ray.config.loader import describe, load, run_hash, to_yaml

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit code 0: done; 1: the command says no or the work failed; 2: the input is at fault."""
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    if more and (not hasattr(args, "overrides") or any(text.startswith("-") for text in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # key=value after an option: argparse takes the words of a list in one piece only
        args.overrides = [*args.overrides, *more]
    # Ray starts local clusters with token authentication, as it should, and warns that it does.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    command: Command = args.command
    try:
        return command(args)
    except ValueError as error:
        print(f"medim-ray: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (RuntimeError, OSError) as error:
        print(f"medim-ray: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="medim-ray", description="Pretrain chest X-ray encoders on a cluster.")
    parser.add_argument("--version", action="version", version=f"medim-ray {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, meaning: str, *, config: bool = False, overrides: bool = True) -> Any:
        sub = commands.add_parser(name, help=meaning, description=meaning)
        sub.set_defaults(command=command)
        if config:
            sub.add_argument("--config", metavar="FILE", help="YAML file; may inherit from one parent")
        if overrides:
            where = "`medim-ray config --fields`" if config else "--fields"
            sub.add_argument("overrides", nargs="*", metavar="key=value", help=f"dotted options, see {where}")
            if not config:
                sub.add_argument("--fields", action="store_true", help="list every option with type, default, meaning")
        return sub

    ingest = add("prepare", _prepare, "images and reports, anywhere, into shards", config=True)
    ingest.add_argument("--list-sources", action="store_true", help="the datasets and formats that can be read")
    add("pretrain", _pretrain, "train an encoder on shards; the same command resumes it", config=True)
    add("probe", _probe, "frozen-feature probes: run=PATH probe.labels=[view,sex]; or compare RUN_A RUN_B")
    sweep = add("sweep", _sweep, "search mask ratios, strategies, any option, against a probe", config=True)
    sweep.add_argument("--dry-run", action="store_true", help="check every point and list the trials; runs nothing")
    sweep.add_argument("--fields", action="store_true", help="list every option with type, default, meaning")
    ablate = add("ablate", _ablate, "a study: named arms of a recipe, times seeds, against a reference", config=True)
    ablate.add_argument("--dry-run", action="store_true", help="check every run and list them; runs nothing")
    ablate.add_argument("--fields", action="store_true", help="list every option with type, default, meaning")
    add("masks", _masks, "a gallery of a run's masks: run=PATH num=16 out=masks.html")
    add("export", _export, "a run's encoder for other software: run=PATH format=timm out=DIR")
    page = add(
        "report", _report, "report.html of a run, a sweep or a study: curves, masks, probes, tables", overrides=False
    )
    page.add_argument("run", metavar="RUN|SWEEP|STUDY", type=_folder)
    page.add_argument("--no-text", action="store_true", help="leave the words of the reports out")
    aim = "put the figures into Aim too, without text: into REPO, or where the run's curves are"
    page.add_argument("--aim", metavar="REPO", nargs="?", const="", help=aim)
    keep = add("checkpoint", _checkpoint, "list, verify or prune the checkpoints of a run", overrides=False)
    keep.add_argument("action", choices=("list", "verify", "prune"))
    keep.add_argument("run", type=_folder)
    keep.add_argument("--keep", type=int, default=2, help="prune: checkpoints that stay, the newest ones (2)")
    plan = add("plan", _plan, "memory, time and cost of a recipe on a cluster: cluster=FILE", config=True)
    plan.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    plan.add_argument("--compare", action="store_true", help="ZeRO stage x micro-batch x GPUs")
    plan.add_argument("--html", metavar="OUT", help="also a page with figures")
    show = add("config", _config, "the resolved configuration and its hash", config=True)
    show.add_argument("--fields", action="store_true", help="list every option with its type, default and meaning")
    doctor = add("doctor", _doctor, "can this machine run medim-ray? one line a check", overrides=False)
    doctor.add_argument("--cluster", metavar="ADDRESS", help="check a Ray cluster: HOST:6379, with its token at hand")
    doctor.add_argument("--storage", metavar="URL", help="with --cluster: storage that every node must see")
    _add_submit(add("submit", _submit, "send a job: here, to Ray, Slurm or Kubernetes", overrides=False))
    _add_jobs(commands.add_parser("jobs", help="the jobs that were submitted from here"))
    _add_shards(commands.add_parser("shards", help="look after shards").add_subparsers(required=True, metavar="ACTION"))
    _add_tag(add("tag", _tag, "MeSH headings and mentions of reports in a CSV file", overrides=False))
    return parser


def _add_shards(actions: Any) -> None:
    for name, subject, meaning in (
        ("verify", "OUT", "compare every file with its checksum; exit code 1 on any difference"),
        ("stats", "OUT", "rows, patients, labels, files and copies of a shard set"),
        ("merge", "OUT…", "several shard sets into out=NEW; files are copied, every checksum is checked"),
        ("sample", "OUT", "rows=100 of a shard set, drawn by seed=0, into out=NEW"),
    ):
        sub = actions.add_parser(name, help=meaning, description=meaning)
        sub.add_argument(
            "items", nargs="+", metavar=f"{subject} | key=value", help="storage.endpoint=… for object stores"
        )
        sub.set_defaults(command=_shards, action=name, json=False)
        if name == "stats":
            sub.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")


def _add_tag(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("reports", metavar="REPORTS.csv")
    sub.add_argument("--text-columns", default="findings,impression", help="columns joined to the report's text")
    sub.add_argument("--id-column", default="uid")
    sub.add_argument("--out", required=True, metavar="TAGS.csv")
    sub.add_argument("--mentions", metavar="OUT.parquet", help="also every mention with span, assertion, side, zone")
    sub.add_argument("--vocabulary", metavar="NLM", help="descriptor XML or mtrees file of the NLM, path or URL")


def _add_submit(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("spec", metavar="JOB.yaml")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="options of the spec: target=slurm name=second")
    sub.add_argument("--dry-run", action="store_true", help="print exactly what would be sent; contacts nothing")
    sub.add_argument("--detach", action="store_true", help="do not follow the log; exit code 0 once it is submitted")


def _add_jobs(sub: argparse.ArgumentParser) -> None:
    sub.set_defaults(command=_jobs)
    actions = sub.add_subparsers(required=True, metavar="ACTION", dest="action")
    actions.add_parser("list", help="every job, newest first")
    for name, meaning in (
        ("status", "state, reason and exit code"),
        ("logs", "what it printed"),
        ("stop", "end it; it goes on from its last checkpoint when it is resubmitted"),
        ("resubmit", "a new attempt at the same spec"),
    ):
        action = actions.add_parser(name, help=meaning, description=meaning)
        action.add_argument("name")
        if name == "logs":
            action.add_argument("--follow", action="store_true", help="until it ends; the exit code is the job's")
        elif name == "resubmit":
            action.add_argument("--detach", action="store_true", help="do not follow the log")


@dataclass(frozen=True, kw_only=True)
class MasksRoot:
    """Options of `medim-ray masks`."""

    run: str = field(metadata={"help": "run folder"})
    num: int = field(default=16, metadata={"help": "images in the gallery"})
    out: str = field(default="masks.html", metadata={"help": "HTML file to write"})
    text: bool = field(default=True, metadata={"help": "show report text in the gallery; it is patient data"})


@dataclass(frozen=True, kw_only=True)
class ExportRoot:
    """Options of `medim-ray export`."""

    run: str = field(metadata={"help": "run folder"})
    checkpoint: str = field(
        default="latest", metadata={"help": "latest, best (by validation during the run) or a step"}
    )
    format: str = field(default="timm", metadata={"help": "timm, hf, torch_hub or onnx"})
    out: str = field(metadata={"help": "folder to write"})


def _prepare(args: argparse.Namespace) -> int:
    if args.list_sources:
        from medim_ray.data.sources import SOURCES

        for name in SOURCES:
            print(f"{name:15} {(SOURCES[name].__doc__ or '').partition(chr(10))[0]}")
        return 0
    from medim_ray.data.ingest import PrepareConfig, prepare

    for line in prepare(load(PrepareConfig, args.config, args.overrides)).lines():
        print(line)
    return 0


def _pretrain(args: argparse.Namespace) -> int:
    import psutil

    from medim_ray.config.schema import RunConfig
    from medim_ray.probes.watch import MapWatch
    from medim_ray.train.launch import launch, summary
    from medim_ray.train.signals import exit_code
    from medim_ray.train.startup import Startup

    startup = Startup(began=psutil.Process().create_time())
    config = load(RunConfig, args.config, args.overrides)
    validate = _validation() if config.validate.is_asked else None
    startup.mark("imports of the command")
    result = launch(config, validate=validate, watch=MapWatch.of_run, startup=startup)
    print(summary(result))
    return exit_code(result.signal) if result.signal else 0


def _validation() -> Any:
    """What probes a checkpoint during a run; scikit-learn is loaded for it."""
    from medim_ray.probes.validate import VALIDATE

    return VALIDATE


def _folder(text: str) -> str:
    """A run folder, also as `run=FOLDER`, as other commands take it."""
    return text.removeprefix("run=")


def _fields(root: type[Any]) -> int:
    for key, kind, default, meaning in describe(root):
        print(f"{key}: {kind} = {default!r}  {meaning}")
    return 0


def _config(args: argparse.Namespace) -> int:
    root = _root_of(args.config)
    if args.fields:
        return _fields(root)
    config = load(root, args.config, args.overrides)
    print(f"# run_hash {run_hash(config)}\n{to_yaml(config, hide_secrets=True)}", end="")
    return 0


def _root_of(file: str | None) -> type[Any]:
    """RunConfig, or PrepareConfig for a file that has a `source`."""
    from medim_ray.config.loader import read_tree
    from medim_ray.config.schema import RunConfig
    from medim_ray.data.ingest import PrepareConfig

    return PrepareConfig if file is not None and "source" in read_tree(file) else RunConfig


def _probe(args: argparse.Namespace) -> int:
    from medim_ray.probes.command import ProbeRoot, run_probe

    if args.overrides[:1] == ["compare"]:
        return _compare(args)
    if args.fields:
        return _fields(ProbeRoot)
    root = load(ProbeRoot, None, args.overrides)
    run_probe(root.run, root.probe, checkpoint=root.checkpoint)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from medim_ray.probes.compare import CompareRoot, run_compare

    if args.fields:
        return _fields(CompareRoot)
    words = args.overrides[1:]
    root = load(CompareRoot, None, [word for word in words if "=" in word])
    run_compare([word for word in words if "=" not in word], root)
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from medim_ray.studies.sweep import SweepConfig, sweep

    return _fields(SweepConfig) if args.fields else sweep(args.config, args.overrides, dry_run=args.dry_run)


def _ablate(args: argparse.Namespace) -> int:
    from medim_ray.studies.ablate import StudyConfig, ablate

    return _fields(StudyConfig) if args.fields else ablate(args.config, args.overrides, dry_run=args.dry_run)


def _masks(args: argparse.Namespace) -> int:
    from medim_ray.studies.gallery import write_gallery

    if args.fields:
        return _fields(MasksRoot)
    root = load(MasksRoot, None, args.overrides)
    print(write_gallery(root.run, num=root.num, out=root.out, text=root.text))
    return 0


def _export(args: argparse.Namespace) -> int:
    from medim_ray.models.export import export
    from medim_ray.train.runs import find_checkpoint, load_run

    if args.fields:
        return _fields(ExportRoot)
    root = load(ExportRoot, None, args.overrides)
    run = load_run(root.run, checkpoint=find_checkpoint(root.run, root.checkpoint))
    facts = {
        "objective": run.config.objective.name,
        "optimizer steps": str(run.step),
        "training images": str(run.shards.num_rows(run.config.data.split)),
        "run hash": run_hash(run.config),
        "data hash": run.shards.content_hash,
    }
    encoder, extras = run.objective.encoder, run.objective.export_extras()
    print(export(encoder, root.format, root.out, extras, facts, to_yaml(run.config, hide_secrets=True)))
    return 0


def _plan(args: argparse.Namespace) -> int:
    from medim_ray.plan.command import run_plan

    return run_plan(args.config, args.overrides, as_json=args.json, compare=args.compare, html=args.html)


def _report(args: argparse.Namespace) -> int:
    from medim_ray.studies.page import read_study, write_study
    from medim_ray.studies.report import write_report

    found = read_study(args.run)
    if found is not None:
        print(write_study(*found, args.run, args.aim))
    else:
        print(write_report(args.run, text=not args.no_text, aim_repo=args.aim))
    return 0


def _checkpoint(args: argparse.Namespace) -> int:
    from medim_ray.train.checkpoint_command import run_checkpoint

    return run_checkpoint(args.action, args.run, args.keep)


def _doctor(args: argparse.Namespace) -> int:
    if args.cluster:
        from medim_ray.submit.doctor_cluster import check_cluster

        return check_cluster(args.cluster, args.storage)
    if args.storage:
        raise ValueError("--storage is a check of a cluster: give --cluster ADDRESS too")
    from medim_ray.submit.doctor import check_machine

    return check_machine()


def _submit(args: argparse.Namespace) -> int:
    from medim_ray.submit.command import submit

    return submit(args.spec, args.overrides, check_words, dry_run=args.dry_run, follow=not args.detach)


def _jobs(args: argparse.Namespace) -> int:
    from medim_ray.submit import command

    if args.action == "list":
        return command.list_jobs()
    if args.action == "status":
        return command.show_status(args.name)
    if args.action == "logs":
        return command.show_logs(args.name, args.follow)
    if args.action == "stop":
        return command.stop(args.name)
    return command.resubmit(args.name, follow=not args.detach)


def check_words(words: Sequence[str]) -> None:
    """ValueError where `words` are no command line of medim-ray, or set an option that its command does not have."""
    said = io.StringIO()
    # What is read where the job runs, such as the number of an array's task, has a stand-in here.
    on_site = r"\$\{oc\.env:[^{}]*\}"
    words = [re.sub(rf"\$\{{oc\.decode:{on_site}\}}|{on_site}", "1", word) for word in words]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            args = _parser().parse_args(words)
    except SystemExit:
        raise ValueError(f"command: {said.getvalue().strip().splitlines()[-1].removeprefix('medim-ray: ')}") from None
    if args.command in (_submit, _jobs):
        raise ValueError(f"command: `{words[0]}` is not run by a job: name the command that it would send")
    if args.command in (_sweep, _ablate):
        from medim_ray.studies.ablate import StudyConfig
        from medim_ray.studies.sweep import SweepConfig

        load(SweepConfig if args.command is _sweep else StudyConfig, args.config, args.overrides)
    if args.command in (_pretrain, _prepare):
        load(_root_of(args.config) if args.command is _pretrain else _prepare_root(), args.config, args.overrides)


def _prepare_root() -> type[Any]:
    from medim_ray.data.ingest import PrepareConfig

    return PrepareConfig


def _shards(args: argparse.Namespace) -> int:
    from medim_ray.data.shards_command import run_shards

    return run_shards(args.action, args.items, as_json=args.json)


def _tag(args: argparse.Namespace) -> int:
    from medim_ray.reports.tag_command import run_tag

    summary = run_tag(
        args.reports,
        text_columns=args.text_columns.split(","),
        id_column=args.id_column,
        out=args.out,
        mentions=args.mentions,
        vocabulary=args.vocabulary,
    )
    print(
        f"{args.out}: {summary.num_reports} reports, {summary.num_mentions} mentions, "
        f"{summary.num_without_heading} reports without a heading"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
