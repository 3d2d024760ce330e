"The whole way on a small image folder: train, search, retrain, export, reload; and bad input."
import json
import os
import shutil
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from processes import call, free_port
from safetensors.torch import load_file
from test_distributed import launch
from test_launch import content
from torch import nn

from kshot.benchmark import get_net, get_space
from kshot.checkpoint import load_newest
from kshot.cli.launch import search, train
from kshot.cost import Cost
from kshot.datasets.folder import FileLoader, folder_splits
from kshot.evaluate import accuracy_loss
from kshot.export import load_subnet
from kshot.simplex import SimplexNet, width_settings

WIDTHS = .25, .5, 1.
CHANNELS = 8
PX = 32
BUDGET = 600_000 # MACs: two paths of five fit
SMALL = ['--space', 'mobilenet_se', '--widths', ' '.join(map(str, WIDTHS)), '--channels', CHANNELS,
         '--px', PX, '--n_valid', 40, '--bs', 64, '--n_workers', 1]
BROKEN = 'train/stripes_0/07.jpg', 'train/stripes_45/11.jpg', 'train/stripes_135/30.jpg'

def stripes(angle, color, rng) -> Image.Image: # 40x40 pixels
    "Return a noisy picture of stripes at an angle, with more of one color."
    y, x = np.mgrid[:40, :40]
    across = x*np.cos(np.radians(angle)) + y*np.sin(np.radians(angle))
    waves = 90 + 60*np.sin(.9*across + rng.uniform(0, 2*np.pi))
    pixels = waves[..., None] + 80*np.eye(3)[color] + rng.normal(0, 15, (40, 40, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "A folder of four classes, stripes at four angles; three files of `train/` are cut off."
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split,n in dict(train=58, val=10).items():
        for k,angle in enumerate((0, 45, 90, 135)):
            own = folder/split/f'stripes_{angle}'
            own.mkdir(parents=True)
            for i in range(n): stripes(angle, k%3, rng).save(own/f'{i:02}.jpg')
    for name in BROKEN:
        fname = folder/name
        fname.write_bytes(fname.read_bytes()[:300])
    return folder

@pytest.fixture(scope='module')
def runs(images, tmp_path_factory):
    "A folder of runs with one, `net`, that two processes have trained."
    runs = tmp_path_factory.mktemp('runs')
    settings = ['--K', 4, '--mode', 'alternate', '--epochs', 3, '--lr', .05, *SMALL]
    code, out, err = launch(2, 'train', '--runs', runs, '--name', 'net', '--folder', images, *settings)
    assert code == 0, err
    assert out.count('net: 3 epochs, ') == 1
    return runs

def read(run, name='run'): return json.loads((run/f'{name}.json').read_text())

def read_lines(fname): return [json.loads(line) for line in fname.read_text().splitlines()]

def count_macs(module, x) -> int:
    "Count the multiply-accumulates of convolutions and linear layers from their outputs' shapes."
    counts = []
    def count(layer, _, y): counts.append(y.numel()*layer.weight[0].numel())
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    module(x)
    for hook in hooks: hook.remove()
    return sum(counts)

def test_training(runs):
    run = runs/'net'
    record = read(run)
    log = read_lines(run/'log.jsonl')
    assert record['machine']['processes'] == 2
    config = [record['config'][name] for name in ('K', 'widths', 'mode', 'bs')]
    assert config == [4, '0.25 0.5 1.0', 'alternate', 64]
    assert [row['epoch'] for row in log] == [1, 2, 3]
    assert log[0]['code_entropy'] != log[2]['code_entropy'] # the simplex-net learns

def test_codes_tell_widths_apart(runs):
    space = get_space('mobilenet_se', WIDTHS)
    tensors, _ = load_newest(runs/'net')
    codes = SimplexNet(space, 4)
    own = {k.removeprefix('codes/'): t for k,t in tensors.items() if k.startswith('codes/')}
    codes.load_state_dict(own)
    path, = space.sample(np.random.default_rng(0), 1)
    settings = codes(width_settings(space, path))
    assert settings.shape == (3, 4) and len(settings.unique(dim=0)) == 3

@pytest.fixture(scope='module')
def found(runs):
    "What two processes have found in one search."
    args = ['--n_paths', 12, '--max_macs', BUDGET, '--n_calibration', 2, '--json']
    code, out, err = launch(2, 'search', '--runs', runs, '--name', 'net', *args)
    assert code == 0, err
    return json.loads(out.splitlines()[-1])

def test_search_under_a_budget(runs, found):
    space = get_space('mobilenet_se', WIDTHS)
    scored = pd.read_parquet(runs/'net/search.parquet')
    paths = [space.parse(path) for path in scored.path]
    assert 12 <= len(paths) == found['n'] <= 13 # both processes may score the last path at once
    assert len(set(paths)) == len(paths)
    cost = Cost(get_net('mobilenet_se', CHANNELS, n_classes=4, widths=WIDTHS), (3, PX, PX))
    assert cost(paths).tolist() == scored[['macs', 'n_params']].values.tolist()
    assert scored.macs.max() <= BUDGET
    assert found['path'] == scored.path[0]
    assert found['loss_super'] == pytest.approx(-scored.score.max(), rel=1e-4)

@pytest.fixture(scope='module')
def subnet(runs, found):
    "The found path, retrained by two processes: module, what its file says."
    args = ['--recipe', 'strong', '--epochs', 4, '--bs', 32]
    code, out, err = launch(2, 'retrain', '--runs', runs, '--name', 'net', *args)
    assert code == 0, err
    return load_subnet(runs/'net')

def test_cost_of_the_subnet(runs, found, subnet):
    module, about = subnet
    path = tuple(about['path'])
    assert get_space('mobilenet_se', WIDTHS).format(path) == found['path'] and about['weights'] == 'ema'
    cost = Cost(get_net('mobilenet_se', CHANNELS, n_classes=4, widths=WIDTHS), (3, PX, PX))
    macs, n_params = cost([path])[0].tolist()
    assert [about['macs'], about['n_params']] == [macs, n_params] == [found['macs'], found['n_params']]
    assert count_macs(module, torch.randn(1, 3, PX, PX)) == macs
    buffers = dict(module.named_buffers())
    weights = load_file(runs/'net/subnet.safetensors')
    assert sum(t.numel() for name,t in weights.items() if name not in buffers) == n_params

def test_accuracy_of_the_subnet(images, runs, subnet):
    module, about = subnet
    splits, _ = folder_splits(images, 40)
    def score(split): return accuracy_loss(module, FileLoader(splits[split], 20, PX, n_workers=0))
    assert score('test').metric == pytest.approx(about['acc_alone'])
    assert about['acc_alone'] == read(runs/'net')['results']['retrain']['acc_alone']
    fname, = runs.glob('net/retrain/*/log.jsonl')
    trained = read_lines(fname)
    assert len(trained) == 4
    assert score('valid')[:2] == pytest.approx((about['acc_valid'], trained[-1]['loss_ema']), rel=1e-4)

def test_export(runs, subnet):
    run = runs/'net'
    has_onnx = all(map(find_spec, ('onnx', 'onnxscript', 'onnxruntime')))
    code, out, err = launch(1, 'export', '--runs', runs, '--name', 'net', *['--onnx']*has_onnx)
    assert code == 0, err
    suffixes = ['safetensors', 'json', 'pt2', 'onnx'][:3+has_onnx]
    assert out.splitlines() == [str(run/f'subnet.{suffix}') for suffix in suffixes]
    x = torch.randn(3, 3, PX, PX, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): expected = subnet[0](x)
    exported = torch.export.load(run/'subnet.pt2').module()(x).detach()
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-5)
    if not has_onnx: pytest.skip('no ONNX: the rest has passed')
    session = pytest.importorskip('onnxruntime').InferenceSession(run/'subnet.onnx')
    from_onnx, = session.run(None, dict(x=x.numpy()))
    torch.testing.assert_close(torch.from_numpy(from_onnx), expected, rtol=1e-4, atol=1e-5)

def test_broken_images_are_skipped_and_named(images, runs):
    train = {name.decode() for name in folder_splits(images, 40)[0]['train'].names}
    log = read_lines(runs/'net/log.jsonl')
    named = []
    for row in log: named += row.get('broken', [])
    assert named and sorted(named) == sorted(train.intersection(BROKEN)) # each is named once
    assert max(row.get('n_broken', 0) for row in log) == len(named)

def last_line(capsys, command, *args) -> str:
    "Return the one line with which a command ends."
    with pytest.raises(SystemExit) as e: command([*map(str, args)])
    out, err = capsys.readouterr()
    *before, last = err.splitlines()
    assert e.value.code == 2 and not out and last.startswith('kshot '), err
    assert not any(line.strip() for line in before), err
    return last

@pytest.mark.parametrize('args, message', [
    (['--folder', '{tmp}/flat'], 'has no train/, expected train/ and val/, each with a folder per class'),
    (['--folder', '{tmp}/none'], 'does not exist, expected one with train/ and val/'),
    (['--n_valid', 232], 'n_valid=232, expected 1 to 231 of 232 training images'),
    (['--bs', 193], 'batch size 193, expected 1 to 192 for 192 images'),
    (['--widths', 'a b'], "widths 'a b', expected numbers like .2,.4,.6,.8,1"),
    (['--widths', '1 0.5'], 'widths (1.0, 0.5), expected at least two, increasing, above 0 and at most 1'),
    (['--space', 'digits'], "widths for space 'digits', expected none")])
def test_bad_input_is_one_line_and_writes_nothing(args, message, images, tmp_path, capsys):
    (tmp_path/'flat/val/cat').mkdir(parents=True)
    args = [str(arg).format(tmp=tmp_path) for arg in args]
    args = ['--runs', tmp_path/'runs', '--folder', images, *SMALL, *args]
    assert message in last_line(capsys, train, *args)
    assert not (tmp_path/'runs').exists()

def test_a_run_that_is_there_stays_as_it_is(images, runs, capsys):
    before = content(runs/'net')
    args = ['--runs', runs, '--name', 'net', '--folder', images, *SMALL, '--K', 2]
    message = "holds a run with mode='alternate', expected mode='joint': choose another name"
    assert message in last_line(capsys, train, *args)
    assert content(runs/'net') == before

@pytest.mark.parametrize('name, value, message', [
    ('K', 2, 'checkpoint of K 4, expected 2'),
    ('epochs', 5, 'checkpoint of 3 epochs, expected 5'),
    ('space', 'mobilenet', "checkpoint of space 'mobilenet_se', expected 'mobilenet'"),
    ('widths', '0.5 1.0', 'checkpoint of blocks')])
def test_a_checkpoint_of_another_run(runs, tmp_path, capsys, name, value, message):
    run = tmp_path/'net'
    shutil.copytree(runs/'net/checkpoint', run/'checkpoint', copy_function=os.link)
    record = read(runs/'net')
    record['config'][name] = value
    if name == 'epochs': record['results'] = {}
    (run/'run.json').write_text(json.dumps(record))
    before = content(run)
    use = [train, '--resume'] if name == 'epochs' else [search, '--n_paths', 2]
    assert message in last_line(capsys, *use, '--runs', tmp_path, '--name', 'net')
    assert {fname: text for fname,text in content(run).items() if fname.name != '.lock'} == before

LAUNCH = '''
from pathlib import Path
from accelerate import notebook_launcher
from kshot.config import Config
from kshot.runs import ensure_trained
config = Config(K=2, epochs=1, passes=2, bs=200)
notebook_launcher(ensure_trained, (config, Path({folder!r})), num_processes=2, use_port='{port}')
'''

def test_notebook_launcher(tmp_path):
    code, out, err = call(LAUNCH.format(folder=str(tmp_path/'net'), port=free_port()))
    assert code == 0, err
    record = read(tmp_path/'net')
    assert record['machine']['processes'] == 2 and record['results']['train']['epoch'] == 1
