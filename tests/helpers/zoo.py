"""Small networks as people write them, each with data, a loss and a metric.

They are plain PyTorch: `forward(x, path)`, and ops in `self.blocks`, or wherever `op_modules` says.
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torchvision.models.convnext import CNBlock
from torchvision.models.resnet import Bottleneck
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.ops import SqueezeExcitation, StochasticDepth

from kshot.space import Block, Space

# data: n examples, the same every time

def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))

def classes(n): return torch.arange(n)%4

def examples(*shape): # of four classes
    def draw(n): return 2*noise(4, *shape, seed=1)[classes(n)] + noise(n, *shape), classes(n)
    return draw

images = examples(3, 8, 8)
rows = examples(6, 5)
volumes = examples(2, 4, 6, 6)

def sentences(n): # words 4c+1 to 4c+4 are typical of class c; 0 fills sentences up
    words = 4*classes(n)[:,None] + 1 + integers(4, n, 10)
    lengths = 6 + integers(5, n, seed=1)
    return words*(torch.arange(10) < lengths[:,None]), classes(n)

def sentences_and_lengths(n):
    words, y = sentences(n)
    return (words, (words > 0).sum(1)), y

def next_words(n): # each word is one more than the last
    words = (integers(17, n, 1) + torch.arange(9))%17
    return words[:,:-1], words[:,1:]

def scenes(n): # the class of each pixel
    x = noise(n, 3, 8, 8)
    return x, (x.mean(1) > 0).long() + (x[:,0] > 1).long()

def blurred(n): # a large image for a small one
    y = F.interpolate(noise(n, 3, 4, 4), scale_factor=2, mode='bilinear')
    return F.avg_pool2d(y, 2), y

def gray(n): # images that are to be drawn again
    x = .3*noise(4, 1, 8, 8, seed=1)[classes(n)] + .1*noise(n, 1, 8, 8)
    return x, x

def houses(n): # town and kind of a house, three measures; its price
    where = torch.stack([integers(7, n), integers(3, n, seed=1)], 1)
    size = noise(n, 3)
    return (where, size), where[:,0]/3 - where[:,1]/2 + size[:,0] - .5*size[:,1]*size[:,2]

def reviews(n): return dict(ids=sentences(n)[0], stars=noise(n, 3)+classes(n)[:,None]), classes(n)

def molecules(n): # features and edges of six atoms
    edges = (noise(n, 6, 6, seed=2) > .3).float()
    return (rows(n)[0], torch.maximum(edges, edges.mT)), classes(n)

def tagged(n): # any of three labels for an image
    x = images(n)[0]
    return x, (x.mean((2, 3)) > 0).float()

# losses, and metrics: higher is better

def accuracy(out, y): return (out.argmax(1) == y).float().mean()

def word_loss(out, y): return F.cross_entropy(out.flatten(0, 1), y.flatten())

def word_accuracy(out, y): return (out.argmax(-1) == y).float().mean()

def neg_error(out, y): return -(out - y).abs().mean()

def tag_accuracy(out, y): return ((out > 0) == (y > .5)).float().mean()

def first_of(out): return out if isinstance(out, torch.Tensor) else out[0]

def aux_loss(out, y): # the auxiliary head speaks in training only
    if isinstance(out, torch.Tensor): return F.cross_entropy(out, y)
    return F.cross_entropy(out[0], y) + .3*F.cross_entropy(out[1], y)

def first_accuracy(out, y): return accuracy(first_of(out), y)

def first_neg_error(out, y): return neg_error(out[0], y)

def elbo(out, y): # but for constants, negative
    x, mean, log_var = out
    return F.mse_loss(x, y) + 1e-3*(mean**2 + log_var.exp() - log_var - 1).mean()

def dict_loss(out, y): return F.cross_entropy(out['logits'], y) + .1*out['penalty'].mean()

def dict_accuracy(out, y): return accuracy(out['logits'], y)

# the table of kinds

@dataclass(frozen=True, eq=False)
class Kind:
    "A network of one's own, and what it learns from."
    name:str
    make:Callable[[], nn.Module] # a network with weights drawn by torch's generator
    sizes:tuple[int, ...]        # choices of each block
    data:Callable[[int], tuple] = images # n -> x, y
    loss_func:Callable = F.cross_entropy
    metric:Callable = accuracy
    lr:float = .05
    needs_values:bool = False # to run: the meta device has none
    is_variant:bool = False   # of others, with the same operators
    refused:dict = field(default_factory=dict) # check -> part of the line

    @property
    def space(self):
        blocks = [Block(f'b{l}', tuple(f'op{o}' for o in range(n))) for l,n in enumerate(self.sizes)]
        return Space('own', tuple(blocks))

    @property
    def paths(self): return [*product(*map(range, self.sizes))]

KINDS = {}

def kind(name, *sizes, **settings):
    "Add what makes a network to the table."
    def add(make):
        KINDS[name] = Kind(name, make, sizes, **settings)
        return make
    return add

def variant(name, *sizes, **settings): return kind(name, *sizes, is_variant=True, **settings)

class Net(nn.Module):
    "A stem, ops in blocks, a head: for the kinds of op."
    def __init__(self, *blocks, c=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU())
        self.blocks = nn.ModuleList(nn.ModuleList(ops) for ops in blocks)
        self.head = nn.Linear(c, 4)

    def forward(self, x, path):
        x = self.stem(x)
        for ops,o in zip(self.blocks, path): x = ops[o](x)
        return self.head(x.mean((2, 3)))

def conv(c_in=8, c_out=8, k=3, **kwargs): return nn.Conv2d(c_in, c_out, k, padding=k//2, **kwargs)

# convolutions

class Basic(nn.Module):
    def __init__(self, c, k, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, k, stride, k//2, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.downsample = nn.Sequential(nn.AvgPool2d(stride), nn.Conv2d(c, c, 1)) if stride > 1 else None

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out)

@kind('ResNet basic block', 2, 2)
def resnet(): return Net(*[[Basic(8, 3, stride), Basic(8, 5, stride)] for stride in (1, 2)])

@variant('ResNet bottleneck (torchvision)', 2, 2)
def bottlenecks():
    def blocks(): return [Bottleneck(8, 2), Bottleneck(8, 2, groups=2, base_width=128)]
    return Net(blocks(), blocks())

class Inverted(nn.Module):
    def __init__(self, c, expand, k, use_se):
        super().__init__()
        mid = round(c*expand)
        layers = [nn.Conv2d(c, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU6(True),
                  conv(mid, mid, k, groups=mid, bias=False), nn.BatchNorm2d(mid), nn.Hardswish(True)]
        if use_se: layers.append(SqueezeExcitation(mid, mid//4, scale_activation=nn.Hardsigmoid))
        self.conv = nn.Sequential(*layers, nn.Conv2d(mid, c, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x): return x + self.conv(x)

@kind('inverted residual with SE', 3, 2)
def mobilenet():
    return Net([nn.Identity(), Inverted(8, 2, 3, True), Inverted(8, 3, 5, True)],
               [Inverted(8, 2, 3, False), Inverted(8, 2, 7, True)])

class ConvNeXt(nn.Module): # as in timm: the channels come last inside, a scale learns from almost zero
    def __init__(self, dim, k, drop=.1):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, k, padding=k//2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 2*dim)
        self.pwconv2 = nn.Linear(2*dim, dim)
        self.gamma = nn.Parameter(1e-2*torch.ones(dim))
        self.drop = drop

    def forward(self, x):
        B, C, H, W = x.shape
        assert C == self.gamma.numel(), f'{C} channels'
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma*self.pwconv2(F.gelu(self.pwconv1(y)))
        if self.drop and self.training:
            y = y*torch.empty(B, 1, 1, 1, device=x.device).bernoulli_(1-self.drop)
        return x + y.permute(0, 3, 1, 2)

@kind('ConvNeXt block', 3, 2)
def convnext():
    return Net([ConvNeXt(8, k) for k in (3, 5, 7)], [nn.Identity(), CNBlock(8, 1e-2, .1)])

class Standardized(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        flat = w.view(w.size(0), -1)
        w = (w - flat.mean(1).view(-1, 1, 1, 1))/(flat.std(1).view(-1, 1, 1, 1) + 1e-5)
        return self._conv_forward(x, w, self.bias)

@variant('weight-standardized convolution', 2, 2)
def standardized():
    def op(k): return nn.Sequential(Standardized(8, 8, k, padding=k//2), nn.GroupNorm(4, 8), nn.ReLU())
    return Net([op(1), op(3)], [op(3), op(5)])

class SamePad(nn.Conv2d): # as in EfficientNet: pads as TensorFlow does
    def forward(self, x):
        pads = []
        for size,k,s in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):
            total = max((-(-size//s) - 1)*s + k - size, 0)
            pads += [total//2, total - total//2]
        return super().forward(F.pad(x, pads))

@variant('subclass of nn.Conv2d', 3, 2)
def same_pad():
    return Net([SamePad(8, 8, k, 2) for k in (2, 3, 4)], [nn.Identity(), SamePad(8, 8, 3, groups=8)])

@kind('GroupNorm', 3)
def group_norm(): # groups of eight channels; one group; a group each
    return Net([nn.Sequential(conv(), nn.GroupNorm(groups, 8), nn.SiLU()) for groups in (1, 4, 8)])

@kind('InstanceNorm with tracked statistics', 2, 2)
def instance_norm():
    def norm(): return nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    def op(k): return nn.Sequential(conv(k=k), norm(), nn.ReLU())
    return Net([op(1), op(3)], [op(3), op(5)])

class OwnNorm(nn.Module): # a batch norm without a class of PyTorch: it replaces its statistics
    def __init__(self, c, momentum=.1):
        super().__init__()
        self.momentum = momentum
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))
        self.register_buffer('running_mean', torch.zeros(c))
        self.register_buffer('running_var', torch.ones(c))

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            self.running_mean = torch.lerp(self.running_mean, mean.detach(), self.momentum)
            self.running_var = torch.lerp(self.running_var, var.detach(), self.momentum)
        scale = self.weight/(var + 1e-5).sqrt()
        return x*scale[:,None,None] + (self.bias - mean*scale)[:,None,None]

@kind('norm of one\'s own with running statistics', 2, 2)
def own_norm():
    def op(k): return nn.Sequential(conv(k=k), OwnNorm(8), nn.ReLU())
    return Net([op(1), op(3)], [op(3), op(5)])

class Shifted(nn.Module): # a weight of its own and no module, and a sum over channels
    def __init__(self, c_in, c_out, scale=.1):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c_out, c_in))
        self.bias = nn.Parameter(torch.zeros(c_out, 1, 1))
        self.scale = scale
        self.reset_parameters()

    def reset_parameters(self): nn.init.normal_(self.weight, std=self.scale)
    def forward(self, x): return x + F.relu(torch.einsum('oc,bchw->bohw', self.weight, x) + self.bias)

@variant('einsum with nn.Parameter', 2, 2)
def einsum_net(): return Net([nn.Identity(), Shifted(8, 8)], [Shifted(8, 8, .2), conv()])

class Binary(torch.autograd.Function): # XNOR-Net: the sign, with a straight-through gradient
    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w.sign()*w.abs().mean()

    @staticmethod
    def backward(ctx, grad):
        w, = ctx.saved_tensors
        return grad*(w.abs() <= 1)

class BinaryConv(nn.Conv2d):
    def forward(self, x): return F.conv2d(x, Binary.apply(self.weight), self.bias, self.stride, self.padding)

@variant('autograd function of one\'s own (binary weights)', 2, 2)
def binary():
    def op(k): return nn.Sequential(BinaryConv(8, 8, k, padding=k//2), nn.BatchNorm2d(8), nn.Hardtanh())
    return Net([nn.Identity(), op(3)], [op(1), op(5)])

class ReZero(nn.Module): # the scale is a number without dimensions
    def __init__(self, c, k):
        super().__init__()
        self.conv = conv(c, c, k)
        self.alpha = nn.Parameter(torch.tensor(.1))
    def forward(self, x): return x + self.alpha*F.relu(self.conv(x))

@variant('learned scalar (ReZero)', 2, 2)
def rezero(): return Net([nn.Identity(), ReZero(8, 3)], [ReZero(8, 1), ReZero(8, 5)])

@variant('network in channels_last', 2, 2)
def channels_last():
    return Net([nn.Identity(), conv()], [conv(groups=2), conv(k=5)]).to(memory_format=torch.channels_last)

@variant('batch norms with other settings', 3, 3)
def batch_norms():
    settings = dict(momentum=None), dict(affine=False, momentum=.3), dict(track_running_stats=False)
    def ops(): return [nn.Sequential(conv(), nn.BatchNorm2d(8, **more), nn.ReLU()) for more in settings]
    return Net(ops(), ops())

class Exact(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.mix = nn.Linear(c, c).double()

    def forward(self, x):
        y = self.mix(x.double().movedim(1, -1))
        return F.relu(y).movedim(-1, 1).float()

@variant('op in float64', 2, 2)
def exact(): return Net([Exact(8), nn.Identity()], [conv(), Exact(8)])

class GlobalFilter(nn.Module): # GFNet: a product in the frequency domain
    def __init__(self, c, h=8, w=5):
        super().__init__()
        self.complex_weight = nn.Parameter(torch.randn(c, h, w, 2)*.02)

    def forward(self, x):
        weight = torch.view_as_complex(self.complex_weight)
        spectrum = torch.fft.rfft2(x, norm='ortho')*weight
        return x + torch.fft.irfft2(spectrum, s=x.shape[-2:], norm='ortho')

@kind('Fourier filter', 2)
def fourier(): return Net([conv(), GlobalFilter(8)])

@variant('weight norm (parametrization)', 2, 2)
def weight_normed(): return Net([conv(), weight_norm(conv())], [nn.Identity(), weight_norm(conv(k=5))])

@variant('spectral norm (hook)', 2, 2)
def spectral_normed(): return Net([conv(), spectral_norm(conv())], [nn.Identity(), spectral_norm(conv(k=5))])

# what a block may be

class ShareOp(nn.Module):
    def __init__(self, reduce, k):
        super().__init__()
        self.reduce = reduce # the same module in several ops
        self.body = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), conv(4, 8, k))
    def forward(self, x): return x + self.body(self.reduce(x))

@variant('module shared by several ops', 3, 2)
def shared_net():
    reduce, skip = conv(8, 4, 1), nn.Identity()
    return Net([skip, ShareOp(reduce, 3), ShareOp(reduce, 5)], [skip, ShareOp(reduce, 3)])

class Paired(nn.Module): # one convolution in front of all blocks, and in each of them
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(3), nn.BatchNorm2d(8), nn.ReLU())
        self.features = nn.ModuleList(nn.ModuleList([nn.Sequential(conv(k=k), self.stem[1]) for k in (1, 3)])
                                      for _ in range(2))
        self.blocks = self.features
        self.head = nn.Linear(8, 4)

    def forward(self, x, path):
        x = self.stem(x)
        for l,o in enumerate(path): x = F.relu(self.features[l][o](x) + x)
        return self.head(x.mean((2, 3)))

@variant('shared stem norm, two names of the blocks', 2, 2)
def paired(): return Paired()

class Named(Net): # ops by their names
    names = ('skip', 'conv', 'wide')
    def __init__(self):
        super().__init__()
        def ops(): return dict(skip=nn.Identity(), conv=conv(), wide=conv(k=5))
        self.blocks = nn.ModuleList(nn.ModuleDict(ops()) for _ in range(2))

    def forward(self, x, path):
        x = self.stem(x)
        for block,o in zip(self.blocks, path): x = x + block[self.names[o]](x)
        return self.head(x.mean((2, 3)))

@variant('ModuleDict blocks', 3, 3)
def named(): return Named()

class Optional(Net): # nothing is an op, too
    def forward(self, x, path):
        x = self.stem(x)
        for ops,o in zip(self.blocks, path):
            if ops[o] is not None: x = x + F.relu(ops[o](x))
        return self.head(x.mean((2, 3)))

@variant('None ops', 3, 2)
def optional(): return Optional([None, conv(), conv(k=5)], [None, conv()])

class Attributes(nn.Module): # ops are attributes, found by name
    def __init__(self):
        super().__init__()
        self.sizes = (8, 8) # of the images
        self.stem = conv(3)
        for l,o in product(range(2), range(2)): setattr(self, f'op_{l}_{o}', conv(k=2*o+1))
        self.lists = [[getattr(self, f'op_{l}_{o}') for o in range(2)] for l in range(2)]
        self.head = nn.Linear(8*8*8, 4)

    @property
    def op_modules(self): return {(l, o): f'op_{l}_{o}' for l,o in product(range(2), range(2))}

    def forward(self, x, path):
        x = F.relu(self.stem(x))
        for l,o in enumerate(path): x = F.relu(self.lists[l][o](x))
        return self.head(x.view(x.size(0), 8*self.sizes[0]*self.sizes[1]))

@variant('ops as attributes, in a Python list', 2, 2)
def attributes(): return Attributes()

class Slices(nn.Module): # one layer, of which a path takes some channels
    widths = 4, 8, 12
    choices_per_block = 3, 3
    op_modules = {(0, 0): 'up', (1, 0): 'down'}

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3*8*8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)

    def reads(self, path): return [(l, 0, self.widths[w]) for l,w in enumerate(path)]

    def forward(self, x, path):
        mid, out = [self.widths[w] for w in path]
        x = F.relu(self.stem(x.flatten(1)))
        x = F.relu(F.linear(x, self.up.weight[:mid], self.up.bias[:mid]))
        x = F.relu(F.linear(x, self.down.weight[:out,:mid], self.down.bias[:out]))
        return F.linear(x, self.head.weight[:,:out], self.head.bias)

@variant('width of a layer as a choice', 3, 3)
def slices(): return Slices()

class Hooked(Net): # features are taken by a hook
    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.features = []
        self.stem[0].register_forward_hook(self.keep)
        self.head = nn.Linear(16, 4)

    def keep(self, module, args, out): self.features.append(out.mean((2, 3)))

    def forward(self, x, path):
        self.features.clear()
        x = self.stem(x)
        for ops,o in zip(self.blocks, path): x = F.relu(ops[o](x))
        return self.head(torch.cat([x.mean((2, 3)), self.features.pop()], 1))

@variant('features by a forward hook', 2, 2)
def hooked(): return Hooked([nn.Identity(), conv()], [conv(), conv(k=5)])

class Depth(Net): # layers 1 to d
    def reads(self, path): return [(0, l) for l in range(path[0]+1)]

    def forward(self, x, path):
        x = self.stem(x)
        for op in self.blocks[0][:path[0]+1]: x = x + F.relu(op(x))
        return self.head(x.mean((2, 3)))

@variant('depth as a choice, with reads', 3)
def depth(): return Depth([nn.Sequential(conv(), nn.BatchNorm2d(8)) for _ in range(3)])

class EarlyExit(nn.Module): # an op for each stage, then where to stop
    def __init__(self, n=3):
        super().__init__()
        self.stem = conv(3)
        self.stages = nn.ModuleList(nn.ModuleList([conv(), conv(k=5)]) for _ in range(n))
        self.exits = nn.ModuleList(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4)) for _ in range(n))
        self.op_modules = {(l, o): f'stages.{l}.{o}' for l in range(n) for o in range(2)}
        self.op_modules |= {(n, e): f'exits.{e}' for e in range(n)}

    def reads(self, path):
        *ops, last = path
        return [*((l, ops[l]) for l in range(last+1)), (len(ops), last)]

    def forward(self, x, path):
        x = F.relu(self.stem(x))
        for l,o in enumerate(path[:-1]):
            x = x + F.relu(self.stages[l][o](x))
            if l == path[-1]: return self.exits[l](x.mean((-2, -1)))

@variant('early exit', 2, 2, 2, 3)
def early_exit(): return EarlyExit()

class Frozen(Net):
    def __init__(self, *blocks):
        super().__init__(*blocks)
        for p in self.stem.parameters(): p.requires_grad = False

@variant('frozen stem', 2, 2)
def frozen(): return Frozen([nn.Identity(), conv()], [conv(), conv(k=5)])

class Again(Net): # a layer that is applied twice, with its norm
    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.mix, self.bn = conv(), nn.BatchNorm2d(8)

    def forward(self, x, path):
        x = self.stem(x)
        for ops,o in zip(self.blocks, path):
            for _ in range(2): x = F.relu(self.bn(self.mix(ops[o](x))))
        return self.head(x.mean((2, 3)))

@variant('batch norm called several times', 2, 2)
def again(): return Again([nn.Identity(), conv()], [conv(), conv(k=5)])

# what training alone does

class DropConv(nn.Module):
    def __init__(self, c, p, k=3):
        super().__init__()
        self.conv = conv(c, c, k)
        self.p = p
    def forward(self, x): return x + F.dropout(F.relu(self.conv(x)), self.p, training=self.training)

@variant('dropout by function', 2, 2)
def dropped(): return Net([nn.Identity(), DropConv(8, .2)], [DropConv(8, .1), DropConv(8, .3, 5)])

class Deep(nn.Module):
    def __init__(self, c, p, mode):
        super().__init__()
        self.body = nn.Sequential(conv(c, c, bias=False), nn.BatchNorm2d(c), nn.ReLU(), nn.Dropout2d(.1))
        self.drop = StochasticDepth(p, mode)
    def forward(self, x): return x + self.drop(self.body(x))

@variant('stochastic depth (torchvision)', 2, 2)
def stochastic(): return Net([nn.Identity(), Deep(8, .3, 'row')], [Deep(8, .2, 'row'), Deep(8, .1, 'batch')])

class Checkpointed(nn.Module):
    def __init__(self, c, k, use_reentrant):
        super().__init__()
        self.body = nn.Sequential(conv(c, c, k, bias=False), nn.BatchNorm2d(c), nn.ReLU(), conv(c, c, 1))
        self.use_reentrant = use_reentrant
    def forward(self, x):
        if not self.training: return x + self.body(x)
        return x + checkpoint(self.body, x, use_reentrant=self.use_reentrant)

@variant('checkpointed block', 2, 2)
def checkpointed():
    return Net([nn.Identity(), Checkpointed(8, 3, False)], [conv(), Checkpointed(8, 5, False)])

@variant('checkpointed block, reentrant', 2, 2)
def reentrant():
    return Net([nn.Identity(), Checkpointed(8, 3, True)], [conv(), Checkpointed(8, 5, True)])

class Centered(nn.Module): # keeps a moving average
    def __init__(self, c, k, in_place):
        super().__init__()
        self.conv = conv(c, c, k)
        self.register_buffer('mean', torch.zeros(c, 1, 1))
        self.in_place = in_place

    def forward(self, x):
        if self.training:
            now = x.detach().mean((0, 2, 3))[:,None,None]
            if self.in_place: self.mean.mul_(.9).add_(now, alpha=.1)
            else: self.mean = .9*self.mean + .1*now
        return self.conv(x - self.mean)

@variant('moving average in a buffer', 2, 2)
def centered(): return Net([nn.Identity(), Centered(8, 3, True)], [conv(), Centered(8, 3, False)])

class Auxiliary(Net): # GoogLeNet's: a second head in training
    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.aux = nn.Linear(8, 4)

    def forward(self, x, path):
        x = self.stem(x)
        for l,(ops,o) in enumerate(zip(self.blocks, path)):
            x = F.relu(ops[o](x))
            if l == 0 and self.training: aux = self.aux(x.mean((2, 3)))
        out = self.head(x.mean((2, 3)))
        return (out, aux) if self.training else out

@variant('auxiliary head in training', 2, 2, loss_func=aux_loss, metric=first_accuracy)
def auxiliary(): return Auxiliary([nn.Identity(), conv()], [conv(), conv(k=5)])

@variant('several labels an image', 2, 2, data=tagged, loss_func=F.binary_cross_entropy_with_logits,
      metric=tag_accuracy)
def labels():
    net = Net([nn.Identity(), conv()], [conv(), conv(k=5)])
    net.head = nn.Linear(8, 3)
    return net

# other tasks

class UNet(nn.Module):
    def __init__(self, c=4):
        super().__init__()
        def layer(c_in, c_out, k):
            return nn.Sequential(conv(c_in, c_out, k), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))
        widths = [(3, c), (c, 2*c), (2*c, 4*c), (4*c + 2*c, 2*c), (2*c + c, c)]
        self.blocks = nn.ModuleList(nn.ModuleList(layer(*w, k) for k in (1, 3)) for w in widths)
        self.head = nn.Conv2d(c, 3, 1)

    def forward(self, x, path):
        skips = []
        for l in range(2):
            x = self.blocks[l][path[l]](x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.blocks[2][path[2]](x)
        for l in (3, 4):
            skip = skips.pop()
            x = F.interpolate(x, scale_factor=2, mode='nearest')
            if x.shape[-2:] != skip.shape[-2:]: x = F.interpolate(x, size=skip.shape[-2:])
            x = self.blocks[l][path[l]](torch.cat([x, skip], dim=1))
        return self.head(x)

@kind('U-Net (segmentation)', 2, 2, 2, 2, 2, data=scenes)
def unet(): return UNet()

class Upscale(nn.Module):
    def __init__(self):
        super().__init__()
        def up(k, pad): return nn.ConvTranspose2d(8, 8, k, stride=2, padding=pad, output_padding=k%2)
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        shuffle = nn.Sequential(nn.Conv2d(8, 32, 1), nn.PixelShuffle(2))
        self.blocks = nn.ModuleList([nn.ModuleList([up(2, 0), up(3, 1), up(4, 1), shuffle])])
        self.tail = nn.Conv2d(8, 3, 3, 1, 1)

    def forward(self, x, path):
        y = self.blocks[0][path[0]](F.relu(self.stem(x)))
        return F.interpolate(x, scale_factor=2) + self.tail(F.relu(y))

@kind('transposed convolution (images to images)', 4, data=blurred, loss_func=F.mse_loss, metric=neg_error)
def upscale(): return Upscale()

class VAE(nn.Module): # draws in training, and returns what its loss needs
    def __init__(self, d=4):
        super().__init__()
        self.d = d
        self.encode = nn.Linear(64, 16)
        def ops(): return [nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.Tanh())]
        self.blocks = nn.ModuleList(nn.ModuleList(ops()) for _ in range(2))
        self.code, self.decode = nn.Linear(16, 2*d), nn.Linear(d, 64)

    def forward(self, x, path):
        h = F.relu(self.encode(x.flatten(1)))
        for l,o in enumerate(path): h = h + self.blocks[l][o](h)
        mean, log_var = self.code(h).chunk(2, 1)
        z = mean
        if self.training: z = mean + torch.randn_like(mean)*(.5*log_var).exp()
        return self.decode(z).view_as(x), mean, log_var

@variant('variational autoencoder', 2, 2, data=gray, loss_func=elbo, metric=first_neg_error)
def vae(): return VAE()

class Tabular(nn.Module):
    def __init__(self, cards=(7, 3), n_cont=3):
        super().__init__()
        self.embeds = nn.ModuleList([nn.Embedding(n, 4) for n in cards])
        self.bn_cont = nn.BatchNorm1d(n_cont)
        self.first = nn.Linear(4*len(cards) + n_cont, 16)
        def dense(act): return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), act, nn.Dropout(.1))
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Identity(), dense(nn.ReLU()), dense(nn.Tanh())])
                                    for _ in range(2))
        self.out = nn.Linear(16, 1)

    def forward(self, x, path):
        x_cat, x_cont = x
        x = [e(x_cat[:,i]) for i,e in enumerate(self.embeds)]
        x = self.first(torch.cat(x + [self.bn_cont(x_cont)], 1))
        for ops,o in zip(self.blocks, path): x = x + ops[o](x)
        return self.out(x).squeeze(-1)

@kind('embedding + MLP (table, regression)', 3, 3, data=houses, loss_func=F.mse_loss, metric=neg_error,
      lr=.02)
def tabular(): return Tabular()

class Review(nn.Module): # a dict in, a dict out
    def __init__(self):
        super().__init__()
        self.words = nn.EmbeddingBag(17, 8, mode='mean')
        self.stars = nn.Linear(3, 8)
        normed = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8), normed])])
        self.head = nn.Linear(8, 4)

    def forward(self, x, path):
        h = self.words(x['ids']) + self.stars(x['stars'])
        h = torch.tanh(self.blocks[0][path[0]](h))
        return {'logits': self.head(h), 'penalty': h.square().mean(1)}

@kind('dict in, dict out', 2, data=reviews, loss_func=dict_loss, metric=dict_accuracy)
def review(): return Review()

class GraphLayer(nn.Module):
    def __init__(self, c, act):
        super().__init__()
        self.lin, self.act = nn.Linear(c, c), act

    def forward(self, x, adj):
        degree = adj.sum(-1, keepdim=True).clamp(min=1)
        return self.act(self.lin(torch.bmm(adj, x)/degree))

class Molecule(nn.Module): # nodes and edges, a pair of tensors
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(nn.ModuleList([GraphLayer(8, act) for act in (torch.tanh, F.relu)])
                                    for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x, path):
        nodes, adj = x
        h = self.encode(nodes)
        for ops,o in zip(self.blocks, path): h = h + ops[o](h, adj)
        return self.head(h.amax(1))

@kind('graph layer (two inputs)', 2, 2, data=molecules)
def molecule(): return Molecule()

class Volumes(nn.Module):
    def __init__(self, c=6):
        super().__init__()
        self.stem = nn.Conv3d(2, c, 3, padding=1)
        def op(k): return nn.Sequential(nn.Conv3d(c, c, k, padding=k//2), nn.BatchNorm3d(c), nn.ReLU())
        self.blocks = nn.ModuleList([nn.ModuleList([op(1), op(3), nn.AvgPool3d(3, 1, 1)])])
        self.head = nn.Linear(c, 4)

    def forward(self, x, path): return self.head(self.blocks[0][path[0]](self.stem(x)).flatten(2).mean(-1))

@kind('Conv3d', 3, data=volumes)
def volume_net(): return Volumes()

# sequences

class Recurrent(nn.Module):
    def __init__(self, cell):
        super().__init__()
        ops = [cell(5, 8, batch_first=True), cell(5, 8, num_layers=2, batch_first=True, dropout=.1),
               cell(5, 4, batch_first=True, bidirectional=True)]
        self.blocks = nn.ModuleList([nn.ModuleList(ops)])
        self.head = nn.Linear(8, 4)

    def forward(self, x, path):
        out, _ = self.blocks[0][path[0]](x)
        return self.head(out[:,-1])

@kind('GRU', 3, data=rows)
def gru(): return Recurrent(nn.GRU)

@kind('LSTM', 3, data=rows)
def lstm(): return Recurrent(nn.LSTM)

class Reader(nn.Module): # a state of its own, step by step
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleList([nn.GRUCell(5, 8), nn.RNNCell(5, 8)])])
        self.head = nn.Linear(8, 4)

    def forward(self, x, path):
        cell = self.blocks[0][path[0]]
        h = torch.zeros(x.size(0), cell.hidden_size, device=x.device)
        for t in range(x.shape[1]): h = cell(x[:,t], h)
        return self.head(h)

@variant('recurrent cells in a loop', 2, data=rows)
def reader(): return Reader()

class Packed(nn.Module): # sentences of several lengths
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(17, 6, padding_idx=0)
        ops = [nn.GRU(6, 8, batch_first=True), nn.RNN(6, 8, batch_first=True)]
        self.blocks = nn.ModuleList([nn.ModuleList(ops)])
        self.head = nn.Linear(8, 4)

    def forward(self, x, path):
        ids, lengths = x
        packed = pack_padded_sequence(self.embed(ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, h = self.blocks[0][path[0]](packed)
        return self.head(h[-1])

@kind('packed sequences', 2, data=sentences_and_lengths, needs_values=True,
      refused=dict(torch_export='torch.export failed', onnx='torch.export failed'))
def packed(): return Packed()

class TextCNN(nn.Module):
    def __init__(self, c=8):
        super().__init__()
        self.embedding = nn.Embedding(17, c, padding_idx=0)
        def op(k): return nn.Sequential(nn.Conv1d(c, c, k, padding=k//2), nn.BatchNorm1d(c), nn.ReLU())
        self.blocks = nn.ModuleList(nn.ModuleList(op(k) for k in (1, 3, 5)) for _ in range(2))
        self.fc = nn.Linear(2*c, 4)

    def forward(self, x, path):
        x = self.embedding(x).transpose(1, 2)
        for ops,o in zip(self.blocks, path): x = ops[o](x) + x
        x = torch.cat([F.max_pool1d(x, x.size(2)).squeeze(2), x.mean(2)], 1)
        return self.fc(F.dropout(x, .1, self.training))

@kind('Conv1d text net with embedding', 3, 3, data=sentences)
def text_cnn(): return TextCNN()

class TokenTransformer(nn.Module): # padding is masked
    def __init__(self, d=8):
        super().__init__()
        self.embed = nn.Embedding(17, d, padding_idx=0)
        self.pos = nn.Parameter(torch.zeros(1, 10, d))
        nn.init.trunc_normal_(self.pos, std=.02)
        def layer(heads, first):
            return nn.TransformerEncoderLayer(d, heads, 2*d, .1, batch_first=True, norm_first=first)
        self.blocks = nn.ModuleList(nn.ModuleList([layer(1, False), layer(2, True), layer(4, False)])
                                    for _ in range(2))
        self.head = nn.Linear(d, 4)

    def forward(self, ids, path):
        pad = ids == 0
        x = self.embed(ids) + self.pos[:,:ids.shape[1]]
        for l,o in enumerate(path): x = self.blocks[l][o](x, src_key_padding_mask=pad)
        x = x.masked_fill(pad.unsqueeze(-1), 0.)
        return self.head(x.sum(1)/(~pad).sum(1, keepdim=True))

@kind('token transformer', 3, 3, data=sentences, lr=.1)
def transformer(): return TokenTransformer()

class LanguageModel(nn.Module): # the embedding is the output layer, too
    def __init__(self, n=17, d=12):
        super().__init__()
        self.embed = nn.Embedding(n, d)
        def mlp(k): return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, k*d), nn.GELU(), nn.Linear(k*d, d))
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Identity(), mlp(1), mlp(2)]) for _ in range(2))
        self.norm = nn.LayerNorm(d)
        self.out = nn.Linear(d, n, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids, path):
        x = self.embed(ids)
        for ops,o in zip(self.blocks, path): x = x + ops[o](x)
        return self.out(self.norm(x))

@variant('language model with tied weights', 3, 3, data=next_words, loss_func=word_loss, metric=word_accuracy)
def language_model(): return LanguageModel()

# attention

class Encoder(nn.Module):
    def __init__(self, dim, heads, mlp_ratio=2):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, dropout=.1, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio*dim), nn.GELU(), nn.Linear(mlp_ratio*dim, dim))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))

class Attention(nn.Module): # as in timm
    def __init__(self, dim, num_heads, drop=.1):
        super().__init__()
        assert dim%num_heads == 0, 'dim should be divisible by num_heads'
        self.num_heads, self.head_dim = num_heads, dim//num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3*dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.drop = drop

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop if self.training else 0.)
        return x + self.proj(y.transpose(1, 2).reshape(B, N, C))

class ViT(nn.Module):
    def __init__(self, *blocks, dim=8, patch=2):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, dim)*.02)
        self.blocks = nn.ModuleList(nn.ModuleList(ops) for ops in blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 4)

    def forward(self, x, path):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for l,o in enumerate(path): x = self.blocks[l][o](x)
        return self.head(self.norm(x)[:,0])

@kind('ViT block (nn.MultiheadAttention)', 2, 3, lr=.1)
def vit(): return ViT([Encoder(8, 1), Encoder(8, 4)], [nn.Identity(), Encoder(8, 2), Encoder(8, 2, 3)])

@kind('ViT attention (scaled_dot_product_attention)', 2, 3, lr=.1)
def sdpa_vit():
    return ViT([Attention(8, 1), Attention(8, 2)], [nn.Identity(), Attention(8, 4), Attention(8, 2)])

class Swin(nn.Module): # the channels come last; windows, shifts, a table of relative positions
    def __init__(self, dim=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dim, 2, 2), nn.ReLU())
        def layer(shift, heads):
            sizes = [2, 2], [shift, shift]
            return SwinTransformerBlock(dim, heads, *sizes, 2., dropout=.1, stochastic_depth_prob=.2)
        self.blocks = nn.ModuleList(nn.ModuleList([layer(0, 2), layer(1, 2), layer(1, 4)]) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 4)

    def forward(self, x, path):
        x = self.stem(x).permute(0, 2, 3, 1)
        for ops,o in zip(self.blocks, path): x = ops[o](x)
        return self.head(self.norm(x).mean((1, 2)))

@variant('Swin block (torchvision)', 3, 3, lr=.1)
def swin(): return Swin()
