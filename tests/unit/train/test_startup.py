"""The stop watch of a start: every second belongs to one part."""

from __future__ import annotations

import pickle
import time

from medim_ray.train.startup import Startup, describe_startup


def test_parts_add_up_to_the_time_since_the_command_in_whatever_process_they_are_marked() -> None:
    startup = Startup(began=time.time() - 2.0)
    startup.mark("checks")
    there = pickle.loads(pickle.dumps(startup))
    time.sleep(0.1)
    there.mark("starting Ray")
    assert 2.0 <= there.parts["checks"] < 2.5 and 0.1 <= there.parts["starting Ray"] < 0.6
    assert describe_startup({"checks": 2.0, "starting Ray": 3.14}) == (
        "first step after 5.1 s: checks 2.0, starting Ray 3.1"
    )
