"""`python -m medim_ray.submit.entry [--chdir D] [--folder F] --retries N --time-limit S -- COMMAND…`: a job, on site.

Hands signals on to the command, asks it to commit and end at the time limit, begins it again where it says that work is
left (exit code 75), and ends with its exit code, which is also written to F/exit_code. On Slurm, Slurm does all this.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from medim_ray.submit.base import EXIT_CODE, GRACE_S, STOPPED, UNFINISHED


def run(command: Sequence[str], *, retries: int, time_limit_s: float, folder: Path | None = None) -> int:
    """Runs `command` to its end, at most 1 + retries times; its last exit code."""
    runner = _Runner(command, time_limit_s)
    for start in range(retries + 1):
        code = runner.run()
        if code != UNFINISHED or runner.stopped or (folder is not None and (folder / STOPPED).exists()):
            break
        if start < retries:
            print(f"medim-ray: unfinished, begun again ({start + 1} of {retries})", file=sys.stderr, flush=True)
        else:
            print(f"medim-ray: unfinished, and no retry is left (retries={retries})", file=sys.stderr)
    if folder is not None:
        (folder / EXIT_CODE).write_text(f"{code}\n")
    return code


class _Runner:
    """The child process of the moment, for the signal handlers. stopped: we were told to end."""

    def __init__(self, command: Sequence[str], time_limit_s: float) -> None:
        self._command, self._time_limit_s = list(command), time_limit_s
        self._child: subprocess.Popen[bytes] | None = None
        self.stopped = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._hand_on)

    def _hand_on(self, number: int, _: FrameType | None) -> None:
        self.stopped |= number != signal.SIGUSR1
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(number)

    def run(self) -> int:
        # A session of its own: a signal to our group would also end the Ray that the command starts.
        self._child = subprocess.Popen(self._command, start_new_session=True)
        try:
            code = self._child.wait(self._time_limit_s)
        except subprocess.TimeoutExpired:
            print(f"medim-ray: time_limit_s={self._time_limit_s:.0f} is over", file=sys.stderr, flush=True)
            self._child.send_signal(signal.SIGUSR1)
            try:
                code = self._child.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                code = self._child.wait()
            # Ended by the request itself, or not at all: it goes on from its last checkpoint.
            code = UNFINISHED if code in (-signal.SIGUSR1, -signal.SIGKILL) else code
        return code if code >= 0 else 128 - code


def main(arguments: Sequence[str]) -> int:
    """The exit code of the command."""
    parser = argparse.ArgumentParser(prog="medim_ray.submit.entry")
    parser.add_argument("--chdir", type=Path, default=Path())
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--retries", type=int, required=True)
    parser.add_argument("--time-limit", type=float, required=True, metavar="S")
    parser.add_argument("words", nargs="+", metavar="COMMAND")
    args = parser.parse_args(arguments)
    os.chdir(args.chdir)
    command = [sys.executable, "-m", "medim_ray.cli", *args.words]
    return run(command, retries=args.retries, time_limit_s=args.time_limit, folder=args.folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
