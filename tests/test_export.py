"A subnet retrained by several processes, killed and resumed; exported and run without kshot"
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from safetensors.torch import load_file, save_file
from torch import distributed as dist, nn

from kshot.base.distributed import world
from kshot.benchmark import BENCHMARKS, get_net, get_space
from kshot.data import digits_data, digits_splits
from kshot.evaluate import accuracy_loss
from kshot.export import load_subnet, save_subnet, to_onnx, to_torch_export
from kshot.networks import subnet
from kshot.retrain import get_recipe, retrain
from kshot.supernet import Supernet
from processes import call_ranks

PATH = 2, 3, 1, 2
BATCH_SIZES = 1, 2, 7
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
    sizes = dict(channels=4, n_cells=0, n_classes=10, widths=[], width_per='layer')
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
    save_file(tensors, f'{fname}.safetensors')
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
        assert (tensors0[name]-t).double().norm() <= 1e-6*t.double().norm().clamp(min=1e-3), name
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
    net, rng = get_net(name, 8, n_cells), np.random.default_rng(0)
    path, = benchmark.space.sample(rng, 1)
    C, H, W = benchmark.x_shape
    x = torch.rand(2, C, min(H, 64), min(W, 64))
    of_supernet = Supernet(net, 2).subnet(path, torch.tensor([.3, .7]))
    for folder,module in (('net', subnet(net, path)), ('supernet', of_supernet)):
        about = describe(path, space=name, channels=8, n_cells=n_cells)
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

def test_export_is_imported_without_onnx():
    hide = 'sys.modules.update(onnx=None, onnxscript=None, onnxruntime=None)'
    subprocess.run([sys.executable, '-c', f'import sys; {hide}; import kshot.export'], check=True)
