"""Write README.md: nbs/index.ipynb as Markdown, made without Quarto.

    python tools/readme.py          # the text
    python tools/readme.py picture  # also its picture, from results/; needs kaleido and a browser
"""
import json
import re
import sys
from itertools import combinations
from os.path import normpath
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
DIRECTIVE = re.compile(r'^#\s*\|.*\n?', re.M)         # `#| eval: false`
FRONT = re.compile(r'\A---\n.*?\n---\n', re.S)        # the YAML of a raw first cell
LINK = re.compile(r'(\]\(|src=")([^)":#\s]+)')        # a link or picture next to the notebook

def readme(
    root:Path=ROOT, # the project
) -> str:           # text of README.md
    "Return the index as Markdown, without hidden cells and directives; links lead from the root."
    nb = nbformat.read(root/'nbs'/'index.ipynb', as_version=4)
    nb.cells = [cell for cell in nb.cells if not re.match(r'#\s*\|\s*(hide|default_exp)', cell.source)]
    for cell in nb.cells:
        if cell.cell_type != 'markdown': cell.source = DIRECTIVE.sub('', FRONT.sub('', cell.source))
    nb.metadata.language_info = dict(name='python')
    text,_ = MarkdownExporter().from_notebook_node(nb)

    def from_root(link):
        is_local = (root/'nbs'/link[2]).exists()
        return link[1] + (normpath(f'nbs/{link[2]}') if is_local else link[2])
    return re.sub(r'\n{3,}', '\n\n', LINK.sub(from_root, text)).strip() + '\n'

def scorer_name(K:int) -> str: return 'one-shot' if K == 1 else f'K-shot, K = {K}'

def taus(
    root:Path=ROOT, # the project
) -> dict:          # scorer -> taus by loss, one a seed where there are several
    "Return what the picture shows: Digits-Bench, three seeds of each K."
    import numpy as np
    from kshot.rank import kendall_tau
    from kshot.tables import get_table
    rows = json.loads((root/'results'/'digits_kshot.json').read_text())['rows']
    table = get_table('digits')
    acc = table.per_seed(split='test')
    macs = table.select(split='test', seed=0).set_index('path').macs[acc.index]
    ceiling = np.mean([kendall_tau(acc[a], acc[b]) for a,b in combinations(range(3), 2)])
    out = {'counting MACs': [kendall_tau(macs, acc.mean(axis=1))]}
    for K in (1, 2, 4, 8): out[scorer_name(K)] = [row['tau_loss'] for row in rows if row['K'] == K]
    return out | {'seed ceiling': [ceiling]}

def taus_of_views(
    root:Path=ROOT, # the project
) -> dict:          # as `taus`
    "Return what the second picture shows: Views-Bench, one-shot and two K that branch."
    import numpy as np
    from kshot.rank import kendall_tau
    from kshot.tables import get_table
    rows = json.loads((root/'results'/'k_pays.json').read_text())['rows']
    rows = [row for row in rows if row['space'] == 'views' and row['lr'] == .05 and row['lean'] is None]
    table = get_table('views')
    acc = table.per_seed(split='test')
    macs = table.select(split='test', seed=0).set_index('path').macs[acc.index]
    ceiling = np.mean([kendall_tau(acc[a], acc[b]) for a,b in combinations(range(3), 2)])
    out = {'counting MACs': [kendall_tau(macs, acc.mean(axis=1))]}
    for K,branch in ((1, ''), (4, '0.2'), (8, '0.2')):
        out[scorer_name(K)] = [row['tau_loss'] for row in rows if (row['K'], row['branch']) == (K, branch)]
    return out | {'seed ceiling': [ceiling]}

def draw_picture(
    taus:dict,  # what `taus` or `taus_of_views` returned
    bench:str,  # name of the benchmark
    fname:Path, # to write
):
    "Draw a figure of the README."
    import pandas as pd
    from kshot.figures import plot_protocol
    points = {name: dict(tau=sum(v)/len(v), low=min(v), high=max(v)) for name,v in taus.items()}
    fig = plot_protocol(pd.DataFrame(points).T)
    title = f'Kendall tau on {bench}, by loss; whiskers: lowest and highest seed'
    fig.update_layout(title_text=title)
    fig.write_image(fname, width=800, height=330, scale=1.5)

if __name__ == '__main__':
    if 'picture' in sys.argv:
        images = ROOT/'nbs'/'images'
        draw_picture(taus(), 'Digits-Bench', images/'digits_kshot.png')
        draw_picture(taus_of_views(), 'Views-Bench', images/'views_kshot.png')
    (ROOT/'README.md').write_text(readme(), encoding='utf-8')
