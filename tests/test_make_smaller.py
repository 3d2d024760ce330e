"The pages that make a model smaller, run in small: their cells with few images, epochs and paths"
import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

PAGES = Path(__file__).parents[1]/'nbs'/'tutorials'
DATA = Path(os.environ.get('KSHOT_DATA', Path(__file__).parents[2]/'shared'/'data'))

def run(name:str, sizes:str, small:str) -> dict: # what the page defines
    cells = json.loads((PAGES/name).read_text(encoding='utf-8'))['cells']
    sources = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
    assert sum(source.endswith(sizes) for source in sources) == 1
    page = {'__name__': 'page'}
    for source in sources: exec(compile(source.replace(sizes, small), name, 'exec'), page)
    return page

def shown_code(name:str) -> str: # of a page's text
    cells = json.loads((PAGES/name).read_text(encoding='utf-8'))['cells']
    texts = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown']
    code, = re.findall(r'^```python\n(.*?)^```', '\n'.join(texts), re.M|re.S)
    return code

def test_classifier(monkeypatch):
    if not (DATA/'cifar10_part0.npz').exists(): pytest.skip(f'needs CIFAR-10 in {DATA}')
    monkeypatch.setenv('KSHOT_DATA', str(DATA))
    sizes = 'n_train, epochs, n_scored, n_timed = '
    page = run('make_smaller.ipynb', f'{sizes}10_000, 8, 100, 60', f'{sizes}250, 2, 6, 16')
    table = pd.DataFrame(page['rows']).T
    assert [*table.index] == ['full', 'uniform', 'found']
    assert page['latency'](page['paths']['found']) <= page['budget']
    assert table.loc['found', 'MACs'] == page['macs'].macs(page['paths']['found']) < table.loc['full', 'MACs']
    exec(shown_code('make_smaller.ipynb'), page)
    assert page['latency'](page['found'].path) <= page['budget']
    x, _ = next(iter(page['dls'].valid))
    assert page['found'].net(x).shape == (len(x), 10)

def test_segmentation():
    page = run('smaller_segmentation.ipynb', 'n_train, epochs, n_scored = 3000, 6, 60',
               'n_train, epochs, n_scored = 300, 2, 6')
    table = pd.DataFrame(page['rows']).T
    assert table.MACs.idxmin() == 'smallest' and table.MACs.idxmax() == 'largest'
    assert table.MACs.found <= page['budget']
    fig = page['fig']
    shown = {} # title -> picture right below it
    for trace in fig.data:
        top = fig.layout[f'yaxis{trace.yaxis[1:]}'].domain[1]
        title = min(fig.layout.annotations, key=lambda title: abs(title.y - top))
        shown[title.text] = trace.z
    assert [*shown] == [*page['masks']]
    for name,mask in page['masks'].items():
        assert (shown[name] == torch.cat([*mask[:6]], 1).numpy()).all()
    images, masks = page['shapes'](6, seed=3)
    assert set(masks.unique().tolist()) == {0, 1, 2, 3}
    assert images[masks[:, None] == 0].mean().abs() < .05 < .5 < images[masks[:, None] > 0].mean()
