"The page that makes a model smaller, run in small: its cells with few images, epochs and paths"
import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest

PAGE = Path(__file__).parents[1]/'nbs'/'tutorials'/'make_smaller.ipynb'
DATA = Path(os.environ.get('KSHOT_DATA', Path(__file__).parents[2]/'shared'/'data'))

def test_in_small(monkeypatch):
    if not (DATA/'cifar10_part0.npz').exists(): pytest.skip(f'needs CIFAR-10 in {DATA}')
    monkeypatch.setenv('KSHOT_DATA', str(DATA))
    cells = json.loads(PAGE.read_text(encoding='utf-8'))['cells']
    sources = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
    first = next(i for i,source in enumerate(sources) if 'n_train, epochs, n_scored, n_timed = ' in source)
    assert re.search(r'= 10_000, 8, 100, 60$', sources[first])
    sources[first] = 'n_train, epochs, n_scored, n_timed = 250, 2, 6, 16'
    page = {'__name__': 'page'}
    for source in sources: exec(compile(source, str(PAGE), 'exec'), page)
    table = pd.DataFrame(page['rows']).T
    assert [*table.index] == ['full', 'uniform', 'found']
    assert page['latency'](page['paths']['found']) <= page['budget']
    assert table.loc['found', 'MACs'] == page['macs'].macs(page['paths']['found']) < table.loc['full', 'MACs']
