"What strangers pass in: ten thousand paths, strings, codes and configurations, most of them wrong"
import json, linecache, math, os, subprocess, sys, traceback
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from conftest import ROOT
from kshot.benchmark import BENCHMARKS, get_space
from kshot.config import Config, check_config, space_of
from kshot.nb101 import NB101_EDGES
from kshot.networks import digits_net
from kshot.studies.grid import Row, split_settings
from kshot.supernet import Supernet, check_code

N = Counter() # what was generated

def examples(n): return settings(max_examples=n, derandomize=True, deadline=None, database=None)

def refusal(f, *args, **kwargs):
    "Return the message of an error that the package raises on purpose; None if there is none."
    try: f(*args, **kwargs)
    except (ValueError, TypeError) as e:
        inner = traceback.extract_tb(e.__traceback__)[-1]
        line = linecache.getline(inner.filename, inner.lineno)
        is_ours = '/kshot/' in inner.filename and ('raise' in line or 'operator.index' in line)
        assert is_ours, f'by accident: {e!r} in {inner.filename}:{inner.lineno}: {line}'
        assert len(str(e).splitlines()) == 1 and len(str(e)) < 2000, e
        return str(e)

SPACES = {name: get_space(name) for name in BENCHMARKS}
SPACES['widths'] = get_space('mobilenet_se', (.2, .5, 1.))
SPACES['width'] = get_space('mobilenet', (.5, 1.), 'path')
each_space = pytest.mark.parametrize('name', SPACES)

# Paths

def living(path):
    "Count the edges of a NAS-Bench-101 cell on a way from input to output, by powers of its matrix."
    m = np.zeros((7, 7), int)
    for (i,j),e in zip(NB101_EDGES, path): m[i,j] = e
    reach = np.linalg.matrix_power(np.eye(7, dtype=int) + m, 7) > 0
    alive = reach[0] & reach[:,6]
    return int(m[np.ix_(alive, alive)].sum()) if reach[0,6] else 0

def is_path(name, space, path):
    "Say from the blocks of a space whether a path is one of its paths."
    if not all(isinstance(o, int) for o in path) or len(path) != len(space.sizes): return False
    if not all(0 <= o < n for o,n in zip(path, space.sizes)): return False
    if name == 'nb101': return 0 < living(path) <= 9
    return any(path[32:36]) and any(path[36:]) if name == 'nds' else True

def right_paths(space): return st.tuples(*(st.integers(0, n-1) for n in space.sizes))

@st.composite
def spoiled_paths(draw, space):
    "Draw a path with one value replaced."
    path = draw(right_paths(space))
    l = draw(st.integers(0, len(path)-1))
    odd = st.sampled_from([True, 1.5, '1', None, 10**30, (0,), math.nan])
    return path[:l] + (draw(st.integers(-2, 15) | odd),) + path[l+1:]

@st.composite
def thin_paths(draw, space):
    "Draw a path in which at least ten values are 0."
    zeros = draw(st.sets(st.integers(0, len(space.sizes)-1), min_size=10))
    return tuple(0 if l in zeros else o for l,o in enumerate(draw(right_paths(space))))

def any_paths(space):
    odd = st.lists(st.integers(-1, 7), max_size=45).map(tuple)
    paths = right_paths(space) | spoiled_paths(space) | odd
    return paths | thin_paths(space) if len(space.sizes) > 20 else paths

@each_space
def test_paths(name):
    space = SPACES[name]
    @examples(250)
    @given(any_paths(space))
    def check(path):
        N['paths'] += 1
        if not is_path(name, space, path):
            assert refusal(space.check, path)
            return
        assert space.check(path) == path == space.parse(space.format(path)) == space.at(space.index(path))
        again = space.parse(space.native(path))
        assert space.native(again) == space.native(path)
        assert again == path or name == 'nb101' # whose strings leave out what is dead
    check()

# Strings

PIECES = ['~', '|', '-', ',', '[', '((', '٣', '²', 'range(0, 9)', "'none'", '9'*5000, '1e999', 'NaN',
          '\n', '\0', '**x', '{}']

@st.composite
def strings(draw, text):
    "Draw a string with a piece put in, replaced, cut off, or alone; `text` itself is the first kind."
    at = draw(st.integers(0, len(text)))
    piece = draw(st.text(max_size=6) | st.sampled_from(PIECES))
    start, end = text[:at], text[at:]
    kinds = [text, start+piece+end, start+end[len(piece):], start+piece, piece, f' {text} ']
    kind = draw(st.integers(0, len(kinds)-1))
    return kinds[kind], kind == 0

@each_space
def test_strings(name):
    space = SPACES[name]
    @examples(250)
    @given(st.data())
    def check(data):
        N['strings'] += 1
        path = data.draw(right_paths(space))
        if name == 'nds' and not is_path(name, space, path): path = (0,)*32 + (1,)*8
        text = '[[[0,1,1],[0,0,1],[0,0,0]],["input","maxpool3x3","output"]]'
        if name != 'nb101': text = space.native(path)
        s, is_right = data.draw(strings(text))
        message = refusal(space.parse, s)
        if message is not None:
            assert not is_right, message
            return
        p = space.parse(s) # it means a path, whose string means the same
        assert is_path(name, space, p) and space.native(space.parse(space.native(p))) == space.native(p)
    check()

def nested(leaves, *more):
    "Draw values in lists and whatever `more` makes of values."
    def extend(o): return st.one_of(st.lists(o, max_size=6), *(make(o) for make in more))
    return st.recursive(st.none() | st.booleans() | leaves, extend, max_leaves=12)

def test_genotypes_with_nonsense():
    space = get_space('nds')
    words = st.integers(-3, 9) | st.sampled_from(['sep_conv_3x3', 'x', 1.5, 2j, b'a'])
    things = nested(words, lambda o: st.tuples(o, o), lambda o: st.sets(st.integers(0, 5)))
    edge = st.tuples(st.sampled_from(['none', 'sep_conv_3x3']), st.integers(0, 1))
    edges = st.lists(edge, min_size=8, max_size=8)
    @examples(500)
    @given(things | edges, things | st.lists(st.integers(2, 5)), things | st.just([('none', 0)]*8))
    def check(a, concat, b):
        N['strings'] += 1
        s = f'Genotype(normal={a}, normal_concat={concat}, reduce={b}, reduce_concat=[2])'
        if refusal(space.parse, s) is None: assert is_path('nds', space, space.parse(s))
    check()

def squares(n):
    row = st.lists(st.integers(0, 1), min_size=n, max_size=n)
    return st.lists(row, min_size=n, max_size=n)

def test_cells_with_nonsense():
    space = get_space('nb101')
    words = st.integers(-2, 10**30) | st.floats() | st.sampled_from(['input', 'output', 'maxpool3x3'])
    things = nested(words, lambda o: st.dictionaries(st.text(max_size=2), o, max_size=2))
    cells = st.lists(st.just('maxpool3x3'), max_size=5).map(lambda ops: ['input', *ops, 'output'])
    @examples(500)
    @given(things | st.integers(2, 7).flatmap(squares), things | cells)
    def check(matrix, ops):
        N['strings'] += 1
        s = json.dumps([matrix, ops])
        if refusal(space.parse, s) is None: assert is_path('nb101', space, space.parse(s))
    check()

# Codes

def test_codes():
    "Compare what is said of simplex codes of K supernets over L blocks with numpy's arithmetic."
    torch.manual_seed(0)
    K = 3
    x = torch.randn(2, 1, 8, 8)
    supernet = Supernet(digits_net(channels=4), K)
    number = st.floats(0, 1) | st.sampled_from([0., 1., 1/3, -1e-3, 1.001, math.nan, math.inf, 1e300])
    @examples(2000)
    @given(st.lists(number, min_size=1, max_size=13), st.booleans(), st.booleans())
    def check(values, is_normed, per_block):
        N['codes'] += 1
        with np.errstate(all='ignore'):
            v = np.array(values, np.float32)
            if is_normed: v = (v/v.sum()).astype(np.float32)
        if per_block and len(v)%4 == 0: v = v.reshape(4, -1)
        fits, away = v.shape in ((K,), (4, K)), abs(v.sum(-1)-1)
        if fits and (abs(away - 1e-4) < 2e-5).any(): return # at the tolerance
        is_right = fits and bool((v >= 0).all() and (away < 9e-5).all())
        message = refusal(check_code, torch.tensor(v), K, 4)
        assert (message is None) == is_right
        if N['codes']%10: return
        if is_right: assert supernet(x, (0, 1, 2, 3), torch.tensor(v)).isfinite().all()
        else: assert refusal(supernet, x, (0, 1, 2, 3), torch.tensor(v)) == message
    check()

# Configurations

INF = float('inf')
NAN = float('nan')
RIGHT = dict(
    K=st.integers(1, 5),
    codes=st.sampled_from(['simplex', 'uniform', 'vertex', 'free']),
    mode=st.sampled_from(['joint', 'alternate']),
    sampler=st.sampled_from(['uniform', 'fair']),
    epochs=st.integers(1, 999) | st.none(),
    passes=st.integers(1, 99),
    bs=st.integers(16, 900),
    lr=st.floats(1e-6, 1) | st.just(1),
    block=st.integers(0, 3),
    bf16=st.booleans(),
    track_bn=st.just(False),
    seed=st.integers(0, 2**31),
    channels=st.integers(1, 64) | st.none(),
    max_macs=st.floats(0, 1e9),
    branch=st.sampled_from(['', '0', '0.5']))
WRONG = dict(
    K=[0, -1, '4', 2.5, None, True, [4]],
    codes=['Simplex', '', 3, None],
    epochs=[0, -5, '30', 1.5],
    passes=[0, 'x'],
    bs=[0, -100, 64.],
    channels=[0, -3, 2.5],
    block=[-1, 4, '0'],
    space=['digit', '', 5, None, '../digits', ['digits'], 'x'*500],
    data=['cifar10', 'mnist', 7],
    widths=['wide', 3],
    max_macs=[-1., INF, 'many'],
    lr=['fast', [.1], None.__class__, 0., -.1, NAN, INF],
    warmup=[-1., 1., 5., NAN],
    branch=['half', '1', '-0.5', '0.5 0.2', 'nan', .5],
    restart=[-1., INF],
    lr_codes=[0., INF],
    bf16=['yes', 1],
    seed=['0', 1.5, -1],
    wd=['none', {}, -1., NAN],
    folder=[5, ['a']])
WRONG_PAIRS = [(name, value) for name,values in WRONG.items() for value in values]

def make(**options):
    config = Config(**options)
    check_config(config, space_of(config))
    return config

def make_row(options):
    "Check options as a row of a study would."
    config, _ = split_settings(Row('', '', '', '', 1, 0, options))
    check_config(config, space_of(config))

def test_right_configurations():
    @examples(1500)
    @given(st.fixed_dictionaries({}, optional=RIGHT))
    def check(options):
        N['configurations'] += 1
        config = make(**options)
        assert all(getattr(config, k) == v for k,v in options.items() if v is not None)
        assert Config(**json.loads(json.dumps(vars(config)))) == config # as run.json has it
    check()

def test_wrong_configurations():
    @examples(1500)
    @given(st.fixed_dictionaries({}, optional=RIGHT), st.sampled_from(WRONG_PAIRS))
    def check(options, pair):
        N['configurations'] += 1
        name, value = pair
        options = options | {name: value}
        message = refusal(make, **options)
        assert message is not None, pair
        assert repr(value)[:60] in message or f'{name}={value}' in message, (pair, message)
        if name in ('K', 'seed'): return
        assert refusal(make_row, {k: v for k,v in options.items() if k not in ('K', 'seed')})
    check()

def test_ten_thousand(record_property):
    if set(N) != {'paths', 'strings', 'codes', 'configurations'}:
        pytest.skip('counts what the tests above have generated')
    record_property('said', 'generated: ' + ', '.join(f'{n:,} {what}' for what,n in N.items()))
    assert sum(N.values()) >= 10_000, N

# Disturbed work

@pytest.mark.parametrize('which', ['few', pytest.param('all', marks=pytest.mark.slow)])
def test_disturbed(which, tmp_path):
    "Disturbed work ends as undisturbed work, as `tools/reliability.py` measures it at length."
    out = tmp_path/'out.json'
    args = ['--n', '2', '--out', out]
    if which == 'few': args = ['train', '--trouble', 'second', 'readonly', *args]
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    argv = [sys.executable, ROOT/'tools'/'reliability.py', *args]
    p = subprocess.run(argv, capture_output=True, text=True, timeout=580, env=env)
    assert p.returncode == 0, p.stderr[-3000:]
    rows = json.loads(out.read_text())['rows']
    assert len(rows) >= (3 if which == 'few' else 15)
    assert all(r['n'] == r['ok'] > 0 for r in rows), rows
