"""What kshot does with networks of one's own: results/own_networks.json has a row each.

    python tools/networks.py      # runs tests/test_networks.py; a minute or two
"""
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='') # as `make test` does

import pytest

from kshot.base.files import write_json
from kshot.record import environment

ROOT = Path(__file__).parent.parent
OUT = ROOT/'results'/'own_networks.json'

class Cells:
    "Collect what the tests have recorded, by kind and check."
    def __init__(self):
        self.rows = {}

    def pytest_itemcollected(self, item):
        kind, check = (item.callspec.params[key] for key in ('name', 'check'))
        item.user_properties.append(('place', (kind, check)))

    def pytest_runtest_logreport(self, report):
        if report.when != 'call' and report.passed: return
        said = dict(report.user_properties)
        kind, check = said['place']
        row = self.rows.setdefault(kind, dict(kind=kind))
        if report.skipped: row[check] = 'not measured'
        elif report.failed: row[check] = f'failed: {str(report.longrepr).splitlines()[-1]}'
        elif report.when == 'call': row[check] = said['cell']

def main() -> int: # exit code: 0 if every test passes
    cells = Cells()
    options = '-q --tb=line -p no:cacheprovider -p no:xdist -W ignore --flags slow'
    code = pytest.main([str(ROOT/'tests'/'test_networks.py'), *options.split()], plugins=[cells])
    about = environment()
    packages = 'torchvision', 'onnx', 'onnxscript', 'onnxruntime'
    about['versions'] |= {name: version(name) for name in packages}
    write_json(OUT, dict(**about, rows=[*cells.rows.values()]))
    return code

if __name__ == '__main__': sys.exit(main())
