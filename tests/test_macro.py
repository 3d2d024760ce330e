"""NAS-Bench-Macro's own numbers: parameters and multiply-accumulates of all 6,561 architectures."""
import pandas as pd
from kshot.cost import macs_table, params_table
from kshot.networks import macro_net
from kshot.spaces import get_space

def test_params_and_macs_of_every_architecture(data):
    table, space, net = pd.read_parquet(data/'nas_bench_macro_cifar10.parquet'), get_space('macro'), macro_net()
    paths = [space.parse(a) for a in table.arch]
    assert sorted(paths) == list(space)
    assert (params_table(net).all(paths) == table.params).all()
    assert (macs_table(net, (3,32,32)).all(paths) == table.flops).all()
