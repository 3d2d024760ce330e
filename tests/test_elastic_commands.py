"A network by name in a file, `kshot train --model net.py:make`, through every command"
import json
import os
from contextlib import chdir

import numpy as np
import pytest
import torch
from helpers import processes
from helpers.processes import command
from PIL import Image

from kshot.cost import count_macs
from kshot.elastic import elastic_ends
from kshot.export import load_subnet
from kshot.models import make_model, model_space
from kshot.runs import load_run

NET = '''
from torch import nn

class Layer(nn.Module):
    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(c_out)
    def forward(self, x): return self.norm(self.conv(x)).relu()

class Residual(Layer):
    def forward(self, x): return x + super().forward(x)

def make(n_classes=10):
    body = nn.Sequential(Layer(3, 16, 2), Layer(16, 32, 2), Residual(32, 32))
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, n_classes))

def of_seven(): return make(7)

def linear(n_classes=10): return nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, n_classes))
'''
PX = 16

def make_folder(folder, n_train=40, n_val=8):
    "Write images of three colors; return the folder."
    rng = np.random.default_rng(0)
    for split,n in dict(train=n_train, val=n_val).items():
        for i,color in enumerate(('red', 'green', 'blue')):
            (folder/split/color).mkdir(parents=True)
            for k in range(n):
                pixels = rng.integers(0, 80, (PX+4, PX+8, 3), dtype=np.uint8)
                pixels[..., i] += 120
                Image.fromarray(pixels).save(folder/split/color/f'{k}.png')
    return folder

def call(name, folder, *args):
    env = dict(KSHOT_HOME=str(folder/'home'))
    return processes.call(command(name), *args, env=env, before=[(os.chdir, folder)])

def result(name, folder, *args) -> dict:
    "Return the JSON of a command that must succeed."
    code, out, err = call(name, folder, *args, '--json')
    assert code == 0, err
    return json.loads(out.splitlines()[-1])

DATA = '--folder', 'images', '--px', str(PX), '--bs', '32', '--n_workers', '0'
MODEL = '--model', 'net.py:make', *DATA, '--K', '2', '--widths', '.5,1', '--epochs', '2'

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder with a network, images and a trained run."
    folder = tmp_path_factory.mktemp('model')
    (folder/'net.py').write_text(NET)
    make_folder(folder/'images')
    result('train', folder, 'run', *MODEL)
    return folder

def record(folder, name='run'): return json.loads((folder/'runs'/name/'run.json').read_text())

def space_of(folder): return model_space(f'{folder/"net.py"}:make', (.5, 1.), px=PX)

def count(path, space) -> tuple[int, int]: # MACs and parameters, by hand
    chosen = {block.name: block.choices[o] for block,o in zip(space.blocks, path, strict=True)}
    c1 = int(chosen['0.0.conv width'])
    c2 = int(chosen['0.1.conv width'])
    convs = [(3*c1, PX//2), (c1*c2, PX//4), (c2*c2, PX//4)]
    norms = [c1, c2, c2]
    if chosen['0.2 depth'] == 'skip':
        del convs[2], norms[2]
    macs = sum(9*weights*px**2 for weights,px in convs) + 3*c2
    return macs, sum(9*weights for weights,_ in convs) + 2*sum(norms) + 3*c2 + 3

def test_a_run_holds_what_makes_it_again(folder):
    config = record(folder)['config']
    expected = dict(space='net.py:make', widths='.5,1', depth=True, sampler='sandwich', distill=True, px=PX)
    assert config.items() >= expected.items()
    assert record(folder)['results']['train']['epoch'] == 2

def test_a_second_process_resumes(folder):
    result('train', folder, 'resumed', *MODEL)
    fname = folder/'runs'/'resumed'/'run.json'
    halfway = json.loads(fname.read_text())
    whole = halfway['results'].pop('train') # as if it had been killed in its second epoch
    fname.write_text(json.dumps(halfway))
    for checkpoint in fname.parent.glob('checkpoint/epoch_00002*'): checkpoint.unlink()
    assert result('train', folder, 'resumed', '--resume')['loss'] == whole['loss']

def test_search_retrain_and_export(folder):
    space = space_of(folder)
    smallest, largest = elastic_ends(space).values()
    most = count(largest, space)[0]//2
    found = result('search', folder, 'run', '--n_paths', '4', '--max_macs', str(most))
    path = space.parse(found['path'])
    assert (found['macs'], found['n_params']) == count(path, space)
    assert count(smallest, space)[0] <= found['macs'] <= most
    alone = result('retrain', folder, 'run', '--epochs', '1')
    assert (alone['path'], alone['macs'], alone['n_params']) == (found['path'], *count(path, space))
    files = result('export', folder, 'run')['files']
    exported = torch.export.load(folder/[name for name in files if name.endswith('.pt2')][0])
    assert sum(p.numel() for p in exported.parameters()) == found['n_params']
    with chdir(folder):
        subnet, about = load_subnet(folder/'runs'/'run')
    x = torch.rand(2, 3, PX, PX)
    assert count_macs(subnet, (3, PX, PX)) == about['macs'] == found['macs']
    torch.testing.assert_close(exported.module()(x), subnet(x))

def test_latency(folder):
    size = '--px', str(PX), '--n_classes', '3', '--threads', '1'
    paths = '--n_paths', '8', '--rounds', '2', '--widths', '.5,1'
    timed = result('tables', folder, 'latency', 'net.py:make', *size, *paths)
    fname = str(folder/timed['file'])
    result('train', folder, 'timed', *MODEL)
    limit = '--max_latency_ms', str(1000*timed['reference_ms']), '--device', fname
    assert result('search', folder, 'timed', '--n_paths', '2', *limit)['latency_ms'] > 0

def test_there_is_no_table_to_rank_against(folder):
    code, _, err = call('rank', folder, 'run')
    assert code == 2 and 'expected --table FILE, or --gaps' in err
    assert 'words' in result('rank', folder, 'run', '--gaps')

def weights_of(folder, n_classes):
    "Write weights of the network for some classes; return the file."
    torch.manual_seed(0)
    fname = folder/f'of_{n_classes}.pt'
    torch.save(make_model(f'{folder/"net.py"}:make', n_classes).state_dict(), fname)
    return fname

@pytest.mark.parametrize('n_classes', [3, 7])
def test_pretrained_weights(folder, n_classes):
    fname = weights_of(folder, n_classes)
    args = *MODEL, '--weights', str(fname), '--K', '1', '--lr', '1e-9', '--lr_end', '0', '--epochs', '1'
    name = f'pretrained_{n_classes}'
    code, _, err = call('train', folder, name, *args)
    assert code == 0, err
    assert ('without 3.weight, 3.bias, which are for 7 classes' in err) == (n_classes == 7)
    wanted = torch.load(fname)['0.1.conv.weight']
    fname.unlink() # the run has its own now
    with chdir(folder):
        _, learn = load_run(folder/'runs'/name)
    trained, = [t for name,t in learn.model.tensors().items() if name.endswith('0.1.conv.weight')]
    values = trained.flatten().sort().values # the best channels come first
    torch.testing.assert_close(values, wanted.flatten().sort().values, atol=1e-5, rtol=0)

WRONG = {
    'net.py:mak': "space 'net.py:mak': no 'mak' in 'net.py'; did you mean make?",
    'none.py:make': "none.py' is not there, expected Python",
    'torchvision:resnet19': "model 'torchvision:resnet19': torchvision has none of this name; did you mean",
    'resnet18': "model 'resnet18', expected torchvision:resnet18, timm:resnet18, module:function",
    'net.py:of_seven': 'has 7 classes, expected 3 as the data',
    'json:dumps': "model 'json:dumps' cannot be made: TypeError",
    'net.py:linear': 'nothing of Sequential can vary',
    'net.py:make --space digits': "model 'net.py:make' with space 'digits', expected one of them",
    'net.py:make --widths .5,2': 'expected shares above 0, the largest 1',
    'net.py:make --widths .5,x': "widths '.5,x', expected numbers like",
    'net.py:make --width_per path': "width_per 'path' for model 'net.py:make', expected layer",
    'net.py:make --weights none.pt': "weights 'none.pt' cannot be read",
    'torchvision:inception_v3': 'cannot take images of 16 x 16 pixels'}

@pytest.mark.parametrize('argv', WRONG)
def test_bad_input_gets_one_line(folder, argv):
    code, _, err = call('train', folder, 'wrong', *DATA, '--model', *argv.split())
    assert code == 2 and WRONG[argv] in err and err.count('\n') == 1, err
    assert not (folder/'runs'/'wrong').exists()

@pytest.mark.slow
def test_a_network_of_torchvision(tmp_path):
    make_folder(tmp_path/'images')
    model = '--model', 'torchvision:mobilenet_v3_small', '--folder', 'images', '--px', '32'
    result('train', tmp_path, 'net', *model, '--bs', '32', '--n_workers', '0', '--epochs', '1')
    most = count_macs(make_model('torchvision:mobilenet_v3_small', 3), (3, 32, 32))//2
    found = result('search', tmp_path, 'net', '--n_paths', '3', '--max_macs', str(most))
    assert found['macs'] <= most
    alone = result('retrain', tmp_path, 'net', '--epochs', '1')
    files = result('export', tmp_path, 'net')['files']
    exported = torch.export.load(tmp_path/[name for name in files if name.endswith('.pt2')][0])
    assert sum(p.numel() for p in exported.parameters()) == alone['n_params'] == found['n_params']
    assert count_macs(exported.module(), (3, 32, 32)) == alone['macs'] == found['macs']
