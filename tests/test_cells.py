"What a step through a network of cells reaches, when its ops are split"
import numpy as np
import pytest
import torch
from torch import nn

from kshot.benchmark import get_space
from kshot.nb101 import nb101_path
from kshot.nets.cells import DartsNet, NB101Net
from kshot.nets.sharing import Copy, own_norms

OPS = 'input', 'conv3x3-bn-relu', 'conv1x1-bn-relu', 'output'
# two vertices share the channels of the cell
HALVES = nb101_path([[0,1,1,1],[0,0,1,1],[0,0,0,1],[0]*4], OPS)

def is_bn(module): return isinstance(module, nn.BatchNorm2d)

def params_of(net, names):
    return set().union(*(net.get_submodule(name).parameters() for name in names))

def with_own_norms(op, l, use): return own_norms(op)

@pytest.fixture(scope='module')
def net():
    "NAS-Bench-101, split by width and by input, after a step; one stack is enough"
    torch.manual_seed(0)
    net = NB101Net(8, 1)
    net.op_modules = {key: names[1:2] for key,names in net.op_modules.items()}
    net.split('width', net.of_width)
    net.split('input', with_own_norms)
    net(torch.randn(2, 3, 8, 8), HALVES).square().sum().backward()
    return net

@pytest.fixture(scope='module')
def read(net): return {name for l,o,*_ in net.reads(HALVES) for name in net.op_modules[l,o]}

def test_a_path_reads_the_copies_of_its_widths_and_inputs(net):
    first, both = Copy(0, width=1), Copy(1, width=1, input=2) # the third set of {0}, {1}, {0, 1}
    projection = Copy(1, width=1)
    assert [*net.reads(HALVES)] == [(21,first,4,8,16), (0,projection,4,8,16), (22,both,4,8,16),
                                    (1,projection,4,8,16), (5,1)]

def test_widths_are_rounded_down_and_up(net):
    assert len(net.widths) == 6
    convs = [op[0][0] for op in net.stacks[1][0].ops[4][0]]
    shares = {channels for n in range(1, 5) for channels in (16//n, -(-16//n))}
    assert {tuple(conv.weight.shape[:2]) for conv in convs} == {(n, n) for n in shares}

def test_every_width_is_drawn_by_itself(net):
    full, half = (net.stacks[1][0].ops[0][0][i][0].weight for i in (0, 1))
    assert half.shape == full[:8, :8].shape and not torch.equal(half, full[:8, :8])

def test_a_step_reaches_what_the_path_reads(net, read):
    reached = params_of(net, read)
    others = {name for names in net.op_modules.values() for name in names} - read
    assert all(p.grad is not None for p in reached)
    assert all(p.grad is None for p in params_of(net, others) - reached)

def test_a_step_moves_the_statistics_of_what_the_path_reads(net, read):
    others = {name for names in net.op_modules.values() for name in names} - read
    moved = {name for name,m in net.named_modules() if is_bn(m) and m.running_mean.any()}
    moved = {name for name in moved if name.startswith('stacks.1')}
    assert moved == {f'{name}.1' for name in read}
    assert {net.get_submodule(name).momentum for name in moved} == {.003}
    for name in others:
        for m in filter(is_bn, net.get_submodule(name).modules()):
            assert not m.running_mean.any() and (m.running_var == 1).all()

@pytest.mark.parametrize('seed', range(3))
def test_a_path_of_darts_moves_the_statistics_of_its_copies(seed):
    net = DartsNet(2, 3)
    net.split('input', with_own_norms)
    path, = get_space('nds').sample(np.random.default_rng(seed), 1)
    net(torch.randn(2, 3, 16, 16), path)
    moved = [name for name,m in net.named_modules() if is_bn(m) and m.num_batches_tracked > 0]
    ops = {name for names in net.op_modules.values() for name in names}
    read = {name for key in net.reads(path) for name in net.op_modules[key]}
    with_norms = {name for name in read if any(map(is_bn, net.get_submodule(name).modules()))}
    assert {op for op in ops if any(name.startswith(f'{op}.') for name in moved)} == with_norms
