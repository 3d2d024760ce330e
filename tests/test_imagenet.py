"The whole way on a small image folder: train, search under a budget, retrain, export, reload; broken images and bad input"
import json, os, shutil
from importlib.util import find_spec
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from kshot.cost import Cost
from kshot.evaluate import accuracy_loss
from kshot.export import load_subnet
from kshot.datasets.folder import FileLoader, folder_splits
from kshot.cli.launch import search, train
from kshot.benchmark import get_net, get_space
from kshot.simplex import SimplexNet, width_settings
from kshot.checkpoint import load_newest
from processes import call
from test_distributed import launch
from test_launch import content

WIDTHS, C, PX, BUDGET = (.25, .5, 1.), 8, 32, 600_000 # two paths of five fit
SMALL = ['--space', 'mobilenet_se', '--widths', ' '.join(map(str, WIDTHS)), '--channels', C, '--px', PX, '--n_valid', 40, '--bs', 64, '--n_workers', 1]

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "A folder of four classes, stripes at four angles in three colours; three files of `train/` end too soon"
    folder, rng, (y, x) = tmp_path_factory.mktemp('images'), np.random.default_rng(0), np.mgrid[:40,:40]
    for split,n in dict(train=58, val=10).items():
        for c,angle in enumerate((0, 45, 90, 135)):
            (folder/split/f'stripes_{angle}').mkdir(parents=True)
            across = x*np.cos(np.radians(angle)) + y*np.sin(np.radians(angle))
            for i in range(n):
                waves = 90 + 60*np.sin(.9*across + rng.uniform(0, 2*np.pi))[...,None] + 80*np.eye(3)[c%3] + rng.normal(0, 15, (40, 40, 3))
                Image.fromarray(waves.clip(0, 255).astype(np.uint8)).save(folder/split/f'stripes_{angle}'/f'{i:02}.jpg')
    for name in 'stripes_0/07', 'stripes_45/11', 'stripes_135/30':
        fname = folder/f'train/{name}.jpg'
        fname.write_bytes(fname.read_bytes()[:300])
    return folder

@pytest.fixture(scope='module')
def runs(images, tmp_path_factory):
    "Folder of runs with one that two processes have trained, `net`"
    runs = tmp_path_factory.mktemp('runs')
    code, out, err = launch(2, 'train', '--runs', runs, '--name', 'net', '--folder', images, '--K', 4, '--mode', 'alternate', '--epochs', 3, '--lr', .05, *SMALL)
    assert code == 0, err
    assert out.count('net: epoch 3') == 1
    return runs

def read(run, name='run'): return json.loads((run/f'{name}.json').read_text())

def count_macs(module, x):
    "Multiply-accumulates of the convolutions and linear layers, from the shapes that come out of them"
    n, layers = [], [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [m.register_forward_hook(lambda m, _, y: n.append(y.numel()*m.weight[0].numel())) for m in layers]
    module(x)
    for h in hooks: h.remove()
    return sum(n)

def test_train_search_retrain_export_reload(images, runs):
    run, space = runs/'net', get_space('mobilenet_se', WIDTHS)
    record, log = read(run), [json.loads(l) for l in (run/'log.jsonl').read_text().splitlines()]
    assert record['machine']['processes'] == 2
    assert [record['config'][k] for k in ('K', 'widths', 'mode', 'bs')] == [4, '0.25 0.5 1.0', 'alternate', 64]
    assert [r['epoch'] for r in log] == [1, 2, 3] and log[0]['code_entropy'] != log[2]['code_entropy'] # the simplex-net learns
    tensors, _ = load_newest(run)
    codes = SimplexNet(space, 4)
    codes.load_state_dict({k.removeprefix('codes/'): t for k,t in tensors.items() if k.startswith('codes/')})
    settings = codes(width_settings(space, space.sample(np.random.default_rng(0), 1)[0]))
    assert settings.shape == (3, 4) and len(settings.unique(dim=0)) == 3 # the widths of a path are told apart

    code, out, err = launch(2, 'search', '--runs', runs, '--name', 'net', '--n_paths', 12, '--macs', BUDGET, '--n_calibration', 2, '--json')
    assert code == 0, err
    found, scored = json.loads(out.splitlines()[-1]), pd.read_parquet(run/'search.parquet')
    cost = Cost(get_net('mobilenet_se', C, n_classes=4, widths=WIDTHS), (3, PX, PX))
    paths = [space.parse(p) for p in scored.path]
    assert 12 <= len(paths) == len(set(paths)) == found['n'] <= 13 # the last paths of the two processes may end together
    assert cost(paths).tolist() == scored[['macs', 'n_params']].values.tolist() and scored.macs.max() <= BUDGET
    assert found['path'] == scored.path[0] and found['loss_super'] == pytest.approx(-scored.score.max(), rel=1e-4)

    code, out, err = launch(2, 'retrain', '--runs', runs, '--name', 'net', '--recipe', 'strong', '--epochs', 4, '--bs', 32)
    assert code == 0, err
    module, about = load_subnet(run)
    path, x = tuple(about['path']), torch.randn(3, 3, PX, PX, generator=torch.Generator().manual_seed(0))
    assert space.format(path) == found['path'] and about['weights'] == 'ema'
    assert [about['macs'], about['n_params']] == cost([path])[0].tolist() == [count_macs(module, x[:1]), found['n_params']]
    weights, buffers = load_file(run/'subnet.safetensors'), dict(module.named_buffers())
    assert sum(t.numel() for n,t in weights.items() if n not in buffers) == about['n_params']
    splits, _ = folder_splits(images, 40)
    of = {s: accuracy_loss(module, FileLoader(splits[s], 20, PX, n_workers=0)) for s in ('valid', 'test')}
    assert of['test'][0] == pytest.approx(about['acc_alone']) and about['acc_alone'] == read(run)['results']['retrain']['acc_alone']
    trained = [json.loads(l) for f in run.glob('retrain/*/log.jsonl') for l in f.read_text().splitlines()]
    assert len(trained) == 4 and of['valid'] == pytest.approx((about['acc_valid'], trained[-1]['loss_ema']), rel=1e-4)

    has_onnx = all(map(find_spec, ('onnx', 'onnxscript', 'onnxruntime')))
    code, out, err = launch(1, 'export', '--runs', runs, '--name', 'net', *['--onnx']*has_onnx)
    assert code == 0, err
    assert out.splitlines() == [str(run/f'subnet.{s}') for s in ('safetensors', 'json', 'pt2', 'onnx')[:3+has_onnx]]
    with torch.no_grad(): expected = module(x)
    torch.testing.assert_close(torch.export.load(run/'subnet.pt2').module()(x).detach(), expected, rtol=1e-4, atol=1e-5)
    session = pytest.importorskip('onnxruntime').InferenceSession(run/'subnet.onnx') if has_onnx else pytest.skip('no ONNX: the rest has passed')
    torch.testing.assert_close(torch.from_numpy(session.run(None, dict(x=x.numpy()))[0]), expected, rtol=1e-4, atol=1e-5)

def test_broken_images_are_passed_over_and_named(images, runs):
    broken = {'train/stripes_0/07.jpg', 'train/stripes_45/11.jpg', 'train/stripes_135/30.jpg'}
    train = {n.decode() for n in folder_splits(images, 40)[0]['train'].names}
    log = [json.loads(l) for l in (runs/'net/log.jsonl').read_text().splitlines()]
    named = [n for r in log for n in r.get('broken', [])]
    assert sorted(named) == sorted(broken & train) and named # each once, in the epoch that met it first
    assert max(r.get('n_broken', 0) for r in log) == len(named)

def ends_with(capsys, command, *args):
    "The one line with which a command ends"
    with pytest.raises(SystemExit) as e: command(list(map(str, args)))
    out, err = capsys.readouterr()
    *before, last = err.splitlines()
    assert e.value.code == 2 and not out and last.startswith('kshot_'), err
    assert [l for l in before if l.strip()] in ([], ['█', 'epoch     train_loss  valid_loss  accuracy  time    ']), err
    return last

def test_bad_input_is_one_line(images, runs, tmp_path, capsys):
    (tmp_path/'flat/val/cat').mkdir(parents=True)
    for args,says in [
            (['--folder', tmp_path/'flat'], 'has no train/, expected train/ and val/, each with a folder a class'),
            (['--folder', tmp_path/'none'], 'does not exist, expected one with train/ and val/'),
            (['--n_valid', 232], 'n_valid=232, expected 1 to 231 of 232 training images'),
            (['--bs', 193], 'batch size 193, expected 1 to 192 for 192 images'),
            (['--widths', 'a b'], """widths 'a b', expected numbers like "0.2 0.4 0.6 0.8 1.0\""""),
            (['--widths', '1 0.5'], 'widths (1.0, 0.5), expected at least two, increasing, above 0 and at most 1'),
            (['--space', 'digits'], "widths for space 'digits', expected none, or one of mobilenet, mobilenet_se, shufflenet")]:
        assert says in ends_with(capsys, train, '--runs', tmp_path/'runs', '--folder', images, *SMALL, *args), args
        assert not (tmp_path/'runs').exists()
    before = content(runs/'net')
    assert 'is not empty: resume it or choose another' in ends_with(capsys, train, '--runs', runs, '--name', 'net', '--folder', images, *SMALL, '--K', 2)
    assert "--K: 'two', expected a whole number" in ends_with(capsys, train, '--runs', runs, '--name', 'net', '--K', 'two')
    assert content(runs/'net') == before

@pytest.mark.parametrize('key,value,says', [('K', 2, 'checkpoint of K 4, expected 2'), ('epochs', 5, 'checkpoint of 3 epochs, expected 5'),
    ('space', 'mobilenet', "checkpoint of space 'mobilenet_se', expected 'mobilenet'"), ('widths', '0.5 1.0', 'checkpoint of blocks')])
def test_a_checkpoint_of_another_run(runs, tmp_path, capsys, key, value, says):
    run = tmp_path/'net'
    shutil.copytree(runs/'net/checkpoint', run/'checkpoint', copy_function=lambda a, b: os.link(a, b))
    record = read(runs/'net')
    record['config'][key] = value
    if key == 'epochs': record['results'] = {}
    (run/'run.json').write_text(json.dumps(record))
    before = content(run)
    use = [train, '--resume'] if key == 'epochs' else [search, '--n_paths', 2]
    assert says in ends_with(capsys, *use, '--runs', tmp_path, '--name', 'net')
    assert {f: d for f,d in content(run).items() if f.name != '.lock'} == before

def test_notebook_launcher(tmp_path):
    code, out, err = call(f'''
from pathlib import Path
from accelerate import notebook_launcher
from kshot.config import Config
from kshot.runs import ensure_trained
notebook_launcher(ensure_trained, (Config(K=2, epochs=1, passes=2, bs=200), Path({str(tmp_path/'net')!r})), num_processes=2)
''')
    assert code == 0, err
    record = read(tmp_path/'net')
    assert record['machine']['processes'] == 2 and record['results']['train']['epoch'] == 1
