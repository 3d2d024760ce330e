"""What K supernets gain over one: rows of results/k_pays.json.

    python tools/k_pays.py digits --epochs 120 --seed 0 1 2 # 24,000 updates, minutes a row
    python tools/k_pays.py views --epochs 25 --K 8 --branch '' # K supernets from the first update

A row is a run whose paths are all scored and compared with the space's table. Rows that are there are not
measured again; several processes may add rows at once.
"""
import argparse
import json
import os
from itertools import product
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')

from kshot.base.files import locked, write_file
from kshot.benchmark import get_benchmark
from kshot.config import Config, parts
from kshot.record import environment, read_run
from kshot.runs import ensure_trained, score_run
from kshot.studies.study import ranking
from kshot.tables import get_truth

ROOT = Path(__file__).parent.parent
OUT = ROOT/'results'/'k_pays.json'
RUNS = ROOT/'runs'/'k_pays' # what is trained there is not trained again
NAMES = dict(acc='acc_super', tau_acc='tau', tau_loss='tau_loss', tau_sigmoid='tau_sigmoid',
             tau_margin='tau_margin', top_tau_loss='top_tau_loss', regret_loss='regret_n_loss',
             search_loss='search_mean_loss')

def settings_of(config:Config) -> dict:
    "Return what tells a row from others."
    updates = config.epochs*len(parts(config)[2].train)
    branch = config.branch if config.K > 1 else ''
    return dict(space=config.space, K=config.K, branch=branch, begins_by=None, codes=config.codes,
                lr=config.lr, seed=config.seed, updates=updates)

def measured(config:Config, folder:Path) -> dict:
    "Train a run, score all paths and rank them."
    ensure_trained(config, folder, progress=False)
    truth = get_truth(config.space)
    scores = score_run(folder, truth.index.tolist(), progress=False)
    values = ranking(scores, truth, get_benchmark(config.space).n_kept)
    values['acc_super'] = float(scores.acc_super.mean())
    numbers = {name: round(values[of], 4) for name,of in NAMES.items()}
    return numbers | dict(seconds=read_run(folder)['seconds']['train'], commit=environment()['commit'])

def add(row:dict):
    "Put a row into the file, a line each, also beside other processes that do."
    with locked(RUNS/'lock', wait=True):
        kept = json.loads(OUT.read_text())
        rows = ',\n'.join(f'  {json.dumps(row)}' for row in [*kept.pop('rows'), row])
        about = ',\n'.join(f' {json.dumps(key)}: {json.dumps(value)}' for key,value in kept.items())
        write_file(OUT, f'{{\n{about},\n "rows": [\n{rows}\n ]\n}}\n')

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('space', choices=('digits', 'views'))
    options = dict(K=[1, 8], epochs=[30], lr=[.05], branch=['0.2'], seed=[0, 1, 2])
    for name,default in options.items():
        parser.add_argument(f'--{name}', type=type(default[0]), nargs='+', default=default)
    args = parser.parse_args()
    for values in product(*(getattr(args, name) for name in options)):
        config = Config(space=args.space, **dict(zip(options, values)))
        settings = settings_of(config)
        rows = json.loads(OUT.read_text())['rows']
        if any(settings.items() <= row.items() for row in rows): continue
        name = '_'.join(f'{key}{value}' for key,value in zip(options, values))
        row = settings | measured(config, RUNS/f'{args.space}_{name}')
        add(row)
        print(row, flush=True)

if __name__ == '__main__': main()
