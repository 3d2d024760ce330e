"""Make search spaces of torchvision's networks, beside NVIDIA's Model Optimizer: results/elastic.json.

    python -m venv beside                 # the other package stays out of kshot's environment
    beside/bin/pip install -e . torchvision
    beside/bin/pip install --no-deps nvidia-modelopt==0.47.0 nvidia-ml-py pulp omegaconf \
        antlr4-python3-runtime==4.9.3 regex huggingface_hub # and what it imports
    beside/bin/python tools/elastic.py            # fifteen minutes; skips what is not installed
    beside/bin/python tools/elastic.py resnet18   # some networks; the rows of the others stay

Both packages get the same network, the same shares of channels and the same sizes of kernels.
A step is a forward pass, a backward pass and SGD, at one random path: in the network of all paths,
and in the subnet of this path, which is extracted and small. Times are CPU time of one thread, in turn.
"""
import argparse
import json
import math
import os
import random
import warnings
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter, process_time
from typing import NamedTuple

os.environ |= dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
warnings.filterwarnings('ignore')

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model

from kshot.base.files import write_json
from kshot.base.inputs import tensors_in
from kshot.cli.timing import interleaved
from kshot.elastic import elastic
from kshot.networks import subnet
from kshot.record import environment
from kshot.train import by_decay, sgd

if find_spec('modelopt'):
    from modelopt.torch import nas
    from modelopt.torch.nas.autonas import AutoNASConfig
    from modelopt.torch.nas.search_space import SearchSpace

OUT = Path(__file__).parent.parent/'results'/'elastic.json'
WIDTHS = .5, .75, 1.

class Network(NamedTuple):
    bs:int=32 # images of a batch
    px:int=64 # pixels a side
    rounds:int=5 # that are timed
    kwargs:dict={}

SMALL = Network(rounds=15)
NETWORKS = dict(
    resnet18=SMALL, resnet50=Network(), mobilenet_v2=SMALL, mobilenet_v3_small=SMALL,
    mobilenet_v3_large=SMALL, efficientnet_b0=SMALL, convnext_tiny=Network(),
    regnet_y_400mf=SMALL, densenet121=Network(), shufflenet_v2_x1_0=SMALL,
    googlenet=Network(kwargs=dict(init_weights=False)), vit_b_16=Network(4, 224), swin_t=Network(),
    fcn_resnet50=Network(8, kwargs=dict(weights_backbone=None)))

class Converted(NamedTuple):
    net:nn.Module
    sizes:list[int]  # choices of each block
    full:object      # the path of the given network
    small:object     # the path of the fewest channels and blocks
    drawn:object     # a random path
    run:Callable     # (batch, path) -> output
    alone:Callable   # path -> module that has the path's parameters only

def kshot(model:nn.Module, x:Tensor) -> Converted:
    "Convert a network by kshot."
    net, space = elastic(model, x.shape[1:], WIDTHS)
    def number(block, width, op): return range(len(block.choices))[width if block.kind == 'width' else op]
    def path(width, op): return tuple(number(block, width, op) for block in space.blocks)
    drawn, = space.sample(np.random.default_rng(0), 1)
    return Converted(net, space.sizes, path(-1, 0), path(0, -1), drawn, net, lambda path: subnet(net, path))

def modelopt_rules() -> dict:
    "Return the default rules of Model Optimizer with kshot's shares of channels and sizes of kernels."
    rules = AutoNASConfig().model_dump()
    of_kshot = dict(channels_ratio=WIDTHS, channel_divisor=8, kernel_size=(3, 5),
                    features_ratio=WIDTHS, feature_divisor=8)
    for kind in rules.values():
        for rule in kind.values(): rule |= {key: of_kshot[key] for key in rule if key in of_kshot}
    return rules

def modelopt(model:nn.Module, x:Tensor) -> Converted:
    "Convert a network by Model Optimizer."
    nas.set_modelopt_patches_enabled(False) # training would draw a path of its own at each step
    net = nas.convert(deepcopy(model), [('autonas', modelopt_rules())])
    sizes = [len(block.choices) for _,block in SearchSpace(net).named_hparams(configurable=True)]
    random.seed(0)
    full, small, drawn = (nas.sample(net, of) for of in (max, min, random.choice))
    def run(x, path):
        nas.select(net, path)
        return net(x)
    def alone(path):
        copied = deepcopy(net)
        nas.select(copied, path)
        return nas.export(copied)
    nas.select(net, full) # has all parameters
    return Converted(net, sizes, full, small, drawn, run, alone)

PACKAGES = dict(kshot=kshot, modelopt=modelopt)

# what is measured

@torch.no_grad()
def largest_difference(a:object, b:object) -> float: # relative to the largest number of `b`
    pairs = [*zip(tensors_in(a), tensors_in(b), strict=True)]
    return max(((a-b).abs().max()/b.abs().max()).item() for a,b in pairs)

@torch.no_grad()
def macs(c:Converted, path:object, x:Tensor) -> int: # of one image
    with FlopCounterMode(display=False) as counter: c.run(x[:1], path)
    return counter.get_total_flops()//2

def training_step(net:nn.Module, run:Callable, x:Tensor) -> Callable: # step(i)
    "Return the training of a network by SGD."
    opt = sgd(by_decay(net.train()), lr=1e-4)
    def step(i):
        sum(t.square().mean() for t in tensors_in(run(x))).backward()
        opt.step()
        opt.zero_grad()
    return step

def steps_of(c:Converted, x:Tensor) -> dict[str, Callable]: # 'elastic' and 'alone' -> step(i)
    "Return the training of a path, in the network of all paths and alone."
    alone = c.alone(c.drawn)
    return dict(elastic=training_step(c.net, lambda x: c.run(x, c.drawn), x),
                alone=training_step(alone, alone, x))

@torch.no_grad()
def given_network(name:str) -> nn.Module:
    "Return a network of torchvision; layers that begin with zeros, which hide differences, are drawn."
    model = get_model(name, **NETWORKS[name].kwargs)
    for p in model.parameters():
        if p.ndim > 1 and not p.any(): nn.init.normal_(p, std=.02)
    return model

def measure(name:str, package:str) -> dict: # a row
    "Convert a network and measure what comes out; the row says where that fails."
    row = dict(model=name, package=package)
    bs, px, rounds, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = given_network(name)
    x = torch.randn(bs, 3, px, px)
    few = x[:2]
    try:
        start, cpu_start = perf_counter(), process_time()
        c = PACKAGES[package](model, few)
        row |= dict(seconds=perf_counter()-start, cpu_seconds=process_time()-cpu_start)
        row |= dict(blocks=len(c.sizes), log10_paths=sum(map(math.log10, c.sizes)))
        for module in (model, c.net): module.eval()
        with torch.no_grad():
            row['full_differs'] = largest_difference(c.run(few, c.full), model(few))
            row['alone_differs'] = largest_difference(c.alone(c.drawn).eval()(few), c.run(few, c.drawn))
        row |= {f'macs_{key}': macs(c, getattr(c, key), x) for key in ('full', 'small', 'drawn')}
        times = interleaved(steps_of(c, x), rounds, clock=process_time)
        over = np.quantile(np.divide(times['elastic'], times['alone']), (.25, .5, .75))
        row |= dict(over_alone=over.round(3).tolist(), alone_ms=1e3*np.median(times['alone']))
    except Exception as e: row['error'] = f'{type(e).__name__}: {str(e).strip()}'.splitlines()[0]
    return {key: float(f'{value:.4g}') if isinstance(value, float) else value for key,value in row.items()}

def main():
    "Measure the networks that are named, or all; print their rows and keep them."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('networks', nargs='*', help=f'{", ".join(NETWORKS)} (all)')
    names = parser.parse_args().networks or [*NETWORKS]
    for name in names:
        if name not in NETWORKS: parser.error(f'network {name!r}, expected some of {", ".join(NETWORKS)}')
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False) # its MACs are not counted
    kept = json.loads(OUT.read_text()) if OUT.exists() else dict(rows=[], versions={})
    packages = [name for name in PACKAGES if find_spec(name)]
    for name in PACKAGES.keys() - packages: print(f'{name} is not measured: it is not installed')
    def is_kept(row): return row['model'] not in names or row['package'] not in packages
    rows = [*filter(is_kept, kept['rows'])]
    for name in names:
        for package in packages:
            print(name, package, flush=True)
            rows.append(measure(name, package))
    print(pd.DataFrame(rows).to_string(index=False))
    about = environment()
    installed = dict(torchvision=version('torchvision'))
    if 'modelopt' in packages: installed['modelopt'] = version('nvidia-modelopt')
    about['versions'] = kept['versions'] | about['versions'] | installed
    note = 'CPU time of one thread, in turn: quartiles of ratios; the machine was busy with other work'
    sizes = {name: f'{bs} images of {px} px' for name,(bs,px,*_) in NETWORKS.items()}
    write_json(OUT, dict(note=note, sizes=sizes, **about, rows=rows))

if __name__ == '__main__': main()
