"A study from the command line: killed, resumed, shared by workers; one row of each benchmark space with images"
import json, os, signal

import pandas as pd
import pytest

from kshot.studies.grid import make_rows
from kshot.studies.study import queue, run_row
from processes import Fork, command

TOML = """
K = [1, 2]
seeds = 2
[digits]
epochs = 2
passes = 1
channels = 4
n_paths = 20
vary.sampler = ["fair"]
"""

def start(runs, *args):
    return Fork(command('study', 'studies.study'), *args, '--name', 's', '--runs', runs, '--json')

def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])

def done(folder): # rows that are done, with the moment in which they were noted
    runs = {f.parent.name: json.loads(f.read_text()) for f in folder.glob('*/run.json')}
    return {k: (r['results']['row'], (folder/k/'run.json').stat().st_mtime_ns) for k,r in runs.items() if 'row' in r['results']}

@pytest.fixture
def toml(tmp_path):
    (tmp_path/'study.toml').write_text(TOML)
    return tmp_path/'study.toml'

@pytest.mark.parametrize('how,code', [(signal.SIGKILL, -9), (signal.SIGINT, 130)]) # of the first process alone
def test_killed_and_resumed(tmp_path, toml, how, code):
    "What ends the command ends its workers, and what is done stays as it is."
    folder = tmp_path/'s'
    first = start(tmp_path, toml, '--workers', '2')
    for _ in range(600):
        if folder.exists() and len(done(folder)) >= 2: break
        first.process.join(.5)
    os.kill(first.pid, how) # its workers notice by themselves
    first.communicate(timeout=60)
    assert first.returncode == code
    before = done(folder)
    assert 2 <= len(before) < 8 and not (folder/'results.parquet').exists()
    result = finish(start(tmp_path, '--resume', '--workers', '1'))
    assert result['rows'] == result['done'] == 8 and result['failed'] == 0
    after = done(folder)
    assert len(after) == 8
    for name,kept in before.items(): assert after[name] == kept # finished rows were not touched
    frame = pd.read_parquet(folder/'results.parquet')
    assert len(frame) == frame.name.nunique() == 8 and frame[['acc_super', 'tau', 'tau_loss', 'updates']].notna().all(axis=None)
    assert (folder/'report.html').stat().st_size > 1e6
    assert {(e['heuristic'], e['K'], e['n']) for e in result['effects']} == {(h, k, 2) for h in ('sampler',) for k in (1, 2)}
    assert finish(start(tmp_path, toml, '--workers', '1'))['effects'] == result['effects'] # asking again computes nothing
    assert done(folder) == after

def test_two_machines_share_the_rows(tmp_path, toml):
    "Two commands on one folder, as from two machines: no row twice, and the same results as one alone."
    folder = tmp_path/'s'
    both = [start(tmp_path, toml, '--workers', '1') for _ in range(2)]
    for p in both: finish(p)
    assert len(done(folder)) == 8
    assert queue(folder).n_seen == 8 # no row was taken twice
    frame = pd.read_parquet(folder/'results.parquet')
    assert len(frame) == frame.name.nunique() # whoever ended last wrote what was done by then
    again = finish(start(tmp_path, '--resume', '--workers', '1'))
    assert again['done'] == 8

def test_errors(tmp_path, toml):
    def fails(*args):
        p = start(tmp_path, *args)
        out, err = p.communicate(timeout=120)
        assert p.returncode == 2 and len(err.strip().splitlines()) == 1, err
        return err
    assert 'holds no study' in fails('--resume')
    assert "study 'nothing.toml', expected a TOML file or one of digits" in fails('nothing.toml')
    assert "metric 'tua', expected one of tau, spearman" in fails(toml, '--metric', 'tua')
    toml.write_text('[digits]\nvary.kernel = ["crop"]')
    assert 'digits_kernel=crop_K1_seed0' in fails(toml)
    assert not (tmp_path/'s').exists()

@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('home') # images and tables are read once

SMALL = dict(channels=4, n_cells=1, px=8, n_train=500, n_valid=200, bs=50, epochs=2, n_paths=12)

@pytest.mark.parametrize('space,settings', [
    ('nb201', dict(kernel='transform', wsbn=True, op_on='node', drop_path=.1)),
    ('nb101', dict(channelling='disjoint', wsbn=True, kernel='crop', sampler='random_nas')),
    ('darts', dict(kernel='crop', op_on='edge', drop_path=.1, sampler='fair', n_cells=3, epochs=1))])
def test_a_row_with_images(tmp_path, data, home, monkeypatch, space, settings):
    "One complete row on CIFAR-10 at reduced size: trained, resumed, scored, ranked against the benchmark's table where there is one."
    monkeypatch.setenv('KSHOT_DATA', str(data))
    monkeypatch.setenv('KSHOT_HOME', str(home))
    row, = make_rows(SMALL | dict(space=space) | settings, {}, K=(2,), seeds=1)
    found = run_row(row, tmp_path)
    assert found['updates'] == 10*SMALL['epochs']*(1 if space != 'darts' else .5*8)
    assert 0 < found['acc_super'] < 1 and found['seconds_train'] > 0
    if space == 'darts': assert 'tau' not in found # nobody shares its table
    else: assert all(-1 <= found[k] <= 1 for k in ('tau', 'tau_loss', 'sparse_tau', 'sparse_tau_position', 'tau_macs'))
