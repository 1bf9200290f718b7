"""Table 2: the methods, and what an answer of each costs, measured."""

import time
from collections.abc import Mapping

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from analysis.measure.methods import measure
from analysis.tables.cells import NAMES
from analysis.tables.table3 import note
from configs.schema import Experiment
from eval.forward import Evaluator
from soups.experiment.pool import usable_pool
from store.provenance import provenance

EXAMPLES, ROUNDS = 64, 7
FORMULAS = {  # method -> its answer to x, and how the cost of inference grows with k ingredients
    "best": (r"f(x, θ_i) with i = argmax_j ValAcc(θ_j)", "O(1)"),
    "ensemble": (r"(1/k) Σ f(x, θ_i)", "O(k)"),
    "uniform": (r"f(x, (1/k) Σ θ_i)", "O(1)"),
    "greedy": ("Recipe 1", "O(1)"),
    "learned": ("Appendix I", "O(1)"),
}


def inference_table(config: Experiment) -> pd.DataFrame:
    """One row per method of Table 2 that the experiment has.

    Columns: method, formula, cost (as the paper has it), models (networks that answer), gflops (of one example: two for
    each multiplication with its addition), milliseconds (of one example), times_single (median over rounds of the ratio
    to the best individual model in the same round), threads and processor (that took this time).
    """
    evaluator = Evaluator(config)
    passes = {method.name: method.models for method in measure(evaluator)[1] if method.name in FORMULAS}
    split = evaluator.split(config.task.test)
    inputs = next(iter(evaluator.batches(config.task.test, torch.arange(min(EXAMPLES, len(split))))))
    inputs = inputs.to(evaluator.model.device)
    network = evaluator.model.eval()
    network.load_state_dict(usable_pool(config)[0].load())  # any weights cost the same
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(inputs)
    seconds = _seconds(network, inputs, passes)
    rows = [(name, *of, passes[name]) for name, of in FORMULAS.items() if name in passes]
    found = pd.DataFrame(rows, columns=["method", "formula", "cost", "models"])
    found["gflops"] = found["models"] * (counter.get_total_flops() / len(inputs)) / 1e9
    found["milliseconds"] = 1e3 * found["method"].map(seconds.median()) / len(inputs)
    found["times_single"] = found["method"].map(seconds.div(seconds["best"], axis=0).median())
    return found.assign(threads=torch.get_num_threads(), processor=provenance()["machine"]["processor"])


@torch.no_grad()
def _seconds(network: torch.nn.Module, inputs: torch.Tensor, passes: Mapping[str, int]) -> pd.DataFrame:
    """The time of each method's forward passes, a line a round; all of a round follow each other."""
    found: list[dict[str, float]] = []
    for _ in range(ROUNDS + 1):
        found.append({})
        for name, number in passes.items():
            _wait(inputs)
            started = time.perf_counter()
            for _ in range(number):
                network(inputs)
            _wait(inputs)
            found[-1][name] = time.perf_counter() - started
    return pd.DataFrame(found[1:])  # the first warms up


def _wait(inputs: torch.Tensor) -> None:
    if inputs.is_cuda:
        torch.cuda.synchronize(inputs.device)


def cost_cells(config: Experiment, numbers: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Table 2 as text cells and its caption: formulas and costs of the paper, and the costs measured."""
    cells = pd.DataFrame(
        {
            "Method": numbers["method"].map(NAMES),
            "Answer to x": numbers["formula"],
            "Cost, paper": numbers["cost"],
            "Networks": numbers["models"].astype(str),
            "GFLOPs an example": numbers["gflops"].map("{:.3f}".format),
            "ms an example": numbers["milliseconds"].map("{:.2f}".format),
            "Times the single model": numbers["times_single"].map("{:.2f}".format),
        }
    )
    threads, processor = numbers[["threads", "processor"]].iloc[0]
    text = (
        f"Forward passes of {EXAMPLES} examples at once, median of {ROUNDS} rounds, on {threads} "
        f"thread(s) of {processor}; θ_1, ..., θ_k are the k ingredients. GFLOPs count convolutions and "
        f"matrix products, two for a multiplication with its addition. {note(config)}"
    )
    return cells, text
