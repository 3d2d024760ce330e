"README.md is nbs/index.ipynb as Markdown, made without Quarto"
import re
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

if __name__ == '__main__': (ROOT/'README.md').write_text(readme(), encoding='utf-8')
