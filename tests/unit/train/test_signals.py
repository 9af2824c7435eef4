"""What a command hears of its signals, and what it tells of them."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from medim_ray.train.signals import STOP_SIGNALS, aside, exit_code, stop_signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_the_first_signal_is_collected_and_the_second_one_ends_at_once(number: signal.Signals, code: int) -> None:
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    with stop_signals() as received:
        assert not received
        signal.raise_signal(number)
        assert received == [number] and exit_code(received[0]) == code
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert {each: signal.getsignal(each) for each in STOP_SIGNALS} == before


def test_work_aside_leaves_the_main_thread_to_the_signals() -> None:
    with stop_signals() as received:
        may_end = threading.Event()
        future = aside(lambda: may_end.wait(10))
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not future.done() and received == [signal.SIGUSR1]
        may_end.set()
        assert future.result(timeout=10)
    with pytest.raises(ZeroDivisionError):
        aside(lambda: 1 / 0).result(timeout=10)
