"""A GPU that is not there: torch's meta device has shapes and no numbers.

A dispatch mode makes it as strict as a GPU: tensors of two devices never meet, and each time that the
host would wait is counted: for a number that it asks for, or for a copy of its own numbers to get there.

The last part needs a real GPU. Its tests run on the CPU too, where they show that they work.
"""
import json
import subprocess
from contextlib import nullcontext
from dataclasses import replace

import gpu as gpu_script
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import kshot.data
import kshot.train
from kshot.base.distributed import World
from kshot.benchmark import BENCHMARKS, get_benchmark, get_space, register
from kshot.cli.doctor import Finding
from kshot.config import Config, make_learner
from kshot.data import TensorLoader, digits_data, digits_splits, held, loaders
from kshot.folders import read_run
from kshot.evaluate import accuracy_loss, recalibrate_bn, score_paths
from kshot.latency import measure_latency
from kshot.networks import digits_net, subnet
from kshot.retrain import get_recipe, retrain
from kshot.search import search
from kshot.train import SkipValidation, cosine, kshot_learner, train_alone
from test_distributed import SMALL as SMALL_RUN
from test_distributed import torchrun

aten = torch.ops.aten

def is_read(func, kwargs): # does the host ask for numbers?
    is_copy_to_host = func is aten._to_copy.default and str(kwargs.get('device')) == 'cpu'
    return func is aten._local_scalar_dense.default or is_copy_to_host

def is_sent(func, args, kwargs): # does the host wait until its numbers are copied?
    if func is aten.lift_fresh.default: return args[0].is_meta # `torch.tensor(numbers, device=...)`
    if func is aten._to_copy.default:
        is_there = str(kwargs.get('device')) == 'meta' and not args[0].is_meta
        return is_there and not kwargs.get('non_blocking')
    return func is aten.copy_.default and args[0].is_meta > args[1].is_meta and not any(args[2:])

class StrictDevice(TorchDispatchMode):
    "Raise where tensors of two devices meet, and count how often the host waits."
    n_reads = 0 # for an answer
    n_sent = 0  # for a copy
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [o for o in tree_leaves((args, kwargs)) if isinstance(o, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.ndim} # numbers of the host may go anywhere
        self.n_sent += is_sent(func, args, kwargs)
        if is_read(func, kwargs):
            if tensors[0].is_meta:
                self.n_reads += 1
                args = (torch.full(tensors[0].shape, .5).to(tensors[0].dtype),)
                if tensors[0].ndim == 2: args[0][:,-1] = 0 # the sums of a score: no target is wrong
        elif len(devices) > 1 and func is not aten.copy_.default:
            raise RuntimeError(f'{func} of tensors on {sorted(devices)}')
        return func(*args, **kwargs)

@pytest.fixture
def gpu(monkeypatch):
    "Yield a world with a GPU."
    generator, sgd = torch.Generator, torch.optim.SGD
    def cpu_generator(device='cpu'): return generator()
    def no_autocast(*args, **kwargs): return nullcontext() # there is none for meta
    def no_autocast_here(kind): return False
    def unfused_sgd(*args, fused, **kwargs): return sgd(*args, **kwargs) # nor a fused step
    def meta_device(): return torch.device('meta')
    monkeypatch.setattr(torch, 'Generator', cpu_generator)
    monkeypatch.setattr(torch, 'autocast', no_autocast)
    monkeypatch.setattr(torch, 'is_autocast_enabled', no_autocast_here)
    monkeypatch.setattr(torch.optim, 'SGD', unfused_sgd)
    for module in kshot.data, kshot.train:
        for name in {'fastest_device', 'default_device'} & vars(module).keys():
            monkeypatch.setattr(module, name, meta_device)
    with StrictDevice() as mode: yield mode

def quiet_fit(learn, epochs=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=[cosine(.05), SkipValidation()])

def devices(*modules):
    types = set()
    for module in modules:
        for t in (*module.parameters(), *module.buffers()): types.add(t.device.type)
    return types

CONFIG = Config(K=4, passes=2, warmup=0., bs=200, channels=4)
KINDS = [dict(space='digits'), dict(mode='alternate'), dict(K=1), dict(codes='vertex'),
         dict(codes='free'), dict(sampler='fair'), dict(bf16=True), dict(sampler='greedy'),
         dict(sampler='sandwich', distill=True, ema=.9), dict(drop_path=.2, dropout=.2), dict(track_bn=True)]
def kind_id(kind): return '-'.join(f'{k}={v}' for k,v in kind.items())

@pytest.mark.parametrize('kind', KINDS, ids=kind_id)
def test_training_and_scoring(gpu, kind):
    learn = make_learner(replace(CONFIG, **kind))
    assert devices(learn.model, learn.k_shot.codes) == {'meta'}
    gpu.n_sent = 0
    quiet_fit(learn)
    assert learn.train_iter == 8
    is_greedy = kind.get('sampler') == 'greedy' # it asks for losses
    assert gpu.n_reads == 2 or is_greedy, 'a step waits; only the end of an epoch may, for its losses'
    space = learn.k_shot.sampler.space
    train, valid = learn.dls.train.fixed(2), held(learn.dls.valid)
    before, paths = gpu.n_reads, list(space)[:8]
    scores = score_paths(learn.model, learn.k_shot.codes, space, paths, valid, train)
    assert len(scores) == 8
    assert gpu.n_reads == before + 8, 'scoring a path reads once'
    assert not gpu.n_sent, 'the host waits for a copy'

# all spaces, small

def few_images(bs, passes=1, seed=0, n_train=0, shard=World()):
    "Return random images to train and to score on, four and two batches of them."
    generator = torch.Generator().manual_seed(seed)
    def images(n):
        x = torch.randn(n*bs, 3, 16, 16, generator=generator)
        return TensorLoader(x, torch.arange(len(x))%10, bs, shard=shard)
    return loaders(10, images(4), images(2))

@pytest.fixture(autouse=True)
def forgotten():
    "Forget the small spaces after a test."
    yield
    for name in [name for name in BENCHMARKS if name.startswith('small_')]: del BENCHMARKS[name]

def small_config(name, **settings):
    "Return settings of a space on a few random images."
    known = get_benchmark(name)
    recipe = replace(known.recipe, data=None, portion=None)
    register(replace(known, name=f'small_{name}', data=few_images, recipe=recipe, x_shape=(3, 16, 16)), True)
    sizes = dict(channels=4) | (dict(n_cells=1) if known.has_cells else {})
    usual = dict(K=4, epochs=1, bs=32, branch='', warmup=0., mode='alternate')
    return Config(space=f'small_{name}', **sizes, **usual | settings)

@pytest.mark.parametrize('name', ['macro', 'nb201', 'nb101'])
def test_no_step_of_another_space_waits(name, gpu):
    more = dict(channelling='shuffled') if name == 'nb101' else {}
    learn = make_learner(small_config(name, **more))
    gpu.n_sent = 0
    quiet_fit(learn)
    assert learn.train_iter == 4
    assert (gpu.n_reads, gpu.n_sent) == (2, 0)

def test_what_is_extracted(gpu):
    space, dls = get_space('digits'), digits_data()
    learn = kshot_learner(digits_net(), space, dls, K=2, branch=())
    path = space.parse('2342')
    with torch.no_grad():
        code, = learn.k_shot.codes([path])
        weights, = learn.model.weights([path], code[None])
    stats = recalibrate_bn(learn.model, path, weights, dls.train.fixed(2))
    net = learn.model.subnet(path, code, stats).eval()
    accuracy_loss(net, dls.valid)
    assert devices(net) == {'meta'}

class TrainedParams(Callback):
    "Note which tensors the optimizer has."
    def after_fit(self):
        self.params = set()
        for group in self.opt.opt.param_groups: self.params.update(group['params'])

@pytest.mark.parametrize('recipe', [None, 'quick', 'strong'])
def test_a_subnet_alone(gpu, recipe):
    net, dls, trained = subnet(digits_net(), (2, 3, 4, 2)), digits_data(), TrainedParams()
    n_moved = len(net.state_dict()) # before the first step
    gpu.n_sent = 0
    if recipe: retrain(net, dls, get_recipe(recipe, 1, bs=100), cbs=[trained])
    else:
        train_alone(net, dls, 1).add_cb(trained)
        trained.after_fit()
    accuracy_loss(net.eval(), dls.valid)
    assert gpu.n_sent == n_moved
    assert devices(net) == {'meta'}
    assert trained.params == {*net.parameters()}, 'the optimizer has the network before it moved'

def test_loaders_of_torch(gpu):
    "fastai moves their batches."
    sets = {name: TensorDataset(*xy) for name,xy in digits_splits().items()}
    dls = DataLoaders(DataLoader(sets['train'], 100), DataLoader(sets['valid'], 100))
    learn = kshot_learner(digits_net(), get_space('digits'), dls, K=2)
    assert devices(learn.model, learn.k_shot.codes) == {'meta'}

# a GPU that is there

on_gpu = pytest.mark.cuda

def learner_on(device, config, dtype=torch.float32):
    "Return a learner whose network and images are on a device."
    learn = make_learner(config)
    learn.dls.to(device)
    for dl in learn.dls.loaders: dl.x = dl.x.to(dtype)
    learn.model.to(device, dtype)
    return learn

def results_on(device, config):
    "Train in double precision, score and search; return all numbers, on the CPU."
    learn = learner_on(device, config, torch.float64)
    quiet_fit(learn)
    space, codes = learn.k_shot.sampler.space, learn.k_shot.codes
    paths = space.sample(np.random.default_rng(0), 6)
    valid, calibration = held(learn.dls.valid), list(learn.dls.valid)
    scores = score_paths(learn.model, codes, space, paths, valid, calibration)
    loss_of = dict(zip(paths, scores.loss_super))
    found = search(space, lambda path: -loss_of.get(path, 9.), 20, 'random', progress=False)
    weights = {name: t.cpu() for name,t in learn.model.tensors().items()}
    numbers = torch.tensor(scores.filter(like='_super').to_numpy())
    return dict(weights=weights, codes=codes(paths).detach().cpu(), scores=numbers), found.path.tolist()

EQUAL = [dict(name=name) for name in ('macro', 'nb201', 'darts', 'mobilenet', 'shufflenet')]
EQUAL += [dict(name='nb101', channelling='shuffled'), dict(name='mobilenet_se', widths='0.5 1.0')]
for kind in KINDS: # but those that draw on the GPU, or in half precision
    if not {'space', 'bf16', 'drop_path'}.isdisjoint(kind): continue
    EQUAL.append(dict(name='macro', mode='joint', K=2) | kind)

ON_DEVICES = [('cpu', EQUAL[0]), *(pytest.param('cuda', kind, marks=on_gpu) for kind in EQUAL)]
def device_id(o): return o if isinstance(o, str) else kind_id(o)

@pytest.mark.parametrize('device,kind', ON_DEVICES, ids=device_id)
def test_numbers_of_the_cpu(device, kind):
    config = small_config(**kind)
    expected, order = results_on('cpu', config)
    numbers, found = results_on(device, config)
    torch.testing.assert_close(numbers, expected, rtol=1e-7, atol=1e-9)
    assert found == order

class FirstCallback(Callback):
    "Let waits be errors, once everything has run."
    order = -1000
    run_valid = False
    def before_batch(self): torch.cuda.set_sync_debug_mode('error' if self.train_iter > 1 else 'default')

class LastCallback(Callback):
    "Let the host wait again."
    order = 1000
    run_valid = False
    def after_batch(self): torch.cuda.set_sync_debug_mode('default')

@on_gpu
@pytest.mark.parametrize('kind', [kind for kind in EQUAL if kind.get('sampler') != 'greedy'], ids=kind_id)
def test_no_step_waits_for_the_gpu(kind):
    learn = learner_on('cuda', small_config(**kind))
    learn.add_cbs([FirstCallback(), LastCallback()])
    try: quiet_fit(learn, 2)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert learn.train_iter == 8

def moved(device, precision):
    "Return how the weights move in a few steps of a training."
    learn = learner_on(device, small_config('macro', K=2, mode='joint'))
    if precision == 'bf16': learn.model.bf16 = True
    if precision == 'fp16': learn.to_fp16(init_scale=2.**8)
    before = {key: bank.detach().clone() for key,bank in learn.model.banks.items()}
    quiet_fit(learn)
    assert {bank.dtype for bank in learn.model.banks.values()} == {torch.float32}
    return torch.cat([(bank - before[key]).flatten() for key,bank in learn.model.banks.items()])

@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=on_gpu)])
def test_paths_are_timed_on_a_device(device):
    space = get_space('digits')
    measured = measure_latency(digits_net(4), space, (1,8,8), device, n_paths=16, rounds=2, progress=False)
    assert measured.table.ms.min() > 0 and measured.about['device'] == device
    assert measured.predict([*space]).shape == (625,)

HALF = [('cpu', 'bf16'), *(pytest.param('cuda', name, marks=on_gpu) for name in ('bf16', 'fp16'))]

@pytest.mark.parametrize('device,precision', HALF)
def test_half_precision_learns_the_same(device, precision):
    expected, found = moved(device, 'float32'), moved(device, precision)
    assert F.cosine_similarity(found, expected, dim=0) > .7
    assert .8 < found.norm()/expected.norm() < 1.25

@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_two_gpus_train_like_one(tmp_path):
    losses = []
    for n in 1, 2:
        p = torchrun(n, '-m', 'kshot', 'train', '--runs', tmp_path, '--name', f'on_{n}', *SMALL_RUN)
        _, err = p.communicate(timeout=300)
        assert not p.returncode, err
        losses.append(read_run(tmp_path/f'on_{n}')['results']['train']['loss'])
    assert abs(losses[0] - losses[1]) < .1*losses[0]

# the script that checks and measures all of it

def test_the_script_goes_on_where_it_stopped(tmp_path, capsys):
    def call(*args):
        code = gpu_script.main([*args, '--tiny', '--out', str(tmp_path), '--runs', str(tmp_path/'runs')])
        return code, *capsys.readouterr()
    fname = tmp_path/'macro_K8.json'
    again = ': call it again'
    for end in f'has half of train{again}', f'lacks rank{again}', 'is done', 'is there already':
        code, out, _ = call('macro', '--minutes', '0')
        assert (code, out) == (0, f'{fname} {end}\n')
    rows = json.loads(fname.read_text())['rows']
    assert rows['train']['epochs'] == 2 and rows['rank']['paths'] == 20
    half = json.loads(fname.read_text()) | dict(is_done=False, device='another GPU')
    fname.write_text(json.dumps(half))
    code, _, err = call('macro')
    assert code == 1 and "half of a result with device 'another GPU'" in err
    assert json.loads(fname.read_text()) == half

def test_the_script_measures(tmp_path, capfd):
    assert gpu_script.main(['steps', 'scores', 'tests', '--tiny', '--out', str(tmp_path)]) == 0
    results = {fname.stem: json.loads(fname.read_text()) for fname in tmp_path.glob('*.json')}
    assert all(result['is_done'] for result in results.values())
    assert [row['bf16'] for row in results['steps']['rows'].values()] == [False, True]
    assert results['scores']['rows']['nb201']['paths_per_second']['K4'] > 0
    assert results['tests']['rows']['tests'] == dict(is_done=True, passed=1, failed={}, skipped={})
    said = capfd.readouterr().err
    assert '\nsteps: macro\n  ms: plain ' in said and '\n  passed: 1\n' in said

THREE_ENDS = """
import pytest
def test_of_nothing(): assert not 1
def test_without_fixture(one): pass
def test_later(): pytest.skip('not now')
"""

def test_the_script_counts_a_test_that_cannot_start_as_failed(tmp_path):
    fname = tmp_path/'test_three_ends.py'
    fname.write_text(THREE_ENDS)
    row = gpu_script.run_tests([str(fname), '-k', 'three_ends'])
    assert row['passed'] == 0 and [*row['failed']] == ['test_of_nothing', 'test_without_fixture']
    assert row['skipped'] == dict(test_later='not now')
    assert not row['is_done'] and row['error'] == 'failed: test_of_nothing, test_without_fixture'

def test_the_script_says_what_is_wrong(monkeypatch, capsys):
    def raising(error):
        def piece(): raise error
        return piece
    apart = subprocess.CalledProcessError(1, 'python', stderr='\ntorch.OutOfMemoryError: 2 GiB\n')
    for error in torch.OutOfMemoryError(), apart:
        assert gpu_script.measured(raising(error)) == dict(is_done=True, out_of_memory=True)
    wrong = dict(is_done=False, error='RuntimeError: of a kernel')
    assert gpu_script.measured(raising(RuntimeError('of a kernel'))) == wrong
    capsys.readouterr()
    less = Finding('devices', 'cuda', 'less', 'torch was built without CUDA', do='install a CUDA build')
    monkeypatch.setattr(gpu_script, 'look_devices', lambda: [less])
    with pytest.raises(SystemExit): gpu_script.main([])
    assert capsys.readouterr().err.endswith('error: torch was built without CUDA: install a CUDA build\n')
