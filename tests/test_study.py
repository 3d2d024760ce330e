"""A study: which rows make sense, and what happens when the command is killed, resumed and shared;
one row of each benchmark space with images"""
import json
import os
import signal

import pandas as pd
import pytest

from kshot.benchmark import BENCHMARKS
from kshot.studies.grid import heuristics, make_rows, read_study
from kshot.studies.study import queue, run_row
from processes import Fork, command

WRONG_SETTINGS = [
    (dict(epochs=0), 'epochs=0, expected at least 1'),
    (dict(lr='0.1'), "lr='0.1', expected float or NoneType"),
    (dict(wsbn=1), 'wsbn=1, expected bool'),
    (dict(kernel='pie'), "kernel='pie', expected one of"),
    (dict(n_paths=1), 'n_paths=1, expected at least 2'),
    (dict(n_calibration=-1), 'n_calibration=-1, expected at least 0'),
    (dict(data='cifar10'), "data 'cifar10' for space 'digits'"),
    (dict(space='nb102'), "space 'nb102'"),
    (dict(sampler='fair', max_macs=1e6), 'strict fairness under a budget')]

WRONG_NUMBERS = [
    (dict(K=[0], seeds=1), 'K=0, expected at least 1'),
    (dict(K=4, seeds=1), 'K=4, expected whole numbers'),
    (dict(K=[1.5], seeds=1), 'K=[1.5], expected whole numbers'),
    (dict(K=[1], seeds=0), 'seeds=[], expected whole numbers'),
    (dict(K=[1], seeds='3'), "seeds='3', expected whole numbers")]

WRONG_FILES = [
    ('paths = 3', 'paths=3, expected K, seeds, design, or tables'),
    ('K = [1]', 'has no table, expected one for each baseline'),
    ('[a]\nspace="digits"\nvary=3', 'a.vary=3, expected a table'),
    ('["a b"]\nspace="digits"\nvary={}\n[a_b]\nspace="digits"\nvary={}',
     'two rows are called a_b_baseline'),
    ('K = ', 'Invalid value')]

def refusal(function, *args, **kwargs):
    "Return the message with which a call is refused."
    with pytest.raises(ValueError) as error: function(*args, **kwargs)
    return str(error.value)

@pytest.mark.parametrize('settings,text', WRONG_SETTINGS)
def test_settings_that_cannot_run_are_refused(settings, text):
    name = f'{settings.get("space", "digits")}_baseline_K1_seed0'
    assert f'{name}: {text}' in refusal(make_rows, settings, {})

@pytest.mark.parametrize('numbers,text', WRONG_NUMBERS)
def test_K_and_seeds_are_whole_numbers(numbers, text):
    assert text in refusal(make_rows, {}, {}, **numbers)

@pytest.mark.parametrize('content,text', WRONG_FILES)
def test_files_that_are_no_study_are_refused(tmp_path, content, text):
    fname = tmp_path/'study.toml'
    fname.write_text(content)
    assert text in refusal(read_study, fname)

SPACES = [name for name in BENCHMARKS if name != 'nds'] # nds has the network of darts

@pytest.mark.parametrize('space', SPACES)
def test_every_space_has_heuristics_that_can_run(space):
    rows = make_rows(dict(space=space, n_cells=2 if space == 'darts' else None), K=(1,), seeds=1)
    assert len({row.heuristic for row in rows}) > 5

SMALL_NB101 = dict(space='nb101', n_cells=1, channels=8)
FORBIDDEN = [
    (dict(mode='alternate'), 'batch norm', 'tracked'),
    (dict(max_macs=1e5), 'path sampling', 'FairNAS'),
    (SMALL_NB101 | dict(wsbn=True), 'op on node or edge', 'edge'),
    (SMALL_NB101 | dict(op_on='edge'), 'WSBN', 'on'),
    (SMALL_NB101 | dict(channelling='shuffled'), 'batch norm', 'tracked'),
    (SMALL_NB101 | dict(track_bn=True), 'dynamic channelling', 'shuffled')]

@pytest.mark.parametrize('baseline,heuristic,value', FORBIDDEN)
def test_heuristics_that_a_baseline_forbids_are_left_out(baseline, heuristic, value):
    plain = SMALL_NB101 if 'space' in baseline else {}
    assert value in heuristics(plain)[heuristic]
    assert value not in heuristics(baseline).get(heuristic, {})
    make_rows(baseline, seeds=1)

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

@pytest.fixture
def toml(tmp_path):
    fname = tmp_path/'study.toml'
    fname.write_text(TOML)
    return fname

def start(runs, *args):
    "Start the command in a process of its own."
    return Fork(command('study'), *args, '--name', 's', '--runs', runs, '--json')

def finish(process):
    "Wait for the command; return what it printed."
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])

def finished_rows(folder):
    "Return result and time of change of each row that has one."
    rows = {}
    for fname in folder.glob('*/run.json'):
        results = json.loads(fname.read_text())['results']
        if 'row' in results: rows[fname.parent.name] = results['row'], fname.stat().st_mtime_ns
    return rows

@pytest.mark.parametrize('stop,code', [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_killed_and_resumed(tmp_path, toml, stop, code):
    "What ends the command ends its workers, and finished rows stay as they are."
    folder = tmp_path/'s'
    first = start(tmp_path, toml, '--workers', '2')
    for _ in range(600):
        if folder.exists() and len(finished_rows(folder)) >= 2: break
        first.process.join(.5)
    os.kill(first.pid, stop) # the first process alone: its workers notice by themselves
    first.communicate(timeout=60)
    assert first.returncode == code
    before = finished_rows(folder)
    assert 2 <= len(before) < 8 and not (folder/'results.parquet').exists()
    result = finish(start(tmp_path, '--resume', '--workers', '1'))
    assert result['rows'] == result['done'] == 8 and result['failed'] == 0
    after = finished_rows(folder)
    assert len(after) == 8 and before.items() <= after.items()
    check_results(folder, result)
    again = finish(start(tmp_path, toml, '--workers', '1')) # asking again computes nothing
    assert again['effects'] == result['effects']
    assert finished_rows(folder) == after

def check_results(folder, result):
    "Check table, page and effects of the finished study."
    frame = pd.read_parquet(folder/'results.parquet')
    assert len(frame) == frame.name.nunique() == 8
    assert frame[['acc_super', 'tau', 'tau_loss', 'updates']].notna().all(axis=None)
    assert (folder/'report.html').stat().st_size > 1e6
    effects = {(e['heuristic'], e['K'], e['n']) for e in result['effects']}
    assert effects == {('sampler', 1, 2), ('sampler', 2, 2)}

def test_two_machines_share_the_rows(tmp_path, toml):
    "Two commands on one folder, as from two machines, do no row twice."
    folder = tmp_path/'s'
    both = [start(tmp_path, toml, '--workers', '1') for _ in range(2)]
    for process in both: finish(process)
    assert len(finished_rows(folder)) == 8
    assert queue(folder).n_seen == 8 # no row was taken twice
    frame = pd.read_parquet(folder/'results.parquet')
    assert len(frame) == frame.name.nunique() # the last to end wrote what was done by then
    assert finish(start(tmp_path, '--resume', '--workers', '1'))['done'] == 8

def test_a_wrong_command_ends_with_one_line(tmp_path, toml):
    def complaint(*args):
        process = start(tmp_path, *args)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2 and len(err.strip().splitlines()) == 1, err
        return err
    assert 'holds no study' in complaint('--resume')
    text = "study 'nothing.toml', expected a TOML file or one of digits"
    assert text in complaint('nothing.toml')
    assert "'tua', expected tau, spearman" in complaint(toml, '--metric', 'tua')
    toml.write_text('[digits]\nvary.kernel = ["crop"]')
    assert 'digits_kernel=crop_K1_seed0' in complaint(toml)
    assert not (tmp_path/'s').exists()

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder of its own: images and tables are read once."
    return tmp_path_factory.mktemp('home')

SMALL = dict(channels=4, n_cells=1, px=8, n_train=500, n_valid=200, bs=50, epochs=2, n_paths=12)
IMAGE_ROWS = [
    ('nb201', dict(kernel='transform', wsbn=True, op_on='node', drop_path=.1)),
    ('nb101', dict(channelling='disjoint', wsbn=True, kernel='crop', sampler='random_nas')),
    ('darts', dict(kernel='crop', op_on='edge', drop_path=.1, sampler='fair', n_cells=3, epochs=1))]

@pytest.mark.parametrize('space,settings', IMAGE_ROWS)
def test_a_row_with_images(tmp_path, data, home, monkeypatch, space, settings):
    "Train, score and rank one small row on CIFAR-10."
    monkeypatch.setenv('KSHOT_DATA', str(data))
    monkeypatch.setenv('KSHOT_HOME', str(home))
    row, = make_rows(SMALL | dict(space=space) | settings, {}, K=(2,), seeds=1)
    result = run_row(row, tmp_path)
    n_epochs = {'darts': 1*8}.get(space, 2) # a step of darts takes a pass for each of 8 ops
    assert result['updates'] == 10*n_epochs # 500 images in batches of 50
    assert 0 < result['acc_super'] < 1 and result['seconds_train'] > 0
    if space == 'darts':
        assert 'tau' not in result # nobody shares its table
        return
    for metric in ('tau', 'tau_loss', 'sparse_tau', 'sparse_tau_position', 'tau_macs'):
        assert -1 <= result[metric] <= 1
