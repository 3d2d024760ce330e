"Several processes on one machine: what they compute, what they send, and how they end"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from kshot.checkpoint import load_newest, load_tensors
from processes import call_ranks, command

def torchrun(n, *args):
    "A module or, after `-c`, a text in `n` processes of torch's own launcher."
    what = ['--no-python', sys.executable, *args] if args[0] == '-c' else args
    argv = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', *what]
    return subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)

ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')

def launch(n, name, *args): return call_ranks(n, command(name), *args)

def lines(err, word): return [l for l in err.splitlines() if word in l]

FROZEN = '''
import sys
from torch.func import functional_call
from kshot.supernet import Supernet, fresh_stats
def frozen(self, x, path, weights, stats=None): # batch norm in evaluation mode: else each rank has statistics of its own
    return functional_call(self.net.eval(), {**weights, **fresh_stats(self, path)}, (x, path), tie_weights=False)
Supernet.run_with = frozen
'''

FIVE = FROZEN + '''
import torch
from torch import distributed as dist
from kshot.config import Config, make_learner
from kshot.base.distributed import distributed, world
from kshot.checkpoint import save_tensors
from fastai.callback.core import Callback
fname, mode, sampler = sys.argv[1:]
sent, all_reduce, all_gather = [], dist.all_reduce, dist.all_gather
def count(t, *args, **kwargs): sent.append(t.numel()*t.element_size()); return all_reduce(t, *args, **kwargs)
def gather(out, t, *args, **kwargs):
    assert t.numel() == 1 and t.dtype == torch.int64, 'more than a hash was gathered'
    return all_gather(out, t, *args, **kwargs)
dist.all_reduce, dist.all_gather = count, gather
with distributed(timeout=60) as shard:
    learn = make_learner(Config(K=3, bs=160, passes=1, mode=mode, sampler=sampler, warmup=0.), shard)
    learn.model.double(), learn.k_shot.codes.double() # what is left is not rounding
    class Double(Callback):
        order = -6
        def before_batch(self): self.learn.xb = (self.xb[0].double(),)
    paths, sampler = [], learn.k_shot.sampler
    class Spy:
        space = sampler.space
        def __call__(self, progress): paths.append(sampler(progress)); return paths[-1]
    learn.k_shot.sampler = Spy()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=.1, cbs=Double()) # the recorder too sends nothing
    mixed = [sum(t.numel() for p in ps for t in learn.model.weights([p], torch.full((1,3), 1/3, dtype=torch.float64))[0].values()) for ps in paths]
    tensors = {n: t for n,t in learn.model.tensors().items()} | {f'codes.{n}': p for n,p in learn.k_shot.codes.named_parameters()}
    save_tensors(f'{fname}.{world().rank}', tensors, dict(sent=sent, mixed=mixed))
'''

@pytest.mark.parametrize('mode,sampler', [('joint', 'uniform'), ('joint', 'fair'), ('alternate', 'uniform')])
def test_two_ranks_are_one_process_with_the_whole_batch(tmp_path, mode, sampler):
    for n in (1, 2):
        code, out, err = call_ranks(n, FIVE, tmp_path/f'w{n}', mode, sampler)
        assert code == 0, err
    (one,_), (a,meta), (b,_) = (load_tensors(tmp_path/f) for f in ('w1.0', 'w2.0', 'w2.1'))
    for n in one:
        assert a[n].equal(b[n]), f'{n} differs between the ranks'
        assert (a[n] - one[n]).abs().max() <= 1e-9*one[n].abs().max(), n
    if mode == 'joint': # one message a step: the mixed weights of the step's paths, the gradient of their codes, the loss
        n_paths = 5 if sampler == 'fair' else 1
        assert meta['sent'][:5] == [8*(m + 3*n_paths + 1) for m in meta['mixed']]

SMALL = '--K 2 --epochs 4 --passes 10 --bs 200'.split()
@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Folder of runs with one that two ranks have trained, `whole`"
    runs = tmp_path_factory.mktemp('runs')
    p = torchrun(2, '-m', 'kshot.cli.launch', 'train', '--runs', runs, '--name', 'whole', *SMALL)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    assert out.count('whole: epoch 4') == 1
    assert json.loads((runs/'whole/run.json').read_text())['machine']['processes'] == 2
    return runs

def children(p): return [int(c) for c in Path(f'/proc/{p.pid}/task/{p.pid}/children').read_text().split()]

TRAIN = FROZEN + 'from kshot.cli.launch import train; train(sys.argv[1:])'

@pytest.mark.parametrize('rank,again', [(1, 2), (0, 1)])
def test_a_killed_rank_ends_the_job_and_resuming_repairs_it(runs, rank, again):
    name, whole = f'killed_{rank}', 'whole'
    code, begin = command('train'), ['-m', 'kshot.cli.launch', 'train']
    if again == 1: # one process has other batches than two, and only without statistics of a batch is the result the same
        code, begin, whole = TRAIN, ['-c', TRAIN], 'whole_frozen'
        end, _, err = call_ranks(2, code, '--runs', runs, '--name', whole, *SMALL)
        assert end == 0, err
    p = torchrun(2, *begin, '--runs', runs, '--name', name, *SMALL)
    while not (runs/name/'checkpoint/epoch_00002.safetensors').exists() and p.poll() is None: time.sleep(.01)
    os.kill(sorted(children(p))[rank], signal.SIGKILL)
    _, err = p.communicate(timeout=60)
    other = f'kshot_train (rank {1-rank}): rank {1-rank} of 2'
    assert p.returncode and any(l.startswith((f'{other} has lost another process', f'{other} was told to stop')) for l in err.splitlines()), err
    assert f'to go on: as before, -m kshot.cli.launch train --name {name} --runs {runs} --resume' in err
    assert not (runs/name/'checkpoint/epoch_00004.safetensors').exists()
    end, _, err = call_ranks(again, code, '--runs', runs, '--name', name, '--resume')
    assert end == 0, err
    (a, meta_a), (b, meta_b) = load_newest(runs/whole), load_newest(runs/name)
    if again == 2: assert meta_a | {'seconds': meta_b['seconds']} == meta_b and all(a[n].equal(b[n]) for n in a)
    for n in a:
        if n.startswith('weights/'): assert (a[n] - b[n]).abs().max() <= 1e-3*a[n].abs().max(), n
    assert meta_a['sampler'] == meta_b['sampler'] and a['rng/loader'].equal(b['rng/loader'])

def test_scores_do_not_depend_on_the_number_of_processes(runs):
    scores = []
    for n in (1, 2):
        code, out, err = launch(n, 'rank', '--runs', runs, '--name', 'whole', '--n_paths', 12, '--json')
        assert code == 0, err
        scores.append(json.loads(out.splitlines()[-1])['supernet_loss'])
        table = runs/'whole/scores.parquet'
        table.rename(runs/f'scores_{n}.parquet')
    import pandas as pd
    one, two = (pd.read_parquet(runs/f'scores_{n}.parquet') for n in (1, 2))
    pd.testing.assert_frame_equal(one, two, rtol=1e-5)
    assert scores[0] == pytest.approx(scores[1])

def test_ranks_that_draw_differently_stop(tmp_path):
    text = f'''
import os, sys
from kshot import config
plain = config.get_sampler
config.get_sampler = lambda name, space, seed, **kw: plain(name, space, seed + int(os.environ['RANK']), **kw)
from kshot.cli.launch import train
train(['--runs', {str(tmp_path)!r}, *{SMALL!r}])
'''
    code, out, err = call_ranks(2, text)
    assert code and 'ranks differ in path and code, expected one hash of all' in err
    assert len(lines(err, 'ranks differ in path and code')) == 2 and not list(tmp_path.rglob('*.safetensors'))

def test_ranks_that_are_asked_for_different_things_stop(tmp_path):
    text = f'''
import os
from kshot.cli.launch import train
train(['--runs', {str(tmp_path)!r}, '--seed', os.environ['RANK'], *{SMALL!r}])
'''
    code, out, err = call_ranks(2, text)
    assert code and lines(err, 'ranks differ in what they are asked to train') and not list(tmp_path.rglob('*'))

TRACKED = '''
import torch
from fastai.callback.core import Callback
from kshot.config import Config, make_learner
from kshot.base.distributed import distributed, gather
with distributed(timeout=60) as shard:
    learn = make_learner(Config(passes=2, bs=160, track_bn=True), shard)
    means = lambda: torch.cat([m.running_mean for m in learn.model.modules() if getattr(m, 'running_mean', None) is not None])
    class Before(Callback):
        order = learn.k_shot.order - 1
        def after_train(self): self.of = gather(means().tolist())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=.1, cbs=(before := Before()))
    a, b = map(torch.tensor, before.of)
    assert not a.allclose(b) and means().allclose((a + b)/2)
'''

def test_tracked_statistics_are_averaged():
    code, out, err = call_ranks(2, TRACKED)
    assert code == 0, err

def test_a_batch_that_the_processes_cannot_share(tmp_path):
    code, out, err = launch(2, 'train', '--runs', tmp_path, '--bs', 101)
    assert code and 'kshot/launch.py' not in err # no traceback of ours
    assert lines(err, 'kshot_train (rank 0): ')[0].endswith('batch size 101 for 2 ranks, expected a multiple of 2')
    assert not list(tmp_path.rglob('*'))

def test_accelerate_starts_as_many_as_were_asked_for(tmp_path):
    accelerate = [sys.executable, '-m', 'accelerate.commands.launch', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no']
    argv = ['-m', 'kshot.cli.launch', 'train', '--runs', str(tmp_path), *SMALL]
    done = subprocess.run([*accelerate, '--cpu', *argv], capture_output=True, text=True, env=ENV)
    assert done.returncode and 'kshot_train: 1 process started, expected 2 as asked of the launcher' in done.stderr and not list(tmp_path.rglob('*'))
    done = subprocess.run([*accelerate, '--multi_gpu', *argv], capture_output=True, text=True, env=ENV | dict(ACCELERATE_USE_CPU='true'))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path/'run/run.json').read_text())['machine']['processes'] == 2

def test_fastai_distrib_ctx_says_what_to_use():
    text = '''
import torch.distributed as dist, os
from kshot.config import Config, make_learner
from fastai.distributed import *
dist.init_process_group('gloo')
learn = make_learner(Config(K=2, passes=1))
with learn.distrib_ctx(cpu=True), learn.no_bar(), learn.no_logging(): learn.fit(1)
'''
    code, out, err = call_ranks(2, text)
    assert code and 'expected a fit inside kshot.base.distributed.distributed()' in err
