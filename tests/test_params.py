"Parameters and MACs of every row of the benchmarks' tables, and of what papers publish"
import copy

import numpy as np
import pandas as pd
import pytest
import torch

from kshot.benchmark import BENCHMARKS, get_benchmark, get_net, get_space
from kshot.cost import Cost
from kshot.evaluate import recalibrate_bn
from kshot.nb101 import NB101_EDGES, nb101_hash
from kshot.networks import subnet
from kshot.spaces import WIDTHS
from kshot.supernet import Supernet

GREEDY_B = ('5,3,S | 5,3,S | 5,3,S | id | 5,3,S | 7,3,S | 5,3,S | 3,3,- | 5,6,- | id | 7,3,S | '
            '7,3,S | 3,3,S | 5,3,- | 5,3,- | 7,3,S | 5,6,S | 7,3,S | 3,3,S | 7,3,S | 7,6,S')
GREEDY_C = ('7,3,- | id | id | 3,3,S | 5,3,S | id | 3,3,S | 3,3,S | 7,3,S | 5,6,S | 5,3,S | id | '
            '5,3,S | 5,3,- | 3,6,- | 7,3,- | 5,3,S | 3,3,- | 7,3,S | 5,3,- | 7,6,S')
_RATIOS = '3.5 3.5 3.0 3.5 3.0 3.0 4.0 4.0 3.5 4.0 3.5 4.0 3.5'.split()
AUTOFORMER_T = ' | '.join(['192 x 13', *(f'{4 if l == 10 else 3},{ratio}' for l,ratio in enumerate(_RATIOS))])
PUBLISHED = [ # space, architecture, millions of MACs and parameters; 5.2, 4.7, 3.5 and 5.8 are published
    ('mobilenet_se', GREEDY_B, 324, 5.21),
    ('mobilenet_se', GREEDY_C, 284, 4.74),
    ('shufflenet', '21012020202300003233', 323, 3.56),
    ('autoformer', AUTOFORMER_T, 1312, 5.87)]

def test_params_and_macs_of_every_macro_row(data):
    table = pd.read_parquet(data/'nas_bench_macro_cifar10.parquet')
    space = get_space('macro')
    paths = [space.parse(arch) for arch in table.arch]
    assert sorted(paths) == list(space)
    macs, n_params = Cost(get_net('macro'), (3,32,32))(paths).T
    assert (n_params == table.params).all()
    assert (macs == table.flops).all()

def nb101_path_of(n_vertices, bits, ops):
    "Return the path of a row: edges in the upper triangle, ops as digits."
    vertices = [*range(n_vertices-1), 6] # numbers that a path gives to the cell's vertices
    pairs = [(i, j) for i,j in NB101_EDGES if j < n_vertices]
    edges = {(vertices[i], vertices[j]): int(bit) for (i,j),bit in zip(pairs, bits)}
    return (*(edges.get(edge, 0) for edge in NB101_EDGES), *map(int, ops), *(0,)*(7-n_vertices))

def test_params_and_hash_of_every_nb101_row(data):
    table = pd.read_parquet(data/'nas_bench_101_subset20001.parquet')
    space = get_space('nb101')
    paths = list(map(nb101_path_of, table.num_vertices, table.adj_upper, table.ops))
    assert len(paths) == 20_001
    for path in paths: space.check(path)
    assert [nb101_hash(path) for path in paths] == table.hash.tolist()
    assert (Cost(get_net('nb101'), (3,32,32))(paths)[:,1] == table.params).all()

@pytest.mark.parametrize('name,arch,macs_m,params_m', PUBLISHED)
def test_macs_and_params_that_authors_publish(name, arch, macs_m, params_m):
    benchmark = get_benchmark(name)
    with torch.device('meta'): net = get_net(name, n_classes=1000)
    macs, n_params = Cost(net, benchmark.x_shape)([benchmark.space.parse(arch)])[0]
    assert (round(macs/1e6), round(n_params/1e6, 2)) == (macs_m, params_m)

def mix_by_hand(net, supernet, code):
    "Return a copy of a network with the mixed weights of K supernets."
    mixed = copy.deepcopy(net)
    banks = supernet.tensors()
    with torch.no_grad():
        for name,parameter in mixed.named_parameters():
            parameter.copy_(torch.einsum('k,k...->...', code, banks[name]))
    return mixed

@pytest.mark.parametrize('width_per', ['layer', 'path'])
@pytest.mark.parametrize('name', [b.name for b in BENCHMARKS.values() if b.has_widths])
def test_kshot_over_widths(name, width_per):
    "The mix by hand, gradients inside the slices only, and the subnet."
    torch.manual_seed(0)
    net = get_net(name, 4, widths=WIDTHS, width_per=width_per).double()
    cost = Cost(copy.deepcopy(net).float(), (3,64,64))
    supernet = Supernet(net, 4)
    code = torch.tensor([.1,.2,.3,.4]).double()
    x = torch.randn(3, 3, 64, 64).double()
    by_hand = mix_by_hand(net, supernet, code)
    for path in get_space(name, WIDTHS, width_per).sample(np.random.default_rng(0), 2):
        supernet.zero_grad()
        by_hand.zero_grad()
        out = supernet(x, path, code)
        expected = by_hand(x, path)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        check_gradients(supernet, by_hand, code/code.square().sum()) # the even step
        module = supernet.subnet(path, code)
        torch.testing.assert_close(module(x), out)
        assert cost.n_params(path) == sum(p.numel() for p in module.parameters())
        torch.testing.assert_close(subnet(by_hand, path)(x), out)

def check_gradients(supernet, by_hand, step):
    "The banks get the gradient of the mixed weights, `step` times."
    def gradient(bank): return torch.zeros_like(bank) if bank.grad is None else bank.grad
    gradients = supernet.tensors({k: gradient(bank) for k,bank in supernet.banks.items()})
    for name,parameter in by_hand.named_parameters():
        if parameter.grad is None: continue
        expected = torch.einsum('k,...->k...', step, parameter.grad)
        torch.testing.assert_close(gradients[name], expected)

def test_batch_norm_of_a_width_is_recalibrated_as_the_plain_module():
    torch.manual_seed(0)
    supernet = Supernet(get_net('mobilenet_se', 4, widths=WIDTHS).double(), 2)
    code = torch.tensor([.3,.7]).double()
    path, = get_space('mobilenet_se', WIDTHS).sample(np.random.default_rng(1), 1)
    batches = [(torch.randn(3, 3, 64, 64).double(), None) for _ in range(2)]
    weights, = supernet.weights([path], code[None])
    stats = recalibrate_bn(supernet, path, weights, batches)
    module = supernet.subnet(path, code)
    for m in module.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = None # a cumulative mean
    x, _ = batches[0]
    with torch.no_grad():
        for images,_ in batches: module(images)
        expected = module.eval()(x)
        torch.testing.assert_close(supernet.eval().run_with(x, path, weights, stats), expected)
        torch.testing.assert_close(supernet.subnet(path, code, stats).eval()(x), expected)
