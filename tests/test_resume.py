"Training resumes to the bit with any of torch's optimizers, for the banks and for the code module"
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.tracker import EarlyStoppingCallback

from kshot.benchmark import get_space
from kshot.checkpoint import CheckpointCallback, load_newest
from kshot.data import digits_data, held
from kshot.evaluate import accuracy_loss, calibrated_subnet, score_path
from kshot.networks import digits_net
from kshot.simplex import FreeCode, VertexCode
from kshot.train import cosine, kshot_learner, sgd, torch_optimizer

rmsprop = partial(torch_optimizer, make=torch.optim.RMSprop, momentum=.9)
momentum = partial(torch.optim.SGD, momentum=.9)
BANKS = dict(sgd=sgd, adamw=torch_optimizer, rmsprop=rmsprop)
CODES = dict(sgd=momentum, adamw=torch.optim.AdamW, rmsprop=torch.optim.RMSprop)
EPOCHS = 2

class StopAfter(Callback):
    "End a fit early, as if it had been killed after a checkpoint."
    order = CheckpointCallback.order + 1
    def __init__(self, n): self.n = n
    def after_epoch(self):
        if self.epoch+1 == self.n: raise CancelFitException

def fit(folder, seed=0, resume=False, n=EPOCHS, codes=None, **kwargs):
    "Train a small run, or a part of it."
    torch.manual_seed(seed)
    space = get_space('digits')
    dls = digits_data(bs=200, seed=seed)
    codes = codes(space) if codes else None
    net = digits_net(channels=4)
    learn = kshot_learner(net, space, dls, codes=codes, **dict(K=2, warmup=0., n_paths=3) | kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(EPOCHS, cbs=[cosine(.01), CheckpointCallback(folder, resume), StopAfter(n)])

def check_resume(tmp_path, **kwargs):
    "Compare two epochs at once with one, a checkpoint, and one more in a learner of other weights."
    fit(tmp_path/'whole', **kwargs)
    fit(tmp_path/'halves', n=1, **kwargs)
    fit(tmp_path/'halves', seed=7, resume=True, **kwargs)
    (a, meta_a), (b, meta_b) = (load_newest(tmp_path/name) for name in ('whole', 'halves'))
    assert meta_a | dict(seconds=0) == meta_b | dict(seconds=0)
    assert set(a) == set(b)
    for name in a: assert a[name].equal(b[name]), name
    return a

@pytest.mark.parametrize('codes', CODES)
@pytest.mark.parametrize('banks', BANKS)
def test_two_epochs_are_one_and_one(tmp_path, banks, codes):
    tensors = check_resume(tmp_path, opt_func=BANKS[banks], codes_opt=CODES[codes])
    parts = {name.split('/')[0] for name in tensors}
    assert {'weights', 'codes', 'opt', 'codes_opt', 'rng'} <= parts
    kept = dict(sgd='momentum_buffer', adamw='exp_avg_sq', rmsprop='square_avg')
    assert any(name.startswith('opt/') and name.endswith(kept[banks]) for name in tensors)
    assert any(name.startswith('codes_opt/') and name.endswith(kept[codes]) for name in tensors)

@pytest.mark.parametrize('banks', BANKS)
def test_simplex_steps_of_their_own(tmp_path, banks):
    check_resume(tmp_path, mode='alternate', opt_func=BANKS[banks])

def few_shot(space): return VertexCode(2, 0)
def free(space): return FreeCode(space, 2)

@pytest.mark.parametrize('banks', BANKS)
@pytest.mark.parametrize('codes', [few_shot, free])
def test_other_codes(tmp_path, banks, codes):
    check_resume(tmp_path, codes=codes, opt_func=BANKS[banks])

@pytest.mark.parametrize('banks', BANKS)
@pytest.mark.parametrize('branch', [.1, .5, .8, (.2, .7)])
def test_before_at_and_after_a_split(tmp_path, banks, branch):
    tensors = check_resume(tmp_path, branch=branch, K=4, opt_func=BANKS[banks])
    assert {len(t) for name,t in tensors.items() if name.startswith('weights/')} == {4}

@pytest.mark.parametrize('banks', BANKS)
def test_few_shot_from_one_supernet(tmp_path, banks):
    check_resume(tmp_path, branch=(.2, .7), K=4, codes=lambda space: VertexCode(4, 0), opt_func=BANKS[banks])

def test_a_split_that_another_run_does_not_have(tmp_path):
    fit(tmp_path/'run', n=1, branch=.2)
    with pytest.raises(ValueError, match='checkpoint of splits .* expected'):
        fit(tmp_path/'run', resume=True, branch=.7)

@pytest.mark.parametrize('mode,codes,branch', [
    ('joint', None, ()), ('joint', few_shot, .5), ('alternate', few_shot, ()),
    ('alternate', None, .375)]) # splits in a simplex step, which moves no average, before the checkpoint
def test_sandwich_distillation_and_average(tmp_path, mode, codes, branch):
    options = dict(sampler='sandwich', distill=True, ema=.9, mode=mode, codes=codes, branch=branch)
    tensors = check_resume(tmp_path, **options)
    assert any(not t.equal(tensors[name.replace('average/', 'weights/')])
               for name,t in tensors.items() if name.startswith('average/'))
    with pytest.raises(ValueError, match='checkpoint of ema 0.9, expected 0.5'):
        fit(tmp_path/'halves', resume=True, **options | dict(ema=.5))

def test_the_last_epoch_of_a_stopped_training_is_kept(tmp_path):
    learn = kshot_learner(digits_net(channels=4), get_space('digits'), digits_data(bs=200), K=2)
    stop = EarlyStoppingCallback(min_delta=1e9, patience=1) # nothing improves so much
    checkpoint = CheckpointCallback(tmp_path)
    with learn.showing(False): learn.fit(9, cbs=[checkpoint, stop])
    assert [row['epoch'] for row in checkpoint.log] == [1, 2]
    _, meta = load_newest(tmp_path)
    assert meta['epoch'] == 2

@pytest.mark.parametrize('share,K', [(0., 1), (.3, 2), (.6, 4)])
def test_codes_serve_before_the_last_split(share, K):
    "The code of a path after all splits scores it, and makes its subnet, at any time."
    class Interrupt(Callback):
        def before_batch(self):
            if self.training and self.pct_train >= share: raise KeyboardInterrupt
    space, dls = get_space('digits'), digits_data(bs=200)
    learn = kshot_learner(digits_net(channels=4), space, dls, K=4, branch=(.2, .5))
    with learn.showing(False), pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Interrupt())
    assert learn.model.K == K
    path = (1, 2, 3, 4)
    with torch.no_grad(): code, = learn.k_shot.codes([path])
    valid, train = held(dls.valid), dls.train.fixed(2)
    score = score_path(learn.model, path, code, valid, train)
    subnet = calibrated_subnet(learn.model, path, code, train)
    assert accuracy_loss(subnet, valid).loss == pytest.approx(score.loss)
