"""Souped adapters, compared with the updates that they stand for."""

import pytest
import torch

from soups.lora import scaling_of, soup_lora, truncated

MODULE = "base_model.model.encoder.layer.0.attention.query"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"


def adapter(seed, rank=2, inputs=7, outputs=5):
    generator = torch.Generator().manual_seed(seed)
    return {A: torch.randn(rank, inputs, generator=generator), B: torch.randn(outputs, rank, generator=generator)}


def update(weights, scaling=1.0):
    return scaling * weights[B].double() @ weights[A].double()


def test_the_soup_is_the_mean_of_the_updates_whatever_their_ranks_and_scalings():
    adapters, scalings = [adapter(0), adapter(1, rank=3), adapter(2)], [2.0, 0.5, 1.0]
    soup = soup_lora(adapters, scalings)
    mean = sum(update(a, s) for a, s in zip(adapters, scalings, strict=True)) / 3
    torch.testing.assert_close(update(soup.weights), mean, rtol=1e-6, atol=1e-6)
    assert (soup.rank, soup.errors) == (7, {MODULE: 0.0})
    assert soup.weights[A].shape == (7, 7)
    assert soup.weights[B].shape == (5, 7)


def test_mixing_weights_weigh_the_updates():
    adapters = [adapter(0), adapter(1)]
    soup = soup_lora(adapters, [1.0, 1.0], mixing=[0.75, 0.25])
    torch.testing.assert_close(update(soup.weights), 0.75 * update(adapters[0]) + 0.25 * update(adapters[1]))


def test_averaging_a_and_b_each_by_itself_is_another_update():
    adapters = [adapter(0), adapter(1)]
    wrong = {name: (adapters[0][name] + adapters[1][name]) / 2 for name in (A, B)}
    mean = (update(adapters[0]) + update(adapters[1])) / 2
    assert (update(wrong) - mean).norm() > 0.5 * mean.norm()
    # The extreme: signs of both factors turned are the same update, and the average of the factors is no update at all.
    turned = {name: -adapters[0][name] for name in (A, B)}
    assert (adapters[0][A] + turned[A]).abs().max() == 0
    torch.testing.assert_close(update(soup_lora([adapters[0], turned], [1, 1]).weights), update(adapters[0]))


@pytest.mark.parametrize("rank", [1, 2, 4, 5, 6])
def test_a_truncated_soup_is_the_best_approximation_and_reports_its_error(rank):
    adapters = [adapter(seed) for seed in range(3)]  # ranks sum to 6, of a 5 x 7 update
    soup = soup_lora(adapters, [1.0] * 3, rank=rank)
    mean = sum(update(a) for a in adapters) / 3
    u, values, vt = torch.linalg.svd(mean, full_matrices=False)  # forms the update: the slow obvious way
    expected = u[:, :rank] @ values[:rank].diag() @ vt[:rank]
    torch.testing.assert_close(update(soup.weights), expected, rtol=1e-5, atol=1e-5)
    error = ((update(soup.weights) - mean).norm() / mean.norm()).item()
    assert soup.errors[MODULE] == pytest.approx(error, abs=1e-6)
    assert soup.weights[A].shape == (rank, 7)
    assert soup.weights[B].shape == (5, rank)


def test_truncation_never_forms_the_update():
    # 2,000,000 x 1,000,000 numbers would be 16 TB.
    a, b = torch.ones(2, 1_000_000, dtype=torch.float64), torch.ones(2_000_000, 2, dtype=torch.float64)
    down, up, error = truncated(a, b, 1)
    assert (down.shape, up.shape) == ((1, 1_000_000), (2_000_000, 1))
    assert (up[0] @ down[:, 0]).item() == pytest.approx(2)
    assert error == pytest.approx(0, abs=1e-12)


def test_trained_heads_beside_the_factors_are_averaged():
    head = "base_model.model.classifier.weight"
    adapters = [adapter(i) | {head: torch.tensor([float(i)])} for i in range(2)]
    assert soup_lora(adapters, [1.0, 1.0]).weights[head].item() == 0.5


def test_factors_of_embeddings_and_convolutions_are_joined_along_their_rank():
    name = "base_model.model.conv.lora_{}.weight"
    generator = torch.Generator().manual_seed(0)
    convolutions = [
        {
            name.format("A"): torch.randn(2, 3, 3, 3, generator=generator),
            name.format("B"): torch.randn(4, 2, 1, 1, generator=generator),
        }
        for _ in range(2)
    ]
    image = torch.randn(1, 3, 6, 6, generator=generator)

    def effect(weights):
        return torch.conv2d(torch.conv2d(image, weights[name.format("A")]), weights[name.format("B")])

    mean = sum(effect(weights) for weights in convolutions) / 2
    for rank in (None, 4):
        torch.testing.assert_close(effect(soup_lora(convolutions, [1.0, 1.0], rank=rank).weights), mean)
    name = "base_model.model.wte.lora_embedding_{}"
    embeddings = [{name.format("A"): torch.ones(2, 9), name.format("B"): torch.ones(5, 2)} for _ in range(2)]
    soup = soup_lora(embeddings, [1.0, 1.0])
    torch.testing.assert_close(soup.weights[name.format("B")] @ soup.weights[name.format("A")], torch.full((5, 9), 2.0))


def test_adapters_keep_their_dtype():
    halves = [{name: tensor.bfloat16() for name, tensor in adapter(i).items()} for i in range(2)]
    assert {tensor.dtype for tensor in soup_lora(halves, [1.0, 1.0]).weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("adapters", "options", "words"),
    [
        ([], {}, "at least one model"),
        ([adapter(0), {}], {}, "is not in all of them"),
        ([adapter(0), adapter(1, inputs=8)], {}, "adapter 1, .*do not fit the others"),
        ([adapter(0), adapter(1, outputs=6)], {}, "adapter 1, .*do not fit the others"),
        ([{A: torch.ones(2, 3), B: torch.ones(4, 3)}], {}, "adapter 0, .*do not fit the others"),
        ([{A: torch.ones(2, 3)}], {}, f"no '{B}' beside it"),
        ([adapter(0) | {A: torch.full((2, 7), torch.nan)}], {}, "NaN or infinity"),
        ([adapter(0) | {f"{MODULE}.lora_magnitude_vector": torch.ones(5)}], {}, "no factor of a LoRA update"),
        ([adapter(0), adapter(1)], {"rank": 5}, r"must be in \[1, 4\].*got 5"),
        ([adapter(0), adapter(1)], {"mixing": [0.5, 0.6]}, "a share of 1"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_by_name(adapters, options, words):
    with pytest.raises(ValueError, match=words):
        soup_lora(adapters, [1.0] * len(adapters), **options)


def test_one_scaling_per_adapter_is_needed_and_adapters_of_another_kind_have_none():
    with pytest.raises(ValueError, match="a scaling"):
        soup_lora([adapter(0), adapter(1)], [1.0])
    with pytest.raises(ValueError, match="use_dora"):
        scaling_of({"r": 8, "lora_alpha": 8, "use_dora": True})
