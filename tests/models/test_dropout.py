"""PooledDropout: right distribution, identity when off, exact under a seed, same pool whatever was called before."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_genrec.models import dropout as dropout_module
from hf_genrec.models.dropout import PooledDropout, clear_dropout_pools, dropout_pool, pool_size


def test_identity_in_eval_and_at_p_zero():
    x = torch.randn(7, 5)
    assert PooledDropout(0.5).eval()(x) is x
    assert PooledDropout(0.0).train()(x) is x


@pytest.mark.parametrize("p", [0.1, 0.3, 0.75])
def test_keep_rate_and_mean(p):
    torch.manual_seed(0)
    drop = PooledDropout(p)
    outputs = torch.stack([drop(torch.ones(64, 1000)) for _ in range(20)])
    kept = (outputs != 0).float()
    # standard error of the rate over 1.28M draws is below 5e-4
    assert abs(kept.mean().item() - (1 - p)) < 3e-3
    assert abs(outputs.mean().item() - 1.0) < 1e-2
    assert torch.allclose(outputs[outputs != 0], torch.tensor(1 / (1 - p)))
    # no activation is treated specially: every column keeps about 1 - p of 20 * 64 draws (6 standard errors)
    column_rate = kept.mean(dim=(0, 1))
    assert (column_rate - (1 - p)).abs().max() < 6 * (p * (1 - p) / (20 * 64)) ** 0.5


def test_calls_are_uncorrelated():
    torch.manual_seed(0)
    drop = PooledDropout(0.5)
    masks = torch.stack([(drop(torch.ones(20_000)) != 0).float() - 0.5 for _ in range(30)])
    correlation = (masks @ masks.T) / 20_000 / 0.25
    off_diagonal = correlation[~torch.eye(30, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 6 / 20_000**0.5
    # neighbouring activations of one call are uncorrelated too
    assert (masks[:, 1:] * masks[:, :-1]).mean().abs() / 0.25 < 6 / (30 * 20_000) ** 0.5


def test_mask_follows_the_global_seed():
    drop, x = PooledDropout(0.4), torch.ones(100, 10)
    torch.manual_seed(3)
    first = [drop(x) for _ in range(3)]
    state = torch.get_rng_state()
    then = drop(x)
    torch.manual_seed(3)
    assert all(torch.equal(drop(x), mask) for mask in first)
    assert not torch.equal(first[0], first[1])
    torch.set_rng_state(state)
    clear_dropout_pools()  # a new process has no pools yet
    assert torch.equal(drop(x), then)


def test_pool_does_not_depend_on_earlier_larger_calls():
    drop, x = PooledDropout(0.4), torch.ones(1000)
    clear_dropout_pools()
    torch.manual_seed(1)
    alone = drop(x)
    drop(torch.ones(dropout_module.MIN_POOL_SIZE))  # makes a larger pool
    torch.manual_seed(1)
    assert torch.equal(drop(x), alone)
    clear_dropout_pools()


@pytest.mark.parametrize("numel", [0, 1, 1000, 1 << 20, (1 << 20) + 1, 5_000_000])
def test_pool_is_never_too_small(numel):
    size = pool_size(numel)
    assert size >= dropout_module.MIN_POOL_SIZE and size >= 4 * numel and size & (size - 1) == 0


def test_gradient_is_the_mask():
    torch.manual_seed(0)
    x = torch.randn(50, 4, requires_grad=True)
    y = PooledDropout(0.5)(x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, 2.0))


def test_pool_made_in_inference_mode_can_be_trained_with():
    clear_dropout_pools()
    drop = PooledDropout(0.5)
    with torch.inference_mode():
        drop(torch.ones(10))
    x = torch.ones(10, requires_grad=True)
    drop(x).sum().backward()
    assert x.grad is not None


def test_checkpointing_replays_the_same_mask():
    net = nn.Sequential(nn.Linear(8, 8), PooledDropout(0.5), nn.Linear(8, 8))
    x = torch.randn(4, 8, requires_grad=True)
    grads = []
    for use in (False, True):
        torch.manual_seed(5)
        y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False) if use else net(x)
        grads.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(*grads)


def test_dtype_copy_and_state():
    drop = PooledDropout(0.25)
    assert drop(torch.ones(100, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert drop(torch.ones(0, 4)).shape == (0, 4)
    assert drop.state_dict() == {}
    assert copy.deepcopy(drop).p == 0.25 and len(pickle.dumps(drop)) < 2000
    assert isinstance(drop, nn.Dropout)  # found by helpers that switch dropout off
    assert "p=0.25" in repr(drop)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_bad_probability(p):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        PooledDropout(p)


def test_pool_values_are_shared_and_untouched():
    pool = dropout_pool(0.5, torch.device("cpu"), torch.float32, dropout_module.MIN_POOL_SIZE)
    total = pool.sum().item()
    PooledDropout(0.5)(torch.ones(1000)).add_(1)
    assert dropout_pool(0.5, torch.device("cpu"), torch.float32, dropout_module.MIN_POOL_SIZE) is pool
    assert pool.sum().item() == total
