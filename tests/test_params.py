"""The networks are the benchmarks' networks: parameters and multiply-accumulates of every row of their tables and of what papers publish."""
import copy

import numpy as np
import pandas as pd
import pytest
import torch
from kshot.cost import Cost
from kshot.evaluate import recalibrate_bn
from kshot.nb101 import NB101_EDGES, nb101_hash
from kshot.benchmark import BENCHMARKS, get_benchmark, get_net, get_space
from kshot.networks import subnet
from kshot.spaces import WIDTHS
from kshot.supernet import Supernet

PUBLISHED = { # millions of MACs and parameters: GreedyNAS-B and -C (5.2, 4.7 published), SPOS (3.5 published)
    'mobilenet_se': {
        '5,3,S | 5,3,S | 5,3,S | id | 5,3,S | 7,3,S | 5,3,S | 3,3,- | 5,6,- | id | 7,3,S | 7,3,S | 3,3,S | 5,3,- | 5,3,- | 7,3,S | '
        '5,6,S | 7,3,S | 3,3,S | 7,3,S | 7,6,S': (324, 5.21),
        '7,3,- | id | id | 3,3,S | 5,3,S | id | 3,3,S | 3,3,S | 7,3,S | 5,6,S | 5,3,S | id | 5,3,S | 5,3,- | 3,6,- | 7,3,- | '
        '5,3,S | 3,3,- | 7,3,S | 5,3,- | 7,6,S': (284, 4.74)},
    'shufflenet': {'21012020202300003233': (323, 3.56)}}

def test_params_and_macs_of_every_macro_row(data):
    table, space = pd.read_parquet(data/'nas_bench_macro_cifar10.parquet'), get_space('macro')
    paths = [space.parse(a) for a in table.arch]
    assert sorted(paths) == list(space)
    macs, n_params = Cost(get_net('macro'), (3,32,32))(paths).T
    assert (n_params == table.params).all()
    assert (macs == table.flops).all()

def nb101_paths(table):
    for V,bits,ops in zip(table.num_vertices, table.adj_upper, table.ops):
        at = [*range(V-1), 6] # a path's numbers of the cell's vertices
        edges = {(at[i],at[j]): int(b) for (i,j),b in zip([(i,j) for i,j in NB101_EDGES if j < V], bits)}
        yield (*(edges.get(e, 0) for e in NB101_EDGES), *map(int, ops), *(0,)*(7-V))

def test_params_and_hash_of_every_nb101_row(data):
    table, space = pd.read_parquet(data/'nas_bench_101_subset20001.parquet'), get_space('nb101')
    paths = [space.check(p) for p in nb101_paths(table)]
    assert len(paths) == 20_001
    assert [nb101_hash(p) for p in paths] == table.hash.tolist()
    assert (Cost(get_net('nb101'), (3,32,32))(paths)[:,1] == table.params).all()

def test_macs_and_params_that_greedynas_and_spos_publish():
    for name,published in PUBLISHED.items():
        with torch.device('meta'): net = get_net(name, n_classes=1000)
        space, cost = get_space(name), Cost(net, get_benchmark(name).x_shape)
        for arch,(macs_m,params_m) in published.items():
            macs, n_params = cost([space.parse(arch)])[0]
            assert (round(macs/1e6), round(n_params/1e6, 2)) == (macs_m, params_m)

@pytest.mark.parametrize('width_per', ['layer', 'path'])
@pytest.mark.parametrize('name', [b.name for b in BENCHMARKS.values() if b.has_widths])
def test_kshot_over_widths(name, width_per):
    "K supernets of a network with widths: the mix by hand, gradients inside of the slices only, and the subnet"
    torch.manual_seed(0)
    net, space = get_net(name, 4, widths=WIDTHS, width_per=width_per).double(), get_space(name, WIDTHS, width_per)
    supernet, code, x = Supernet(net, 4), torch.tensor([.1,.2,.3,.4]).double(), torch.randn(3, 3, 64, 64).double()
    by_hand, cost = copy.deepcopy(net), Cost(copy.deepcopy(net).float(), (3,64,64))
    mixed = {n: torch.einsum('k,k...->...', code, t) for n,t in supernet.tensors().items()}
    with torch.no_grad():
        for n,p in by_hand.named_parameters(): p.copy_(mixed[n])
    for path in space.sample(np.random.default_rng(0), 2):
        supernet.zero_grad(); by_hand.zero_grad()
        out, expected = supernet(x, path, code), by_hand(x, path)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward(); expected.square().sum().backward()
        dbank = supernet.tensors({k: torch.zeros_like(b) if b.grad is None else b.grad for k,b in supernet.banks.items()})
        for n,p in by_hand.named_parameters(): # the even step: code over its squared length
            if p.grad is not None: torch.testing.assert_close(dbank[n], torch.einsum('k,...->k...', code/code.square().sum(), p.grad))
        sub = supernet.subnet(path, code)
        torch.testing.assert_close(sub(x), out)
        assert cost.n_params(path) == sum(p.numel() for p in sub.parameters())
        torch.testing.assert_close(subnet(by_hand, path)(x), out)

def test_batch_norm_of_a_width_is_recalibrated_as_the_plain_module():
    torch.manual_seed(0)
    net, space = get_net('mobilenet_se', 4, widths=WIDTHS).double(), get_space('mobilenet_se', WIDTHS)
    supernet, code, path = Supernet(net, 2), torch.tensor([.3,.7]).double(), space.sample(np.random.default_rng(1), 1)[0]
    batches = [(torch.randn(3, 3, 64, 64).double(), None) for _ in range(2)]
    weights, = supernet.weights([path], code[None])
    stats = recalibrate_bn(supernet, path, weights, batches)
    sub = supernet.subnet(path, code)
    for m in sub.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = None # a cumulative mean
    with torch.no_grad():
        for x,_ in batches: sub(x)
        torch.testing.assert_close(supernet.eval().run_with(batches[0][0], path, weights, stats), sub.eval()(batches[0][0]))
        torch.testing.assert_close(supernet.subnet(path, code, stats).eval()(batches[0][0]), sub(batches[0][0]))
