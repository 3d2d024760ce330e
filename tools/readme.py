"""Write README.md: nbs/index.ipynb as Markdown, made without Quarto.

    python tools/readme.py          # the text
    python tools/readme.py picture  # also its picture, from results/; needs kaleido and a browser
"""
import json
import re
import sys
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

PANELS = {'mean accuracy of paths': 'acc', 'tau by accuracy': 'tau_acc', 'tau by loss': 'tau_loss'}

def gains(
    root:Path=ROOT, # the project
) -> 'DataFrame':   # as `kshot.figures.plot_gains` takes it
    "Return what the picture shows: what eight supernets that branch gain over one, by length of training."
    import pandas as pd
    from kshot.rank import paired_gain
    rows = pd.DataFrame(json.loads((root/'results'/'k_pays.json').read_text())['rows'])
    rows = rows[(rows.lr == .05) & rows.begins_by.isna() & (rows.codes == 'simplex')]
    found = []
    for (space,updates),runs in rows.groupby(['space', 'updates']):
        one = runs[runs.K == 1].set_index('seed')
        eight = runs[(runs.K == 8) & (runs.branch == '0.2')].set_index('seed')
        if len(one.index.intersection(eight.index)) < 2: continue # no interval
        about = dict(label=f'{space.capitalize()}-Bench', updates=updates)
        for metric,column in PANELS.items():
            found.append(about | dict(metric=metric) | paired_gain(eight[column], one[column]))
    return pd.DataFrame(found)

def draw_picture(
    fname:Path, # to write
):
    "Draw the figure of the README."
    from kshot.figures import plot_gains
    fig = plot_gains(gains(), 'What eight supernets gain')
    fig.write_image(fname, width=960, height=400, scale=1.5)

if __name__ == '__main__':
    if 'picture' in sys.argv: draw_picture(ROOT/'nbs'/'images'/'k_pays.png')
    (ROOT/'README.md').write_text(readme(), encoding='utf-8')
