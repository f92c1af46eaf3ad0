"""Make every stored picture and figure that depends on the demo's trained weights again, from a finished run of the recipe `demo`.

    python tools/figures.py --run-dir runs/demo
    python tools/figures.py --run-dir runs/demo --only samples_over_time.png

`make figures` trains that run first. A figure is a function from the run's folder and the file to write, and a line in FIGURES."""
import argparse, shutil, sys, tempfile
from dataclasses import replace
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root))

def demo_grid(run_dir, out):
    "The grid that `t2i demo` draws"
    shutil.copy(run_dir/'grid.png', out)

def demo_evaluation(run_dir, out):
    "What `t2i demo` measures"
    shutil.copy(run_dir/'evaluation.json', out)

def early_grids(run_dir, marks, grid_of):
    "Sample grids and losses of a run's beginning: every draw is keyed, so its first images can be trained again, and give the same weights"
    from t2i_nb.recipe import load_components, prepare_data
    from t2i_nb.run import run_config
    from t2i_nb.train import averaged, train_steps
    cfg, left, found, losses = run_config(run_dir), sorted(marks), {}, []
    models = load_components(cfg)
    grid = grid_of(cfg, models)
    data, val = (prepare_data(cfg, models, split, run_dir/'cache') for split in ('train', 'validation'))
    quick = replace(cfg, train=replace(cfg.train, validation_images=0, checkpoint_images=0))
    with tempfile.TemporaryDirectory() as tmp:
        for state in train_steps(quick, Path(tmp)/'run', models, data, val):
            losses.append((state.images_seen, state.loss_ema))
            while left and state.images_seen >= left[0]:
                found[left.pop(0)] = grid(averaged(state.unet, state.ema), state.images_seen)
            if not left: return found, losses, lambda unet: grid(unet, 0)

def samples_over_time(run_dir, out, marks=(1_000, 5_000)):
    "The loss of a run, and the same prompts and noise drawn early, later and at its end"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from t2i_nb.checkpoint import read_metrics
    from t2i_nb.evaluation import score_prompts
    from t2i_nb.pipeline import grid_maker, load_pipeline
    rows = read_metrics(run_dir)
    grids, early, draw = early_grids(run_dir, marks, lambda cfg, models: grid_maker(cfg, models, score_prompts(8, True, purpose='grid')[0]))
    grids[rows[-1]['images_seen']] = draw(load_pipeline(run_dir).unet)
    fig, axes = plt.subplots(1 + len(grids), figsize=(7.4, 2 + 1.1*len(grids)), dpi=100, height_ratios=[2] + [1]*len(grids), layout='constrained')
    later = [(r['images_seen'], r['loss']) for r in rows if 'loss' in r and r['images_seen'] > early[-1][0]]
    axes[0].plot(*zip(*early, *later), color='0.65', lw=1, label='training')
    axes[0].plot(*zip(*[(r['images_seen'], r['validation_loss']) for r in rows if 'validation_loss' in r]), color='0', marker='o', ms=4, label='validation')
    for n in grids: axes[0].axvline(n, color='0.3', lw=.8, ls=':')
    axes[0].set(xlabel='images seen', ylabel='loss', xlim=(0, rows[-1]['images_seen']*1.01))
    axes[0].legend(fontsize=8)
    for ax, (n, image) in zip(axes[1:], sorted(grids.items())):
        ax.imshow(image)
        ax.set_title(f'after {n:,} images', fontsize=8, loc='left', pad=3)
        ax.set_axis_off()
    fig.savefig(out)
    plt.close(fig)

def favicon(run_dir, out):
    "A drawn flower, as the site's icon"
    import random
    from t2i_nb.data import draw_flower
    attributes = dict(colour='red', shape='round', count='6', centre='yellow', background='meadow', size='large')
    draw_flower(attributes, random.Random(0)).save(out)

def playground(run_dir, out):
    "The panel in a real JupyterLab after a few drawings; needs JupyterLab and Chromium"
    import base64, time
    sys.path.insert(0, str(root/'tests'))
    import test_playground as lab
    jupyter, chromium = lab.jupyter_lab(), lab.chromium()
    if not (jupyter and chromium): return print(f'{out} is left as it is: JupyterLab and Chromium are needed')
    with tempfile.TemporaryDirectory() as tmp:
        cell = f'from t2i_nb.run import open_playground\nopen_playground({str(Path(run_dir).resolve())!r})'
        process, address = lab.start_lab(jupyter, Path(tmp)/'lab', cell)
        browser = lab.Browser(chromium, Path(tmp)/'profile')
        try:
            lab.open_panel(browser, address, 180)
            browser.choose('examples', 'a small blue flower with twelve pointed petals')
            browser.choose('images', '4')
            browser.click('button("Generate")')
            browser.until('says("ms: text") && thumbs().length == 4', 180)
            browser.click('thumbs().at(-1)')
            browser.until('says("settings of image 1")')
            browser.click('button("Compare")')
            browser.choose('images', '1')
            browser.type('steps', '4')
            browser.click('button("Generate")')
            browser.until('thumbs().length == 5 && says("ms: text")', 120)
            browser.js('jupyterapp.shell.collapseLeft()')
            browser.send('Emulation.setDeviceMetricsOverride', width=1100, height=1000, deviceScaleFactor=1, mobile=False)
            time.sleep(2)
            x, y, w, h = browser.js('(r => [r.x, r.y, r.width, r.height])(document.querySelector(".jp-OutputArea-output").getBoundingClientRect())')
            shot = browser.send('Page.captureScreenshot', format='png', clip=dict(x=x, y=y, width=w, height=h, scale=1))
            out.write_bytes(base64.b64decode(shot['data']))
        finally:
            browser.close()
            lab.stop(process)

FIGURES = {'favicon.png': favicon, 'demo_grid.png': demo_grid, 'demo_evaluation.json': demo_evaluation, 'samples_over_time.png': samples_over_time,
    'playground.png': playground}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run-dir', type=Path, default=Path('runs/demo'), help='a finished run of `t2i demo`')
    p.add_argument('--out', type=Path, default=root/'nbs'/'images', help='folder of the figures')
    p.add_argument('--only', nargs='+', choices=FIGURES, default=[*FIGURES])
    args = p.parse_args()
    if not (args.run_dir/'pipeline'/'model_index.json').is_file(): sys.exit(f'{args.run_dir} holds no finished run; make one with: t2i demo --run-dir {args.run_dir}')
    for name in args.only:
        FIGURES[name](args.run_dir, args.out/name)
        print(args.out/name)

if __name__ == '__main__': main()
