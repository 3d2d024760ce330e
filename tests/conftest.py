"Marks and folders that all tests share"
import os, shutil, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT/'tests'/'helpers'), str(ROOT/'tools')]
MARKS = dict(slow='takes more than 20 s', cuda='needs a GPU') # the words of `tst_flags` in settings.ini

def pytest_addoption(parser):
    parser.addoption('--flags', default='', help='marks to run that are left out otherwise, as in nbdev_test: "slow cuda"')

def pytest_configure(config):
    for name,why in MARKS.items(): config.addinivalue_line('markers', f'{name}: {why}')

LAST = 'test_distributed', 'test_imagenet', 'test_launch', 'test_study' # several processes each: not beside the browser, which is the longest

def pytest_collection_modifyitems(config, items):
    place = lambda item: 0 if item.path.parent.name == 'browser' else 1 + (item.path.stem in LAST)
    items.sort(key=place)
    asked = config.getoption('--flags').split() + config.getoption('-m').split()
    for item in items:
        for name in set(MARKS) & {m.name for m in item.iter_markers()} - set(asked):
            item.add_marker(pytest.mark.skip(reason=f'{name}: {MARKS[name]}; --flags {name} runs it'))

def pytest_terminal_summary(terminalreporter):
    for r in terminalreporter.getreports('passed'):
        for k,v in r.user_properties:
            if k == 'said': terminalreporter.write_line(v)

def copy_tree(
    dest:Path, # folder to make
) -> Path:     # the same
    "A copy of the project's sources, for tests that write into it."
    dest.mkdir()
    for name in 'settings.ini setup.py MANIFEST.in README.md LICENSE CHANGELOG.md _quarto.yml'.split(): shutil.copy2(ROOT/name, dest)
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'runs')
    for name in 'kshot', 'nbs', 'tools': shutil.copytree(ROOT/name, dest/name, symlinks=True, ignore=skip)
    return dest

@pytest.fixture(scope='session') # before a test's own fixtures change the environment
def data():
    "The folder of benchmark data that `KSHOT_DATA` names"
    folder = Path(os.environ.get('KSHOT_DATA', ROOT.parent/'shared'/'data'))
    if not folder.is_dir(): pytest.skip(f'no benchmark data in {folder}; KSHOT_DATA names another folder')
    return folder
