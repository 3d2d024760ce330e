"Marks, options and folders that all tests share"
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT/'tests'/'helpers'), str(ROOT/'tools')]

MARKS = dict(slow='takes more than 20 s', cuda='needs a GPU') # the words of `tst_flags` in settings.ini
# several processes each: not beside the browser
LAST = 'test_distributed', 'test_imagenet', 'test_launch', 'test_study'
SOURCES = 'settings.ini setup.py MANIFEST.in README.md LICENSE CHANGELOG.md _quarto.yml'.split()

def pytest_addoption(parser):
    explained = 'marks to run that are left out otherwise, as in nbdev_test: "slow cuda"'
    parser.addoption('--flags', default='', help=explained)

def pytest_configure(config):
    for name,why in MARKS.items(): config.addinivalue_line('markers', f'{name}: {why}')

def turn_of(item) -> int:
    "Return when a test runs: the browser first, because it takes longest."
    if item.path.parent.name == 'browser': return 0
    return 2 if item.path.stem in LAST else 1

def pytest_collection_modifyitems(config, items):
    items.sort(key=turn_of)
    wanted = {*config.getoption('--flags').split(), *config.getoption('-m').split()}
    for item in items:
        marks = {mark.name for mark in item.iter_markers()} & {*MARKS}
        for name in marks - wanted:
            item.add_marker(pytest.mark.skip(reason=f'{name}: {MARKS[name]}; --flags {name} runs it'))

def pytest_terminal_summary(terminalreporter):
    "Print what tests have recorded as `said`."
    properties = [pair for report in terminalreporter.getreports('passed') for pair in report.user_properties]
    for name,text in properties:
        if name == 'said': terminalreporter.write_line(text)

def copy_tree(
    dest:Path, # folder to make
) -> Path:     # the same
    "Copy the project's sources, for tests that write into them."
    dest.mkdir()
    for name in SOURCES: shutil.copy2(ROOT/name, dest)
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'runs')
    for name in 'kshot', 'nbs', 'tools': shutil.copytree(ROOT/name, dest/name, symlinks=True, ignore=skip)
    return dest

@pytest.fixture(scope='session') # before a test's own fixtures change the environment
def data():
    "Folder of benchmark data that `KSHOT_DATA` names"
    folder = Path(os.environ.get('KSHOT_DATA', ROOT.parent/'shared'/'data'))
    if not folder.is_dir(): pytest.skip(f'no benchmark data in {folder}; KSHOT_DATA names another folder')
    return folder
