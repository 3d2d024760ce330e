"""Turn what Quarto cannot show of notebooks into HTML: plotly figures, and tables without foreign scripts.

A comment `<!-- site: ... -->` holds what only the site shows: pictures of widgets, which live in JupyterLab.
Tests in the page of a module are folded, so that a reader sees what it does first.

Quarto runs this before it renders the site, in the folder of the staged notebooks.
"""
import json
import re
from pathlib import Path

PLOTLY = 'application/vnd.plotly.v1+json'
WIDGET = 'application/vnd.jupyter.widget-view+json'
FENCE = re.compile(r'^```python\n.*?^```$', re.M|re.S)
LINK = re.compile(r'\[(`[^`\n]+`)\]\([^()\s]+\)')
TEST = re.compile(r'^[^#\n]*\b(assert|test_\w+\(|refuse[sd]\()', re.M)
FOLDED = '#| code-fold: true\n#| code-summary: "Tests"\n'
NO_WIDGET = '*A widget that lives in JupyterLab: open this page there, with `make lab`.*'

def raw_html(html:str) -> dict: return {'text/markdown': f'```{{=html}}\n{html}\n```'}

def as_markdown(
    data:dict, # MIME bundle of an output
) -> dict:     # the same, for Quarto
    """Return figures and tables as raw HTML in Markdown, and code in Markdown without links.

    Quarto knows no plotly, and loads scripts for HTML; nbdev makes links in the code of a reference, too.
    """
    if PLOTLY in data:
        fig = {key: data[PLOTLY][key] for key in ('data', 'layout')}
        text = json.dumps(fig, separators=(',', ':')).replace('<', '\\u003c')
        height = fig['layout'].get('height') or 450
        figure = f'<div class="figure-plotly" style="height:{height}px"></div>'
        return raw_html(f'<script type="application/json">{text}</script>{figure}')
    if WIDGET in data: return {'text/markdown': NO_WIDGET}
    if 'text/html' in data:
        html = re.sub(r'<style.*?</style>', '', ''.join(data['text/html']), flags=re.S)
        table = re.sub(r'\n\s*\n', '\n', html).strip()
        return raw_html(f'<div class="scroll">{table}</div>')
    if 'text/markdown' in data:
        text = ''.join(data['text/markdown'])
        plain = FENCE.sub(lambda code: LINK.sub(r'\1', code[0]), text)
        if plain != text: return data | {'text/markdown': plain}
    return data

def convert(
    nb:dict, # notebook, changed in place
) -> bool:   # was there something to change?
    "Give Quarto a notebook whose outputs it can show."
    outputs = [output for cell in nb['cells'] for output in cell.get('outputs', []) if 'data' in output]
    is_changed = bool(nb['metadata'].pop('widgets', None))
    for cell in nb['cells']:
        if cell['cell_type'] != 'markdown': continue
        text = ''.join(cell['source'])
        cell['source'] = re.sub(r'<!-- site: (.*?) -->', r'\1', text)
        is_changed |= cell['source'] != text
    for output in outputs:
        data = as_markdown(output['data'])
        is_changed |= data is not output['data']
        output['data'] = data
    return is_changed

def fold_tests(
    nb:dict, # notebook of a module, changed in place
) -> bool:   # was there something to fold?
    "Fold the cells that test and show nothing."
    is_changed = False
    for cell in nb['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or cell['outputs'] or not TEST.search(text): continue
        if 'code-fold:' in text: continue
        cell['source'] = FOLDED+text
        is_changed = True
    return is_changed

def main(
    folder:Path, # of staged notebooks
):
    "Convert all notebooks, and write the script that draws their figures."
    from plotly.io.json import to_json_plotly
    from plotly.offline import get_plotlyjs
    from kshot.figures.look import template
    for fname in folder.rglob('*.ipynb'):
        nb = json.loads(fname.read_text(encoding='utf-8'))
        is_changed = convert(nb)
        if fname.name[0].isdigit(): is_changed |= fold_tests(nb)
        if is_changed: fname.write_text(json.dumps(nb), encoding='utf-8')
    themes = {name: to_json_plotly(template(name).to_plotly_json()) for name in ('light', 'dark')}
    both = ', '.join(f'{name}: {theme}' for name,theme in themes.items())
    script = f'{get_plotlyjs()}\nwindow.kshotTemplates = {{{both}}};\n'
    (folder/'figures.js').write_text(script, encoding='utf-8')

if __name__ == '__main__': main(Path.cwd())
