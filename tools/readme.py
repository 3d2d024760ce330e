"README.md is nbs/index.ipynb as Markdown, made without Quarto, with a picture of what is in results/"
import json, re, sys
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
    "Markdown of nbs/index.ipynb without hidden cells, directives and front-matter; links lead from the root."
    nb = nbformat.read(root/'nbs'/'index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not re.match(r'#\s*\|\s*(hide|default_exp)', c.source)]
    for c in nb.cells:
        c.source = DIRECTIVE.sub('', FRONT.sub('', c.source)) if c.cell_type != 'markdown' else c.source
    nb.metadata.language_info = dict(name='python')
    text,_ = MarkdownExporter().from_notebook_node(nb)
    local = lambda m: m[1] + (normpath(f'nbs/{m[2]}') if (root/'nbs'/m[2]).exists() else m[2])
    return re.sub(r'\n{3,}', '\n\n', LINK.sub(local, text)).strip() + '\n'

def taus(
    root:Path=ROOT, # the project
) -> dict:          # scorer -> taus by loss, of each seed where there are several
    "What the picture shows: Digits-Bench, three seeds of each K."
    import numpy as np
    from kshot.rank import kendall_tau
    from kshot.tables import get_table
    table, rows = get_table('digits'), json.loads((root/'results'/'digits_kshot.json').read_text())['rows']
    acc = table.per_seed(split='test')
    macs = table.select(split='test', seed=0).set_index('path').macs[acc.index]
    ceiling = np.mean([kendall_tau(acc[a], acc[b]) for a,b in ((0, 1), (0, 2), (1, 2))])
    by_K = {('one-shot' if K == 1 else f'K-shot, K = {K}'): [r['tau_loss'] for r in rows if r['K'] == K] for K in (1, 2, 4, 8)}
    return {'counting MACs': [kendall_tau(macs, acc.mean(axis=1))], **by_K, 'seed ceiling': [ceiling]}

def picture(
    fname:Path=ROOT/'nbs'/'images'/'digits_kshot.png', # to write
):
    "Draw the README's figure; needs kaleido and a browser."
    import pandas as pd
    from kshot.figures.ranking import plot_protocol
    points = pd.DataFrame({k: dict(tau=sum(v)/len(v), low=min(v), high=max(v)) for k,v in taus().items()}).T
    fig = plot_protocol(points).update_layout(title_text='Kendall tau on Digits-Bench, by loss; whiskers: lowest and highest of three seeds')
    fig.write_image(fname, width=800, height=330, scale=1.5)

if __name__ == '__main__':
    if 'picture' in sys.argv: picture()
    (ROOT/'README.md').write_text(readme(), encoding='utf-8')
