"""What Ray says to a process that may not join becomes one line with the fix; nothing here starts a cluster."""

from __future__ import annotations

import pytest

from medim_ray.submit.doctor_cluster import _why_not, check_cluster

TRACEBACK = 'Traceback (most recent call last):\n  File "worker.py", line 2008, in init\n    raise '


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: Authentication token is missing",
            "ours is missing or another cluster's: RAY_AUTH_MODE=token on head, workers",
        ),
        (
            "RuntimeError: Version mismatch: The cluster was started with:\n    Ray: 2.40.0\n    Python: 3.12.1\nThis",
            "Version mismatch: The cluster was started with: Ray: 2.40.0 Python: 3.12.1 This; use the cluster's Ray",
        ),
        ("ConnectionError: Failed to connect to Ray cluster at 10.0.0.1:6379\n", "at 10.0.0.1:6379: is it a Ray head"),
    ],
)
def test_why_a_process_could_not_join(said: str, expected: str) -> None:
    assert expected in _why_not(TRACEBACK + "x\n" + said)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("head", "head is not HOST:PORT"),
        ("127.0.0.1:1", "127.0.0.1:1 can't be reached"),
    ],
)
def test_an_address_that_is_none_is_told_before_anything_is_tried(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert check_cluster(address) == 1
    out = capsys.readouterr().out
    assert f"FAIL ports: {message}" in out and "join" not in out
