"What is in the wheel, and what an import costs"
import ast, os, shutil, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest
from conftest import ROOT, copy_tree

CFG = ConfigParser(delimiters='=', interpolation=None)
CFG.read(ROOT/'settings.ini')
CFG = CFG['DEFAULT']
MODULES = sorted(p.stem for p in (ROOT/'kshot').glob('*.py') if p.name[0] != '_')
SCRIPTS = dict(o.split('=') for o in CFG['console_scripts'].split())
LIGHT = dict(space=['torch', 'pandas'], spaces=['torch', 'pandas'], rank=['torch'], search=['torch'], networks=['fastai'], supernet=['fastai'])

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
    assert names == {p.relative_to(ROOT).as_posix() for p in files}

def test_sdist_builds_by_itself(dist):
    with tarfile.open(*dist.glob('*.tar.gz')) as t: names = {n.partition('/')[2] for n in t.getnames()}
    assert {'setup.py', 'settings.ini', 'README.md', 'LICENSE', 'CHANGELOG.md'} <= names

def test_metadata(dist):
    with zipfile.ZipFile(*dist.glob('*.whl')) as z:
        read = lambda name: z.read(next(n for n in z.namelist() if n.endswith(f'.dist-info/{name}'))).decode()
        meta, entry = Parser().parsestr(read('METADATA')), ConfigParser()
        entry.read_string(read('entry_points.txt'))
    needs = meta.get_all('Requires-Dist')
    assert meta['Version'] == CFG['version'] and meta['Requires-Python'] == '>=' + CFG['min_python']
    assert sum('extra ==' not in n for n in needs) == len(CFG['requirements'].split())
    assert not [n for n in needs if 'nbdev' in n and 'extra ==' not in n]
    assert dict(entry['console_scripts']) == SCRIPTS and dict(entry['nbdev']) == {'kshot': 'kshot._modidx:d'}

@pytest.mark.parametrize('script', SCRIPTS)
def test_script_has_its_function(script):
    module, func = SCRIPTS[script].split(':')
    body = ast.parse((ROOT/(module.replace('.', '/') + '.py')).read_text()).body
    assert func in {n.name for n in body if isinstance(n, ast.FunctionDef)}

def test_version(): assert f'__version__ = "{CFG["version"]}"' in (ROOT/'kshot'/'__init__.py').read_text()

@pytest.mark.slow
def test_library_alone(dist, tmp_path):
    "The wheel without extras: no nbdev, and the newest fastai that there is"
    uv = shutil.which('uv') or Path(sys.executable).with_name('uv')
    python = tmp_path/'venv'/'bin'/'python'
    run(uv, 'venv', '--python', sys.executable, tmp_path/'venv')
    run(uv, 'pip', 'install', '--python', python, *dist.glob('*.whl'))
    assert 'nbdev' not in run(uv, 'pip', 'list', '--python', python)
    run(python, '-c', import_all(MODULES), cwd=tmp_path)
    for name in SCRIPTS: run(python.with_name(name), '--help', cwd=tmp_path)
