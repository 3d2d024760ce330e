"What Quarto cannot show of staged notebooks it gets as HTML: plotly figures, tables without foreign scripts; Quarto runs this before it renders"
import json, re
from pathlib import Path

PLOTLY, WIDGET = 'application/vnd.plotly.v1+json', 'application/vnd.jupyter.widget-view+json'
NO_WIDGET = '*A widget that lives in JupyterLab: open this page there, with `make lab`.*'

def as_markdown(
    data:dict, # MIME bundle of an output
) -> dict:     # the same, for Quarto
    "Figures and tables as raw HTML in Markdown: Quarto knows no plotly, and for each HTML output it loads scripts from another host."
    raw = lambda html: {'text/markdown': f'```{{=html}}\n{html}\n```'}
    if PLOTLY in data:
        fig = json.dumps({k: data[PLOTLY][k] for k in ('data', 'layout')}, separators=(',', ':')).replace('<', '\\u003c')
        height = data[PLOTLY]['layout'].get('height') or 450
        return raw(f'<script type="application/json">{fig}</script><div class="figure-plotly" style="height:{height}px"></div>')
    if WIDGET in data: return {'text/markdown': NO_WIDGET}
    if 'text/html' in data:
        html = re.sub(r'<style.*?</style>', '', ''.join(data['text/html']), flags=re.S)
        return raw('<div class="scroll">' + re.sub(r'\n\s*\n', '\n', html).strip() + '</div>')
    return data

def convert(
    nb:dict, # notebook, changed in place
) -> bool:   # was there something to change?
    "Give Quarto a notebook whose outputs it can show."
    n = 0
    for o in (o for c in nb['cells'] for o in c.get('outputs', []) if 'data' in o):
        new = as_markdown(o['data'])
        n, o['data'] = n + (new is not o['data']), new
    return bool(nb['metadata'].pop('widgets', None)) or n > 0

def main(
    folder:Path, # of staged notebooks
):
    "Convert all notebooks, and write what draws their figures."
    from plotly.io.json import to_json_plotly
    from plotly.offline import get_plotlyjs
    from kshot.figures.look import template
    for f in folder.rglob('*.ipynb'):
        nb = json.loads(f.read_text(encoding='utf-8'))
        if convert(nb): f.write_text(json.dumps(nb), encoding='utf-8')
    both = ', '.join(f'{k}: {to_json_plotly(template(k == "dark").to_plotly_json())}' for k in ('light', 'dark'))
    (folder/'figures.js').write_text(f'{get_plotlyjs()}\nwindow.kshotTemplates = {{{both}}};\n', encoding='utf-8')

if __name__ == '__main__': main(Path.cwd())
