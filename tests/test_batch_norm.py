"""Batch-norm statistics of a soup: one process, and two that share the data."""

import json

import pytest
import torch
from torch import nn

from soups.batch_norm import recompute_batch_norm
from tests.commands import in_two


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2, momentum=0.3)
    )


def batches(number):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, generator=generator) * (i + 1) for i in range(number)]


def statistics(model):
    return {name: buffer.double().tolist() for name, buffer in model.named_buffers()}


def test_statistics_are_the_means_over_batches_whatever_they_were_before():
    model, data = network().eval(), batches(5)
    model[1].running_mean.fill_(1e6)
    assert recompute_batch_norm(model, [(x, "label") for x in data]) == 5
    hidden = [model[0](x) for x in data]
    torch.testing.assert_close(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert model[1].num_batches_tracked == 5
    assert (model.training, model[4].momentum) == (False, 0.3)


def test_without_batch_norm_no_data_is_read():
    assert recompute_batch_norm(nn.Linear(3, 2), iter(())) == 0


def test_without_data_nothing_changes_and_it_is_said():
    model = network()
    model[1].running_mean.fill_(7)
    before = statistics(model)
    with pytest.raises(ValueError, match="the loader has no batch"):
        recompute_batch_norm(model, [])
    assert statistics(model) == before


def test_a_failure_in_the_midst_leaves_everything_as_it_was():
    model = network().eval()
    model[1].running_mean.fill_(7)
    before = statistics(model)

    def broken():
        yield batches(1)[0]
        raise OSError("a damaged picture")

    with pytest.raises(OSError, match="a damaged picture"):
        recompute_batch_norm(model, broken())
    assert statistics(model) == before
    assert (model.training, model[1].training, model[4].momentum) == (False, False, 0.3)


def test_batches_may_be_dicts_of_arguments_alone_or_in_a_tuple():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, pixels, scale):
            return self.inner(pixels * scale)

    plain, named = network(), Named()
    recompute_batch_norm(plain, [2 * x for x in batches(3)])
    dicts = [{"pixels": x, "scale": 2, "labels": torch.zeros(8)} for x in batches(3)]
    assert recompute_batch_norm(named, [dicts[0], (dicts[1], "label"), [dicts[2]]]) == 3
    assert statistics(named.inner) == statistics(plain)


RANK = """
import json
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from soups.batch_norm import recompute_batch_norm
from tests.test_batch_norm import batches, network, statistics
dist.init_process_group("gloo")
for wrap in (False, True):
    model = network()
    share = 5 if wrap else 3  # a rank without data is where DistributedDataParallel's own messages would hang
    data = batches(5)[:share] if dist.get_rank() == 0 else batches(5)[share:]
    total = recompute_batch_norm(DistributedDataParallel(model) if wrap else model, data)
    print(json.dumps([total, statistics(model)]))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_with_uneven_shares_get_what_one_process_gets_from_all_batches():
    alone = network()
    recompute_batch_norm(alone, batches(5))
    for status, out, err in in_two(["-c", RANK]):
        assert status == 0, err
        for total, found in map(json.loads, out.splitlines()[-2:]):  # bare and wrapped
            assert total == 5
            for name, values in statistics(alone).items():
                torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(values), rtol=1e-6, atol=1e-7)
