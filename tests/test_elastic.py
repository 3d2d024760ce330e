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

from kshot.elastic import elastic
from kshot.evaluate import calibrated_subnet, score_path

# name: how many widths, kernels, depths
MODELS = dict(
    resnet18=(12, 1, 5), mobilenet_v2=(25, 0, 10), mobilenet_v3_small=(26, 8, 6),
    regnet_y_400mf=(36, 0, 12), shufflenet_v2_x1_0=(21, 0, 10))
SLOW = dict(
    resnet50=(37, 1, 12), mobilenet_v3_large=(30, 6, 10), efficientnet_b0=(38, 9, 9), densenet121=(120, 1, 0),
    convnext_tiny=(22, 18, 18), googlenet=(61, 1, 0), resnext50_32x4d=(21, 1, 12), swin_t=(13, 0, 12))
SEGMENTATION = dict(
    fcn_resnet50=(38, 1, 12), lraspp_mobilenet_v3_large=(30, 6, 8), deeplabv3_resnet50=(44, 1, 12))

def path_of(space, width, op): # of the same choice everywhere, counted from the end if negative
    def number(block): return range(len(block.choices))[width if block.kind == 'width' else op]
    return tuple(map(number, space.blocks))

def largest(space): return path_of(space, -1, 0)
def smallest(space): return path_of(space, 0, -1)

def counts(space):
    kinds = [block.name.rsplit(' ')[-1] for block in space.blocks]
    return tuple(map(kinds.count, ('width', 'kernel', 'depth')))

def out(y): return y['out'] if isinstance(y, dict) else y

@torch.no_grad()
def check(model, x, expected):
    before = {key: t.clone() for key,t in model.state_dict().items()}
    net, space = elastic(model.eval(), x, order=None)
    assert counts(space) == expected
    assert out(net(x, largest(space))).equal(out(model(x)))
    paths = [smallest(space), path_of(space, 0, 0), *space.sample(np.random.default_rng(0), 2)]
    for path in paths: assert out(subnet(net, path)(x)).equal(out(net(x, path)))
    n_params = sum(p.numel() for p in subnet(net, smallest(space)).parameters())
    assert n_params < .7*sum(p.numel() for p in model.parameters())
    in_order, _ = elastic(model, x)
    torch.testing.assert_close(out(in_order(x, largest(space))), out(model(x)), rtol=1e-4, atol=1e-4)
    assert all(t.equal(before[key]) for key,t in model.state_dict().items())

def slow(names): return [pytest.param(name, marks=pytest.mark.slow) for name in names]

@pytest.mark.parametrize('name', [*MODELS, *slow(SLOW)])
def test_networks_of_torchvision(name):
    torch.manual_seed(0)
    kwargs = dict(init_weights=False) if name == 'googlenet' else {}
    size = 64 if name in ('swin_t', 'googlenet', 'convnext_tiny') else 32
    model = getattr(torchvision.models, name)(**kwargs)
    check(model, torch.randn(2, 3, size, size), (MODELS | SLOW)[name])

@pytest.mark.slow
@pytest.mark.parametrize('name', SEGMENTATION)
def test_segmentation(name):
    torch.manual_seed(0)
    model = getattr(torchvision.models.segmentation, name)(weights_backbone=None, num_classes=3)
    check(model, torch.randn(1, 3, 64, 64), SEGMENTATION[name])

@pytest.mark.slow
def test_a_vision_transformer():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 4, 6, 96, 192)
    torch.backends.mha.set_fastpath_enabled(False)
    check(model, torch.randn(2, 3, 32, 32), (9, 0, 4)) # the stream, heads and the middle of each block
    torch.backends.mha.set_fastpath_enabled(True)

def test_heads_of_swin():
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer([2, 2], 16, [1, 1], [2, 4], [2, 2])
    x = torch.randn(2, 3, 16, 16)
    check(model, x, (3, 0, 2))
    _, space = elastic(model, x)
    first, = (block for block in space.blocks if block.name == 'features.0.0 width')
    assert first.choices == ('8', '16') # a head of the first stage, two of the second

TIMM = ['resnet18', 'vit_tiny_patch16_224', 'convnext_atto', 'mobilenetv3_small_050']

@pytest.mark.parametrize('name', TIMM)
def test_networks_of_timm(name):
    timm = pytest.importorskip('timm', reason='needs timm')
    torch.manual_seed(0)
    kwargs = dict(img_size=32, patch_size=8, depth=2) if name.startswith('vit') else {}
    model = timm.create_model(name, **kwargs).eval()
    x = torch.randn(2, 3, 32, 32)
    net, space = elastic(model, x, order=None)
    with torch.no_grad():
        torch.testing.assert_close(net(x, largest(space)), model(x))
        for path in (smallest(space), *space.sample(np.random.default_rng(0), 2)):
            assert subnet(net, path)(x).equal(net(x, path))

def test_counts_of_a_resnet():
    x = (3, 32, 32)
    net, space = elastic(torchvision.models.resnet18(num_classes=10), x)
    cost = Cost(net, x)
    for path in [largest(space), smallest(space), *space.sample(np.random.default_rng(1), 3)]:
        small = subnet(net, path)
        assert cost.macs(path) == count_macs(small, x)
        assert cost.n_params(path) == sum(p.numel() for p in small.parameters())

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

@pytest.mark.parametrize('K, is_training', [(1, True), (2, True), (2, False)])
def test_it_trains(K, is_training):
    torch.manual_seed(0)
    net, space = elastic(Net().train(is_training), (1, 8, 8), widths=(.5, 1.))
    assert [b.name for b in space.blocks] == ['stem width', 'blocks.0 depth', 'blocks.1 depth']
    learn = kshot_learner(net, space, digits_data(), K=K, lr=.1)
    with learn.showing(False): learn.fit(4, cbs=cosine(.1))
    assert not learn.model.frozen
    losses = torch.stack(learn.recorder.losses)
    assert losses[-10:].mean() < losses[:10].mean()
    valid, calibration = [*learn.dls.valid], learn.dls.train.fixed(2)
    for path in (largest(space), path_of(space, 0, 0), smallest(space)): # statistics were lent before
        with torch.no_grad(): code = learn.model.codes(torch.tensor([path]))[0]
        small = calibrated_subnet(learn.model, path, code, calibration)
        with torch.no_grad(): right = torch.cat([small(x).argmax(1) == y for x,y in valid])
        scores = score_path(learn.model, path, code, valid, calibration)
        assert scores.metric == pytest.approx(right.float().mean())
