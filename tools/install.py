"Makes `.venv` in the checkout and installs the package in it, editable and pinned: `python tools/install.py [dev | all]`, all being dev and JupyterLab. Standard library only."
import os, platform, shutil, subprocess, sys, venv
from pathlib import Path

root = Path(__file__).resolve().parents[1]
env = root/'.venv'
python = env/('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
pins = (root/'constraints.txt').read_text(encoding='utf-8').splitlines()
torch = next(o for o in pins if o.startswith('torch=='))

def run(*args): return subprocess.run([python, *args], cwd=root).returncode == 0

def has(module): return run('-c', f'import importlib.util as u, sys; sys.exit(not u.find_spec("{module}"))')

def pip(*args):
    if not run('-m', 'pip', '--disable-pip-version-check', 'install', '-q', *args):
        sys.exit('pip could not install this; what stands above says why. The same make again goes on from here.')

def make_env():
    "Creates `.venv`, or keeps the one that is there"
    if python.exists() and has('pip'): return
    try: venv.create(env, with_pip=True)
    except subprocess.CalledProcessError:
        sys.exit('Python cannot make an environment with pip here. On Debian and Ubuntu: apt install python3-venv')

def main():
    if sys.version_info < (3, 11, 4): # tarfile's filters
        sys.exit(f'Python 3.11.4 or later is needed, this is {platform.python_version()}: make PYTHON=/path/to/python3.11')
    extra = sys.argv[1] if len(sys.argv) > 1 else ''
    extras = 'dev,notebook' if extra == 'all' else extra
    make_env()
    if not has('torch'):
        if platform.system() == 'Linux' and not shutil.which('nvidia-smi'):
            print('No NVIDIA GPU is in sight. The default torch for Linux brings several GB of CUDA with it, the CPU build does not.\n'
                  'To have that one instead, stop now (Ctrl-C), give the following command, then the same make again:\n'
                  f'    .venv/bin/pip install {torch} --index-url https://download.pytorch.org/whl/cpu', flush=True)
        print(f'Installing {torch}', flush=True)
        pip(torch)
    print('Installing the rest', flush=True)
    pip('-c', 'constraints.txt', '-e', f'.[{extras}]' if extras else '.')
    (env/f'{extra or "core"}.stamp').touch()

if __name__ == '__main__': main()
