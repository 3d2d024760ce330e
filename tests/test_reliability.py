"""What strangers do: ten thousand paths, codes, configurations and strings, most of them wrong; hostile files; and a small share of `reliability.py`."""
import json, linecache, math, os, pickle, shutil, signal, struct, subprocess, sys, traceback
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest, torch
from hypothesis import given, settings, strategies as st
from kshot.checkpoint import load_tensors
from kshot.config import Config, check_config, space_of
from kshot.studies.grid import Row, split_settings
from kshot.datasets.images import read_part
from kshot.networks import digits_net
from kshot.nb101 import NB101_EDGES
from kshot.record import read_run
from kshot.benchmark import BENCHMARKS, get_space
from kshot.studies.study import study_rows
from kshot.supernet import Supernet, check_code
from kshot.standalone import end_with_parent
from kshot.tables import read_table
from kshot.datasets.unpickle import load_plain

HERE, N = Path(__file__).parent, Counter()
def examples(n): return settings(max_examples=n, derandomize=True, deadline=None, database=None)

def refusal(f, *args, **kwargs):
    "The documented error: a `ValueError` or `TypeError` of one line, raised on purpose in the package; None if there is none."
    try: f(*args, **kwargs)
    except (ValueError, TypeError) as e:
        inner = traceback.extract_tb(e.__traceback__)[-1]
        line = linecache.getline(inner.filename, inner.lineno)
        assert '/kshot/' in inner.filename and ('raise' in line or 'operator.index' in line), f'by accident: {e!r} in {inner.filename}:{inner.lineno}: {line}'
        assert len(str(e).splitlines()) == 1 and len(str(e)) < 2000, e
        return str(e)

SPACES_ = {n: get_space(n) for n in BENCHMARKS} | {'widths': get_space('mobilenet_se', (.2, .5, 1.)), 'width': get_space('mobilenet', (.5, 1.), 'path')}
each_space = pytest.mark.parametrize('name', SPACES_)

def living(path): # edges of a NAS-Bench-101 cell on a way from input to output, by powers of its matrix
    m = np.zeros((7, 7), int)
    for (i,j),e in zip(NB101_EDGES, path): m[i,j] = e
    reach = np.linalg.matrix_power(np.eye(7, dtype=int) + m, 7) > 0
    alive = reach[0] & reach[:,6]
    return int(m[np.ix_(alive, alive)].sum()) if reach[0,6] else 0

def is_path(name, space, path): # from what the space's blocks are
    if not all(isinstance(o, int) for o in path) or len(path) != len(space.sizes): return False
    if not all(0 <= o < n for o,n in zip(path, space.sizes)): return False
    if name == 'nb101': return 0 < living(path) <= 9
    return any(path[32:36]) and any(path[36:]) if name == 'nds' else True

def paths(space):
    right = st.tuples(*(st.integers(0, n-1) for n in space.sizes))
    spoil = st.tuples(right, st.integers(0, len(space.sizes)-1), st.integers(-2, 15) | st.sampled_from([True, 1.5, '1', None, 10**30, (0,), math.nan]))
    wrong = spoil.map(lambda t: t[0][:t[1]] + (t[2],) + t[0][t[1]+1:])
    few = st.tuples(right, st.sets(st.integers(0, len(space.sizes)-1), min_size=10)).map(lambda t: tuple(0 if i in t[1] else o for i,o in enumerate(t[0])))
    return right | wrong | (few if len(space.sizes) > 20 else right) | st.lists(st.integers(-1, 7), max_size=45).map(tuple)

@each_space
def test_paths(name):
    space = SPACES_[name]
    @examples(250)
    @given(paths(space))
    def check(path):
        N['paths'] += 1
        if not is_path(name, space, path): assert refusal(space.check, path); return
        assert space.check(path) == path == space.parse(space.format(path)) == space.at(space.index(path))
        again = space.parse(space.native(path))
        assert space.native(again) == space.native(path) and (again == path or name == 'nb101') # what is dead is not written there
    check()

@each_space
def test_strings(name):
    space = SPACES_[name]
    @examples(250)
    @given(st.data())
    def check(data):
        N['strings'] += 1
        path = data.draw(st.tuples(*(st.integers(0, n-1) for n in space.sizes)))
        if name == 'nds' and not is_path(name, space, path): path = (0,)*32 + (1,)*8
        right = '[[[0,1,1],[0,0,1],[0,0,0]],["input","maxpool3x3","output"]]' if name == 'nb101' else space.native(path)
        at, how = data.draw(st.integers(0, len(right))), data.draw(st.integers(0, 5))
        piece = data.draw(st.text(max_size=6) | st.sampled_from(['~', '|', '-', ',', '[', '((', '٣', '²', 'range(0, 9)', "'none'", '9'*5000, '1e999', 'NaN', '\n', '\0', '**x', '{}']))
        s = (right, right[:at]+piece+right[at:], right[:at]+right[at+len(piece):], right[:at]+piece, piece, f' {right} ')[how]
        if (said := refusal(space.parse, s)) is None: # then it means a path, whose string means the same
            p = space.parse(s)
            assert is_path(name, space, p) and space.native(space.parse(space.native(p))) == space.native(p)
        else: assert how, said
    check()

def test_genotypes_with_nonsense():
    space, form = get_space('nds'), "Genotype(normal={}, normal_concat={}, reduce={}, reduce_concat=[2])"
    things = st.recursive(st.none() | st.booleans() | st.integers(-3, 9) | st.sampled_from(['sep_conv_3x3', 'x', 1.5, 2j, b'a']), lambda o: st.lists(o, max_size=8) | st.tuples(o, o) | st.sets(st.integers(0, 5)), max_leaves=12)
    edge = st.tuples(st.sampled_from(['none', 'sep_conv_3x3']), st.integers(0, 1))
    @examples(500)
    @given(things | st.lists(edge, min_size=8, max_size=8), things | st.lists(st.integers(2, 5)), things | st.just([('none', 0)]*8))
    def check(a, concat, b):
        N['strings'] += 1
        s = form.format(a, concat, b)
        if refusal(space.parse, s) is None: assert is_path('nds', space, space.parse(s))
    check()

def test_cells_with_nonsense():
    space = get_space('nb101')
    things = st.recursive(st.none() | st.booleans() | st.integers(-2, 10**30) | st.floats() | st.sampled_from(['input', 'output', 'maxpool3x3']), lambda o: st.lists(o, max_size=4) | st.dictionaries(st.text(max_size=2), o, max_size=2), max_leaves=15)
    square = st.integers(2, 7).flatmap(lambda n: st.lists(st.lists(st.integers(0, 1), min_size=n, max_size=n), min_size=n, max_size=n))
    @examples(500)
    @given(things | square, things | st.lists(st.just('maxpool3x3'), max_size=5).map(lambda o: ['input', *o, 'output']))
    def check(matrix, ops):
        N['strings'] += 1
        s = json.dumps([matrix, ops])
        if refusal(space.parse, s) is None: assert is_path('nb101', space, space.parse(s))
    check()

def test_codes():
    "Simplex codes of K supernets over L blocks; what a code says is compared with numpy's arithmetic."
    torch.manual_seed(0)
    K, x = 3, torch.randn(2, 1, 8, 8)
    supernet = Supernet(digits_net(channels=4), K)
    number = st.floats(0, 1) | st.sampled_from([0., 1., 1/3, -1e-3, 1.001, math.nan, math.inf, 1e300])
    @examples(2000)
    @given(st.lists(number, min_size=1, max_size=13), st.booleans(), st.booleans())
    def check(values, normed, per_block):
        N['codes'] += 1
        v = np.array(values, np.float32)
        with np.errstate(all='ignore'):
            if normed: v = (v/v.sum()).astype(np.float32)
        if per_block and len(v)%4 == 0: v = v.reshape(4, -1)
        is_right = v.shape in ((K,), (4, K)) and bool((v >= 0).all() and (abs(v.sum(-1)-1) < 9e-5).all())
        if v.shape in ((K,), (4, K)) and (abs(abs(v.sum(-1)-1) - 1e-4) < 2e-5).any(): return # at the tolerance
        said = refusal(check_code, torch.tensor(v), K, 4)
        assert (said is None) == is_right
        if is_right and N['codes']%10 == 0: assert supernet(x, (0, 1, 2, 3), torch.tensor(v)).isfinite().all()
        if not is_right and N['codes']%10 == 0: assert refusal(supernet, x, (0, 1, 2, 3), torch.tensor(v)) == said
    check()

RIGHT = dict(K=st.integers(1, 5), codes=st.sampled_from(['simplex', 'uniform', 'vertex', 'free']), mode=st.sampled_from(['joint', 'alternate']), sampler=st.sampled_from(['uniform', 'fair']),
             epochs=st.integers(1, 999) | st.none(), passes=st.integers(1, 99), bs=st.integers(16, 900), lr=st.floats(1e-6, 1) | st.just(1), block=st.integers(0, 3),
             bf16=st.booleans(), track_bn=st.just(False), seed=st.integers(0, 2**31), channels=st.integers(0, 64), max_macs=st.floats(0, 1e9), apart=st.floats(0, 2))
INF, NAN = float('inf'), float('nan')
WRONG = dict(K=[0, -1, '4', 2.5, None, True, [4]], codes=['Simplex', '', 3, None], epochs=[0, -5, '30', 1.5], passes=[0, 'x'], bs=[0, -100, 64.], block=[-1, 4, '0'],
             space=['digit', '', 5, None, '../digits', ['digits'], 'x'*500], data=['cifar10', 'mnist', 7], widths=['wide', 3], max_macs=[-1., INF, 'many'], lr=['fast', [.1], None.__class__, 0., -.1, NAN, INF],
             warmup=[-1., 1., 5., NAN], apart=[-1.], lr_codes=[0., INF],
             bf16=['yes', 1], seed=['0', 1.5, -1], wd=['none', {}, -1., NAN], folder=[5, ['a']])

def made(**asked):
    config = Config(**asked)
    check_config(config, space_of(config))
    return config

def test_configurations():
    @examples(1500)
    @given(st.fixed_dictionaries({}, optional=RIGHT))
    def right(asked):
        N['configurations'] += 1
        config = made(**asked)
        assert all(getattr(config, k) == v for k,v in asked.items() if v is not None)
        assert Config(**json.loads(json.dumps(vars(config)))) == config # as run.json has it
    right()
    @examples(1500)
    @given(st.fixed_dictionaries({}, optional=RIGHT), st.sampled_from([(k, v) for k,vs in WRONG.items() for v in vs]))
    def wrong(asked, spoiled):
        N['configurations'] += 1
        k, v = spoiled
        said = refusal(made, **asked | {k: v})
        assert said is not None and (repr(v)[:60] in said or f'{k}={v}' in said), (spoiled, said)
        as_row = {n: o for n,o in (asked | {k: v}).items() if n not in ('K', 'seed')}
        if k not in ('K', 'seed'): assert refusal(lambda: check_config(c := split_settings(Row('', '', '', '', 1, 0, as_row))[0], space_of(c)))
    wrong()

def test_ten_thousand(record_property):
    if set(N) != {'paths', 'strings', 'codes', 'configurations'}: pytest.skip('counts what the tests above have generated')
    record_property('said', 'generated: ' + ', '.join(f'{n:,} {what}' for what,n in N.items()))
    assert sum(N.values()) >= 10_000, N

# Files of others

class Bomb:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.mkdir, (str(self.mark),)

def test_pickles_are_refused(tmp_path):
    "Whatever a pickle, a torch file, an array file or a table asks for: it is not run."
    mark, bomb = tmp_path/'was-here', Bomb(tmp_path/'was-here')
    by_opcode = [b'cos\nmkdir\n(V%s\ntR.' % str(mark).encode(), b'(S%s\nios\nmkdir\n.' % repr(str(mark)).encode(), b'(cos\nmkdir\nV%s\no.' % str(mark).encode(),
                 b'\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c%c%s\x85R.' % (len(str(mark)), str(mark).encode()), b'\x82\x01.', b'cbuiltins\neval\n(V1\ntR.',
                 b'cnumpy\nload\n(V/etc/passwd\ntR.', b'ctorch\nload\n(V/etc/passwd\ntR.', b'\x80\x04\x8e' + b'\xff'*8 + b'.', b'\x80\x04\x8c\x05numpy\x8c\x0dndarray.tofile\x93.']
    for data in [*by_opcode, *(pickle.dumps(o, protocol=p) for p in range(6) for o in (bomb, [bomb], {'data': bomb}))]:
        assert refusal(load_plain, data), data
    for zipped in (True, False):
        torch.save({'w': bomb}, tmp_path/'a.pth', _use_new_zipfile_serialization=zipped)
        assert 'asks for posix.mkdir' in refusal(load_plain, tmp_path/'a.pth')
    np.savez(tmp_path/'cifar10_part0.npz', blob=np.array([bomb], dtype=object))
    assert 'cannot be read' in refusal(read_part, tmp_path/'cifar10_part0.npz')
    meta = {b'ARROW:extension:name': b'arrow.py_extension_type', b'ARROW:extension:metadata': pickle.dumps(bomb)}
    info = dict(space='digits', source='', groups=[dict(dataset='d', split='s', epochs=1, seeds=[0], n_rows=1, n_paths=1)])
    schema = pa.schema([pa.field(c, pa.binary(), metadata=meta) for c in ('path', 'dataset', 'split', 'epochs', 'seed', 'acc')],
                       metadata={'kshot': json.dumps(info), 'pandas': json.dumps(dict(columns=[dict(name='path', pandas_type='object', numpy_type=pickle.dumps(bomb).hex(), metadata=None, field_name='path')], index_columns=[]))})
    pq.write_table(pa.Table.from_arrays([pa.array([pickle.dumps(bomb)])]*6, schema=schema), tmp_path/'t.parquet')
    assert 'lacks the column' in refusal(read_table, tmp_path/'t.parquet')
    with_error(pd.read_parquet, tmp_path/'t.parquet')
    assert not mark.exists()

def with_error(f, *args): # or without
    try: f(*args)
    except Exception: pass

def test_headers_with_nonsense(tmp_path):
    "Weights, records, studies and tables whose header or JSON is anything at all."
    fname, run = tmp_path/'a.safetensors', tmp_path/'run'
    run.mkdir()
    frame = pd.DataFrame(dict(path=['0'], dataset='d', split='s', epochs=1, seed=0, acc=.5))
    things = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda o: st.lists(o, max_size=3) | st.dictionaries(
        st.sampled_from(['w', '__metadata__', 'dtype', 'shape', 'data_offsets', 'config', 'results', 'groups', 'space', 'n_rows', 'a']), o, max_size=4), max_leaves=12)
    @examples(400)
    @given(things, st.binary(max_size=20), st.sampled_from([0, 0, 0, 1, -1, 2**40, 2**63]))
    def check(o, rest, off):
        N['headers'] += 1
        text = json.dumps(o).encode()
        fname.write_bytes(struct.pack('<Q', max(0, len(text)+off)) + text + rest)
        assert refusal(load_tensors, fname)
        (run/'run.json').write_bytes(text); (run/'study.json').write_bytes(text)
        for read in (read_run, study_rows):
            if refusal(read, run) is None: assert isinstance(o, dict if read is read_run else list) and o
        if N['headers']%8 == 0:
            table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata({'kshot': text})
            pq.write_table(table, tmp_path/'t.parquet')
            assert refusal(read_table, tmp_path/'t.parquet')
    check()

def test_a_row_stays_in_its_study(tmp_path):
    for name in ('../out', '/tmp/out', '..', 'a/b', '', 3, 'a\0b'):
        (tmp_path/'study.json').write_text(json.dumps([Row(name, 'digits', 'baseline', '', 1, 0, {})]))
        assert 'a row is called' in refusal(study_rows, tmp_path)

def _parent(pipe): # with a child that would wait for ever
    child = get_context('fork').Process(target=lambda: (end_with_parent(), pipe.send(os.getpid()), signal.pause()))
    child.start(); signal.pause()

def test_nobody_outlives_a_killed_parent():
    ours, theirs = get_context('fork').Pipe()
    parent = get_context('fork').Process(target=_parent, args=(theirs,)); parent.start()
    pid = ours.recv(); theirs.close()
    parent.kill(); parent.join()
    try: assert ours.poll(30), 'it is still there'
    except AssertionError: os.kill(pid, signal.SIGKILL); raise
    with pytest.raises(EOFError): ours.recv() # the last that held the other end is gone

# A run folder of somebody else, watched by an audit hook in a process of its own

WATCH = """
import json, os, site, sys, sysconfig
from pathlib import Path
work, home = Path(sys.argv[1]), Path(sys.argv[2])
import kshot.cli.launch, kshot.studies.study, torch
torch.set_num_threads(1)
libraries = tuple({str(Path(p).resolve()) for p in (*site.getsitepackages(), *sysconfig.get_paths().values(), Path(kshot.__file__).parent, sys.base_prefix)})
bad, allowed, inside = [], (str(work), str(home), '/dev/null', '/dev/shm/'), [True]
def hook(event, args):
    if not inside[0]: return
    name = lambda p: os.path.abspath(os.fsdecode(p)) if isinstance(p, str | bytes | os.PathLike) else ''
    ours = lambda p: not name(p) or any(name(p) == a or name(p).startswith(a.rstrip('/')+'/') for a in allowed)
    if event in ('os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'pickle.find_class', 'socket.connect', 'socket.bind', 'os.fork', 'ctypes.dlopen.path'): bad.append([event, str(args)[:200]])
    if event == 'subprocess.Popen' and 'git' not in str(args[0]) and args[0] != 'lscpu' and 'ldconfig' not in str(args): bad.append([event, str(args)[:300]])
    if event == 'exec' and not str(args[0].co_filename).startswith((*libraries, '<')): bad.append([event, args[0].co_filename])
    if event == 'open':
        path, mode, flags = args
        writes = isinstance(mode, str) and set(mode) & set('wax+') or flags & (os.O_WRONLY|os.O_RDWR|os.O_CREAT)
        if writes and not ours(path) and '__pycache__' not in name(path): bad.append([event, name(path)])
    if event in ('os.mkdir', 'os.remove', 'os.rmdir', 'os.symlink', 'os.link', 'os.truncate', 'os.chmod', 'shutil.rmtree') and not ours(args[0]) and '__pycache__' not in name(args[0]): bad.append([event, name(args[0])])
    if event == 'os.rename' and not (ours(args[0]) and ours(args[1])) and '__pycache__' not in name(args[0]): bad.append([event, name(args[1])])
sys.addaudithook(hook)
codes = []
for command,*argv in json.loads(sys.argv[3]):
    f = kshot.studies.study.study if command == 'study' else getattr(kshot.cli.launch, command)
    try: f(argv); codes.append(0)
    except SystemExit as e: codes.append(e.code)
inside[0] = False
strange = [m for m,v in sys.modules.items() if str(getattr(v, '__file__', None) or '').startswith(str(work))]
print(json.dumps(dict(codes=codes, bad=bad, strange=strange)))
"""

def watched(tmp_path, *commands, cwd=None):
    "What commands have done that they should not."
    home, elsewhere = tmp_path/'home', tmp_path/'cwd'
    for f in (home, elsewhere): f.mkdir(exist_ok=True)
    env = {k: v for k,v in os.environ.items() if k not in ('KSHOT_HOME', 'XDG_CACHE_HOME')}
    env |= dict(HOME=str(home), TMPDIR=str(home), OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    p = subprocess.run([sys.executable, '-c', WATCH, tmp_path/'runs', home, json.dumps([[str(a) for a in c] for c in commands])], cwd=elsewhere, env=env, capture_output=True, text=True, timeout=400)
    assert p.returncode == 0, p.stderr[-3000:]
    assert not any(elsewhere.iterdir())
    return json.loads(p.stdout.splitlines()[-1]), p.stderr, home

QUICK = '--K 2 --epochs 2 --passes 2 --bs 200 --channels 4'.split()
SCRIPT = '<img src=x onerror=alert(1)>' # also a name for a folder

@pytest.fixture(scope='module')
def worked(tmp_path_factory):
    "A folder in which all commands have worked, watched."
    tmp = tmp_path_factory.mktemp('watched')
    (tmp/'study.toml').write_text('K=[1]\nseeds=1\n[digits]\nepochs=1\npasses=1\nchannels=4\nn_paths=20\nvary.sampler=["fair"]')
    to = ['--runs', tmp/'runs', '--name', 'run']
    found, err, home = watched(tmp, ['train', *to, *QUICK], ['rank', *to, '--n_paths', 20], ['search', *to, '--n_paths', 5, '--algorithm', 'random'],
                               ['retrain', *to, '--epochs', 1], ['study', tmp/'study.toml', '--runs', tmp/'runs', '--name', 'study', '--workers', 1])
    return tmp, found, err, home

def test_nothing_is_written_elsewhere(worked):
    tmp, found, err, home = worked
    assert found['codes'] == [0]*5, err[-2000:]
    assert found['bad'] == [] and found['strange'] == []
    left = [str(f.relative_to(home)) for f in home.rglob('*') if f.is_file()]
    assert not [f for f in left if f.split('/')[0] not in ('.kshot', '.cache', '.config')], left # of kshot and of matplotlib
    assert {'run', 'study'} == {f.name for f in (tmp/'runs').iterdir()}

def test_a_hostile_run(worked, tmp_path):
    "Nothing in a folder is executed, no name of it gets into the page as HTML, and what cannot be is refused in a line."
    tmp, *_ = worked
    shutil.copytree(tmp/'runs'/'run', run := tmp_path/'runs'/SCRIPT)
    for name in ('__init__.py', 'sitecustomize.py', 'kshot.py', 'torch.py', 'conftest.py', 'pandas.py'): (run/name).write_text("import os; os.system('touch was-here')")
    (run/'checkpoint'/'epoch_99999.pth').write_bytes(pickle.dumps(Bomb(tmp_path/'runs'/'was-here')))
    record = json.loads((run/'run.json').read_text())
    record['results'][SCRIPT] = record['versions'][SCRIPT] = {SCRIPT: SCRIPT}
    record['results']['search']['algorithm'] = SCRIPT
    (run/'run.json').write_text(json.dumps(record))
    log = [json.loads(l) for l in (run/'log.jsonl').read_text().splitlines()]
    (run/'log.jsonl').write_text(''.join(json.dumps(r | {SCRIPT: 1., 'name': SCRIPT})+'\n' for r in log))
    (run/'subnet.json').write_text(json.dumps(json.loads((run/'subnet.json').read_text()) | {'space': '../../x', SCRIPT: SCRIPT}))
    (run/'report.html').unlink()
    wrong = {}
    for i,(where,what) in enumerate([('config', dict(folder=SCRIPT)), ('config', dict(space='../../x')), ('config', dict(K=[1])), ('config', {SCRIPT: 1}), ('results', dict(train=3))]):
        shutil.copytree(tmp/'runs'/'run', tmp_path/'runs'/f'wrong{i}')
        wrong[f'wrong{i}'] = record | {where: record[where] | what}
        (tmp_path/'runs'/f'wrong{i}'/'run.json').write_text(json.dumps(wrong[f'wrong{i}']))
    to = ['--runs', tmp_path/'runs', '--name', SCRIPT]
    found, err, _ = watched(tmp_path, ['rank', *to, '--n_paths', 20, *QUICK], ['search', *to, '--n_paths', 6, '--algorithm', 'random'], ['export', *to],
                            *(['search', '--runs', tmp_path/'runs', '--name', k, '--n_paths', 6] for k in wrong))
    assert found['codes'] == [0, 0] + [2]*6 and 'Traceback' not in err, err[-3000:]
    assert found['bad'] == [] and found['strange'] == [] and not [*tmp_path.rglob('was-here')]
    page = (run/'report.html').read_text()
    assert SCRIPT not in page and '<img src=x' not in page and '&lt;img src=x onerror=alert(1)>'.replace('>', '&gt;') in page

@pytest.mark.parametrize('n', [pytest.param(1, id='one'), pytest.param(2, id='all', marks=pytest.mark.slow)])
def test_disturbed(n, tmp_path):
    "The harness itself: killed work ends as undisturbed work, and so on; `reliability.py` has the rest."
    out, args = tmp_path/'out.json', ['train', '--n', '2', '--trouble', 'second', 'readonly'] if n == 1 else ['--n', '2']
    p = subprocess.run([sys.executable, HERE/'reliability.py', *args, '--out', out], capture_output=True, text=True, timeout=580, env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore'))
    assert p.returncode == 0, p.stderr[-3000:]
    rows = json.loads(out.read_text())['rows']
    assert len(rows) >= (3 if n == 1 else 15) and all(r['n'] == r['ok'] > 0 for r in rows), rows
