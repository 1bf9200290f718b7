"""Learned soups: gradients without autograd through the ingredients, and everything around them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from configs.errors import UserError
from soups.average import BLOCK, inner_products, mix_into, settle
from soups.descent import Layout, LearnedSettings, State, learned, shuffled, step
from soups.files.weights import LazyWeights, save_weights
from soups.recipes import mean_of

EVERY = ["model", "layer", "tensor"]


class Network(nn.Module):
    """Two blocks with a batch norm between them, dropout, and a head tied to the embedding."""

    def __init__(self, tied=True):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)  # first, so that no name below stands in the first row by chance
        self.embed = nn.Linear(6, 8, bias=False)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 8, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, inputs):
        hidden = torch.tanh(self.blocks[0](torch.tanh(self.embed(inputs))))
        hidden = self.drop(self.blocks[1](self.norm(hidden)))
        return hidden @ self.head.weight


def pool(number, *, tied=True, dtype=torch.float32):
    """State dicts of networks that differ in everything, the running statistics of their batch norm too."""
    networks = []
    for i in range(number):
        torch.manual_seed(i)
        network = Network(tied).to(dtype)
        nn.init.normal_(network.norm.weight, 1, 0.5)
        network.norm.running_mean.normal_()
        network.norm.running_var.uniform_(0.5, 2)
        networks.append(network)
    return [{name: t.clone() for name, t in network.state_dict().items()} for network in networks]


def loaders(weights):
    return [lambda w=w: w for w in weights]


def data(images=70, dtype=torch.float32):
    generator = torch.Generator().manual_seed(99)
    labels = torch.randint(6, (images,), generator=generator)
    inputs = F.one_hot(labels, 6) + 0.5 * torch.randn(images, 6, generator=generator)
    return inputs.to(dtype), labels


def naive_loss(network, weights, coefficients, layout, batch):
    """The slow obvious way: a differentiable mix of all ingredients, called through torch.func."""
    logits, beta = coefficients
    shares = logits.softmax(dim=1)
    mixed = {
        name: sum(shares[layout.row[name], i].to(w[name].dtype) * w[name] for i, w in enumerate(weights))
        for name in layout.targets
    }
    mixed |= {name: mixed[name].detach() for name, _ in network.named_buffers() if name in mixed}  # has no gradient
    return F.cross_entropy(beta * functional_call(network, mixed, (batch[0],)), batch[1])


@pytest.mark.parametrize("per", EVERY)
@pytest.mark.parametrize("place", ["stream", "host", "device"])
def test_the_gradient_is_that_of_autograd_through_a_mix_of_all_ingredients(per, place):
    weights, batch = pool(4), data()
    network = Network().eval()
    layout = Layout.of(network, per)
    state = State.fresh("", len(layout.groups), 4, LearnedSettings(lr=1e-9))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        state.logits.copy_(torch.randn(state.logits.shape, generator=generator))
        state.beta.fill_(1.7)
    logits, beta = (tensor.detach().clone().requires_grad_() for tensor in (state.logits, state.beta))
    naive = naive_loss(Network().eval(), weights, (logits, beta), layout, batch)
    naive.backward()
    placement = settle(loaders(weights), layout.targets, weights[0], place=place)
    step(network, layout, placement, state, batch)
    assert logits.grad.abs().max() > 1e-3
    torch.testing.assert_close(state.logits.grad, logits.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(state.beta.grad, beta.grad, rtol=1e-5, atol=1e-7)
    assert state.losses == [pytest.approx(naive.item(), rel=1e-5)]


@pytest.mark.parametrize("per", EVERY)
def test_a_whole_run_ends_where_autograd_through_the_mix_ends(per):
    weights, (inputs, labels) = pool(3, dtype=torch.float64), data(dtype=torch.float64)
    settings = LearnedSettings(per=per, batch_size=32, weight_decay=0.02)
    batches = shuffled(inputs, labels, settings.batch_size, 0)
    soup = learned(Network().double(), loaders(weights), batches, settings)
    layout = Layout.of(Network().double(), per)
    logits = torch.zeros(len(layout.groups), 3, dtype=torch.float64, requires_grad=True)
    beta = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([logits, beta], lr=0.1, weight_decay=0.02)
    for epoch in range(3):
        for batch in batches(epoch):
            optimizer.zero_grad()
            naive_loss(Network().double().eval(), weights, (logits, beta), layout, batch).backward()
            optimizer.step()
    torch.testing.assert_close(soup.coefficients, logits.softmax(dim=1).detach(), rtol=1e-8, atol=1e-10)
    assert soup.beta == pytest.approx(beta.item(), rel=1e-8)
    assert len(soup.losses) == 9


@pytest.mark.parametrize("per", EVERY)
def test_it_starts_from_the_uniform_soup_at_temperature_one(per):
    weights = pool(5)
    soup = learned(Network(), loaders(weights), shuffled(*data(), 32, 0), LearnedSettings(per=per, epochs=0))
    for name, tensor in mean_of(loaders(weights)).items():
        torch.testing.assert_close(soup.weights[name], tensor, rtol=2**-22, atol=1e-9)
    assert soup.beta == 1
    torch.testing.assert_close(soup.coefficients, torch.full_like(soup.coefficients, 1 / 5))


def test_the_final_soup_is_the_float64_mix_of_the_original_ingredients():
    weights = pool(4)
    soup = learned(Network(), loaders(weights), shuffled(*data(), 32, 0), LearnedSettings(per="layer"))
    assert soup.groups == ("head", "embedding", "blocks.0", "blocks.1")
    assert soup.coefficients.shape == (4, 4)
    assert soup.coefficients.std(dim=1).min() > 1e-3
    row = {"embed.weight": 1, "head.weight": 1, "blocks.1.bias": 3, "norm.running_var": 0, "norm.weight": 0}
    for name, group in row.items():
        shares = soup.coefficients[group]
        expected = sum(a * w[name].double() for a, w in zip(shares, weights, strict=True)).float()
        torch.testing.assert_close(soup.weights[name], expected, rtol=2**-22, atol=1e-9)
    assert soup.weights["norm.num_batches_tracked"].dtype == torch.int64


def test_the_statistics_of_a_batch_norm_are_mixed_while_learning_too():
    weights = pool(3)
    network = Network()
    learned(network, loaders(weights), lambda epoch: [data()], LearnedSettings(epochs=1))
    mean = sum(w["norm.running_var"] for w in weights) / 3  # the mix of the only step was uniform
    torch.testing.assert_close(network.norm.running_var, mean)


@pytest.mark.parametrize("per", EVERY)
def test_tied_tensors_have_one_coefficient_and_stay_equal(per):
    soup = learned(Network(), loaders(pool(3)), shuffled(*data(), 32, 0), LearnedSettings(per=per))
    assert torch.equal(soup.weights["embed.weight"], soup.weights["head.weight"])
    if per == "tensor":
        assert "head.weight" not in soup.groups
        assert "embed.weight" in soup.groups


def test_where_ingredients_live_changes_no_bit_and_rounded_differences_little():
    batches = shuffled(*data(), 32, 0)
    settings = LearnedSettings(per="layer")
    results = {}
    for place, differences in [("stream", False), ("host", False), ("device", False), ("host", True), ("device", True)]:
        chosen = replace(settings, place=place, differences=differences)
        results[place, differences] = learned(Network(), loaders(pool(4)), batches, chosen)
    exact = results["stream", False]
    for (place, differences), soup in results.items():
        if not differences:
            assert torch.equal(soup.coefficients, exact.coefficients), place
        else:
            assert (soup.coefficients - exact.coefficients).abs().max() < 0.01
            assert not torch.equal(soup.coefficients, exact.coefficients)


def test_the_number_of_threads_changes_no_bit_of_mixes_and_products_and_stays_as_it_was():
    generator = torch.Generator().manual_seed(0)
    sizes = {"large": 2 * BLOCK + 12_345, "small": 7, "half": BLOCK // 2 + 1}
    models = [{name: torch.randn(size, generator=generator) for name, size in sizes.items()} for _ in range(3)]
    shares, before, found = [0.5, 0.3, 0.2], torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        targets = {name: torch.zeros(size, requires_grad=True) for name, size in sizes.items()}
        placement = settle(loaders(models), targets, models[0], place="stream")
        mix_into(targets, placement, lambda name: shares)
        gradients = {name: target.detach().clone() for name, target in targets.items()}
        found.append((gradients, inner_products(gradients, placement)))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    (one, products), (other, others) = found
    assert torch.equal(products, others)
    for row, name in enumerate(sizes):
        assert torch.equal(one[name], other[name])
        mixed = sum(share * model[name].double() for share, model in zip(shares, models, strict=True))
        torch.testing.assert_close(one[name], mixed.float())
        expected = torch.stack([mixed @ model[name].double() for model in models])
        torch.testing.assert_close(products[row], expected, rtol=1e-3, atol=1e-2)


def test_the_network_keeps_its_mode_and_frozen_parameters_and_drops_its_gradients():
    network = Network().train()
    network.blocks[0].eval()
    network.embed.weight.requires_grad_(False)
    soup = learned(network, loaders(pool(2)), shuffled(*data(), 32, 0), LearnedSettings(per="tensor", epochs=1))
    assert (network.training, network.blocks[0].training, network.blocks[1].training) == (True, False, True)
    assert not network.embed.weight.requires_grad
    assert network.norm.weight.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    frozen = soup.coefficients[soup.groups.index("embed.weight")]
    assert frozen[0] != frozen[1]  # learned all the same: the ingredients differ there


def test_minibatches_cover_the_split_in_an_order_of_their_key_and_epoch_alone():
    inputs, labels = torch.arange(10.0), torch.arange(10)
    batches = shuffled(inputs, labels, 4, "key")
    first = [batch[1].tolist() for batch in batches(0)]
    assert [len(rows) for rows in first] == [4, 4, 2]
    assert sorted(row for rows in first for row in rows) == list(range(10))
    assert all(torch.equal(x.long(), y) for x, y in batches(0))
    assert [y.tolist() for _, y in batches(1)] != first == [y.tolist() for _, y in batches(0)]
    assert [y.tolist() for _, y in shuffled(inputs, labels, 4, "other")(0)] != first


def test_the_settings_are_the_papers_and_the_batch_and_the_decay_the_authors_scripts():
    paper = LearnedSettings()
    assert (paper.per, paper.lr, paper.epochs, paper.weight_decay, paper.batch_size) == ("model", 0.1, 3, 0.0, 256)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blocks.0.bias": torch.zeros(9)}, r"ingredient 1: tensor 'blocks.0.bias' is F32 \(9,\), but F32 \(8,\) in"),
        ({"blocks.0.bias": torch.tensor([1.0] * 7 + [torch.inf])}, "ingredient 1: tensor 'blocks.0.bias' holds NaN"),
        ({"extra": torch.zeros(1)}, "ingredient 1: tensor 'extra' is not in the network"),
    ],
)
def test_ingredients_that_do_not_fit_are_refused_by_name(changes, words):
    good, other = pool(2)
    with pytest.raises(UserError, match=words):
        learned(Network(), loaders([good, other | changes]), shuffled(*data(), 32, 0), LearnedSettings(epochs=1))


def test_ingredients_in_several_kinds_of_numbers_are_learned_as_in_one():
    good, other = pool(2)
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in other.items()}
    same, mixed = (
        learned(Network(), loaders([good, each]), shuffled(*data(), 32, 0), LearnedSettings(epochs=1))
        for each in (other, wide)
    )
    for name, tensor in same.weights.items():
        torch.testing.assert_close(mixed.weights[name].float(), tensor.float(), msg=name)


def test_no_ingredients_and_differences_that_stream_are_refused():
    with pytest.raises(ValueError, match="at least one model"):
        learned(Network(), [], shuffled(*data(), 32, 0), LearnedSettings())
    with pytest.raises(ValueError, match="not stream"):
        learned(Network(), loaders(pool(2)), shuffled(*data(), 32, 0), LearnedSettings(differences=True))


def test_a_loss_that_is_not_a_number_is_refused_with_its_step():
    inputs, labels = data()
    with pytest.raises(ValueError, match="the loss of step 0 is nan"):
        learned(Network(), loaders(pool(2)), shuffled(inputs * torch.nan, labels, 32, 0), LearnedSettings())


def test_a_state_of_other_ingredients_or_settings_or_damaged_is_refused(tmp_path):
    path, batches, settings = tmp_path / "state.pt", shuffled(*data(), 32, 0), LearnedSettings(epochs=1)
    first = learned(Network(), loaders(pool(2)), batches, settings, state_path=path, identity="a")
    again = learned(Network(), loaders(pool(2)), lambda epoch: 1 / 0, settings, state_path=path, identity="a")
    assert torch.equal(first.coefficients, again.coefficients)  # finished: no batch was asked for
    assert first.losses == again.losses
    for other in ({"identity": "b"}, {"settings": replace(settings, lr=0.2)}):
        arguments = {"settings": settings, "identity": "a"} | other
        with pytest.raises(UserError, match="belongs to other ingredients or settings: delete it"):
            learned(Network(), loaders(pool(2)), batches, state_path=path, **arguments)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="damaged"):
        learned(Network(), loaders(pool(2)), batches, settings, state_path=path, identity="a")


def test_files_are_learned_as_what_they_hold_is_and_tied_names_are_read(tmp_path):
    weights = pool(2, tied=False)
    for i, w in enumerate(weights):
        save_weights(tmp_path / f"{i}.safetensors", w)
    files = [LazyWeights(tmp_path / f"{i}.safetensors") for i in range(2)]
    batches, settings = shuffled(*data(), 32, 0), LearnedSettings(per="tensor")
    streamed = learned(Network(False), [lambda f=f: f for f in files], batches, settings)
    held = learned(Network(False), loaders(weights), batches, settings)
    assert all(torch.equal(streamed.weights[name], held.weights[name]) for name in weights[0])
    torch.save({"a": weights[0]["embed.weight"], "b": weights[0]["embed.weight"]}, tmp_path / "tied.pt")
    tied = LazyWeights(tmp_path / "tied.pt")
    assert sorted(tied) == ["a", "b"]
    assert torch.equal(tied["a"], tied["b"])
