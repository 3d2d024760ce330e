"""Check and measure what needs a GPU: a JSON file for each part, in results/gpu.

    python tools/gpu.py                     # all parts in turn, about ten minutes each
    python tools/gpu.py steps               # one of them
    python tools/gpu.py nb201 --minutes 60  # a longer training; the same again goes on with it

A part that is done is skipped, and one that was interrupted goes on. Without a GPU everything is tiny:
that shows that the script works, in less than a minute.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from statistics import median
from xml.etree import ElementTree

import torch
from fastai.callback.core import Callback, CancelFitException

from kshot.base.files import write_json
from kshot.checkpoint import CheckpointCallback
from kshot.cli.bench import bench_score, bench_step
from kshot.cli.doctor import check_package, look_devices, needed
from kshot.cli.work import has_truth, truth_of
from kshot.config import Config
from kshot.folders import read_run
from kshot.jobs import by_scorer, rank_run
from kshot.record import environment, has_run
from kshot.runs import score_run, train_run
from kshot.settings import Truth
from kshot.tables import get_truth

ROOT = Path(__file__).parent.parent
PARTS = 'tests', 'steps', 'scores', 'macro', 'nb201'
SAID = dict( # key of a row -> words in the terminal
    ms='ms', peak_mib='peak MiB', paths_per_second='paths a second', images_per_second='images a second',
    epochs='epochs', tau='tau', passed='passed', skipped='skipped', error='error',
    out_of_memory='out of memory')

def why_not() -> str:
    "Return why nothing can be measured here; '' if it can."
    findings = [check_package('torch', needed()['torch']), *look_devices()]
    for finding in findings:
        if finding.name in ('torch', 'cuda') and finding.do: return f'{finding.found}: {finding.do}'
    return ''

def machine() -> dict:
    "Return versions and machine, with the GPU's memory."
    about = environment()
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        about['machine'] |= dict(gpus=torch.cuda.device_count(), gpu_mib=memory//2**20)
        about['versions'] |= dict(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    return about

# pieces of the parts: name -> what measures it and returns a row

def run_tests(options:list[str]) -> dict:
    "Run tests in a process of their own; return how many passed, and what the others say."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder)/'tests.xml'
        argv = [sys.executable, '-m', 'pytest', 'tests/test_gpu.py', 'tests/test_data.py', *options, '-q',
                '-n0', '--disable-warnings', '-p', 'no:cacheprovider', f'--junitxml={report}']
        subprocess.run(argv, cwd=ROOT, stdout=sys.stderr)
        cases = [*ElementTree.parse(report).iter('testcase')]
    row = dict(passed=0, failed={}, skipped={})
    kinds = dict(failure='failed', error='failed', skipped='skipped') # tag -> key
    for case in cases:
        ends = [end for end in case if end.tag in kinds]
        row['passed'] += not ends
        for end in ends: row[kinds[end.tag]][case.get('name')] = end.get('message').partition('\n')[0]
    if row['failed']: row |= dict(is_done=False, error=f'failed: {", ".join(row["failed"])}')
    return row

def tests(is_tiny:bool) -> dict:
    return dict(tests=partial(run_tests, ['-k', 'what_is_extracted'] if is_tiny else ['-m', 'cuda']))

def steps(is_tiny:bool) -> dict:
    sizes = dict(mobilenet_se=dict(bs=128), macro=dict(bs=256), nb201=dict(bs=256))
    usual = dict(Ks=(1, 4, 8), naive=False)
    if is_tiny:
        sizes = dict(macro=dict(bs=32, channels=4, px=16))
        usual |= dict(Ks=(1, 2), rounds=1, memory=False)
    pieces = {}
    for space,size in sizes.items():
        for bf16 in (False, True):
            name = f'{space}{" bf16"*bf16}'
            pieces[name] = partial(bench_step, space=space, bf16=bf16, **usual, **size)
    return pieces

def scores(is_tiny:bool) -> dict:
    sizes = dict(channels=0, px=32, n=100, n_valid=10_000)
    if is_tiny: sizes = dict(channels=4, px=8, n=2, n_valid=32, rounds=1)
    return dict(macro=partial(bench_score, space='macro', **sizes),
                nb201=partial(bench_score, space='nb201', n_cells=1 if is_tiny else 0, **sizes))

class Clock(Callback):
    "Time epochs, and end the training after the one in which the time is up."
    order = CheckpointCallback.order + 1 # once the epoch is saved
    run_valid = False

    def __init__(self, deadline:float): # of `time.monotonic`
        self.deadline = deadline
        self.seconds = [] # of each epoch

    def before_train(self): self.started = time.monotonic()

    def after_epoch(self):
        if not self.learn.epoch_row: return # it was done before
        now = time.monotonic()
        self.seconds.append(now - self.started)
        if now > self.deadline: raise CancelFitException

def train(config:Config, folder:Path, deadline:float) -> dict:
    "Train until the time is up; the next call goes on."
    begun = has_run(folder, config)
    row = {}
    if not begun or 'train' not in read_run(folder)['results']:
        clock = Clock(deadline)
        learn = train_run(config, folder, begun, cbs=clock)
        n = config.bs*len(learn.dls.train)
        row = dict(images_in_epoch=n)
        if clock.seconds: row |= dict(images_per_second=round(n/median(clock.seconds)))
    epochs = len((folder/'log.jsonl').read_text().splitlines())
    return row | dict(epochs=epochs, of=config.epochs, is_done=epochs == config.epochs)

def rank(config:Config, folder:Path, n_paths:int, deadline:float) -> dict:
    "Score paths until the time is up; once all are scored, rank them against the table."
    if not has_truth(Truth(), config.space): return dict(skipped=f'no table of {config.space}')
    question = truth_of(Truth(n_paths=n_paths), config.space)
    paths = get_truth(**question).index.tolist()
    for n in range(0, len(paths), 500):
        scored = len(score_run(folder, paths[:n+500], progress=True))
        if time.monotonic() > deadline and scored < len(paths):
            return dict(paths=scored, of=len(paths), is_done=False)
    frame = rank_run(folder, question)
    seconds = read_run(folder)['seconds']['score']
    return dict(paths=len(paths), paths_per_second=round(len(paths)/seconds, 2), ranking=by_scorer(frame))

def training(space:str, K:int, is_tiny:bool, runs:Path, deadline:float) -> dict:
    config = Config(space=space, K=K)
    n_paths = 2000
    if is_tiny:
        config = Config(K=2, epochs=2, passes=1)
        n_paths = 20
    folder = runs/f'{space}_K{K}'
    return dict(train=partial(train, config, folder, deadline),
                rank=partial(rank, config, folder, n_paths, deadline))

def pieces_of(part:str, args, deadline:float) -> dict:
    "Return the pieces of a part in their order: name -> what measures it."
    simple = dict(tests=tests, steps=steps, scores=scores)
    if part in simple: return simple[part](args.tiny)
    return training(part, args.K, args.tiny, args.runs, deadline)

# the parts

def measured(piece) -> dict:
    "Measure a piece; a GPU that is too small for it is a result, and an error does not end the others."
    try: return dict(is_done=True) | piece()
    except (torch.OutOfMemoryError, subprocess.CalledProcessError) as e:
        text = getattr(e, 'stderr', 'OutOfMemoryError')
    except (ValueError, OSError) as e: text = str(e)
    except Exception as e:
        traceback.print_exc()
        text = f'{type(e).__name__}: {e}'
    finally: torch.cuda.empty_cache()
    if 'OutOfMemoryError' in text: return dict(is_done=True, out_of_memory=True)
    return dict(is_done=False, error=text.strip().rpartition('\n')[2])

def in_words(row:dict) -> str: # what a piece returned
    "Return the numbers that matter most in one line."
    taus = {scorer: round(numbers['tau'], 3) for scorer,numbers in row.get('ranking', {}).items()}
    texts = []
    for key,value in (row | dict(tau=taus)).items():
        if key not in SAID or not value: continue
        if isinstance(value, dict): value = ', '.join(f'{k} {v}' for k,v in value.items())
        texts.append(f'{SAID[key]}: {value}')
    return '; '.join(texts)

def check_same(result:dict, here:dict, fname:Path):
    "Raise `ValueError` if half of a result was measured on another machine, or in other sizes."
    for name,value in here.items():
        if result.get(name, value) == value: continue
        raise ValueError(f'{fname} is half of a result with {name} {result[name]!r}, here it is {value!r}: '
                         'name another --out')

def work_on(part:str, args) -> str:
    "Measure the pieces of a part that are missing, at least one; return where it stands."
    deadline = time.monotonic() + 60*args.minutes
    fname = args.out/(f'{part}_K{args.K}.json' if part in ('macro', 'nb201') else f'{part}.json')
    result = json.loads(fname.read_text()) if fname.exists() else dict(is_done=False, rows={})
    if result['is_done']: return f'{fname} is there already'
    about = machine()
    here = dict(device=about['machine']['device'], tiny=args.tiny)
    check_same(result, here, fname)
    result |= about | here
    has_begun = False
    for name,piece in pieces_of(part, args, deadline).items():
        row = result['rows'].setdefault(name, {})
        if row.get('is_done'): continue
        if has_begun and time.monotonic() > deadline: return f'{fname} lacks {name}: call it again'
        has_begun = True
        print(f'{part}: {name}', file=sys.stderr)
        row.pop('error', None)
        row |= measured(piece)
        print(f'  {in_words(row)}', file=sys.stderr)
        write_json(fname, result)
        if not row['is_done'] and 'error' not in row: return f'{fname} has half of {name}: call it again'
    failed = [name for name,row in result['rows'].items() if 'error' in row]
    if failed: raise ValueError(f'{fname} has an error of {", ".join(failed)}: call it again')
    write_json(fname, result | dict(is_done=True))
    return f'{fname} is done'

def main(argv:list[str]|None=None) -> int: # exit code: 0 if all parts could be worked on
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('part', nargs='*', help=f'{", ".join(PARTS)} (all)')
    parser.add_argument('--out', type=Path, help='folder of the results (results/gpu)')
    parser.add_argument('--runs', type=Path, help='folder of the trainings (runs/gpu)')
    parser.add_argument('--minutes', type=float, default=8, help='after which a part begins nothing new (8)')
    parser.add_argument('--K', type=int, default=8, help='supernets of the trainings (8)')
    parser.add_argument('--tiny', action='store_true', help='make everything tiny, as without a GPU')
    args = parser.parse_args(argv)
    for part in args.part:
        if part not in PARTS: parser.error(f'part {part!r}, expected some of {", ".join(PARTS)}')
    why = '' if args.tiny else why_not()
    if why: parser.error(why)
    if not torch.cuda.is_available():
        args.tiny = True
        print('no GPU here: everything is tiny', file=sys.stderr)
    folder = 'gpu_tiny' if args.tiny else 'gpu'
    args.runs = args.runs or Path('runs')/folder
    args.out = args.out or (args.runs if args.tiny else ROOT/'results'/'gpu')
    code = 0
    for part in args.part or PARTS:
        try: print(work_on(part, args))
        except ValueError as e:
            print(f'{part}: {e}', file=sys.stderr)
            code = 1
    return code

if __name__ == '__main__': sys.exit(main())
