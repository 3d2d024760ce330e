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

def names_of(net, ops):
    "Return the names of the modules of some (block, op)."
    return set().union(*(net.op_modules[op] for op in ops))

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
def read(net): return names_of(net, [(l, o) for l,o,*_ in net.reads(HALVES)])

def test_a_path_reads_the_copies_of_its_widths_and_inputs(net):
    first = Copy(0, width=1)
    both = Copy(1, width=1, input=2) # the third set of {0}, {1}, {0, 1}
    projection = Copy(1, width=1)
    assert [*net.reads(HALVES)] == [(21,first,4,8,16), (0,projection,4,8,16), (22,both,4,8,16),
                                    (1,projection,4,8,16), (5,1)]

def test_widths_are_rounded_down_and_up(net):
    assert len(net.widths) == 6
    convs = [op[0][0] for op in net.stacks[1][0].ops[4][0]]
    assert {conv.weight.shape[0] for conv in convs} == {16, 8, 6, 5, 4} # thirds are 6 or 5
    assert all(conv.weight.shape[0] == conv.weight.shape[1] for conv in convs)

def test_every_width_is_drawn_by_itself(net):
    full, half = (net.stacks[1][0].ops[0][0][i][0].weight for i in (0, 1))
    assert half.shape == full[:8, :8].shape and not torch.equal(half, full[:8, :8])

def test_a_step_reaches_what_the_path_reads(net, read):
    reached = params_of(net, read)
    others = names_of(net, net.op_modules) - read
    assert all(p.grad is not None for p in reached)
    assert all(p.grad is None for p in params_of(net, others) - reached)

def test_a_step_moves_the_statistics_of_what_the_path_reads(net, read):
    others = names_of(net, net.op_modules) - read
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
    read = names_of(net, net.reads(path))
    with_norms = {name for name in read if any(map(is_bn, net.get_submodule(name).modules()))}
    def has_moved(op): return any(name.startswith(f'{op}.') for name in moved)
    assert set(filter(has_moved, names_of(net, net.op_modules))) == with_norms
