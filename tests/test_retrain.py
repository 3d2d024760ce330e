"Retrainings that are interrupted, resume from bad checkpoints, or meet a loss that is not finite"
import json
import math
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from kshot.checkpoint import TrainingStopped
from kshot.data import digits_data
from kshot.networks import digits_net, subnet
from kshot.retrain import RecipeCallback, get_recipe, retrain

STRONG = get_recipe('strong', epochs=4, bs=100)
QUICK = get_recipe('quick', epochs=3)

def small_net(seed=0, channels=4):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.), nn.Linear(4*channels, 10))

def run(module, folder=None, recipe=STRONG, **kwargs):
    return retrain(module, digits_data(seed=1), recipe, folder, **kwargs)

def checkpoints(folder): return sorted(fname.name for fname in (folder/'checkpoint').iterdir())

def same_bits(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(t, u) for t,u in pairs)

class Interrupt(Callback):
    "Press Ctrl-C in one batch"
    def __init__(self, epoch, batch): self.at = epoch, batch
    def after_batch(self):
        if (self.epoch, self.iter) == self.at: raise KeyboardInterrupt

class WatchWeights(Callback):
    "Keep the first weight after each step"
    def __init__(self): self.seen = []
    def after_step(self): self.seen.append(self.learn.model[0].weight.detach().double())

class SpoilLoss(Callback):
    "Multiply the loss of one batch"
    order = 20
    def __init__(self, epoch, batch, factor): self.at, self.factor = (epoch, batch), factor
    def after_loss(self):
        if (self.epoch, self.iter) == self.at:
            self.learn.loss = self.learn.loss_grad = self.learn.loss_grad*self.factor

@pytest.fixture(scope='module')
def undisturbed():
    net = small_net()
    watch = WatchWeights()
    log, ema = run(net, cbs=[watch])
    return net, log, ema, watch.seen

@pytest.fixture
def interrupted(tmp_path):
    "A folder with two of four epochs"
    with pytest.raises(KeyboardInterrupt): run(small_net(), tmp_path, cbs=[Interrupt(2, 3)])
    return tmp_path

def test_the_average_is_of_every_step(undisturbed):
    net, log, ema, seen = undisturbed
    assert len(seen) == 4*8
    mean = seen[0]
    for step,weight in enumerate(seen[1:], 1):
        mean = mean + (weight-mean)*9/(10+step) # 1 - (1+step)/(10+step)
    torch.testing.assert_close(ema[0].weight.double(), mean, atol=1e-6, rtol=0)
    assert not torch.equal(ema[0].weight, net[0].weight)
    assert log[-1]['loss_ema'] != log[-1]['loss_valid']

def test_resumed_to_the_bit(interrupted, undisturbed):
    whole, log, ema, _ = undisturbed
    assert checkpoints(interrupted) == ['epoch_00001.safetensors', 'epoch_00002.safetensors']
    net = small_net(1)
    result = run(net, interrupted, resume=True)
    assert result.log == log and same_bits(net, whole) and same_bits(result.ema, ema)
    assert checkpoints(interrupted) == ['epoch_00003.safetensors', 'epoch_00004.safetensors']
    rows = (interrupted/'log.jsonl').read_text().splitlines()
    assert [json.loads(row) for row in rows] == log

def test_resumed_from_the_checkpoint_before_a_damaged_one(interrupted, undisturbed, capsys):
    whole, log, ema, _ = undisturbed
    newest = interrupted/'checkpoint'/checkpoints(interrupted)[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    net = small_net(1)
    result = run(net, interrupted, resume=True)
    assert result.log == log and same_bits(net, whole) and same_bits(result.ema, ema)
    assert 'trying the one before' in capsys.readouterr().err

def test_a_folder_is_resumed_only_if_asked(interrupted):
    with pytest.raises(ValueError, match='holds a retraining already: resume it or choose another'):
        run(small_net(), interrupted)

@pytest.mark.parametrize('kwargs,error', [
    (dict(seed=1), 'checkpoint of seed 0, expected 1'),
    (dict(recipe=STRONG._replace(epochs=5)), 'checkpoint of epochs 4, expected 5')])
def test_another_run_is_refused(interrupted, kwargs, error):
    with pytest.raises(ValueError, match=error):
        run(small_net(), interrupted, resume=True, **kwargs)

def test_another_network_is_refused(interrupted):
    error = r"\(4, 1, 3, 3\) for tensor '0.weight', expected \(5, 1, 3, 3\)"
    with pytest.raises(ValueError, match=error):
        run(small_net(channels=5), interrupted, resume=True)

def test_another_subnet_is_refused_though_all_shapes_agree(tmp_path):
    net = digits_net(channels=4)
    recipe = get_recipe('mild', epochs=1, bs=100)
    log, ema = run(subnet(net, (0,1,0,2)), tmp_path, recipe)
    assert math.isfinite(log[0]['loss_valid']) and ema is None
    with pytest.raises(ValueError, match='checkpoint of subnet'): # another op without weights
        run(subnet(net, (0,1,1,2)), tmp_path, recipe, resume=True)

def draw_in(epoch, seed):
    "Return what dropout would draw first."
    follow = RecipeCallback(QUICK, seed)
    follow.learn = SimpleNamespace(epoch=epoch)
    with torch.random.fork_rng():
        follow.before_epoch()
        return torch.rand(3).tolist()

def test_dropout_is_drawn_by_seed_and_epoch():
    draws = [draw_in(epoch, seed) for epoch,seed in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert all(draws.count(draw) == 1 for draw in draws)
    assert draw_in(1, 0) == draws[1]

def test_dropout_depends_on_the_seed(undisturbed):
    net = small_net()
    run(net, seed=1)
    assert not torch.equal(net[-1].weight, undisturbed[0][-1].weight)

def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    kept = 'expected a finite number; the checkpoint of epoch 1 is kept'
    cases = [(3, math.nan, f'epoch 2, batch 4: loss nan, {kept}'),
             (3, math.inf, f'epoch 2, batch 4: loss inf, {kept}'),
             (7, 1e38, r'epoch 2, validation \(valid\)')] # the last batch spoils the weights
    for batch,factor,error in cases:
        with pytest.raises(TrainingStopped, match=f'training stopped in {error}'):
            run(small_net(), tmp_path, QUICK, resume=True, cbs=[SpoilLoss(1, batch, factor)])
    assert run(small_net(), tmp_path, QUICK, resume=True).log == run(small_net(), recipe=QUICK).log

def test_a_loss_that_is_not_finite_at_once():
    error = 'epoch 1, batch 1: loss nan, expected a finite number; there is no checkpoint yet'
    with pytest.raises(TrainingStopped, match=error):
        run(small_net(), recipe=QUICK, cbs=[SpoilLoss(0, 0, math.nan)])
