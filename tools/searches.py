"""How near to the best score each search algorithm comes: rows of results/searches.json.

    python tools/searches.py runs/one_shot runs/views   # trained and scored runs; and the tables at hand

A score is looked up: that of a supernet (`scores.parquet` of a run that `kshot rank` has scored), or the
accuracy of a benchmark table, as if a supernet ranked perfectly. The budget is the median MACs or none.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from kshot.base.files import write_json
from kshot.benchmark import get_benchmark, get_net
from kshot.cost import Cost
from kshot.record import environment, read_run
from kshot.search import search
from kshot.tables import get_truth

OUT = Path(__file__).parent.parent/'results'/'searches.json'
ALGORITHMS = 'random', 'tpe', 'nsga2'

def sources(runs:list[Path]) -> dict[str, tuple]: # name -> (space, score of each path)
    found = {}
    for run in runs:
        config = read_run(run)['config']
        scores = pd.read_parquet(run/'scores.parquet').set_index('path')
        name = f'{config["space"]}, supernet with K = {config["K"]}'
        found[name] = config['space'], -scores.loss_super
    for space,keys in dict(digits={}, views={}, macro={}, nb201=dict(dataset='cifar10', epochs=200)).items():
        try: truth = get_truth(space, **keys)
        except (OSError, ValueError) as e: print(f'{space} left out: {e}')
        else: found[f'{space}, its table'] = space, truth.mean(axis=1)
    return found

def median_macs(space, macs) -> float:
    paths = space.sample(np.random.default_rng(0), 200)
    return float(np.median([macs(path) for path in paths]))

def measure(name:str, space_name:str, scores:pd.Series, ns:list[int], seeds:int) -> list[dict]:
    benchmark = get_benchmark(space_name)
    space = benchmark.space
    by_path = {space.parse(path): score for path,score in scores.items()}
    macs = Cost(get_net(space_name), benchmark.x_shape).macs
    rows = []
    for has_budget in (False, True):
        limits = dict(macs=median_macs(space, macs)) if has_budget else {}
        costs = dict(macs=macs) if has_budget else {}
        best = max(score for path,score in by_path.items() if not limits or macs(path) <= limits['macs'])
        spread = np.std(list(by_path.values()))
        for algorithm in ALGORITHMS:
            found = np.full((seeds, len(ns)), np.nan)
            for seed in range(seeds):
                done = search(space, by_path.get, max(ns), algorithm, seed, costs=costs, budgets=limits)
                in_order = done.sort_values('trial').score.to_numpy()
                found[seed] = [in_order[:n].max() for n in ns]
            for n,of_seeds in zip(ns, found.T):
                regret = (best-of_seeds)/spread
                rows.append(dict(scores=name, budget=has_budget, algorithm=algorithm, n=n, seeds=seeds,
                                 regret=round(float(regret.mean()), 4),
                                 sem=round(float(regret.std(ddof=1)/seeds**.5), 4)))
            print(rows[-1], flush=True)
    return rows

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', type=Path, nargs='*', help='folders of scored runs')
    parser.add_argument('--n', type=int, nargs='+', default=[25, 50, 100, 200])
    parser.add_argument('--seeds', type=int, default=20)
    args = parser.parse_args()
    rows = []
    for name,(space,scores) in sources(args.runs).items():
        rows += measure(name, space, scores, args.n, args.seeds)
        write_json(OUT, dict(rows=rows, unit='standard deviations of the scores') | environment())
    frame = pd.DataFrame(rows)
    print(frame.pivot_table(index=['budget', 'algorithm'], columns='n', values='regret').round(3))

if __name__ == '__main__': main()
