"The package's metadata, read from settings.ini; the static minimum stands in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_namespace_packages, setup

root = Path(__file__).parent
cfg = ConfigParser(interpolation=None)
cfg.read(root/'settings.ini', encoding='utf-8')
meta, deps = cfg['metadata'], cfg['dependencies']

def lines(text): return [o.strip() for o in text.splitlines() if o.strip()]

extras = {k: lines(v) for k, v in cfg['extras'].items()}
extras['dev'] = lines(deps['dev_requirements'])

setup(version=meta['version'], author=meta['author'], license=meta['license'],
    keywords=meta['keywords'].split(), classifiers=lines(meta['classifiers']),
    long_description=(root/'README.md').read_text(encoding='utf-8') if (root/'README.md').exists() else '',
    long_description_content_type='text/markdown',
    packages=find_namespace_packages(include=['t2i_nb', 't2i_nb.*'], exclude=['*.__pycache__']), # recipes and weights have no __init__.py
    package_data={'t2i_nb': meta.parser['package_data']['patterns'].split()},
    install_requires=lines(deps['requirements']), extras_require=extras,
    entry_points={k: lines(v) for k, v in cfg['entry_points'].items()})
