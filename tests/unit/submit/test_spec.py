"""Job specs: what is refused and how, paths and identity; every shipped one prints a dry run on every target."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  it writes a cache once a user: before a test gives another home
import pytest

from medim_ray.cli import check_words, main
from medim_ray.submit.spec import TARGETS, JobSpec, changed, load_spec

ROOT = Path(__file__).parents[3]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
SMALL = ROOT / "jobs/pretrain-medim-small.yaml"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("file", JOBS, ids=lambda f: f.stem)
def test_any_spec_on_any_target_prints_what_it_would_send_and_contacts_nothing(
    file: Path, target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "KUBECONFIG", "SLURM_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")  # no sbatch, no kubectl
    monkeypatch.setenv("MEDIM_RAY_JOBS", str(tmp_path / "jobs.json"))
    monkeypatch.chdir(ROOT)
    assert main(["submit", str(file), f"target={target}", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "medim_ray.cli" in out or "medim_ray.submit.entry" in out
    assert load_spec(file).name in out
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("target=slrum", "target='slrum' is not one of 'local', 'ray', 'slurm', 'kuberay'"),
        ("resource.nodes=2", "unknown key 'resource'. Did you mean 'resources'"),
        ("resources.node=2", "unknown key 'resources.node'. Did you mean 'resources.nodes'"),
        ("name=my first job", "e.g. name=my-first-job"),
        (f"name={'x' * 300}", r"\(300 characters\).*1 to 35 lower-case"),
        ("name=MedIM", "e.g. name=medim"),
        ("time_limit_s=20", "time_limit_s=20: shorter than the start-up"),
        ("resources.nodes=0", "nodes=0: must be at least 1"),
        ("resources.memory_gb=0.1", "Ray alone takes"),
        ("retries=-1", "retries=-1"),
        ("command=[]", "command is empty"),
        ("ray.address=ray://head:10001", "the Jobs API speaks HTTP"),
        ("ray.max_upload_mb=4000", "Ray's own limit"),
        ("slurm.options=[reservation]", "not of the form --name"),
        ("tls.cert=/c.pem", "only cert given: TLS needs cert, key and ca"),
        ("kuberay.overlay=gpu", "kuberay.overlay=gpu with resources.gpus=0"),
        ("name=1st-run", "a letter first, on every target alike; e.g. name=job-1st-run"),
        ("resources.memory_gb=.nan", "memory_gb=nan: Ray alone takes"),
        ("resources.memory_gb=.inf", "memory_gb=inf: Ray alone takes"),
        ("ray.entrypoint_cpus=-1", "entrypoint_cpus=-1.0: an amount is at least 0"),
        ("ray.entrypoint_resources.stable=.nan", "stable=nan: an amount"),
        ("ray.address=http://", "the Jobs API speaks HTTP"),
        ("slurm.partition=a b", "partition='a b': has white space"),
        ("slurm.array=all", "array=all: task numbers such as 0-7"),
        ("slurm.container=apptainer", "environment.image, which is empty"),
        ("storage.root=", "storage: root=: give a folder or URL"),
        ("storage.root=~/runs", "another folder on every machine"),
        ("storage.claim_gb=-1", "claim_gb=-1: must be at least 0"),
        ("storage={claim: medim, root: 's3://medim'}", "a claim is mounted at a folder"),
        ("kuberay.namespace=My Space", "namespace='My Space': Kubernetes takes lower-case"),
        ("kuberay.shm_gb=0", "shm_gb=0.0: Ray's object store needs more"),
        ("tags={my owner: me}", "tags: 'my owner': 1 to 63 letters"),
        ("environment.variables=[A]", "environment.variables=.A.: Cannot merge"),
        ("environment.variables.A-B=1", "no name of an environment variable"),
    ],
)
def test_what_is_refused_and_how(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_spec(SMALL, [override])


def test_a_time_limit_must_outlast_start_up_and_on_slurm_the_notice_too() -> None:
    with pytest.raises(ValueError, match="at least 154 s"):
        load_spec(SMALL, ["target=slurm", "time_limit_s=150"])
    assert load_spec(SMALL, ["target=slurm", "time_limit_s=150", "slurm.signal_s=30"]).start_up_s == 64


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["target=slurm", "slurm.array=0-3", "resources.decode_nodes=1"],
            "slurm.array=0-3 with resources.decode_nodes=1",
        ),
        (["target=slurm", "slurm.symmetric=true", "resources.decode_nodes=1"], "slurm.symmetric=true with resources"),
        (["target=kuberay", "storage.root=s3://m", "kuberay.shm_gb=4"], "shm_gb=4.0 of resources.memory_gb=4.0"),
    ],
)
def test_options_that_exclude_each_other_on_a_target(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_spec(SMALL, overrides)
    assert load_spec(SMALL, [*overrides, "target=local"]), "elsewhere they say nothing"


def test_a_job_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"job file .* is a folder: name a file in it"):
        load_spec(tmp_path)
    with pytest.raises(ValueError, match=r"job file .*none.yaml does not exist; jobs/ has examples"):
        load_spec(tmp_path / "none.yaml")


PLANTED = "AKIAIOSFODNN7EXAMPLE"


@pytest.mark.parametrize(
    "override",
    [
        f"environment.secrets.AWS_SECRET_ACCESS_KEY={PLANTED}",
        f"environment.variables.HF_TOKEN={PLANTED}",
        f"environment.variables.HARMLESS={PLANTED}",
        f"args=[salt={PLANTED}]",
        f"args=[run.dir={PLANTED}]",
        f"args=[run.dir=s3://me:{PLANTED.lower()}/x@bucket/run]",
        f"name={PLANTED}",
        f"tags.owner={PLANTED}",
        f"storage.root=s3://me:{PLANTED.lower()}@bucket",
        f"environment.wheel=https://me:{PLANTED.lower()}@host/m.whl",
        f"environment.image={PLANTED}",
        f"ray.address=http://me:{PLANTED.lower()}@host:8265",
        f"slurm.options=[--comment={PLANTED}]",
        f"kuberay.node_selector.zone={PLANTED}",
    ],
)
def test_a_secret_in_a_spec_is_refused_and_not_repeated(override: str) -> None:
    with pytest.raises(ValueError, match="secret") as refused:
        load_spec(SMALL, [override])
    assert PLANTED.lower() not in str(refused.value).lower()


def test_a_secret_of_our_environment_is_refused_where_a_spec_resolves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OURS", "OTHER_TOKEN"):
        monkeypatch.setenv(name, f"planted-{name}")
    monkeypatch.setenv("OUR_TOKEN_PATH", "/run/token")
    for name, override in (("OURS", "environment.secrets={OURS: env}"), ("OTHER_TOKEN", "retries=1")):
        with pytest.raises(ValueError, match=f"args holds the value of {name}") as refused:
            load_spec(SMALL, [override, f"args=['run.dir=/x/${{oc.env:{name}}}']"])
        assert "planted" not in str(refused.value)
        kept = load_spec(SMALL, [override, f"args=['run.dir=/x/\\${{oc.env:{name}}}']"])
        assert kept.args == (f"run.dir=/x/${{oc.env:{name}}}",)
    assert load_spec(SMALL, ["ray.token_file=${oc.env:OUR_TOKEN_PATH}"]).ray.token_file == "/run/token"


@pytest.mark.parametrize(
    "override",
    [
        "args=[text.num_tokens=96]",
        "storage.root=http://host:9000/a@b",
        "environment.variables.TOKENIZERS_PARALLELISM=no",
    ],
)
def test_what_only_sounds_like_a_secret_is_none(override: str) -> None:
    assert load_spec(SMALL, [override])


def test_relative_storage_is_made_absolute_before_the_command_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/tmp")
    spec = load_spec(SMALL, ["storage.root=here", "name=second"])
    assert spec.storage.root == "/tmp/here" and "run.dir=/tmp/here/runs/second" in spec.arguments


@pytest.mark.parametrize("target", ["ray", "kuberay"])
def test_a_relative_path_of_the_command_is_refused_where_nodes_share_no_folder(target: str) -> None:
    with pytest.raises(ValueError, match=r"write run.dir=\$\{storage.root\}/runs/x"):
        load_spec(SMALL, [f"target={target}", "args=[run.dir=runs/x]"])


def test_the_hash_is_of_all_but_tags() -> None:
    spec = load_spec(SMALL)
    assert spec.hash == load_spec(SMALL, ["tags.owner=me"]).hash
    other = load_spec(SMALL, ["args=[train.steps=5]", "resources.cpus=4"])
    assert other.hash != spec.hash and changed(spec, other) == ["args", "resources.cpus"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrian"], "invalid choice: 'pretrian'"),
        (["pretrain", "train.stps=3"], "unknown key 'train.stps'. Did you mean 'train.steps'"),
        (["pretrain", "--config", "configs/none.yaml"], "does not exist"),
        (["prepare", "source.nam=csv"], "Did you mean 'source.name'"),
        (["submit", "x.yaml"], "is not run by a job"),
    ],
)
def test_a_command_that_medim_ray_does_not_have_is_refused_before_it_is_sent(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_words(words)


def test_every_shipped_size_is_there_and_its_command_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stems = {file.stem for file in JOBS}
    for job in ("prepare", "pretrain-medim", "pretrain-rad_dino", "probe", "sweep-mask_ratio", "scaling"):
        assert {f"{job}-small", f"{job}-large"} <= stems
    for file in JOBS:
        check_words(load_spec(file).arguments)
        assert file.read_text().startswith("#"), "a spec's header says what it is for"


@pytest.mark.parametrize("target", TARGETS)
def test_secrets_of_the_environment_do_not_reach_a_dry_run(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("PLANTED_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, PLANTED)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    reference = "environment.secrets={PLANTED_TOKEN: env}"
    assert main(["submit", str(SMALL), f"target={target}", "--dry-run", reference]) == 0
    said = capsys.readouterr()
    assert PLANTED not in said.out + said.err
    assert "PLANTED_TOKEN" in said.out, "the reference is there, the value is not"


@pytest.mark.skipif(
    shutil.which("shellcheck") is None and not (ROOT / ".venv/bin/shellcheck").exists(),
    reason="shellcheck is not installed",
)
@pytest.mark.parametrize(
    "overrides",
    [
        ["target=local"],
        ["target=slurm", "slurm.array=0-3", "slurm.exclusive=true", "slurm.options=[--reservation=chest]"],
        ["target=slurm", "resources.decode_nodes=2", "environment.wheel=dist/m.whl"],
        ["target=slurm", "slurm.container=apptainer", "environment.image=/images/m.sif"],
        ["target=slurm", "slurm.container=pyxis", "environment.image=m:1", "slurm.symmetric=true"],
    ],
)
def test_scripts_pass_shellcheck(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(SMALL), "--dry-run", *overrides]) == 0
    script = capsys.readouterr().out
    known = "SC2016,SC2034,SC2054,SC2329"  # quoting for a step, values for one branch only, --het-group=0,1, traps
    command = [str(Path(sys.executable).parent / "shellcheck"), "--shell=bash", f"--exclude={known}", "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_spec_reloads_equal() -> None:
    from medim_ray.config.loader import from_tree, to_tree

    spec = load_spec(SMALL, ["environment.secrets.A=file:/run/a", "tags.x=y"])
    assert from_tree(JobSpec, to_tree(spec)) == spec
