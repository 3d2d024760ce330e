"Every op has the promised shape, and a sliced op is its plain module at every width"
import copy

import pytest
import torch
from torch import nn

from kshot.benchmark import BENCHMARKS, get_space
from kshot.nets.layers import SupernetOnly, leading_channels, round_channels
from kshot.nets.ops import MIDDLE_OPS, OPS, make_op, mbconv, shuffle
from kshot.nets.views import VIEWS
from kshot.spaces import DARTS_OPS, NB201_OPS

SLICED = {'mb3_k3': mbconv(3, 3), 'mb6_k5_hs_se': mbconv(6, 5, act=nn.Hardswish, has_se=True),
          'shuffle_k7': shuffle(7), 'xception': shuffle(0)}
CHAINS = [b.space for b in BENCHMARKS.values() if not b.has_cells and b.name != 'autoformer']
CHAIN_BLOCKS = sum((space.blocks for space in CHAINS), ())
CHAIN_OPS = set().union(*(block.choices for block in CHAIN_BLOCKS)) - {*VIEWS}
SHUFFLE_OPS = get_space('shufflenet').blocks[0].choices
SHAPES = (8, 1), (8, 2), (12, 2) # output channels, stride

def is_possible(op_name, c_out, stride):
    "Return whether an op can lead from 8 channels to `c_out`."
    if op_name in SHUFFLE_OPS: return (c_out, stride) != (8, 2) # with stride 2 they add some
    return c_out == 8 or op_name in CHAIN_OPS # ops of cells keep the channels

def test_every_op_belongs_to_a_space():
    assert CHAIN_OPS | {*NB201_OPS, *DARTS_OPS} == set(OPS)

@pytest.mark.parametrize('op_name', OPS)
def test_every_op_has_the_promised_shape(op_name):
    x = torch.randn(2, 8, 6, 6)
    for c_out,stride in SHAPES:
        if is_possible(op_name, c_out, stride):
            assert make_op(op_name, 8, c_out, stride)(x).shape == (2, c_out, 6//stride, 6//stride)

@pytest.mark.parametrize('op_name', sorted(CHAIN_OPS))
def test_an_op_with_a_middle_can_be_sliced(op_name):
    assert isinstance(make_op(op_name, 8, 8, 1, is_sliced=True), SupernetOnly) == (op_name in MIDDLE_OPS)

def gradients(module, x, *width):
    "Return the output of a module and the gradient of its input; leave its own in place."
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x, *width)
    out.square().sum().backward()
    return out, x.grad

def check_like_plain(op, x, width):
    "Compare outputs, gradients and statistics of a sliced op with those of its plain module."
    plain = copy.deepcopy(op.plain(width))
    full = dict(op.named_parameters())
    before = {name: t.clone() for name,t in op.named_buffers()}
    for is_training in (True, False):
        op.train(is_training)
        plain.train(is_training)
        torch.testing.assert_close(gradients(op, x, width), gradients(plain, x))
        for name,p in plain.named_parameters():
            grad = full[name].grad
            torch.testing.assert_close(leading_channels(grad, *p.shape), p.grad)
            torch.testing.assert_close(grad.norm(), p.grad.norm()) # nothing outside of the slice
        for name,t in plain.named_buffers():
            statistics = op.get_buffer(name)
            torch.testing.assert_close(leading_channels(statistics, *t.shape), t)
            if t.ndim: assert torch.equal(statistics[len(t):], before[name][len(t):])

@pytest.mark.parametrize('c_out,stride', [(8, 1), (12, 2)])
@pytest.mark.parametrize('op_name', SLICED)
def test_a_sliced_op_is_its_plain_module(op_name, c_out, stride):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4, 4).double()
    op = SLICED[op_name](8, c_out, stride, is_sliced=True).double()
    for width in sorted({round_channels(op.middle, .3), op.middle}): check_like_plain(op, x, width)
    plain = SLICED[op_name](8, c_out, stride).double()
    plain.load_state_dict(op.state_dict())
    assert torch.equal(op.eval()(x, op.middle), plain.eval()(x))
