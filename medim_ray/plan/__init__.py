"""The planner: memory, time, cost, energy and goodput of a run before it starts, and of runs far past this machine.

Arithmetic on a RunConfig and a cluster description; every number it uses is in constants.yaml with its source. It
imports neither ray nor deepspeed and loads no weights. In the order of dependencies it stands after config and before
train, so that `train.zero: auto` can use the same memory model.
"""
