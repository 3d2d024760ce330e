"A subnet retrained by several processes, killed and resumed; exported and run without kshot"
import json, math, os, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from safetensors.torch import load_file, save_file
from torch import distributed as dist, nn

from kshot.data import digits_data, digits_splits
from kshot.base.distributed import world
from kshot.evaluate import accuracy_loss
from kshot.export import load_subnet, save_subnet, to_onnx, to_torch_export
from kshot.benchmark import BENCHMARKS, get_benchmark, get_net, get_space
from kshot.networks import subnet
from kshot.retrain import get_recipe, retrain
from kshot.supernet import Supernet
from processes import call_ranks

PATH, BATCHES = (2, 3, 1, 2), (1, 2, 7)
RUN = '''
import importlib.abc, sys
class NoKshot(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split('.')[0] in ('kshot', 'fastai'): raise ImportError(f'{name} is out of bounds')
sys.meta_path.insert(0, NoKshot())
import torch
from safetensors.torch import load_file, save_file
module, folder = torch.export.load(sys.argv[1]).module(), sys.argv[2]
save_file({k: module(x) for k,x in load_file(f'{folder}/in.safetensors').items()}, f'{folder}/out.safetensors')
assert not any(m.split('.')[0] == 'kshot' for m in sys.modules)
'''

def digits_subnet(path=PATH, seed=0):
    torch.manual_seed(seed)
    return subnet(get_net('digits', channels=4), path)

def about_of(path, **kwargs): return dict(space='digits', path=path, channels=4, n_cells=0, n_classes=10, widths=[], width_per='layer') | kwargs

class FrozenNorm(Callback):
    "Batch norm in evaluation mode"
    order = 20
    def before_train(self):
        for m in self.learn.model.modules():
            if isinstance(m, nn.BatchNorm2d): m.eval()

class Do(Callback):
    "Call something before one batch"
    order = 20
    def __init__(self, epoch, batch, f): self.at, self.f = (epoch, batch), f
    def before_batch(self):
        if (self.epoch, self.iter) == self.at: self.f(self)

def spoil(cb): cb.learn.xb = (cb.xb[0]*math.nan,)
def die(cb): os.kill(os.getpid(), signal.SIGKILL)

def train(folder=None, name='strong', cbs=(), dropout=0., epochs=2, **kwargs):
    "Weights, averaged weights and log after a retraining on all ranks"
    module = digits_subnet()
    recipe = get_recipe(name, epochs=epochs, bs=96)._replace(dropout=dropout)
    log, ema = retrain(module, digits_data(96, seed=1, shard=world()), recipe, folder, cbs=cbs, **kwargs)
    return {f'{part}/{k}': t for part,m in dict(weights=module, ema=ema).items() if m for k,t in m.state_dict().items()}, log

def put(fname, tensors, log): save_file(tensors, f'{fname}.safetensors'); Path(f'{fname}.json').write_text(json.dumps(log))
def get(fname): return load_file(f'{fname}.safetensors'), json.loads(Path(f'{fname}.json').read_text())

def all_cases(out):
    for name in 'strong', 'mild': put(out(name), *train(name=name, cbs=[FrozenNorm()]))
    put(out('stats'), *train(dropout=.2))
    try: train(cbs=[Do(1, 2, spoil)] if world().rank else [])
    except ValueError as e: put(out('error'), {}, str(e))

def begin(out): train(out('.').parent/'run', dropout=.2, epochs=3, cbs=[Do(2, 4, die)])
def undisturbed(out): put(out('whole'), *train(out('.').parent/'whole', dropout=.2, epochs=3))
def go_on(out): put(out('resumed'), *train(out('.').parent/'run', dropout=.2, epochs=3, resume=True))

def one_rank(work, folder):
    dist.init_process_group('gloo')
    work(lambda name: Path(folder)/f'{name}_{dist.get_rank()}')
    dist.destroy_process_group()

def on_two(folder, work): return call_ranks(2, f'import sys, test_export as t; t.one_rank(t.{work.__name__}, sys.argv[1])', folder)

def same_bits(a, b):
    assert a.keys() == b.keys()
    assert not [k for k in a if not torch.equal(a[k], b[k])]

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    code, out, err = on_two(folder, all_cases)
    assert code == 0, err
    return folder

@pytest.mark.parametrize('name', ['strong', 'mild'])
def test_two_ranks_are_one_process(folder, name):
    (w, log), (w0, log0), (w1, log1) = train(name=name, cbs=[FrozenNorm()]), get(folder/f'{name}_0'), get(folder/f'{name}_1')
    same_bits(w0, w1)
    assert log0 == log1 and len(log) == 2
    begin = {k: t for k,t in digits_subnet().state_dict().items() if t.is_floating_point()}
    assert any((w[f'weights/{k}']-t).norm() > 1e-3*t.norm() for k,t in begin.items()) # it has moved
    for k,t in w.items(): assert (w0[k]-t).double().norm() <= 1e-6*t.double().norm().clamp(min=1e-3), k
    for a,b in zip(log0, log): assert a == pytest.approx(b, rel=1e-5)

def test_statistics_are_averaged(folder):
    (w0, log0), (w1, log1) = get(folder/'stats_0'), get(folder/'stats_1')
    same_bits(w0, w1)
    assert log0 == log1

def test_all_ranks_stop_where_one_has_no_finite_loss(folder):
    errors = [get(folder/f'error_{r}')[1] for r in (0, 1)]
    text = 'training stopped in epoch 2, batch 3: loss nan, expected a finite number; there is no checkpoint yet'
    assert len(set(errors)) == 1 and errors[0].startswith(text), errors

def test_killed_and_resumed(tmp_path):
    assert on_two(tmp_path, begin)[0] == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path/'run/checkpoint').iterdir()) == ['epoch_00001.safetensors', 'epoch_00002.safetensors']
    for work in go_on, undisturbed: assert on_two(tmp_path, work)[0] == 0
    whole = get(tmp_path/'whole_0')
    for name in 'resumed_0', 'resumed_1', 'whole_1':
        w, log = get(tmp_path/name)
        same_bits(w, whole[0])
        assert log == whole[1]

@pytest.fixture(scope='module')
def trained():
    "A subnet that knows digits, and what it says of the test images"
    module = digits_subnet()
    retrain(module, digits_data(passes=5, seed=1), get_recipe('quick', epochs=4))
    x, y = digits_splits()['test']
    with torch.no_grad(): out = module(x)
    assert (out.argmax(1) == y).float().mean() > .4
    return module, x, y, out

def test_reloading_gives_the_same_accuracy(trained, tmp_path):
    module, x, y, out = trained
    save_subnet(tmp_path, module, about_of(PATH))
    again, _ = load_subnet(tmp_path)
    assert torch.equal(again(x), out) and accuracy_loss(again, digits_data().loaders[2]) == accuracy_loss(module, digits_data().loaders[2])

@pytest.mark.parametrize('name', BENCHMARKS)
def test_subnets_of_every_space(name, tmp_path):
    "From a network and from K supernets, bit by bit"
    n_cells = dict(nb201=1, nb101=1, darts=3, nds=3).get(name, 0)
    net, path = get_net(name, 8, n_cells), get_space(name).sample(np.random.default_rng(0), 1)[0]
    about = about_of(path, space=name, channels=8, n_cells=n_cells)
    C, H, W = get_benchmark(name).x_shape
    x = torch.rand(2, C, min(H, 64), min(W, 64))
    for i,module in enumerate((subnet(net, path), Supernet(net, 2).subnet(path, torch.tensor([.3, .7])))):
        save_subnet(tmp_path/str(i), module.eval(), about)
        again, _ = load_subnet(tmp_path/str(i))
        assert torch.equal(again(x), module(x))
        assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
        assert all(p.requires_grad for p in again.parameters())

@pytest.mark.parametrize('width_per', ['layer', 'path'])
def test_subnet_with_widths(width_per, tmp_path):
    asked = dict(widths=(.2, .6, 1.), width_per=width_per)
    path = get_space('mobilenet_se', **asked).sample(np.random.default_rng(0), 1)[0]
    module = subnet(get_net('mobilenet_se', 8, **asked), path).eval()
    save_subnet(tmp_path, module, about_of(path, space='mobilenet_se', channels=8, **asked))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_subnet(tmp_path)[0](x), module(x))
    other = (*path[:-1], (path[-1]+1)%3)
    with pytest.raises(ValueError, match='for tensor|width'): save_subnet(tmp_path, module, about_of(other, space='mobilenet_se', channels=8, **asked))

def test_torch_export_runs_without_kshot(trained, tmp_path):
    module, x, y, out = trained
    to_torch_export(module.train(), x.shape[1:], tmp_path/'subnet.pt2') # dropout and batch norm are as in evaluation
    assert module.training and [p.name for p in tmp_path.iterdir()] == ['subnet.pt2']
    module.eval()
    save_file({'all': x.contiguous()} | {str(n): x[:n].clone() for n in BATCHES}, tmp_path/'in.safetensors')
    subprocess.run([sys.executable, '-c', RUN, tmp_path/'subnet.pt2', tmp_path], check=True)
    theirs = load_file(tmp_path/'out.safetensors')
    for n in BATCHES: assert (theirs[str(n)]-out[:n]).abs().max() <= 1e-6*out.abs().max()
    assert ((theirs['all'].argmax(1) == y).sum() == (out.argmax(1) == y).sum()).item()

def test_onnx(trained, tmp_path):
    ort = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    module, x, y, out = trained
    to_onnx(module, x.shape[1:], tmp_path/'subnet.onnx')
    assert [p.name for p in tmp_path.iterdir()] == ['subnet.onnx']
    session = ort.InferenceSession(tmp_path/'subnet.onnx', providers=['CPUExecutionProvider'])
    run = lambda x: torch.tensor(session.run(['logits'], {'x': x.numpy()})[0])
    for n in BATCHES: assert (run(x[:n])-out[:n]).abs().max() <= 1e-4*out.abs().max()
    assert (run(x).argmax(1) == y).sum() == (out.argmax(1) == y).sum()

def test_export_is_imported_without_onnx():
    code = "import sys; sys.modules.update(onnx=None, onnxscript=None, onnxruntime=None); import kshot.export"
    subprocess.run([sys.executable, '-c', code], check=True)
