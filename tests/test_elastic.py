"Torchvision's networks as search spaces: full paths, subnets and counts against the plain networks"
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from kshot.cost import Cost, count_macs
from kshot.data import digits_data
from kshot.networks import subnet
from kshot.train import cosine, kshot_learner

pytest.importorskip('torch_pruning', reason='needs torch-pruning')
from kshot.elastic import elastic # noqa: E402

# name: blocks of width and of depth
MODELS = dict(
    resnet18=(12, 5), mobilenet_v2=(25, 10), mobilenet_v3_small=(26, 6), regnet_y_400mf=(20, 12),
    densenet121=(120, 0))
SLOW = dict(resnet50=(37, 12), efficientnet_b0=(38, 9), convnext_tiny=(18, 18), googlenet=(57, 0))

def small_path(net): return tuple(0 if l < len(net.groups) else 1 for l in range(len(net.choices_per_block)))
def full_path(net): return (*(len(ns)-1 for ns in net.channels), *(0 for _ in net.skippable))

@pytest.mark.parametrize('name', [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
@torch.no_grad()
def test_networks_of_torchvision(name):
    torch.manual_seed(0)
    kwargs = dict(init_weights=False) if name == 'googlenet' else {}
    model = getattr(torchvision.models, name)(**kwargs).eval()
    before = {key: t.clone() for key,t in model.state_dict().items()}
    x = torch.randn(2, 3, 32, 32)
    net, space = elastic(model, x)
    assert (len(net.groups), len(net.skippable)) == (MODELS | SLOW)[name]
    assert net(x, full_path(net)).equal(model(x))
    small = subnet(net, small_path(net))
    n_params = sum(p.numel() for p in small.parameters())
    assert n_params < .7*sum(p.numel() for p in model.parameters())
    for path in [small_path(net), *space.sample(np.random.default_rng(0), 2)]:
        assert subnet(net, path)(x).equal(net(x, path))
    assert all(t.equal(before[key]) for key,t in model.state_dict().items())

def test_counts_of_a_resnet():
    x = (3, 32, 32)
    net, space = elastic(torchvision.models.resnet18(num_classes=10), x)
    cost = Cost(net, x)
    for path in [full_path(net), small_path(net), *space.sample(np.random.default_rng(1), 3)]:
        small = subnet(net, path)
        assert cost.macs(path) == count_macs(small, x)
        assert cost.n_params(path) == sum(p.numel() for p in small.parameters())

def test_two_outputs():
    model = torchvision.models.segmentation.fcn_resnet50(weights_backbone=None, num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    net, _ = elastic(model, x)
    with torch.no_grad():
        assert net(x, full_path(net))['out'].equal(model(x)['out'])
        assert subnet(net, small_path(net))(x)['out'].equal(net(x, small_path(net))['out'])

@pytest.mark.slow
def test_a_transformer_keeps_its_attention():
    model = torchvision.models.vit_b_16().eval()
    x = torch.randn(1, 3, 224, 224)
    net, _ = elastic(model, x, widths=(.5, 1.))
    assert net.groups and net.skippable and net.fixed
    with torch.no_grad():
        assert net(x, full_path(net)).equal(model(x))
        assert subnet(net, small_path(net))(x).equal(net(x, small_path(net)))

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    def forward(self, x): return x + self.body(x)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 2, 1)
        self.blocks = nn.ModuleList([Residual(), Residual()])
        self.head = nn.Linear(16, 10)
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks: x = block(x)
        return self.head(x.mean((2, 3)))

@pytest.mark.parametrize('K', [1, 2])
def test_it_trains(K):
    torch.manual_seed(0)
    net, space = elastic(Net(), (1, 8, 8), widths=(.5, 1.))
    assert [b.name for b in space.blocks] == ['stem width', 'blocks.0 depth', 'blocks.1 depth']
    learn = kshot_learner(net, space, digits_data(), K=K, lr=.1)
    with learn.showing(False): learn.fit(4, cbs=cosine(.1))
    losses = torch.stack(learn.recorder.losses)
    assert losses[-10:].mean() < losses[:10].mean()
