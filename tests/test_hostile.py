"Hostile files: pickles, headers, tables and run folders of somebody else are read or refused, and never run"
import json, os, pickle, shutil, signal, struct, subprocess, sys
from multiprocessing import get_context

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, strategies as st

from kshot.checkpoint import load_tensors
from kshot.datasets.images import read_part
from kshot.datasets.unpickle import load_plain
from kshot.record import read_run
from kshot.standalone import end_with_parent
from kshot.studies.grid import Row
from kshot.studies.study import study_rows
from kshot.tables import read_table
from test_reliability import examples, refusal

class Bomb:
    "A pickle of it makes a folder, if anybody opens it carelessly."
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.mkdir, (str(self.mark),)

@pytest.fixture
def bomb(tmp_path):
    yield Bomb(tmp_path/'was-here')
    assert not (tmp_path/'was-here').exists()

def by_opcode(mark:bytes) -> list[bytes]: # every way to name and call a function
    return [b'cos\nmkdir\n(V%s\ntR.' % mark,
            b"(S'%s'\nios\nmkdir\n." % mark,
            b'(cos\nmkdir\nV%s\no.' % mark,
            b'\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c%c%s\x85R.' % (len(mark), mark),
            b'\x82\x01.',
            b'cbuiltins\neval\n(V1\ntR.',
            b'cnumpy\nload\n(V/etc/passwd\ntR.',
            b'ctorch\nload\n(V/etc/passwd\ntR.',
            b'\x80\x04\x8e' + b'\xff'*8 + b'.',
            b'\x80\x04\x8c\x05numpy\x8c\x0dndarray.tofile\x93.']

def test_pickles(bomb):
    for data in by_opcode(str(bomb.mark).encode()): assert refusal(load_plain, data), data
    for protocol in range(6):
        for o in (bomb, [bomb], {'data': bomb}):
            assert refusal(load_plain, pickle.dumps(o, protocol=protocol))

def test_files_of_torch_and_numpy(bomb, tmp_path):
    for is_zip in (True, False):
        torch.save({'w': bomb}, tmp_path/'a.pth', _use_new_zipfile_serialization=is_zip)
        assert 'asks for posix.mkdir' in refusal(load_plain, tmp_path/'a.pth')
    np.savez(tmp_path/'cifar10_part0.npz', blob=np.array([bomb], dtype=object))
    assert 'cannot be read' in refusal(read_part, tmp_path/'cifar10_part0.npz')

def test_tables(bomb, tmp_path):
    data = pickle.dumps(bomb)
    extension = {b'ARROW:extension:name': b'arrow.py_extension_type', b'ARROW:extension:metadata': data}
    names = 'path', 'dataset', 'split', 'epochs', 'seed', 'acc'
    fields = [pa.field(name, pa.binary(), metadata=extension) for name in names]
    group = dict(dataset='d', split='s', epochs=1, seeds=[0], n_rows=1, n_paths=1)
    column = dict(name='path', field_name='path', pandas_type='object', numpy_type=data.hex(), metadata=None)
    meta = dict(kshot=json.dumps(dict(space='digits', source='', groups=[group])),
                pandas=json.dumps(dict(columns=[column], index_columns=[])))
    table = pa.Table.from_arrays([pa.array([data])]*6, schema=pa.schema(fields, metadata=meta))
    pq.write_table(table, tmp_path/'t.parquet')
    assert 'lacks the column' in refusal(read_table, tmp_path/'t.parquet')
    try: pd.read_parquet(tmp_path/'t.parquet')
    except Exception: pass # with an error or without

WORDS = ['w', '__metadata__', 'dtype', 'shape', 'data_offsets', 'config', 'results', 'groups', 'space',
         'n_rows', 'a']

def any_json():
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    def extend(o): return st.lists(o, max_size=3) | st.dictionaries(st.sampled_from(WORDS), o, max_size=4)
    return st.recursive(leaves, extend, max_leaves=12)

def test_headers_with_nonsense(tmp_path):
    "Weights, records, studies and tables may have any JSON as their header or content."
    fname, run, parquet = tmp_path/'a.safetensors', tmp_path/'run', tmp_path/'t.parquet'
    run.mkdir()
    frame = pd.DataFrame(dict(path=['0'], dataset='d', split='s', epochs=1, seed=0, acc=.5))
    count = iter(range(10**6))
    @examples(400)
    @given(any_json(), st.binary(max_size=20), st.sampled_from([0, 0, 0, 1, -1, 2**40, 2**63]))
    def check(o, rest, off):
        text = json.dumps(o).encode()
        fname.write_bytes(struct.pack('<Q', max(0, len(text)+off)) + text + rest)
        assert refusal(load_tensors, fname)
        (run/'run.json').write_bytes(text)
        (run/'study.json').write_bytes(text)
        for read,kind in (read_run, dict), (study_rows, list):
            if refusal(read, run) is None: assert isinstance(o, kind) and o
        if next(count)%8: return
        table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata({'kshot': text})
        pq.write_table(table, parquet)
        assert refusal(read_table, parquet)
    check()

@pytest.mark.parametrize('name', ['../out', '/tmp/out', '..', 'a/b', '', 3, 'a\0b'])
def test_a_row_stays_in_its_study(name, tmp_path):
    (tmp_path/'study.json').write_text(json.dumps([Row(name, 'digits', 'baseline', '', 1, 0, {})]))
    assert 'a row is called' in refusal(study_rows, tmp_path)

# Processes

def _wait_for_ever(pipe):
    end_with_parent()
    pipe.send(os.getpid())
    signal.pause()

def _parent(pipe):
    get_context('fork').Process(target=_wait_for_ever, args=(pipe,)).start()
    signal.pause()

def test_nobody_outlives_a_killed_parent():
    ours, theirs = get_context('fork').Pipe()
    parent = get_context('fork').Process(target=_parent, args=(theirs,))
    parent.start()
    pid = ours.recv()
    theirs.close()
    parent.kill()
    parent.join()
    if not ours.poll(30):
        os.kill(pid, signal.SIGKILL)
        raise AssertionError('it is still there')
    with pytest.raises(EOFError): ours.recv() # the last that held the other end is gone

# Run folders of somebody else, watched by an audit hook in a process of its own

WATCH = """
import json, os, site, sys, sysconfig
from pathlib import Path
work, home = Path(sys.argv[1]), Path(sys.argv[2])
import kshot.cli.main, kshot.cli.work, kshot.studies.study, torch
torch.set_num_threads(1)
folders = [*site.getsitepackages(), *sysconfig.get_paths().values()]
folders += [Path(kshot.__file__).parent, sys.base_prefix]
libraries = tuple({str(Path(p).resolve()) for p in folders})
allowed = str(work), str(home), '/dev/null', '/dev/shm/'
STARTS = 'os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.fork'
REACHES = 'pickle.find_class', 'socket.connect', 'socket.bind', 'ctypes.dlopen.path'
CHANGES = ('os.mkdir', 'os.remove', 'os.rmdir', 'os.symlink', 'os.link', 'os.truncate', 'os.chmod',
           'shutil.rmtree')
bad, watches = [], [True]
def name(p):
    return os.path.abspath(os.fsdecode(p)) if isinstance(p, str | bytes | os.PathLike) else ''
def is_ours(p):
    if not name(p) or '__pycache__' in name(p): return True
    return any(name(p) == a or name(p).startswith(a.rstrip('/')+'/') for a in allowed)
def is_asked(args): # git and lscpu describe the machine
    return 'git' in str(args[0]) or args[0] == 'lscpu' or 'ldconfig' in str(args)
def writes(mode, flags):
    return isinstance(mode, str) and set(mode) & set('wax+') or flags & (os.O_WRONLY|os.O_RDWR|os.O_CREAT)
def is_bad(event, args):
    if event in STARTS + REACHES: return True
    if event == 'subprocess.Popen': return not is_asked(args)
    if event == 'exec': return not str(args[0].co_filename).startswith((*libraries, '<'))
    if event == 'open': return writes(*args[1:]) and not is_ours(args[0])
    if event in CHANGES: return not is_ours(args[0])
    return event == 'os.rename' and not (is_ours(args[0]) and is_ours(args[1]))
def hook(event, args):
    if watches[0] and is_bad(event, args): bad.append([event, str(args)[:300]])
sys.addaudithook(hook)
codes = []
for command,*argv in json.loads(sys.argv[3]):
    try:
        kshot.cli.main.main([command, *argv])
        codes.append(0)
    except SystemExit as e: codes.append(e.code)
watches[0] = False
strange = [m for m,v in sys.modules.items() if str(getattr(v, '__file__', None) or '').startswith(str(work))]
print(json.dumps(dict(codes=codes, bad=bad, strange=strange)))
"""

def watched(folder, *commands):
    "Return exit codes and misdeeds of commands, what they print as errors, and their home."
    home, elsewhere = folder/'home', folder/'cwd'
    for f in (home, elsewhere): f.mkdir(exist_ok=True)
    env = {k: v for k,v in os.environ.items() if k not in ('KSHOT_HOME', 'XDG_CACHE_HOME')}
    env |= dict(HOME=str(home), TMPDIR=str(home), OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    argv = json.dumps([list(map(str, c)) for c in commands])
    p = subprocess.run([sys.executable, '-c', WATCH, folder/'runs', home, argv],
                       cwd=elsewhere, env=env, capture_output=True, text=True, timeout=400)
    assert p.returncode == 0, p.stderr[-3000:]
    assert not any(elsewhere.iterdir())
    return json.loads(p.stdout.splitlines()[-1]), p.stderr, home

QUICK = '--K 2 --epochs 2 --passes 2 --bs 200 --channels 4'.split()
STUDY = 'K=[1]\nseeds=1\n[digits]\nepochs=1\npasses=1\nchannels=4\nn_paths=20\nvary.sampler=["fair"]'
SCRIPT = '<img src=x onerror=alert(1)>' # also a name for a folder

@pytest.fixture(scope='module')
def worked(tmp_path_factory):
    "A folder in which all commands have worked, watched."
    tmp = tmp_path_factory.mktemp('watched')
    (tmp/'study.toml').write_text(STUDY)
    to = ['--runs', tmp/'runs', '--name', 'run']
    deeds, err, home = watched(
        tmp, ['train', *to, *QUICK], ['rank', *to, '--n_paths', 20],
        ['search', *to, '--n_paths', 5, '--algorithm', 'random'], ['retrain', *to, '--epochs', 1],
        ['study', tmp/'study.toml', '--runs', tmp/'runs', '--name', 'study', '--workers', 1])
    return tmp, deeds, err, home

def test_nothing_is_written_elsewhere(worked):
    tmp, deeds, err, home = worked
    assert deeds['codes'] == [0]*5, err[-2000:]
    assert deeds['bad'] == [] and deeds['strange'] == []
    left = [f.relative_to(home) for f in home.rglob('*') if f.is_file()]
    known = '.kshot', '.cache', '.config' # of kshot and matplotlib
    assert not [f for f in left if f.parts[0] not in known], left
    assert {'run', 'study'} == {f.name for f in (tmp/'runs').iterdir()}

def update(fname, **changes): fname.write_text(json.dumps(json.loads(fname.read_text()) | changes))

def plant(run, mark):
    "Put code, a pickle and HTML into every place of a run that takes them."
    for name in ('__init__', 'sitecustomize', 'kshot', 'torch', 'conftest', 'pandas'):
        (run/f'{name}.py').write_text("import os; os.system('touch was-here')")
    (run/'checkpoint'/'epoch_99999.pth').write_bytes(pickle.dumps(Bomb(mark)))
    record = json.loads((run/'run.json').read_text())
    record['results'][SCRIPT] = record['versions'][SCRIPT] = {SCRIPT: SCRIPT}
    record['results']['search']['algorithm'] = SCRIPT
    (run/'run.json').write_text(json.dumps(record))
    lines = (run/'log.jsonl').read_text().splitlines()
    rows = [json.loads(line) | {SCRIPT: 1., 'name': SCRIPT} for line in lines]
    (run/'log.jsonl').write_text(''.join(json.dumps(row)+'\n' for row in rows))
    update(run/'subnet.json', **{'space': '../../x', SCRIPT: SCRIPT})
    (run/'report.html').unlink()

WRONG = [dict(config=dict(folder=SCRIPT)), dict(config=dict(space='../../x')), dict(config=dict(K=[1])),
         dict(config={SCRIPT: 1}), dict(results=dict(train=3))]

def test_a_hostile_run(worked, tmp_path):
    "Nothing in a folder is run, no name of it becomes HTML, and wrong records are refused in a line."
    good, runs = worked[0]/'runs'/'run', tmp_path/'runs'
    run = runs/SCRIPT
    shutil.copytree(good, run)
    plant(run, runs/'was-here')
    for i,changes in enumerate(WRONG):
        shutil.copytree(good, runs/f'wrong{i}')
        record = json.loads((good/'run.json').read_text())
        for part,change in changes.items():
            update(runs/f'wrong{i}'/'run.json', **{part: record[part] | change})
    to = ['--runs', runs, '--name', SCRIPT]
    wrong = [['search', '--runs', runs, '--name', f'wrong{i}', '--n_paths', 6] for i in range(len(WRONG))]
    deeds, err, _ = watched(
        tmp_path, ['rank', *to, '--n_paths', 20, *QUICK],
        ['search', *to, '--n_paths', 6, '--algorithm', 'random'], ['export', *to], *wrong)
    assert deeds['codes'] == [0, 0] + [2]*6 and 'Traceback' not in err, err[-3000:]
    assert deeds['bad'] == [] and deeds['strange'] == [] and not [*tmp_path.rglob('was-here')]
    page = (run/'report.html').read_text()
    assert SCRIPT not in page and '<img src=x' not in page
    assert '&lt;img src=x onerror=alert(1)&gt;' in page
