"""Time fits of a recipe on this machine's GPU, and measure them on the test images.

    python experiments/fast_gpu.py fast99gpu --seeds 10

From training images on the device to the answers on the 10,000 test images: the capture of the step
counts, and so does reading and moving the test images. The first fit, in which CUDA's libraries
start, is left out.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from ending import end_plainly

import digitlab
from digitlab.base.paths import lab_folder
from digitlab.base.statistics import mean_interval
from digitlab.training.fit import fit
from digitlab.training.observer import TrainingObserver


class Clock(TrainingObserver):
    """Knows when the images were on the device and the network was built."""

    def started(self, facts: dict[str, Any]) -> None:
        torch.cuda.synchronize()
        self.at = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("recipe", help="what to train")
    parser.add_argument("--seeds", type=int, default=10, help="fits that count")
    options = parser.parse_args()
    seconds, accuracies = [], []
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA here: it must. Run it on a machine with a GPU.")
    for seed in range(options.seeds + 1):
        words = [f"experiments={options.recipe}", "data.evaluate_on=test", f"trainer.seed={seed}"]
        words.append("trainer.device=cuda")
        clock = Clock()
        result = fit(digitlab.compose(*words), lab_folder(), clock)
        seconds.append(time.perf_counter() - clock.at)
        accuracies.append(result.metrics["test_accuracy"])
    del seconds[0], accuracies[0]
    spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(
        f"| `{options.recipe}` | {statistics.median(seconds):.3f} s ({spread}, n={len(seconds)}) "
        f"| {mean_interval(accuracies)} |"
    )


if __name__ == "__main__":
    end_plainly(main)
