"""Codes a neuron and low-rank differences, in plain torch on Views-Bench: rows of results/codes_tried.json.

    python tools/codes_tried.py path,4,0 neuron,4,0 path,16,2 --seeds 0 1   # kind, K, rank; 0: full rank

What a kind gains decides whether it is worth a place in the package. All begin with one set of weights
and add K differences of it after a fifth of the updates.
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from kshot.base.files import write_json
from kshot.benchmark import get_benchmark, get_net
from kshot.data import get_data
from kshot.networks import subnet
from kshot.rank import kendall_tau
from kshot.record import environment
from kshot.simplex import SimplexNet
from kshot.tables import get_truth
from kshot.train import sgd

OUT = Path(__file__).parent.parent/'results'/'codes_tried.json'
N_PATHS = 16 # updates of the banks for one of the codes

class Mixture(nn.Module):
    "Weights of a network plus K differences, combined by a code of a path or of each of its neurons."
    def __init__(self, net:nn.Module, space, K:int, by_neuron:bool, rank:int):
        super().__init__()
        self.shared = nn.ParameterList(p.detach().clone() for p in net.parameters())
        self.names = [name for name,_ in net.named_parameters()]
        self.K = K
        self.by_neuron = by_neuron
        self.rank = rank
        self.has_split = False
        self.sizes = [len(p) for p in self.shared] # neurons, or entries of a vector
        self.codes = SimplexNet(space, K)
        if by_neuron: self.codes = SimplexNet(space, K*sum(self.sizes))
        self.full = nn.ParameterDict()
        self.left = nn.ParameterDict()
        self.right = nn.ParameterDict()

    def split(self):
        self.has_split = True
        for i,p in enumerate(self.shared):
            rows = p.flatten(1) if p.ndim > 1 else p[None]
            rank = min(self.rank, *rows.shape)
            if p.ndim > 1 and rank:
                self.left[str(i)] = nn.Parameter(p.new_zeros(self.K, len(rows), rank))
                right = rows.std()*torch.randn(self.K, rank, rows.shape[1])
                self.right[str(i)] = nn.Parameter(right.detach())
            else: self.full[str(i)] = nn.Parameter(p.new_zeros(self.K, *p.shape))

    def code(self, path) -> Tensor: # (K,), or (neurons, K)
        if not self.by_neuron: return self.codes([path])[0]
        net = self.codes
        return net.net(net._onehot([path])).view(-1, self.K).softmax(-1)

    def differences(self, path) -> list[Tensor]:
        code = self.code(path)
        parts = code.split(self.sizes) if self.by_neuron else [code]*len(self.shared)
        return [self._difference(str(i), c).view_as(p) for i,(c,p) in enumerate(zip(parts, self.shared))]

    def _difference(self, i:str, code:Tensor) -> Tensor:
        if i in self.left: return torch.einsum('k,kor,kri->oi', code, self.left[i], self.right[i])
        if self.by_neuron: return torch.einsum('mk,km...->m...', code, self.full[i])
        return torch.tensordot(code, self.full[i], 1)

    def weights(self, path) -> dict[str, Tensor]:
        if not self.has_split: return dict(zip(self.names, self.shared))
        # full differences hold all that is learned from now on, as banks do
        shared = self.shared if self.rank else [p.detach() for p in self.shared]
        return {name: p+d for name,p,d in zip(self.names, shared, self.differences(path))}

    @torch.no_grad()
    def even(self, path): # the mixed weights move by their gradient, wherever the code is
        code = self.code(path)
        parts = code.split(self.sizes) if self.by_neuron else [code]*len(self.shared)
        for banks in (self.full, self.left, self.right):
            for i,bank in banks.items():
                if bank.grad is None: continue
                length2 = parts[int(i)].square().sum(-1)
                bank.grad /= length2.view(-1, *[1]*(bank.ndim-2)) if self.by_neuron else length2

    def by_decay(self) -> list[list[nn.Parameter]]:
        matrices = [p for p in self.shared if p.ndim > 1]
        vectors = [p for p in self.shared if p.ndim == 1]
        for bank in self.full.values(): (matrices if bank.ndim > 2 else vectors).append(bank)
        return [matrices + [*self.left.values(), *self.right.values()], vectors]

def train(mixture:Mixture, net:nn.Module, space, batches, n_updates:int, lr:float, rng, branch=.2):
    codes = torch.optim.Adam(mixture.codes.parameters(), 1e-3)
    opt = sgd(mixture.by_decay(), lr)
    for i in range(n_updates):
        if i == int(branch*n_updates) and mixture.K > 1:
            mixture.split()
            momentum = opt.state
            opt = sgd(mixture.by_decay(), lr)
            for p in mixture.shared: opt.state[p] = momentum[p]
        for group in opt.param_groups: group['lr'] = lr*(1+np.cos(np.pi*i/n_updates))/2
        path, = space.sample(rng, 1)
        x, y = next(batches)
        out = functional_call(net, mixture.weights(path), (x, path), tie_weights=False)
        F.cross_entropy(out, y, label_smoothing=.1).backward()
        if mixture.has_split: mixture.even(path)
        opt.step()
        opt.zero_grad()
        if mixture.has_split and i % N_PATHS == 0:
            for p in mixture.codes.parameters():
                if p.grad is not None: p.grad /= N_PATHS
            codes.step()
            codes.zero_grad()

@torch.no_grad()
def score(mixture:Mixture, net:nn.Module, path, calibration, batches) -> tuple[float, float]: # accuracy, loss
    weights = mixture.weights(path)
    for name,p in net.named_parameters(): p.copy_(weights[name])
    alone = subnet(net, path)
    for m in alone.modules():
        if not isinstance(m, nn.BatchNorm2d): continue
        m.reset_running_stats()
        m.momentum = None # a mean over batches
    for x,_ in calibration: alone.train()(x)
    alone.eval()
    outs = [(alone(x), y) for x,y in batches]
    out = torch.cat([out for out,_ in outs])
    y = torch.cat([y for _,y in outs])
    return (out.argmax(1) == y).float().mean().item(), F.cross_entropy(out, y).item()

def measure(kind:str, K:int, rank:int, seed:int) -> dict:
    started = time.monotonic()
    torch.manual_seed(seed)
    benchmark = get_benchmark('views')
    net = get_net('views')
    mixture = Mixture(net, benchmark.space, K, kind == 'neuron', rank)
    data = get_data('digits', bs=50, passes=15, seed=seed)
    def endless():
        while True: yield from data.train
    train(mixture, net, benchmark.space, endless(), 6000, .05, np.random.default_rng(seed))
    truth = get_truth('views').mean(axis=1)
    calibration = data.train.fixed(4, seed)
    valid = list(data.valid)
    scores = [score(mixture, net, benchmark.space.parse(path), calibration, valid) for path in truth.index]
    acc, loss = np.array(scores).T
    return dict(kind=kind, K=K, rank=rank, seed=seed, acc=round(float(acc.mean()), 4),
                tau_acc=round(kendall_tau(acc, truth), 4), tau_loss=round(kendall_tau(-loss, truth), 4),
                seconds=round(time.monotonic()-started))

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('kinds', nargs='+', help='path or neuron, K and rank, such as path,16,2')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = json.loads(OUT.read_text())['rows'] if OUT.exists() else []
    for seed in args.seeds:
        for text in args.kinds:
            kind, K, rank = text.split(',')
            if kind == 'neuron' and rank != '0': parser.error(f'{text}, expected rank 0 for neurons')
            asked = dict(kind=kind, K=int(K), rank=int(rank), seed=seed)
            if any(asked.items() <= row.items() for row in done): continue
            done.append(measure(**asked))
            print(done[-1], flush=True)
            write_json(OUT, dict(rows=done) | environment())

if __name__ == '__main__': main()
