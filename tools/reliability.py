"What survives what: kills at random moments, damaged checkpoints, a full disk, clocks that jump. Figures in results/reliability.json"
import argparse, ctypes, hashlib, io, json, multiprocessing, os, random, re, resource, shutil, signal, sys, tempfile, time, traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
import kshot.tables
from kshot.checkpoint import checkpoints, load_tensors
from kshot.config import Config
from kshot.base.files import write_json
from kshot.studies.grid import make_rows
from kshot.jobs import search_run
from kshot.record import environment, read_run
from kshot.runs import load_run, train_run
from kshot.studies.study import run_study
from kshot.tables import make_table

OUT = Path(__file__).parent.parent/'results'/'reliability.json'
CONFIG = Config(K=2, epochs=6, passes=4, bs=200, channels=4)
SPACE_PATHS = ('0000', '1111', '2222', '3333', '4444', '0123', '1234', '4321')

# What is disturbed. Each is called in a process of its own with a folder, begins or goes on there, and ends when all is done.

def train(folder):
    train_run(CONFIG, folder/'run', resume=(folder/'run'/'run.json').exists(), progress=False)

def search(folder): # of a run that is trained: two generations, within a budget
    search_run(folder/'run', 120, 'nsga2', dict(macs=20_000), n_calibration=1)

def study(folder):
    rows = make_rows(dict(space='digits', epochs=2, passes=1, bs=200, channels=4, n_paths=8, n_calibration=1), {'path sampling': {'fair': dict(sampler='fair')}}, K=[2], seeds=1)
    run_study(rows, folder/'study', workers=1, progress=False)

def tables(folder): # its workers are processes; forked here, as importing takes seconds
    kshot.tables.get_context = lambda _: multiprocessing.get_context('fork')
    make_table('digits', folder/'tables', epochs=1, seeds=1, paths=list(SPACE_PATHS), n_workers=2)

# What has to be equal in the end: everything but seconds, and the commit, which may be another by then.

def digest(fname): return hashlib.sha256(fname.read_bytes()).hexdigest()

def no_seconds(o):
    if isinstance(o, dict): return {k: no_seconds(v) for k,v in o.items() if not k.startswith('seconds') and k != 'commit'}
    return [no_seconds(v) for v in o] if isinstance(o, list) else o

def weights(folder):
    def one(fname):
        tensors, meta = load_tensors(fname)
        return {k: hashlib.sha256(t.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest() for k,t in tensors.items()}, no_seconds(meta)
    return {f.name: one(f) for f in checkpoints(folder)}

def rows_of(fname, *by): # of a frame, with as many bits as it has
    frame = pd.read_parquet(fname)
    frame = frame[[c for c in frame if not c.startswith('seconds') and c != 'commit']]
    return frame.sort_values(list(by), ignore_index=True).to_csv(index=False, float_format='%.17g') if by else frame.to_csv(index=False, float_format='%.17g')

def result(what, folder):
    "Everything a finished work has left, in comparable form; raises where something is twice or temporary."
    run = folder/'run'
    assert not [*folder.glob('**/checkpoint/*.part')], 'temporary files are left'
    if what == 'train': return weights(run), no_seconds(read_run(run)), digest(run/'log.jsonl'), len(list((run/'checkpoint').iterdir()))
    if what == 'search':
        trials = [json.loads(l) for l in (run/'search.journal').read_text().splitlines()]
        paths = [t['user_attrs']['path'] for t in trials if (t.get('user_attrs') or {}).get('path')]
        assert len(paths) == len(set(paths)) > 0, 'a path was scored twice'
        return rows_of(run/'search.parquet', 'path'), no_seconds(read_run(run)['results']['search'])
    if what == 'study':
        trials = [json.loads(l) for l in (folder/'study'/'study.journal').read_text().splitlines()]
        done = [t['user_attrs']['path'] for t in trials if (t.get('user_attrs') or {}).get('path')]
        assert len(done) == len(set(done)) == 2, 'a row was done twice'
        return rows_of(folder/'study'/'results.parquet', 'name'), {f.parent.parent.name: weights(f.parent.parent) for f in folder.glob('study/*/checkpoint/*2.safetensors')}
    logged = [json.loads(l) for l in (folder/'tables'/'digits.jsonl').read_text().splitlines()]
    keys = [(r['path'], r['split'], r['seed']) for r in logged]
    assert len(keys) == len(set(keys)) == 2*len(SPACE_PATHS), 'a row is there twice'
    return kshot.tables.read_table(folder/'tables'/'digits.parquet').frame.to_csv(index=False, float_format='%.17g')

WORK = dict(train=train, search=search, study=study, tables=tables)

# The harness: the parent imports once and forks; children have a session of their own and are killed with all they have started.

def begin(what, folder, err):
    "A child at work; it ends with 0 when all is done."
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        os.setsid()
        torch.set_num_threads(1)
        with open(err, 'w') as f, redirect_stdout(f), redirect_stderr(f):
            try: WORK[what](folder); code = 0
            except BaseException: traceback.print_exc()
    finally: os._exit(code)

def ended(pid, seconds=None): # exit status; None: still at work when the time was over
    limit = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return status
        if limit and time.monotonic() >= limit: return None
        time.sleep(.002)

def prepared(what, base): # folder to begin in
    folder = Path(tempfile.mkdtemp(dir=base))
    if what == 'search': shutil.copytree(base/'trained'/'run', folder/'run')
    return folder

def check(pid, err, what, limit=300):
    status = ended(pid, limit)
    if status is None: os.killpg(pid, signal.SIGKILL); os.waitpid(pid, 0); raise RuntimeError(f'{what} hangs')
    if status: raise RuntimeError(f'{what} failed: {err.read_text()[-3000:]}')

def kill_one(what, folder, err, duration, rng, n_left):
    "Begin, kill at a random moment, begin again, until `n_left` kills have hit or all is done: how many have, and how many found nothing new in the folder."
    n, n_early, had = 0, 0, set(folder.rglob('*'))
    while n < n_left:
        pid = begin(what, folder, err)
        status = ended(pid, rng.uniform(0, duration))
        if status is None: os.killpg(pid, signal.SIGKILL); os.waitpid(pid, 0); n += 1; n_early += set(folder.rglob('*')) == had
        elif status: raise RuntimeError(f'{what} failed after {n} kills: {err.read_text()[-3000:]}')
        else: break
    return n, n_early

def kills(what, n, seed=0, base=None, say=print):
    "`n` kills of one kind of work: a row of the table."
    base = Path(base or tempfile.mkdtemp(prefix='kshot_'))
    rng, err = random.Random(f'{what} {seed}'), base/'err'
    if what == 'search' and not (base/'trained').exists():
        (base/'trained').mkdir(); check(begin('train', base/'trained', err), err, 'train')
    folder, began = prepared(what, base), time.monotonic()
    check(begin(what, folder, err), err, what)
    duration, expected = time.monotonic() - began, result(what, folder)
    shutil.rmtree(folder)
    n_kills = n_early = n_runs = n_equal = hit_equal = 0
    while n_kills < n:
        folder = prepared(what, base)
        hits, early = kill_one(what, folder, err, 1.1*duration, rng, min(n-n_kills, rng.randint(1, 4)))
        check(begin(what, folder, err), err, what)
        is_equal = result(what, folder) == expected
        n_kills, n_early, n_runs, n_equal, hit_equal = n_kills+hits, n_early+early, n_runs+1, n_equal+is_equal, hit_equal+hits*is_equal
        say(f'{what}: {n_kills} of {n} kills, {n_runs} runs, {n_equal} equal', flush=True)
        shutil.rmtree(folder)
    row = dict(what=f'kill {what}', n=n_kills, ok=hit_equal, before_anything=n_early, runs=n_runs, runs_equal=n_equal, seed=seed, seconds_undisturbed=round(duration, 2),
               note='SIGKILL of the whole process group at uniform moments, resumed, result equal to the undisturbed one')
    return row

# What else may go wrong. Each function gives rows of the table.

MS_REC, MS_PRIVATE, CLONE_NEWNS, CLONE_NEWUSER = 1<<14, 1<<18, 0x20000, 0x10000000

def small_disk(folder, size):
    "A file system of `size` bytes at a folder, that only this process sees; `OSError` where that is not allowed."
    libc = ctypes.CDLL(None, use_errno=True)
    def call(f, *args):
        if f(*args): raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try: call(libc.unshare, CLONE_NEWNS)
    except OSError: call(libc.unshare, CLONE_NEWNS|CLONE_NEWUSER)
    call(libc.mount, b'none', b'/', None, MS_REC|MS_PRIVATE, None)
    call(libc.mount, b'none', str(folder).encode(), b'tmpfs', 0, f'size={size}'.encode())

def small_files(size): # no file may grow beyond
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

def refused(f, *args): # the one line that it says; an error of another kind passes
    try: f(*args)
    except (ValueError, OSError) as e: # what a command prints in one line
        assert len(str(e).splitlines()) == 1, e
        return str(e)
    raise AssertionError(f'{f.__name__} was not refused')

def plain(line): return re.sub(r'/\S*/', '', line) # without the folders of this machine

def forked(f, *args, limit=300): # what `f` returns or raises, in a process of its own
    answer = tempfile.NamedTemporaryFile('r+')
    pid = os.fork()
    if not pid:
        out = ['error', 'none']
        try:
            os.setsid(); torch.set_num_threads(1)
            with open(os.devnull, 'w') as null, redirect_stdout(null), redirect_stderr(null): out = ['ok', f(*args)]
        except BaseException: out = ['error', traceback.format_exc()]
        finally: answer.write(json.dumps(out)); answer.flush(); os._exit(0)
    if ended(pid, limit) is None: os.killpg(pid, signal.SIGKILL); os.waitpid(pid, 0)
    answer.seek(0)
    kind, value = json.loads(answer.read() or '["error", "killed"]')
    if kind == 'error': raise RuntimeError(value)
    return value

def files_of(folder): return {str(f.relative_to(folder)): digest(f) for f in sorted(folder.rglob('*')) if f.is_file() and f.name[-5:] != '.lock'}

def _full(what, folder, how, n_steps):
    "Work on a disk that fills up at several places; then with room again."
    if how == 'disk':
        keep = folder.with_name(folder.name+'_')
        shutil.copytree(folder, keep); small_disk(folder, 64<<20); shutil.copytree(keep, folder, dirs_exist_ok=True)
    said, room = [], os.sysconf('SC_PAGE_SIZE')
    for i in range(n_steps): # each time it comes a little further
        if how == 'disk':
            with open(folder/'ballast', 'wb', buffering=0) as f, suppress(OSError):
                while f.write(bytes(room)): pass
            os.truncate(folder/'ballast', max(0, (folder/'ballast').stat().st_size - i*8*room))
        else: small_files(200 + 3000*i)
        had = files_of(folder)
        try: WORK[what](folder)
        except (ValueError, OSError) as e: said.append(str(e))
        else: break
        finally:
            if how == 'disk': (folder/'ballast').unlink()
            else: small_files(resource.RLIM_INFINITY)
        now = files_of(folder)
        lost = [f for f in had if f not in now and 'ballast' not in f and 'checkpoint/' not in f]
        assert not lost and not [f for f in now if f.endswith('.part')], (lost, list(now))
    assert said and all(len(s.splitlines()) == 1 for s in said), said
    WORK[what](folder)
    return said, json.loads(json.dumps(result(what, folder)))

def full(what, base, expected):
    rows = []
    for how in ('size of files', 'disk'):
        folder = prepared(what, base)
        try: said, found = forked(_full, what, folder, how, 6)
        except RuntimeError as e:
            if 'Operation not permitted' in str(e): continue # no file system of one's own here
            raise
        clear = [m for m in said if re.search('No space left|File too large', m)]
        ok = len(clear) if found == expected else 0
        rows.append(dict(what=f'full {how}, {what}', n=len(said), ok=ok, note='one clear line each, and with room again the result of an undisturbed run', said=sorted(set(plain(m) for m in said))))
    return rows

def _as_nobody(what, folder):
    if not os.getuid(): os.setgroups([]); os.setgid(65534); os.setuid(65534)
    return refused(WORK[what], folder)

def readonly(what, base, expected):
    folder = prepared(what, base)
    for f in (base, folder, *folder.rglob('*')): f.chmod(0o555 if f.is_dir() else 0o444)
    base.chmod(0o755)
    had = files_of(folder)
    said = forked(_as_nobody, what, folder)
    ok = files_of(folder) == had and 'Permission denied' in said
    for f in (folder, *folder.rglob('*')): f.chmod(0o755 if f.is_dir() else 0o644)
    forked(WORK[what], folder)
    ok = ok and json.loads(json.dumps(result(what, folder))) == expected
    return [dict(what=f'read-only folder, {what}', n=1, ok=int(ok), note='one clear line, nothing changed; writable again, the result of an undisturbed run', said=[plain(said)])]

def _second(what, folder): return refused(WORK[what], folder)

def second(what, base, expected):
    "A second process on a folder in use, several times; then the first ends as if alone."
    if what in ('search', 'study'): return [] # several may work on one
    folder, err = prepared(what, base), base/'err'
    lock = folder/('tables/.digits.lock' if what == 'tables' else 'run/.lock')
    pid, said = begin(what, folder, err), []
    while not lock.exists(): time.sleep(.01)
    while ended(pid, 0) is None and len(said) < 3:
        with suppress(RuntimeError): said.append(forked(_second, what, folder)) # it ended meanwhile
    with suppress(ChildProcessError): check(pid, err, what)
    ok = sum('is in use by another process' in m for m in said) if json.loads(json.dumps(result(what, folder))) == expected else 0
    return [dict(what=f'second process, {what}', n=len(said), ok=ok, note='refused in one line; the first ends as if it were alone', said=sorted({plain(m) for m in said}))]

def _jumpy(what, folder, seed):
    "Work while the clock of the day jumps by up to a year, back and forth."
    rng, real, real_ns = random.Random(seed), time.time, time.time_ns
    time.time = lambda: real() + rng.uniform(-3e7, 3e7)
    time.time_ns = lambda: real_ns() + rng.randint(-3*10**16, 3*10**16)
    for m in list(sys.modules.values()): # those that have it by name
        if getattr(m, 'time', None) is real: m.time = time.time
    WORK[what](folder)

def clock(what, base, expected):
    folder, rng = prepared(what, base), random.Random(what)
    n = 0
    for seed in range(3): # two are killed on their way
        pid = os.fork()
        if not pid:
            try: os.setsid(); torch.set_num_threads(1); sys.stdout = sys.stderr = open(base/'err', 'w'); _jumpy(what, folder, seed)
            except BaseException: traceback.print_exc(); sys.stderr.flush(); os._exit(1)
            os._exit(0)
        if seed == 2: check(pid, base/'err', what)
        elif (status := ended(pid, rng.uniform(.5, 1.5))) is None: os.killpg(pid, signal.SIGKILL); os.waitpid(pid, 0)
        elif status: raise RuntimeError(f'{what} failed: {(base/"err").read_text()[-3000:]}')
        n += 1
    seconds = [s for f in folder.rglob('run.json') for s in json.loads(f.read_text())['seconds'].values()]
    for f in checkpoints(folder/'run'): seconds.append(load_tensors(f)[1]['seconds'])
    ok = json.loads(json.dumps(result(what, folder))) == expected and all(s >= 0 for s in seconds)
    return [dict(what=f'clock jumps, {what}', n=n, ok=n*ok, note='up to a year back and forth at every look, two of three killed; equal result, no duration below 0')]

def corrupt(what, base, expected, n=40):
    "The newest checkpoint truncated, flipped, zeroed: resuming falls back, says so, and ends with the same weights."
    if what != 'train': return []
    whole, rng, n_ok = prepared(what, base), np.random.default_rng(0), 0
    forked(WORK[what], whole)
    for i in range(n):
        folder = Path(tempfile.mkdtemp(dir=base))
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        newest = checkpoints(folder/'run')[-1]
        data = bytearray(newest.read_bytes()); at = int(rng.integers(len(data)))
        if i%4 == 0: data = data[:at]
        elif i%4 == 1: data[at] ^= 1 << int(rng.integers(8))
        elif i%4 == 2: data[at:at+64] = bytes(len(data[at:at+64]))
        else: data = bytearray(len(data)) if i%8 == 3 else bytearray()
        same = bytes(data) == newest.read_bytes()
        newest.write_bytes(data)
        n_ok += same or forked(_fall_back, folder) == expected
        shutil.rmtree(folder)
    return [dict(what='damaged newest checkpoint, train', n=n, ok=n_ok, note='truncated, a bit flipped, 64 bytes zeroed, all zeroed, empty: scoring refuses, training says so, takes the one before and ends equal')]

def _fall_back(folder):
    with redirect_stderr(io.StringIO()) as err:
        why = refused(load_run, folder/'run')
        WORK['train'](folder)
    assert 'trying the one before' in err.getvalue() and 'holds weights of epoch 5, expected 6: resume the training' in why, (err.getvalue(), why)
    return json.loads(json.dumps(result('train', folder)))

TROUBLES = dict(full=full, readonly=readonly, second=second, clock=clock, corrupt=corrupt)

def trouble(names, works, base):
    "Rows of some troubles with some kinds of work."
    base, rows = Path(base), []
    for what in works:
        if what == 'search' and not (base/'trained').exists(): (base/'trained').mkdir(); forked(train, base/'trained')
        folder = prepared(what, base)
        forked(WORK[what], folder)
        expected = json.loads(json.dumps(result(what, folder)))
        for name in names:
            for row in TROUBLES[name](what, base, expected): rows.append(row); print(row, flush=True)
    return rows

def strangers():
    "Rows of `test_reliability.py`: what is generated, hostile files, and what is written where."
    out, tests = io.StringIO(), Counter()
    class Watch:
        def pytest_runtest_logreport(self, report):
            if report.when == 'call' or not report.passed: tests[report.outcome] += 1
            for k,v in report.user_properties if report.when == 'call' else (): out.write(v)
    pytest.main(['-q', '-p', 'no:cacheprovider', '-k', 'not disturbed', str(Path(__file__).with_name('test_reliability.py'))], plugins=[Watch()])
    return [dict(what="strangers' input and files, tests", n=sum(tests.values()), ok=tests['passed'], note=out.getvalue())]

def note(rows, out):
    "Put rows into the results, in place of those of the same name."
    about, had, names = environment(), json.loads(out.read_text())['rows'] if out.exists() else [], {r['what'] for r in rows}
    commit = about.pop('commit')
    write_json(out, dict(**about, config=vars(CONFIG), rows=[r for r in had if r['what'] not in names] + [r | dict(commit=commit) for r in rows]))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('work', nargs='*', default=list(WORK), help=f'of {", ".join(WORK)}')
    p.add_argument('--n', type=int, default=50, help='kills of each')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--trouble', nargs='*', default=list(TROUBLES), help=f'besides kills: of {", ".join(TROUBLES)}')
    p.add_argument('--strangers', action='store_true', help="and strangers' input")
    p.add_argument('--out', type=Path, default=OUT)
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix='kshot_') as d:
        for what in args.work if args.n else []:
            row = kills(what, args.n, args.seed, d)
            print(row, flush=True); note([row], args.out)
        if args.trouble: note(trouble(args.trouble, args.work, d), args.out)
    if args.strangers: note(strangers(), args.out)
