"A subnet retrained by several processes, killed and resumed; exported and run without kshot"
import copy
import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from safetensors.torch import load_file, save_file
from torch import distributed as dist, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import StochasticDepth

from kshot.base.distributed import world
from kshot.base.inputs import example_input, map_tensors, tensors_in
from kshot.benchmark import BENCHMARKS, Benchmark, get_net, get_space, register
from kshot.data import digits_data, digits_splits
from kshot.evaluate import accuracy_loss
from kshot.export import latency_ms, load_subnet, measure_module, save_subnet, to_onnx, to_torch_export
from kshot.networks import subnet
from kshot.retrain import get_recipe, retrain
from kshot.space import Block, Space
from kshot.supernet import Supernet
from processes import call_ranks

PATH = 2, 3, 1, 2
BATCH_SIZES = 1, 2, 7
WORDS = dict(ids=torch.arange(12).view(2, 6)%9, mask=torch.rand(2, 6))
RUN_WITHOUT_KSHOT = '''
import importlib.abc, sys
class Forbid(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split('.')[0] in ('kshot', 'fastai'): raise ImportError(f'{name} is out of bounds')
sys.meta_path.insert(0, Forbid())
import torch
from safetensors.torch import load_file, save_file
module, folder = torch.export.load(sys.argv[1]).module(), sys.argv[2]
outs = {name: module(x) for name,x in load_file(f'{folder}/in.safetensors').items()}
save_file(outs, f'{folder}/out.safetensors')
assert not any(name.split('.')[0] == 'kshot' for name in sys.modules)
'''

def digits_subnet(path=PATH, seed=0):
    torch.manual_seed(seed)
    return subnet(get_net('digits', channels=4), path)

def describe(path, **kwargs):
    "Return what `save_subnet` is told about a subnet."
    sizes = dict(channels=4, n_cells=0, n_classes=10, widths=[], width_per='layer', depth=True, px=0)
    return dict(space='digits', path=path) | sizes | kwargs

# what the processes of a group do

class FrozenNorm(Callback):
    "Batch norm in evaluation mode: otherwise each rank would have statistics of its own."
    order = 20
    def before_train(self):
        for m in self.learn.model.modules():
            if isinstance(m, nn.BatchNorm2d): m.eval()

class CallAt(Callback):
    "Call something before one batch."
    order = 20
    def __init__(self, epoch, batch, function): self.at, self.function = (epoch, batch), function
    def before_batch(self):
        if (self.epoch, self.iter) == self.at: self.function(self)

def spoil(cb): cb.learn.xb = (cb.xb[0]*math.nan,)

def die(cb): os.kill(os.getpid(), signal.SIGKILL)

def train(folder=None, name='strong', cbs=(), dropout=0., epochs=2, **kwargs):
    "Retrain on all ranks; return the tensors of the module and of its average, and the log."
    module = digits_subnet()
    recipe = get_recipe(name, epochs=epochs, bs=96)._replace(dropout=dropout)
    dls = digits_data(96, seed=1, shard=world())
    log, ema = retrain(module, dls, recipe, folder, cbs=cbs, **kwargs)
    tensors = {f'weights/{name}': t for name,t in module.state_dict().items()}
    if ema is not None: tensors |= {f'ema/{name}': t for name,t in ema.state_dict().items()}
    return tensors, log

def write(fname, tensors, log):
    save_file({name: t.contiguous() for name,t in tensors.items()}, f'{fname}.safetensors')
    Path(f'{fname}.json').write_text(json.dumps(log))

def read(fname):
    return load_file(f'{fname}.safetensors'), json.loads(Path(f'{fname}.json').read_text())

def train_thrice(fname_of):
    for name in 'strong', 'mild': write(fname_of(name), *train(name=name, cbs=[FrozenNorm()]))
    write(fname_of('stats'), *train(dropout=.2))
    try: train(cbs=[CallAt(1, 2, spoil)] if world().rank else [])
    except ValueError as e: write(fname_of('error'), {}, str(e))

def begin(fname_of):
    train(fname_of('.').parent/'run', dropout=.2, epochs=3, cbs=[CallAt(2, 4, die)])

def resume(fname_of):
    folder = fname_of('.').parent/'run'
    write(fname_of('resumed'), *train(folder, dropout=.2, epochs=3, resume=True))

def train_undisturbed(fname_of):
    write(fname_of('whole'), *train(fname_of('.').parent/'whole', dropout=.2, epochs=3))

def one_rank(work, folder):
    "Do some work as one process of a group."
    dist.init_process_group('gloo')
    work(lambda name: Path(folder)/f'{name}_{dist.get_rank()}')
    dist.destroy_process_group()

def on_two(folder, work):
    "Call a function on two ranks; return exit status, stdout and stderr."
    code = f'import sys, test_export as t; t.one_rank(t.{work.__name__}, sys.argv[1])'
    return call_ranks(2, code, folder)

def check_same_bits(a, b):
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]

# several processes

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "What two ranks have trained"
    folder = tmp_path_factory.mktemp('ranks')
    status, _, err = on_two(folder, train_thrice)
    assert status == 0, err
    return folder

@pytest.mark.parametrize('name', ['strong', 'mild'])
def test_two_ranks_are_one_process(folder, name):
    tensors, log = train(name=name, cbs=[FrozenNorm()])
    (tensors0, log0), (tensors1, log1) = [read(folder/f'{name}_{rank}') for rank in (0, 1)]
    check_same_bits(tensors0, tensors1)
    assert log0 == log1 and len(log) == 2
    for name,t in tensors.items():
        assert (tensors0[name]-t).double().norm() <= 1e-5*t.double().norm().clamp(min=1e-3), name
    for row0,row in zip(log0, log): assert row0 == pytest.approx(row, rel=1e-5)
    start = {name: t for name,t in digits_subnet().state_dict().items() if t.is_floating_point()}
    assert any((tensors[f'weights/{name}']-t).norm() > 1e-3*t.norm() for name,t in start.items())

def test_statistics_are_averaged(folder):
    (tensors0, log0), (tensors1, log1) = [read(folder/f'stats_{rank}') for rank in (0, 1)]
    check_same_bits(tensors0, tensors1)
    assert log0 == log1

def test_all_ranks_stop_where_one_has_no_finite_loss(folder):
    errors = [read(folder/f'error_{rank}')[1] for rank in (0, 1)]
    expected = 'training stopped in epoch 2, batch 3: loss nan, expected a finite number; there is no'
    assert len(set(errors)) == 1 and errors[0].startswith(expected), errors

def test_killed_and_resumed(tmp_path):
    assert on_two(tmp_path, begin)[0] == -signal.SIGKILL
    names = sorted(fname.name for fname in (tmp_path/'run/checkpoint').iterdir())
    assert names == ['epoch_00001.safetensors', 'epoch_00002.safetensors']
    for work in resume, train_undisturbed: assert on_two(tmp_path, work)[0] == 0
    tensors, log = read(tmp_path/'whole_0')
    for name in 'resumed_0', 'resumed_1', 'whole_1':
        others, other_log = read(tmp_path/name)
        check_same_bits(others, tensors)
        assert other_log == log

# files of subnets

@pytest.fixture(scope='module')
def trained():
    "A subnet that knows digits, the test images, and its logits for them"
    module = digits_subnet()
    retrain(module, digits_data(passes=5, seed=1), get_recipe('quick', epochs=4))
    x, y = digits_splits()['test']
    with torch.no_grad(): out = module(x)
    assert (out.argmax(1) == y).float().mean() > .4
    return module, x, y, out

def test_reloading_gives_the_same_accuracy(trained, tmp_path):
    module, x, _, out = trained
    save_subnet(tmp_path, module, describe(PATH))
    loaded, _ = load_subnet(tmp_path)
    assert torch.equal(loaded(x), out)
    test_loader = digits_data().loaders[2]
    assert accuracy_loss(loaded, test_loader) == accuracy_loss(module, test_loader)

@pytest.mark.parametrize('name,benchmark', BENCHMARKS.items(), ids=BENCHMARKS)
def test_subnets_of_every_space(name, benchmark, tmp_path):
    "From a network and from K supernets, bit by bit"
    n_cells = dict(nb201=1, nb101=1, darts=3, nds=3).get(name, 0)
    C, *_, px = benchmark.x_shape
    px = min(px, 64)
    net, rng = get_net(name, 8, n_cells, px=px), np.random.default_rng(0)
    path, = benchmark.space.sample(rng, 1)
    x = torch.rand(2, C, px, px)
    of_supernet = Supernet(net, 2).subnet(path, torch.tensor([.3, .7]))
    for folder,module in (('net', subnet(net, path)), ('supernet', of_supernet)):
        about = describe(path, space=name, channels=8, n_cells=n_cells, px=px)
        save_subnet(tmp_path/folder, module.eval(), about)
        loaded, _ = load_subnet(tmp_path/folder)
        assert torch.equal(loaded(x), module(x))
        assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
        assert all(p.requires_grad for p in loaded.parameters())

@pytest.mark.parametrize('width_per', ['layer', 'path'])
def test_subnet_with_widths(width_per, tmp_path):
    widths = dict(widths=(.2, .6, 1.), width_per=width_per)
    path, = get_space('mobilenet_se', **widths).sample(np.random.default_rng(0), 1)
    module = subnet(get_net('mobilenet_se', 8, **widths), path).eval()
    about = describe(path, space='mobilenet_se', channels=8, **widths)
    save_subnet(tmp_path, module, about)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_subnet(tmp_path)[0](x), module(x))
    other = (*path[:-1], (path[-1]+1)%3)
    with pytest.raises(ValueError, match='for tensor|width'):
        save_subnet(tmp_path, module, about | dict(path=other))

class Words(nn.Module):
    "Much that own networks have: tied and frozen weights, buffers in no file, numbers computed from tensors"
    def __init__(self, channels=8):
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, .1, 2)]
        self.embedding = nn.Embedding(9, channels)
        self.embedding.requires_grad_(False)
        self.register_buffer('places', torch.arange(6.)[:, None], persistent=False)
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Identity(), nn.Linear(channels, channels)])])
        self.head = nn.Linear(channels, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x, path):
        h = self.embedding(x['ids']) + self.places*self.rates[1]
        return self.head(self.blocks[0][path[0]](h)*x['mask'][..., None])

@pytest.fixture
def words():
    "A benchmark of one's own"
    space = Space('words', (Block('a', ('skip', 'linear')),))
    yield register(Benchmark('words', space, Words, WORDS))
    del BENCHMARKS['words']

def test_subnet_of_an_own_network(words, tmp_path):
    x = WORDS
    torch.manual_seed(0)
    module = subnet(Words(8), (1,)).eval()
    about = describe((1,), space='words', channels=8, x_shape=x)
    state = torch.get_rng_state()
    save_subnet(tmp_path, module, about)
    loaded, content = load_subnet(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loaded(x), module(x))
    n_trained = 8*8 + 8
    assert sum(p.numel() for p in loaded.parameters()) == n_trained + 9*8 # the head has none of its own
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in module.parameters()]
    in_file = json.loads((tmp_path/'subnet.json').read_text())['x_shape']
    assert in_file == dict(ids='int64[6]', mask='float32[6]')
    costs = measure_module(loaded, content['x_shape'])
    assert [costs['macs'], costs['n_params']] == [6*8*8 + 6*8*9, n_trained]
    to_torch_export(loaded, content['x_shape'], tmp_path/'subnet.pt2')
    check_same_values(torch.export.load(tmp_path/'subnet.pt2').module()(x), module(x))

def test_weights_of_a_network_with_other_names(words, tmp_path):
    with pytest.raises(ValueError, match='for tensor .*, expected'):
        save_subnet(tmp_path, digits_subnet(), describe((1,), space='words', channels=8))
    assert not [*tmp_path.iterdir()]

# files that need no kshot

def test_torch_export_runs_without_kshot(trained, tmp_path):
    module, x, y, out = trained
    fname = tmp_path/'subnet.pt2'
    to_torch_export(module.train(), x.shape[1:], fname) # in evaluation mode all the same
    assert module.training and [*tmp_path.iterdir()] == [fname]
    module.eval()
    batches = {str(n): x[:n].clone() for n in BATCH_SIZES}
    save_file(batches | dict(all=x.contiguous()), tmp_path/'in.safetensors')
    subprocess.run([sys.executable, '-c', RUN_WITHOUT_KSHOT, fname, tmp_path], check=True)
    outs = load_file(tmp_path/'out.safetensors')
    for n in BATCH_SIZES: assert (outs[str(n)]-out[:n]).abs().max() <= 1e-6*out.abs().max()
    assert (outs['all'].argmax(1) == y).sum() == (out.argmax(1) == y).sum()

def test_onnx(trained, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    module, x, y, out = trained
    fname = tmp_path/'subnet.onnx'
    to_onnx(module, x.shape[1:], fname)
    assert [*tmp_path.iterdir()] == [fname]
    session = onnxruntime.InferenceSession(fname, providers=['CPUExecutionProvider'])
    def run(x): return torch.tensor(session.run(['logits'], {'x': x.numpy()})[0])
    for n in BATCH_SIZES: assert (run(x[:n])-out[:n]).abs().max() <= 1e-4*out.abs().max()
    assert (run(x).argmax(1) == y).sum() == (out.argmax(1) == y).sum()

class Reads(nn.Module):
    "Call a function of an input and modules by name."
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name,module in modules.items(): self.add_module(name, module)

    def forward(self, x): return self.function(self, x)

def attend(self, x): # (N, L, C), three dimensions
    q, k, v = self.qkv(x).chunk(3, -1)
    return x + F.scaled_dot_product_attention(q, k, v)

def attend_in_heads(self, x): # (N, L, C) -> (N, heads, L, C/heads)
    q, k, v = [t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

def attend_on_pixels(self, x): # (N, C, H, W)
    rows = x.flatten(2).mT
    return x + attend(self, rows).mT.reshape(x.shape)

def read_words(self, x): return self.head(self.embedding(x['ids'])*x['mask'][..., None])
def read_pair(self, x): return self.a(x[0]) + self.b(x[1]).mean((2, 3))
def read_nested(self, x): return x['more'][0].sum(1) + x['more'][1]['z'].float()
def give_two(self, x): return self.a(x), x.mean(1)
def give_more(self, x): return dict(out=self.a(x), aux=[x.sum(1), x*2])
def last_state(self, x): return self.rnn(x)[0][:, -1]
def pad(self, x): return torch.cat([x, torch.zeros(x.size(0), 1)], 1)
def look_at_shape(self, x):
    if x.ndim != 2: raise TypeError('rows only')
    return x.view(x.shape[0], 2, -1).mean(2)

QKV = partial(nn.Linear, 8, 24)
NESTED = dict(more=(torch.rand(2, 3), dict(z=torch.arange(2))))
INPUTS = { # what reads it, an input of two examples or the shape of one, its names and those of the outputs
    'rows': (lambda: nn.Linear(5, 4), (5,), 'x', 'logits'),
    'sequences': (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (3, 9), 'x', 'logits'),
    'images': (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()), (3, 8, 8),
               'x', 'logits'),
    'volumes': (lambda: nn.Conv3d(2, 4, 3), (2, 5, 5, 5), 'x', 'logits'),
    'tokens': (lambda: nn.EmbeddingBag(9, 4), torch.arange(10).view(2, 5)%9, 'x', 'logits'),
    'bytes': (lambda: Reads(lambda self, x: self.a(x/255), a=nn.Linear(5, 4)),
              torch.arange(10, dtype=torch.uint8).view(2, 5), 'x', 'logits'),
    'dict': (lambda: Reads(read_words, embedding=nn.Embedding(9, 8), head=nn.Linear(8, 4)), WORDS,
             'x_ids x_mask', 'logits'),
    'pair': (lambda: Reads(read_pair, a=nn.Linear(5, 4), b=nn.Conv2d(3, 4, 3)),
             (torch.rand(2, 5), torch.rand(2, 3, 8, 8)), 'x_0 x_1', 'logits'),
    'nested': (lambda: Reads(read_nested), NESTED, 'x_more_0 x_more_1_z', 'logits'),
    'two outputs': (lambda: Reads(give_two, a=nn.Linear(5, 4)), (5,), 'x', 'output_0 output_1'),
    'nested outputs': (lambda: Reads(give_more, a=nn.Linear(5, 4)), (5,), 'x', 'output_0 output_1 output_2'),
    'attention': (lambda: Reads(attend, qkv=QKV()), (5, 8), 'x', 'logits'),
    'heads': (lambda: Reads(attend_in_heads, qkv=QKV()), (5, 8), 'x', 'logits'),
    'pixels': (lambda: Reads(attend_on_pixels, qkv=QKV()), (8, 3, 3), 'x', 'logits'),
    'layer': (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8), 'x', 'logits'),
    'gru': (lambda: Reads(last_state, rnn=nn.GRU(8, 4, batch_first=True)), (5, 8), 'x', 'logits'),
    'lstm': (lambda: Reads(last_state, rnn=nn.LSTM(8, 4, batch_first=True)), (5, 8), 'x', 'logits'),
    'size': (lambda: Reads(pad), (5,), 'x', 'logits'),
    'length': (lambda: Reads(lambda self, x: self.a(x) + self.a.bias.expand(len(x), -1), a=nn.Linear(5, 4)),
               (5,), 'x', 'logits'),
    'shape': (lambda: Reads(look_at_shape), (6,), 'x', 'logits')}
each_input = pytest.mark.parametrize('make, x, inputs, outputs', INPUTS.values(), ids=INPUTS)

def batches_like(x): # of several sizes, no two examples equal
    generator = torch.Generator().manual_seed(0)
    def draw(t, n):
        if t.is_floating_point(): return torch.rand(n, *t.shape[1:], generator=generator)
        return torch.randint(9, (n, *t.shape[1:]), generator=generator).to(t.dtype)
    return [map_tensors(partial(draw, n=n), example_input(x)) for n in BATCH_SIZES]

def check_same_values(outs, expected):
    for a,b in zip(tensors_in(outs), tensors_in(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

def check_torch_export(module, x, fname):
    to_torch_export(module, x, fname)
    module.eval()
    program = torch.export.load(fname).module()
    for batch in batches_like(x): check_same_values(program(batch), module(batch))

@each_input
def test_torch_export_of_any_input(make, x, inputs, outputs, tmp_path):
    module = make()
    check_torch_export(module, x, tmp_path/'module.pt2')

@each_input
def test_onnx_of_any_input(make, x, inputs, outputs, tmp_path, capfd):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    module = make()
    to_onnx(module, x, tmp_path/'module.onnx')
    assert not capfd.readouterr().out
    module.eval()
    session = onnxruntime.InferenceSession(tmp_path/'module.onnx', providers=['CPUExecutionProvider'])
    assert [i.name for i in session.get_inputs()] == inputs.split()
    assert [o.name for o in session.get_outputs()] == outputs.split()
    for batch in batches_like(x):
        arrays = {name: t.numpy() for name,t in zip(inputs.split(), tensors_in(batch))}
        check_same_values([*map(torch.tensor, session.run(None, arrays))], module(batch))

@each_input
def test_latency_and_macs_of_any_input(make, x, inputs, outputs):
    module = make().eval()
    costs = measure_module(module, x, bs=3)
    with FlopCounterMode(display=False) as counter: module(example_input(x))
    macs = counter.get_total_flops()//2
    if isinstance(getattr(module, 'rnn', None), nn.LSTM): # one op on a CPU, which is not counted
        macs = 5*4*4*(8+4) # steps, gates, sizes of the state and of both that it is made of
    assert costs['macs'] == macs
    assert costs['n_params'] == sum(p.numel() for p in module.parameters()) and costs['latency_ms'] > 0

# subnets of own networks

class Own(nn.Module):
    "Blocks of ops, and what a network puts around them."
    def __init__(self, blocks, **modules):
        super().__init__()
        for name,module in modules.items(): self.add_module(name, module)
        self.blocks = nn.ModuleList(map(nn.ModuleList, blocks))

    def run(self, x, path):
        for ops,o in zip(self.blocks, path): x = ops[o](x)
        return x

class Bottle(nn.Sequential):
    "A subclass that its network looks for"
    def forward(self, x): return x + super().forward(x)

def conv(a, b, size=3):
    return nn.Sequential(nn.Conv2d(a, b, size, padding=size//2, bias=False), nn.BatchNorm2d(b), nn.ReLU())

class Images(Own):
    "Dropout by function, stochastic depth, a check of classes"
    def __init__(self):
        ops = [[nn.Identity(), conv(8, 8), Bottle(conv(8, 4, 1), conv(4, 8))] for _ in range(2)]
        super().__init__(ops, stem=conv(3, 8), depth=StochasticDepth(.3, 'row'), head=nn.Linear(8, 4))

    def forward(self, x, path):
        x = self.stem(x)
        for ops,o in zip(self.blocks, path):
            if isinstance(ops[o], Bottle): x = self.depth(ops[o](x))
            else: x = ops[o](x)
        return self.head(F.dropout(x.mean((2, 3)), .2, self.training))

class Sequences(Own):
    "Recurrent ops on tokens, and sizes that come from the input"
    def __init__(self):
        ops = [[nn.GRU(8, 8, batch_first=True), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 8)]]
        super().__init__(ops, embedding=nn.Embedding(9, 8), head=nn.Linear(9, 4))

    def forward(self, x, path):
        if x.ndim != 2: raise ValueError(f'{x.shape}, expected tokens')
        out = self.run(self.embedding(x), path)
        h = out[0] if isinstance(out, tuple) else out
        return self.head(torch.cat([h.mean(1), torch.zeros(x.size(0), 1)], 1))

class Heads(nn.Module):
    "Attention of several heads"
    def __init__(self, c):
        super().__init__()
        self.norm = nn.LayerNorm(c)
        self.attention = nn.MultiheadAttention(c, 2, batch_first=True)

    def forward(self, x):
        h = self.norm(x)
        return x + self.attention(h, h, h, need_weights=False)[0]

class Patches(Own):
    "A vision transformer, with a token and places of its own"
    def __init__(self):
        mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        ops = [[Heads(8), mlp], [nn.Identity(), Heads(8)]]
        super().__init__(ops, cut=nn.Conv2d(3, 8, 4, 4), head=nn.Linear(8, 4))
        self.token = nn.Parameter(torch.rand(1, 1, 8))
        self.register_buffer('places', torch.rand(1, 5, 8), persistent=False)

    def forward(self, x, path):
        rows = self.cut(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), rows], 1) + self.places
        return self.head(self.run(x, path)[:, 0])

class Masks(Own):
    "A U-Net: skip connections, transposed convolution, an output of the input's size"
    def __init__(self):
        ops = [[conv(8, 8), conv(8, 8, 5)], [nn.Identity(), conv(16, 16)]]
        super().__init__(ops, stem=conv(3, 8), down=nn.Conv2d(8, 16, 2, 2),
                         up=nn.ConvTranspose2d(16, 8, 2, 2), head=nn.Conv2d(16, 2, 1))

    def forward(self, x, path):
        skip = self.blocks[0][path[0]](self.stem(x))
        low = self.blocks[1][path[1]](self.down(skip))
        return self.head(torch.cat([skip, self.up(low)], 1))

class Rows(Own):
    "Numbers and categories of a row to two outputs"
    def __init__(self):
        ops = [[nn.Linear(12, 12), nn.Sequential(nn.Linear(12, 12), nn.Tanh())],
               [nn.Identity(), nn.Linear(12, 12)]]
        super().__init__(ops, embedding=nn.Embedding(9, 4), norm=nn.BatchNorm1d(4), mean=nn.Linear(12, 1),
                         spread=nn.Linear(12, 1))

    def forward(self, x, path):
        h = torch.cat([self.norm(x['numbers']), self.embedding(x['kinds']).flatten(1)], 1)
        h = self.run(h, path)
        return self.mean(h), self.spread(h).exp()

class Saved(Own):
    "Blocks that run again for their gradient, through weights that several of them share"
    def __init__(self):
        shared = nn.Linear(8, 8)
        ops = [[nn.Sequential(shared, nn.ReLU()), nn.Sequential(nn.Dropout(.2), nn.Linear(8, 8))],
               [nn.Sequential(shared, nn.Tanh()), nn.Identity()]]
        super().__init__(ops, head=nn.Linear(8, 4))

    def forward(self, x, path):
        for ops,o in zip(self.blocks, path):
            x = checkpoint(ops[o], x, use_reentrant=False) if self.training else ops[o](x)
        return self.head(x)

OWN = { # network, a path, input, names of the outputs
    'images': (Images, (2, 1), (3, 8, 8), 'logits'), 'other images': (Images, (0, 2), (3, 8, 8), 'logits'),
    'gru': (Sequences, (0,), torch.arange(12).view(2, 6)%9, 'logits'),
    'lstm': (Sequences, (1,), torch.arange(12).view(2, 6)%9, 'logits'),
    'patches': (Patches, (0, 1), (3, 8, 8), 'logits'), 'masks': (Masks, (1, 1), (3, 8, 8), 'logits'),
    'rows': (Rows, (1, 1), dict(numbers=torch.rand(2, 4), kinds=torch.arange(4).view(2, 2)),
             'output_0 output_1'),
    'saved': (Saved, (0, 0), (8,), 'logits'), 'saved once': (Saved, (1, 1), (8,), 'logits')}
each_own = pytest.mark.parametrize('make, path, x, outputs', OWN.values(), ids=OWN)

def own_subnet(make, path):
    torch.manual_seed(0)
    net = make()
    return net, subnet(net, path)

def train_on(run, parameters, batch, n=4):
    "Train any function by plain torch; return its losses."
    opt = torch.optim.SGD(parameters, lr=.05, momentum=.9)
    losses = []
    for seed in range(n):
        torch.manual_seed(seed)
        loss = sum(out.square().mean() for out in tensors_in(run(batch)))
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses

@each_own
def test_a_subnet_trains_as_its_network_does(make, path, x, outputs):
    net, module = own_subnet(make, path)
    batch = batches_like(x)[-1]
    before = {name: t.clone() for name,t in module.state_dict().items()}
    assert module.training and all(m.training for m in module.modules())
    expected = train_on(lambda x: net.train()(x, path), net.parameters(), batch)
    assert train_on(module, module.parameters(), batch) == pytest.approx(expected, rel=1e-5)
    of_net = net.state_dict()
    moved = 0
    for name,t in module.state_dict().items():
        torch.testing.assert_close(t, of_net[name.removeprefix('net.')], msg=name)
        moved += not torch.equal(t, before[name])
    assert moved == len(before) # every weight and statistic counts
    for mode in False, True:
        assert module.train(mode) is module and all(m.training == mode for m in module.modules())
    module.eval()
    net.eval()
    check_same_values(module(batch), net(batch, path))
    check_same_values(module(batch), module(batch))

@each_own
def test_a_subnet_is_copied(make, path, x, outputs):
    net, module = own_subnet(make, path)
    batch = batches_like(x)[-1]
    expected = module.eval()(batch)
    copied = copy.deepcopy(module)
    assert type(copied) is type(module) and type(copied.net) is type(module.net) is make
    with torch.no_grad():
        for other in copied, net: # neither is the subnet
            for p in other.parameters(): p.add_(1)
    assert all(map(torch.equal, tensors_in(module(batch)), tensors_in(expected)))

@each_own
def test_a_subnet_is_pickled(make, path, x, outputs, tmp_path):
    _, module = own_subnet(make, path)
    module.eval()
    torch.save(module, tmp_path/'module.pt')
    torch.save(module.state_dict(), tmp_path/'weights.pt')
    other = own_subnet(make, path)[1].eval()
    for p in other.parameters(): p.data.zero_()
    other.load_state_dict(torch.load(tmp_path/'weights.pt'))
    loaded = torch.load(tmp_path/'module.pt', weights_only=False)
    assert type(loaded.net) is make and loaded.path == path and not loaded.training
    for batch in batches_like(x):
        expected = tensors_in(module(batch))
        for again in loaded, other: assert all(map(torch.equal, tensors_in(again(batch)), expected))

@each_own
def test_a_subnet_has_the_weights_of_its_path(make, path, x, outputs):
    net, module = own_subnet(make, path)
    on_path = {id(t) for l,o in enumerate(path) for t in net.blocks[l][o].parameters()}
    off_path = {id(t) for p in net.blocks.parameters() for t in [p]} - on_path
    names = {name for name,t in net.named_parameters(remove_duplicate=False) if id(t) not in off_path}
    blocks = {f'blocks.{l}.{o}.' for l,o in enumerate(path)}
    def is_read(name): return not name.startswith('blocks.') or any(map(name.startswith, blocks))
    expected = {f'net.{name}': tuple(t.shape) for name,t in net.state_dict().items() if is_read(name)}
    assert {name: tuple(t.shape) for name,t in module.state_dict().items()} == expected
    assert sum(p.numel() for p in module.parameters()) == sum(
        p.numel() for p in net.parameters() if id(p) not in off_path)
    for l,o in enumerate(path): # in the classes that it was written in
        assert type(module.net.blocks[l][o]) is type(net.blocks[l][o])

@each_own
def test_a_subnet_of_supernets_stands_alone(make, path, x, outputs, tmp_path):
    torch.manual_seed(0)
    net = make()
    supernet = Supernet(net, 3)
    code = torch.tensor([.2, .5, .3])
    module = supernet.subnet(path, code).eval()
    mixed = {name: torch.tensordot(code, bank, 1) for name,bank in supernet.tensors().items()}
    net.load_state_dict(net.state_dict() | mixed)
    net.eval()
    for batch in batches_like(x): check_same_values(module(batch), net(batch, path))
    for name,t in module.state_dict().items(): # no part of a bank
        assert t.untyped_storage().nbytes() == t.numel()*t.element_size(), name
    to_torch_export(module, x, tmp_path/'module.pt2')
    program = torch.export.load(tmp_path/'module.pt2').module()
    for batch in batches_like(x): check_same_values(program(batch), module(batch))

@each_own
def test_a_subnet_is_exported(make, path, x, outputs, tmp_path):
    module = own_subnet(make, path)[1]
    for p in module.parameters(): p.data.mul_(1.5)
    train_on(module, module.parameters(), batches_like(x)[-1], n=1) # statistics of its own
    check_torch_export(module, x, tmp_path/'module.pt2')

@each_own
def test_a_subnet_is_written_as_onnx(make, path, x, outputs, tmp_path, capfd):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    module = own_subnet(make, path)[1]
    to_onnx(module, x, tmp_path/'module.onnx')
    assert not capfd.readouterr().out
    module.eval()
    session = onnxruntime.InferenceSession(tmp_path/'module.onnx', providers=['CPUExecutionProvider'])
    assert [o.name for o in session.get_outputs()] == outputs.split()
    for batch in batches_like(x):
        arrays = {i.name: t.numpy() for i,t in zip(session.get_inputs(), tensors_in(batch), strict=True)}
        check_same_values([*map(torch.tensor, session.run(None, arrays))], module(batch))

# what fails

def branch(self, x): return x if x.sum() > 0 else -x
def fix_batch(self, x): return x.view(2, -1)
def fail(self, x): raise KeyError('no such block\nand more')

BOTH = { # a module that no graph can hold, its input, what the error says
    'data': (lambda: Reads(branch), (5,), 'Could not guard on data-dependent expression'),
    'batch': (lambda: Reads(fix_batch), (5,), r'specialized it to be a constant \(2\)'),
    'error': (lambda: Reads(fail), (5,), "KeyError: 'no such block"),
    'tokens': (lambda: nn.Embedding(9, 4), (5,), 'to have one of the following scalar types: Long, Int'),
    'size': (lambda: nn.Linear(5, 4), (6,), 'failed for x = '),
    'one of two': (lambda: Reads(read_pair, a=nn.Linear(5, 4), b=nn.Conv2d(3, 4, 3)), (5,),
                   'failed for x = ')}
ONNX_ONLY = {
    'inverse': (lambda: Reads(lambda self, x: torch.linalg.qr(x)[0]), (4, 4), 'ONNX failed for x = .*qr')}

def check_refusal(write, module, x, message, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as e: write(module, x, tmp_path/'module')
    assert len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 500
    assert not capfd.readouterr().out and not [*tmp_path.iterdir()]

@pytest.mark.parametrize('make, x, message', BOTH.values(), ids=BOTH)
def test_what_torch_cannot_export_is_one_line(make, x, message, tmp_path, capfd, monkeypatch):
    check_refusal(to_torch_export, make(), x, message, tmp_path, capfd, monkeypatch)

@pytest.mark.parametrize('make, x, message', (BOTH | ONNX_ONLY).values(), ids=BOTH | ONNX_ONLY)
def test_what_onnx_cannot_hold_is_one_line(make, x, message, tmp_path, capfd, monkeypatch):
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    check_refusal(to_onnx, make(), x, message, tmp_path, capfd, monkeypatch)

@pytest.mark.parametrize('write', [to_torch_export, to_onnx, latency_ms])
def test_no_example_is_one_line(write, tmp_path):
    args = [] if write is latency_ms else [tmp_path/'module']
    for x in 'image', (3, 'a'), None, {}, (2.5, 3):
        with pytest.raises(ValueError, match='expected a shape or a batch'): write(nn.ReLU(), x, *args)
    assert not [*tmp_path.iterdir()]

def test_export_is_imported_without_onnx():
    hide = 'sys.modules.update(onnx=None, onnxscript=None, onnxruntime=None)'
    subprocess.run([sys.executable, '-c', f'import sys; {hide}; import kshot.export'], check=True)
