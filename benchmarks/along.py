"""What an average along a run costs of a training step:  python -m benchmarks.along [--rounds 3] [--every 10]

A GPT-2 of 100 M parameters takes steps of AdamW on random tokens on the CPU. After each, in turns: the update of
soups.running.RunningMean, as the callbacks of soups/callbacks call it, that of torch.optim.swa_utils.AveragedModel, and
a copy of as many float64 numbers as the model has parameters. The floor is what the update has to move, 20 bytes a
parameter (4 of the weights are read, 8 of the sum read and 8 written), at the speed of that copy, which moves 16.
AveragedModel keeps float32, which is 12 bytes a parameter, and a running mean that is rounded at every step.

Writes results/measured/bench_along.csv, or the file named by --out.
"""

import os
import statistics
from functools import partial
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.run import Options, benchmark, in_turns, middle, timed
from soups.running import RunningMean, Schedule
from store.workers import use_threads

MOVED = {"update": 20, "copy": 16, "AveragedModel": 12}  # bytes a parameter


def measured(options: Options) -> list[dict[str, Any]]:
    """A row for each contender: medians over rounds, of which the first, that asks for memory, does not count."""
    use_threads(options.threads)
    torch.manual_seed(0)
    sizes = {"n_embd": options.width, "n_layer": options.layers, "n_head": max(1, options.width // 64)}
    network = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=options.tokens))
    optimizer = torch.optim.AdamW(network.parameters())
    tokens = torch.randint(network.config.vocab_size, (options.batch, options.tokens))
    size = sum(parameter.numel() for parameter in network.parameters())
    mean, peer = RunningMean(Schedule()), AveragedModel(network)
    source = torch.ones(size, dtype=torch.float64)
    target = torch.zeros_like(source)

    def step() -> None:
        optimizer.zero_grad()
        network(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    contenders = {
        "step": step,
        "update": lambda: mean.update(network.state_dict()),
        "copy": lambda: target.copy_(source),
        "AveragedModel": lambda: peer.update_parameters(network),
    }
    load = os.getloadavg()[0]
    calls = in_turns({name: partial(timed, contender) for name, contender in contenders.items()}, options.rounds + 1)
    seconds = {name: [call.seconds for call in made[1:]] for name, made in calls.items()}
    took = {name: statistics.median(each) for name, each in seconds.items()}
    floor = took["copy"] * MOVED["update"] / MOVED["copy"]
    return [
        {
            "contender": name,
            "parameters": size,
            "load_before": round(load, 2),
            **middle("seconds", seconds[name], 4),
            "bytes_a_parameter": MOVED.get(name),
            "times_floor": round(took[name] / floor, 2) if name == "update" else None,
            "percent_of_step": None if name == "step" else round(100 * took[name] / options.every / took["step"], 3),
        }
        for name in contenders
    ]


if __name__ == "__main__":
    benchmark(
        measured,
        shown=["contender", "seconds", "times_floor", "percent_of_step"],
        packages=["torch", "transformers"],
        rounds=3,
        every=(10, "steps between two that are averaged"),
        width=(704, "of the network; by default it has 100 M parameters"),
        layers=11,
        batch=(8, "sequences of a step"),
        tokens=(128, "of a sequence"),
        threads=(1, "torch threads"),
    )
