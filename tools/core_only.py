"Imports modules as if nothing but the core requirements were installed: `python tools/core_only.py t2i_nb.data …`, each named with its seconds."
import importlib, importlib.metadata as md, re, sys, time

def distribution_name(requirement): return re.sub(r'[-_.]+', '-', re.match(r'[\w.-]+', requirement)[0]).lower()

def core_distributions(name='t2i_nb'):
    "`name` and everything it needs, extras left out"
    todo, seen = [distribution_name(name)], set()
    while todo:
        if (o := todo.pop()) in seen: continue
        seen.add(o)
        try: requires = md.requires(o) or []
        except md.PackageNotFoundError: continue
        todo += [distribution_name(r) for r in requires if 'extra ==' not in r]
    return seen

class Blocked:
    "A finder that does not see the `blocked` top-level modules"
    def __init__(self, finder, blocked): self.finder, self.blocked = finder, blocked
    def find_spec(self, name, path=None, target=None):
        return None if name.split('.')[0] in self.blocked else self.finder.find_spec(name, path, target)
    def __getattr__(self, name): return getattr(self.finder, name)

def block_all_but_core():
    "Hides every installed module outside the core requirements, and says which"
    core = core_distributions()
    blocked = {m for m, ds in md.packages_distributions().items() if not core & {distribution_name(d) for d in ds}}
    sys.meta_path[:] = [Blocked(o, blocked) for o in sys.meta_path]
    return blocked

if __name__ == '__main__':
    block_all_but_core()
    for o in sys.argv[1:]:
        start = time.perf_counter()
        importlib.import_module(o)
        print(f'{o}: {time.perf_counter() - start:.2f} s')
