"""Compare the host time of a step, a subnet and a cost over versions: results/bench_networks.json.

    python tools/speed.py                   # the working tree
    python tools/speed.py v0.1 . --rounds 5 # a commit and the working tree, in turn

Tensors are tiny, so what counts is the time that Python takes.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from density import ROOT, checkout

OUT = ROOT/'results'/'bench_networks.json'
PATH = (3, 2, 3, 1, 2, 3) # of NAS-Bench-201: convolutions on all edges but one

def best_ms(
    f:Callable, # to time
    n:int=20,   # calls
) -> float:
    "Return the CPU time of the fastest call in milliseconds."
    times = []
    for _ in range(n):
        start = time.process_time()
        f()
        times.append(time.process_time()-start)
    return 1e3*min(times)

def times_of_steps() -> dict[str, float]: # name -> ms
    "Time steps of NAS-Bench-201's network alone, and as one, four and eight supernets."
    import torch
    from torch.nn import functional as F

    from kshot.benchmark import get_net
    from kshot.supernet import Supernet
    from kshot.train import by_decay, sgd
    net = get_net('nb201', 16, 5).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (4,))
    def make_step(model, *code):
        opt = sgd(by_decay(model), .01)
        def step():
            F.cross_entropy(model(x, PATH, *code), y).backward()
            opt.step()
            opt.zero_grad()
        return step
    steps = {'plain': make_step(net)}
    for K in (1, 4, 8): steps[f'K{K}'] = make_step(Supernet(net, K), torch.full((K,), 1/K))
    return {f'step {name}': best_ms(step) for name,step in steps.items()}

def times_of_subnets() -> dict[str, float]: # name -> ms
    "Time the extraction of subnets and the counting of costs."
    import numpy as np
    import torch

    from kshot.benchmark import get_net, get_space
    from kshot.cost import Cost
    from kshot.networks import subnet
    from kshot.supernet import Supernet
    rng = np.random.default_rng(0)
    net = get_net('nb201', 16, 5)
    supernet = Supernet(net, 4)
    code = torch.full((4,), .25)
    times = {'subnet nb201': best_ms(lambda: subnet(net, PATH), 5),
             'subnet of 4 supernets nb201': best_ms(lambda: supernet.subnet(PATH, code), 5)}
    cells = dict(nb201=(16, 5), nb101=(16, 3), macro=(8, 0))
    for name,sizes in cells.items():
        net = get_net(name, *sizes)
        paths = get_space(name).sample(rng, 40)
        times[f'cost of 40 paths {name}'] = best_ms(lambda: Cost(net, (3, 32, 32))(paths), 2)
    net = get_net('mobilenet_se', 8, widths=(.5, 1))
    paths = get_space('mobilenet_se', (.5, 1)).sample(rng, 10)
    times['subnet mobilenet_se with widths'] = best_ms(lambda: subnet(net, paths[0]), 3)
    times['cost of 10 paths mobilenet_se'] = best_ms(lambda: Cost(net, (3, 64, 64))(paths), 2)
    return times

def measure() -> dict[str, float]: # name -> ms
    "Time everything in this process, with the kshot that it imports."
    import torch
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return times_of_steps() | times_of_subnets()

def measure_tree(
    tree:Path, # root of a project
) -> dict[str, float]: # as `measure`
    "Measure a version in a process of its own."
    env = os.environ | dict(PYTHONPATH=str(tree), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    argv = [sys.executable, '-W', 'ignore', __file__, '--child']
    out = subprocess.run(argv, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])

def main():
    "Measure versions in turn, and print and keep the fastest of all rounds."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('trees', nargs='*', default=['.'], help='commits, or . for the working tree')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure()))
        return
    from kshot.base.files import write_json
    from kshot.record import environment
    with ExitStack() as stack:
        folders = {}
        for name in args.trees:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folders[name] = ROOT if name == '.' else checkout(name, folder)
        rounds = {name: [] for name in args.trees}
        for _ in range(args.rounds):
            for name,folder in folders.items(): rounds[name].append(measure_tree(folder))
    rows = []
    for what in rounds[args.trees[0]][0]:
        best = {name: round(min(times[what] for times in of_tree), 2) for name,of_tree in rounds.items()}
        rows.append(dict(what=what, **best))
        print(what, *best.values(), sep='\t')
    write_json(OUT, dict(unit='ms', rounds=args.rounds, rows=rows, **environment()))

if __name__ == '__main__': main()
