"Searches that share one journal between processes, and searches that are killed"
import os, signal, subprocess, sys, time
from collections import Counter

import pytest
from conftest import ROOT
from kshot.search import Search
from kshot.space import Block, Space

SPACE = Space('toy', tuple(Block(f'b{l}', ('a', 'b', 'c')) for l in range(6))) # 729 paths
WORKER = '''
import sys, time
from kshot.search import search
from kshot.space import Block, Space
folder, name, n, algorithm = sys.argv[1:5]
space = Space('toy', tuple(Block(f'b{l}', ('a', 'b', 'c')) for l in range(6)))
log = open(f'{folder}/{name}.txt', 'a', buffering=1)
def score(path):
    print(space.format(path), file=log)
    time.sleep(.01)
    return sum(path)
search(space, score, int(n), algorithm, costs={'total': sum}, budgets={'total': 5}, storage=f'{folder}/s.log', progress='bar' in sys.argv)
'''

def start(folder, name, n, algorithm='nsga2', *args):
    return subprocess.Popen([sys.executable, '-c', WORKER, str(folder), name, str(n), algorithm, *args],
        env={**os.environ, 'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def finish(worker):
    out,err = worker.communicate(timeout=60)
    assert worker.returncode == 0, err
    return out, err

def scored(folder, name):
    fname = folder/f'{name}.txt'
    return fname.read_text().split() if fname.exists() else []

def told(folder): return Search(SPACE, storage=folder/'s.log').frame().path.tolist()

def wait_for(condition, worker):
    end = time.time() + 60
    while not condition():
        assert worker.poll() is None, worker.communicate()[1]
        assert time.time() < end
        time.sleep(.005)

@pytest.mark.parametrize('algorithm', ['nsga2', 'exhaustive'])
def test_two_workers_share_a_journal(tmp_path, algorithm):
    workers = [start(tmp_path, name, 160, algorithm) for name in 'ab']
    for w in workers: finish(w)
    each = [scored(tmp_path, name) for name in 'ab']
    paths = each[0] + each[1]
    assert min(map(len, each)) > 10                            # both worked
    assert len(set(paths)) == len(paths) in (160, 161)         # no path twice; the second may have been at one when the first was done
    assert sorted(paths) == sorted(told(tmp_path))             # nothing lost
    assert all(sum(SPACE.parse(p)) <= 5 for p in paths)
    assert os.listdir(tmp_path/'s.log.locks') == []

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
