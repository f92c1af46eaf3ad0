"""What interruptions cost: two processes with ZeRO-2 that are interrupted five times, and a run that goes on with two, one and two processes, each
beside the same run undisturbed.

    python bench/drill.py

Needs DeepSpeed. `t2i drill` on the smallest toy flowers: one torchrun for each of two "machines" on this one, gloo between them. Writes
bench/results/drill.json."""
import datetime, json, sys, tempfile
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root))

SMALL = ['data.n_images=64', 'unet.width=16', 'unet.attention_size=8', 'unet.overrides={"block_out_channels": [8, 16]}', 'train.global_batch=8',
         'train.micro_batch=0', 'train.warmup_images=80', 'train.zero_stage=2', 'sample.num_inference_steps=2']

def main():
    import deepspeed, torch
    from t2i_nb.core import apply_overrides, find_recipe, load_config
    from t2i_nb.cost import EXPECTED, START, find_instance
    from t2i_nb.drill import run_drill, timeline
    from t2i_nb.evaluation import describe_device
    from t2i_nb.recipe import RunConfig
    cfg, rows = apply_overrides(load_config(find_recipe('demo'), RunConfig), SMALL), []
    for name, interruptions, nodes in (('five interruptions of two machines, ZeRO-2', 5, 2), ('two machines, then one, then two, ZeRO-2', 2, [2, 1, 2])):
        with tempfile.TemporaryDirectory() as folder: report = run_drill(cfg, Path(folder)/'drill', interruptions, nodes,
            price=find_instance('ml.g4dn.xlarge').dollars*EXPECTED.spot,
            start_minutes=sum(START.values()), log=lambda t: print(t, flush=True))
        theirs, ours = report['seconds']
        rows.append(dict(name=f'seconds of a run: {name}', ours=ours, theirs=theirs, ratio=theirs/ours, unit='seconds', better='lower',
            device=describe_device('cpu'), versions=dict(torch=torch.__version__, deepspeed=deepspeed.__version__),
            date=datetime.date.today().isoformat(), report=report))
        print('\n'.join(timeline(report)), flush=True)
    (root/'bench'/'results'/'drill.json').write_text(json.dumps(rows, indent=1) + '\n')

if __name__ == '__main__': main()
