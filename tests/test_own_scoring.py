"Networks, targets and metrics of one's own are scored as plain torch, fastai and sklearn score them"
import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai import metrics as fm
from fastai.learner import AvgMetric
from helpers.processes import call_ranks
from sklearn import metrics as sk
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torchvision.ops import StochasticDepth

from kshot.data import TensorLoader
from kshot.evaluate import (accuracy_loss, calibrated_subnet, evaluating, recalibrate_bn, score_path,
                            score_paths)
from kshot.networks import Chain
from kshot.rank import rank_scores
from kshot.simplex import UniformCode
from kshot.space import Block, Space
from kshot.supernet import Supernet

ONE = torch.ones(1)
SPACE = Space('own', (Block('block', ('op0', 'op1')),))

# --- statistics of norms

class Normed(nn.Module):
    "Images -> logits; `watch` sees what each call of the norm reads."
    def __init__(self, norm):
        super().__init__()
        self.watch = nn.Identity()
        self.norm = norm
        self.drop = nn.Dropout(.5)
        self.depth = StochasticDepth(.5, 'row')
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Identity()])])
        self.head = nn.Linear(4, 3)

    def apply_norm(self, x): return self.norm(self.watch(x))

    def calls(self, x, path):
        x = self.drop(self.depth(self.apply_norm(x)))
        return self.apply_norm(self.blocks[0][path[0]](x)).relu()

    def forward(self, x, path):
        x = F.dropout(self.calls(x, path), .5, self.training)
        return self.head(x.mean((2, 3)))

class Rarely(Normed):
    "A second call for some batches only."
    def calls(self, x, path):
        x = self.blocks[0][path[0]](self.apply_norm(x))
        return self.apply_norm(x) if x.shape[0] > 8 else x

class LikeOFA(Normed):
    "Leading channels of a norm, by function, as once-for-all networks take them."
    def apply_norm(self, x):
        bn = self.norm
        momentum = bn.momentum
        if bn.training and bn.num_batches_tracked is not None:
            bn.num_batches_tracked += 1
            if momentum is None: momentum = 1/float(bn.num_batches_tracked)
        c = self.watch(x).shape[1]
        stats = bn.running_mean[:c], bn.running_var[:c]
        return F.batch_norm(x, *stats, bn.weight[:c], bn.bias[:c], bn.training, momentum, bn.eps)

class ByFunction(Normed):
    "A norm whose momentum is handed to the function as it is; one call to a forward."
    def calls(self, x, path):
        bn = self.norm
        x = self.watch(self.blocks[0][path[0]](x))
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum)

class Inherits(nn.BatchNorm2d):
    def forward(self, x): return super().forward(x) + 0

class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        stats = self.running_mean, self.running_var
        return F.batch_norm(x, *stats, self.weight, self.bias, self.training, self.momentum, self.eps)

class ByHand(nn.Module):
    "A norm of one's own; the buffers are replaced, not changed."
    def __init__(self, n, momentum=.1):
        super().__init__()
        self.momentum = momentum
        self.register_buffer('running_mean', torch.zeros(n))
        self.register_buffer('running_var', torch.ones(n))

    def move(self, old, new): return (1-self.momentum)*old + self.momentum*new

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            self.running_mean = self.move(self.running_mean, mean.detach())
            self.running_var = self.move(self.running_var, var.detach())
        return (x - mean[:,None,None])/(var[:,None,None] + 1e-5).sqrt()

class InPlace(ByHand):
    def move(self, old, new): return old.lerp_(new, self.momentum)

class Decays(ByHand):
    "The other convention: momentum is the share of the old."
    def move(self, old, new): return self.momentum*old + (1-self.momentum)*new

NORMS = {
    'by_hand': (Normed, ByHand(4)), 'in_place': (Normed, InPlace(4)), 'sync': (Normed, nn.SyncBatchNorm(4)),
    'torch': (Normed, nn.BatchNorm2d(4)), 'without_affine': (Normed, nn.BatchNorm2d(4, affine=False)),
    'momentum_none': (Normed, nn.BatchNorm2d(4, momentum=None)), 'rarely': (Rarely, nn.BatchNorm2d(4)),
    'ofa': (LikeOFA, nn.BatchNorm2d(6)), 'by_function': (ByFunction, nn.BatchNorm2d(4)),
    'inherits': (Normed, Inherits(4)), 'own_forward': (Normed, OwnForward(4)),
    'instance': (Normed, nn.InstanceNorm2d(4, affine=True, track_running_stats=True))}

def image_batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 4, 5, 5, generator=generator)+1, torch.arange(n)%3) for n in sizes]

def averages(module, batches, per_image=False):
    "Mean and variance of what `watch` sees, averaged over calls; only norms are in training mode."
    seen = []
    module = copy.deepcopy(module).eval()
    hook = module.net.watch.register_forward_hook(lambda m, inputs, out: seen.append(out))
    module.net.norm.train()
    module.net.norm.momentum = .1
    with torch.no_grad():
        for x,_ in batches: module(x)
    hook.remove()
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    if per_image: variances = [x.var((2, 3)).mean(0) for x in seen]
    else: variances = [x.var((0, 2, 3)) for x in seen]
    return means, torch.stack(variances).mean(0), len(seen)

@pytest.mark.parametrize('name', NORMS)
def test_statistics_are_the_average_over_calls(name):
    "Equal to those by hand, and to `update_bn` where it can run; modes, momenta and hooks come back."
    cls, norm = NORMS[name]
    batches = image_batches(16, 16, 8)
    torch.manual_seed(0)
    supernet = Supernet(cls(copy.deepcopy(norm)), 1, track_bn=True)
    supernet.net.head.eval() # one module in another mode
    modes = {m: m.training for m in supernet.modules()}
    momentum = supernet.net.norm.momentum
    before = copy.deepcopy(supernet.state_dict())
    weights, = supernet.weights([(0,)], ONE[None])
    stats = recalibrate_bn(supernet, (0,), weights, batches)
    assert {m: m.training for m in supernet.modules()} == modes
    assert supernet.net.norm.momentum == momentum and not supernet.net.norm._forward_pre_hooks
    for key,t in supernet.state_dict().items(): assert torch.equal(t, before[key]), key
    subnet = calibrated_subnet(supernet, (0,), ONE, batches)
    plain = copy.deepcopy(subnet)
    mean, var, n_calls = averages(subnet, batches, name == 'instance')
    for key,value in dict(running_mean=mean, running_var=var).items():
        torch.testing.assert_close(stats[f'norm.{key}'][:4], value, atol=1e-5, rtol=1e-5)
        assert torch.equal(getattr(subnet.net.norm, key), stats[f'norm.{key}'])
    if name in ('by_function', 'own_forward', 'instance', 'by_hand', 'in_place'): return
    plain.eval()
    plain.train = lambda mode=True: plain # `update_bn` would turn dropout on
    plain.net.norm.training = True
    update_bn([x for x,_ in batches], plain)
    for key,t in plain.net.norm.named_buffers():
        torch.testing.assert_close(t, stats[f'norm.{key}'], atol=1e-6, rtol=1e-6)
    assert stats['norm.num_batches_tracked'] == n_calls

@pytest.mark.parametrize('dims', [1, 2, 3])
def test_statistics_of_rows_sequences_and_volumes(dims):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims-1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims-1]
    torch.manual_seed(0)
    stem = nn.Sequential(conv(2, 4, 3), norm(4))
    head = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    net = Chain(stem, [[nn.Sequential(norm(4), nn.ReLU()), nn.Identity()]], head)
    batches = [(torch.randn(6, 2, *[4]*dims), torch.arange(6)%3) for _ in range(3)]
    net(batches[0][0], (0,))
    supernet = Supernet(net, 1)
    plain = supernet.subnet((0,), ONE)
    update_bn([x for x,_ in batches], plain)
    score = accuracy_loss(plain.eval(), batches)
    assert score_path(supernet, (0,), ONE, batches, batches) == pytest.approx(score, abs=1e-6)
    frame = score_paths(supernet, UniformCode(1), SPACE, [(0,), (1,)], batches, batches)
    assert frame.loss_super[0] == pytest.approx(score.loss, abs=1e-6)

def test_what_is_no_average_is_refused():
    supernet = Supernet(Normed(Decays(4, .9)), 1)
    for n in (1, 3):
        with pytest.raises(ValueError, match='norm Decays keeps its statistics at momentum 1'):
            calibrated_subnet(supernet, (0,), ONE, image_batches(16, 8, 8)[:n])
    assert supernet.net.norm.momentum == .9 and not supernet.net.norm._forward_hooks

@pytest.mark.parametrize('norm', [nn.BatchNorm2d(4), ByHand(4)])
@pytest.mark.parametrize('is_shared', [False, True])
def test_a_norm_that_blocks_of_a_chain_share(norm, is_shared):
    "Its statistics are those of all its calls, so the paths are not walked as a tree."
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(4, 4, 3), norm)
    second = nn.Sequential(nn.Conv2d(4, 4, 1), norm if is_shared else copy.deepcopy(norm))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    supernet = Supernet(Chain(nn.Identity(), [[first, nn.MaxPool2d(3, 1)], [second, nn.Tanh()]], head), 1)
    space = Space('shared', (Block('a', ('op0', 'op1')), Block('b', ('op0', 'op1'))))
    batches = image_batches(16, 8, 8)
    frame = score_paths(supernet, UniformCode(1), space, list(space), batches, batches)
    for path,row in zip(space, frame.itertuples()):
        plain = supernet.subnet(path, ONE).eval()
        norms = [m for m in plain.modules() if hasattr(m, 'running_mean')]
        calls = dict.fromkeys(norms, 0)
        def average(m, _):
            calls[m] += 1
            m.momentum = 1/calls[m]
        for m in norms:
            m.train()
            m.register_forward_pre_hook(average)
        with torch.no_grad():
            for x,_ in batches: plain(x)
        assert row.loss_super == pytest.approx(accuracy_loss(plain.eval(), batches).loss, abs=1e-6)

class Breaks(Normed):
    def forward(self, x, path):
        x = self.calls(x, path)
        if len(x) == 8: raise KeyError('broken')
        return x

@pytest.mark.parametrize('norm', [nn.BatchNorm2d(4), OwnForward(4)])
def test_everything_comes_back_after_an_exception(norm):
    supernet = Supernet(Breaks(norm), 1, track_bn=True)
    supernet.net.drop.eval()
    supernet.codes = nn.Dropout().eval()
    modes = {m: m.training for m in supernet.modules()}
    before = copy.deepcopy(supernet.state_dict())
    weights, = supernet.weights([(0,)], ONE[None])
    with pytest.raises(KeyError): recalibrate_bn(supernet, (0,), weights, image_batches(16, 8))
    with pytest.raises(KeyError), evaluating(supernet): raise KeyError
    assert {m: m.training for m in supernet.modules()} == modes
    assert supernet.net.norm.momentum == .1 and not supernet.net.norm._forward_pre_hooks
    for key,t in supernet.state_dict().items(): assert torch.equal(t, before[key]), key

# --- targets and metrics

GENERATOR = torch.Generator().manual_seed(0)
def randn(*sizes): return torch.randn(*sizes, generator=GENERATOR)
def randint(n, *sizes): return torch.randint(n, sizes, generator=GENERATOR)
def ignored(y):
    y = y.clone()
    y[0] = y[-1,1:] = -100
    return y

CLASSES = {
    'classes': (randn(10, 4), randint(4, 10)), 'bytes': (randn(10, 4), randint(4, 10).byte()),
    'int32': (randn(10, 4), randint(4, 10).int()), 'bool': (randn(10, 2), randint(2, 10).bool()),
    'tokens': (randn(10, 4, 6), randint(4, 10, 6)), 'pixels': (randn(10, 4, 5, 6), randint(4, 10, 5, 6)),
    'ignored': (randn(10, 4, 5, 6), ignored(randint(4, 10, 5, 6))),
    'volume': (randn(10, 3, 2, 3, 4), randint(3, 10, 2, 3, 4)),
    'soft': (randn(10, 4), randn(10, 4).softmax(1)),
    'soft_pixels': (randn(10, 4, 3, 3), randn(10, 4, 3, 3).softmax(1)),
    'double': (randn(10, 4).double(), randn(10, 4).double().softmax(1)),
    'square': (randn(4, 4), torch.eye(4)*.9 + .025), 'half': (randn(10, 4).half(), randint(4, 10))}

def batches_of(out, y, size=7): return list(zip(out.split(size), y.split(size)))

def own_accuracy(out, y): return (out.argmax(1) == (y.argmax(1) if y.is_floating_point() else y)).float()

def plain_margins(out, classes): # of the targets that count
    out = out.double().movedim(1, -1).reshape(-1, out.shape[1]).tolist()
    margins = []
    for logits,c in zip(out, classes.flatten().tolist()):
        if c == -100: continue
        others = logits[:c] + logits[c+1:]
        margins.append(logits[c] - max(others))
    return margins

@pytest.mark.parametrize('name', CLASSES)
def test_classes_are_scored_as_torch_scores_one_batch(name):
    out, y = CLASSES[name]
    scores = accuracy_loss(nn.Identity(), batches_of(out, y))
    is_soft = y.is_floating_point()
    classes = y.argmax(1) if is_soft else y.long()
    exact = F.cross_entropy(out.double(), y.double() if is_soft else y.long())
    counted = classes != -100
    right = (out.argmax(1) == classes)[counted]
    assert scores.metric == pytest.approx(right.double().mean().item(), abs=1e-9)
    if y.ndim == 4 and is_soft: # torch's mean is over rows there
        exact = -(y*out.log_softmax(1)).sum(1).mean()
    assert scores.loss == pytest.approx(exact.item(), rel=1e-5)
    margins = torch.tensor(plain_margins(out, classes))
    assert scores.margin == pytest.approx(margins.mean().item(), rel=1e-5)
    assert scores.sigmoid == pytest.approx(margins.sigmoid().mean().item(), rel=1e-5)
    own = accuracy_loss(nn.Identity(), batches_of(out, y), loss_func=own_accuracy, metric=own_accuracy)
    assert own[2:] == scores[2:]

OUT = randn(10, 4)
REFUSED = {
    'numbers': (OUT, randn(10)), 'column': (randn(10, 1), randn(10, 1)),
    'one_hot': (OUT, torch.eye(4)[randint(4, 10)].long()),
    'too_large': (OUT, randint(4, 10)+1), 'negative': (OUT, randint(4, 10)-1),
    'many_labels': (OUT, randint(2, 10, 4).float()), 'not_a_sum': (OUT, randn(10, 4).softmax(1)*2),
    'short': (OUT, randint(4, 10)[:6]), 'image': (randn(10, 3, 8, 8), randn(10, 1, 8, 8)),
    'binary': (randn(10, 1), randint(2, 10)), 'nan': (OUT, torch.full((10, 4), math.nan)),
    'vector': (randn(10), randint(2, 10)),
    'language': (randn(10, 6, 4), randint(4, 10, 6))}

@pytest.mark.parametrize('name', REFUSED)
def test_other_targets_are_refused_in_a_line(name):
    out, y = REFUSED[name]
    def zero(out, y): return 0.
    def refuses(forward, **kwargs):
        with pytest.raises(ValueError, match='pass loss_func and metric') as e:
            accuracy_loss(forward, [(out, y)], **kwargs)
        assert '\n' not in str(e.value)
    for kwargs in ({}, dict(loss_func=zero), dict(metric=zero)): refuses(nn.Identity(), **kwargs)
    for structure in ((out, out), dict(a=out)): refuses(lambda x: structure)
    own = accuracy_loss(nn.Identity(), [(out, y)], loss_func=zero, metric=zero)
    assert own[:2] == (0, 0) and all(map(math.isnan, own[2:]))

def negative_mae(out, y): return -(out-y).abs().mean()
def exact(out, y): return ((out > 0) == (y > .5)).float().mean()
def per_row(out, y): return (out-y).square()[:,0]

NUMBERS = randn(10, 1), randn(10, 1)
LABELS = randn(10, 3), randint(2, 10, 3).float()
MASKS = randn(10, 3, 4, 4), randint(3, 10, 4, 4)
BINARY = MASKS[0][:,:2], randint(2, 10, 4, 4)
def r2(out, y): return sk.r2_score(y, out)
def macro_f1(out, y): return sk.f1_score(y, out > 0, average='macro')
def miou(out, y): return sk.jaccard_score(y.flatten(), out.argmax(1).flatten(), average='macro')
def mcc(out, y): return sk.matthews_corrcoef(y.flatten(), out.argmax(1).flatten())
def area(out, y): return sk.roc_auc_score(y.flatten(), out.softmax(1)[:,1].flatten())
def iou(out, y): return sk.jaccard_score(y.flatten(), out.argmax(1).flatten())
def f1(out, y): return sk.f1_score(y.flatten(), out.argmax(1).flatten())
def f1_by_class(out, y): return sk.f1_score(y, out.argmax(1), average='macro')
def mae_as_number(out, y): return float(negative_mae(out, y))
def rmse(out, y): return fm.mse(out, y)**.5
def correlation(out, y): return np.corrcoef(out[:,0], y[:,0])[0,1]
ROWS = MASKS[0][...,0,0], MASKS[1][:,0,0]
TWO = BINARY[0][...,0,0], BINARY[1][:,0,0]

METRICS = {
    'mae': (NUMBERS, negative_mae, negative_mae), 'mse': (NUMBERS, fm.mse, fm.mse),
    'a_number': (NUMBERS, mae_as_number, negative_mae), 'per_row': (NUMBERS, per_row, fm.mse),
    'r2': (NUMBERS, fm.R2Score(), r2), 'rmse': (NUMBERS, fm.rmse, rmse),
    'pearson': (NUMBERS, fm.PearsonCorrCoef(), correlation),
    'averaged': (NUMBERS, AvgMetric(negative_mae), negative_mae),
    'multi': (LABELS, exact, exact), 'accuracy_multi': (LABELS, fm.accuracy_multi, exact),
    'f1_multi': (LABELS, fm.F1ScoreMulti(), macro_f1),
    'dice': (BINARY, fm.Dice, f1), 'jaccard': (BINARY, fm.JaccardCoeff(), iou),
    'miou': (MASKS, fm.JaccardCoeffMulti(), miou), 'mcc': (ROWS, fm.MatthewsCorrCoef(), mcc),
    'f1': (ROWS, fm.F1Score(average='macro'), f1_by_class), 'roc': (TWO, fm.RocAucBinary(), area)}

@pytest.mark.parametrize('name', METRICS)
@pytest.mark.parametrize('size', [7, 10])
def test_metrics_are_what_they_are_over_all_rows(name, size):
    (out, y), metric, reference = METRICS[name]
    def mean(t): return t.reshape(len(t), -1).float().mean(1)
    def loss_func(out, y): return F.huber_loss(mean(out), mean(y))
    for _ in range(2): # a metric starts anew each time
        batches = batches_of(out, y, size)
        value, loss, *_ = accuracy_loss(nn.Identity(), batches, loss_func=loss_func, metric=metric)
        assert value == pytest.approx(float(reference(out, y)), rel=1e-5)
        assert loss == pytest.approx(loss_func(out, y).item(), rel=1e-5)
        assert type(value) is type(loss) is float

def test_perplexity_reads_the_loss():
    out, y = CLASSES['classes']
    scores = accuracy_loss(nn.Identity(), batches_of(out, y), metric=fm.Perplexity())
    assert scores.metric == pytest.approx(math.exp(scores.loss), rel=1e-5)

@pytest.mark.parametrize('batches', [[], iter([]), [(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))],
                                     [(torch.zeros(3, 4), torch.full((3,), -100))]])
def test_nothing_to_score_on_is_an_error(batches):
    for metric in (None, fm.accuracy, fm.F1Score()):
        with pytest.raises(ValueError, match='nothing to score on'):
            accuracy_loss(nn.Identity(), batches, metric=metric)

# --- inputs and outputs of any structure

class Pairs(nn.Module):
    "A tuple or a dict of two tensors, or one -> outputs of a structure."
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap
        self.norm = nn.BatchNorm1d(4)
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.Tanh()])])
        self.head = nn.Linear(4, 3)

    def forward(self, x, path):
        a, b = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else (x, x)
        early = self.norm(a-b.float())
        return self.wrap(self.head(self.blocks[0][path[0]](early)), self.head(early))

X = randn(24, 4), randint(9, 24, 4)
Y = randint(3, 24)
INPUTS = {
    'one': lambda i: (X[0][i], Y[i]), 'tuple': lambda i: ((X[0][i], X[1][i]), Y[i]),
    'dict': lambda i: (dict(a=X[0][i], b=X[1][i]), Y[i]), 'flat': lambda i: (X[0][i], X[1][i], Y[i]),
    'nested_targets': lambda i: (X[0][i], dict(y=Y[i]))}
OUTPUTS = {
    'logits': lambda y, aux: y, 'auxiliary': lambda y, aux: (y, aux),
    'dict': lambda y, aux: dict(y=y, aux=aux)}

def class_of(y): return y['y'] if isinstance(y, dict) else y
def both(out):
    if isinstance(out, dict): return tuple(out.values())
    return out if isinstance(out, tuple) else (out, out)
def own_loss(out, y):
    final, early = [F.cross_entropy(logits, class_of(y)) for logits in both(out)]
    return final + .3*early
def own_metric(out, y): return fm.accuracy(both(out)[0], class_of(y))

@pytest.mark.parametrize('inputs', INPUTS)
@pytest.mark.parametrize('outputs', OUTPUTS)
@pytest.mark.parametrize('K', [1, 2])
def test_inputs_and_outputs_of_any_structure(inputs, outputs, K):
    "A path's scores are those of its subnet after torch's `update_bn`, and can be ranked."
    torch.manual_seed(0)
    batches = [INPUTS[inputs](slice(i, i+8)) for i in range(0, 24, 8)]
    supernet = Supernet(Pairs(OUTPUTS[outputs]), K)
    own = dict(loss_func=own_loss, metric=own_metric)
    frame = score_paths(supernet, UniformCode(K), SPACE, [(1,), (0,)], batches, batches, **own)
    assert list(frame) == ['path', 'metric_super', 'loss_super', 'margin_super', 'sigmoid_super']
    def as_x(batch): return batch[:-1] if len(batch) > 2 else batch[0]
    for path,row in zip([(1,), (0,)], frame.itertuples()):
        plain = supernet.subnet(path, ONE.expand(K)/K)
        plain.train()
        plain.net.norm.momentum = None
        with torch.no_grad():
            for batch in batches: plain(as_x(batch))
            losses = [own_loss(plain.eval()(as_x(batch)), batch[-1]) for batch in batches]
            rights = [own_metric(plain(as_x(batch)), batch[-1]) for batch in batches]
        assert row.loss_super == pytest.approx(np.mean(losses), rel=1e-5)
        assert row.metric_super == pytest.approx(np.mean(rights))
    truth = frame.set_index('path')[['metric_super']].rename(columns=dict(metric_super=0))
    assert rank_scores(frame, truth, n_boot=2).tau[0] == 1

@pytest.mark.parametrize('metric', [None, fm.accuracy, fm.R2Score()])
def test_the_tree_of_a_chain_scores_as_its_paths_do(metric):
    torch.manual_seed(0)
    is_of_numbers = isinstance(metric, fm.AccumMetric)
    y = X[0][:,:1] if is_of_numbers else Y
    loss_func = F.mse_loss if is_of_numbers else None
    stem = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    block = [nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())]
    net = Chain(stem, [block, copy.deepcopy(block)], nn.Linear(4, 1 if is_of_numbers else 3))
    space = Space('chain', (Block('a', ('op0', 'op1')), Block('b', ('op0', 'op1'))))
    batches = [(X[0][i:i+8], y[i:i+8]) for i in (0, 8, 16)]
    def score(batches_, supernet=Supernet(net, 1)):
        return score_paths(supernet, UniformCode(1), space, list(space), batches_, batches,
                           loss_func=loss_func, metric=metric)
    tree = score(batches)
    one_by_one = score(TensorLoader(X[0], y, 8)) # no list
    np.testing.assert_allclose(tree.iloc[:,1:].to_numpy(), one_by_one.iloc[:,1:].to_numpy(), rtol=1e-6)

# --- several processes

SHARED = '''
import sys, json
sys.path[:0] = sys.argv[1:]
import torch
from torch.nn import functional as F
from fastai.metrics import R2Score
from kshot.base.distributed import distributed
from kshot.evaluate import recalibrate_bn, score_path, accuracy_loss
from kshot.supernet import Supernet
from test_own_scoring import Rarely, image_batches, ONE

def score(out, y): return (out.argmax(1) == y).float().mean()
with distributed(timeout=60) as shard:
    torch.manual_seed(0)
    supernet = Supernet(Rarely(torch.nn.BatchNorm2d(4)), 1)
    batches = image_batches(16, 8, 8) # the first calls its norm twice
    calibration = batches[shard.rank::shard.size]
    share = [(x[shard.rank::shard.size], y[shard.rank::shard.size]) for x,y in image_batches(8, 1)]
    scores = {}
    for name,own in dict(usual={}, own=dict(loss_func=F.cross_entropy, metric=score)).items():
        scores[name] = score_path(supernet, (0,), ONE, share, calibration, True, **own)
    def corner(x): return x[:,:1,0,0]
    corners = [(x, corner(x)) for x,_ in share]
    weights, = supernet.weights([(0,)], ONE[None])
    stats = recalibrate_bn(supernet, (0,), weights, calibration, True)
    names = 'running_mean', 'running_var', 'num_batches_tracked'
    scores['stats'] = [stats[f'norm.{name}'].tolist() for name in names]
    for name,call in dict(metric=lambda: accuracy_loss(corner, corners, True, F.mse_loss, R2Score()),
                          nothing=lambda: accuracy_loss(len, [], True),
                          uncalibrated=lambda: recalibrate_bn(supernet, (0,), weights, [], True)).items():
        try: scores[name] = str(call())
        except ValueError as e: scores[name] = str(e)
    if shard.rank == 0: print(json.dumps(scores))
'''

def test_shards_score_as_one_process_does():
    "Also if ranks call a norm differently often, and if one has no rows of a batch."
    folders = str(Path(__file__).parent), str(Path(__file__).parent/'helpers')
    results = []
    for n in (1, 2):
        code, out, err = call_ranks(n, SHARED, *folders)
        assert code == 0, err
        results.append(json.loads(out.splitlines()[-1]))
    one, two = results
    for name in ('usual', 'own'): assert two[name] == pytest.approx(one[name], rel=1e-5)
    for i,expected in enumerate(one['stats']):
        np.testing.assert_allclose(two['stats'][i], expected, rtol=1e-5, atol=1e-6)
    assert one['stats'][2] == 4
    assert 'metric r2_score in 2 processes' in two['metric']
    assert one['metric'].startswith('Scores(metric=1.0, loss=0.0,')
    assert 'nothing to score on' in two['nothing'] and 'no batches for batch norm' in two['uncalibrated']
