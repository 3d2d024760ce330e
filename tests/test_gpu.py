"""A GPU that is not there. torch's meta device has shapes and no numbers; a dispatch mode makes it as jealous as a GPU: tensors of two devices never meet,
and a number that the host asks for is counted, since it waits for it. The tests marked `cuda` need a real one."""
from contextlib import nullcontext
from dataclasses import replace

import pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import kshot.data, kshot.train
from kshot.config import Config, make_learner
from kshot.data import digits_data, digits_splits, held
from kshot.evaluate import accuracy_loss, recalibrate_bn, score_paths
from kshot.networks import digits_net, subnet
from kshot.retrain import get_recipe, retrain
from kshot.benchmark import get_space
from kshot.train import SkipValidation, cosine, kshot_learner, train_alone

aten = torch.ops.aten

class Jealous(TorchDispatchMode):
    "Raises where tensors of two devices meet (a number from the host may go anywhere), and counts how often the host waits for an answer."
    asked = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors, kwargs = [o for o in tree_leaves((args, kwargs)) if isinstance(o, torch.Tensor)], kwargs or {}
        there = {t.device.type for t in tensors if t.ndim}
        if func is aten._local_scalar_dense.default or func is aten._to_copy.default and str(kwargs.get('device')) == 'cpu':
            if tensors[0].is_meta: self.asked += 1; args = (torch.full(tensors[0].shape, .5).to(tensors[0].dtype),)
        elif len(there) > 1 and func is not aten.copy_.default: raise RuntimeError(f'{func} of tensors on {sorted(there)}')
        return func(*args, **kwargs)

@pytest.fixture
def gpu(monkeypatch):
    "A world with a GPU"
    generator, sgd = torch.Generator, torch.optim.SGD
    monkeypatch.setattr(torch, 'Generator', lambda device='cpu': generator())
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext()) # there is none for meta
    monkeypatch.setattr(torch.optim, 'SGD', lambda *args, fused, **kwargs: sgd(*args, **kwargs)) # nor a fused step
    for module in kshot.data, kshot.train:
        for name in {'fastest_device', 'default_device'} & vars(module).keys(): monkeypatch.setattr(module, name, lambda: torch.device('meta'))
    with Jealous() as mode: yield mode

def quiet_fit(learn, epochs=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=[cosine(.05), SkipValidation()])

devices = lambda *modules: {t.device.type for m in modules for t in (*m.parameters(), *m.buffers())}
CONFIG = Config(K=4, passes=2, warmup=0., bs=200, channels=4)
KINDS = [dict(space='digits'), dict(mode='alternate'), dict(K=1), dict(codes='vertex'), dict(codes='free'), dict(sampler='fair'), dict(bf16=True),
         dict(sampler='greedy'), dict(drop_path=.2, dropout=.2), dict(track_bn=True)]

@pytest.mark.parametrize('kind', KINDS, ids=lambda o: '-'.join(f'{k}={v}' for k,v in o.items()))
def test_training_and_scoring(gpu, kind):
    learn = make_learner(replace(CONFIG, **kind))
    assert devices(learn.model, learn.k_shot.codes) == {'meta'}
    quiet_fit(learn)
    assert learn.train_iter == 8
    assert gpu.asked == 1 or kind.get('sampler') == 'greedy', 'a step waits; only the end of an epoch may, for the loss'
    space, train, valid = learn.k_shot.sampler.space, learn.dls.train.fixed(2), held(learn.dls.valid)
    before, paths = gpu.asked, list(space)[:8]
    assert len(score_paths(learn.model, learn.k_shot.codes, space, paths, valid, train)) == 8
    assert gpu.asked == before + 8, 'a path asks once'

def test_what_is_extracted(gpu):
    learn = kshot_learner(digits_net(), space := get_space('digits'), dls := digits_data(), K=2)
    path = space.parse('2342')
    with torch.no_grad():
        code, = learn.k_shot.codes([path])
        weights, = learn.model.weights([path], code[None])
    net = learn.model.subnet(path, code, recalibrate_bn(learn.model, path, weights, dls.train.fixed(2))).eval()
    accuracy_loss(net, dls.valid)
    assert devices(net) == {'meta'}

class Trained(Callback):
    def after_fit(self): self.params = {p for g in self.opt.opt.param_groups for p in g['params']}

@pytest.mark.parametrize('recipe', [None, 'quick', 'strong'])
def test_a_subnet_alone(gpu, recipe):
    net, dls, cb = subnet(digits_net(), (2, 3, 4, 2)), digits_data(), Trained()
    if recipe: retrain(net, dls, get_recipe(recipe, 1, bs=100), cbs=[cb])
    else: train_alone(net, dls, 1).add_cb(cb).cbs[-1].after_fit()
    accuracy_loss(net.eval(), dls.valid)
    assert devices(net) == {'meta'} and cb.params == {*net.parameters()}, 'the optimizer has what the network was before it moved'

def test_loaders_of_torch(gpu):
    "fastai moves their batches."
    sets = {k: TensorDataset(*v) for k,v in digits_splits().items()}
    learn = kshot_learner(digits_net(), get_space('digits'), DataLoaders(*(DataLoader(sets[k], 100) for k in ('train', 'valid'))), K=2)
    assert devices(learn.model, learn.k_shot.codes) == {'meta'}
