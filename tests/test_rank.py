"kshot rank in every space, on a CIFAR-10 of 120 images and a table of 30 paths that the test makes"
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from kshot import tables
from kshot.benchmark import get_space
from kshot.cli import launch
from kshot.rank import BY
from kshot.tables import write_table

SPACES = { # name -> its smallest network
    'macro': [],
    'nb201': ['--n_cells', '1'],
    'nb101': ['--n_cells', '1'],
    'darts': ['--n_cells', '3'],
    'autoformer': ['--data', 'cifar10']}
SMALL = ['--channels', '4', '--px', '8', '--bs', '10', '--epochs', '1']

def command_space(name):
    "Return the space that the command is called with: a table of darts has the paths of nds."
    return 'nds' if name == 'darts' else name

def make_images(folder, rng):
    "Write images in fastai's layout."
    for split,n in (('train', 8), ('test', 4)):
        for c in range(10):
            place = folder/split/f'class{c}'
            place.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (32,32,3), dtype=np.uint8)
                Image.fromarray(pixels).save(place/f'{i}.png')

def make_table(name, fname, rng):
    "Write a table of 30 paths with random accuracies."
    space = get_space(command_space(name))
    paths = space.sample(rng, 30)
    if name == 'darts': paths = [path[:32]+(1,)*8 for path in paths]
    rows = pd.DataFrame(dict(path=[space.format(path) for path in paths], dataset='cifar10', split='test',
                             epochs=9, seed=0, n_runs=1, acc=rng.random(30)))
    rows = rows.assign(macs=np.nan, n_params=np.nan, loss=np.nan)
    write_table(rows.drop_duplicates('path'), fname, space.name)

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Make a folder with images and a table for every space."
    home = tmp_path_factory.mktemp('home')
    rng = np.random.default_rng(0)
    make_images(home/'data'/'cifar10', rng)
    for name in SPACES: make_table(name, home/f'{name}.parquet', rng)
    return home

@pytest.fixture
def rank(home, monkeypatch, capfd, tmp_path):
    "Call the command; return its JSON, or its exit code and last line of complaint."
    monkeypatch.setenv('KSHOT_HOME', str(home))
    monkeypatch.setenv('KSHOT_DATA', str(home/'data'))
    def call(space, *argv):
        table = home/f'{space}.parquet'
        places = ['--space', command_space(space), '--table', str(table), '--runs', str(tmp_path)]
        try: launch.rank([*places, *SPACES[space], *SMALL, *argv, '--json'])
        except SystemExit as e: return e.code, capfd.readouterr().err.splitlines()[-1]
        return json.loads(capfd.readouterr().out.splitlines()[-1])
    return call

def scores_in(folder):
    return pd.read_parquet(folder/'scores.parquet')

@pytest.mark.parametrize('space', SPACES)
def test_every_space(space, rank, tmp_path):
    result = rank(space, '--K', '2', '--n_paths', '12')
    assert list(result) == ['supernet', *(f'supernet_{by}' for by in BY), 'macs', 'params']
    scores = scores_in(tmp_path/'run')
    assert len(scores) == 12
    assert scores.loss_super.nunique() > 6 and np.isfinite(scores.loss_super).all()
    assert '<h2>Ranking</h2>' in (tmp_path/'run'/'report.html').read_text()

@pytest.mark.parametrize('argv', [['--codes', 'vertex', '--block', '5', '--K', '5'], ['--K', '1']])
def test_few_shot_and_one_shot(rank, tmp_path, argv):
    assert rank('nb201', *argv)['supernet']['n_seeds'] == 1
    assert len(scores_in(tmp_path/'run')) == len(scores_in(tmp_path/'run'/'seed_0'))

def test_a_second_seed_later_is_as_both_at_once(rank, tmp_path):
    later = str(tmp_path/'later')
    at_once = str(tmp_path/'at_once')
    rank('nb201', '--runs', later, '--n_paths', '10')
    fnames = list((tmp_path/'later'/'run'/'seed_0').rglob('*.parquet'))
    before = [fname.stat().st_mtime_ns for fname in fnames]
    result = rank('nb201', '--runs', later, '--n_paths', '10', '--seeds', '2')
    assert [fname.stat().st_mtime_ns for fname in fnames] == before
    assert rank('nb201', '--runs', at_once, '--n_paths', '10', '--seeds', '2') == result

def test_more_paths_later_keeps_what_was_scored(rank, tmp_path):
    rank('macro', '--n_paths', '8')
    few = scores_in(tmp_path/'run').set_index('path')
    rank('macro')
    every = scores_in(tmp_path/'run').set_index('path')
    assert len(few) == 8 and len(every) == 30
    pd.testing.assert_frame_equal(every.loc[few.index], few)

def true_latencies(data, device):
    "Read latencies from the benchmark's own files: path -> milliseconds."
    space = get_space('nb201')
    table = pd.read_parquet(data/'nas_bench_201_latency_help.parquet')
    paths = pd.read_parquet(data/'nas_bench_201_12epoch.parquet').arch_str.map(space.parse)
    return dict(zip(paths, table[f'lat_ms_{device}']))

def test_latency_is_a_budget(data, rank, home, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv('KSHOT_DATA', str(data))
    tables.latency('nb201', 'pixel2') # imported into KSHOT_HOME
    monkeypatch.setenv('KSHOT_DATA', str(home/'data'))
    rank('nb201', '--n_paths', '10')
    search = ['--name', 'run/seed_0', '--runs', str(tmp_path), '--n_paths', '20', '--algorithm', 'random',
              '--max_latency_ms', '15']
    launch.search([*search, '--device', 'pixel2', '--json'])
    assert json.loads(capfd.readouterr().out.splitlines()[-1])['latency_ms'] <= 15
    latencies = true_latencies(data, 'pixel2')
    parse = get_space('nb201').parse
    scored = pd.read_parquet(tmp_path/'run'/'seed_0'/'search.parquet')
    assert len(scored) == 20
    for path,ms in zip(scored.path, scored.latency_ms):
        assert ms == pytest.approx(latencies[parse(path)]) and ms <= 15
    with pytest.raises(SystemExit): launch.search([*search, '--device', 'abacus'])
    assert "device 'abacus', expected one of" in capfd.readouterr().err

WRONG = [
    (['--table_epochs', '200'], 'no epochs 200'),
    (['--n_paths', '99'], 'n=99, expected 2 to'),
    (['--table', 'nowhere.parquet'], 'nowhere.parquet'),
    (['--n_train', '7'], '7 images of 10 classes'),
    (['--px', '64'], 'images of 64 pixels'),
    (['--data', 'digits'], "data 'digits' for space"),
    (['--block', '9', '--codes', 'vertex'], 'block=9'),
    (['--data', 'cifar100'], 'has no cifar100'),
    (['--epochs', '0'], 'epochs=0')]

@pytest.mark.parametrize('argv,text', WRONG)
def test_a_wrong_option_is_one_line_and_writes_nothing(rank, tmp_path, argv, text):
    code, complaint = rank('nb201', *argv)
    assert code == 2 and text in complaint
    assert not list(tmp_path.iterdir())

def test_another_run_in_the_folder_is_refused(rank):
    rank('nb201', '--n_paths', '10')
    assert 'holds a run with K=4, expected K=2' in rank('nb201', '--n_paths', '10', '--K', '2')[1]
    assert 'was made with' in rank('nb201', '--n_paths', '10', '--n_calibration', '1')[1]
