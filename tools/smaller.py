"""A trained network made smaller, in several ways with equally many updates: results/smaller.json.

    python tools/smaller.py            # a quarter of an hour of processor time; keeps each finished seed
    python tools/smaller.py --seeds 1 --n_train 250 --epochs 1 --n_scored 4 # to try it

A small ResNet is trained on CIFAR-10. Then each way has as many updates again, and half as many at the end:

- uniform: the same share of the channels of each layer, the most important first, trained alone
- K=1, K=4: supernets of all its smaller versions, and the best path that a search finds under the
  MACs of the uniform one
"""
import argparse
import json
import os
from pathlib import Path
from time import process_time

os.environ |= dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')

import torch
from torch import nn

from kshot.base.files import write_json
from kshot.cost import Cost
from kshot.data import image_data
from kshot.elastic import elastic, elastic_ends
from kshot.evaluate import calibrated_subnet, score_path
from kshot.networks import subnet
from kshot.record import environment
from kshot.retrain import get_recipe, retrain
from kshot.search import search
from kshot.train import cosine, kshot_learner

OUT = Path(__file__).parent.parent/'results'/'smaller.json'
PX = 16

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
        self.net, self.space = elastic(self.model, (3, PX, PX))
        self.macs = Cost(self.net, (3, PX, PX)).macs
        self.largest = elastic_ends(self.space)['largest']
        is_width = [block.kind == 'width' for block in self.space.blocks]
        self.uniform = tuple(0 if narrow else o for narrow,o in zip(is_width, self.largest)) # all blocks

    def train(self, module:nn.Module, epochs:int, lr:float) -> nn.Module:
        retrain(module, self.dls, get_recipe('quick', max(1, epochs), lr, 128), seed=self.seed)
        return module

    @torch.no_grad()
    def accuracy(self, module:nn.Module) -> float: # on the test images
        right = [module.eval()(x).argmax(1) == y for x,y in self.dls[2]]
        return round(torch.cat(right).float().mean().item(), 4)

    def row(self, name:str, small:nn.Module, path:tuple[int, ...], start:float) -> dict:
        before = self.accuracy(small)
        after = self.accuracy(self.train(small, self.epochs//2, .02))
        share = round(self.macs(path)/self.macs(self.largest), 3)
        return dict(name=name, seed=self.seed, path=self.space.format(path), share_macs=share,
                    before=before, after=after, cpu_s=round(process_time()-start, 1))

    def by_hand(self) -> dict:
        start = process_time()
        small = self.train(subnet(self.net, self.uniform), self.epochs, .05)
        return self.row('uniform', small, self.uniform, start)

    def searched(self, K:int) -> dict:
        start = process_time()
        torch.manual_seed(self.seed)
        how = dict(sampler='sandwich', distill=True, seed=self.seed)
        learn = kshot_learner(self.net, self.space, self.dls, K=K, **how)
        rate = cosine(.02) # a small one: the gradients of four paths add up
        with learn.showing(False): learn.fit(self.epochs, cbs=rate)
        valid, calibration = [*self.dls.valid], self.dls.train.fixed(4)
        @torch.no_grad()
        def code(path): return learn.model.codes(torch.tensor([path]))[0]
        def score(path): return -score_path(learn.model, path, code(path), valid, calibration).loss
        budget = dict(macs=self.macs(self.uniform))
        found = search(self.space, score, self.n_scored, seed=self.seed, progress=False,
                       costs=dict(macs=self.macs), budgets=budget)
        best = self.space.parse(found.path[0])
        return self.row(f'K={K}', calibrated_subnet(learn.model, best, code(best), calibration), best, start)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name,default in dict(seeds=3, n_train=10_000, epochs=8, n_scored=100).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--out', type=Path, default=OUT)
    args = parser.parse_args()
    settings = dict(n_train=args.n_train, epochs=args.epochs, n_scored=args.n_scored, px=PX)
    kept = json.loads(args.out.read_text()) if args.out.exists() else {}
    rows = kept.get('rows', []) if kept.get('settings') == settings else []
    for seed in range(args.seeds):
        if any(row['seed'] == seed for row in rows): continue
        ways = Ways(seed, args.n_train, args.epochs, args.n_scored)
        given = dict(name='given', seed=seed, share_macs=1., after=ways.accuracy(ways.model))
        rows += [given, ways.by_hand(), ways.searched(1), ways.searched(4)]
        write_json(args.out, environment() | dict(settings=settings, rows=rows))
        for row in rows[-4:]: print(row, flush=True)

if __name__ == '__main__': main()
