"Several processes on one machine: what they compute, what they send, and how they end"
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from kshot.checkpoint import load_newest, load_tensors
from processes import call_ranks, command, free_port

ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')

def torchrun(n, *args):
    "Start a module or, after `-c`, a text in `n` processes of torch's own launcher."
    argv = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}']
    if args[0] == '-c': argv += ['--no-python', sys.executable]
    argv += map(str, args)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(argv, text=True, env=ENV, **pipes)

def launch(n, name, *args): return call_ranks(n, command(name), *args)

def lines(err, word): return [line for line in err.splitlines() if word in line]

# batch norm in evaluation mode: otherwise each rank would have statistics of its own
FROZEN = '''
import sys
from kshot.supernet import Supernet, fresh_stats
def frozen(self, x, path, weights, stats=None):
    self.net.eval()
    return self.lender.run(x, path, weights, fresh_stats(self, path))
Supernet.run_with = frozen
'''

# a few steps in double precision, so that what is left is not rounding; counts what ranks send
FEW_STEPS = FROZEN + '''
import torch
from torch import distributed as dist
from fastai.callback.core import Callback
from kshot.base.distributed import distributed, world
from kshot.checkpoint import save_tensors
from kshot.config import Config, make_learner

fname, mode, sampler, branch = sys.argv[1:]
sent, all_reduce, all_gather = [], dist.all_reduce, dist.all_gather
def count(t, *args, **kwargs):
    sent.append(t.numel()*t.element_size())
    return all_reduce(t, *args, **kwargs)
def gather(out, t, *args, **kwargs):
    assert t.numel() == 1 and t.dtype == torch.int64, 'more than a hash was gathered'
    return all_gather(out, t, *args, **kwargs)
dist.all_reduce, dist.all_gather = count, gather

class Double(Callback):
    order = -6
    def before_batch(self): self.learn.xb = (self.xb[0].double(),)

class Spy: # notes the paths of each step
    def __init__(self, sampler):
        self.sampler, self.space = sampler, sampler.space
        self.steps = []
    def __call__(self, progress):
        self.steps.append(self.sampler(progress))
        return self.steps[-1]

with distributed(timeout=60) as shard:
    more = dict(distill=True, ema=.9) if sampler == 'sandwich' else {}
    config = Config(K=3, bs=160, passes=1, mode=mode, sampler=sampler, warmup=0.,
                    branch=branch, **more)
    learn = make_learner(config, shard)
    learn.model.double()
    learn.k_shot.codes.double()
    learn.k_shot.sampler = spy = Spy(learn.k_shot.sampler)
    with learn.no_bar(), learn.no_logging(): # the recorder sends nothing either
        learn.fit(1, lr=.1, cbs=Double())
    code, mixed = torch.full((1,3), 1/3, dtype=torch.float64), []
    for paths in spy.steps:
        weights = [w for path in paths for w in learn.model.weights([path], code)]
        mixed.append(sum(t.numel() for w in weights for t in w.values()))
    codes = {f'codes.{name}': p for name,p in learn.k_shot.codes.named_parameters()}
    tensors = learn.model.tensors() | codes
    save_tensors(f'{fname}.{world().rank}', tensors, dict(sent=sent, mixed=mixed))
'''

MODES = [('joint', 'uniform'), ('joint', 'fair'), ('joint', 'sandwich'), ('alternate', 'uniform')]
@pytest.mark.parametrize('mode,sampler', MODES)
@pytest.mark.parametrize('branch', ['', '0.5'])
def test_two_ranks_are_one_process_with_the_whole_batch(tmp_path, mode, sampler, branch):
    for n in (1, 2):
        code, out, err = call_ranks(n, FEW_STEPS, tmp_path/f'w{n}', mode, sampler, branch)
        assert code == 0, err
    (one,_), (a,meta), (b,_) = (load_tensors(tmp_path/name) for name in ('w1.0', 'w2.0', 'w2.1'))
    for name in one:
        assert a[name].equal(b[name]), f'{name} differs between the ranks'
        assert (a[name] - one[name]).abs().max() <= 1e-9*one[name].abs().max(), name
    if mode == 'alternate': return
    # one message a step: the mixed weights of its paths, the loss, the gradient of their codes if they learn
    n_paths = dict(fair=5, sandwich=4).get(sampler, 1)
    in_codes = [3*n_paths]*5 if not branch else [0]*3 + [3*n_paths]*2
    expected = [8*(n_mixed + n_code + 1) for n_mixed,n_code in zip(meta['mixed'], in_codes)]
    assert meta['sent'][:5] == expected

SMALL = '--K 2 --epochs 4 --passes 10 --bs 200'.split()

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Return a folder of runs with one that two ranks have trained, `whole`."
    runs = tmp_path_factory.mktemp('runs')
    p = torchrun(2, '-m', 'kshot', 'train', '--runs', runs, '--name', 'whole', *SMALL)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    assert out.count('whole: 4 epochs, ') == 1
    assert json.loads((runs/'whole/run.json').read_text())['machine']['processes'] == 2
    return runs

def children(p):
    "Return the ids of a process's children."
    return sorted(map(int, Path(f'/proc/{p.pid}/task/{p.pid}/children').read_text().split()))

def kill_after_two_epochs(p, rank, run):
    "Kill one rank of a job as soon as it has two checkpoints; return its standard error."
    second = run/'checkpoint/epoch_00002.safetensors'
    while not second.exists() and p.poll() is None: time.sleep(.01)
    os.kill(children(p)[rank], signal.SIGKILL)
    return p.communicate(timeout=60)[1]

TRAIN_FROZEN = FROZEN + 'from kshot.cli.launch import train; train(sys.argv[1:])'

@pytest.mark.parametrize('rank,n_resumed', [(1, 2), (0, 1)])
def test_a_killed_rank_ends_the_job_and_resuming_repairs_it(runs, rank, n_resumed):
    name, whole = f'killed_{rank}', 'whole'
    code, start = command('train'), ['-m', 'kshot', 'train']
    if n_resumed == 1: # has other batches than two: equal only without statistics of a batch
        code, start, whole = TRAIN_FROZEN, ['-c', TRAIN_FROZEN], 'whole_frozen'
        end, _, err = call_ranks(2, code, '--runs', runs, '--name', whole, *SMALL)
        assert end == 0, err
    p = torchrun(2, *start, '--runs', runs, '--name', name, *SMALL)
    err = kill_after_two_epochs(p, rank, runs/name)
    assert p.returncode
    other = f'kshot train (rank {1-rank}): rank {1-rank} of 2'
    endings = f'{other} has lost another process', f'{other} was told to stop'
    assert any(line.startswith(endings) for line in err.splitlines()), err
    again = f'-m kshot train {name} --runs {runs} --resume'
    assert f'to resume: as before, {again}' in err
    assert not (runs/name/'checkpoint/epoch_00004.safetensors').exists()
    end, _, err = call_ranks(n_resumed, code, '--runs', runs, '--name', name, '--resume')
    assert end == 0, err
    check_same_run(load_newest(runs/whole), load_newest(runs/name), to_the_bit=n_resumed == 2)

def check_same_run(a, b, to_the_bit):
    "Compare two checkpoints."
    (a, meta_a), (b, meta_b) = a, b
    if to_the_bit:
        assert meta_a | dict(seconds=0) == meta_b | dict(seconds=0)
        for name in a: assert a[name].equal(b[name]), name
    for name in a:
        if not name.startswith('weights/'): continue
        assert (a[name] - b[name]).abs().max() <= 1e-3*a[name].abs().max(), name
    assert meta_a['sampler'] == meta_b['sampler'] and a['rng/loader'].equal(b['rng/loader'])

def test_scores_do_not_depend_on_the_number_of_processes(runs):
    scores, tables = [], []
    for n in (1, 2):
        args = '--runs', runs, '--name', 'whole', '--n_paths', 12, '--json'
        code, out, err = launch(n, 'rank', *args)
        assert code == 0, err
        scores.append(json.loads(out.splitlines()[-1])['supernet_loss'])
        tables.append(pd.read_parquet(runs/'whole/scores.parquet'))
        (runs/'whole/scores.parquet').unlink()
    pd.testing.assert_frame_equal(*tables, rtol=1e-5)
    assert scores[0] == pytest.approx(scores[1])

def test_ranks_that_draw_differently_stop(tmp_path):
    text = f'''
import os, sys
from kshot import config
plain = config.get_sampler
def differ(name, space, seed, **kw): return plain(name, space, seed + int(os.environ['RANK']), **kw)
config.get_sampler = differ
from kshot.cli.launch import train
train(['--runs', {str(tmp_path)!r}, *{SMALL!r}])
'''
    code, out, err = call_ranks(2, text)
    assert code and 'ranks differ in path and code, expected one hash of all' in err
    assert len(lines(err, 'ranks differ in path and code')) == 2
    assert not list(tmp_path.rglob('*.safetensors'))

def test_ranks_that_are_asked_for_different_things_stop(tmp_path):
    text = f'''
import os
from kshot.cli.launch import train
train(['--runs', {str(tmp_path)!r}, '--seed', os.environ['RANK'], *{SMALL!r}])
'''
    code, out, err = call_ranks(2, text)
    assert code and lines(err, 'ranks differ in what they are asked to train')
    assert not list(tmp_path.rglob('*'))

TRACKED = '''
import torch
from fastai.callback.core import Callback
from kshot.base.distributed import distributed, gather
from kshot.config import Config, make_learner

def means(model):
    tracked = [getattr(m, 'running_mean', None) for m in model.modules()]
    return torch.cat([mean for mean in tracked if mean is not None])

with distributed(timeout=60) as shard:
    learn = make_learner(Config(passes=2, bs=160, track_bn=True), shard)
    class Before(Callback): # they are averaged
        order = learn.k_shot.order - 1
        def after_train(self): self.of_ranks = gather(means(self.model).tolist())
    before = Before()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=.1, cbs=before)
    a, b = map(torch.tensor, before.of_ranks)
    assert not a.allclose(b) and means(learn.model).allclose((a + b)/2)
'''

def test_tracked_statistics_are_averaged():
    code, out, err = call_ranks(2, TRACKED)
    assert code == 0, err

def test_a_batch_that_the_processes_cannot_share(tmp_path):
    code, out, err = launch(2, 'train', '--runs', tmp_path, '--bs', 101)
    assert code and 'Traceback' not in err
    message = 'batch size 101 for 2 ranks, expected a multiple of 2'
    assert lines(err, 'kshot train (rank 0): ')[0].endswith(message)
    assert not list(tmp_path.rglob('*'))

def test_accelerate_starts_as_many_as_were_asked_for(tmp_path):
    accelerate = [sys.executable, '-m', 'accelerate.commands.launch', '--num_processes', '2',
                  '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no',
                  '--main_process_port', str(free_port())]
    argv = ['-m', 'kshot', 'train', '--runs', str(tmp_path), *SMALL]
    options = dict(capture_output=True, text=True)
    done = subprocess.run([*accelerate, '--cpu', *argv], env=ENV, **options)
    assert done.returncode and not list(tmp_path.rglob('*'))
    assert 'kshot train: 1 process started, expected 2 as asked of the launcher' in done.stderr
    env = ENV | dict(ACCELERATE_USE_CPU='true')
    done = subprocess.run([*accelerate, '--multi_gpu', *argv], env=env, **options)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path/'run/run.json').read_text())['machine']['processes'] == 2
