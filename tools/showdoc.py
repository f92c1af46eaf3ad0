"What nbdev's documentation needs of this project: `[tool.nbdev]` in pyproject.toml names both, `tools/docs.py` puts them on the path."
import ast
import dataclasses
from importlib import import_module
from fastcore.docments import docments
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.showdoc import BasicMarkdownRenderer

class Renderer(BasicMarkdownRenderer):
    "Documents the library's object instead of the cell's, which has no file: so fields keep their comments, inherited ones too, and types their module"
    def __init__(self, sym, name=None, title_level=3):
        super().__init__(sym := exported(sym), name=name, title_level=title_level)
        if not dataclasses.is_dataclass(sym): return
        for base in sym.__mro__[1:]:
            if not dataclasses.is_dataclass(base): continue
            for field, comment in docments(base).items():
                parameter = self.dm.dm.get(field)
                if parameter and not parameter['docment']: parameter['docment'] = comment
        if self.docs.startswith(f'{sym.__name__}('): self.docs = '' # dataclasses write their signature there
    def _repr_markdown_(self):
        if get_config().git_url: return super()._repr_markdown_()
        return f"---\n\n{'#'*self.title_level} {self.nm}\n\n" + super(BasicMarkdownRenderer, self)._repr_markdown_()

def exported(sym):
    "The object that the library has under the name of `sym`"
    known = NbdevLookup()[getattr(sym, '__qualname__', '')]
    if not isinstance(known, tuple): return sym
    found = import_module(known[1].removesuffix('.py').replace('/', '.'))
    for part in sym.__qualname__.split('.'): found = getattr(found, part, None)
    return sym if found is None else found

def fold_imports(cell):
    "Fold a page's imports on the site"
    if cell.cell_type != 'code' or not cell.source or cell.source.lstrip().startswith(('%', '!')): return
    try: body = ast.parse(cell.source).body
    except SyntaxError: return
    if body and all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in body):
        cell.source = f'#| code-fold: true\n#| code-summary: Imports\n{cell.source}'
