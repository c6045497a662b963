"""What the benchmarks share: the folders' modules (conftest.load) and timing of variants that take turns."""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from conftest import FOLDERS, ROOT, SHARED, load  # noqa: E402, F401


def interleaved(variants, repeats, calls=1, device="cpu"):
    """{name: function} -> {name: median seconds per call}; the variants take turns, and the first round warms up.

    CPU time of this process on the CPU, so that a busy machine disturbs the ratios little; wall time on a GPU.
    """
    clock, times = time.process_time if device == "cpu" else time.perf_counter, {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, function in variants.items():
            start = clock()
            for _ in range(calls):
                function()
            if device != "cpu":
                import torch

                torch.cuda.synchronize()
            if repeat:
                times[name].append((clock() - start) / calls)
    return {name: statistics.median(values) for name, values in times.items()}
