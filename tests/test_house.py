"The house rules that a machine can hold: rooms, imports, notebooks, density, export in sync"
import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import takewhile
from pathlib import Path
from statistics import median

import density
import pytest
import yaml
from conftest import ROOT, copy_tree
from execnb.nbio import nb2str, read_nb
from nbdev.clean import clean_nb
from nbdev.doclinks import nbglob

NBS = ROOT/'nbs'
LIB = ROOT/'kshot'
SCRIPTS = sorted([ROOT/'setup.py', *(ROOT/'tests').rglob('*.py'), *(ROOT/'tools').glob('*.py')])
MAX_CELL = 45    # lines of an exported cell
MEDIAN_CELL = 22 # half of them are shorter
MAX_ROOM = 500   # exported lines of a room

# rooms and modules

INDEX = 'figures.__init__' # names from other rooms, none of its own
# a wing stands beside the flat room of that number: it imports what is on its left
WINGS = dict(base=-1, nets=10, datasets=12, figures=91, lab=92, cli=93, studies=94)

def room_of(
    fname:Path, # notebook
) -> str:
    "Return the module that a notebook exports: `nets/10_ops.ipynb` is `nets.ops`."
    *wing, name = fname.relative_to(NBS).with_suffix('').parts
    return '.'.join([*wing, name.partition('_')[2]])

def module_of(
    fname:Path, # Python file
) -> str:
    "Return a module's name inside the package."
    return '.'.join(fname.relative_to(LIB).with_suffix('').parts)

def place_of(
    room:str, # its module
) -> tuple[int, int]:
    "Return where a room stands: it may import what stands before it."
    wing, _, name = room.rpartition('.')
    number = int(ROOMS[room].stem.partition('_')[0])
    return (WINGS[wing], number) if wing else (number, 0)

ROOMS = {room_of(p): p for p in sorted(NBS.rglob('[0-9]*.ipynb'))} # module -> its notebook
ROOMS[INDEX] = ROOMS.pop('figures.index')
MODULES = sorted([LIB/'figures'/'__init__.py', LIB/'__main__.py',
                  *(p for p in LIB.rglob('*.py') if p.name[0] != '_')])

def is_hidden(fname:Path) -> bool: return any(part[0] in '._' for part in fname.relative_to(NBS).parts)

NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if not is_hidden(p))
PAGES = [p for p in NOTEBOOKS if p not in ROOMS.values()]

def name_of(fname:Path) -> str: return str(fname.relative_to(NBS))

each_room = pytest.mark.parametrize('room', ROOMS)
each_module = pytest.mark.parametrize('module', MODULES, ids=module_of)
each_page = pytest.mark.parametrize('page', PAGES, ids=name_of)

# what is in them

def cells(
    fname:Path,      # notebook
    kind:str='code', # type of the cells
) -> list[str]:
    "Return the sources of a notebook's cells of one kind."
    found = json.loads(fname.read_text(encoding='utf-8'))['cells']
    return [''.join(cell['source']) for cell in found if cell['cell_type'] == kind]

def is_directive(line:str) -> bool: return re.match(r'\s*#\s*\|', line) is not None

def directives(
    source:str, # of a code cell
) -> list[str]:
    "Return the names of the directives that open a cell."
    lines = [line.split('|', 1)[1] for line in takewhile(is_directive, source.splitlines())]
    words = [line.replace(':', ' ').split() for line in lines]
    return [first for first,*_ in filter(None, words)]

def is_exported(source:str) -> bool: return bool({'export', 'exporti', 'exports'} & {*directives(source)})

def code_of(source:str) -> str:
    "Return a cell's source without directives and blank lines."
    return '\n'.join(line for line in source.splitlines() if line.strip() and not is_directive(line))

@cache
def exported(
    fname:Path, # notebook
) -> list[str]:
    "Return the code of the cells that a notebook exports."
    return [code_of(source) for source in cells(fname) if is_exported(source)]

def imports(
    fname:Path, # module
) -> set[str]:
    "Return the modules of the package that a module imports anywhere, also inside functions."
    wing = ['kshot', *fname.relative_to(LIB).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(fname.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            above = wing[:len(wing) - node.level + 1] if node.level else []
            base = '.'.join([*above, *filter(None, [node.module])])
            names |= {base, *(f'{base}.{alias.name}' for alias in node.names)}
    return {name.removeprefix('kshot.') for name in names} & {*ROOMS}

# the house

def test_a_room_for_every_module():
    assert sorted(ROOMS) == sorted(map(module_of, MODULES))
    assert Counter(map(place_of, ROOMS)).most_common(1)[0][1] == 1, 'two rooms have one number'

def test_only_modules_and_data_in_the_package():
    files = {p.relative_to(LIB) for p in LIB.rglob('*') if p.is_file()}
    found = {p for p in files if not {'__pycache__', 'benchmarks'} & {*p.parts}}
    inits = {Path(wing, '__init__.py') for wing in ('', *WINGS)}
    assert found == {Path('_modidx.py'), Path('py.typed'), *inits, *(m.relative_to(LIB) for m in MODULES)}
    empty = inits - {Path('__init__.py'), Path('figures', '__init__.py')}
    assert not [init for init in empty if (LIB/init).read_text().strip()]
    body = ast.parse((LIB/'__init__.py').read_text()).body
    assert [ast.unparse(node.targets) for node in body] == ['__version__']

@each_room
def test_notebook_begins_as_all_do(room):
    code = cells(ROOMS[room])
    title = cells(ROOMS[room], 'markdown')[0]
    assert code[0].strip() == f'#| default_exp {room}'
    assert re.match(r'# .+\n\n> .+', title)
    body = ast.parse(exported(ROOMS[room])[0]).body
    is_import = [isinstance(node, ast.Import | ast.ImportFrom) for node in body]
    assert all(is_import), 'the first exported cell is for imports'

@each_module
def test_imports_go_down(module):
    place = place_of(module_of(module))
    up = sorted(room for room in imports(module) if place_of(room) >= place)
    assert not up, f'{module_of(module)} {place} imports {up}'

@each_module
def test_no_star_import(module):
    nodes = ast.walk(ast.parse(module.read_text()))
    stars = [node.lineno for node in nodes if isinstance(node, ast.ImportFrom) and node.names[0].name == '*']
    assert not stars, f'line {stars}'

@each_room
def test_api_notebook_has_no_output(room):
    found = json.loads(ROOMS[room].read_text(encoding='utf-8'))['cells']
    assert not [cell['id'] for cell in found if cell.get('outputs') or cell.get('execution_count')]

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=name_of)
def test_notebook_is_clean(notebook):
    nb = read_nb(notebook)
    clean_nb(nb)
    advice = 'run nbdev_clean; if that changes nothing, write it with write_nb'
    assert nb2str(nb) == notebook.read_text(encoding='utf-8'), advice

@each_page
def test_page_is_light(page): assert page.stat().st_size < 300_000

# density

def test_one_thought_a_line():
    counts = density.figures(ROOT)
    limits = {'lines over 110': 0, 'characters, 90th percentile': 90, 'lambdas with a name': 0,
              'lines with two statements': 0}
    over = {name: counts[name] for name,limit in limits.items() if counts[name] > limit}
    assert not over, '`python tools/density.py` shows all figures'

@pytest.mark.parametrize('fname', SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_scripts_are_narrow(fname):
    wide = [line for line in fname.read_text(encoding='utf-8').splitlines() if len(line) > 110]
    assert not wide

@each_room
def test_exported_cells_are_short(room):
    long = [code.splitlines()[0] for code in exported(ROOMS[room]) if len(code.splitlines()) > MAX_CELL]
    assert not long

def test_most_exported_cells_are_very_short():
    assert median(len(code.splitlines()) for p in ROOMS.values() for code in exported(p)) <= MEDIAN_CELL

@each_room
def test_rooms_are_not_long(room):
    n_lines = sum(len(code.splitlines()) for code in exported(ROOMS[room]))
    assert n_lines <= MAX_ROOM

# names

# a word that is not used -> the one that is
SYNONYMS = dict(arch='path', archs='paths', genotype='path', cand='op', cands='ops', flops='macs',
                n_flops='macs', num_params='n_params', ckpt='checkpoint', filename='fname', filepath='fname',
                cfg='config', val_acc='acc_valid', test_acc='acc_alone')
# benchmarks in their own words; the architecture of a machine; an attribute of OSError
EXCEPTIONS = {'spaces': {'genotype'}, 'datasets.importers': {*SYNONYMS}, 'record': {'arch'},
              'datasets.folder': {'filename'}}

def names_in(source:str) -> set[str]:
    "Return every name that code uses, defines or passes."
    nodes = list(ast.walk(ast.parse(source)))
    values = [getattr(node, key, None) for node in nodes for key in ('id', 'arg', 'attr', 'name')]
    return set(filter(None, values))

@each_room
def test_one_word_per_thing(room):
    used = set().union(*map(names_in, exported(ROOMS[room])))
    prose = re.sub(r'`[^`]*`|https?:\S+', '', '\n'.join(cells(ROOMS[room], 'markdown')))
    used |= {*re.findall(r'\w+', prose)}
    wrong = used & (SYNONYMS.keys() - EXCEPTIONS.get(room, set()))
    assert not wrong, {word: SYNONYMS[word] for word in wrong}

@cache
def definitions(
    module:Path, # of the package
) -> dict:
    "Return name -> what defines it at the top of a module; a patched method is part of its class."
    out = {}
    for node in ast.parse(module.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign):
            targets = [t for target in node.targets for t in ast.walk(target)]
            names = [t.id for t in targets if isinstance(t, ast.Name)]
        elif not isinstance(node, ast.FunctionDef | ast.ClassDef): continue
        elif any('patch' in ast.unparse(d) for d in node.decorator_list):
            names = [ast.unparse(node.args.args[0].annotation)]
        else: names = [node.name]
        for name in names: out.setdefault(name, []).append(node)
    return out

def public(defined:dict) -> list[str]: # an index only names what other rooms define
    return [name for name in ast.literal_eval(defined['__all__'][0].value) if name in defined]

def function_of(node) -> ast.FunctionDef|None:
    "Return the function whose parameters a reader sees: a class's constructor."
    if isinstance(node, ast.FunctionDef): return node
    return next((f for f in node.body if getattr(f, 'name', '') == '__init__'), None)

def bare_parameters(
    function:ast.FunctionDef, # of a module
    lines:list[str],          # of that module
) -> list[str]:
    "Return the parameters that no comment explains; what fits on one line is explained by the sentence."
    if lines[function.lineno-1].rstrip()[-1] != '(': return []
    args = function.args
    parameters = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs]
    bare = []
    comment = ''
    for parameter in filter(None, parameters):
        line = lines[parameter.lineno-1]
        if '# ' in line:
            comment = line
            continue
        is_explained = parameter.arg == 'self' or re.search('so are the|as there', comment)
        if not is_explained: bare.append(parameter.arg)
    return bare

@each_module
def test_public_names_are_documented(module):
    lines = module.read_text(encoding='utf-8').splitlines()
    defined = definitions(module)
    bare = []
    for name in public(defined):
        node = defined[name][0]
        if isinstance(node, ast.Assign): continue
        if not ast.get_docstring(node): bare.append(name)
        function = function_of(node)
        if function: bare += [f'{name}({parameter})' for parameter in bare_parameters(function, lines)]
    assert not bare

def words(text:str) -> set[str]: return set(re.findall(r'\w+', text))

@cache
def words_of_tests() -> set[str]:
    "Return every word of the tests, those inside the rooms among them."
    inside = [source for p in ROOMS.values() for source in cells(p) if not is_exported(source)]
    return words('\n'.join([*inside, *(p.read_text() for p in (ROOT/'tests').rglob('test_*.py'))]))

@cache
def words_by_place() -> dict[str, set[str]]:
    "Return the words of each page, each definition (`module:name`), the README and the tests."
    places = {name_of(p): words('\n'.join(cells(p))) for p in PAGES}
    for fname in 'README.md', 'settings.ini': places[fname] = words((ROOT/fname).read_text(encoding='utf-8'))
    for module in MODULES:
        for name,nodes in definitions(module).items():
            if name == '__all__': continue
            places[f'{module_of(module)}:{name}'] = words('\n'.join(map(ast.unparse, nodes)))
    return places | {'tests': words_of_tests()}

@each_module
def test_public_names_are_used_and_tested(module):
    defined = definitions(module)
    unused = []
    untested = []
    for name in public(defined):
        own = f'{module_of(module)}:{name}'
        users = [place for place,used in words_by_place().items() if name in used and place != own]
        # by a test, or by something that a test names
        is_tested = any(user == 'tests' or user.partition(':')[2] in words_of_tests() for user in users)
        if not users: unused.append(name)
        elif not is_tested and not isinstance(defined[name][0], ast.Assign): untested.append(name)
    assert not unused, 'nobody uses them'
    assert not untested, 'no test names them, nor what uses them'

# the site

def test_one_quarto_yml():
    real = [p for p in (ROOT/'_quarto.yml', NBS/'_quarto.yml') if not p.is_symlink()]
    assert real == [ROOT/'_quarto.yml']
    assert os.readlink(NBS/'_quarto.yml') == '../_quarto.yml'

def files_in(
    entry, # of the sidebars: a file, a section, or a list of both
) -> list[str]:
    "Return the files of a part of the sidebars, in order."
    if isinstance(entry, str): return [entry]
    entries = entry if isinstance(entry, list) else entry.get('contents', [])
    return [fname for inner in entries for fname in files_in(inner)]

def test_sidebar_names_every_notebook_in_order():
    named = files_in(yaml.safe_load((ROOT/'_quarto.yml').read_text())['website']['sidebar'])
    assert sorted(named) == sorted(map(name_of, NOTEBOOKS))
    rooms = [fname for fname in named if re.match(r'\d', Path(fname).name)]
    for wing in ('.', *WINGS):
        inside = [fname for fname in rooms if str(Path(fname).parent) == wing]
        assert inside == sorted(inside)

# nbdev

def sources(root:Path) -> dict: # file -> text
    files = (root/'kshot').rglob('*.py')
    return {fname.relative_to(root): fname.read_text(encoding='utf-8') for fname in files}

def test_export_is_in_sync(tmp_path):
    tree = copy_tree(tmp_path/'tree')
    for p in (tree/'kshot').rglob('*.py'):
        if p.name != '__init__.py': p.unlink()
    env = os.environ.copy()
    env.pop('IN_TEST', None) # with it nbdev_export does nothing
    subprocess.run([Path(sys.executable).with_name('nbdev_export')], cwd=tree, env=env, check=True)
    stale = {fname for fname,_ in sources(tree).items() ^ sources(ROOT).items()}
    assert not stale, 'run `nbdev_export`'

def test_nbdev_test_finds_every_notebook(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert sorted(map(Path.absolute, nbglob(as_path=True))) == NOTEBOOKS
    assert not list(NBS.rglob('.notest'))

def test_notebooks_passed():
    log = os.environ.get('NOTEBOOKS_LOG')
    if not log: pytest.skip('`make test` runs the notebooks and hands their log over')
    lines = (ROOT/log).read_text().splitlines()
    failed = [line.strip() for line in lines if line.startswith('\t')]
    assert not failed
    # without files it ends well and tests nothing
    assert 'Success.' in lines and 'No files were eligible for testing' not in lines
