"Every benchmark's network and its supernet: same outputs, gradients only where a path reads"
import numpy as np
import pytest
import torch

from kshot.benchmark import BENCHMARKS, get_net, get_space
from kshot.networks import count_params, op_owners, reads, subnet
from kshot.supernet import Supernet

# networks with widths are chains as macro's, and larger
NAMES = [name for name,benchmark in BENCHMARKS.items() if not benchmark.has_widths]
CODE = torch.tensor([.25, .75])

def keep_net(net): return net # all supernets are equal

@pytest.mark.parametrize('name', NAMES)
def test_supernet_does_what_its_network_does(name):
    torch.manual_seed(0)
    C, *_, px = BENCHMARKS[name].x_shape
    px = min(px, 32)
    net = get_net(name, channels=4, n_cells=3*BENCHMARKS[name].has_cells, px=px)
    space, supernet = get_space(name), Supernet(net, K=2, redraw=keep_net)
    assert supernet.sizes == space.sizes
    owners = op_owners(net, supernet.ops)
    def owners_of(name): return frozenset(owners[net.get_submodule(name.rpartition('.')[0])])
    has_params = {owners_of(n) for n,_ in net.named_parameters()}
    x = torch.randn(4, C, px, px)
    for path in space.sample(np.random.default_rng(2), 3):
        supernet.zero_grad()
        out = supernet(x, path, CODE)
        torch.testing.assert_close(out.detach(), net(x, path).detach(), atol=1e-3, rtol=0)
        out.sum().backward()
        trained = set()
        for key,bank in supernet.banks.items():
            if bank.grad is None: continue
            trained.update(owners_of(slot.names[0]) for slot in supernet.slots[key])
        read = {None, *(tuple(op)[:2] for op in reads(net, path))}
        expected = {of for of in has_params if of & read}
        assert trained <= expected
        assert trained == expected or name in ('nb201', 'nds') # a node may feed nothing
        alone = supernet.subnet(path, CODE)
        torch.testing.assert_close(alone(x).detach(), out.detach(), atol=1e-3, rtol=0)
        assert count_params(alone) == count_params(subnet(net, path))
