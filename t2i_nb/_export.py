"What nbdev-export does beside a page's module: `#| script folder/name` writes the page once more, as a script with absolute imports."
from pathlib import Path

class ScriptProc:
    "A processor of nbdev, named as `export_procs` in pyproject.toml; paths are seen from there"
    def __init__(self, nb): self.nb = nb

    def _script_(self, cell, script):
        from nbdev.export import nb_export # nbdev is needed for exporting alone
        nb_export(self.nb.path_, lib_path=str(Path(script).parent), name=Path(script).name)
