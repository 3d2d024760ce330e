"kshot_rank in every space, on a CIFAR-10 of 120 images and a table of 30 paths that the test makes"
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from kshot import launch, tables
from kshot.benchmark import get_space
from kshot.tables import write_table

SPACES = {'macro': [], 'nb201': ['--n_cells', '1'], 'nb101': ['--n_cells', '1'], 'darts': ['--n_cells', '3']}

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with images in fastai's layout and a table for every space"
    home, rng = tmp_path_factory.mktemp('home'), np.random.default_rng(0)
    for split,n in (('train', 8), ('test', 4)):
        for c in range(10):
            folder = home/'data'/'cifar10'/split/f'class{c}'
            folder.mkdir(parents=True)
            for i in range(n): Image.fromarray(rng.integers(0, 256, (32,32,3), dtype=np.uint8)).save(folder/f'{i}.png')
    for name in SPACES:
        space = get_space('nds' if name == 'darts' else name)
        paths = [space.format(p[:32]+(1,)*8 if name == 'darts' else p) for p in space.sample(rng, 30)]
        rows = pd.DataFrame(dict(path=paths, dataset='cifar10', split='test', epochs=9, seed=0, n_runs=1, acc=rng.random(30)))
        rows['macs'] = rows['n_params'] = rows['loss'] = np.nan
        write_table(rows.drop_duplicates('path'), home/f'{name}.parquet', space.name)
    return home

@pytest.fixture
def rank(home, monkeypatch, capfd, tmp_path):
    "Calls the command; returns its JSON, or its exit code and complaint"
    monkeypatch.setenv('KSHOT_HOME', str(home)); monkeypatch.setenv('KSHOT_DATA', str(home/'data'))
    def call(space, *argv, runs=tmp_path):
        argv = ['--space', 'nds' if space == 'darts' else space, '--table', str(home/f'{space}.parquet'), '--runs', str(runs), *SPACES[space],
                '--channels', '4', '--px', '8', '--bs', '10', '--epochs', '1', *argv]
        try: launch.rank([*argv, '--json'])
        except SystemExit as e: return e.code, capfd.readouterr().err.splitlines()[-1]
        return json.loads(capfd.readouterr().out.splitlines()[-1])
    return call

@pytest.mark.parametrize('space', SPACES)
def test_every_space(space, rank, tmp_path):
    result = rank(space, '--K', '2', '--n_paths', '12')
    assert list(result) == ['supernet', 'supernet_loss', 'macs', 'params']
    scores = pd.read_parquet(tmp_path/'run'/'scores.parquet')
    assert len(scores) == 12 and scores.loss_super.nunique() > 6 and np.isfinite(scores.loss_super).all()
    assert '<h2>Ranking</h2>' in (tmp_path/'run'/'report.html').read_text()

def test_few_shot_and_one_shot(rank, tmp_path):
    for name,argv in dict(few=['--codes', 'vertex', '--block', '5', '--K', '5'], one=['--K', '1']).items():
        assert rank('nb201', '--name', name, *argv)['supernet']['n_seeds'] == 1
        assert len(pd.read_parquet(tmp_path/name/'scores.parquet')) == len(pd.read_parquet(tmp_path/name/'seed_0'/'scores.parquet'))

def test_a_second_seed_later_is_as_both_at_once(rank, tmp_path):
    rank('nb201', '--runs', str(tmp_path/'a'), '--n_paths', '10')
    before = {f: f.stat().st_mtime_ns for f in (tmp_path/'a'/'run'/'seed_0').rglob('*.parquet')}
    later = rank('nb201', '--runs', str(tmp_path/'a'), '--n_paths', '10', '--seeds', '2')
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert rank('nb201', '--runs', str(tmp_path/'b'), '--n_paths', '10', '--seeds', '2') == later

def test_more_paths_later_keeps_what_was_scored(rank, tmp_path):
    rank('macro', '--n_paths', '8')
    few = pd.read_parquet(tmp_path/'run'/'scores.parquet').set_index('path')
    rank('macro')
    every = pd.read_parquet(tmp_path/'run'/'scores.parquet').set_index('path')
    assert len(few) == 8 and len(every) == 30
    pd.testing.assert_frame_equal(every.loc[few.index], few)

def test_latency_is_a_budget(data, rank, home, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv('KSHOT_DATA', str(data))
    tables.latency('nb201', 'pixel2') # imported into KSHOT_HOME
    monkeypatch.setenv('KSHOT_DATA', str(home/'data'))
    rank('nb201', '--n_paths', '10')
    search = ['--name', 'run/seed_0', '--runs', str(tmp_path), '--n_paths', '20', '--algorithm', 'random', '--latency_ms', '15']
    launch.search([*search, '--device', 'pixel2', '--json'])
    assert json.loads(capfd.readouterr().out.splitlines()[-1])['latency_ms'] <= 15
    raw, space = pd.read_parquet(data/'nas_bench_201_latency_help.parquet'), get_space('nb201')
    lat = dict(zip(pd.read_parquet(data/'nas_bench_201_12epoch.parquet').arch_str.map(space.parse), raw.lat_ms_pixel2))
    found = pd.read_parquet(tmp_path/'run'/'seed_0'/'search.parquet')
    assert len(found) == 20
    for s,ms in zip(found.path, found.latency_ms): assert ms == pytest.approx(lat[space.parse(s)]) and ms <= 15
    with pytest.raises(SystemExit): launch.search([*search, '--device', 'abacus'])
    assert "device 'abacus', expected one of" in capfd.readouterr().err

def test_bad_input_is_one_line(rank, home, tmp_path):
    for argv,says in {('--table_epochs', '200'): 'no epochs 200', ('--n_paths', '99'): 'n=99, expected 2 to', ('--table', 'nowhere.parquet'): 'nowhere.parquet',
                      ('--n_train', '7'): '7 images of 10 classes', ('--px', '64'): 'images of 64 pixels', ('--data', 'digits'): "data 'digits' for space",
                      ('--block', '9', '--codes', 'vertex'): 'block=9', ('--data', 'cifar100'): 'has no cifar100', ('--epochs', '0'): 'epochs=0'}.items():
        code, err = rank('nb201', *argv)
        assert code == 2 and says in err, (argv, err)
    assert not list(tmp_path.iterdir()), 'something was written'
    rank('nb201', '--n_paths', '10')
    assert 'holds a run with K=4, expected K=2' in rank('nb201', '--n_paths', '10', '--K', '2')[1]
    assert 'was made with' in rank('nb201', '--n_paths', '10', '--n_calibration', '1')[1]
