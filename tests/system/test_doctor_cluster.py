"""`medim-ray doctor --cluster` on real heads: all is well, what keeps us out, and TLS with certificates made here."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from medim_ray.submit.spec import Tls
from tests.system.ray_head import Head, free_ports, running_head

pytestmark = [pytest.mark.system, pytest.mark.chaos]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head() as head:
        yield head


def test_doctor_of_a_cluster(head: Head, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medim_ray.cli", "doctor", "--cluster"]
    good = subprocess.run(
        [*command, head.gcs, "--storage", str(tmp_path)], env=head.environment, capture_output=True, text=True
    )
    assert good.returncode == 0, good.stdout + good.stderr
    lines = dict(line[5:].split(": ", 1) for line in good.stdout.splitlines())
    on_nodes = ["versions", "clocks", "disk", "memory", "accelerators", "storage", "all-reduce", "data stream"]
    assert list(lines) == ["token", "ports", "join", "nodes", *on_nodes]
    assert "wrote a file and read all of them" in lines["storage"] and "MB/s" in lines["data stream"]
    assert not list(tmp_path.iterdir())


RELABEL = """
import json, sys
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
facts = json.loads(client.internal_kv_get(b"CLUSTER_METADATA", b"cluster")) | {"ray_version": sys.argv[2]}
client.internal_kv_put(b"CLUSTER_METADATA", json.dumps(facts).encode(), True, b"cluster")
"""


def test_doctor_tells_what_keeps_us_from_a_cluster(head: Head, tmp_path: Path) -> None:
    token = head.token_file.read_text().strip()
    bare = {k: v for k, v in head.environment.items() if not k.startswith("RAY_AUTH")} | {"HOME": str(tmp_path)}

    def doctor(environment: dict[str, str], address: str = head.gcs) -> str:
        command = [sys.executable, "-m", "medim_ray.cli", "doctor", "--cluster", address]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
        return done.stdout

    refused = "FAIL join: the head asks for a token, and ours is missing or another cluster's"
    assert refused in doctor({**bare, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 48})
    none = doctor(bare)
    assert "FAIL token: no token: whoever reaches the cluster may run code" in none and refused in none
    half = doctor({**bare, "RAY_AUTH_TOKEN": token})
    assert "FAIL token: there is a token, but RAY_AUTH_MODE is not token here" in half and refused in half
    lost = doctor({**bare, "RAY_AUTH_MODE": "token"})
    assert "FAIL token: RAY_AUTH_MODE=token and no token" in lost and "FAIL join: there is no token" in lost
    assert "FAIL ports" in doctor(bare, f"127.0.0.1:{free_ports(1)[0]}")
    import ray

    for version in ("2.40.0", ray.__version__):  # and back: the head is not ours alone
        relabel = [sys.executable, "-c", RELABEL, head.gcs, version]
        subprocess.run(relabel, env=head.environment, check=True, capture_output=True)
        if version != ray.__version__:
            other = doctor(head.environment)
            assert "FAIL join: Version mismatch" in other and "Ray: 2.40.0" in other, other


def node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def certificates(folder: Path) -> Tls:
    """An authority, and a certificate of it for loopback."""
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test-authority -keyout ca.key -out ca.crt",
        "req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout node.key -out node.csr",
        "x509 -req -in node.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile san -out node.crt",
    ):
        # Ray takes an address of the machine where it is told 127.0.0.1.
        (folder / "san").write_text(f"subjectAltName=DNS:localhost,IP:127.0.0.1,IP:{node_address()}\n")
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return Tls(cert=f"{folder}/node.crt", key=f"{folder}/node.key", ca=f"{folder}/ca.crt")


def test_tls_on_loopback_with_certificates_made_here(tmp_path: Path) -> None:
    tls = certificates(tmp_path)
    with running_head(tls.variables()) as head:
        context = ssl.create_default_context(cafile=tls.ca)
        context.load_cert_chain(tls.cert, tls.key)
        host, port = head.gcs.split(":")
        with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain, server_hostname=host):
            pass  # the head shows a certificate of our authority
        command = [sys.executable, "-m", "medim_ray.cli", "doctor", "--cluster", head.gcs]
        good = subprocess.run(command, env=head.environment, capture_output=True, text=True)
        assert good.returncode == 0, good.stdout + good.stderr
        in_clear = {k: v for k, v in head.environment.items() if not k.startswith(("RAY_USE_TLS", "RAY_TLS"))}
        bad = subprocess.run(command, env=in_clear, capture_output=True, text=True, timeout=120)
        join = next(line for line in bad.stdout.splitlines() if "join" in line)
        assert bad.returncode == 1 and join.startswith("FAIL") and "TLS" in join, bad.stdout
