from __future__ import annotations

import random

import pytest
from placement_sim import (
    WORKLOADS,
    ByPlacement,
    first_come_first_served,
    lower_bound_s,
    make_cluster,
    make_trials,
    outcome,
)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda item: item.name)
def test_placement_is_near_the_bound_and_far_ahead_of_one_trial_a_gpu(workload):
    """32 GPUs here; `benchmarks/placement_sim.py` holds 512 against the goals."""
    devices = make_cluster(workload.kinds, 32)
    trials = make_trials(workload, 500, random.Random(0))
    bound_s = lower_bound_s(trials, devices)
    ours = outcome(devices, trials, ByPlacement(devices, trials), bound_s)
    fcfs = outcome(devices, trials, first_come_first_served, bound_s)
    assert bound_s <= ours.makespan_s < 0.9 * fcfs.makespan_s
    assert ours.of_bound >= 0.9


def test_what_is_drawn_and_replayed_is_the_same_every_time():
    [_, workload, _] = WORKLOADS
    devices = make_cluster(workload.kinds, 16)
    runs = []
    for order in (1, -1):
        trials = make_trials(workload, 60, random.Random(3))
        decide = ByPlacement(devices, trials)
        runs.append(outcome(devices, trials[::order], decide, lower_bound_s(trials, devices)).makespan_s)
    assert runs[0] == runs[1]
