"Paths that are trained on: what an end in the middle leaves, and what the same call makes of it"
import json
import shutil

import pandas as pd
import pytest

from kshot.base.files import StopSignal
from kshot.config import Config
from kshot.finetune import FineTuning
from kshot.jobs import gaps_run, search_run
from kshot.runs import train_run

@pytest.fixture(scope='module')
def trained(tmp_path_factory): # supernets that have split
    folder = tmp_path_factory.mktemp('trained')/'run'
    train_run(Config(K=2, epochs=2, passes=1, branch='0.5'), folder, progress=False)
    return folder

def gaps(folder):
    words = gaps_run(folder, dict(table='digits'), n_paths=4, steps=(1, 3)).words
    return words, pd.read_parquet(folder/'gaps.parquet').to_json()

def refined(folder):
    search_run(folder, 12, 'random', refine=6)
    best = json.loads((folder/'run.json').read_text())['results']['search']
    best['refined'].pop('seconds')
    return best

RUN = FineTuning.run

def ending(n, error, calls): # at the n-th time that a path is trained on
    def run(self, n_steps):
        calls.append(self.path)
        if len(calls) == n: raise error
        return RUN(self, n_steps)
    return run

@pytest.fixture(scope='module', params=[gaps, refined])
def job(request, trained): # with what it returns if nothing ends it, and what it trains
    calls = []
    folder = trained.parent/request.param.__name__
    shutil.copytree(trained, folder)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(FineTuning, 'run', ending(0, None, calls))
        return request.param, request.param(folder), calls

@pytest.mark.parametrize('n,error', [(1, KeyboardInterrupt('Ctrl-C')), (5, StopSignal('told to stop')),
                                     (8, OSError('no space left'))], ids=str)
def test_the_same_call_finishes_what_was_begun(job, n, error, trained, tmp_path, monkeypatch):
    run, expected, of_whole = job
    folder = tmp_path/'run'
    shutil.copytree(trained, folder)
    calls = []
    with monkeypatch.context() as m:
        m.setattr(FineTuning, 'run', ending(n, error, calls))
        with pytest.raises(type(error)): run(folder)
        m.setattr(FineTuning, 'run', ending(0, None, calls))
        again = run(folder)
    assert again == expected
    assert len(calls) - len(of_whole) <= 3 # no more than the path that was interrupted
