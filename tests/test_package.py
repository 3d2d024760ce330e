"What is in the wheel, and what an import costs"
import ast, json, os, shutil, statistics, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest
from conftest import ROOT, copy_tree

CFG = ConfigParser(delimiters='=', interpolation=None)
CFG.read(ROOT/'settings.ini')
CFG = CFG['DEFAULT']
MODULES = sorted('.'.join(p.relative_to(ROOT/'kshot').with_suffix('').parts) for p in (ROOT/'kshot').rglob('*.py') if p.name[0] != '_')
SCRIPTS = dict(o.split('=') for o in CFG['console_scripts'].split())
REQUIREMENTS = CFG['requirements'].split()
LIGHT = dict(space=['torch', 'pandas'], spaces=['torch', 'pandas'], rank=['torch'], search=['torch'], networks=['fastai'], supernet=['fastai'],
             command=['torch', 'numpy'], doctor=['torch', 'numpy'])

def run(
    *cmd,                    # command and arguments
    cwd:Path=ROOT,           # where it runs
) -> str:                    # its standard output
    "Standard output of a command that must succeed."
    done = subprocess.run(cmd, cwd=cwd, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': ''})
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout

def import_all(
    modules:list[str], # modules of the package
) -> str:              # code that imports them and prints the top-level packages that are loaded then
    "Code for a fresh interpreter."
    return f'import sys, {", ".join(f"kshot.{m}" for m in modules)}; print(*{{m.partition(".")[0] for m in sys.modules}})'

@pytest.mark.parametrize('module', LIGHT)
def test_import_is_light(module):
    heavy = set(LIGHT[module]) & set(run(sys.executable, '-c', import_all([module])).split())
    assert not heavy

def test_no_module_needs_nbdev():
    assert not {'nbdev', 'execnb'} & set(run(sys.executable, '-c', import_all(MODULES)).split())

@pytest.fixture(scope='session')
def dist(tmp_path_factory):
    "Folder with an sdist and the wheel that was built from it"
    tmp = tmp_path_factory.mktemp('package')
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp/'dist', copy_tree(tmp/'tree'), cwd=tmp)
    return tmp/'dist'

def test_wheel_is_complete(dist):
    with zipfile.ZipFile(*dist.glob('*.whl')) as z: names = {n for n in z.namelist() if '.dist-info/' not in n}
    files = [p for p in (ROOT/'kshot').rglob('*') if p.is_file() and '__pycache__' not in p.parts]
    stubs = {f'kshot/{m.replace(".", "/")}.pyi' for m in MODULES} # made while it is built
    assert names == {p.relative_to(ROOT).as_posix() for p in files} | stubs and 'kshot/py.typed' in names

def test_sdist_builds_by_itself(dist):
    with tarfile.open(*dist.glob('*.tar.gz')) as t: names = {n.partition('/')[2] for n in t.getnames()}
    assert {'setup.py', 'tools/stubs.py', 'settings.ini', 'README.md', 'LICENSE', 'CHANGELOG.md'} <= names

def test_metadata(dist):
    with zipfile.ZipFile(*dist.glob('*.whl')) as z:
        read = lambda name: z.read(next(n for n in z.namelist() if n.endswith(f'.dist-info/{name}'))).decode()
        meta, entry = Parser().parsestr(read('METADATA')), ConfigParser()
        entry.read_string(read('entry_points.txt'))
    needs = meta.get_all('Requires-Dist')
    assert meta['Version'] == CFG['version'] and meta['Requires-Python'] == '>=' + CFG['min_python']
    assert sum('extra ==' not in n for n in needs) == len(REQUIREMENTS)
    assert not [n for n in needs if 'nbdev' in n and 'extra ==' not in n]
    assert dict(entry['console_scripts']) == SCRIPTS and dict(entry['nbdev']) == {'kshot': 'kshot._modidx:d'}

@pytest.mark.parametrize('script', SCRIPTS)
def test_script_has_its_function(script):
    module, func = SCRIPTS[script].split(':')
    body = ast.parse((ROOT/(module.replace('.', '/') + '.py')).read_text()).body
    assert func in {t.id for n in body if isinstance(n, ast.Assign) for o in n.targets for t in ast.walk(o) if isinstance(t, ast.Name)}

def test_version(): assert f'__version__ = "{CFG["version"]}"' in (ROOT/'kshot'/'__init__.py').read_text()

def test_every_floor_is_said():
    assert all('>=' in r and '<' not in r for r in REQUIREMENTS)

# what a user's type checker sees of the wheel

GOOD = """
import numpy as np
from kshot.space import Path, Space
from kshot.spaces import get_space
space: Space = get_space('digits')
paths: list[Path] = space.sample(np.random.default_rng(0), 3)
text: str = space.format(paths[0])
n: int = space.n_paths
"""
WRONG = {"space.parse()": 'call-arg', "space.format('0123')": 'arg-type', "m: str = space.n_paths": 'assignment', "space.samples": 'attr-defined',
         "get_space(5)": 'arg-type'}

@pytest.fixture(scope='session')
def typed(dist, tmp_path_factory):
    "Folder with the wheel's content, and a configuration of mypy"
    tmp = tmp_path_factory.mktemp('typed')
    with zipfile.ZipFile(*dist.glob('*.whl')) as z:
        z.extractall(tmp/'lib', [n for n in z.namelist() if n.endswith(('.pyi', 'py.typed', 'kshot/__init__.py'))])
    # a method may take other arguments than a torch layer's, and other packages are their own affair
    how = 'ignore_missing_imports = True', 'follow_imports = silent', 'disable_error_code = override', 'check_untyped_defs = True'
    (tmp/'mypy.ini').write_text('\n'.join(['[mypy]', *how, '']))
    return tmp

def mypy(folder:Path, *cmd):
    "Exit code and output of one of mypy's programs, which take the modules in `lib` for kshot."
    env = {**os.environ, 'MYPYPATH': str(folder/'lib')}
    done = subprocess.run([sys.executable, '-m', *cmd], cwd=folder, capture_output=True, text=True, env=env)
    return done.returncode, done.stdout + done.stderr

@pytest.mark.slow
def test_user_is_checked(typed):
    (typed/'user.py').write_text(GOOD + ''.join(f'{l}\n' for l in WRONG))
    code, said = mypy(typed, 'mypy', '--config-file', 'mypy.ini', 'user.py')
    first = GOOD.count('\n')
    found = {int(l.split(':')[1])-first-1: l.rsplit('[', 1)[1].rstrip(']') for l in said.splitlines() if ': error: ' in l}
    assert code == 1 and found == dict(enumerate(WRONG.values())), said

@pytest.mark.slow
def test_annotations_are_true(typed):
    "The stubs agree with themselves, and with the signatures of everything that can be imported."
    wrapped = [rf'kshot\.(command|launch|study|bench|doctor)\.{o.partition(":")[2]}' for o in SCRIPTS.values()] # a command takes `argv`, whatever the function takes that it wraps
    (typed/'known').write_text('\n'.join([*wrapped, r'kshot\.\w+\.(AccuracyExplorer|CodeExplorer|LivePanel|Panel|RankDashboard|Window)']) + '\n') # traitlets' metaclass
    code, said = mypy(typed, 'mypy.stubtest', 'kshot', '--mypy-config-file', 'mypy.ini', '--concise', '--ignore-missing-stub',
                      '--allowlist', 'known', '--ignore-unused-allowlist')
    assert code == 0, said

# the wheel alone, at both ends of the versions that it allows

def seconds(python:Path, module:str, cwd:Path) -> dict:
    "Median over five fresh interpreters of what an import takes: on the clock, and of the processor."
    clocks = 'time.perf_counter(), time.process_time()'
    code = f'import time; a, b = {clocks}; import {module}; c, d = {clocks}; print(c-a, d-b)'
    wall, own = zip(*(map(float, run(python, '-W', 'ignore', '-c', code, cwd=cwd).split()) for _ in range(5)))
    return dict(seconds=round(statistics.median(wall), 2), cpu_seconds=round(statistics.median(own), 2))

def size(folder:Path, names=('*',)) -> int: # MB
    files = {f for n in names for p in folder.glob(n) for f in ([p] if p.is_file() else p.rglob('*'))}
    return round(sum(f.stat().st_size for f in files if f.is_file() and not f.is_symlink())/1e6)

def measured(dist:Path, python:Path, cwd:Path) -> dict:
    "Sizes and times of an installation."
    site = Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip())
    kb = lambda pattern: round(next(dist.glob(pattern)).stat().st_size/1e3)
    heavy = 'torch', 'torchgen', 'functorch', 'triton', 'nvidia', 'cuda*', 'nvidia_*'
    imports = {m: seconds(python, m, cwd) for m in ('kshot.space', 'kshot.supernet', 'kshot.train', 'kshot.cli.launch')}
    return dict(wheel_kB=kb('*.whl'), sdist_kB=kb('*.tar.gz'), installed_MB=size(site), of_it_torch_and_cuda_MB=size(site, heavy), imports=imports)

@pytest.mark.slow
@pytest.mark.parametrize('end', ['lowest-direct', 'highest'])
def test_library_alone(dist, tmp_path, end):
    "The wheel without extras, so without nbdev, on the oldest and the newest versions; KSHOT_RECORD names a file for what is measured"
    uv = shutil.which('uv') or Path(sys.executable).with_name('uv')
    bin = tmp_path/'venv'/'bin'
    python = bin/'python'
    run(uv, 'venv', '--python', os.environ.get('KSHOT_PYTHON', sys.executable), tmp_path/'venv')
    run(uv, 'pip', 'install', '--compile-bytecode', '--python', python, '--resolution', end, *dist.glob('*.whl'), *REQUIREMENTS)
    has = {p['name']: p['version'] for p in json.loads(run(uv, 'pip', 'list', '--python', python, '--format', 'json'))}
    assert 'nbdev' not in has
    numbers = lambda v: [int(n) for n in v.partition('+')[0].split('.')[:2] if n.isdigit()]
    if end == 'lowest-direct':
        floors = dict(r.split('>=') for r in REQUIREMENTS)
        assert {n: has[n] for n,v in floors.items() if numbers(has[n])[:1+v.count('.')] != numbers(v)} == {}
    run(python, '-c', import_all(MODULES), cwd=tmp_path)
    for name in SCRIPTS: run(bin/name, '--help', cwd=tmp_path)
    assert json.loads(run(bin/'kshot_doctor', '--json', cwd=tmp_path))['works']
    demo = json.loads(run(bin/'kshot_demo', '--quick', '--json', cwd=tmp_path).splitlines()[-1])
    assert demo['results']['rank']['ceiling']['tau'] > .8 and -1 < demo['results']['rank']['kshot']['tau'] < 1
    if fname := os.environ.get('KSHOT_RECORD'):
        names = ['python', *(r.partition('>=')[0] for r in REQUIREMENTS)]
        has['python'] = run(python, '-c', 'import platform; print(platform.python_version())').strip()
        commit = run('git', 'log', '-1', '--format=%h').strip()
        made = dict(versions={n: has[n] for n in names}, commit=commit, machine=demo['machine'], demo_seconds=demo['seconds']['demo'],
                    demo_tau={k: round(demo['results']['rank'][k]['tau'], 3) for k in ('kshot', 'one_shot')})
        made |= measured(dist, python, tmp_path)
        had = json.loads(Path(fname).read_text()) if Path(fname).exists() else {}
        Path(fname).write_text(json.dumps({**had, f'{end}, Python {has["python"]}': made}, indent=1)+'\n')
    shutil.rmtree(tmp_path/'venv') # gigabytes
