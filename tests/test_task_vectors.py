"""Task arithmetic, TIES and DARE, on changes small enough to work out by hand."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import soups
from soups.errors import UserError
from soups.merging import Kept, Scaled, Ties, exactly_kept, smallest_kept


def each(*rows):
    """The changes as a rule asks for them: again at every call, each good until the next."""
    buffer = np.empty(len(rows[0]))

    def changes():
        for row in rows:
            buffer[:] = row
            yield buffer

    return changes


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 1.0])
def test_the_smallest_kept_magnitude_is_that_of_the_sorted_numbers(density):
    numbers = np.random.default_rng(0).standard_normal(1000) * 10.0 ** np.random.default_rng(1).integers(-9, 9, 1000)
    kept = max(1, int(density * 1000))
    slow = np.sort(np.abs(numbers).astype(np.float32))[-kept]
    blocks = [(i % 2, (1 + 9 * (i % 2)) * block) for i in (0, 1) for block in np.split(numbers, 10)]
    found = smallest_kept(lambda: blocks, [density, density])
    assert tuple(each.least for each in found) == (slow, np.sort(np.abs(10 * numbers).astype(np.float32))[-kept])


def test_numbers_that_share_their_upper_bits_are_told_apart():
    numbers = 1 + np.arange(100.0) * 2**-20
    assert smallest_kept(lambda: [(0, numbers)], [0.1])[0].least == np.float32(numbers[90])


@pytest.mark.parametrize("density", [0.001, 0.3, 0.5, 0.75, 1.0])
def test_a_share_is_exact_where_magnitudes_are_equal_and_those_that_come_first_are_kept(density):
    numbers = np.random.default_rng(0).integers(-3, 4, 1000).astype(float)
    (kept,) = exactly_kept(lambda: [(0, block) for block in np.split(numbers, 8)], [density])
    found = np.concatenate([kept.trim(125 * i, block) for i, block in enumerate(np.split(numbers, 8))])
    first = np.argsort(-np.abs(numbers), kind="stable")[: max(1, int(density * 1000))]
    expected = np.zeros(1000)
    expected[first] = numbers[first]
    np.testing.assert_array_equal(found, expected)


def above(*thresholds):
    """What is kept where these are the smallest magnitudes."""
    kept = [Kept(threshold, 1) for threshold in thresholds]
    return lambda name: kept


def test_ties_averages_what_agrees_with_the_elected_sign():
    # element 0: 3 + 2 - 1, positive, mean of 3 and 2; element 1: 1 - 4 + 0, negative, -4 alone; element 2: all trimmed;
    # element 3: 2 - 2, no sign.
    rule = Ties(above(1.0, 1.0, 1.0))
    found = rule("w", 0, each([3, 1, 0.5, 2], [2, -4, 0.9, -2], [-1, 0, -0.9, 0]))
    np.testing.assert_array_equal(found, [2.5, -4, 0, 0])
    np.testing.assert_array_equal(
        Ties(above(1.0, 1.0, 1.0), scale=2.0)("w", 0, each([3, 1, 0.5, 2], [2, -4, 0.9, -2], [-1, 0, -0.9, 0])),
        [5, -8, 0, 0],
    )


def test_dare_drops_a_share_and_keeps_the_expected_change():
    ones = np.ones(100_000)
    found = Scaled((0.5, 0.25), ("a", "b"), (0.75, 0.75))("w", 0, each(ones, ones))
    # 0.5 / 0.25 and 0.25 / 0.25 where a model's element is kept
    assert set(np.unique(found)) == {0.0, 1.0, 2.0, 3.0}
    assert found.mean() == pytest.approx(0.75, abs=0.01)
    assert (found == 3.0).mean() == pytest.approx(1 / 16, abs=0.005)  # models drop independently


def test_what_dare_drops_depends_on_seed_model_tensor_and_place_alone():
    ones = np.ones(1000)
    one = Scaled((1.0,), ("a",), (0.9,))
    found = one("w", 0, each(ones))
    both = Scaled((0.0, 1.0), ("b", "a"), (0.9, 0.9))("w", 0, each(ones, ones))
    np.testing.assert_array_equal(both, found)
    others = [one("v", 0, each(ones)), one("w", 1000, each(ones)), Scaled((1.0,), ("b",), (0.9,))("w", 0, each(ones))]
    others.append(Scaled((1.0,), ("a",), (0.9,), 1)("w", 0, each(ones)))
    assert all((other != found).any() for other in others)


def save_pool(folder):
    """An initialisation and three models, with a batch norm's statistics, a counter and a tensor of more blocks."""
    generator = torch.Generator().manual_seed(0)
    start = {
        "w": torch.randn(3, 100_000, generator=generator),
        "b": torch.randn(7, generator=generator),
        "bn.running_var": torch.rand(7, generator=generator),
        "bn.num_batches_tracked": torch.tensor(3),
    }
    states = {"start": start}
    for i in range(3):
        moved = {
            n: t + 0.1 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t + i
            for n, t in start.items()
        }
        states[f"m{i}"] = moved | {"bn.running_var": start["bn.running_var"] + i}
    for name, state in states.items():
        save_file(state, folder / f"{name}.safetensors")
    return states, folder / "start.safetensors", [folder / f"m{i}.safetensors" for i in range(3)]


def slowly(states, recipe, density=0.2, scales=(0.5, 1.0, -0.5)):
    """All at once in float64, without blocks."""
    start = states["start"]
    names = [name for name, t in start.items() if t.is_floating_point() and not name.endswith("running_var")]
    changes = [
        torch.cat([(states[f"m{i}"][n].double() - start[n].double()).flatten() for n in names]) for i in range(3)
    ]
    if recipe == "arithmetic":
        merged = sum(scale * change for scale, change in zip(scales, changes, strict=True))
    else:
        kept = []
        for change in changes:
            least = change.abs().float().sort().values[-int(density * len(change))]
            kept.append(torch.where(change.abs().float() >= least, change, 0))
        sign = sum(kept).sign()
        agree = [torch.where(change.sign() * sign > 0, change, 0) for change in kept]
        merged = sum(agree) / sum((change != 0).double() for change in agree).clamp(min=1)
    sizes = [start[name].numel() for name in names]
    parts = dict(zip(names, merged.split(sizes), strict=True))
    return {name: (start[name].double() + parts[name].view(start[name].shape)).float() for name in names}


@pytest.mark.parametrize("recipe", ["arithmetic", "ties"])
def test_files_become_what_all_tensors_at_once_would(recipe, tmp_path):
    states, start, models = save_pool(tmp_path)
    made = {
        "arithmetic": lambda: soups.arithmetic(start, models, [0.5, 1.0, -0.5]),
        "ties": lambda: soups.ties(start, models, density=0.2),
    }[recipe]()
    out = load_file(made.save(tmp_path / "soup.safetensors"))
    for name, tensor in slowly(states, recipe).items():
        torch.testing.assert_close(out[name], tensor, rtol=1e-6, atol=1e-7)
    mean = torch.stack([states[f"m{i}"]["bn.running_var"] for i in range(3)]).double().mean(dim=0).float()
    assert torch.equal(out["bn.running_var"], mean)
    assert out["bn.num_batches_tracked"] == 5


def test_dare_changes_a_share_of_the_numbers_and_is_the_same_in_any_order(tmp_path):
    states, start, models = save_pool(tmp_path)
    soups.dare(start, models, density=0.25, seed=3).save(tmp_path / "a.safetensors")
    soups.dare(start, models[::-1], density=0.25, seed=3).save(tmp_path / "b.safetensors")
    soups.dare(start, models, density=0.25, seed=4).save(tmp_path / "c.safetensors")
    a, b, c = (load_file(tmp_path / f"{name}.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["w"], c["w"])
    untouched = (a["w"] == states["start"]["w"]).float().mean().item()
    assert untouched == pytest.approx(0.75**3, abs=0.01)
    whole = load_file(soups.dare(start, models, density=1.0).save(tmp_path / "d.safetensors"))
    uniform = load_file(soups.uniform(models).save(tmp_path / "u.safetensors"))
    torch.testing.assert_close(whole["w"], uniform["w"], rtol=1e-6, atol=1e-6)


def test_nan_in_a_change_that_would_be_trimmed_is_refused(tmp_path):
    _, start, models = save_pool(tmp_path)
    state = load_file(models[1])
    state["b"][3] = float("nan")
    save_file(state, models[1])
    with pytest.raises(UserError, match=r"m1\.safetensors: tensor 'b' holds NaN"):
        soups.ties(start, models).save(tmp_path / "soup.safetensors")
