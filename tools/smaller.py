"""A trained network made smaller, in several ways with equally many updates: results/smaller.json.

    python tools/smaller.py            # an hour of processor time; keeps each finished seed
    python tools/smaller.py --seeds 0 --n_train 250 --epochs 1 --n_scored 4 # to try it

A small ResNet is trained on CIFAR-10. Then each way has as many updates again, and half as many at the
end, at two learning rates, of which the one with the better validation accuracy counts:

- uniform: the same share of the channels of each layer, the most important first, trained alone
- K=1, K=4: supernets of all its smaller versions, and the best path that a search finds under the
  MACs of the uniform one
- K=1 alone, K=4 alone: the same paths, cut from the given network as `uniform` is and trained alone
- autonas: NVIDIA's Model Optimizer with the same shares of channels; tools/elastic.py says how to
  install it, torchprofile==0.0.4 comes on top, and without it this way is left out
"""
import argparse
import json
import os
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import process_time

os.environ |= dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')

import torch
from torch import nn

from kshot.base.files import write_json
from kshot.cost import Cost, count_macs
from kshot.data import image_data
from kshot.elastic import elastic, elastic_ends
from kshot.evaluate import calibrated_subnet, score_path
from kshot.networks import subnet
from kshot.record import environment
from kshot.retrain import get_recipe, retrain
from kshot.search import search
from kshot.train import cosine, kshot_learner

if find_spec('modelopt'): from modelopt.torch import nas

OUT = Path(__file__).parent.parent/'results'/'smaller.json'
PX = 16
WIDTHS = .5, .7, .85, 1.
UNIFORM = 1 # .7: half of the MACs

def conv(c_in:int, c_out:int, k:int, stride:int=1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c_in, c_out, k, stride, k//2, bias=False), nn.BatchNorm2d(c_out))

class Residual(nn.Module):
    def __init__(self, c_in:int, c_out:int, stride:int=1):
        super().__init__()
        self.body = nn.Sequential(conv(c_in, c_out, 3, stride), nn.ReLU(), conv(c_out, c_out, 3))
        self.short = nn.Identity() if c_in == c_out else conv(c_in, c_out, 1, stride)
    def forward(self, x): return torch.relu(self.short(x) + self.body(x))

def resnet() -> nn.Module:
    stem = nn.Sequential(conv(3, 16, 3), nn.ReLU())
    blocks = [Residual(16, 16), Residual(16, 16), Residual(16, 32, 2), Residual(32, 32),
              Residual(32, 64, 2), Residual(64, 64)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(stem, nn.Sequential(*blocks), *head)

class Ways:
    "The ways to make one trained network smaller."
    def __init__(self, seed:int, n_train:int, epochs:int, n_scored:int):
        self.seed = seed
        self.epochs = epochs
        self.n_scored = n_scored
        torch.manual_seed(seed)
        self.dls = image_data('cifar10', 128, seed, n_train=n_train, n_valid=2000, px=PX)
        self.model = self.train(resnet(), epochs, .1)
        self.net, self.space = elastic(self.model, (3, PX, PX), WIDTHS, divisor=1)
        self.macs = Cost(self.net, (3, PX, PX)).macs # of a path
        self.largest = elastic_ends(self.space)['largest']
        is_width = [block.kind == 'width' for block in self.space.blocks]
        self.uniform = tuple(UNIFORM if narrow else o for narrow,o in zip(is_width, self.largest))

    def train(self, module:nn.Module, epochs:int, lr:float) -> nn.Module:
        retrain(module, self.dls, get_recipe('quick', max(1, epochs), lr, 128), seed=self.seed)
        return module

    @torch.no_grad()
    def accuracy(self, module:nn.Module, split:int=2) -> float: # on the test images, or of another split
        right = [module.eval()(x).argmax(1) == y for x,y in self.dls[split]]
        return round(torch.cat(right).float().mean().item(), 4)

    def row(self, name:str, small:nn.Module, start:float, **about:object) -> dict:
        before = self.accuracy(small)
        tries = [self.train(deepcopy(small), self.epochs//2, lr) for lr in (.02, .1)]
        after = self.accuracy(max(tries, key=partial(self.accuracy, split=1)))
        small_macs, given_macs = (count_macs(net, (3, PX, PX)) for net in (small, self.model))
        about |= dict(before=before, after=after, cpu_s=round(process_time()-start, 1))
        return dict(name=name, seed=self.seed, share_macs=round(small_macs/given_macs, 3), **about)

    def alone(self, name:str, path:tuple[int, ...]) -> dict:
        start = process_time()
        small = self.train(subnet(self.net, path), self.epochs, .1)
        return self.row(name, small, start, path=self.space.format(path))

    def searched(self, K:int) -> list[dict]:
        start = process_time()
        torch.manual_seed(self.seed)
        how = dict(sampler='sandwich', distill=True, seed=self.seed)
        learn = kshot_learner(self.net, self.space, self.dls, K=K, **how)
        rate = cosine(.05) # a small one: the gradients of four paths add up
        with learn.showing(False): learn.fit(self.epochs, cbs=rate)
        valid, calibration = [*self.dls.valid], self.dls.train.fixed(4)
        @torch.no_grad()
        def code(path): return learn.model.codes(torch.tensor([path]))[0]
        def score(path): return -score_path(learn.model, path, code(path), valid, calibration).loss
        budget = dict(macs=self.macs(self.uniform))
        found = search(self.space, score, self.n_scored, seed=self.seed, progress=False,
                       costs=dict(macs=self.macs), budgets=budget)
        best = self.space.parse(found.path[0])
        small = calibrated_subnet(learn.model, best, code(best), calibration)
        return [self.row(f'K={K}', small, start, path=found.path[0]), self.alone(f'K={K} alone', best)]

    def autonas(self) -> dict:
        start = process_time()
        rules = {'nn.Conv2d': dict(channels_ratio=WIDTHS, channel_divisor=1), # kernels of 3 stay
                 'nn.BatchNorm2d': dict(features_ratio=WIDTHS, feature_divisor=1)}
        rules['nn.Sequential'] = dict(min_depth=0)
        rules = {kind: {'*': rule} for kind,rule in rules.items()}
        net = nas.convert(deepcopy(self.model), [('autonas', rules)])
        self.train(net, self.epochs, .1) # draws a path at each step
        valid, scored = [*self.dls.valid], []
        @torch.no_grad()
        def score(net):
            net.eval() # measures its batch norms
            scored.append(torch.stack([nn.functional.cross_entropy(net(x), y) for x,y in valid]).mean())
            return -scored[-1].item()
        how = dict(score_func=score, num_iters=10*self.n_scored, population_size=max(4, self.n_scored//4),
                   candidate_size=max(2, self.n_scored//16), verbose=False)
        share = 100*self.macs(self.uniform)/self.macs(self.largest)
        small, _ = nas.search(net, dict(flops=f'{share}%'), torch.zeros(1, 3, PX, PX), how)
        return self.row('autonas', small, start, n_scored=len(scored))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    for name,default in dict(n_train=10_000, epochs=8, n_scored=100).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--out', type=Path, default=OUT)
    args = parser.parse_args()
    settings = dict(n_train=args.n_train, epochs=args.epochs, n_scored=args.n_scored,
                    px=PX, widths=[*WIDTHS])
    kept = json.loads(args.out.read_text()) if args.out.exists() else {}
    rows = kept.get('rows', []) if kept.get('settings') == settings else []
    for seed in args.seeds:
        if any(row['seed'] == seed for row in rows): continue
        ways = Ways(seed, args.n_train, args.epochs, args.n_scored)
        given = dict(name='given', seed=seed, share_macs=1., after=ways.accuracy(ways.model))
        new = [given, ways.alone('uniform', ways.uniform), *ways.searched(1), *ways.searched(4)]
        if find_spec('modelopt'): new.append(ways.autonas())
        rows += new
        write_json(args.out, environment() | dict(settings=settings, rows=rows))
        for row in new: print(row, flush=True)

if __name__ == '__main__': main()
