"One step of an engine: the same whatever the threads, and never a damaging one"
import copy, math
import pytest, torch
from t2i_nb.core import InputError
from t2i_nb.engine import EngineConfig, LossScale, Ranks, TorchEngine, activation_bytes, choose_precision, make_engine, probe, zero_bytes, zero_config
from t2i_nb.unet import UNetConfig, build_unet

def small_unet(): return build_unet(UNetConfig(width=16, attention_size=8), 8, 4, 32, seed=0)

def part_of(unet):
    def part(k):
        draw = torch.Generator().manual_seed(k)
        x, text = (torch.randn(2, *shape, generator=draw) for shape in ((4, 8, 8), (8, 32)))
        return (unet(x, torch.full((2,), 500.), text).sample - x).square().mean()
    return part

def test_side_by_side_is_one_by_one():
    "Threads change nothing, and neither does a second time"
    threads, seen = torch.get_num_threads(), []
    try:
        for n in (4, 4, 1):
            torch.set_num_threads(n)
            unet = small_unet()
            engine = TorchEngine(EngineConfig(global_batch=8, micro_batch=2), unet)
            assert bool(engine.pool) == (n > 1)
            for _ in range(2): last = engine.step(part_of(unet), range(0, 8, 2))
            engine.close()
            seen.append((last, torch.cat([p.flatten() for p in unet.parameters()]).detach()))
    finally: torch.set_num_threads(threads)
    assert seen[0][0] == seen[1][0] and torch.equal(seen[0][1], seen[1][1])
    assert abs(seen[0][0][0] - seen[2][0][0]) < 1e-5 and (seen[0][1] - seen[2][1]).abs().max() < 1e-3

def test_refused_steps_change_nothing():
    unet = small_unet()
    engine, part, before = TorchEngine(EngineConfig(), unet), part_of(unet), copy.deepcopy(unet.state_dict())
    assert not engine.step(lambda k: part(k)*math.nan, range(1))[2] and not engine.step(part, range(1), limit=1e-9)[2]
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items()) and engine.moments() == {}
    assert engine.step(part, range(1))[2]

def test_loss_scale():
    scale, seen = LossScale(8.), []
    for finite in [False, *[True]*2000]: scale.note(finite); seen.append(scale.scale)
    assert (seen[0], seen[1999], seen[2000]) == (4, 4, 8)
    one = LossScale()
    for _ in range(3000): one.note(True)
    assert one == LossScale()

def test_moments_go_from_engine_to_engine():
    a, b = small_unet(), small_unet()
    first, second = TorchEngine(EngineConfig(), a), TorchEngine(EngineConfig(), b)
    first.step(part_of(a), range(1))
    second.restore(first.weights(), first.moments())
    for engine, unet in ((first, a), (second, b)): engine.step(part_of(unet), range(1))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))

def test_shares_of_a_batch():
    assert [Ranks(r, 4).share(96, 16) for r in range(4)] == [(96, 4), (100, 4), (104, 4), (108, 4)]
    alone = Ranks()
    assert (alone.from_first([1., 2.]), alone.agree('SIGTERM', ('SIGTERM',)), alone.agree('', ('SIGTERM',))) == ([1., 2.], 'SIGTERM', '')

def test_zero_shares_add_up():
    "What ZeRO shares out is whole again over all processes; one process has nothing to share"
    n = 1000
    assert sum(zero_bytes(n, 0, 4).values()) == 16*n and zero_bytes(n, 2, 1) == zero_bytes(n, 0, 1)
    assert [sum(zero_bytes(n, s, 2).values()) for s in (1, 2)] == [14*n, 12*n]
    config = zero_config(EngineConfig(zero_stage=2, global_batch=16, micro_batch=4), 2, n)
    assert (config['gradient_accumulation_steps'], config['zero_optimization']['stage'], config['zero_optimization']['reduce_bucket_size']) == (2, 2, n)

def test_choices(monkeypatch):
    "Device and precision"
    assert choose_precision(EngineConfig(device='cpu', precision='bfloat16'))[:2] == ('cpu', torch.bfloat16)
    monkeypatch.setattr('t2i_nb.engine.half_precision', lambda device: torch.bfloat16)
    for seconds, dtype in ((1., torch.float32), (.1, torch.bfloat16)):
        monkeypatch.setattr('t2i_nb.engine._matmul_seconds', lambda device, kind: seconds if kind == torch.bfloat16 else 1.)
        assert choose_precision(EngineConfig(device='cpu'))[1] == dtype
    if torch.cuda.is_available(): return
    with pytest.raises(InputError, match='sees no GPU'): choose_precision(EngineConfig(device='cuda'))

def test_checkpointing_is_asked_for():
    unet, said = small_unet(), []
    engine = make_engine(EngineConfig(gradient_checkpointing=True, zero_stage=1), unet, log=said.append)
    assert unet.is_gradient_checkpointing and type(engine) is TorchEngine and 'nothing to share out' in said[0]
    assert activation_bytes(unet.train(), lambda: part_of(unet)(0)) < activation_bytes(small_unet().train(), lambda: part_of(small_unet())(0))

def test_probe_leaves_the_network_alone():
    unet = small_unet()
    before = copy.deepcopy(unet.state_dict())
    found = probe(EngineConfig(global_batch=4, micro_batch=2), unet, part_of)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())
    assert found.flops > 1e6 and 0 < found.mfu < 2 and found.bytes > 20*sum(p.numel() for p in unet.parameters())
