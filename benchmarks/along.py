"""What an average along a run costs of a training step:  python -m benchmarks.along [--rounds 3] [--every 10]

A GPT-2 of 100 M parameters takes steps of AdamW on random tokens on the CPU. After each, in turns: the update of
soups.running.RunningMean, as the callbacks of soups/callbacks call it, that of torch.optim.swa_utils.AveragedModel, and
a copy of as many float64 numbers as the model has parameters. The floor is what the update has to move, 20 bytes a
parameter (4 of the weights are read, 8 of the sum read and 8 written), at the speed of that copy, which moves 16.
AveragedModel keeps float32, which is 12 bytes a parameter, and a running mean that is rounded at every step.

Writes results/measured/bench_along.csv, or the file named by --out.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch.optim.swa_utils import AveragedModel
from transformers import GPT2Config, GPT2LMHeadModel

from soups.errors import one_line_errors
from soups.files.atomic import replacing
from soups.running import RunningMean, Schedule
from store.provenance import provenance_columns
from store.workers import use_threads

ROOT = Path(__file__).resolve().parents[1]
MOVED = {"update": 20, "copy": 16, "AveragedModel": 12}  # bytes a parameter


def measured(arguments: argparse.Namespace) -> pd.DataFrame:
    """A row for each contender: medians over rounds, of which the first, that asks for memory, does not count."""
    torch.manual_seed(0)
    sizes = {"n_embd": arguments.width, "n_layer": arguments.layers, "n_head": max(1, arguments.width // 64)}
    network = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=arguments.tokens))
    optimizer = torch.optim.AdamW(network.parameters())
    tokens = torch.randint(network.config.vocab_size, (arguments.batch, arguments.tokens))
    size = sum(parameter.numel() for parameter in network.parameters())
    mean, peer = RunningMean(Schedule()), AveragedModel(network)
    source = torch.ones(size, dtype=torch.float64)
    target = torch.zeros_like(source)

    def step() -> None:
        optimizer.zero_grad()
        network(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    contenders: dict[str, Callable[[], object]] = {
        "step": step,
        "update": lambda: mean.update(network.state_dict()),
        "copy": lambda: target.copy_(source),
        "AveragedModel": lambda: peer.update_parameters(network),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    load = os.getloadavg()[0]
    for _ in range(arguments.rounds + 1):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - started)
    took = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    floor = took["copy"] * MOVED["update"] / MOVED["copy"]
    rows = [
        {
            "contender": name,
            "parameters": size,
            "batch_tokens": tokens.numel(),
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "load_before": round(load, 2),
            "seconds": round(took[name], 4),
            "fastest_seconds": round(min(seconds[name][1:]), 4),
            "slowest_seconds": round(max(seconds[name][1:]), 4),
            "bytes_a_parameter": MOVED.get(name),
            "times_floor": round(took[name] / floor, 2) if name == "update" else None,
            "every": arguments.every,
            "percent_of_step": None if name == "step" else round(100 * took[name] / arguments.every / took["step"], 3),
            **provenance_columns("torch", "transformers"),
        }
        for name in contenders
    ]
    return pd.DataFrame(rows)


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=10, help="steps between two that are averaged")
    parser.add_argument("--width", type=int, default=704, help="of the network; by default it has 100 M parameters")
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--tokens", type=int, default=128, help="of a sequence")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, default=ROOT / "results/measured/bench_along.csv")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    found = measured(arguments)
    with replacing(arguments.out) as temporary:
        found.to_csv(temporary, index=False)
    print(found.loc[:, ["contender", "seconds", "times_floor", "percent_of_step"]].to_string(index=False))
    print(arguments.out)


if __name__ == "__main__":
    one_line_errors(main)
