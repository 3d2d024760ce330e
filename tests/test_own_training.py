"A learner of one's own network trains as plain torch does: any input, target, loader, loss and callback"
import copy
import math

import pytest
import torch
import fastai.callback.hook # adds `summary` to learners
import fastai.callback.schedule # and `lr_find`
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader as FastLoader
from fastai.learner import Learner, load_learner
from fastai.metrics import R2Score
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kshot.base.inputs import map_tensors, tensors_in
from kshot.checkpoint import CheckpointCallback, load_model, load_newest
from kshot.data import TensorLoader, as_pair, loaders
from kshot.evaluate import score_path
from kshot.retrain import get_recipe, lr_at, retrain
from kshot.simplex import SimplexNet, UniformCode, VertexCode
from kshot.space import Block, Space
from kshot.train import (ClassLoss, KShotCallback, accuracy, by_decay, kshot_learner, sgd,
                         torch_optimizer, train_alone)

def space_of(*sizes):
    "Name the ops of blocks by their numbers."
    blocks = [Block(f'b{i}', tuple(f'op{o}' for o in range(n))) for i,n in enumerate(sizes)]
    return Space('own', tuple(blocks))

class Net(nn.Module):
    "Whatever comes before and after one block of two ops, which keep the shape"
    def __init__(self, stem, ops, head):
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList([nn.ModuleList(ops)])
        self.head = head
    def forward(self, x, path): return self.head(self.blocks[0][path[0]](self.stem(x)))

class Fixed:
    "Always the same paths"
    space = space_of(2)
    def __init__(self, *paths):
        self.paths = paths
        self.n_a_step = len(paths)
    def __call__(self, progress): return list(self.paths)
    def state(self): return {}
    def load_state(self, state): pass

def plain_sgd(groups, lr): return torch_optimizer(groups, lr, torch.optim.SGD, 0.)

def fit(net, dls, epochs=1, cbs=(), lr=.1, **kwargs):
    kwargs = dict(space=Fixed.space, K=1, branch=(), sampler=Fixed((1,)), opt_func=plain_sgd) | kwargs
    learn = kshot_learner(net, kwargs.pop('space'), dls, **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr, cbs=[*cbs])
    return learn

def fit_plainly(net, batches, loss_func, path=(1,), epochs=1, lr=.1):
    "Train one path by plain torch."
    net = copy.deepcopy(net)
    opt = torch.optim.SGD(net.parameters(), lr)
    for _ in range(epochs):
        for x,y in batches:
            loss_func(net(x, path), y).backward()
            opt.step()
            opt.zero_grad()
    return dict(net.named_parameters())

def check_same(learn, expected, atol=1e-5):
    tensors = learn.model.tensors()
    assert set(tensors) == set(expected)
    for name,t in tensors.items():
        torch.testing.assert_close(t[0], expected[name].detach(), atol=atol, rtol=1e-4)

def per_row(module): return nn.Sequential(module, nn.ReLU())

class Mean(nn.Module):
    def forward(self, x): return x.mean(1)

class Parts(nn.Module):
    "Read a dict or a pair."
    def __init__(self, first, second):
        super().__init__()
        self.a = nn.Linear(5, 6)
        self.keys = first, second
    def forward(self, x): return self.a(x[self.keys[0]]) + x[self.keys[1]]

class Twice(nn.Module):
    "An auxiliary head"
    def __init__(self):
        super().__init__()
        self.main = nn.Linear(6, 3)
        self.aux = nn.Linear(6, 3)
    def forward(self, x): return dict(main=self.main(x), aux=[self.aux(x)])

def twice_loss(out, y): return F.cross_entropy(out['main'], y) + .4*F.cross_entropy(out['aux'][0], y)

class InTraining(Twice):
    "An auxiliary head that is there in training only, as in GoogLeNet"
    def forward(self, x): return (self.main(x), self.aux(x)) if self.training else self.main(x)

def training_loss(out, y):
    if not isinstance(out, tuple): return F.cross_entropy(out, y)
    return F.cross_entropy(out[0], y) + .3*F.cross_entropy(out[1], y)

N = 24
def randn(*shape): return torch.randn(N, *shape, generator=torch.Generator().manual_seed(len(shape)))
CLASSES = torch.arange(N) % 3
def linear_ops(): return [nn.Identity(), nn.Linear(6, 6)]
def conv_ops(): return [nn.Identity(), nn.Conv2d(6, 6, 3, padding=1)]
def head(n=3): return nn.Linear(6, n)
def images(*head): return Net(nn.Conv2d(2, 6, 3, padding=1), conv_ops(), nn.Sequential(*head))
def rows(head): return Net(per_row(nn.Linear(5, 6)), linear_ops(), head)

KINDS = dict( # network, x, y, loss function
    rows=(lambda: rows(head()), randn(5), CLASSES, None),
    images=(lambda: images(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head()), randn(2, 5, 5), CLASSES, None),
    sequences=(lambda: Net(nn.Conv1d(5, 6, 3, padding=1), [nn.Identity(), nn.Conv1d(6, 6, 3, padding=1)],
                           nn.Sequential(nn.Flatten(), nn.Linear(42, 3))), randn(5, 7), CLASSES, None),
    volumes=(lambda: Net(nn.Conv3d(1, 6, 3, padding=1), [nn.Identity(), nn.Conv3d(6, 6, 1)],
                         nn.Sequential(nn.Flatten(), nn.Linear(162, 3))), randn(1, 3, 3, 3), CLASSES, None),
    tokens=(lambda: Net(nn.Embedding(9, 6), linear_ops(), nn.Sequential(Mean(), head())),
            torch.arange(N*4).reshape(N, 4) % 9, CLASSES, None),
    dict=(lambda: Net(Parts('a', 'b'), linear_ops(), head()), dict(a=randn(5), b=randn(6)), CLASSES, None),
    pair=(lambda: Net(Parts(0, 1), linear_ops(), head()), (randn(5), randn(6)), CLASSES, None),
    double=(lambda: rows(head()).double(), randn(5).double(), CLASSES, None),
    regression=(lambda: rows(nn.Sequential(head(1), nn.Flatten(0))), randn(5), randn(), F.mse_loss),
    several_numbers=(lambda: rows(head(2)), randn(5), randn(2), nn.SmoothL1Loss()),
    soft=(lambda: rows(head()), randn(5), randn(3).softmax(1), None),
    labels=(lambda: rows(head()), randn(5), (randn(3) > 0).float(), nn.BCEWithLogitsLoss()),
    weighted=(lambda: rows(head()), randn(5), CLASSES, nn.CrossEntropyLoss(torch.tensor([.5, 1., 2.]))),
    segmentation=(lambda: images(nn.Conv2d(6, 3, 1)), randn(2, 5, 5), (randn(5, 5) > 0).byte(), None),
    auxiliary=(lambda: rows(Twice()), randn(5), CLASSES, twice_loss),
    in_training=(lambda: rows(InTraining()), randn(5), CLASSES, training_loss))

def make(kind):
    "Build a network and its data, the same each time."
    torch.manual_seed(0)
    net, x, y, loss_func = KINDS[kind]
    return net(), x, y, loss_func

def of_tensors(x, y, bs=8):
    "Split into loaders of 16 and 8 rows, in order."
    def part(rows): return map_tensors(lambda t: t[rows], (x, y))
    train, valid = part(slice(16)), part(slice(16, None))
    return loaders(3, TensorLoader(*train, bs), TensorLoader(*valid, bs)).to('cpu')

@pytest.mark.parametrize('kind', KINDS)
def test_one_path_of_one_supernet_is_plain_training(kind):
    net, x, y, loss_func = make(kind)
    dls = of_tensors(x, y)
    learn = fit(net, dls, 3, loss_func=loss_func)
    plain_loss = loss_func or nn.CrossEntropyLoss(label_smoothing=.1)
    check_same(learn, fit_plainly(net, [*dls.train], plain_loss, epochs=3))
    values = learn.recorder.values[-1]
    assert len(values) == (3 if loss_func is None or kind == 'weighted' else 2)
    assert all(map(math.isfinite, values))

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('mode', ['joint', 'alternate'])
def test_several_supernets_and_paths(kind, mode):
    net, x, y, loss_func = make(kind)
    learn = fit(net, of_tensors(x, y), 2, K=2, sampler='fair', mode=mode, warmup=0., loss_func=loss_func)
    assert all(map(math.isfinite, learn.recorder.values[-1]))
    moved = [not torch.equal(a[0], b) for a,b in zip(learn.model.tensors().values(), net.parameters())]
    assert all(moved)

def match(out, teacher):
    "Compare outputs of any kind."
    return sum(F.mse_loss(a, b) for a,b in zip(tensors_in(out), tensors_in(teacher)))

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('mode', ['joint', 'alternate'])
def test_the_other_paths_learn_from_the_largest(kind, mode):
    net, x, y, loss_func = make(kind)
    is_of_classes = loss_func is None or isinstance(loss_func, nn.CrossEntropyLoss)
    kwargs = dict(K=2, sampler='sandwich', mode=mode, warmup=0., loss_func=loss_func)
    if not is_of_classes:
        with pytest.raises(ValueError, match='expected a cross-entropy: otherwise pass distill=loss'):
            fit(net, of_tensors(x, y), distill=True, **kwargs)
    learn = fit(net, of_tensors(x, y), 2, distill=is_of_classes or match, **kwargs)
    assert learn.k_shot.paths[-2:] == [(0,), (1,)] or learn.k_shot.is_simplex_step # nothing, a layer
    assert all(map(math.isfinite, learn.recorder.values[-1]))
    moved = [not torch.equal(a[0], b) for a,b in zip(learn.model.tensors().values(), net.parameters())]
    assert all(moved)

# loaders of torch and fastai

def of_torch(x, y, bs=8, **kwargs):
    train, valid = TensorDataset(x[:16], y[:16]), TensorDataset(x[16:], y[16:])
    return DataLoaders(DataLoader(train, bs, **kwargs), DataLoader(valid, bs))

def of_fastai(x, y, bs=8, **kwargs):
    train, valid = [*zip(x[:16], y[:16])], [*zip(x[16:], y[16:])]
    return DataLoaders(FastLoader(train, bs=bs, **kwargs), FastLoader(valid, bs=bs))

@pytest.mark.parametrize('make_loaders', [of_torch, of_fastai])
def test_loaders_of_torch_and_fastai_train_the_same(make_loaders):
    net, x, y, _ = make('images')
    expected = fit(net, of_tensors(x, y), 2)
    learn = fit(net, make_loaders(x, y), 2)
    assert [*learn.recorder.values[-1]] == pytest.approx([*expected.recorder.values[-1]], abs=1e-5)
    check_same(learn, {name: t[0] for name,t in expected.model.tensors().items()})

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 6)
        self.b = nn.Linear(4, 6)
    def forward(self, x): return self.a(x[0]) + self.b(x[1])

def two_inputs():
    xs, ys = (randn(5), randn(4)), CLASSES
    train, valid = (TensorDataset(xs[0][s], xs[1][s], ys[s]) for s in (slice(16), slice(16, None)))
    return DataLoaders(DataLoader(train, 8), DataLoader(valid, 8))

def test_two_inputs_of_a_batch_are_a_tuple():
    torch.manual_seed(0)
    net = Net(Both(), linear_ops(), head())
    dls = two_inputs()
    batches = [as_pair(batch) for batch in dls.train]
    loss_func = nn.CrossEntropyLoss(label_smoothing=.1)
    check_same(fit(net, dls, 2), fit_plainly(net, batches, loss_func, epochs=2))
    plain = copy.deepcopy(net)
    plain.forward = lambda x: Net.forward(plain, x, (1,))
    train_alone(plain, dls, 1, progress=False)
    assert not torch.equal(plain.stem.b.weight, net.stem.b.weight)

def test_a_second_input_is_never_dropped():
    net, *_ = make('rows')
    with pytest.raises(ValueError, match='2 inputs in a batch, expected a network that takes them'):
        fit(net, two_inputs())

def test_loaders_without_a_batch_are_refused():
    net, x, y, _ = make('rows')
    with pytest.raises(ValueError, match='a training loader without batches'):
        fit(net, of_torch(x, y, 32, drop_last=True))
    class Endless(IterableDataset):
        def __iter__(self): return iter(zip(x, y))
    with pytest.raises(ValueError, match='a training loader without a length, expected one'):
        fit(net, DataLoaders(DataLoader(Endless(), 8), DataLoader(Endless(), 8)))

# validation normalizes by the batch

def normed():
    torch.manual_seed(0)
    return Net(per_row(nn.Linear(5, 6)), linear_ops(), nn.Sequential(head(), nn.BatchNorm1d(3)))

def validated(n, bs, **kwargs):
    x, y = torch.randn(16+n, 5), torch.arange(16+n) % 3
    dls = loaders(3, TensorLoader(x[:16], y[:16], 8), TensorLoader(x[16:], y[16:], bs)).to('cpu')
    return fit(normed(), dls, metrics=[accuracy], **kwargs), x[16:], y[16:]

def test_a_last_batch_of_one_borrows_from_the_one_before():
    learn, x, y = validated(17, 8)
    net = learn.model
    path, code = learn.k_shot.panel[0], torch.ones(1)
    with torch.no_grad():
        outs = [net.eval()(part, path, code) for part in (x[:8], x[8:16], x[9:])]
    out = torch.cat([*outs[:2], outs[2][-1:]])
    _, loss, acc = learn.recorder.values[-1]
    assert loss == pytest.approx(learn.loss_func(out, y).item(), abs=1e-5)
    assert acc == pytest.approx(accuracy(out, y).item(), abs=1e-6)

def test_batches_of_one_are_refused_before_training():
    class Count(Callback):
        order = 60
        n = 0
        def after_batch(self): Count.n += 1
    with pytest.raises(ValueError, match='validation in batches of 1, expected more for batch norm'):
        validated(6, 1, cbs=[Count()])
    assert Count.n == 0
    for kwargs in (dict(track_bn=True), {}):
        net, x, y, _ = make('rows')
        if kwargs: net = normed()
        dls = loaders(3, TensorLoader(x[:16], y[:16], 8), TensorLoader(x[16:], y[16:], 1)).to('cpu')
        assert math.isfinite(fit(net, dls, **kwargs).recorder.values[-1][1])

# fastai's callbacks

class Scale(Callback):
    "What mixed precision does, without the 16 bits: scale the loss, divide the gradients"
    def __init__(self, order, event, factor=1024.):
        self.order = order
        self.factor = factor
        setattr(self, event, self.scale)
    def scale(self): self.learn.loss_grad = self.loss_grad*self.factor

class Keep(Callback):
    "Keep gradients of banks at each step, and of codes before the code module moves."
    order = 8
    def before_fit(self): self.grads = []
    def before_step(self): self.grads.append({k: b.grad.clone() for k,b in self.model.banks.items()})

PATHS = (0,), (1,)

@pytest.mark.parametrize('callbacks,factor', [
    ([], 1.), (['accumulate'], 1.), ([(-60, 'before_backward')], 1024.), ([(0, 'after_loss')], 1024.),
    ([(7, 'after_loss')], 1024.), ([(10, 'before_backward')], 1024.),
    (['accumulate', (10, 'before_backward')], 1024.)])
@pytest.mark.parametrize('K', [1, 2])
def test_fair_paths_weigh_alike(callbacks, factor, K):
    net, x, y, _ = make('rows')
    keep = Keep()
    is_accumulating = 'accumulate' in callbacks
    cbs = [GradientAccumulation(16) if args == 'accumulate' else Scale(*args) for args in callbacks]
    kwargs = dict(K=K, sampler=Fixed(*PATHS), warmup=0., lr=0., codes_opt=torch.optim.SGD, n_paths=4)
    codes = SimplexNet(Fixed.space, 2) if K > 1 else UniformCode(1)
    before = copy.deepcopy(codes)
    learn = fit(net, of_tensors(x, y), cbs=[*cbs, keep], codes=codes, lr_codes=1., **kwargs)
    model = learn.model
    batches = [*learn.dls.train]
    steps = [batches] if is_accumulating else [[batch] for batch in batches]
    assert len(keep.grads) == len(steps)
    of_codes = []
    for grads,batches in zip(keep.grads, steps):
        model.zero_grad()
        for xb,yb in batches:
            for path in PATHS:
                code = before([path]).detach()[0].requires_grad_(K > 1)
                loss = learn.loss_func(model(xb, path, code), yb)
                (loss*factor*len(yb)/sum(len(y) for _,y in batches)).backward()
                if K == 1: continue
                (again,) = torch.autograd.grad(learn.loss_func(model(xb, path, code), yb), code)
                of_codes.append((path, again))
        for key,bank in model.banks.items():
            torch.testing.assert_close(grads[key], bank.grad, rtol=1e-4, atol=1e-6*factor)
    if K == 1: return
    loss = sum((before([path])[0]*grad).sum() for path,grad in of_codes)/len(of_codes)
    grads = torch.autograd.grad(loss, before.parameters())
    for p,q,grad in zip(codes.parameters(), before.parameters(), grads):
        torch.testing.assert_close(p, q-grad, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('callbacks,factor', [
    (['accumulate'], 1.), ([(7, 'after_loss')], 1024.), (['accumulate', (10, 'before_backward')], 1024.)])
def test_distilled_paths_weigh_as_much_as_their_teacher(callbacks, factor):
    net, x, y, _ = make('rows')
    keep = Keep()
    is_accumulating = 'accumulate' in callbacks
    cbs = [GradientAccumulation(16) if args == 'accumulate' else Scale(*args) for args in callbacks]
    kwargs = dict(sampler=Fixed(*PATHS), distill=True, lr=0.)
    learn = fit(net, of_tensors(x, y), cbs=[*cbs, keep], **kwargs)
    batches = [*learn.dls.train]
    steps = [batches] if is_accumulating else [[batch] for batch in batches]
    for grads,batches in zip(keep.grads, steps, strict=True):
        learn.model.zero_grad()
        for xb,yb in batches:
            student, teacher = (learn.model(xb, path, torch.ones(1)) for path in PATHS)
            p = teacher.detach().softmax(1)
            loss = learn.loss_func(teacher, yb) - (p*student.log_softmax(1)).sum(1).mean()
            (loss*factor/len(batches)).backward()
        for key,bank in learn.model.banks.items():
            torch.testing.assert_close(grads[key], bank.grad, rtol=1e-4, atol=1e-6*factor)

def test_a_loss_of_zero_gives_the_other_paths_their_gradient():
    class Zero(nn.Module):
        def forward(self, x): return 0*x
    torch.manual_seed(0)
    net = Net(nn.Linear(5, 5), [Zero(), nn.Linear(5, 5)], nn.Identity())
    dls = of_tensors(randn(5), torch.zeros(N, 5))
    sampler = Fixed((1,), (0,)) # the last one fits perfectly
    scale = Scale(0, 'after_loss', 2.)
    learn = fit(net, dls, cbs=[scale], sampler=sampler, loss_func=F.mse_loss)
    def double_loss(out, y): return 2*F.mse_loss(out, y)
    check_same(learn, fit_plainly(net, [*dls.train], double_loss))

def test_gradients_of_codes_that_overflow_are_left_out():
    net, x, y, _ = make('rows')
    kwargs = dict(K=2, sampler=Fixed(*PATHS), warmup=0., n_paths=2, lr_codes=1., codes_opt=torch.optim.SGD)
    for mode in ('joint', 'alternate'):
        codes = SimplexNet(Fixed.space, 2)
        before = copy.deepcopy(codes.state_dict())
        cbs = [Scale(10, 'before_backward', 1e38), GradientClip()]
        fit(net, of_tensors(x*1e3, y), cbs=cbs, codes=codes, mode=mode, **kwargs)
        assert all(p.isfinite().all() for p in codes.parameters())
        assert before.keys() == codes.state_dict().keys()

def test_simplex_steps_keep_what_the_banks_have_collected():
    net, x, y, _ = make('rows')
    codes = SimplexNet(Fixed.space, 2)
    keep = Keep()
    learn = fit(net, of_tensors(x, y, 4), lr=0., cbs=[GradientAccumulation(8), keep], codes=codes, K=2,
                mode='alternate', warmup=0., lr_codes=0.)
    model = learn.model
    model.zero_grad()
    for xb,yb in [*learn.dls.train][::2]: # the others train the codes
        loss = learn.loss_func(model(xb, (1,), codes([(1,)])[0].detach()), yb)
        (loss/2).backward()
    grads, = keep.grads
    for key,bank in model.banks.items(): torch.testing.assert_close(grads[key], bank.grad)

@pytest.mark.parametrize('cbs', [[], [GradientAccumulation(16)]])
def test_few_shot_rows_get_every_gradient(cbs):
    net, x, y, _ = make('rows')
    class Turns(Fixed):
        i = 0
        def __call__(self, progress):
            self.i += 1
            return [self.paths[self.i % 2]]
    dls = of_tensors(x, y)
    kwargs = dict(K=2, codes=VertexCode(2, 0), sampler=Turns(*PATHS), branch=0.)
    learn = fit(net, dls, cbs=[*cbs, GradientClip(1e9)], **kwargs)
    (x1, y1), (x0, y0) = dls.train
    loss_func = nn.CrossEntropyLoss(label_smoothing=.1)
    for k,(xb,yb) in enumerate([(x0, y0), (x1, y1)]):
        def loss(out, y): return loss_func(out, y)/(2 if cbs else 1)
        expected = fit_plainly(net, [(xb, yb)], loss, path=(k,))
        for name,t in learn.model.tensors().items():
            torch.testing.assert_close(t[k], expected[name].detach(), rtol=1e-4, atol=1e-6)

class Scaler(Callback):
    "What `MixedPrecision` does with a scaler of gradients"
    order = MixedPrecision.order
    def before_backward(self): self.learn.loss_grad = self.loss_grad*1024
    def before_step(self):
        for group in self.opt.opt.param_groups:
            for p in group['params']:
                if p.grad is not None: p.grad /= 1024

@pytest.mark.parametrize('codes', [None, VertexCode(1, 0)])
@pytest.mark.parametrize('most', [.1, 1e9])
@pytest.mark.parametrize('sampler', [Fixed((1,)), Fixed(*PATHS)])
def test_gradients_are_scaled_and_clipped_as_in_plain_training(codes, sampler, most):
    net, x, y, _ = make('rows')
    dls = of_tensors(x, y)
    learn = fit(net, dls, cbs=[Scaler(), GradientClip(most)], codes=codes, sampler=sampler)
    loss_func = nn.CrossEntropyLoss(label_smoothing=.1)
    for xb,yb in dls.train:
        for path in sampler.paths: loss_func(net(xb, path), yb).backward()
        nn.utils.clip_grad_norm_(net.parameters(), most)
        with torch.no_grad():
            for p in net.parameters(): p -= .1*p.grad
        net.zero_grad()
    check_same(learn, dict(net.named_parameters()))

class LastMix(MixUp):
    "Keep what was mixed last."
    order = 3
    def __init__(self):
        super().__init__()
        self.seen = []
    def after_batch(self):
        if self.training: self.seen.append((self.learn.xb[0], self.yb1[0], self.yb[0], self.lam))

@pytest.mark.parametrize('sampler', [Fixed((1,)), Fixed(*PATHS)])
def test_mixup_mixes_the_losses_of_all_paths(sampler):
    net, x, y, _ = make('images')
    mix = LastMix()
    learn = fit(net, of_tensors(x, y), cbs=[mix], sampler=sampler)
    params = dict(net.named_parameters())
    loss_func = nn.CrossEntropyLoss(label_smoothing=.1, reduction='none')
    assert len(mix.seen) == 2
    for xb,y1,y2,lam in mix.seen:
        for path in sampler.paths:
            out = net(xb, path)
            torch.lerp(loss_func(out, y1), loss_func(out, y2), lam).mean().backward()
        with torch.no_grad():
            for p in params.values(): p -= .1*p.grad
        net.zero_grad()
    check_same(learn, params)

def test_cutmix_and_soft_targets_train():
    net, x, y, _ = make('images')
    soft = F.one_hot(y, 3).float()
    for cbs,targets in (([CutMix()], y), ([MixUp()], soft)):
        learn = fit(net, of_tensors(x, targets), cbs=cbs, K=2)
        assert all(map(math.isfinite, learn.recorder.values[-1]))

# saving

class Watch(Callback):
    "Remember weights and codes of each epoch."
    order = 59
    def before_fit(self): self.seen = []
    def after_epoch(self): self.seen.append(copy.deepcopy(self.model.state_dict()))

SPACE = space_of(2, 2)
class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.ModuleList(linear_ops()) for _ in range(2))
    def forward(self, x, path):
        x = self.stem(x)
        for ops,o in zip(self.blocks, path): x = ops[o](x)
        return x

def deep_fit(folder, epochs=1, cbs=(), seed=0, **kwargs):
    torch.manual_seed(seed)
    kwargs = dict(K=3, branch=(), sampler='uniform', warmup=0., n_paths=1, lr_codes=.1) | kwargs
    learn = kshot_learner(Deep(), SPACE, of_tensors(randn(6), torch.arange(N) % 6), **kwargs)
    learn.path = folder
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, .1, cbs=[*cbs])
    return learn

def same(a, b):
    assert a.keys() == b.keys()
    return all(t.equal(b[name]) for name,t in a.items())

@pytest.mark.parametrize('codes', [None, VertexCode(3, 0)])
def test_weights_and_codes_are_saved_together(tmp_path, codes, capsys):
    watch = Watch()
    learn = deep_fit(tmp_path, 5, [watch, SaveModelCallback(monitor='accuracy')], codes=codes)
    assert any(same(state, learn.model.state_dict()) for state in watch.seen)
    assert (codes is None) == any(name.startswith('codes.') for name in learn.model.state_dict())
    learn.save('all')
    other = deep_fit(tmp_path, seed=1, codes=copy.deepcopy(codes))
    assert not same(learn.model.state_dict(), other.model.state_dict())
    other.load('all')
    assert same(learn.model.state_dict(), other.model.state_dict())
    assert other.model.codes is other.k_shot.codes
    assert [*other.validate()] == pytest.approx([*learn.validate()])
    other.fit(1, .1) # and training goes on
    learn.export('all.pkl')
    loaded = load_learner(tmp_path/'all.pkl')
    assert same(learn.model.state_dict(), loaded.model.state_dict())
    assert loaded.model.codes is loaded.k_shot.codes
    x = randn(6)
    path = (1, 0)
    for code in (loaded.k_shot.codes([path]), learn.k_shot.codes([path])):
        out = loaded.model(x, path, code[0]), learn.model(x, path, code[0])
        assert out[0].equal(out[1])
    assert len(learn.dls.train) == 2

def test_a_learner_that_never_trained_validates_with_its_codes(tmp_path):
    learn = deep_fit(tmp_path, 0)
    with learn.no_bar(): loss, acc = learn.validate()
    panel = learn.k_shot.panel[:1]
    (x, y), = learn.dls.valid
    out = learn.model(x, panel[0], learn.k_shot.codes(panel)[0])
    assert loss == pytest.approx(learn.loss_func(out, y).item(), abs=1e-6)

def test_export_of_other_loaders(tmp_path):
    net, x, y, _ = make('rows')
    learn = fit(net, of_torch(x, y))
    with pytest.raises(ValueError, match='export of torch.*DataLoader, expected loaders of fastai'):
        learn.export(tmp_path/'a.pkl')

@pytest.mark.parametrize('name', ['get_preds', 'summary', 'predict', 'show_results'])
def test_what_needs_no_path_is_refused_in_a_line(name, tmp_path):
    learn = deep_fit(tmp_path)
    with pytest.raises(ValueError, match='a supernet predicts at a path, expected the module of one'):
        getattr(learn, name)()

def test_groups_are_not_frozen(tmp_path):
    learn = deep_fit(tmp_path)
    with pytest.raises(ValueError, match='the groups here are weights with decay'): learn.freeze()
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

def test_a_plain_network_on_tensors_predicts_and_is_exported(tmp_path):
    x, y = randn(5), CLASSES
    learn = Learner(of_tensors(x, y), nn.Linear(5, 3), ClassLoss(), metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        out, target = learn.get_preds()
    assert out.equal(learn.model(x[16:]).detach()) and target.equal(y[16:])
    assert 'Linear' in str(learn.summary())
    learn.export('a.pkl')
    assert same(load_learner(tmp_path/'a.pkl').model.state_dict(), learn.model.state_dict())

def test_the_learning_rate_finder_leaves_weights_and_codes_alone(tmp_path):
    learn = deep_fit(tmp_path)
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=5, show_plot=False)
    assert same(learn.model.state_dict(), before)

class CountSupernets(Callback):
    "Note the number of supernets in each step."
    order = KShotCallback.order + 1
    def before_fit(self): self.seen = []
    def before_batch(self):
        if self.training: self.seen.append(self.model.K)

@pytest.mark.parametrize('opt_func', [sgd, torch_optimizer])
@pytest.mark.parametrize('codes', [None, VertexCode(4, 0)])
def test_training_branches_when_it_is_time_after_a_trial(codes, opt_func, tmp_path):
    space = space_of(4, 2)
    net = Deep()
    net.blocks[0] = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
    data = of_tensors(randn(6), torch.arange(N) % 6)
    learn = kshot_learner(net, space, data, K=4, codes=codes, branch=.5, opt_func=opt_func, path=tmp_path)
    n_steps = 4*len(data.train)
    def check(n_shared):
        count = CountSupernets()
        with learn.no_bar(), learn.no_logging(): learn.fit(4, .1, cbs=count)
        assert count.seen == [1]*n_shared + [4]*(n_steps-n_shared)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=n_steps, show_plot=False)
    check(n_steps//2)
    assert len(learn.model.banks['shared'].unique(dim=0)) == 4
    check(0) # they differ: nothing is taken back

class KeepFirst(Callback):
    "Return to the weights of the first epoch, as `SaveModelCallback` does if it was the best."
    order = SaveModelCallback.order
    def after_epoch(self):
        if self.epoch == 0: self.learn.save('first')
    def after_fit(self): self.learn.load('first', with_opt=False)

def test_the_best_epoch_may_be_one_before_the_branch(tmp_path):
    learn = deep_fit(tmp_path, 4, [KeepFirst()], K=4, branch=.5)
    path = 1, 0
    code, = learn.model.codes([path])
    shared = learn.model(randn(6), path, code)
    assert learn.model.K == 4 and learn.model.merge()
    torch.testing.assert_close(learn.model(randn(6), path, torch.ones(1)), shared)

@pytest.mark.parametrize('codes', [None, VertexCode(2, 0)])
def test_an_interrupted_fit_keeps_the_live_weights(codes, tmp_path):
    net, x, y, _ = make('rows')
    class Interrupt(Callback):
        order = 70
        def after_epoch(self):
            self.live = {name: t.clone() for name,t in self.model.tensors().items()}
            if self.epoch == 1: raise KeyboardInterrupt
    learn = fit(net, of_tensors(x, y), 0, K=2, codes=codes, ema=.9, path=tmp_path)
    interrupt = Interrupt()
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(KeyboardInterrupt): learn.fit(3, .1, cbs=interrupt)
        for name,t in learn.model.tensors().items(): assert t.equal(interrupt.live[name])
        learn.remove_cb(interrupt)
        learn.fit(1, .1) # begins a new average
    assert learn.average.n_steps == 2
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=5, show_plot=False)
    assert same(learn.model.state_dict(), before)

def test_the_code_module_may_be_frozen():
    codes = SimplexNet(Fixed.space, 2).requires_grad_(False)
    net, x, y, _ = make('rows')
    learn = fit(net, of_tensors(x, y), K=2, codes=codes, warmup=0., n_paths=1)
    assert not any(p.requires_grad for p in codes.parameters())
    assert not learn.k_shot.learns

# checkpoints

class Moves(nn.Module):
    "Buffers of all sorts that training moves"
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer('mean', torch.zeros(6))
        self.register_buffer('count', torch.zeros((), dtype=torch.long), persistent=False)
        self.register_buffer('queue', torch.zeros(0, 6))
        self.register_buffer('first', None)
    def forward(self, x):
        if self.training:
            x_ = x.detach()
            self.mean.lerp_(x_.mean(0), .1)
            self.count += 1
            self.queue = torch.cat([self.queue, x_[:1]])[-5:]
            if self.first is None: self.first = x_[0].clone()
        first = 0 if self.first is None else self.first
        return self.linear(x - self.mean - self.queue.sum(0)/5) + first/self.count.clamp_min(1)

class StopAfter(Callback):
    order = CheckpointCallback.order + 1
    def __init__(self, n): self.n = n
    def after_epoch(self):
        if self.epoch+1 == self.n: raise CancelFitException

def resumed(tmp_path, make_net, make_loaders, **kwargs):
    "Compare three epochs at once with one, a checkpoint, and two more in another learner."
    runs = []
    for folder,resume,n in (('whole', False, 3), ('parts', False, 1), ('parts', True, 3)):
        torch.manual_seed(0)
        net, dls = make_net(), make_loaders()
        if resume: torch.manual_seed(9)
        options = dict(K=2, sampler='uniform', warmup=0., n_paths=1) | kwargs
        cbs = [CheckpointCallback(tmp_path/folder, resume), StopAfter(n)]
        runs.append(fit(net, dls, 3, cbs, **options))
    (a, meta_a), (b, meta_b) = (load_newest(tmp_path/folder) for folder in ('whole', 'parts'))
    assert meta_a | dict(seconds=0) == meta_b | dict(seconds=0) and len(meta_a['log']) == 3
    assert set(a) == set(b)
    for name in a: assert a[name].equal(b[name]), name
    return runs[0], a, meta_a['log']

def moving():
    return Net(per_row(nn.Linear(5, 6)), [nn.Identity(), Moves()], nn.Sequential(head(), nn.BatchNorm1d(3)))

@pytest.mark.parametrize('track_bn', [False, True])
def test_buffers_that_training_moves_survive_to_the_bit(tmp_path, track_bn):
    def tensors(): return of_tensors(randn(5), CLASSES)
    learn, saved, _ = resumed(tmp_path, moving, tensors, track_bn=track_bn, sampler=Fixed((1,)))
    moves = learn.model.net.blocks[0][1]
    assert moves.count == 6 and len(moves.queue) == 5 and moves.mean.any()
    for name in ('mean', 'count', 'queue', 'first'): assert f'stats/blocks.0.1.{name}' in saved
    assert ('stats/head.1.running_mean' in saved) == track_bn
    torch.manual_seed(3)
    again = dict(K=2, branch=(), track_bn=track_bn, sampler=Fixed((1,)))
    other = kshot_learner(moving(), Fixed.space, tensors(), **again)
    load_model(other, *load_newest(tmp_path/'whole'))
    x = randn(5)
    code = torch.tensor([.3, .7])
    outs = [l.model.eval()(x, (1,), code) for l in (learn, other)]
    assert outs[0].equal(outs[1])

def test_another_networks_buffers_change_nothing(tmp_path):
    def tensors(): return of_tensors(randn(5), CLASSES)
    fit(moving(), tensors(), cbs=[CheckpointCallback(tmp_path)])
    plain = Net(per_row(nn.Linear(5, 6)), linear_ops(), nn.Sequential(head(), nn.BatchNorm1d(3)))
    plain.blocks[0][1] = nn.Sequential(nn.Linear(6, 6))
    learn = kshot_learner(plain, Fixed.space, tensors(), K=1, sampler=Fixed((1,)))
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError): load_model(learn, *load_newest(tmp_path))
    assert same(before, learn.model.state_dict())

@pytest.mark.parametrize('has_generator', [False, True])
def test_shuffled_loaders_of_torch_resume_to_the_bit(tmp_path, has_generator):
    def shuffled():
        generator = torch.Generator().manual_seed(5) if has_generator else None
        return of_torch(randn(5), CLASSES, shuffle=True, generator=generator)
    def net(): return make('rows')[0]
    resumed(tmp_path, net, shuffled)

@pytest.mark.parametrize('make_loaders', [of_torch, of_fastai])
def test_any_loader_is_logged_and_resumed(tmp_path, make_loaders):
    net, x, y, _ = make('rows')
    for resume,n in ((False, 1), (True, 2)):
        dls = make_loaders(x, y, shuffle=True)
        fit(net, dls, 2, [CheckpointCallback(tmp_path, resume), StopAfter(n)])
    log = load_newest(tmp_path)[1]['log']
    assert [row['epoch'] for row in log] == [1, 2] and 0 <= log[1]['acc_valid'] <= 1

def test_metrics_are_logged_by_name(tmp_path):
    net, x, y, loss_func = make('several_numbers')
    def mae(out, y): return (out-y).abs().mean()
    metrics = [mae, R2Score()]
    cbs = [CheckpointCallback(tmp_path)]
    learn = fit(net, of_tensors(x, y), 2, cbs, loss_func=loss_func, metrics=metrics)
    row = load_newest(tmp_path)[1]['log'][-1]
    _, loss, *values = learn.recorder.values[-1]
    assert [row['loss_valid'], row['mae_valid'], row['r2_score_valid']] == pytest.approx([loss, *values])
    assert 'acc_valid' not in row

# retraining

class AtPath(nn.Module):
    "The plain module of one path"
    def __init__(self, net, path=(1,)):
        super().__init__()
        self.net = net
        self.path = path
    def forward(self, x): return self.net(x, self.path)

def retrain_by_hand(module, batches, loss_func, recipe):
    "Follow a recipe of SGD by plain torch."
    opt = torch.optim.SGD(by_decay(module)[0], recipe.lr, .9, weight_decay=recipe.wd, nesterov=True)
    opt.add_param_group(dict(params=by_decay(module)[1], weight_decay=0.))
    for step in range(recipe.epochs*len(batches)):
        for group in opt.param_groups: group['lr'] = lr_at(step, len(batches), recipe)
        x, y = batches[step % len(batches)]
        loss_func(module(x), y).backward()
        opt.step()
        opt.zero_grad()

@pytest.mark.parametrize('kind', KINDS)
def test_retraining_is_plain_training(kind):
    net, x, y, loss_func = make(kind)
    module, by_hand = AtPath(net), AtPath(copy.deepcopy(net))
    recipe = get_recipe('quick', epochs=2)
    dls = of_tensors(x, y)
    log, _ = retrain(module, dls, recipe, loss_func=loss_func)
    plain_loss = loss_func or nn.CrossEntropyLoss()
    retrain_by_hand(by_hand, [*dls.train], plain_loss, recipe)
    for p,q in zip(module.parameters(), by_hand.parameters()): torch.testing.assert_close(p, q)
    (xb, yb), = dls.valid
    with torch.no_grad(): loss = plain_loss(by_hand.eval()(xb), yb).item()
    assert log[-1]['loss_valid'] == pytest.approx(loss, abs=1e-5)
    assert ('acc_valid' in log[-1]) == (loss_func is None or kind == 'weighted')

def test_retraining_by_a_metric_of_ones_own():
    net, x, y, loss_func = make('several_numbers')
    def closeness(out, y): return -(out-y).abs().mean()
    names = dict(closeness=closeness, r2_score=R2Score(), acc=accuracy)
    recipe = get_recipe('quick', epochs=1)
    for name,metric in names.items():
        key = f'{name}_valid'
        if metric is accuracy: net, x, y, loss_func = make('rows')
        module = AtPath(copy.deepcopy(net))
        log, _ = retrain(module, of_tensors(x, y), recipe, loss_func=loss_func, metric=metric)
        assert math.isfinite(log[0][key]) and len(log[0]) == 5
        if metric is closeness:
            assert log[0][key] == pytest.approx(closeness(module(x[16:]), y[16:]).item(), abs=1e-6)

@pytest.mark.parametrize('make_loaders', [of_torch, of_fastai])
@pytest.mark.parametrize('n_classes', [None, 3])
def test_retraining_on_any_loader(tmp_path, make_loaders, n_classes):
    net, x, y, _ = make('images')
    modules = []
    recipe = get_recipe('quick', epochs=2)
    for dls in (make_loaders(x, y), of_tensors(x, y)):
        if n_classes: dls.c = n_classes
        modules.append(AtPath(copy.deepcopy(net)))
        retrain(modules[-1], dls, recipe, tmp_path/str(len(modules)))
    for p,q in zip(*(module.parameters() for module in modules)): torch.testing.assert_close(p, q)

def test_retraining_on_two_inputs():
    torch.manual_seed(0)
    module = AtPath(Net(Both(), linear_ops(), head()))
    before = module.net.stem.b.weight.detach().clone()
    log, _ = retrain(module, two_inputs(), get_recipe('quick', epochs=1))
    assert not module.net.stem.b.weight.equal(before) and math.isfinite(log[0]['loss_valid'])

def test_retraining_resumes_buffers_of_all_sorts(tmp_path):
    def run(name, **kwargs):
        torch.manual_seed(0)
        module = AtPath(moving())
        dls = of_torch(randn(5), CLASSES, shuffle=True, generator=torch.Generator().manual_seed(5))
        retrain(module, dls, get_recipe('quick', epochs=3), tmp_path/name, **kwargs)
        return dict(module.named_parameters()) | dict(module.named_buffers())
    class Interrupt(Callback):
        def before_epoch(self):
            if self.epoch == 1: raise KeyboardInterrupt
    expected = run('whole')
    with pytest.raises(KeyboardInterrupt): run('parts', cbs=[Interrupt()])
    assert same(expected, run('parts', resume=True))

def dropouts(module): return [m.p for m in module.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d))]

@pytest.mark.parametrize('args,rates', [
    (dict(name='quick'), [.1, .3, .5, 0.]), (dict(name='strong', bs=8), [.1, .3, .5, .2]),
    (dict(name='quick', dropout=.4), [.4]*4), (dict(name='strong', bs=8, dropout=0.), [0.]*4)])
def test_rates_of_dropout_that_the_author_chose_stay(args, rates):
    op = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Dropout(.1), nn.Dropout2d(.3))
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.5), nn.Dropout(0.), head())
    module = AtPath(Net(nn.Conv2d(2, 6, 3), [nn.Identity(), op], last))
    seen = []
    class Look(Callback):
        def before_batch(self): seen.append(dropouts(self.model))
    retrain(module, of_tensors(randn(2, 5, 5), CLASSES), get_recipe(epochs=1, **args), cbs=[Look()])
    assert seen == [rates]*2

def test_frozen_parameters_stay_in_retraining():
    net, x, y, _ = make('rows')
    net.stem.requires_grad_(False)
    module = AtPath(net)
    before = copy.deepcopy(net.stem.state_dict())
    retrain(module, of_tensors(x, y), get_recipe('quick', epochs=1))
    assert same(before, net.stem.state_dict())

def test_a_supernet_made_double_after_training_scores_in_double():
    net = normed()
    learn = fit(net, of_tensors(randn(5), CLASSES))
    model, x = learn.model.double(), randn(5).double()
    batches = [(x[:12], CLASSES[:12]), (x[12:], CLASSES[12:])]
    plain = AtPath(copy.deepcopy(net).double())
    for name,p in plain.net.named_parameters(): p.data.copy_(model.tensors()[name][0])
    update_bn([xb for xb,_ in batches], plain)
    expected = F.cross_entropy(plain.eval()(x), CLASSES).item()
    loss = score_path(model, (1,), torch.ones(1), batches, batches).loss
    assert loss == pytest.approx(expected, abs=1e-9)
