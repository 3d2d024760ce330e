"A user's own benchmark, `module:name`, in every command; and what must never be imported"
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import processes
from helpers.processes import command
from sklearn.metrics import r2_score

from kshot.benchmark import get_benchmark
from kshot.tables import get_table

MODULE = '''
import torch
from torch import nn
from kshot.base.distributed import World
from kshot.benchmark import Benchmark, Training
from kshot.data import TensorLoader, loaders
from kshot.space import Block, Space
from stripes_ops import make_ops

space = Space('stripes', tuple(Block(f'block {l}', ('conv1', 'conv3')) for l in range(2)))

class Net(nn.Module):
    def __init__(self, channels=4, n_classes=2):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 1)
        self.blocks = nn.ModuleList(nn.ModuleList(make_ops(channels)) for _ in range(2))
        self.head = nn.Linear(channels, n_classes)

    def forward(self, x, path):
        x = self.stem(x)
        for ops,o in zip(self.blocks, path): x = ops[o](x)
        return self.head(x.mean((2, 3)))

def images(bs=32, seed=0, passes=1, shard=World()):
    "Noisy stripes, horizontal or vertical."
    splits = []
    for n in (64, 32, 32):
        generator = torch.Generator().manual_seed(n)
        y = torch.arange(n) % 2
        x = torch.randn(n, 1, 6, 6, generator=generator)
        x[y == 0, :, ::2] += 1
        x[y == 1, :, :, ::2] += 1
        splits.append((x, y))
    train = TensorLoader(*splits[0], bs, shuffle=True, seed=seed, passes=passes, shard=shard)
    return loaders(2, train, *(TensorLoader(*split, bs=32, shard=shard) for split in splits[1:]))

recipe = Training(epochs=2, bs=32, lr=.1)
my_benchmark = Benchmark('stripes', space, Net, (1,6,6), recipe, data=images)
without_recipe = Benchmark('bare', space, Net, (1,6,6), data=images)
without_data = Benchmark('empty', space, Net, (1,6,6), recipe)
'''
OPS = '''
from torch import nn

def conv(channels, kernel):
    convolution = nn.Conv2d(channels, channels, kernel, padding=kernel//2)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())

def make_ops(channels): return [conv(channels, 1), conv(channels, 3)]
'''
SPACE = 'stripes_module:my_benchmark'

def write_modules(folder):
    "Write a benchmark and a module that it imports; return the folder."
    (folder/'stripes_module.py').write_text(MODULE)
    (folder/'stripes_ops.py').write_text(OPS)
    return folder

def call(name, folder, *args):
    "Call a command from a folder, in a process that has imported kshot only."
    env = dict(KSHOT_HOME=str(folder/'home'))
    return processes.call(command(name), *args, env=env, before=[(os.chdir, folder)])

def result(name, folder, *args, **kwargs) -> dict:
    "Return the JSON of a command that must succeed."
    code, out, err = call(name, folder, *args, '--json', **kwargs)
    assert code == 0, err
    return json.loads(out.splitlines()[-1])

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder with the module, a trained run and a table."
    folder = write_modules(tmp_path_factory.mktemp('own'))
    result('train', folder, '--space', SPACE, '--K', '2', '--name', 'run')
    quick = '--epochs', '1', '--seeds', '1', '--workers', '1'
    made = result('tables', folder, 'make', SPACE, *quick, '--runs', 'home')
    assert (made['space'], made['name']) == (SPACE, 'stripes')
    return folder

def record(folder, name='run'): return json.loads((folder/'runs'/name/'run.json').read_text())

def test_a_run_keeps_the_spelling_and_the_recipe(folder):
    config = record(folder)['config']
    expected = dict(space=SPACE, data='own', epochs=2, bs=32, lr=.1)
    assert config.items() >= expected.items()

def test_a_run_resumes_in_a_new_process(folder):
    result('train', folder, '--space', SPACE, '--name', 'resumed', '--K', '1')
    fname = folder/'runs'/'resumed'/'run.json'
    halfway = json.loads(fname.read_text())
    del halfway['results']['train'] # as if it had been killed in its second epoch
    fname.write_text(json.dumps(halfway))
    for checkpoint in fname.parent.glob('checkpoint/epoch_00002*'): checkpoint.unlink()
    assert result('train', folder, '--name', 'resumed', '--resume')['epoch'] == 2

def test_ranks_against_the_table_in_the_users_home(folder):
    assert {'supernet', 'macs'} <= result('rank', folder, '--name', 'run').keys()
    assert record(folder)['results']['truth']['table'] == SPACE
    assert 'report.html' in os.listdir(folder/'runs'/'run')
    shown = result('tables', folder, 'show', SPACE)
    assert shown['splits'][0]['paths'] == 4 and shown['devices'] == []
    assert 'macs' in result('tables', folder, 'baselines', SPACE)['baselines']

def test_search_retrain_export(folder):
    best = result('search', folder, '--name', 'run', '--n_paths', '4', '--algorithm', 'exhaustive')
    retrained = result('retrain', folder, '--name', 'run', '--epochs', '1')
    assert retrained['path'] == best['path']
    files = result('export', folder, '--name', 'run')['files']
    assert all((folder/f).exists() for f in files)
    assert json.loads((folder/'runs'/'run'/'subnet.json').read_text())['space'] == SPACE

def test_a_study_of_it(folder):
    (folder/'study.toml').write_text(f'K = [1]\nseeds = 1\n["{SPACE}"]\nepochs = 1\nvary = {{}}\n')
    argv = 'study.toml', '--name', 'study', '--workers', '1'
    result('study', folder, *argv)
    row, = (folder/'runs'/'study').glob('stripes_module*')
    measured = json.loads((row/'run.json').read_text())['results']['row']
    assert measured.keys() >= {'tau', 'tau_macs'} # there is a table

def test_no_recipe_and_no_data(folder):
    argv = '--space', 'stripes_module:without_recipe', '--name', 'bare'
    code, _, err = call('train', folder, *argv)
    assert code == 2 and 'has no recipe, expected values for epochs, bs, lr' in err
    recipe = '--epochs', '1', '--bs', '32', '--lr', '.1'
    assert result('train', folder, *argv, *recipe)['epoch'] == 1
    argv = '--space', 'stripes_module:without_data', '--name', 'empty'
    code, _, err = call('train', folder, *argv)
    assert code == 2 and 'expected a data set' in err and err.count('\n') == 1
    assert not (folder/'runs'/'empty').exists()

OTHER_KINDS = '''
import torch
from fastai.metrics import R2Score
from torch import nn
from torch.nn import functional as F
from kshot.base.distributed import World
from kshot.benchmark import Benchmark, Training
from kshot.data import TensorLoader, loaders
from kshot.space import Block, Space

def space_of(name): return Space(name, tuple(Block(f'block {l}', ('plain', 'normed')) for l in range(2)))

class Rows(nn.Module):
    "Rows of four numbers -> one number."
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        def ops(): return [nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())]
        self.blocks = nn.ModuleList(nn.ModuleList(ops()) for _ in range(2))
        self.head = nn.Linear(8, 1)

    def embed(self, x): return self.stem(x)

    def forward(self, x, path):
        x = self.embed(x)
        for ops,o in zip(self.blocks, path): x = x + ops[o](x)
        return self.head(x)

class Texts(Rows):
    "Tokens, some of them masked -> two classes."
    def __init__(self, n_classes=2):
        super().__init__()
        self.stem = nn.Embedding(20, 8)
        self.head = nn.Linear(8, n_classes)

    def embed(self, x):
        mask = x['mask'][...,None]
        return (self.stem(x['ids'])*mask).sum(1)/mask.sum(1)

def draw(n):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 4, generator=generator)
    ids = torch.randint(1, 20, (n, 5), generator=generator)
    texts = dict(ids=ids, mask=(torch.rand(n, 5, generator=generator) < .8).float() + 1e-3)
    return x/4, x[:,:1] - x[:,1:2]/4, texts, (ids[:,0] < 10).long()

def data_of(part, n_classes):
    def data(bs=32, seed=0, passes=1, shard=World()):
        (x, y), valid, test = [draw(n)[part] for n in (96, 32, 33)]
        train = TensorLoader(x, y, bs, shuffle=True, seed=seed, passes=passes, shard=shard)
        rest = [TensorLoader(*split, bs=16, shard=shard) for split in (valid, test)]
        return loaders(n_classes, train, *rest)
    return data

recipe = Training(epochs=3, bs=16, lr=.02)
rows = Benchmark('rows', space_of('rows'), Rows, (4,), recipe, data=data_of(slice(0, 2), 1),
                 loss_func=F.mse_loss, metric=R2Score())
texts = Benchmark('texts', space_of('texts'), Texts, draw(2)[2], recipe, data=data_of(slice(2, 4), 2))
'''

@pytest.mark.parametrize('name, measure', [('rows', 'metric'), ('texts', 'acc')])
def test_other_kinds_of_networks_go_all_the_way(name, measure, tmp_path, monkeypatch):
    "Regression by R², and classes of masked tokens: train, table, rank, search, retrain, export."
    (tmp_path/f'kinds_{name}.py').write_text(OTHER_KINDS)
    space = f'kinds_{name}:{name}'
    trained = result('train', tmp_path, '--space', space, '--K', '2')
    assert ('r2_score_valid' if name == 'rows' else 'acc_valid') in trained
    quick = '--epochs', '1', '--seeds', '1', '--workers', '1'
    result('tables', tmp_path, 'make', space, *quick, '--runs', 'home')
    table = get_table(str(tmp_path/'home'/'tables'/f'{name}.parquet'))
    assert ('holds the metric' in table.source) == (measure == 'metric')
    assert {'supernet', 'supernet_loss', 'macs'} <= result('rank', tmp_path).keys()
    scores = pd.read_parquet(tmp_path/'runs'/'run'/'scores.parquet')
    assert len(scores) == 4 and scores[f'{measure}_super'].max() <= 1
    best = result('search', tmp_path, '--n_paths', '4', '--algorithm', 'exhaustive')
    assert best['path'] == scores.path[scores.loss_super.idxmin()]
    retrained = result('retrain', tmp_path, '--epochs', '1')
    names = {f'{measure}_{part}' for part in ('super', 'valid', 'alone')}
    assert {key for key in best | retrained if key.startswith(('acc_', 'metric_'))} == names
    result('export', tmp_path)
    exported = torch.export.load(tmp_path/'runs'/'run'/'subnet.pt2').module()
    monkeypatch.chdir(tmp_path)
    *_, test = get_benchmark(space).data()
    x, y = test.x, test.y
    with torch.no_grad(): out = exported(x)
    right = r2_score(y, out) if name == 'rows' else (out.argmax(1) == y).float().mean()
    assert abs(right - retrained[f'{measure}_alone']) < 1e-5
    report = (tmp_path/'runs'/'run'/'report.html').read_text()
    drawn = report.partition('<main>')[2].partition('</main>')[0] # without plotly itself
    assert ('ccuracy' in drawn) == (measure == 'acc')

BAD = {
    'missing:benchmark': "module 'missing' is neither installed nor in the folder",
    'broken:benchmark': "module 'broken' cannot be imported: ZeroDivisionError: division by zero",
    'quits:benchmark': "module 'quits' cannot be imported: SystemExit: 3",
    'stripes_module:other': "no 'other' in 'stripes_module'",
    'json:__name__': 'expected a Benchmark, or a function that returns a network, not str',
    '../outside:benchmark': 'expected module:name',
    '/tmp/outside:benchmark': 'expected module:name',
    'linked:my_benchmark': "module 'linked' leads out of the folder",
    'stripes_module:': 'expected module:name',
    'stripes_module': "'stripes_module', expected one of digits"}

INTRUDER = 'open("imported by accident", "w")'

@pytest.mark.parametrize('spelling', BAD)
def test_a_bad_spelling_is_one_line_and_writes_nothing(spelling, tmp_path):
    outside = tmp_path/'outside'
    inside = tmp_path/'inside'
    for folder in (outside, inside):
        folder.mkdir()
        write_modules(folder)
    (inside/'broken.py').write_text('1/0')
    (inside/'quits.py').write_text('raise SystemExit(3)')
    (inside/'json.py').write_text(INTRUDER)
    (inside/'linked.py').symlink_to(outside/'stripes_module.py')
    for name,*args in (('train',), ('rank',), ('tables', 'make')):
        code, _, err = call(name, inside, *args, *([spelling] if args else ['--space', spelling]))
        assert (code, err.count('\n')) == (2, 1) and BAD[spelling] in err, err
    assert not {'runs', 'home', 'imported by accident'} & {*os.listdir(inside)}

def test_the_folder_is_searched_only_for_a_spelling(tmp_path):
    "In earnest: nothing else is imported from there, before or after."
    write_modules(tmp_path)
    for name in ('json', 'torch', 'kshot', 'platform'): (tmp_path/f'{name}.py').write_text(INTRUDER)
    argv = ['--space', SPACE, '--K', '1', '--epochs', '1', '--name', 'run']
    code = f'from kshot.cli.launch import train; train({argv})'
    python = [sys.executable, '-P', '-c', code]
    done = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'runs'/'run'/'report.html').exists()
    assert not (tmp_path/'imported by accident').exists()
