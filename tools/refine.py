"""Whether training candidates on pays at equal total cost: rows of results/refine.json.

    python tools/refine.py digits runs/refine --refine 10    # hours; what is there is not measured again

The pick of a search that refines is compared with that of searches that score more paths instead, and
with training the best paths alone from scratch. Cost is counted in images that go forward: an update is
three of them (forward and backward), scoring a path is the images of calibration and of validation.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from kshot.base.files import append_log, read_log, write_json
from kshot.base.inputs import n_rows
from kshot.benchmark import get_benchmark
from kshot.config import Config
from kshot.data import get_data, pairs
from kshot.jobs import tuned_scorer
from kshot.record import environment
from kshot.refine import Refinement, count_updates, rung_sizes
from kshot.runs import ensure_trained, load_run
from kshot.search import Search
from kshot.tables import get_table

OUT = Path(__file__).parent.parent/'results'/'refine.json'
N_CALIBRATION = 4

class Scores:
    "Losses of a run's paths after a number of updates of their own, kept in a file."
    def __init__(self, folder:Path, config:Config):
        ensure_trained(config, folder)
        self.config, self.learn = load_run(folder)
        self.benchmark = get_benchmark(config.space)
        self.space = self.benchmark.space
        self.tuned = tuned_scorer(self.learn, self.config, N_CALIBRATION, self.benchmark)
        self.fname = folder/'losses.jsonl'
        self.known = {(row['path'], row['n_steps']): row['loss'] for row in read_log(self.fname)}

    def __call__(self, path:tuple, n_steps:int=0) -> float: # higher is better
        key = self.space.format(path), n_steps
        if key not in self.known:
            self.known[key] = self.tuned(path, n_steps).loss
            append_log(self.fname, [dict(path=key[0], n_steps=n_steps, loss=self.known[key])])
        return -self.known[key]

    def costs(self) -> tuple[int, int]: # images of an update, of scoring a path
        n_valid = sum(n_rows(x) for x,_ in pairs(self.learn.dls.valid))
        return 3*self.config.bs, N_CALIBRATION*self.config.bs + n_valid

def searched(scores:Scores, n:int, algorithm:str, seed:int) -> Search:
    search = Search(scores.space)
    search.run(scores, n, algorithm, seed)
    return search

def picks(scores:Scores, table, n:int, n_refine:int, seed:int) -> dict[str, list[str]]: # arm -> paths
    "Return what each way of choosing picks; training alone picks once for each seed of the table."
    of_update, of_path = scores.costs()
    extra = count_updates(n_refine)*of_update + sum(rung_sizes(n_refine))*of_path
    n_equal = n + extra//of_path
    search = searched(scores, n, 'nsga2', seed)
    top = search.frame().path.tolist()
    best = dict(refined=[Refinement(search, n_refine).run(scores).path[0]], search=top[:1])
    for name,algorithm in dict(search_equal='nsga2', random_equal='random').items():
        best[name] = searched(scores, n_equal, algorithm, seed).frame().path[:1].tolist()
    best['exhaustive'] = [scores.space.format(max(scores.space, key=scores))]
    alone = table.frame[table.frame.split == 'valid'].pivot(index='path', columns='seed', values='loss')
    data = get_data(scores.benchmark.data or scores.config.data)
    of_training = 3*data.train.bs*len(data.train)*int(table.frame.epochs.max()) + of_path
    m = max(1, extra//of_training)
    best['alone_equal'] = [alone.loc[top[:m], s].idxmin() for s in alone]
    return best

def measured(truth:pd.Series, best:dict, about:dict) -> list[dict]: # a row for each arm
    rows = []
    for arm,paths in best.items():
        regret = truth.max() - truth[paths].mean()
        rank = np.mean([1 + (truth > truth[p]).sum() for p in paths])
        rows.append(about | dict(arm=arm, regret=float(regret), rank=float(rank)))
    return rows

def summary(rows:list[dict]) -> dict: # arm -> means, and the interval of what refining gains
    frame = pd.DataFrame(rows)
    refined = frame[frame.arm == 'refined'].set_index(['K', 'train_seed', 'seed'])
    out = {}
    for arm,own in frame.groupby('arm', sort=False):
        gain = own.set_index(['K', 'train_seed', 'seed']).regret - refined.regret
        by_run = gain.groupby(['K', 'train_seed']).mean().to_numpy()
        draws = np.random.default_rng(0).choice(by_run, (2000, len(by_run))).mean(1)
        low, high = np.quantile(draws, [.025, .975])
        out[arm] = dict(regret=own.regret.mean(), rank=own['rank'].mean(), gain=gain.mean(),
                        low=low, high=high, gain_by_run=by_run)
    return {arm: {key: np.round(value, 4).tolist() for key,value in row.items()} for arm,row in out.items()}

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('space')
    parser.add_argument('folder', type=Path)
    parser.add_argument('--K', type=int, nargs='+', default=[1, 4])
    parser.add_argument('--train_seeds', type=int, default=3)
    parser.add_argument('--seeds', type=int, default=12)
    parser.add_argument('--n_paths', type=int, nargs='+', default=[200])
    parser.add_argument('--refine', type=int, nargs='+', default=[10])
    args = parser.parse_args()
    table = get_table(args.space)
    truth = table.mean(split='test')
    done = json.loads(OUT.read_text()) if OUT.exists() else dict(rows=[])
    runs = {}
    for K in args.K:
        for s in range(args.train_seeds):
            config = Config(space=args.space, K=K, seed=s)
            runs[K,s] = Scores(args.folder/f'{args.space}_K{K}_seed{s}', config)
    for n in args.n_paths:
        for n_refine in args.refine:
            setting = dict(space=args.space, n_paths=n, refine=n_refine, K=args.K)
            rows = []
            for (K,s),scores in runs.items():
                for seed in range(args.seeds):
                    about = dict(K=K, train_seed=s, seed=seed)
                    rows += measured(truth, picks(scores, table, n, n_refine, seed), about)
            of_update, of_path = scores.costs()
            about = dict(sizes=rung_sizes(n_refine), updates=count_updates(n_refine),
                         images_of_update=of_update, images_of_path=of_path,
                         train_seeds=args.train_seeds, seeds=args.seeds)
            result = setting | about | dict(arms=summary(rows)) | environment()
            print(json.dumps(result['arms'], indent=1))
            done['rows'] = [row for row in done['rows'] if not setting.items() <= row.items()] + [result]
            write_json(OUT, done)

if __name__ == '__main__': main()
