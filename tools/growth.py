"""Does anything grow faster than its work? Time and memory by size: results/growth.json.

    python tools/growth.py               # ten minutes
    python tools/growth.py steps_K study # some parts; the rows of the others stay

Each size is measured in a process of its own: CPU time of one thread, and the peak of its memory
above what the imports take.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time

os.environ |= dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')

import numpy as np
import pandas as pd
import torch
from torch import nn

from kshot.base.files import write_json
from kshot.benchmark import get_space
from kshot.cli.bench import high_water, supernet_step
from kshot.networks import chain, macro_net
from kshot.nets.layers import conv_bn
from kshot.nets.ops import pool_and_classify
from kshot.record import environment
from kshot.search import make_search
from kshot.space import Block, Space
from kshot.studies.effects import effects
from kshot.studies.grid import Row
from kshot.studies.study import begin_study, queue
from kshot.tables import write_table

OUT = Path(__file__).parent.parent/'results'/'growth.json'

def seconds(
    f:Callable, # to time once
) -> float:
    start = process_time()
    f()
    return process_time()-start

# parts: size -> what is measured

def _step(net:nn.Module, sizes:tuple[int, ...], K:int, bs:int) -> dict:
    "Time training steps of random paths, on images of 16 pixels."
    step = supernet_step(net, K)
    x = torch.randn(bs, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (bs,))
    rng = np.random.default_rng(0)
    times = []
    for _ in range(12):
        path = tuple(map(int, rng.integers(sizes)))
        times.append(seconds(lambda: step(x, y, path)))
    return dict(ms=1e3*statistics.median(times[2:]))

def steps_K(K:int) -> dict: return _step(macro_net(16), get_space('macro').sizes, K, 32)
def steps_batch(bs:int) -> dict: return _step(macro_net(16), get_space('macro').sizes, 4, bs)

def steps_blocks(L:int) -> dict:
    "Time steps of a chain of L blocks."
    block = 'mb3_k3', 'mb3_k5', 'mb6_k3', 'mb6_k5'
    space = Space('long', tuple(Block(f'block {l}', block) for l in range(L)))
    net = chain(space, conv_bn(3, 16, 3), 16, [(16, L, 1)], pool_and_classify(16, 10))
    return _step(net, space.sizes, 4, 16)

def _search(n:int, algorithm:str, has_journal:bool) -> dict:
    "Time proposals and records of a search whose score costs nothing."
    space = get_space('mobilenet_se') # of 13**21 paths
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)/'search.journal' if has_journal else None
        search = make_search(space, storage=storage)
        def run(): search.run(lambda path: float(sum(path)), n, algorithm, progress=False)
        row = dict(ms=1e3*seconds(run))
        if not has_journal: return row
        resume = 1e3*seconds(lambda: make_search(space, storage=storage))
        return row | dict(journal_mb=storage.stat().st_size/1e6, resume_ms=resume)

def search_random(n:int) -> dict: return _search(n, 'random', False)
def search_tpe(n:int) -> dict: return _search(n, 'tpe', False)
def search_nsga2(n:int) -> dict: return _search(n, 'nsga2', False)
def search_journal(n:int) -> dict: return _search(n, 'random', True)

def table(n:int) -> dict:
    "Time the writing of a table, and the reading of 100 of its paths."
    paths = [f'{i:08}' for i in range(n)]
    frame = pd.DataFrame(dict(path=paths, acc=np.random.default_rng(0).random(n)))
    frame['dataset'] = 'digits'
    frame['split'] = 'test'
    frame['epochs'] = 20
    with tempfile.TemporaryDirectory() as folder:
        written = []
        def write(): written.append(write_table(frame, Path(folder)/'t.parquet', 'digits'))
        row = dict(ms=1e3*seconds(write))
        read = 1e3*seconds(lambda: written[0].mean(paths[::n//100]))
        return row | dict(read_ms=read)

def study(n:int) -> dict:
    "Time the handing out of the rows of a study, and its effects."
    names = ['baseline', *(f'lr={i}' for i in range(1, n//5))]
    rows = []
    for name in names:
        heuristic, _, value = name.partition('=')
        for seed in range(5):
            rows.append(Row(f'{name},{seed}', 'digits', heuristic, value, 1, seed, {}))
    frame = pd.DataFrame(rows).assign(tau_loss=np.random.default_rng(0).random(len(rows)))
    with tempfile.TemporaryDirectory() as folder:
        begin_study(rows, Path(folder)/'s')
        handed_out = queue(Path(folder)/'s')
        def run(): handed_out.run(lambda path: 1., len(rows), 'exhaustive', progress=False)
        row = dict(ms=1e3*seconds(run))
        journal_mb = (Path(folder)/'s'/'study.journal').stat().st_size/1e6
    return row | dict(journal_mb=journal_mb, effects_ms=1e3*seconds(lambda: effects(frame)))

PARTS = dict(
    steps_K=(steps_K, (1, 2, 4, 8, 16, 32)),
    steps_blocks=(steps_blocks, (8, 16, 32, 64, 100)),
    steps_batch=(steps_batch, (16, 32, 64, 128, 256)),
    search_random=(search_random, (1000, 10_000, 100_000)),
    search_tpe=(search_tpe, (250, 500, 1000)),
    search_nsga2=(search_nsga2, (250, 1000, 2000)),
    search_journal=(search_journal, (1000, 3000)),
    table=(table, (100_000, 1_000_000, 10_000_000)),
    study=(study, (100, 1000, 10_000)))

def measure(
    part:str, # a key of `PARTS`
    n:int,    # size
) -> dict:    # a row
    "Measure one size in a new process."
    argv = [sys.executable, '-W', 'ignore', __file__, '--child', part, str(n)]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    return dict(part=part, n=n) | json.loads(done.stdout.splitlines()[-1])

def run_child(part:str, n:int):
    "Print what one size takes."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = high_water()
    row = PARTS[part][0](n)
    row |= dict(peak_mib=(high_water()-before)/1024)
    print(json.dumps({key: round(value, 2) for key,value in row.items()}))

def main():
    "Measure the parts that are named, or all; print their rows and keep them."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('parts', nargs='*', help=f'{", ".join(PARTS)} (all)')
    parser.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.parts[0], int(args.parts[1]))
        return
    parts = args.parts or [*PARTS]
    for part in parts:
        if part not in PARTS: parser.error(f'part {part!r}, expected some of {", ".join(PARTS)}')
    kept = json.loads(OUT.read_text())['rows'] if OUT.exists() else []
    rows = [row for row in kept if row['part'] not in parts]
    for part in parts:
        for n in PARTS[part][1]:
            rows.append(measure(part, n))
            print(rows[-1], flush=True)
    note = 'CPU time of one thread; the machine was busy with other work'
    write_json(OUT, dict(note=note, **environment(), rows=rows))

if __name__ == '__main__': main()
