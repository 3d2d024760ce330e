"Heuristics of weight sharing and their combinations: subnets and supernets of all networks"
import numpy as np
import pytest
import torch
from torch import nn

from kshot.benchmark import BENCHMARKS, get_net, get_space
from kshot.nets.layers import SupernetOnly
from kshot.nets.ops import Zero
from kshot.networks import op_modules, reads, subnet
from kshot.spaces import WIDTHS
from kshot.supernet import Supernet

def small_image(name, n=2):
    C, *sides = BENCHMARKS[name].x_shape
    return torch.randn(n, C, *(min(32, px) for px in sides))

def shake(net):
    "Give a network weights and statistics other than those at the start, none of them small."
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            tensors = module.running_mean, module.running_var, *module.parameters()
            for tensor in tensors: nn.init.uniform_(tensor, .5, 1.5)
        if getattr(module, 'matrix', None) is not None: nn.init.normal_(module.matrix)
    return net

def called_modules(net, names, x, path) -> tuple[set[str], torch.Tensor]:
    "Return those of `names` that a forward pass calls, and its output."
    called = set()
    def note(name): return lambda *_: called.add(name)
    hooks = [net.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    with torch.no_grad(): y = net(x, path)
    for hook in hooks: hook.remove()
    return called, y

def check_subnets(name, n_paths, **options):
    "The subnet is the network at a path, in plain modules; what is read is what is called."
    n_cells = BENCHMARKS[name].has_cells*(3 if 'd' in name else 1)
    net = shake(get_net(name, 4, n_cells, px=32, **options)).eval()
    ops = op_modules(net)
    names = [n for of_op in ops.values() for n in of_op]
    x = small_image(name)
    space = get_space(name, options.get('widths', ()))
    for path in space.sample(np.random.default_rng(0), n_paths):
        called, y = called_modules(net, names, x, path)
        read = {n for l,o,*_ in reads(net, path) for n in ops[l,o]}
        left_out = {n for n in read if name == 'nb201' and isinstance(net.get_submodule(n), Zero)}
        assert called == read - left_out
        module = subnet(net, path)
        torch.testing.assert_close(module(x), y, atol=1e-4, rtol=1e-4)
        assert not any(isinstance(m, SupernetOnly) for m in module.modules())
    return net

HALVES = ('[[[0,1,1,0],[0,0,0,1],[0,0,0,1],[0,0,0,0]],'
          '["input","conv3x3-bn-relu","conv1x1-bn-relu","output"]]')

@pytest.mark.parametrize('channelling', ['random', 'shuffled', 'interpolated', 'disjoint'])
def test_channelling(channelling):
    net = check_subnets('nb101', 2, channelling=channelling).train()
    path = get_space('nb101').parse(HALVES)
    x = torch.randn(2, 3, 8, 8)
    is_fixed = channelling in ('interpolated', 'disjoint') # the others draw in training
    assert torch.equal(net(x, path), net(x, path)) == is_fixed

def test_interpolated_channels_are_others_than_the_first():
    path = get_space('nb101').parse(HALVES)
    x = torch.randn(2, 3, 8, 8)
    fixed = get_net('nb101', 4, 1)
    mean = get_net('nb101', 4, 1, channelling='interpolated')
    mean.load_state_dict(fixed.state_dict())
    assert not torch.equal(fixed(x, path), mean(x, path))

SUBNETS = [
    ('nb101', 3, dict(kernel='transform', channelling='interpolated', wsbn=True, drop_path=.2,
                      affine=False)),
    ('nb101', 3, dict(kernel='crop', op_on='edge')),
    ('nb101', 1, dict(kernel='transform', op_on='edge', channelling='disjoint', drop_path=.2)),
    ('nb101', 1, dict(kernel='crop', wsbn=True, channelling='disjoint')),
    ('nb201', 3, dict(wsbn=True)),
    ('nb201', 3, dict(op_on='node')),
    ('digits', 3, dict(drop_path=.3, dropout=.2, affine=False)),
    ('macro', 3, dict(drop_path=.2)),
    ('darts', 1, dict(kernel='transform', op_on='edge')),
    ('darts', 1, dict(kernel='crop', op_on='node', wsbn=True, drop_path=.2, affine=False)),
    ('nds', 1, dict(wsbn=True, drop_path=.2)),
    ('mobilenet_se', 1, dict(kernel='transform', drop_path=.2, affine=False)),
    ('shufflenet', 1, dict(kernel='crop')),
    ('shufflenet', 1, dict(kernel='crop', widths=WIDTHS)),
    ('mobilenet', 1, dict(kernel='crop', widths=WIDTHS, drop_path=.2)),
    ('autoformer', 3, dict(drop_path=.2, dropout=.1))]

@pytest.mark.parametrize('name,n_paths,options', SUBNETS)
def test_subnets(name, n_paths, options): check_subnets(name, n_paths, **options)

def test_kernels_of_a_node_are_one():
    options = dict(kernel='crop', wsbn=True, op_on='node', drop_path=.3, dropout=.1)
    net = check_subnets('nb201', 3, **options)
    edges = net.stages[0][0].edges
    assert edges[3][2][1].weight is edges[5][3][2][1].weight # into node 3: 1x1 from 0, 3x3 from 2

NB101_PATH = '10011010000100101010102001'
SUPERNETS = [
    ('nb101', NB101_PATH, dict(channelling='shuffled', kernel='transform', wsbn=True)),
    ('nb101', NB101_PATH, dict(channelling='disjoint', drop_path=.2)),
    ('nb101', NB101_PATH, dict(op_on='edge', kernel='crop', affine=False)),
    ('nb201', '323123', dict(kernel='crop', wsbn=True, op_on='node', drop_path=.3, dropout=.1)),
    ('nb201', '323123', dict(op_on='node', kernel='transform')),
    ('digits', '2343', dict(drop_path=.3, dropout=.2)),
    ('macro', '22222222', dict(drop_path=.3, affine=False)),
    ('autoformer', '11'+'02'*14, dict(drop_path=.2, dropout=.1))]

@pytest.mark.parametrize('name,path,options', SUPERNETS)
def test_a_vertex_is_the_plain_network(name, path, options):
    "In training too; a bank gets a gradient where the plain network's parameters get one."
    torch.manual_seed(0)
    path = get_space(name).parse(path)
    net = get_net(name, 4, int(BENCHMARKS[name].has_cells), px=16, **options)
    supernet = Supernet(net, 4)
    x = torch.randn(4, *BENCHMARKS[name].x_shape)[..., :16, :16]
    with torch.no_grad():
        for n,bank in supernet.tensors().items(): net.get_parameter(n).copy_(bank[2])
    outs = []
    for module,*code in ((net,), (supernet, torch.eye(4)[2])):
        torch.manual_seed(1) # of what is dropped and drawn
        outs.append(module(x, path, *code))
        outs[-1].square().sum().backward()
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
    def gradient(bank): return torch.zeros_like(bank) if bank.grad is None else bank.grad
    gradients = supernet.tensors({k: gradient(bank) for k,bank in supernet.banks.items()})
    for n,parameter in net.named_parameters():
        torch.testing.assert_close(gradients[n][2], gradient(parameter), atol=1e-4, rtol=1e-3)
        assert not gradients[n][[0,1,3]].any()
