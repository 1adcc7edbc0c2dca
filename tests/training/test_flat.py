"""An adapter whose optimizer steps one tensor comes out as one whose parameters are stepped one by one."""

import copy

import pytest
import torch
from torch import nn

from m2m_hf.training.flat import BY_NUMBER, Flat

SHAPES = [(3, 5), (4, 3), (3, 8)]


def adapters(kind: type) -> tuple[list[nn.Parameter], torch.optim.Optimizer, Flat, torch.optim.Optimizer]:
    """Parameters with their optimizer, and the same as one tensor with another."""
    torch.manual_seed(0)
    alone = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    whole = nn.Parameter(torch.cat([part.detach().flatten() for part in alone]))
    views = torch.split(whole.data, [part.numel() for part in alone])
    parts = [nn.Parameter(view.view(shape)) for view, shape in zip(views, SHAPES, strict=True)]
    options = {"lr": 0.01, "weight_decay": 0.1} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    optimizers = [kind([{"params": group}, {"params": []}], **options) for group in (alone, parts)]
    flat = Flat(whole, parts)
    flat.join(optimizers[1])
    assert flat.is_whole
    return alone, optimizers[0], flat, optimizers[1]


def step(alone, optimizer, flat, other, without: int | None = None) -> None:
    """One step of both, where the part `without` has no gradient."""
    for number, (one, part) in enumerate(zip(alone, flat.parts, strict=True)):
        one.grad = None if number == without else torch.randn(one.shape)
        part.grad = copy.deepcopy(one.grad)
    flat.take()
    norm = nn.utils.clip_grad_norm_(alone, 0.5)
    if flat.is_whole:
        assert flat.clip(0.5) == norm
    else:
        nn.utils.clip_grad_norm_(flat.parts, 0.5)
    optimizer.step()
    other.step()
    flat.whole.grad = None
    for part in flat.parts:
        part.grad = None


def are_same(alone, flat) -> bool:
    return all(torch.equal(one, part) for one, part in zip(alone, flat.parts, strict=True))


@pytest.mark.parametrize("kind", BY_NUMBER)
def test_steps_are_those_of_single_parameters_and_so_is_the_state(kind):
    alone, optimizer, flat, other = adapters(kind)
    for _ in range(3):
        step(alone, optimizer, flat, other)
    assert are_same(alone, flat)
    torch.testing.assert_close(other.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    loaded, fresh = adapters(kind), adapters(kind)
    loaded[3].load_state_dict(optimizer.state_dict())  # begun alone, goes on in a group
    fresh[1].load_state_dict(copy.deepcopy(other.state_dict()))  # and the other way round
    for some in (loaded, fresh):
        for one, part, known in zip(some[0], some[2].parts, alone, strict=True):
            one.data.copy_(known.data)
            part.data.copy_(known.data)
    torch.manual_seed(1)
    step(loaded[0], loaded[1], loaded[2], loaded[3])
    torch.manual_seed(1)
    step(fresh[0], fresh[1], flat, other)
    assert are_same(fresh[0], flat)
    assert are_same(fresh[0], loaded[2])


@pytest.mark.parametrize("at", [{0}, {2}, {0, 1, 2, 3}])
def test_a_parameter_without_gradient_is_left_as_it_is(at):
    alone, optimizer, flat, other = adapters(torch.optim.AdamW)
    for number in range(4):
        step(alone, optimizer, flat, other, 1 if number in at else None)
    assert not flat.is_whole
    assert are_same(alone, flat)
    torch.testing.assert_close(other.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    again = adapters(torch.optim.AdamW)
    again[3].load_state_dict(optimizer.state_dict())
    assert not again[2].is_whole  # its parameters had not as many steps


def test_gradients_add_up_and_other_optimizers_keep_their_parameters():
    flat = adapters(torch.optim.AdamW)[2]
    for _ in range(2):
        for part in flat.parts:
            part.grad = torch.ones(part.shape)
        flat.take()
    assert flat.whole.grad.eq(2).all()
    flat.parts[0].grad = torch.ones(SHAPES[0])
    flat.take()
    assert [None if part.grad is None else part.grad.unique().tolist() for part in flat.parts] == [[3.0], [2.0], [2.0]]
    kept = Flat(flat.whole, flat.parts)
    kept.join(torch.optim.Adamax(kept.parts))
    kept.join(torch.optim.AdamW(kept.parts[::-1]))
    kept.join(torch.optim.AdamW([{"params": kept.parts}, {"params": [nn.Parameter(torch.ones(2))]}]))
    assert not kept.is_whole
