"The house rules that a machine can hold: rooms, imports, notebooks, export in sync"
import ast, json, os, re, subprocess, sys
from collections import Counter
from functools import cache
from itertools import takewhile
from pathlib import Path
from statistics import median

import pytest
import yaml
from conftest import ROOT, copy_tree
from nbdev.doclinks import nbglob

NBS, LIB = ROOT/'nbs', ROOT/'kshot'
MAX_LINES, MEDIAN_LINES, MAX_WIDTH = 45, 18, 140 # lines of an export cell, characters of a line
INDEX = 'figures.__init__' # names from other rooms, none of its own
def dotted(path): return '.'.join((*path.parent.parts, path.stem))
def room_of(fname): # of a notebook: its module
    parts = fname.relative_to(NBS).with_suffix('').parts
    return '.'.join([*parts[:-1], parts[-1].partition('_')[2]])
ROOMS = {room_of(p): p for p in sorted(NBS.rglob('[0-9]*.ipynb'))} # module -> its notebook
ROOMS[INDEX] = ROOMS.pop('figures.index')
# where a wing stands among the flat rooms: what is on its left it may import
WINGS = dict(base=(), nets=(10,), datasets=(12,), figures=(91,), lab=(92,), cli=(93,), studies=(94,))
PLACE = {room: (*WINGS.get(room.split('.')[0] if '.' in room else '', ()), int(p.stem.split('_')[0])) for room,p in ROOMS.items()}
PLACE |= {room: (-1, *place) for room,place in PLACE.items() if room.startswith('base.')}
PAGES = sorted(p for p in NBS.rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(NBS).parts))
MODULES = sorted([LIB/'figures'/'__init__.py', *(p for p in LIB.rglob('*.py') if p.name[0] != '_')])
def module_of(fname): return dotted(fname.relative_to(LIB))

nb_name = lambda p: str(p.relative_to(NBS))
each_room = pytest.mark.parametrize('room', ROOMS)
each_module = pytest.mark.parametrize('module', MODULES, ids=module_of)

def cells(
    fname:Path,      # notebook
    kind:str='code', # type of the cells
) -> list[str]:
    "Sources of a notebook's cells of one kind."
    return [''.join(c['source']) for c in json.loads(fname.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]

def directives(
    src:str, # source of a code cell
) -> list[str]:
    "Names of the directives that open a cell."
    return [w[0] for l in takewhile(lambda l: re.match(r'\s*#\s*\|', l), src.splitlines()) if (w := l.split('|', 1)[1].replace(':', ' ').split())]

def exported(
    fname:Path, # notebook
) -> list[str]:
    "Code of the cells that a notebook exports, without directives and blank lines."
    found = [c for c in cells(fname) if {'export', 'exporti', 'exports'} & set(directives(c))]
    return ['\n'.join(l for l in c.splitlines() if l.strip() and not re.match(r'\s*#\s*\|', l)) for c in found]

def imports(
    fname:Path, # module
) -> set[str]:
    "Modules of the package that a module imports anywhere, inside functions too."
    tree, out = ast.parse(fname.read_text(encoding='utf-8')), set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = ['kshot', *fname.relative_to(LIB).parent.parts][:1 - n.level or None] if n.level else []
            base = '.'.join([*base, *filter(None, [n.module])])
            names = [base, *(f'{base}.{a.name}' for a in n.names)]
        else: continue
        out |= {o.removeprefix('kshot.') for o in names}
    return out & {*ROOMS}

def test_a_room_for_every_module():
    assert sorted(ROOMS) == sorted(map(module_of, MODULES))
    assert Counter(PLACE.values()).most_common(1)[0][1] == 1, 'two rooms have one number'

def test_only_modules_and_data_in_the_package():
    found = {p.relative_to(LIB) for p in LIB.rglob('*') if p.is_file() and not {'__pycache__', 'benchmarks'} & {*p.parts}}
    inits = {Path(wing, '__init__.py') for wing in ('', *WINGS)}
    assert found == {Path('_modidx.py'), Path('py.typed')} | inits | {m.relative_to(LIB) for m in MODULES}
    for init in inits - {Path('__init__.py'), Path('figures/__init__.py')}: assert not (LIB/init).read_text().strip()
    init = ast.parse((LIB/'__init__.py').read_text())
    assert [t.id for n in init.body for t in n.targets] == ['__version__']

@each_room
def test_notebook_begins_as_all_do(room):
    code, (title,*_) = cells(ROOMS[room]), cells(ROOMS[room], 'markdown')
    assert code[0].strip() == f'#| default_exp {room}'
    assert re.match(r'# .+\n\n> .+', title)
    first = exported(ROOMS[room])[0]
    assert all(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.parse(first).body), 'the first export cell is for imports'

@each_module
def test_imports_go_down(module):
    name = module_of(module)
    up = sorted(o for o in imports(module) if PLACE[o] >= PLACE[name])
    assert not up, f'{name} {PLACE[name]} imports {up}'

@each_module
def test_no_star_import(module):
    stars = [n.lineno for n in ast.walk(ast.parse(module.read_text())) if isinstance(n, ast.ImportFrom) and n.names[0].name == '*']
    assert not stars, f'line {stars}'

@each_room
def test_export_cells_are_short(room):
    lines = [c.splitlines() for c in exported(ROOMS[room])]
    long, wide = [c[0] for c in lines if len(c) > MAX_LINES], [l for c in lines for l in c if len(l) > MAX_WIDTH]
    assert not long and not wide

MAX_ROOM = 500 # exported lines of a room
LONG_ROOMS = {} # room -> why it has more
PAST = dict(arch='path', archs='paths', genotype='path', cand='op', cands='ops', flops='macs', n_flops='macs', num_params='n_params', ckpt='checkpoint',
            filename='fname', filepath='fname', cfg='config', val_acc='acc_valid', test_acc='acc_alone') # word that is not used -> the one that is
FOREIGN = {'spaces': {'genotype'}, 'datasets.importers': {*PAST}, 'record': {'arch'}} # benchmarks in their own words; the architecture of a machine
IS_TEST = lambda c: not {'export', 'exporti', 'exports'} & set(directives(c))

def test_rooms_are_not_long():
    long = {room: n for room,p in ROOMS.items() if (n := sum(len(c.splitlines()) for c in exported(p))) > MAX_ROOM}
    assert long.keys() == LONG_ROOMS.keys(), long # no reason outlives its room

@cache
def definitions(
    module:Path, # of the package
) -> dict:       # name -> the classes, functions and assignments at its top; a patched method is part of its class
    "What a module defines."
    out = {}
    for n in ast.parse(module.read_text(encoding='utf-8')).body:
        if isinstance(n, ast.Assign): names = [t.id for o in n.targets for t in ast.walk(o) if isinstance(t, ast.Name)]
        elif not isinstance(n, ast.FunctionDef | ast.ClassDef): continue
        elif any('patch' in ast.unparse(d) for d in n.decorator_list): names = [ast.unparse(n.args.args[0].annotation)]
        else: names = [n.name]
        for name in names: out.setdefault(name, []).append(n)
    return out

def public(defined:dict) -> list[str]: # an index only names what other rooms define
    return [name for name in ast.literal_eval(defined['__all__'][0].value) if name in defined]

@each_module
def test_public_names_are_documented(module):
    lines, bare, defined = module.read_text(encoding='utf-8').splitlines(), [], definitions(module)
    for name in public(defined):
        n = defined[name][0]
        if isinstance(n, ast.Assign): continue
        if not ast.get_docstring(n): bare.append(name)
        f = n if isinstance(n, ast.FunctionDef) else next((f for f in n.body if getattr(f, 'name', '') == '__init__'), None)
        if not f or lines[f.lineno-1].rstrip()[-1] != '(': continue # on one line: what is not plain by itself is in the sentence
        args, told = [a for a in (*f.args.posonlyargs, *f.args.args, f.args.vararg, *f.args.kwonlyargs) if a and a.arg != 'self'], ''
        for a in args:
            line = lines[a.lineno-1]
            if '# ' in line: told = line
            elif not re.search('so are the|as there', told): bare.append(f'{name}({a.arg})')
    assert not bare

@cache
def uses() -> tuple[set, dict]:
    "Words of all tests; public name -> where it stands outside of its definition, the names of definitions among it."
    words = lambda text: set(re.findall(r'\w+', text))
    tests = words('\n'.join([c for p in ROOMS.values() for c in cells(p) if IS_TEST(c)]+[p.read_text() for p in (ROOT/'tests').rglob('test_*.py')]))
    texts = {str(p): words('\n'.join(cells(p))) for p in PAGES if p not in ROOMS.values()}
    texts |= {f: words((ROOT/f).read_text(encoding='utf-8')) for f in ('README.md', 'settings.ini')} | {'tests': tests}
    for m in MODULES: texts |= {f'{module_of(m)}:{k}': words('\n'.join(map(ast.unparse, ns))) for k,ns in definitions(m).items() if k != '__all__'}
    names = {(module_of(m), name) for m in MODULES for name in public(definitions(m))}
    return tests, {(m, name): {k for k,ws in texts.items() if name in ws and k != f'{m}:{name}'} for m,name in names}

@each_module
def test_public_names_are_used_and_tested(module):
    (tests, found), names = uses(), public(definitions(module))
    by_test = lambda where: where == 'tests' or where.partition(':')[2] in tests # itself, or one step away
    assert not [n for n in names if not found[module_of(module), n]], 'nobody uses them'
    untested = [n for n in names if not any(map(by_test, found[module_of(module), n])) and not isinstance(definitions(module)[n][0], ast.Assign)]
    assert not untested, 'no test names them, nor what uses them'

@each_room
def test_one_word_per_thing(room):
    names = {w for c in exported(ROOMS[room]) for n in ast.walk(ast.parse(c)) for k in ('id', 'arg', 'attr', 'name') if (w := getattr(n, k, None))}
    prose = set(re.findall(r'\w+', re.sub(r'`[^`]*`|https?:\S+', '', '\n'.join(cells(ROOMS[room], 'markdown')))))
    said = (names | prose) & (PAST.keys() - FOREIGN.get(room, set()))
    assert not said, {w: PAST[w] for w in said}

def test_most_export_cells_are_very_short():
    assert median(len(c.splitlines()) for p in ROOMS.values() for c in exported(p)) <= MEDIAN_LINES

@each_room
def test_api_notebook_has_no_output(room):
    nb = json.loads(ROOMS[room].read_text(encoding='utf-8'))
    assert not [c['id'] for c in nb['cells'] if c.get('outputs') or c.get('execution_count')]

@pytest.mark.parametrize('fname', [p for p in PAGES if p not in ROOMS.values()], ids=nb_name)
def test_tutorial_is_light(fname): assert fname.stat().st_size < 300_000

def test_one_quarto_yml():
    assert [p for p in (ROOT/'_quarto.yml', NBS/'_quarto.yml') if not p.is_symlink()] == [ROOT/'_quarto.yml']
    assert os.readlink(NBS/'_quarto.yml') == '../_quarto.yml'

def test_sidebar_names_every_notebook_in_order():
    def files(o):
        if isinstance(o, str): return [o]
        return [f for x in (o if isinstance(o, list) else o.get('contents', [])) for f in files(x)]
    named = files(yaml.safe_load((ROOT/'_quarto.yml').read_text())['website']['sidebar']['contents'])
    assert sorted(named) == sorted(map(nb_name, PAGES))
    rooms = [f for f in named if f[0].isdigit()]
    assert rooms == sorted(rooms)
    for wing in WINGS:
        rooms = [f for f in named if f.startswith(f'{wing}/')]
        assert rooms == sorted(rooms)

def test_export_is_in_sync(tmp_path):
    tree = copy_tree(tmp_path/'tree')
    for p in (tree/'kshot').rglob('*.py'):
        if p.name != '__init__.py': p.unlink()
    env = {k:v for k,v in os.environ.items() if k != 'IN_TEST'} # with it nbdev_export does nothing
    subprocess.run([Path(sys.executable).with_name('nbdev_export')], cwd=tree, env=env, check=True)
    text = lambda root: {p.relative_to(root): p.read_text(encoding='utf-8') for p in (root/'kshot').rglob('*.py')}
    stale = {n for n,_ in text(tree).items() ^ text(ROOT).items()}
    assert not stale, 'run `nbdev_export`'

def test_nbdev_test_finds_every_notebook(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert sorted(map(Path.absolute, nbglob(as_path=True))) == PAGES
    assert not list(NBS.rglob('.notest'))

def test_notebooks_passed():
    log = os.environ.get('NOTEBOOKS_LOG')
    if not log: pytest.skip('`make test` runs the notebooks and hands their log over')
    lines = (ROOT/log).read_text().splitlines()
    failed = [l.strip() for l in lines if l.startswith('\t')]
    assert not failed
    assert 'Success.' in lines and 'No files were eligible for testing' not in lines # without files it ends well and tests nothing
