"""Processor time and memory of a piece of work."""

import time

from digitlab.base.usage import MACHINE_METRICS, ProcessUsage


def test_a_piece_of_work_is_charged_with_its_own_time_and_peak_alone() -> None:
    first = ProcessUsage()
    block = bytearray(b"1") * 200_000_000
    start = time.process_time()
    while time.process_time() < start + 0.2:
        pass
    used = first.metrics()
    assert 0.2 <= used["cpu_seconds"] < 30
    assert used["peak_memory_mb"] > 200
    del block
    later = ProcessUsage().metrics()
    assert later["peak_memory_mb"] <= used["peak_memory_mb"] - 150
    assert later["cpu_seconds"] < used["cpu_seconds"]
    assert used.keys() < set(MACHINE_METRICS)
