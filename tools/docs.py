"The documentation site in `_docs`, where Quarto is present; `--pages` stops after nbdev has prepared the pages, which needs no Quarto."
import os, shutil, sys
from pathlib import Path

os.environ['PYTHONPATH'] = str(Path(__file__).parent) # for the processes that nbdev starts: `showdoc` lies here
import nbdev.quarto as q

def main():
    q._ensure_quarto = lambda: None  # nbdev would download and install Quarto by itself
    if '--pages' in sys.argv: q.nbdev_proc_nbs.__wrapped__(force=True)
    elif shutil.which('quarto'): q.nbdev_docs.__wrapped__()
    else: print('Quarto is not on this machine, so the site is not built: install it from quarto.org, then `make docs` again.')

if __name__ == '__main__': main()
