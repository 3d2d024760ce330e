"""The networks are the benchmarks' networks: parameters and multiply-accumulates of every row of their tables."""
import pandas as pd
from kshot.cost import Cost
from kshot.nb101 import EDGES, nb101_hash
from kshot.networks import get_net
from kshot.spaces import get_space

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
        edges = {(at[i],at[j]): int(b) for (i,j),b in zip([(i,j) for i,j in EDGES if j < V], bits)}
        yield (*(edges.get(e, 0) for e in EDGES), *map(int, ops), *(0,)*(7-V))

def test_params_and_hash_of_every_nb101_row(data):
    table, space = pd.read_parquet(data/'nas_bench_101_subset20001.parquet'), get_space('nb101')
    paths = [space.check(p) for p in nb101_paths(table)]
    assert len(paths) == 20_001
    assert [nb101_hash(p) for p in paths] == table.hash.tolist()
    assert (Cost(get_net('nb101'), (3,32,32))(paths)[:,1] == table.params).all()
