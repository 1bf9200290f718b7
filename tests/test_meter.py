"""Rates, remaining time and FLOPs, each worked out by hand under a clock of our own."""

import io
import re

import pytest
import torch
from rich.console import Console
from torch import nn

from finetune.log import Meter, peak_flops, show_progress, training_flops
from models.classifier import pretrained_network
from tests.readers import FOLDERS, prompted_model


class Timed(Meter):
    """A meter under a clock of its own, whose seconds pass when the test says so."""

    def __init__(self, **settings):
        self.now = 1000.0
        super().__init__(clock=lambda: self.now, **settings)

    def take(self, steps, seconds, examples=8):
        for _ in range(steps):
            self.now += seconds
            self.step(examples)

    def pause(self, seconds):
        self.now += seconds
        self.resume()


def lines_of(meter, steps, seconds, width=200, **console):
    """What is printed while a training takes its steps."""
    out = io.StringIO()
    with show_progress(meter, "row 3", Console(file=out, width=width, **console)) as progress:
        for step in range(meter.first + 1, meter.first + steps + 1):
            meter.take(1, seconds)
            progress(step, 1 / step)
    return out.getvalue().splitlines()


def test_examples_per_second_are_of_the_last_hundred_steps_without_the_first_and_what_was_no_training():
    meter = Timed(total=1000)
    meter.take(1, seconds=60)  # compilation
    assert meter.examples_per_second is meter.seconds_left is None
    meter.take(1, seconds=1)
    meter.pause(500)  # an evaluation on held-out
    meter.take(1, seconds=3)
    assert meter.examples_per_second == 16 / 4
    meter.take(100, seconds=0.5)
    assert meter.examples_per_second == 16


@pytest.mark.parametrize(("first", "steps"), [(0, 10), (60, 4)], ids=["from the start", "resumed"])
def test_the_time_left_is_that_of_the_steps_to_come_with_pauses_as_often_as_they_were(first, steps):
    meter = Timed(total=100, first=first)
    meter.take(steps, seconds=2)
    left = 100 - first - steps
    assert meter.seconds_left == pytest.approx(left * 2)
    meter.pause(30)
    assert meter.seconds_left == pytest.approx(left * (2 + 30 / steps))


def test_utilisation_is_the_share_of_the_peak_and_unknown_without_it():
    for known, share in (({"flops": 3e9, "peak": 120e9}, 0.25), ({"flops": 3e9}, None), ({"peak": 1e9}, None)):
        meter = Timed(total=10, **known)
        meter.take(3, seconds=1, examples=10)
        assert meter.mfu == (None if share is None else pytest.approx(share))
        assert meter.rates() == {"examples_per_second": 10} | ({} if share is None else {"mfu": meter.mfu})


def image(size):
    """An example of which only the shape counts."""
    return torch.empty(1, 3, size, size, device="meta")


@pytest.mark.parametrize("kind", ["masked_lm", "seq2seq_lm"])
def test_the_flops_of_a_language_model_are_counted_and_it_attends_as_before(kind, tmp_path):
    network = pretrained_network(prompted_model(kind, FOLDERS[kind](tmp_path)), ("no", "yes"), ("A) no", "B) yes"))
    before = network.network.config._attn_implementation
    length, width, inner, layers, masks = 16, 32, 64, 2, 3
    found = training_flops(network, torch.ones(1, length, dtype=torch.int64))
    if kind == "masked_lm":
        of_a_layer = 2 * length * (4 * width * width + 2 * width * inner) + 2 * 2 * length * length * width
        of_the_head = 2 * masks * (width * width + width * network.network.config.vocab_size)
        assert found == 3 * (layers * of_a_layer + of_the_head)
    assert found > 0
    assert network.network.config._attn_implementation == before


def test_the_flops_of_a_linear_layer_and_a_convolution_are_those_worked_out_by_hand():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 10))
    assert training_flops(linear, image(4)) == 3 * (2 * 48 * 10)
    convolution = nn.Conv2d(3, 5, kernel_size=3, padding=1)  # 64 places, 5 channels, 27 products each
    assert training_flops(convolution, image(8)) == 3 * (2 * 64 * 5 * 27)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(embed_dim=6, num_heads=2, batch_first=True)

    def forward(self, images):
        tokens = images.flatten(2).repeat(1, 2, 1).transpose(1, 2)  # (N, 16, 6)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


@pytest.mark.parametrize("training", [True, False])
def test_the_flops_of_attention_count_its_products_of_queries_and_keys(training):
    projections = 4 * (2 * 16 * 6 * 6)
    scores_and_values = 2 * (2 * 16 * 16 * 6)
    assert training_flops(Attention().train(training), image(4)) == 3 * (projections + scores_and_values)


def test_counting_flops_neither_computes_nor_changes_the_network():
    network = nn.Sequential(nn.Conv2d(3, 4, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert training_flops(network, image(4)) == 3 * (2 * 4 * 48 + 2 * 4 * 2)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    enormous = nn.Sequential(nn.Flatten(), nn.Linear(3 * 10_000**2, 10**6, device="meta"))  # 10^14 products
    assert training_flops(enormous, image(10_000)) == 3 * 2 * 3 * 10**14


def test_a_network_that_looks_at_values_has_no_known_flops():
    class ByValue(nn.Module):
        def forward(self, images):
            return images * 2 if images.sum().item() > 0 else images

    assert training_flops(ByValue(), image(4)) is None


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-32GB", "fp16", 112),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA RTX A4000", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_the_peak_is_that_of_the_very_card_or_unknown(name, precision, tera):
    peak = peak_flops(name, precision)
    assert peak == (None if tera is None else pytest.approx(tera * 1e12))


def test_a_log_has_a_line_every_30_seconds_and_one_at_the_end_and_goes_on_where_it_was():
    lines = lines_of(Timed(total=100, flops=1e9, peak=16e9), steps=100, seconds=1)
    assert [line.split(" of ")[0] for line in lines] == [f"row 3: step {n}" for n in (30, 60, 90, 100)]
    assert lines[1] == "row 3: step 60 of 100 after 0:01:00, loss 0.01667, 8 examples/s, MFU 50.0 %, 0:00:40 left"
    resumed = lines_of(Timed(total=100, first=60), steps=10, seconds=2)
    assert resumed == ["row 3: step 70 of 100 after 0:00:20, loss 0.01429, 4 examples/s, 0:01:00 left"]


def test_a_training_that_fails_says_where_it_was():
    out, meter = io.StringIO(), Timed(total=100)
    console = Console(file=out, width=200)
    with pytest.raises(ValueError, match="broken"), show_progress(meter, "row 3", console) as progress:
        meter.take(1, seconds=1)
        progress(1, 0.5)
        raise ValueError("broken")
    assert out.getvalue() == "row 3: step 1 of 100 after 0:00:01, loss 0.5\n"


def test_a_terminal_has_a_bar_and_the_same_numbers_even_where_it_is_narrow():
    meter = Timed(total=7185, first=60, flops=1e9, peak=16e9)
    shown = lines_of(meter, steps=10, seconds=2, width=80, force_terminal=True, no_color=True)
    bar = re.sub(r"\x1b\[[\d?]*\w", "", shown[-2])
    assert " ".join(bar.split()) == "row 3 70/7185 0:00:20, loss 0.01429, 4 examples/s, MFU 25.0 %, 3:57:10 left"
