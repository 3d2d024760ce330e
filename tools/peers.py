"""Time training steps and scoring beside other packages on the same networks: results/peers.json.

    python -m venv peers                  # the other packages stay out of kshot's environment
    peers/bin/pip install -e .            # kshot
    peers/bin/pip install --no-deps xautodl==1.0.0 nni==3.0 ofa==0.1.0.post202307202001
    peers/bin/pip install --no-deps colorama json_tricks cloudpickle schema typeguard==3.0.2 \
        websockets responses astor prettytable simplejson nvidia-ml-py pytorch_lightning \
        lightning_utilities torchmetrics hyperopt filelock psutil # what nni 3.0 imports
    peers/bin/python tools/peers.py       # ten minutes; a package that is absent is skipped
    peers/bin/python tools/peers.py nb201 # one contest; the other's rows stay

Every contestant gets the same images, paths and optimizer, and the layout in memory that suits it.
Times are CPU time of one thread, in turn, and each is divided by that of plain torch in the same round.
"""
import argparse
import json
import os
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import process_time
from typing import NamedTuple

os.environ |= dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
warnings.filterwarnings('ignore') # of packages that are older than this Python

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

from kshot.base.files import write_json
from kshot.benchmark import get_net
from kshot.cli.timing import interleaved
from kshot.evaluate import score_path
from kshot.networks import chain, subnet
from kshot.nets.layers import conv_bn
from kshot.nets.ops import pool_and_classify
from kshot.record import environment
from kshot.spaces import MB_OPS, NB201_OPS, mobilenet_space, nb201_string
from kshot.supernet import Supernet
from kshot.train import by_decay, sgd

OUT = Path(__file__).parent.parent/'results'/'peers.json'
N_PATHS = 8 # that are trained and scored in turn
PEERS = 'xautodl', 'nni', 'ofa'
NO_PEERS = dict(naslib='it is not on PyPI') # and why

# contestants

class Contestant(NamedTuple):
    choose:Callable    # path -> module of a batch that runs this path
    score:Callable     # (path, batches to score on, batches to calibrate on)
    opt:Callable       # path -> optimizer of its parameters
    alone:Callable     # path -> plain module that has the path's parameters only, to count

def logits(out) -> Tensor:
    "Return what is classified by; xautodl's networks return features, too."
    return out[-1] if isinstance(out, tuple) else out

@torch.no_grad()
def evaluate(model:nn.Module, batches:list) -> float: # accuracy
    "Score a network whose norms are calibrated."
    model.eval()
    n_right = sum((logits(model(x)).argmax(1) == y).sum().item() for x,y in batches)
    model.train()
    return n_right/sum(len(y) for _,y in batches)

def contestant(
    model:nn.Module, # supernet
    choose:Callable, # makes it run a path, and returns it
    calibrate:Callable=update_bn, # (batches, module)
    alone:Callable|None=None, # as in `Contestant`; None: as `choose`
    layout:torch.memory_format=torch.channels_last, # of its kernels
) -> Contestant:
    "Make a contestant of a supernet that holds its path as a state."
    model.to(memory_format=layout)
    opt = sgd(by_decay(model), lr=.01)
    def score(path, batches, calibration):
        module = choose(path)
        calibrate(calibration, module)
        return evaluate(module, batches)
    return Contestant(choose, score, lambda path: opt, alone or choose)

def plain(net:nn.Module, paths:list) -> Contestant:
    "Make a contestant of each path's own network, as a straight line of torch's modules."
    subnets = {path: symbolic_trace(subnet(net, path)) for path in paths}
    def score(path, batches, calibration):
        update_bn(calibration, subnets[path])
        return evaluate(subnets[path], batches)
    def opt(path): return sgd(by_decay(subnets[path]), lr=.01)
    return Contestant(subnets.get, score, opt, subnets.get)

def kshot(net:nn.Module, K:int) -> Contestant:
    "Make a contestant of K supernets at the uniform code."
    supernet = Supernet(net, K)
    code = torch.full((K,), 1/K)
    opt = sgd(by_decay(supernet), lr=.01)
    def choose(path): return lambda x: supernet(x, path, code)
    def score(path, batches, calibration):
        return score_path(supernet, path, code, batches, calibration)
    def alone(path): return supernet.subnet(path, code)
    return Contestant(choose, score, lambda path: opt, alone)

def xautodl_nb201(channels:int, n_cells:int) -> Contestant:
    "Make a contestant of the random supernet of NAS-Bench-201's authors."
    from xautodl.models import get_cell_based_tiny_net
    from xautodl.models.cell_searchs.genotypes import Structure
    net = get_cell_based_tiny_net(dict(
        name='RANDOM', C=channels, N=n_cells, max_nodes=4, num_classes=10, space=[*NB201_OPS],
        affine=True, track_running_stats=True, super_type='basic'))
    def choose(path):
        net.arch_cache = Structure.str2structure(nb201_string(path))
        return net
    return contestant(net, choose)

def nni_nb201(channels:int, n_cells:int) -> Contestant:
    "Make a contestant of NNI's model space under its random one-shot strategy."
    from nni.nas.hub.pytorch import NasBench201
    from nni.nas.oneshot.pytorch.supermodule.sampling import PathSamplingLayer
    from nni.nas.strategy import RandomOneShot
    net = RandomOneShot().mutate_model(NasBench201(channels, n_cells, 10))
    def to_contiguous(_, inputs): return inputs[0].contiguous()
    net.register_forward_pre_hook(to_contiguous) # its sums of stacked tensors are faster like that
    layers = [m for m in net.modules() if isinstance(m, PathSamplingLayer)]
    labels = [*dict.fromkeys(layer.label for layer in layers)] # in the order of the edges
    def choose(path):
        memo = {label: NB201_OPS[o].removeprefix('nor_') for label,o in zip(labels, path)}
        for layer in layers: layer.resample(memo)
        return net
    return contestant(net, choose, layout=torch.contiguous_format)

def ofa_mobilenet() -> Contestant:
    "Make a contestant of once-for-all's ProxylessNAS network; its kernels share weights."
    from ofa.imagenet_classification.elastic_nn.networks import OFAProxylessNASNets
    from ofa.imagenet_classification.elastic_nn.utils import set_running_statistics
    net = OFAProxylessNASNets(10, (.1, 1e-5), 0, ks_list=[3,5,7], expand_ratio_list=[3,6])
    sizes = [(int(op[5]), int(op[2])) for op in MB_OPS[1:]] # mb3_k5: 5, 3
    def choose(path):
        net.set_active_subnet(*zip(*(sizes[o-1] for o in path)))
        return net
    def alone(path): return choose(path).get_active_subnet()
    def calibrate(batches, net): set_running_statistics(net, batches)
    return contestant(net, choose, calibrate, alone)

def kshot_mobilenet() -> nn.Module:
    "Return the network whose stages are those of once-for-all."
    stem = nn.Sequential(conv_bn(3, 32, 3, 2), conv_bn(32, 32, 3, groups=32), conv_bn(32, 16, 1, act=None))
    stages = [(24,4,2), (40,4,2), (80,4,2), (96,4,1), (192,4,2), (320,1,1)]
    head = nn.Sequential(conv_bn(320, 1280, 1), pool_and_classify(1280, 10))
    return chain(mobilenet_space(), stem, 16, stages, head)

# the same network?

def fingerprint(
    module:nn.Module, # runs one path
    x:Tensor,         # images
) -> tuple[int, int, Tensor]: # parameters, MACs of the batch, logits
    "Describe a network by what it costs, and by what it computes when all weights are .5."
    module = deepcopy(module)
    for p in module.parameters():
        p.data.fill_(.5)
        p.grad = None
    with FlopCounterMode(display=False) as counter: out = logits(module(x))
    macs = counter.get_total_flops()//2
    out.sum().backward()
    n_params = sum(p.numel() for p in module.parameters() if p.grad is not None)
    return n_params, macs, out.detach()

def assert_same(contestants:dict[str, Contestant], paths:list, x:Tensor) -> list[dict]: # sizes
    "Assert that all contestants run the same network at each path."
    sizes = []
    for path in paths:
        prints = {name: fingerprint(c.alone(path), x) for name,c in contestants.items()}
        n_params, macs, out = prints['plain']
        for name,(*size,other) in prints.items():
            assert size == [n_params, macs], (name, path, size, n_params, macs)
            torch.testing.assert_close(other, out, rtol=1e-3, atol=1e-3, msg=f'{name}, {path}')
        sizes.append(dict(n_params=n_params, macs=macs//len(x)))
    return sizes

# time

class Size(NamedTuple):
    bs:int     # images of a batch
    px:int     # pixels a side
    rounds:int # that are timed
    n_batches:int # to calibrate on, and as many to score on

def random_batch(size:Size) -> tuple[Tensor, Tensor]: # images, classes
    x = torch.randn(size.bs, 3, size.px, size.px).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(0, 10, (size.bs,))

def training_step(c:Contestant, paths:list, size:Size) -> Callable: # step(i)
    "Return the training of a path, another one each time."
    opts = {path: c.opt(path) for path in paths}
    x, y = random_batch(size)
    def step(i):
        path = paths[i%len(paths)]
        F.cross_entropy(logits(c.choose(path)(x)), y).backward()
        opts[path].step()
        opts[path].zero_grad()
    return step

def scoring(c:Contestant, paths:list, size:Size) -> Callable: # step(i)
    "Return the calibration and the scoring of a path, another one each time."
    batches, calibration = ([random_batch(size) for _ in range(size.n_batches)] for _ in range(2))
    def step(i): c.score(paths[i%len(paths)], batches, calibration)
    return step

def rows_of(times:dict[str, list[float]], **what) -> list[dict]:
    "Return the quartiles of each contestant's time over plain torch's, and its median time."
    rows = []
    for name,seconds in times.items():
        over = np.quantile(np.divide(seconds, times['plain']), (.25, .5, .75)).round(3).tolist()
        rows.append(dict(**what, name=name, over_plain=over, ms=round(1e3*np.median(seconds), 1)))
        print(what, name, over, rows[-1]['ms'], sep='\t', flush=True)
    return rows

# all of it

def contest(
    net:nn.Module, # of kshot
    paths:list,
    peers:dict[str, Callable], # package -> what makes the contestant
) -> tuple[list, dict[str, Contestant]]: # paths, contestants
    "Prepare plain torch, kshot and the packages that are installed for one network."
    makers = dict(plain=partial(plain, net, paths))
    for K in (1, 4, 8): makers[f'kshot K={K}'] = partial(kshot, net, K)
    makers |= {name: make for name,make in peers.items() if find_spec(name)}
    return paths, {name: make() for name,make in makers.items()}

def nb201_contest() -> tuple[list, dict]: # as `contest`
    "Prepare NAS-Bench-201's network at full size, at paths without the op `none`."
    peers = dict(xautodl=partial(xautodl_nb201, 16, 5), nni=partial(nni_nb201, 16, 5))
    return contest(get_net('nb201', 16, 5), draw(6, 4), peers)

def mobilenet_contest() -> tuple[list, dict]: # as `contest`
    "Prepare a network of 21 inverted residuals, at paths that skip none of them."
    return contest(kshot_mobilenet(), draw(21, 6), dict(ofa=ofa_mobilenet))

def draw(n_blocks:int, n_ops:int) -> list: # paths
    "Draw paths that never take the op with number 0."
    rng = np.random.default_rng(0)
    return [*map(tuple, rng.integers(1, n_ops+1, (N_PATHS, n_blocks)).tolist())]

CONTESTS = dict(
    nb201=(nb201_contest, dict(tiny=Size(4, 8, 40, 2), full=Size(64, 32, 16, 2))),
    mobilenet=(mobilenet_contest, dict(tiny=Size(4, 32, 40, 2), full=Size(32, 112, 12, 2))))

def run_contest(name:str) -> tuple[list[dict], list[dict]]: # rows, sizes of the network
    "Check and time the contestants of one network."
    prepare, sizes = CONTESTS[name]
    torch.manual_seed(0)
    paths, contestants = prepare()
    same = assert_same(contestants, paths, torch.randn(4, 3, 64, 64))
    rows = []
    for label,size in sizes.items():
        for what,make in dict(step=training_step, score=scoring).items():
            steps = {key: make(c, paths, size) for key,c in contestants.items()}
            times = interleaved(steps, size.rounds, clock=process_time)
            rows += rows_of(times, net=name, size=label, what=what)
    return rows, same

def main():
    "Run the contests that are named, or both; print their rows and keep them."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('nets', nargs='*', help=f'{", ".join(CONTESTS)} (both)')
    names = parser.parse_args().nets or [*CONTESTS]
    for name in names:
        if name not in CONTESTS: parser.error(f'net {name!r}, expected {" or ".join(CONTESTS)}')
    torch.set_num_threads(1)
    kept = json.loads(OUT.read_text()) if OUT.exists() else dict(rows=[], networks={}, versions={})
    rows = [row for row in kept['rows'] if row['net'] not in names]
    networks = kept['networks']
    for name in names:
        more, networks[name] = run_contest(name)
        rows += more
    measured = {row['name'] for row in rows}
    absent = NO_PEERS | {name: 'it is not installed' for name in PEERS if name not in measured}
    for name,why in absent.items(): print(f'{name} is not measured: {why}')
    about = environment()
    installed = {name: version(name) for name in PEERS if find_spec(name)}
    about['versions'] = kept['versions'] | about['versions'] | installed
    sizes = {name: {label: size._asdict() for label,size in of_net.items()}
             for name,(_,of_net) in CONTESTS.items()}
    note = ('CPU time of one thread, in turn, over that of plain torch in the same round: '
            'quartiles; the machine was busy with other work')
    write_json(OUT, dict(note=note, sizes=sizes, networks=networks, absent=absent, **about, rows=rows))

if __name__ == '__main__': main()
