"What is in the wheel, and what an import costs"
import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest
from conftest import ROOT, copy_tree

INI = ConfigParser(delimiters='=', interpolation=None)
INI.read(ROOT/'settings.ini')
SETTINGS = INI['DEFAULT']
FILES = [p for p in (ROOT/'kshot').rglob('*') if p.is_file() and '__pycache__' not in p.parts]
SOURCES = sorted(p.relative_to(ROOT/'kshot') for p in FILES if p.suffix == '.py' and p.name[0] != '_')
MODULES = ['.'.join(p.with_suffix('').parts) for p in SOURCES]
SCRIPTS = dict(script.split('=') for script in SETTINGS['console_scripts'].split())
REQUIREMENTS = SETTINGS['requirements'].split()
# module -> packages that its import must not load
LIGHT = {'space': ['torch', 'pandas'], 'spaces': ['torch', 'pandas'], 'rank': ['torch'], 'search': ['torch'],
         'networks': ['fastai'], 'supernet': ['fastai'], 'settings': ['numpy', 'fastcore'],
         'cli.main': ['torch', 'numpy'], 'cli.launch': ['torch', 'numpy', 'fastcore'],
         'cli.doctor': ['torch', 'numpy'], 'studies.start': ['torch', 'numpy']}

def run(
    *cmd,          # command and arguments
    cwd:Path=ROOT, # where it runs
) -> str:          # its standard output
    "Return the standard output of a command that must succeed."
    done = subprocess.run(cmd, cwd=cwd, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': ''})
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout

def import_all(
    modules:list[str], # modules of the package
) -> str:              # code that imports them and prints the top-level packages that are loaded then
    "Return code for a fresh interpreter."
    names = ', '.join(f'kshot.{module}' for module in modules)
    return f'import sys, {names}; print(*{{name.partition(".")[0] for name in sys.modules}})'

@pytest.mark.parametrize('module', LIGHT)
def test_import_is_light(module):
    loaded = run(sys.executable, '-c', import_all([module])).split()
    assert not {*LIGHT[module]} & {*loaded}

def test_no_module_needs_nbdev():
    assert not {'nbdev', 'execnb'} & {*run(sys.executable, '-c', import_all(MODULES)).split()}

@pytest.fixture(scope='session')
def dist(tmp_path_factory):
    "Folder with an sdist and the wheel that was built from it"
    tmp = tmp_path_factory.mktemp('package')
    tree = copy_tree(tmp/'tree')
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp/'dist', tree, cwd=tmp)
    return tmp/'dist'

@pytest.fixture(scope='session')
def wheel(dist):
    "Name inside the wheel -> content"
    with zipfile.ZipFile(*dist.glob('*.whl')) as archive:
        return {name: archive.read(name) for name in archive.namelist()}

def test_wheel_is_complete(wheel):
    names = {name for name in wheel if '.dist-info/' not in name}
    stubs = {f'kshot/{module.replace(".", "/")}.pyi' for module in MODULES} # made while it is built
    assert names == {p.relative_to(ROOT).as_posix() for p in FILES} | stubs
    assert 'kshot/py.typed' in names

def test_sdist_builds_by_itself(dist):
    with tarfile.open(*dist.glob('*.tar.gz')) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    assert {'setup.py', 'tools/stubs.py', 'settings.ini', 'README.md', 'LICENSE', 'CHANGELOG.md'} <= names

def info_of(wheel:dict, name:str) -> str: # a file of its metadata
    return next(content for fname,content in wheel.items() if fname.endswith(f'.dist-info/{name}')).decode()

def test_metadata(wheel):
    meta = Parser().parsestr(info_of(wheel, 'METADATA'))
    needs = meta.get_all('Requires-Dist')
    own = [need for need in needs if 'extra ==' not in need]
    assert meta['Version'] == SETTINGS['version']
    assert meta['Requires-Python'] == '>=' + SETTINGS['min_python']
    assert len(own) == len(REQUIREMENTS)
    assert not [need for need in own if 'nbdev' in need]

def test_entry_points(wheel):
    entry = ConfigParser()
    entry.read_string(info_of(wheel, 'entry_points.txt'))
    assert dict(entry['console_scripts']) == SCRIPTS
    assert dict(entry['nbdev']) == {'kshot': 'kshot._modidx:d'}

@pytest.mark.parametrize('script', SCRIPTS)
def test_script_has_its_function(script):
    module, function = SCRIPTS[script].split(':')
    body = ast.parse((ROOT/(module.replace('.', '/') + '.py')).read_text()).body
    assert function in [node.name for node in body if isinstance(node, ast.FunctionDef)]

def test_version():
    text = (ROOT/'kshot'/'__init__.py').read_text()
    assert f'__version__ = "{SETTINGS["version"]}"' in text

def test_every_floor_is_said():
    assert all('>=' in r and '<' not in r for r in REQUIREMENTS)

# what a user's type checker sees of the wheel

GOOD = """
import numpy as np
from kshot.space import Path, Space
from kshot.benchmark import get_space
space: Space = get_space('digits')
paths: list[Path] = space.sample(np.random.default_rng(0), 3)
text: str = space.format(paths[0])
n: int = space.n_paths
"""
# line -> what mypy says of it
WRONG = {"space.parse()": 'call-arg', "space.format('0123')": 'arg-type', "space.samples": 'attr-defined',
         "m: str = space.n_paths": 'assignment', "get_space(5)": 'arg-type'}
# a method may take other arguments than a torch layer's; other packages are their own affair
MYPY = """[mypy]
ignore_missing_imports = True
follow_imports = silent
disable_error_code = override
check_untyped_defs = True
"""
# a command takes `argv`, whatever the function takes that it wraps; traitlets has a metaclass
COMMANDS = '|'.join(script.partition(':')[2] for script in SCRIPTS.values())
KNOWN = [rf'kshot\.(cli|studies)\.\w+\.({COMMANDS})']
# to stubtest an alias of a Literal is a Union
ALIAS = re.compile(r'^(\w+) = Literal\[', re.M)
for path,module in zip(SOURCES, MODULES):
    text = (ROOT/'kshot'/path).read_text(encoding='utf-8')
    KNOWN += [re.escape(f'kshot.{module}.{name}') for name in ALIAS.findall(text)]
KNOWN += [r'kshot\.cli\.(bench|tables)\._\w+'] # their subcommands
KNOWN += [r'kshot\.lab\.\w+\.(AccuracyExplorer|CodeExplorer|LivePanel|Panel|RankDashboard|Window)']

@pytest.fixture(scope='session')
def typed(dist, tmp_path_factory):
    "Folder with the wheel's content, and a configuration of mypy"
    tmp = tmp_path_factory.mktemp('typed')
    with zipfile.ZipFile(*dist.glob('*.whl')) as archive:
        shown = [name for name in archive.namelist() if name.endswith(('.pyi', 'py.typed', '__init__.py'))]
        archive.extractall(tmp/'lib', shown)
    (tmp/'mypy.ini').write_text(MYPY)
    return tmp

def mypy(folder:Path, *cmd):
    "Exit code and output of one of mypy's programs, which take the modules in `lib` for kshot."
    env = {**os.environ, 'MYPYPATH': str(folder/'lib')}
    done = subprocess.run([sys.executable, '-m', *cmd], cwd=folder, capture_output=True, text=True, env=env)
    return done.returncode, done.stdout + done.stderr

@pytest.mark.slow
def test_user_is_checked(typed):
    (typed/'user.py').write_text(GOOD + ''.join(f'{line}\n' for line in WRONG))
    code, out = mypy(typed, 'mypy', '--config-file', 'mypy.ini', 'user.py')
    errors = [line for line in out.splitlines() if ': error: ' in line]
    kinds = {int(line.split(':')[1]): line.rsplit('[', 1)[1].rstrip(']') for line in errors}
    assert code == 1
    assert kinds == dict(enumerate(WRONG.values(), GOOD.count('\n') + 1)), out

@pytest.mark.slow
def test_annotations_are_true(typed):
    "The stubs agree with themselves, and with the signatures of everything that can be imported."
    (typed/'known').write_text('\n'.join(KNOWN) + '\n')
    options = '--concise', '--ignore-missing-stub', '--allowlist', 'known', '--ignore-unused-allowlist'
    code, out = mypy(typed, 'mypy.stubtest', 'kshot', '--mypy-config-file', 'mypy.ini', *options)
    assert code == 0, out

# the wheel alone, at both ends of the versions that it allows

HEAVY = 'torch', 'torchgen', 'functorch', 'triton', 'nvidia', 'cuda*', 'nvidia_*'
TIMED = 'kshot.space', 'kshot.supernet', 'kshot.train', 'kshot.cli.main', 'kshot.cli.work'
KINDS = dict(wheel='*.whl', sdist='*.tar.gz')

def seconds(python:Path, module:str, cwd:Path) -> dict:
    "Return the time that an import takes on the clock and of the processor: medians of five interpreters."
    clocks = 'time.perf_counter(), time.process_time()'
    code = f'import time; a, b = {clocks}; import {module}; c, d = {clocks}; print(c-a, d-b)'
    runs = [run(python, '-W', 'ignore', '-c', code, cwd=cwd).split() for _ in range(5)]
    wall, own = (statistics.median(map(float, column)) for column in zip(*runs))
    return dict(seconds=round(wall, 2), cpu_seconds=round(own, 2))

def size(folder:Path, names=('*',)) -> int: # MB
    matches = [p for name in names for p in folder.glob(name)]
    files = {f for p in matches for f in ([p] if p.is_file() else p.rglob('*'))}
    return round(sum(f.stat().st_size for f in files if f.is_file() and not f.is_symlink())/1e6)

def measured(dist:Path, python:Path, cwd:Path) -> dict:
    "Return sizes and times of an installation."
    site = Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip())
    kB = {f'{kind}_kB': round(next(dist.glob(pattern)).stat().st_size/1e3) for kind,pattern in KINDS.items()}
    MB = dict(installed_MB=size(site), of_it_torch_and_cuda_MB=size(site, HEAVY))
    return kB | MB | dict(imports={module: seconds(python, module, cwd) for module in TIMED})

def release(version:str) -> list[int]: # major and minor
    return [int(n) for n in version.partition('+')[0].split('.')[:2] if n.isdigit()]

def check_floors(versions:dict): # of an installation
    floors = dict(requirement.split('>=') for requirement in REQUIREMENTS)
    for name,floor in floors.items():
        n_numbers = 1 + floor.count('.')
        assert release(versions[name])[:n_numbers] == release(floor), f'{name} {versions[name]}'

def record(fname:Path, end:str, versions:dict, demo:dict, sizes:dict):
    "Put what was measured of one installation into a file."
    names = ['python', *(requirement.partition('>=')[0] for requirement in REQUIREMENTS)]
    taus = {name: round(demo['results']['rank'][name]['tau'], 3) for name in ('kshot', 'one_shot')}
    commit = run('git', 'log', '-1', '--format=%h').strip()
    about = dict(versions={name: versions[name] for name in names}, commit=commit, machine=demo['machine'],
                 demo_seconds=demo['seconds']['demo'], demo_tau=taus)
    before = json.loads(fname.read_text()) if fname.exists() else {}
    rows = {**before, f'{end}, Python {versions["python"]}': about | sizes}
    fname.write_text(json.dumps(rows, indent=1) + '\n')

@pytest.mark.slow
@pytest.mark.parametrize('end', ['lowest-direct', 'highest'])
def test_library_alone(dist, tmp_path, end):
    """The wheel without extras, so without nbdev, on the oldest and the newest versions.

    `KSHOT_RECORD` names a file for what is measured.
    """
    uv = shutil.which('uv') or Path(sys.executable).with_name('uv')
    bin = tmp_path/'venv'/'bin'
    python = bin/'python'
    run(uv, 'venv', '--python', os.environ.get('KSHOT_PYTHON', sys.executable), tmp_path/'venv')
    options = '--compile-bytecode', '--python', python, '--resolution', end
    run(uv, 'pip', 'install', *options, *dist.glob('*.whl'), *REQUIREMENTS)
    listed = json.loads(run(uv, 'pip', 'list', '--python', python, '--format', 'json'))
    versions = {package['name']: package['version'] for package in listed}
    assert 'nbdev' not in versions
    if end == 'lowest-direct': check_floors(versions)
    run(python, '-c', import_all(MODULES), cwd=tmp_path)
    for name in SCRIPTS: run(bin/name, '--help', cwd=tmp_path)
    assert json.loads(run(bin/'kshot', 'doctor', '--json', cwd=tmp_path))['works']
    demo = json.loads(run(bin/'kshot', 'demo', '--quick', '--json', cwd=tmp_path).splitlines()[-1])
    assert demo['results']['rank']['ceiling']['tau'] > .8
    assert -1 < demo['results']['rank']['kshot']['tau'] < 1
    if fname := os.environ.get('KSHOT_RECORD'):
        versions['python'] = run(python, '-c', 'import platform; print(platform.python_version())').strip()
        record(Path(fname), end, versions, demo, measured(dist, python, tmp_path))
    shutil.rmtree(tmp_path/'venv') # gigabytes
