"Which channels an op takes, and which weights the copies of an op have, in all combinations"
import copy
from itertools import product

import pytest
import torch
from torch import nn

from kshot.nets.layers import Sliced, narrow
from kshot.nets.ops import relu_conv_bn
from kshot.nets.sharing import Channelled, Copy, SplitNet, own_norms, redraw, variant

C_IN, C_OUT = 5, 7 # of 8 and 12 channels

@pytest.fixture(params=['random', 'shuffled', 'interpolated'])
def channelling(request):
    torch.manual_seed(0)
    return request.param

@pytest.fixture
def op(channelling):
    op = Channelled(Sliced(8, 12, 3), channelling)
    nn.init.uniform_(op[1].weight)
    nn.init.normal_(op[1].bias)
    return op

@pytest.fixture
def x(): return torch.randn(4, C_IN, 6, 6)

def test_channelled_ops_have_the_parameters_of_sliced_ones(op):
    assert dict(op.named_parameters()).keys() == dict(Sliced(8, 12, 3).named_parameters()).keys()

def test_training_draws_channels(op, x, channelling):
    assert torch.equal(op(x, C_IN, C_OUT), op(x, C_IN, C_OUT)) == (channelling == 'interpolated')

def test_a_step_reaches_the_channels_it_read(op, x, channelling):
    op(x, C_IN, C_OUT).sum().backward()
    n_reached = (op[1].bias.grad != 0).sum()
    assert n_reached == 12 if channelling == 'interpolated' else n_reached <= C_OUT

def test_evaluation_draws_nothing(op, x, channelling):
    op.eval()
    y = op(x, C_IN, C_OUT)
    assert torch.equal(op(x, C_IN, C_OUT), y)
    torch.testing.assert_close(op.plain(C_IN, C_OUT)(x), y, atol=1e-6, rtol=0)
    if channelling != 'interpolated': assert torch.equal(narrow(nn.Sequential(*op), x, C_OUT), y)

def test_full_width_is_the_plain_op(op):
    x = torch.randn(4, 8, 6, 6)
    op.eval()
    assert torch.equal(op(x, 8, 12), nn.Sequential(*op)(x))

class OneBlock(SplitNet):
    "Two convolutions and a pooling, to be split by two widths and three inputs."
    def __init__(self):
        super().__init__()
        self.ops = nn.ModuleList([relu_conv_bn(2, 2, 3), relu_conv_bn(2, 2, 1), nn.MaxPool2d(1)])
        self.op_modules = {(0,o): [f'ops.{o}'] for o in range(3)}

    def uses(self, l, o, by): return range(dict(input=3, width=2)[by])

USES = [*product(range(2), range(3))] # width, input

@pytest.fixture
def net():
    torch.manual_seed(0)
    net = OneBlock()
    net.split('width', lambda op, l, use: redraw(copy.deepcopy(op)))
    net.split('input', lambda op, l, use: own_norms(op))
    return net

def test_a_net_that_is_split_twice_has_a_copy_for_each_pair_of_uses(net):
    copies = {Copy(o, width, i) for o in (0, 1) for width,i in USES}
    assert set(net.op_modules) == {(0,2), *((0,use) for use in copies)}
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 2*2*3
    n_params = sum(p.numel() for p in net.parameters())
    assert n_params == 2*(9*4 + 4 + 2*3*4) # weights by width, norms by input

@pytest.mark.parametrize('width,i', USES)
def test_a_use_reads_its_copy(net, width, i):
    op = variant(net.ops[1], width=width, input=i)
    name, = net.op_modules[0,net.copy_for(0, 1, width=width, input=i)]
    first = net.ops[1][width][0]
    assert op is net.get_submodule(name)
    assert op[1].weight is first[1].weight
    assert (op[2].weight is first[2].weight) == (i == 0)

def test_an_op_without_parameters_is_not_split(net):
    assert variant(net.ops[2], width=1, input=2) is net.ops[2]
    assert net.copy_for(0, 2, width=1, input=2) == 2

def test_copies_by_width_are_drawn_anew(net):
    assert not torch.equal(net.ops[0][0][0][1].weight, net.ops[0][1][0][1].weight)

def test_a_step_reaches_one_copy(net):
    x = torch.randn(4, 2, 5, 5)
    op = variant(net.ops[0], width=0, input=1)
    op(x).square().sum().backward()
    moved = {name for name,b in net.named_buffers() if name.endswith('mean') and b.any()}
    assert moved == {'ops.0.0.1.2.running_mean'}
    reached = {use for use in USES if net.ops[0][use[0]][use[1]][2].weight.grad is not None}
    assert reached == {(0, 1)}
    assert net.ops[0][1][0][1].weight.grad is None

def test_a_copy_of_the_net_is_tied_likewise(net):
    again = copy.deepcopy(net)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in net.parameters())
