"Processes that train the candidates of a search on together, and are killed"
import signal
from collections import Counter
from functools import partial

import pandas as pd
import pytest

from kshot.refine import Refinement
from kshot.search import Search
from kshot.space import Block, Space
from processes import Fork

SPACE = Space('toy', tuple(Block(f'b{l}', ('a', 'b', 'c')) for l in range(5)))
WORKER = '''
import sys, time
from kshot.refine import Refinement
from kshot.search import Search
from kshot.space import Block, Space
storage, log, seconds = sys.argv[1:]
space = Space('toy', tuple(Block(f'b{l}', ('a', 'b', 'c')) for l in range(5)))
def score(path, n_steps):
    with open(log, 'a', buffering=1) as f: print(space.format(path), n_steps, file=f)
    time.sleep(float(seconds))
    return sum(path) + (hash(path + (n_steps,)) % 97)/97
Refinement(Search(space, storage=storage), 20).run(score)
'''

def score(path, n_steps): return sum(path) + (hash(path + (n_steps,)) % 97)/97

def searched(storage=None):
    search = Search(SPACE, storage=storage)
    search.run(partial(score, n_steps=0), 60, 'random')
    return search

def start(storage, log, seconds): return Fork(WORKER, storage, log, seconds)

def finish(worker):
    _, err = worker.communicate(timeout=60)
    assert worker.returncode == 0, err

def begun(*logs): # every scoring that a worker began
    return [line for log in logs if log.exists() for line in log.read_text().splitlines()]

@pytest.mark.parametrize('storage', ['{}/s.log', 'sqlite:///{}/s.db'])
def test_two_processes_equal_one(storage, tmp_path):
    storage = storage.format(tmp_path)
    searched(storage)
    logs = tmp_path/'a', tmp_path/'b'
    workers = [start(storage, log, .02) for log in logs]
    for w in workers: finish(w)
    assert all(map(begun, logs)) # both worked
    assert set(Counter(begun(*logs)).values()) == {1} and len(begun(*logs)) == 20+7+3
    def nothing_left(*_, **__): raise AssertionError
    shared = Refinement(Search(SPACE, storage=storage), 20).run(nothing_left)
    pd.testing.assert_frame_equal(shared, Refinement(searched(), 20).run(score))

@pytest.mark.parametrize('n', [5, 21, 28]) # in each of the rungs
def test_a_killed_process_holds_up_nobody(n, tmp_path):
    storage = f'{tmp_path}/s.log'
    searched(storage)
    dead, log = tmp_path/'dead', tmp_path/'living'
    worker = start(storage, dead, .02)
    while len(begun(dead)) < n: assert worker.poll() is None
    living = start(storage, log, 0)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    finish(living)
    twice = Counter(begun(dead, log)).total() - (20+7+3)
    assert twice in (0, 1) # the one that it was at
    assert len(set(begun(dead, log))) == 20+7+3
