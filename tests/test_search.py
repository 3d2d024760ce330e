"Searches that share a storage between processes, that are killed, and storages that fail"
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from unittest.mock import patch

import optuna
import pytest
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from kshot.base.storage import lock_folder, open_study
from kshot.search import Search, search
from kshot.space import Block, Space
from processes import Fork

SPACE = Space('toy', tuple(Block(f'b{l}', ('a', 'b', 'c')) for l in range(6))) # 729 paths
WORKER = '''
import sys, time
from kshot.base import progress
from kshot.search import search
from kshot.space import Block, Space
progress._EVERY['plain'] = 0 # a line for each path
folder, name, n, algorithm, storage = sys.argv[1:6]
space = Space('toy', tuple(Block(f'b{l}', ('a', 'b', 'c')) for l in range(6)))
log = open(f'{folder}/{name}.txt', 'a', buffering=1)
def score(path):
    print(space.format(path), file=log)
    time.sleep(.01)
    return sum(path)
search(space, score, int(n), algorithm, costs={'total': sum}, budgets={'total': 5}, storage=storage,
       progress='bar' in sys.argv)
'''

LARGE = '''
import random, sys
from kshot.search import search
from kshot.space import Block, Space
folder, name, n, algorithm, storage = sys.argv[1:6]
space = Space('large', tuple(Block(f'b{l}', tuple('abcdefghijklm')) for l in range(21))) # 13^21 paths
log = open(f'{folder}/{name}.txt', 'a', buffering=1)
def score(path):
    print(space.format(path), file=log)
    return -sum((o-l%13)**2 for l,o in enumerate(path))
budgets = {'total': 90} # 2 % of the paths
search(space, score, int(n), algorithm, costs={'total': sum}, budgets=budgets, storage=storage)
'''

JOURNAL = '{}/s.log'
SQLITE = 'sqlite:///{}/s.db'

def start(folder, name, n, algorithm='nsga2', *args, storage=JOURNAL, worker=WORKER):
    return Fork(worker, folder, name, n, algorithm, storage.format(folder), *args)

def finish(worker):
    out, err = worker.communicate(timeout=60)
    assert worker.returncode == 0, err
    return out, err

def kill(worker):
    worker.send_signal(signal.SIGKILL)
    worker.communicate()

def started(folder, name): # paths that a worker began to score
    fname = folder/f'{name}.txt'
    return fname.read_text().split() if fname.exists() else []

def recorded(folder, storage=JOURNAL):
    return Search(SPACE, storage=storage.format(folder)).frame().path.tolist()

def lost(folder): # paths that were begun and not recorded
    return (Counter(started(folder, 'a')) - Counter(recorded(folder))).total()

def wait_for(condition, worker):
    end = time.time() + 60
    while not condition():
        assert worker.poll() is None, worker.communicate()[1]
        assert time.time() < end
        time.sleep(.005)

CASES = [('nsga2', JOURNAL, 160), ('exhaustive', JOURNAL, 160), ('nsga2', SQLITE, 80)]

@pytest.mark.parametrize('algorithm, storage, n', CASES)
def test_two_workers_share_a_storage(tmp_path, algorithm, storage, n):
    workers = [start(tmp_path, name, n, algorithm, storage=storage) for name in 'ab']
    for w in workers: finish(w)
    by_worker = [started(tmp_path, name) for name in 'ab']
    paths = by_worker[0] + by_worker[1]
    assert min(map(len, by_worker)) > 10 # both worked
    assert len(set(paths)) == len(paths) # no path twice
    assert len(paths) in (n, n+1)        # the second may have been at one when the first was done
    assert sorted(paths) == sorted(recorded(tmp_path, storage)) # nothing lost
    assert all(sum(SPACE.parse(p)) <= 5 for p in paths)
    assert [list(f.iterdir()) for f in tmp_path.glob('*.locks')] == [[]]

@pytest.mark.parametrize('storage, n, n_workers', [(JOURNAL, 300, 4), (SQLITE, 40, 2)])
def test_workers_in_a_large_space(tmp_path, storage, n, n_workers):
    names = [f'{i}' for i in range(n_workers)]
    workers = [start(tmp_path, name, n, storage=storage, worker=LARGE) for name in names]
    for w in workers: finish(w)
    paths = sum((started(tmp_path, name) for name in names), [])
    assert n <= len(paths) < n+n_workers # each may have been at one when the last was done
    assert len(set(paths)) == len(paths)
    assert all(sum(map(int, p.split('-'))) <= 90 for p in paths)

def test_killed_and_resumed(tmp_path):
    for i in range(3): # killed wherever it is: scoring, asking, writing
        worker = start(tmp_path, 'a', 150)
        wait_for(lambda: len(started(tmp_path, 'a')) >= 30*(i+1), worker)
        time.sleep(.007*i)
        kill(worker)
        assert lost(tmp_path) <= i+1 # each life lost the path in work, and no finished one
    before = recorded(tmp_path)
    began = time.time()
    finish(start(tmp_path, 'a', 150))
    assert time.time()-began < 25 # nobody waits for a lock of the dead
    after = recorded(tmp_path)
    assert set(before) < set(after) and len(after) == 150
    assert lost(tmp_path) <= 3

def test_the_dead_do_not_block_the_living(tmp_path):
    dead = start(tmp_path, 'dead', 1000, 'exhaustive')
    wait_for(lambda: len(started(tmp_path, 'dead')) > 20, dead)
    living = start(tmp_path, 'living', 1000, 'exhaustive')
    wait_for(lambda: len(started(tmp_path, 'living')) > 20, living)
    kill(dead)
    finish(living)
    allowed = [SPACE.format(p) for p in SPACE if sum(p) <= 5]
    assert sorted(recorded(tmp_path)) == sorted(allowed) # also what the dead had begun

def test_the_bar_goes_to_standard_error(tmp_path):
    out, err = finish(start(tmp_path, 'a', 20, 'random', 'bar'))
    assert out == '' and 'scoring paths: 20 of 20, ' in err and '\r' not in err
    out, err = finish(start(tmp_path, 'a', 30, 'random'))
    assert out == '' and err == ''

def test_killed_while_it_scores(tmp_path):
    hangs = WORKER.replace('time.sleep(.01)', 'time.sleep(60)')
    dead = start(tmp_path, 'dead', 1, 'exhaustive', storage=SQLITE, worker=hangs)
    wait_for(lambda: started(tmp_path, 'dead'), dead)
    finish(start(tmp_path, 'other', 1, 'exhaustive', storage=SQLITE))
    assert started(tmp_path, 'other') == ['000001'] # the first path is in work
    kill(dead)
    finish(start(tmp_path, 'next', 2, 'exhaustive', storage=SQLITE))
    assert started(tmp_path, 'next') == started(tmp_path, 'dead') == ['000000'] # and free again

# storages, in one process

TOY = Space('toy', tuple(Block(f'b{l}', ('a', 'b', 'c', 'd')) for l in range(3)))
ODD = Space('odd', TOY.blocks, is_valid=lambda p: p[0] != p[1])

def near(path): return -sum((o-l)**2 for l,o in enumerate(path))

class BreaksAt:
    "A score that fails at its `n`-th call, once, and remembers its paths."
    def __init__(self, n):
        self.n = n
        self.paths = []
    def __call__(self, path):
        if len(self.paths)+1 == self.n:
            self.n = None
            raise RuntimeError('power cut')
        self.paths.append(path)
        return near(path)

def test_a_database_keeps_a_search(tmp_path):
    kwargs = dict(costs=dict(total=sum), budgets=dict(total=6), storage=f'sqlite:///{tmp_path}/new/s.db')
    score = BreaksAt(7)
    with pytest.raises(RuntimeError, match='power cut'): search(TOY, score, 20, **kwargs)
    frame = search(TOY, score, 12, **kwargs)
    assert len(frame) == len(score.paths) == len(set(score.paths)) == 12
    assert frame.equals(Search(TOY, **kwargs).frame())
    assert sorted(os.listdir(tmp_path/'new')) == ['s.db', 's.db.locks']
    assert os.listdir(tmp_path/'new'/'s.db.locks') == []
    with pytest.raises(ValueError, match='has space toy, expected odd'): search(ODD, near, 9, **kwargs)

def test_locks_in_a_folder_of_their_own(tmp_path):
    kwargs = dict(storage=f'sqlite:///{tmp_path}/s.db', locks=tmp_path/'locks')
    a, b = Search(TOY, **kwargs), Search(TOY, **kwargs)
    assert a.take((0, 0, 1)) and not b.take((0, 0, 1))
    assert os.listdir(tmp_path/'locks')

def error_of(storage, **kwargs):
    with pytest.raises(ValueError) as e: search(TOY, near, 2, storage=storage, **kwargs)
    assert '\n' not in str(e.value)
    return str(e.value)

def test_what_is_wrong_with_a_storage_fits_one_line(tmp_path):
    (tmp_path/'file').write_text('no database')
    assert 'NotADirectoryError' in error_of(tmp_path/'file'/'s.log')
    assert 'NotADirectoryError' in error_of(tmp_path/'s.log', locks=tmp_path/'file'/'x')
    assert 'IsADirectoryError' in error_of(tmp_path, locks=tmp_path/'locks')
    assert 'file is not a database' in error_of(f'sqlite:///{tmp_path}/file')
    assert 'unable to open' in error_of(f'sqlite:///{tmp_path}/none/s.db', locks=tmp_path)

URLS = ['nosuch://me:secret@host/db', 'postgresql://me:secret@host:port/db',
        'postgresql+nosuch://me:secret@host/db', '://secret']

@pytest.mark.parametrize('url', URLS)
def test_an_error_shows_no_password(url):
    text = error_of(url)
    assert 'secret' not in text and '://*** cannot be used' in text

def test_a_missing_driver_is_named(monkeypatch):
    for name in ('psycopg', 'psycopg2'): monkeypatch.setitem(sys.modules, name, None)
    assert 'pip install "psycopg[binary]"' in error_of('postgresql://me:secret@host/db')
    assert 'expected postgresql+psycopg://' in error_of('postgres://me:secret@host/db')

@pytest.fixture
def postgres(monkeypatch):
    "URL of an empty database of a server of its own; the password is in a file."
    pytest.importorskip('psycopg', reason='needs psycopg')
    if not shutil.which('pg_ctl'): pytest.skip('needs the programs of a PostgreSQL server')
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        user = dict(user='nobody') if os.getuid() == 0 else {} # the server refuses to run as root
        if user: shutil.chown(folder, **user)
        (folder/'password').write_text('secret')
        (folder/'pgpass').write_text('*:*:*:kshot:secret')
        (folder/'pgpass').chmod(0o600)
        env = os.environ | dict(HOME=name, LC_ALL='C')
        def run(program, *args):
            command = [program, '-D', folder/'data', *args]
            subprocess.run(command, check=True, cwd=folder, env=env, stdout=subprocess.DEVNULL, **user)
        run('initdb', '-U', 'kshot', '-E', 'UTF8', '-A', 'scram-sha-256', '--pwfile', folder/'password')
        run('pg_ctl', 'start', '-w', '-l', folder/'log', '-o', f'-k {folder} -c listen_addresses=')
        monkeypatch.setenv('PGPASSFILE', f'{folder}/pgpass')
        yield f'postgresql+psycopg://kshot@/postgres?host={folder}'
        run('pg_ctl', 'stop', '-m', 'immediate')

@pytest.mark.slow
def test_a_server(postgres, tmp_path, monkeypatch):
    "Workers start together on an empty database; one is killed, and goes on."
    together = Barrier(4)
    def open_one(_):
        together.wait()
        return open_study(postgres, None, 'first', ['maximize'], dict(space='toy'))
    with ThreadPoolExecutor(4) as pool: studies = [*pool.map(open_one, range(4))]
    assert len({study._study_id for study in studies}) == 1
    workers = [start(tmp_path, name, 20, 'random', storage=postgres) for name in 'ab']
    wait_for(lambda: started(tmp_path, 'a'), workers[0])
    kill(workers[0])
    finish(workers[1])
    finish(start(tmp_path, 'a', 25, 'random', storage=postgres))
    rows = search(SPACE, sum, 20, costs={'total': sum}, budgets={'total': 5}, storage=postgres)
    assert len(rows) >= 25 and rows.path.is_unique
    assert (rows.score == rows.path.map(lambda path: sum(map(int, path)))).all()
    monkeypatch.delenv('PGPASSFILE')
    assert 'no password supplied' in error_of(postgres)
    text = error_of(postgres.replace('kshot@', 'kshot:mistake@'))
    assert 'password authentication failed' in text and 'mistake' not in text
    text = error_of(postgres.replace('/postgres?', '/absent?').replace('kshot@', 'kshot:secret@'))
    assert 'database "absent" does not exist' in text

def test_workers_without_locks(tmp_path):
    "As on a server without `locks`: workers have streams of their own; a path that both score counts once."
    a, b = [Search(TOY, storage=f'sqlite:///{tmp_path}/s.db') for _ in range(2)]
    a.locks = b.locks = None
    def score_with_b(path):
        b.run(near, b.n_done+1, 'exhaustive') # the same path at the same time
        return near(path)
    a.run(score_with_b, 6, 'exhaustive')
    assert [len(a.frame()), len(a.record.trials)] == [6, 6]

    wide = Space('wide', tuple(Block(f'b{l}', tuple('abcde')) for l in range(10)))
    a, b = [Search(wide, storage=f'sqlite:///{tmp_path}/s.db', name=name) for name in 'ab']
    a.locks = b.locks = None
    assert set(a.run(sum, 5).path) != set(b.run(sum, 5).path)

def test_a_torn_last_line_is_dropped(tmp_path):
    log = tmp_path/'s.log'
    search(TOY, near, 9, storage=log)
    whole = log.read_bytes()
    log.write_bytes(whole[:-30])
    assert len(search(TOY, near, 8, storage=log)) == 8
    assert log.read_bytes() == whole[:whole[:-1].rfind(b'\n')+1]

@pytest.mark.parametrize('text', [b'path,score\n', b'{"op_code":0}\nnothing\n{"op_code":0}\n'])
def test_a_file_of_something_else_stays_as_it_is(tmp_path, text):
    log = tmp_path/'s.log'
    log.write_bytes(text)
    with pytest.raises(ValueError, match='expected a journal file'): search(TOY, near, 9, storage=log)
    assert log.read_bytes() == text

# studies of others

def opened(storage):
    return RDBStorage(storage) if '://' in storage else JournalStorage(JournalFileBackend(storage))

def content(storage): # all that is in it
    if '://' in storage: return [*sqlite3.connect(storage.removeprefix('sqlite:///')).iterdump()]
    with open(storage, 'rb') as f: return f.read()

def finish_two(study): study.optimize(lambda trial: trial.suggest_float('x', 0, 1), n_trials=2)

ABOUT = dict(space='toy', blocks=[[f'b{l}', 'a', 'b', 'c'] for l in range(6)], tradeoff=[])
FOREIGN = { # what makes a study somebody else's
    'finished': finish_two, 'running': lambda study: study.ask(),
    'waiting': lambda study: study.enqueue_trial({'x': 1}),
    'attributes': lambda study: study.set_user_attr('owner', 'me'),
    'about words': lambda study: study.set_user_attr('about', 'my nets'),
    'about nothing': lambda study: study.set_user_attr('about', None),
    'about less': lambda study: study.set_user_attr('about', dict(space='toy')),
    'about more': lambda study: study.set_user_attr('about', ABOUT | dict(owner='me'))}

@pytest.mark.parametrize('kind', FOREIGN)
@pytest.mark.parametrize('storage', [JOURNAL, SQLITE])
def test_a_study_of_somebody_else_stays_as_it_is(kind, storage, tmp_path):
    storage = storage.format(tmp_path)
    FOREIGN[kind](optuna.create_study(storage=opened(storage), study_name='search', direction='maximize'))
    before = content(storage)
    assert 'is about something else: it has' in error_of(storage)
    assert content(storage) == before
    other = Search(SPACE, storage=storage, name='other')
    assert other.run(sum, 3).equals(Search(SPACE, storage=storage, name='other').frame())
    assert len(search(SPACE, sum, 3, storage=f'{tmp_path}/new.log')) == 3

@pytest.mark.parametrize('directions', [['minimize'], ['maximize']*2])
def test_a_study_of_other_directions(directions, tmp_path):
    storage = JOURNAL.format(tmp_path)
    optuna.create_study(storage=opened(storage), study_name='search', directions=directions)
    before = content(storage)
    assert f"it has directions {directions}, expected ['maximize']" in error_of(storage)
    assert content(storage) == before

def test_a_line_that_somebody_else_is_writing(tmp_path):
    "A torn last line is dropped before the first write, not before a study is refused."
    storage = JOURNAL.format(tmp_path)
    finish_two(optuna.create_study(storage=opened(storage), study_name='search'))
    with open(storage, 'ab') as f: f.write(b'{"op_code":4,"wor')
    before = content(storage)
    assert 'is about something else' in error_of(storage)
    assert content(storage) == before
    assert len(search(SPACE, sum, 3, storage=storage, name='other')) == 3

STEPS = 'optuna.create_study', 'optuna.Study.get_trials', 'optuna.Study.set_user_attr'

@pytest.mark.parametrize('function', STEPS)
@pytest.mark.parametrize('after', [False, True])
@pytest.mark.parametrize('storage', [JOURNAL, SQLITE])
def test_workers_that_open_a_new_study_at_the_same_moment(function, after, storage, tmp_path):
    "Another worker opens it and scores a path just before or after each step of this one."
    storage = storage.format(tmp_path)
    args = storage, lock_folder(storage, None), 'one', ['maximize'], ABOUT
    calls = []
    owner, name = (optuna.Study if 'Study' in function else optuna), function.rpartition('.')[2]
    real = getattr(owner, name)
    def work():
        calls.append(name)
        if len(calls) > 1: return
        study = open_study(*args)
        study.tell(study.ask(), 1.)
    def step(*args, **kwargs):
        if not after: work()
        out = real(*args, **kwargs)
        if after: work()
        return out
    with patch.object(owner, name, step): study = open_study(*args)
    assert calls and study.user_attrs == dict(about=ABOUT) and study.best_value == 1
    study.tell(study.ask(), 2.)
    assert len(open_study(*args).trials) == 2
