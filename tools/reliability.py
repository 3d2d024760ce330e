"""What survives what: kills at random moments, damaged checkpoints, a full disk, clocks that jump.

    python tools/reliability.py                       # everything; results/reliability.json has a row each
    python tools/reliability.py train --n 10 --trouble  # ten kills of trainings and nothing else
"""
import argparse
import ctypes
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import kshot.standalone
import kshot.tables
from kshot.base.files import write_json
from kshot.checkpoint import checkpoints, load_tensors
from kshot.config import Config
from kshot.jobs import Budget, search_run
from kshot.record import environment, read_run
from kshot.runs import load_run, train_run
from kshot.studies.grid import make_rows
from kshot.studies.study import run_study
from kshot.standalone import make_table

ROOT = Path(__file__).parent.parent
OUT = ROOT/'results'/'reliability.json'
CONFIG = Config(K=2, epochs=6, passes=4, bs=200, channels=4)
SPACE_PATHS = ('0000', '1111', '2222', '3333', '4444', '0123', '1234', '4321')

# The work that is disturbed. Each function runs in a process of its own, begins in a folder or goes on there,
# and returns when all is done.

def train(folder):
    is_begun = (folder/'run'/'run.json').exists()
    train_run(CONFIG, folder/'run', resume=is_begun, progress=False)

def search(folder): # of a trained run: two generations, within a budget
    search_run(folder/'run', 120, 'nsga2', Budget(max_macs=20_000), n_calibration=1)

def study(folder):
    base = dict(space='digits', epochs=2, passes=1, bs=200, channels=4, n_paths=8, n_calibration=1)
    rows = make_rows(base, {'path sampling': {'fair': dict(sampler='fair')}}, K=[2], seeds=1)
    run_study(rows, folder/'study', workers=1, progress=False)

def tables(folder): # its workers are forked here: importing takes seconds
    kshot.standalone.get_context = lambda _: multiprocessing.get_context('fork')
    make_table('digits', folder/'tables', epochs=1, seeds=1, paths=list(SPACE_PATHS), n_workers=2)

WORK = dict(train=train, search=search, study=study, tables=tables)

# What must be equal in the end: everything but seconds, and the commit, which may be another by then.

def digest(fname): return hashlib.sha256(fname.read_bytes()).hexdigest()

def digest_of(tensor):
    values = tensor.reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()

def is_timing(key): return key.startswith('seconds') or key == 'commit'

def without_times(value):
    "Return JSON without what differs between equal runs."
    if isinstance(value, dict):
        return {key: without_times(inner) for key,inner in value.items() if not is_timing(key)}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value

def as_json(value): return json.loads(json.dumps(value)) # tuples are lists

def read_lines(fname): return [json.loads(line) for line in fname.read_text().splitlines()]

def weights(folder):
    "Return the digests of all tensors in a run's checkpoints, with what is recorded beside them."
    out = {}
    for fname in checkpoints(folder):
        tensors, meta = load_tensors(fname)
        out[fname.name] = {name: digest_of(tensor) for name,tensor in tensors.items()}, without_times(meta)
    return out

def as_text(frame, *by): # with as many bits as it has
    frame = frame[[column for column in frame if not is_timing(column)]]
    if by: frame = frame.sort_values(list(by), ignore_index=True)
    return frame.to_csv(index=False, float_format='%.17g')

def paths_in(journal):
    "Return the paths that a search's journal has finished."
    attributes = [line.get('user_attrs') or {} for line in read_lines(journal)]
    return [values['path'] for values in attributes if values.get('path')]

def result_of_training(folder):
    run = folder/'run'
    n_files = len(list((run/'checkpoint').iterdir()))
    return weights(run), without_times(read_run(run)), digest(run/'log.jsonl'), n_files

def result_of_search(folder):
    run = folder/'run'
    paths = paths_in(run/'search.journal')
    assert len(paths) == len(set(paths)) > 0, 'a path was scored twice'
    record = read_run(run)['results']['search']
    return as_text(pd.read_parquet(run/'search.parquet'), 'path'), without_times(record)

def result_of_study(folder):
    done = paths_in(folder/'study'/'study.journal')
    assert len(done) == len(set(done)) == 2, 'a row was done twice'
    runs = {f.parent.parent for f in folder.glob('study/*/checkpoint/*2.safetensors')}
    frame = pd.read_parquet(folder/'study'/'results.parquet')
    return as_text(frame, 'name'), {run.name: weights(run) for run in runs}

def result_of_tables(folder):
    keys = [(row['path'], row['split'], row['seed']) for row in read_lines(folder/'tables'/'digits.jsonl')]
    assert len(keys) == len(set(keys)) == 2*len(SPACE_PATHS), 'a row is there twice'
    return as_text(kshot.tables.read_table(folder/'tables'/'digits.parquet').frame)

RESULT = dict(train=result_of_training, search=result_of_search, study=result_of_study,
              tables=result_of_tables)

def result(what, folder):
    "Return all that finished work has left, to compare; raise if something is there twice or temporary."
    assert not [*folder.glob('**/checkpoint/*.part')], 'temporary files are left'
    return as_json(RESULT[what](folder))

# The harness: the parent imports once and forks; a child is killed with all that it started.

def fork(f, *args, err):
    "Run a function in a child, which ends with 0 if it returns; return its process id."
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        os.setsid()
        torch.set_num_threads(1)
        with open(err, 'w') as file, redirect_stdout(file), redirect_stderr(file):
            try:
                f(*args)
                code = 0
            except BaseException: traceback.print_exc()
    finally: os._exit(code)

def begin(what, folder, err): return fork(WORK[what], folder, err=err)

def kill(pid):
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

def status_of(pid, seconds=None):
    "Wait for a child, and return its exit status; None if it still runs after `seconds`."
    limit = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return status
        if limit and time.monotonic() >= limit: return None
        time.sleep(.002)

def prepared(what, base):
    "Make a folder to begin in."
    folder = Path(tempfile.mkdtemp(dir=base))
    if what == 'search': shutil.copytree(base/'trained'/'run', folder/'run')
    return folder

def check(pid, err, what, limit=300):
    "Wait for a child that must end well."
    status = status_of(pid, limit)
    if status is None:
        kill(pid)
        raise RuntimeError(f'{what} hangs')
    if status: raise RuntimeError(f'{what} failed: {err.read_text()[-3000:]}')

def train_for_search(base, err):
    "Train the run that searches begin with, once."
    if (base/'trained').exists(): return
    (base/'trained').mkdir()
    check(begin('train', base/'trained', err), err, 'train')

# Kills

def kill_some(what, folder, err, duration, rng, n):
    """Begin and kill at a random moment, until `n` kills have hit or all is done.

    Return how many hit, and how many of these before anything was written.
    """
    n_hits = 0
    n_early = 0
    before = set(folder.rglob('*'))
    while n_hits < n:
        pid = begin(what, folder, err)
        status = status_of(pid, rng.uniform(0, duration))
        if status == 0: break
        if status: raise RuntimeError(f'{what} failed after {n_hits} kills: {err.read_text()[-3000:]}')
        kill(pid)
        n_hits += 1
        n_early += set(folder.rglob('*')) == before
    return n_hits, n_early

def kills(what, n, seed=0, base=None, say=print):
    "Kill one kind of work `n` times, and return a row of the table."
    base = Path(base or tempfile.mkdtemp(prefix='kshot_'))
    rng = random.Random(f'{what} {seed}')
    err = base/'err'
    if what == 'search': train_for_search(base, err)
    folder = prepared(what, base)
    began = time.monotonic()
    check(begin(what, folder, err), err, what)
    duration = time.monotonic() - began
    expected = result(what, folder)
    shutil.rmtree(folder)
    count = Counter()
    while count['kills'] < n:
        folder = prepared(what, base)
        left = n - count['kills']
        n_hits, n_early = kill_some(what, folder, err, 1.1*duration, rng, min(left, rng.randint(1, 4)))
        check(begin(what, folder, err), err, what)
        is_equal = result(what, folder) == expected
        count.update(kills=n_hits, early=n_early, runs=1)
        count.update(equal_runs=int(is_equal), equal_kills=n_hits*is_equal)
        runs = f'{count["runs"]} runs, {count["equal_runs"]} equal'
        say(f'{what}: {count["kills"]} of {n} kills, {runs}', flush=True)
        shutil.rmtree(folder)
    note = ('SIGKILL of the whole process group at uniform moments, resumed, '
            'result equal to the undisturbed one')
    return dict(what=f'kill {what}', n=count['kills'], ok=count['equal_kills'],
                before_anything=count['early'], runs=count['runs'], runs_equal=count['equal_runs'],
                seed=seed, seconds_undisturbed=round(duration, 2), note=note)

# What else may go wrong. Each function returns rows of the table.

def refused(f, *args):
    "Return the one line that a call is refused with; an error of another kind passes."
    try: f(*args)
    except (ValueError, OSError) as e: # what a command prints in one line
        assert len(str(e).splitlines()) == 1, e
        return str(e)
    raise AssertionError(f'{f.__name__} was not refused')

def refuse_work(what, folder): return refused(WORK[what], folder)

def without_folders(line): return re.sub(r'/\S*/', '', line) # of this machine

def answer(f, args, file):
    "Write what a function returns or raises to an open file, as JSON."
    try: found = ['ok', f(*args)]
    except BaseException: found = ['error', traceback.format_exc()]
    file.write(json.dumps(found))
    file.flush()

def forked(f, *args, limit=300):
    "Return what a function returns in a process of its own, or raise what it raised there."
    with tempfile.TemporaryFile('w+') as file: # open before a child gives its rights away
        pid = fork(answer, f, args, file, err=os.devnull)
        if status_of(pid, limit) is None: kill(pid)
        file.seek(0)
        kind, value = json.loads(file.read() or '["error", "killed"]')
    if kind == 'error': raise RuntimeError(value)
    return value

def contents(folder):
    "Return file -> digest, without locks."
    files = [f for f in sorted(folder.rglob('*')) if f.is_file() and f.suffix != '.lock']
    return {str(f.relative_to(folder)): digest(f) for f in files}

# a full disk

MS_REC = 1<<14
MS_PRIVATE = 1<<18
CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000

def mount_small_disk(folder, size):
    "Mount a small file system that only this process sees; `OSError` where that is not allowed."
    libc = ctypes.CDLL(None, use_errno=True)

    def call(f, *args):
        if f(*args): raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try: call(libc.unshare, CLONE_NEWNS)
    except OSError: call(libc.unshare, CLONE_NEWNS|CLONE_NEWUSER)
    call(libc.mount, b'none', b'/', None, MS_REC|MS_PRIVATE, None)
    call(libc.mount, b'none', str(folder).encode(), b'tmpfs', 0, f'size={size}'.encode())

def limit_file_size(size): # no file may grow beyond
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

def fill_disk(folder, room):
    "Leave `room` bytes on a folder's disk."
    ballast = folder/'ballast'
    block = bytes(os.sysconf('SC_PAGE_SIZE'))
    with open(ballast, 'wb', buffering=0) as file, suppress(OSError):
        while file.write(block): pass
    os.truncate(ballast, max(0, ballast.stat().st_size - room))

def work_in_little_room(what, folder, limit, n_steps):
    "Work where room runs out, each time a little later, then with room again; return errors and result."
    if limit == 'disk':
        copy = folder.with_name(f'{folder.name}_')
        shutil.copytree(folder, copy)
        mount_small_disk(folder, 64<<20)
        shutil.copytree(copy, folder, dirs_exist_ok=True)
    errors = []
    for i in range(n_steps):
        if limit == 'disk': fill_disk(folder, i*8*os.sysconf('SC_PAGE_SIZE'))
        else: limit_file_size(200 + 3000*i)
        before = contents(folder)
        try: WORK[what](folder)
        except (ValueError, OSError) as e: errors.append(str(e))
        else: break
        finally:
            if limit == 'disk': (folder/'ballast').unlink()
            else: limit_file_size(resource.RLIM_INFINITY)
        now = contents(folder)
        lost = [f for f in before if f not in now and 'ballast' not in f and 'checkpoint/' not in f]
        assert not lost and not [f for f in now if f.endswith('.part')], (lost, list(now))
    assert errors and all(len(error.splitlines()) == 1 for error in errors), errors
    WORK[what](folder)
    return errors, result(what, folder)

def full(what, base, expected):
    "A disk that is full, and files that may not grow."
    rows = []
    for limit in ('size of files', 'disk'):
        folder = prepared(what, base)
        try: errors, found = forked(work_in_little_room, what, folder, limit, 6)
        except RuntimeError as e:
            if 'Operation not permitted' in str(e): continue # no file system of one's own here
            raise
        clear = [error for error in errors if re.search('No space left|File too large', error)]
        n_ok = len(clear) if found == expected else 0
        note = 'one clear line each, and with room again the result of an undisturbed run'
        lines = sorted({*map(without_folders, errors)})
        rows.append(dict(what=f'full {limit}, {what}', n=len(errors), ok=n_ok, note=note, said=lines))
    return rows

# a folder that may not be written to

def work_as_nobody(what, folder):
    if not os.getuid():
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    return refused(WORK[what], folder)

def allow(folders, for_folders, for_files):
    for f in folders: f.chmod(for_folders if f.is_dir() else for_files)

def readonly(what, base, expected):
    "A folder that may only be read."
    folder = prepared(what, base)
    allow((base, folder, *folder.rglob('*')), 0o555, 0o444)
    base.chmod(0o755)
    before = contents(folder)
    error = forked(work_as_nobody, what, folder)
    is_refused = contents(folder) == before and 'Permission denied' in error
    allow((folder, *folder.rglob('*')), 0o755, 0o644)
    forked(WORK[what], folder)
    ok = is_refused and result(what, folder) == expected
    note = 'one clear line, nothing changed; writable again, the result of an undisturbed run'
    return [dict(what=f'read-only folder, {what}', n=1, ok=int(ok), note=note, said=[without_folders(error)])]

# a second process

def second(what, base, expected):
    "A second process on a folder in use, several times; then the first ends as if alone."
    if what in ('search', 'study'): return [] # several may work on one
    folder = prepared(what, base)
    err = base/'err'
    lock = folder/('tables/.digits.lock' if what == 'tables' else 'run/.lock')
    pid = begin(what, folder, err)
    while not lock.exists(): time.sleep(.01)
    errors = []
    while status_of(pid, 0) is None and len(errors) < 3:
        with suppress(RuntimeError): # the first ended meanwhile
            errors.append(forked(refuse_work, what, folder))
    with suppress(ChildProcessError): check(pid, err, what)
    n_refused = sum('is in use by another process' in error for error in errors)
    ok = n_refused if result(what, folder) == expected else 0
    note = 'refused in one line; the first ends as if it were alone'
    lines = sorted({*map(without_folders, errors)})
    return [dict(what=f'second process, {what}', n=len(errors), ok=ok, note=note, said=lines)]

# clocks that jump

def work_with_jumping_clock(what, folder, seed):
    "Work while the clock of the day jumps by up to a year, back and forth."
    rng = random.Random(seed)
    real = time.time
    real_ns = time.time_ns
    time.time = lambda: real() + rng.uniform(-3e7, 3e7)
    time.time_ns = lambda: real_ns() + rng.randint(-3*10**16, 3*10**16)
    for module in list(sys.modules.values()): # those that have it by name
        if getattr(module, 'time', None) is real: module.time = time.time
    WORK[what](folder)

def clock(what, base, expected):
    "Three runs under a clock that jumps; two are killed on their way."
    folder = prepared(what, base)
    err = base/'err'
    rng = random.Random(what)
    for seed in range(3):
        pid = fork(work_with_jumping_clock, what, folder, seed, err=err)
        if seed == 2:
            check(pid, err, what)
            continue
        status = status_of(pid, rng.uniform(.5, 1.5))
        if status is None: kill(pid)
        elif status: raise RuntimeError(f'{what} failed: {err.read_text()[-3000:]}')
    records = [json.loads(f.read_text())['seconds'] for f in folder.rglob('run.json')]
    seconds = [s for record in records for s in record.values()]
    seconds += [load_tensors(f)[1]['seconds'] for f in checkpoints(folder/'run')]
    ok = result(what, folder) == expected and all(s >= 0 for s in seconds)
    note = 'up to a year back and forth at every look, two of three killed; equal result, no duration below 0'
    return [dict(what=f'clock jumps, {what}', n=3, ok=3*ok, note=note)]

# damaged checkpoints

def damaged(data, i, rng):
    "Return bytes that are truncated, flipped, zeroed in part, zeroed, or gone."
    data = bytearray(data)
    at = int(rng.integers(len(data)))
    if i%4 == 0: return data[:at]
    if i%4 == 1: data[at] ^= 1 << int(rng.integers(8))
    elif i%4 == 2: data[at:at+64] = bytes(len(data[at:at+64]))
    else: data = bytearray(len(data)) if i%8 == 3 else bytearray()
    return data

def fall_back(folder):
    "Resume a run whose newest checkpoint is damaged, and return its result."
    with redirect_stderr(io.StringIO()) as err:
        why = refused(load_run, folder/'run')
        WORK['train'](folder)
    assert 'trying the one before' in err.getvalue(), err.getvalue()
    assert 'holds weights of epoch 5, expected 6: resume the training' in why, why
    return result('train', folder)

def corrupt(what, base, expected, n=40):
    "The newest checkpoint is damaged: resuming falls back, says so, and ends with the same weights."
    if what != 'train': return []
    whole = prepared(what, base)
    rng = np.random.default_rng(0)
    forked(WORK[what], whole)
    n_ok = 0
    for i in range(n):
        folder = Path(tempfile.mkdtemp(dir=base))
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        newest = checkpoints(folder/'run')[-1]
        data = damaged(newest.read_bytes(), i, rng)
        is_same = data == newest.read_bytes()
        newest.write_bytes(data)
        n_ok += is_same or forked(fall_back, folder) == expected
        shutil.rmtree(folder)
    note = ('truncated, a bit flipped, 64 bytes zeroed, all zeroed, empty: scoring refuses, '
            'training says so, takes the one before and ends equal')
    return [dict(what='damaged newest checkpoint, train', n=n, ok=n_ok, note=note)]

TROUBLES = dict(full=full, readonly=readonly, second=second, clock=clock, corrupt=corrupt)

def trouble(names, works, base):
    "Return the rows of some troubles with some kinds of work."
    base = Path(base)
    rows = []
    for what in works:
        if what == 'search': train_for_search(base, base/'err')
        folder = prepared(what, base)
        forked(WORK[what], folder)
        expected = result(what, folder)
        for name in names:
            found = TROUBLES[name](what, base, expected)
            for row in found: print(row, flush=True)
            rows += found
    return rows

# hostile input

class Watch:
    "A pytest plugin that counts outcomes and keeps what tests say."
    def __init__(self):
        self.outcomes = Counter()
        self.said = ''

    def pytest_runtest_logreport(self, report):
        if report.when == 'call' or not report.passed: self.outcomes[report.outcome] += 1
        if report.when == 'call': self.said += ''.join(text for _,text in report.user_properties)

def strangers():
    "Return the row of tests/test_reliability.py: generated input, hostile files, and what is written where."
    watch = Watch()
    tests = str(ROOT/'tests'/'test_reliability.py')
    pytest.main(['-q', '-p', 'no:cacheprovider', '-k', 'not disturbed', tests], plugins=[watch])
    name = "strangers' input and files, tests"
    return [dict(what=name, n=sum(watch.outcomes.values()), ok=watch.outcomes['passed'], note=watch.said)]

# the table

def note(rows, out):
    "Put rows into the results, in place of those of the same name."
    about = environment()
    commit = about.pop('commit')
    names = {row['what'] for row in rows}
    before = json.loads(out.read_text())['rows'] if out.exists() else []
    kept = [row for row in before if row['what'] not in names]
    new = [row | dict(commit=commit) for row in rows]
    write_json(out, dict(**about, config=vars(CONFIG), rows=kept + new))

def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument('work', nargs='*', default=list(WORK), help=f'of {", ".join(WORK)}')
    parser.add_argument('--n', type=int, default=50, help='kills of each')
    parser.add_argument('--seed', type=int, default=0)
    troubles = f'besides kills: of {", ".join(TROUBLES)}'
    parser.add_argument('--trouble', nargs='*', default=list(TROUBLES), help=troubles)
    parser.add_argument('--strangers', action='store_true', help="and strangers' input")
    parser.add_argument('--out', type=Path, default=OUT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix='kshot_') as folder:
        for what in args.work if args.n else []:
            row = kills(what, args.n, args.seed, folder)
            print(row, flush=True)
            note([row], args.out)
        if args.trouble: note(trouble(args.trouble, args.work, folder), args.out)
    if args.strangers: note(strangers(), args.out)

if __name__ == '__main__': main()
