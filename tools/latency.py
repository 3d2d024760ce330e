"""How well latency is predicted on this machine: results/latency.json has a row each network.

    python tools/latency.py FOLDER [macro ...] # keeps its tables in FOLDER, and goes on where it was killed
"""
import argparse
from pathlib import Path

from torchvision.models import resnet18

from kshot.base.files import write_json
from kshot.benchmark import get_net, get_space
from kshot.elastic import elastic
from kshot.latency import machine_of, measure_latency
from kshot.record import environment

OUT = Path(__file__).parent.parent/'results'/'latency.json'
SIZES = dict(macro=32, mobilenet=112, resnet18=112) # pixels a side

def network(name:str, px:int): # network, space
    if name == 'resnet18': return elastic(resnet18(num_classes=10), (3,px,px))
    return get_net(name), get_space(name)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('names', nargs='*', default=[*SIZES])
    parser.add_argument('--n_paths', type=int, default=160)
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    rows = []
    for name in args.names:
        px = SIZES[name]
        fname = args.folder/f'{name}.latency.parquet'
        latency = measure_latency(*network(name, px), (3,px,px), 'cpu', fname, args.n_paths, args.rounds, 1)
        ms = latency.ratios*latency.reference_ms
        rows.append(dict(name=name, px=px, shortest_ms=ms.min(), longest_ms=ms.max(), **latency.report))
        print(rows[-1], flush=True)
    about = environment() | dict(processor=machine_of('cpu'), threads=1)
    if args.names == [*SIZES]: write_json(OUT, about | dict(rows=rows))

if __name__ == '__main__': main()
