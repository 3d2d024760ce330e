"Searches that share one storage between processes, and searches that are killed"
import os, signal, time
from collections import Counter

import pytest
from kshot.search import Search
from kshot.space import Block, Space
from processes import Fork

SPACE = Space('toy', tuple(Block(f'b{l}', ('a', 'b', 'c')) for l in range(6))) # 729 paths
WORKER = '''
import sys, time
from kshot.search import search
from kshot.space import Block, Space
folder, name, n, algorithm, storage = sys.argv[1:6]
space = Space('toy', tuple(Block(f'b{l}', ('a', 'b', 'c')) for l in range(6)))
log = open(f'{folder}/{name}.txt', 'a', buffering=1)
def score(path):
    print(space.format(path), file=log)
    time.sleep(.01)
    return sum(path)
search(space, score, int(n), algorithm, costs={'total': sum}, budgets={'total': 5}, storage=storage, progress='bar' in sys.argv)
'''

LARGE = '''
import random, sys
from kshot.search import search
from kshot.space import Block, Space
folder, name, n, algorithm, storage = sys.argv[1:6]
space = Space('large', tuple(Block(f'b{l}', tuple('abcdefghijklm')) for l in range(21))) # 13^21 paths
log = open(f'{folder}/{name}.txt', 'a', buffering=1)
def score(path): print(space.format(path), file=log); return -sum((o-l%13)**2 for l,o in enumerate(path))
search(space, score, int(n), algorithm, costs={'total': sum}, budgets={'total': 90}, storage=storage) # 2 % of the paths
'''

STORAGES = '{}/s.log', 'sqlite:///{}/s.db'

def start(folder, name, n, algorithm='nsga2', *args, storage=STORAGES[0], worker=WORKER):
    return Fork(worker, folder, name, n, algorithm, storage.format(folder), *args)

def finish(worker):
    out,err = worker.communicate(timeout=60)
    assert worker.returncode == 0, err
    return out, err

def scored(folder, name):
    fname = folder/f'{name}.txt'
    return fname.read_text().split() if fname.exists() else []

def told(folder, storage=STORAGES[0]): return Search(SPACE, storage=storage.format(folder)).frame().path.tolist()

def wait_for(condition, worker):
    end = time.time() + 60
    while not condition():
        assert worker.poll() is None, worker.communicate()[1]
        assert time.time() < end
        time.sleep(.005)

@pytest.mark.parametrize('algorithm, storage, n', [('nsga2', STORAGES[0], 160), ('exhaustive', STORAGES[0], 160), ('nsga2', STORAGES[1], 80)])
def test_two_workers_share_a_storage(tmp_path, algorithm, storage, n):
    workers = [start(tmp_path, name, n, algorithm, storage=storage) for name in 'ab']
    for w in workers: finish(w)
    each = [scored(tmp_path, name) for name in 'ab']
    paths = each[0] + each[1]
    assert min(map(len, each)) > 10                            # both worked
    assert len(set(paths)) == len(paths) in (n, n+1)         # no path twice; the second may have been at one when the first was done
    assert sorted(paths) == sorted(told(tmp_path, storage))    # nothing lost
    assert all(sum(SPACE.parse(p)) <= 5 for p in paths)
    assert [list(f.iterdir()) for f in tmp_path.glob('*.locks')] == [[]]

@pytest.mark.parametrize('storage, n, n_workers', [(STORAGES[0], 300, 4), (STORAGES[1], 40, 2)])
def test_workers_in_a_large_space(tmp_path, storage, n, n_workers):
    workers = [start(tmp_path, f'{i}', n, storage=storage, worker=LARGE) for i in range(n_workers)]
    for w in workers: finish(w)
    paths = [p for i in range(n_workers) for p in scored(tmp_path, f'{i}')]
    assert n <= len(paths) < n+n_workers and len(set(paths)) == len(paths) # each may have been at one when the last was done
    assert all(sum(map(int, p.split('-'))) <= 90 for p in paths)

def test_killed_and_resumed(tmp_path):
    for i in range(3): # killed wherever it is: scoring, asking, writing
        worker = start(tmp_path, 'a', 150)
        wait_for(lambda: len(scored(tmp_path, 'a')) >= 30*(i+1), worker)
        time.sleep(.007*i)
        worker.send_signal(signal.SIGKILL); worker.communicate()
        missing = Counter(scored(tmp_path, 'a')) - Counter(told(tmp_path))
        assert missing.total() <= i+1 # of each life the path in work at the end, no finished one
    before, began = told(tmp_path), time.time()
    finish(start(tmp_path, 'a', 150))
    assert time.time()-began < 25     # no lock of the dead is waited for
    assert set(before) < set(told(tmp_path)) and len(told(tmp_path)) == 150
    assert (Counter(scored(tmp_path, 'a')) - Counter(told(tmp_path))).total() <= 3

def test_the_dead_do_not_block_the_living(tmp_path):
    dead = start(tmp_path, 'dead', 1000, 'exhaustive')
    wait_for(lambda: len(scored(tmp_path, 'dead')) > 20, dead)
    living = start(tmp_path, 'living', 1000, 'exhaustive')
    wait_for(lambda: len(scored(tmp_path, 'living')) > 20, living)
    dead.send_signal(signal.SIGKILL); dead.communicate()
    finish(living)
    assert sorted(told(tmp_path)) == sorted(SPACE.format(p) for p in SPACE if sum(p) <= 5) # also what the dead had begun

def test_the_bar_goes_to_standard_error(tmp_path):
    out,err = finish(start(tmp_path, 'a', 20, 'random', 'bar'))
    assert out == '' and '100.00% [20/20' in err
    out,err = finish(start(tmp_path, 'a', 30, 'random'))
    assert out == '' and err == ''

def test_killed_while_it_scores(tmp_path):
    hangs = WORKER.replace('time.sleep(.01)', 'time.sleep(60)')
    dead = start(tmp_path, 'dead', 1, 'exhaustive', storage=STORAGES[1], worker=hangs)
    wait_for(lambda: scored(tmp_path, 'dead'), dead)
    finish(start(tmp_path, 'other', 1, 'exhaustive', storage=STORAGES[1]))
    assert scored(tmp_path, 'other') == ['000001']    # the first path is in work
    dead.send_signal(signal.SIGKILL); dead.communicate()
    finish(start(tmp_path, 'next', 2, 'exhaustive', storage=STORAGES[1]))
    assert scored(tmp_path, 'next') == scored(tmp_path, 'dead') == ['000000'] # and free again
