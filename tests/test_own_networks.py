"Supernets of networks as people write them agree with plain torch: sub-weights, frozen norms, shared ops"
import pickle

import pytest
import torch
from fastai.data.core import DataLoaders
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kshot import networks
from kshot.cost import Cost
from kshot.evaluate import calibrated_subnet
from kshot.space import Block, Space
from kshot.supernet import Supernet
from kshot.train import kshot_learner

CODE = torch.tensor([.3, .7])

def conv(): return nn.Conv2d(8, 8, 3, padding=1)

class Net(nn.Module):
    "Stem, blocks of ops, head"
    def __init__(self, *blocks):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(nn.ModuleList(ops) for ops in blocks)
        self.head = nn.Linear(8, 4)
    def forward(self, x, path):
        x = self.stem(x)
        for ops,o in zip(self.blocks, path): x = ops[o](x)
        return self.head(x.mean((2, 3)))

def dynamic_norm(bn, x):
    "Normalize by the first channels of a batch norm, as once-for-all networks do"
    c = x.shape[1]
    if c == bn.num_features: return bn(x)
    factor = 0.
    if bn.training and bn.track_running_stats:
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked += 1
            factor = 1/float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    has_batch_stats = bn.training or not bn.track_running_stats
    stats = bn.running_mean[:c], bn.running_var[:c]
    return F.batch_norm(x, *stats, bn.weight[:c], bn.bias[:c], has_batch_stats, factor, bn.eps)

class Elastic(nn.Module):
    "Kernels of 3 or 5 by a transform, 16 or 32 channels, all from the same weights"
    choices_per_block = 2, 2
    op_modules = {(0,0): [], (0,1): [], (1,0): [], (1,1): []}
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand = nn.Conv2d(8, 32, 1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 5, groups=32, bias=False)
        self.to_3 = nn.Parameter(torch.eye(9))
        self.project = nn.Conv2d(32, 8, 1, bias=False)
        self.head = nn.Linear(8, 4)
    def forward(self, x, path):
        k, c = (3, 5)[path[0]], (16, 32)[path[1]]
        x = self.stem(x)
        y = dynamic_norm(self.bn, F.conv2d(x, self.expand.weight[:c])).relu()
        w = self.depthwise.weight[:c]
        if k == 3: w = F.linear(w[:,:,1:-1,1:-1].reshape(c, -1), self.to_3).view(c, 1, 3, 3)
        y = F.conv2d(y, w, padding=k//2, groups=c)
        return self.head((x + F.conv2d(y, self.project.weight[:,:c])).mean((2, 3)))

class ByHand(nn.Module):
    "A batch norm whose tensors another module uses"
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(8)
        self.conv = conv()
    def forward(self, x):
        bn = self.bn
        stats = bn.running_mean, bn.running_var
        return F.batch_norm(self.conv(x), *stats, bn.weight, bn.bias, bn.training, bn.momentum, bn.eps)

class Frozen(Net):
    "The stem keeps the statistics that it was trained with"
    def __init__(self):
        super().__init__([nn.Identity(), nn.Sequential(conv(), nn.BatchNorm2d(8))])
        self.stem.requires_grad_(False)
        self.stem[1].running_mean.normal_()
        self.stem[1].running_var.uniform_(.5, 2.)
        self.train()
    def train(self, mode=True):
        super().train(mode)
        self.stem.eval()
        return self

class FrozenByHand(Net):
    def __init__(self):
        super().__init__([nn.Identity(), conv()])
        self.stem.eval()
        self.stem[1].running_mean.normal_()

def shared_op():
    "A convolution is an op of two blocks, and a part of another op"
    skip, shared = nn.Identity(), conv()
    return Net([skip, shared], [skip, shared], [skip, nn.Sequential(shared, nn.ReLU())])

NETS = dict(
    elastic=(Elastic, [(0,0), (1,1), (0,1)]),
    by_hand=(lambda: Net([nn.Identity(), ByHand()]), [(0,), (1,)]),
    frozen=(Frozen, [(0,), (1,)]),
    frozen_by_hand=(FrozenByHand, [(0,), (1,)]),
    shared_op=(shared_op, [(0,0,0), (1,1,1), (0,0,1), (0,1,0)]))
CASES = [(name, path) for name,(_,paths) in NETS.items() for path in paths]

def supernet_and_net(name):
    "A supernet, and the network with the weights of its code"
    torch.manual_seed(0)
    supernet = Supernet(NETS[name][0](), 2)
    torch.manual_seed(0)
    net = NETS[name][0]()
    mixed = {k: torch.einsum('k,k...->...', CODE, t) for k,t in supernet.tensors().items()}
    net.load_state_dict(mixed, strict=False)
    return supernet, net

x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))

@pytest.mark.parametrize('name, path', CASES)
def test_output_and_gradients(name, path):
    supernet, net = supernet_and_net(name)
    code = CODE.clone().requires_grad_()
    out, expected = supernet(x, path, code), net(x, path)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    banks = supernet.banks.items()
    grads = supernet.tensors({k: torch.zeros_like(b) if b.grad is None else b.grad for k,b in banks})
    weights = supernet.tensors()
    of_code = torch.zeros(2)
    for k,p in net.named_parameters():
        if k not in grads: assert not p.requires_grad
        elif p.grad is not None:
            step = torch.einsum('k,...->k...', CODE/CODE.square().sum(), p.grad)
            torch.testing.assert_close(grads[k], step, atol=1e-3, rtol=1e-3)
            of_code += (weights[k]*p.grad).flatten(1).sum(1)
    torch.testing.assert_close(code.grad, of_code, atol=1e-2, rtol=1e-3)

@pytest.mark.parametrize('name, path', [case for case in CASES if case[0] in ('elastic', 'shared_op')])
def test_recalibrated_subnet(name, path):
    supernet, net = supernet_and_net(name)
    batches = [(xb, torch.zeros(8)) for xb in x.split(8)]
    subnet = networks.Subnet(net, path)
    update_bn([xb for xb,_ in batches], subnet)
    ours = calibrated_subnet(supernet, path, CODE, batches)
    torch.testing.assert_close(ours(x), subnet.eval()(x), atol=1e-4, rtol=1e-4)

def test_recalibrated_by_functions():
    supernet, net = supernet_and_net('by_hand')
    op = net.blocks[0][1]
    batches = [op.conv(net.stem(xb)).transpose(0, 1).flatten(1) for xb in x.split(8)] # (8, pixels)
    ours = calibrated_subnet(supernet, (1,), CODE, [(xb, torch.zeros(8)) for xb in x.split(8)])
    bn = ours.net.blocks[0][1].bn
    assert_close = torch.testing.assert_close
    assert_close(bn.running_mean, torch.stack([b.mean(1) for b in batches]).mean(0), atol=1e-5, rtol=1e-4)
    assert_close(bn.running_var, torch.stack([b.var(1) for b in batches]).mean(0), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('path', [(0,), (1,)])
def test_frozen_norms_keep_their_statistics(path):
    supernet, net = supernet_and_net('frozen')
    subnet = calibrated_subnet(supernet.eval().train(), path, CODE, [(x, torch.zeros(16))])
    for found in (supernet.net, subnet.net, networks.subnet(net, path).net):
        assert found.stem[1].running_mean.equal(net.stem[1].running_mean)
        assert not found.train().stem[1].training

@pytest.mark.parametrize('name, path', CASES)
def test_cost_is_that_of_the_subnet(name, path):
    torch.manual_seed(0)
    net = NETS[name][0]()
    subnet = networks.subnet(net, path)
    macs, n_params = Cost(net, x)([path])[0]
    assert n_params == networks.count_params(subnet)
    torch.testing.assert_close(subnet.eval()(x), net.eval()(x, path))

def space_of(n): return Space('own', (Block('b0', tuple(f'op{o}' for o in range(n))),))

def plain_loaders(): 
    data = TensorDataset(x, torch.arange(16)%4)
    return DataLoaders(DataLoader(data, 8), DataLoader(data, 8))

def learner(dls=None):
    return kshot_learner(Net([nn.Identity(), conv()]), space_of(2), dls or plain_loaders(), K=2)

def quiet_fit(learn, cbs=()):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .05, cbs=[*cbs])
    return learn

def test_learner_that_trained_is_pickled():
    learn = quiet_fit(learner())
    other = quiet_fit(pickle.loads(pickle.dumps(learn)))
    assert other.k_shot.codes is other.model.codes

class Endless(IterableDataset):
    def __iter__(self): return iter([(x[0], 0)])

@pytest.mark.parametrize('make, error', [
    (lambda: DataLoaders(DataLoader(Endless(), 8), plain_loaders().valid), 'length'),
    (lambda: DataLoaders(plain_loaders().train), 'no validation loader'),
    (lambda: DataLoaders([dict(a=x, b=x)], plain_loaders().valid), 'a batch that is a dict of a, b')])
def test_loaders_that_are_refused(make, error):
    with pytest.raises(ValueError, match=error): quiet_fit(learner(make()))

@pytest.mark.parametrize('rnn', [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize('to', [torch.float64, torch.float16, torch.bfloat16, 'meta'])
def test_recurrent_layers_move(rnn, to):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            op = rnn(24, 4, 2, batch_first=True, bidirectional=True)
            self.blocks = nn.ModuleList([nn.ModuleList([op])])
            self.head = nn.Linear(8, 4)
        def forward(self, x, path): return self.head(self.blocks[0][path[0]](x.flatten(2))[0][:,-1])
    torch.manual_seed(0)
    supernet = Supernet(Rows(), 2)
    expected = supernet(x.transpose(1, 2), (0,), CODE)
    code = CODE.to(to) if to == 'meta' else CODE
    out = supernet.to(to)(x.transpose(1, 2).to(to), (0,), code)
    assert out.shape == expected.shape
    if to != 'meta': torch.testing.assert_close(out.float(), expected, atol=.05, rtol=.05)
    out.float().sum().backward()

def test_outputs_of_unknown_types_are_refused():
    class Result:
        def __init__(self, logits): self.logits = logits
    class Own(Net):
        def forward(self, x, path): return Result(super().forward(x, path))
    with pytest.raises(ValueError, match='output of type Result'):
        Supernet(Own([conv()]), 2)(x, (0,), CODE)

def test_modules_that_torch_does_not_see_are_refused():
    class Hidden(Net):
        def __init__(self):
            super().__init__([nn.Identity(), conv()])
            self.more = [conv()]
    with pytest.raises(ValueError, match="attribute 'more' modules with weights, expected nn.ModuleList"):
        Supernet(Hidden(), 2)
