"""How many workers nodes hold; that a run grows is told by tests/system/test_chaos.py."""

from __future__ import annotations

from medim_ray.config.schema import TrainConfig
from medim_ray.train.growth import room_for


def test_a_worker_is_not_split_over_nodes_and_there_are_no_more_than_the_run_may_have() -> None:
    train = TrainConfig(num_workers=(1, 3), cpus_per_worker=2.0, global_batch=12)
    assert room_for(train, []) == 0
    assert room_for(train, [{"CPU": 3.0}, {"CPU": 1.0}, {"memory": 1e9}]) == 1
    assert room_for(train, [{"CPU": 5.5}, {"CPU": 2.0}]) == 3
    assert room_for(train, [{"CPU": 64.0}]) == 3
    with_gpu = TrainConfig(num_workers=(1, 3), cpus_per_worker=0.5, global_batch=12, use_gpu=True)
    assert room_for(with_gpu, [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}]) == 2
