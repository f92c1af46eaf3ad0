"`README.md` and `CONTRIBUTING.md` from their notebooks: `python tools/readme.py [--check]`. The cells are run first, so figures come from the committed JSON."
import os, re, sys
from pathlib import Path
from execnb.shell import CaptureShell
from fastcore.nbio import nb2str, read_nb
from nbconvert import MarkdownExporter
from nbdev.clean import clean_nb
from nbdev.config import get_config
import nbformat

root = Path(__file__).resolve().parents[1]
pages = {'README.md': 'index.ipynb', 'CONTRIBUTING.md': 'contributing.ipynb'}
callouts = dict(note='NOTE', tip='TIP', warning='WARNING', caution='CAUTION', important='IMPORTANT')

def run(path):
    "The notebook at `path`, executed and cleaned"
    nb, here = read_nb(path), os.getcwd()
    os.chdir(path.parent)
    try: CaptureShell(path).run_all(nb, exc_stop=True)
    finally: os.chdir(here)
    clean_nb(nb)
    return nb

def directives(source): return [o[2:].strip() for o in source.splitlines() if o.startswith('#|')]

def callout(m):
    body = m[2].strip().splitlines()
    title = [f'**{body.pop(0).lstrip("# ")}**', ''] if body[0].startswith('##') else []
    return '\n'.join([f'> [!{callouts[m[1]]}]', *(f'> {o}'.rstrip() for o in title + body)])

def markdown(page, source):
    "The notebook text `page` as GitHub shows it: links from the top of the repository, hidden cells left out"
    nb = nbformat.reads(page, as_version=4)
    nb.cells = [c for c in nb.cells if not {'hide', 'include: false'} & set(directives(c.source))]
    for c in nb.cells:
        if c.cell_type != 'code': continue
        if {'echo: false', 'hide_input'} & set(directives(c.source)): c.source = ''
        c.source = '\n'.join(o for o in c.source.splitlines() if not o.startswith('#|'))
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'^```\w*\n\s*```\n', '', text, flags=re.M)  # sources left out
    text = re.sub(r'^:::\s*\{\.callout-(\w+)[^}]*\}\n(.*?)^:::\s*$', callout, text, flags=re.M | re.S)
    text = re.sub(r'\]\((?!https?:|#|/|\.\./|mailto:)', '](nbs/', text).replace('](../', '](')
    text = re.sub(r'(<img [^>]*src=")(?!https?:)', r'\1nbs/', text)
    text = re.sub(r'(\]\([^)]*\)|/>)\{[^}]*\}', r'\1', text)  # quarto's attributes behind an image
    note = f'<!-- Made by `make readme` from nbs/{source}: edit that. -->\n\n'
    return note + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'

def colab_badge(cfg):
    "The badge of the first page, once the repository has an address"
    path, mark = root/'nbs'/'first_model.ipynb', '<!-- colab -->'
    page = path.read_text(encoding='utf-8')
    if not cfg.git_url or mark not in page: return
    link = f'https://colab.research.google.com/github/{cfg.user}/{cfg.repo}/blob/{cfg.branch}/nbs/first_model.ipynb'
    badge = f'[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})'
    path.write_text(page.replace(mark, badge), encoding='utf-8', newline='\n')

def main():
    if '--check' not in sys.argv: colab_badge(get_config(root))
    stale = []
    for target, source in pages.items():
        path = root/'nbs'/source
        page = nb2str(run(path))
        for out, text in [(path, page), (root/target, markdown(page, source))]:
            if out.exists() and out.read_text(encoding='utf-8') == text: continue
            stale.append(out.relative_to(root).as_posix())
            if '--check' not in sys.argv: out.write_text(text, encoding='utf-8', newline='\n')
    if '--check' not in sys.argv: print('Written: ' + (', '.join(stale) or 'nothing, all in step'))
    elif stale: sys.exit('Not in step with its notebook or its figures: ' + ', '.join(stale) + '. Give `make readme` and commit.')

if __name__ == '__main__': main()
