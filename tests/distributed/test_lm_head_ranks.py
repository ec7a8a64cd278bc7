"""A head whose vocabulary is sharded over two ranks, each with tokens of its own, against the whole head."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.helpers import run_distributed


def data(rank):
    generator = torch.Generator().manual_seed(rank)
    rows = (7, 4)[rank]
    hidden = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(23, (rows,), generator=generator)
    return hidden, targets, torch.randn(2, rows, generator=generator, dtype=torch.float64)


def head():
    generator = torch.Generator().manual_seed(9)
    draw = torch.randn(23, 6, generator=generator, dtype=torch.float64)
    return draw[:, :5].contiguous(), draw[:, 5].contiguous()


SHARDS = (slice(0, 14), slice(14, 23))


def on_a_rank():
    import hf_effi.kernels.lm_head as lm_head

    dist.init_process_group("gloo")
    lm_head.ROW_CHUNK, lm_head.VOCABULARY_TILE = 3, 8
    rank = dist.get_rank()
    hidden, targets, upstream = data(rank)
    weight, bias = (part[SHARDS[rank]].clone().requires_grad_() for part in head())
    hidden.requires_grad_()
    found = {}
    for name, zero in (("all", ()), ("one rank has no upstream gradient", (1,))):
        out = lm_head.lm_head_log_probs(
            hidden,
            weight,
            targets,
            bias,
            outputs=lm_head.OUTPUTS,
            temperature=0.8,
            softcap=4.0,
            group=dist.group.WORLD,
        )
        on = upstream * 0 if rank in zero else upstream
        loss = (out.log_probs * on[0] + out.entropy * on[1]).sum()
        grads = torch.autograd.grad(loss, (hidden, weight, bias))
        found[name] = (*(x.detach() for x in out), *grads)
    frozen = lm_head.lm_head_log_probs(hidden, weight.detach(), targets, group=dist.group.WORLD)
    found["frozen"] = torch.autograd.grad(frozen.log_probs.sum(), hidden)
    try:
        lm_head.lm_head_log_probs(hidden, weight, targets, grad_in_forward=True, group=dist.group.WORLD)
    except ValueError as error:
        found["refused"] = str(error)
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_distributed(on_a_rank, 2)


def expected(zero=(), **scaling):
    from hf_effi.kernels.lm_head import lm_head_reference

    weight, bias = (part.requires_grad_() for part in head())
    outs, hiddens, loss = [], [], 0.0
    for rank in (0, 1):
        hidden, targets, upstream = data(rank)
        hiddens.append(hidden.requires_grad_())
        outs.append(lm_head_reference(hidden, weight, targets, bias if scaling else None, **scaling))
        on = upstream * 0 if rank in zero else upstream
        if not scaling:
            on = torch.stack([torch.ones_like(on[0]), torch.zeros_like(on[0])])
        loss = loss + (outs[-1].log_probs * on[0] + outs[-1].entropy * on[1]).sum()
    return outs, torch.autograd.grad(loss, (*hiddens, weight, bias), allow_unused=True)


@pytest.mark.parametrize(("case", "zero"), [("all", ()), ("one rank has no upstream gradient", (1,))])
def test_shards_equal_the_whole_head(ranks, case, zero):
    outs, (*by_rank, weight, bias) = expected(zero, temperature=0.8, softcap=4.0)
    for rank in (0, 1):
        *found, grad_hidden, grad_weight, grad_bias = ranks[rank][case]
        for one, two in zip(found, outs[rank], strict=True):
            torch.testing.assert_close(one, two.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad_hidden, by_rank[rank], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad_weight, weight[SHARDS[rank]], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad_bias, bias[SHARDS[rank]], rtol=1e-12, atol=1e-12)


def test_frozen_shards(ranks):
    _, (*by_rank, _, _) = expected()
    for rank in (0, 1):
        torch.testing.assert_close(ranks[rank]["frozen"][0], by_rank[rank], rtol=1e-12, atol=1e-12)


def test_gradient_in_the_forward_needs_the_whole_vocabulary(ranks):
    assert all("grad_in_forward" in found["refused"] for found in ranks)
