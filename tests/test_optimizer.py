"Muon, AdamW, the training step, ranks."
import argparse
import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import plumbing.fitting
import plumbing.log
import plumbing.optimizer
import plumbing.world
import train_base
from model import VLM, preset
from plumbing.optimizer import Optimizer
from plumbing.weights import read_safetensors, write_safetensors
from tests.helpers import SEQ_LEN, batch_of, documents, fails, far, setup, tiny_vlm, tokenizer

pytest_plugins = ["tests.helpers"]  # its fixtures

STAGES = {"base": ["decoder"], "align": ["bridge", "vit"], "align_pretrained": ["bridge"],
          "sft": ["bridge", "decoder", "vit"], "sft_pretrained": ["bridge", "decoder"]}


def step(vlm: VLM, batches: list[dict], optimizer) -> float:
    return train_base.train_step(vlm, batches, train_base.count_supervised(batches, setup()), optimizer, setup(), 1.0)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parts_stay_and_trained_parts_learn(stage, kind):
    vlm = tiny_vlm(tied=False)
    params = train_base.freeze_all_but(vlm, STAGES[stage])
    assert {name.split(".")[0].replace("gpt", "decoder") for name in params} == set(STAGES[stage])
    before = {name: p.detach().clone() for name, p in vlm.named_parameters()}
    step(vlm, [batch_of(vlm, documents(vlm))], Optimizer(params, kind, 1e-3))
    for name, p in vlm.named_parameters():
        assert torch.equal(p, before[name]) == (name not in params), name
        assert p.grad is None  # a frozen one has none at all, a trained one's is used up


def test_micro_batches_give_the_gradient_of_one_large_batch():
    vlm = tiny_vlm()
    docs = documents(vlm)
    parts = docs[:1], docs[1:2], docs[2:3], docs[3:]  # very unequal in tokens
    batches = [batch_of(vlm, part, rows=1) for part in parts]
    shift = list(itertools.accumulate((0 if b["pixels"] is None else len(b["pixels"]) for b in batches), initial=0))
    plain = ("ids", "targets", "positions", "document_ids", "loss_weights")
    large = {name: torch.cat([b[name] for b in batches]) for name in plain}
    for name in ("image_positions", "supervised"):
        large[name] = torch.cat([b[name] + i * SEQ_LEN for i, b in enumerate(batches)])
    large["cu_seqlens"], large["records"] = torch.zeros(0), []  # for a GPU; here the mask is used
    large["pixels"] = torch.cat([b["pixels"] for b in batches if b["pixels"] is not None])
    large["image_index"] = torch.cat([b["image_index"] + n for b, n in zip(batches, shift)])
    params, gradients, losses = train_base.freeze_all_but(vlm, ["vit", "bridge", "decoder"]), [], []
    keep = SimpleNamespace(step=lambda scale: None, params=params)  # leaves the gradients where they are
    for parts in (batches, [large]):
        vlm.zero_grad()
        losses.append(step(vlm, parts, keep))
        gradients.append(torch.cat([p.grad.flatten() for p in params.values()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert far(*gradients) < 1e-6


def test_loss_falls_on_a_batch_seen_again_and_again():
    vlm = tiny_vlm()
    params, batch = train_base.freeze_all_but(vlm, ["vit", "bridge", "decoder"]), batch_of(vlm, documents(vlm))
    optimizer = Optimizer(params, "muon", 5e-3)
    losses = [step(vlm, [batch], optimizer) for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("shape", [(3, 24, 60), (3, 60, 24), (2, 20, 20)], ids=["wide", "tall", "square"])
def test_orthogonalize_makes_all_directions_about_equally_strong(shape):
    torch.manual_seed(0)
    g = torch.randn(shape) * torch.tensor([1e-4, 1.0, 1e3])[:shape[0], None, None]  # a gradient's size must not matter
    out = plumbing.optimizer.orthogonalize(g)
    assert out.shape == g.shape and out.dtype == g.dtype
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    values = torch.linalg.svdvals(out)
    strong = s > 0.02 * s[:, :1]  # three rounds do not lift the very weakest all the way
    assert (values <= 1.88).all() and (values.sort(-1).values[strong.sort(-1).values] > 0.18).all()
    assert F.cosine_similarity(out.flatten(1), (u @ v).flatten(1)).min() > 0.85  # the same directions, not just any


def test_a_rounds_coefficients_hold_what_the_round_before_gives():
    # The largest singular value may be 1.02 times too large, as bfloat16 has 8 bits; beyond that it would explode.
    values = torch.linspace(0.003, 1, 10_000, dtype=torch.float64)
    for a, b, c in plumbing.optimizer.ROUNDS:
        values = a * values + b * values ** 3 + c * values ** 5
    assert 0.18 < values.min() and values.max() < 1.88


def test_matrices_shrink_a_little_each_step_and_nothing_else_does():
    p, norm = torch.nn.Parameter(torch.full((4, 4), 2.0)), torch.nn.Parameter(torch.full((4,), 2.0))
    p.grad, norm.grad = torch.zeros(4, 4), torch.zeros(4)
    Optimizer({"blocks.0.mlp.down.weight": p, "norm.weight": norm}, "muon", 0.01).step(0.5)
    decay = 0.01 * 0.5 * plumbing.optimizer.WEIGHT_DECAY
    assert torch.allclose(p, torch.full((4, 4), 2 * (1 - decay))) and (norm == 2).all()


def test_a_pretrained_vit_stays_frozen_whatever_a_chapter_asks_for():
    vlm = tiny_vlm()
    assert any(name.startswith("vit.") for name in train_base.freeze_all_but(vlm, ["bridge", "decoder", "vit"]))
    vlm.config.pretrained_vision = True
    params = train_base.freeze_all_but(vlm, ["bridge", "decoder", "vit"])
    assert params and not any(name.startswith("vit.") for name in params)
    assert not vlm.vit.patch.weight.requires_grad


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_bridge_and_vit_may_have_rates_of_their_own_or_stay_frozen(kind):
    moved = {}
    for name, rates in (("one", {}), ("own", {"lr_bridge": 4e-3, "lr_vit": 1e-4}), ("frozen", {"lr_bridge": 0.0})):
        vlm, flags = tiny_vlm(), argparse.Namespace(**{"lr_bridge": -1.0, "lr_vit": -1.0} | rates)
        vlm.config.pretrained_vision = "released" * (name == "own")  # its rate is given, so it is trained
        params = train_base.freeze_all_but(vlm, ["bridge", "decoder", "vit"], flags)
        before = {n: p.detach().clone() for n, p in vlm.named_parameters()}
        optimizer = Optimizer(params, kind, 1e-3, bridge=flags.lr_bridge, vit=flags.lr_vit)
        step(vlm, [batch_of(vlm, documents(vlm))], optimizer)
        moved[name] = {n: (p.detach() - before[n]) for n, p in vlm.named_parameters()}
    for n, update in moved["one"].items():
        times = 4.0 if n.startswith("bridge.") else 0.1 if n.startswith("vit.") else 1.0
        assert torch.allclose(moved["own"][n], times * update, rtol=1e-4, atol=4e-7), n
        assert moved["frozen"][n].any() == (update.any() and not n.startswith("bridge.")), n
    vlm.config.pretrained_vision = "released"
    flags = argparse.Namespace(lr_bridge=0.0, lr_vit=-1.0)
    assert fails(lambda: train_base.freeze_all_but(vlm, ["bridge", "vit"], flags), "--lr_bridge")


def test_query_key_and_value_get_updates_of_one_size_whatever_their_gradients():
    torch.manual_seed(0)
    # 8 query rows, 4 key rows and 4 value rows of width 8, in one matrix; the value's gradient is 10,000 times larger
    p = torch.nn.Parameter(torch.zeros(16, 8))
    p.grad = torch.randn(16, 8) * torch.tensor([1e-4] * 12 + [1.0] * 4)[:, None]
    out = torch.nn.Parameter(torch.zeros(8, 8))  # it reads the 8 query channels
    params = {"blocks.0.attention.qkv.weight": p, "blocks.0.attention.out.weight": out}
    Optimizer(params, "muon", 1.0).step(1.0)
    query, key, value = (part.detach().square().mean().sqrt() for part in p.split([8, 4, 4]))
    assert 0.7 < key / value < 1.4 and 0.7 < query / value < 2  # a square matrix of rank 8 has larger entries
    assert plumbing.optimizer.row_blocks("blocks.0.attention.qkv.weight", params) == [8, 4, 4]
    assert plumbing.optimizer.row_blocks("blocks.0.attention.out.weight", params) == [8]


@pytest.mark.parametrize("qwen3", [False, True], ids=["qwen2", "qwen3"])
def test_query_key_and_value_are_cut_apart_where_their_heads_end(qwen3):
    params = dict(tiny_vlm(qwen3=qwen3).named_parameters())  # Qwen3's 4 heads of 12 channels are wider than H = 32
    assert plumbing.optimizer.row_blocks("gpt.blocks.1.attention.qkv.weight", params) == (
        [48, 24, 24] if qwen3 else [32, 16, 16])
    assert plumbing.optimizer.row_blocks("vit.blocks.1.qkv.weight", params) == [32, 32, 32]


def test_the_batch_that_chapter_4_tries_memory_with_is_full():
    import train_rl
    vlm, flags = tiny_vlm(), argparse.Namespace(seq_len=256, max_new_tokens=12)
    batch = train_rl.full_batch(3, plumbing.world.World("exam"), flags, vlm, tokenizer(), data.BadRecords(0))
    assert batch["ids"].shape == (3, 256) and (batch["document_ids"] > 0).float().mean() > 0.6  # bytes: long questions
    documents = len(batch["image_index"])
    assert documents >= 3 and len(batch["pixels"]) == documents  # each with a picture of its own
    assert len(batch["supervised"]) == documents * 12 == (batch["targets"] >= 0).sum()


def test_the_gain_of_questions_asked_twice_and_its_interval():
    import train_rl
    r = train_rl.gain([0, 0, 1, 1] * 100, [1, 0, 1, 1] * 100)
    assert (r["n"], r["before"], r["accuracy"]) == (400, 0.5, 0.75) and r["gain"] == 0.25
    low, high = r["gain_ci95"]
    assert low + high == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 400) ** 0.5, rel=0.01)
    # Before and after being right independently of each other, the same accuracies would give a wider interval.
    assert r["gain_ci95"][0] > 0 and train_rl.gain([0, 0, 1, 1] * 5, [1, 0, 1, 0] * 5)["gain_ci95"][0] < 0


def test_rehearsal_gives_every_kind_of_question_its_share():
    import train_rl
    kinds = Counter(train_rl.with_rehearsal(["number", "relation"], 0.25))
    assert kinds == {kind: 16 if kind in ("number", "relation") else 1 for kind in plumbing.world.QUESTIONS}  # 10 of 40
    assert train_rl.with_rehearsal(["number"], 0) == ["number"] and train_rl.with_rehearsal([], 0.25) == []


def test_one_ranks_ctrl_c_is_heard_by_all():
    interrupt = plumbing.log.Interrupt()
    interrupt.close()
    setup = argparse.Namespace(loaders=[], failure=None, all_reduce=lambda value: value + 0.0)
    assert not interrupt.requested(setup)
    setup.all_reduce = lambda value: value + 1.0
    assert interrupt.requested(setup) and interrupt.interrupted


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_an_optimizer_that_was_saved_goes_on_bit_for_bit(tmp_path, kind):
    one = tiny_vlm()
    params, batch = train_base.freeze_all_but(one, ["bridge", "decoder"]), batch_of(one, documents(one))
    optimizer = Optimizer(params, kind, 3e-3)
    for _ in range(2):
        step(one, [batch], optimizer)
    write_safetensors(optimizer.state()[0], tmp_path / "o.safetensors")
    two = tiny_vlm(seed=9)
    two.load_state_dict(one.state_dict())
    params_two = train_base.freeze_all_but(two, ["bridge", "decoder"])
    again = Optimizer(params_two, kind, 3e-3, read_safetensors(tmp_path / "o.safetensors"))
    for _ in range(3):
        assert step(one, [batch], optimizer) == step(two, [batch], again)
    assert all(torch.equal(p, params_two[name]) for name, p in params.items())


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_each_rank_stores_master_weights_and_moments_of_its_share_alone(kind, monkeypatch):
    vlm, ranks, owned = tiny_vlm(), 3, []
    params = train_base.freeze_all_but(vlm, ["bridge", "decoder", "vit"])
    monkeypatch.setattr(plumbing.optimizer.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(plumbing.optimizer.dist, "get_world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(plumbing.optimizer.dist, "get_rank", lambda: rank)
        optimizer = Optimizer(params, kind, 1e-3)
        assert optimizer.master_weights.keys() == optimizer.moments.keys()
        for group in optimizer.adamw.param_groups:
            assert {id(p) for p in group["params"]} <= {id(p) for p in optimizer.master_weights.values()}
        owned.append(set(optimizer.master_weights))
    assert set.union(*owned) == set(params) and sum(map(len, owned)) == len(params)  # none twice, none forgotten
    sizes = [sum(params[name].numel() for name in names) for names in owned]
    assert max(sizes) - min(sizes) <= max(p.numel() for p in params.values())


def test_a_parameter_that_no_row_used_stays_where_it_is():
    vlm = tiny_vlm()
    params = train_base.freeze_all_but(vlm, ["bridge", "decoder"])
    optimizer, batch = Optimizer(params, "muon", 1e-3), batch_of(vlm, documents(vlm))
    step(vlm, [batch], optimizer)  # now the bridge's moments would move it on, were they asked
    before = {name: p.detach().clone() for name, p in params.items()}
    step(vlm, [batch_of(vlm, [doc for doc in documents(vlm) if not doc.slots])], optimizer)
    for name, p in params.items():
        assert torch.equal(p, before[name]) == name.startswith("bridge."), name


def test_a_micro_batch_has_as_many_rows_as_fit_into_a_gpus_memory(monkeypatch, capsys):
    fits, tried = 6, []

    def forward(rows):
        tried.append(rows)
        if rows > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros((), requires_grad=True).sum()
    on_a_gpu = setup()
    on_a_gpu.device = torch.device("cuda")
    on_a_gpu.to_device = lambda batch: batch
    for name, value in (("reset_peak_memory_stats", None), ("empty_cache", None), ("mem_get_info", (1, 100)),
                        ("max_memory_allocated", 50)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    model_of = lambda: type("VLM", (), {"__call__": lambda self, rows: forward(rows), "parameters": lambda self: []})()
    assert plumbing.fitting.largest_micro_batch(model_of(), on_a_gpu, 24, lambda rows: rows) == 6
    assert tried == [24, 12, 8, 6, 6]  # only divisors; twice where gradients add up over several passes
    assert "--micro_batch_size=6" in capsys.readouterr().err
    fits = 0
    with pytest.raises(ValueError, match="not even one row.*--activation_checkpointing"):
        plumbing.fitting.largest_micro_batch(model_of(), on_a_gpu, 4, lambda rows: rows)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 95)  # it went well, but only just
    fits = 24
    with pytest.raises(ValueError):
        plumbing.fitting.largest_micro_batch(model_of(), on_a_gpu, 4, lambda rows: rows)
    assert plumbing.fitting.largest_micro_batch(None, setup(), 24, None) == 24  # nothing is tried on a CPU


@pytest.mark.parametrize("spoil", [lambda moments, name: moments.pop(name),
                                   lambda moments, name: moments.update({name: torch.zeros(3)})])
def test_moments_of_another_version_are_refused_in_one_line(spoil):
    vlm = tiny_vlm()
    params = train_base.freeze_all_but(vlm, ["bridge"])
    moments, name = Optimizer(params, "adamw", 1e-3).state()[0], "bridge.fc1.weight.exp_avg"
    assert name in moments
    spoil(moments, name)
    assert fails(lambda: Optimizer(params, "adamw", 1e-3, moments), name, "without --resume")


def test_learning_rate_rises_stays_and_falls_to_zero():
    flags = argparse.Namespace(steps=100, warmup=0.1, cooldown=0.5)
    scales = [plumbing.optimizer.lr_scale(i, flags) for i in range(101)]
    assert scales[0] == 0.1 and scales[9] == 1.0 and scales[50] == 1.0 and scales[75] == 0.5 and scales[100] == 0.0
    assert max(scales) == 1.0 and scales[99] > 0


def newton_schulz(g: torch.Tensor) -> torch.Tensor:
    "orthogonalize by a singular value decomposition: each value v, of length 1 in all, -> p(v), three times."
    u, v, wt = torch.linalg.svd(g.double(), full_matrices=False)
    v = v / (1.02 * v.norm())
    for a, b, c in ((8.287212, -23.595887, 17.300387), (4.107059, -2.947850, 0.544843),
                    (3.948691, -2.908902, 0.551819)):
        v = a * v + b * v ** 3 + c * v ** 5
    return u @ torch.diag(v) @ wt


def test_two_muon_steps_on_a_2x3_matrix():
    start = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    one, two = torch.tensor([[1.0, 0, 2], [0, 3, 1]]), torch.tensor([[-2.0, 1, 0], [1, 1, 1]])
    p, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = Optimizer({"mlp.weight": p, "out.weight": other}, "muon", 0.1)
    p.grad, other.grad = one.clone(), two.clone()  # matrices of one shape are computed together
    optimizer.step(0.5)
    # Momentum 0.8: the mean is 0.2 one, and Nesterov's look ahead 0.2 one + 0.8 * 0.2 one, which has one's direction.
    # The learning rate is 0.1 * 0.5; the entries of the update are 0.2 in root mean square: times 0.2 sqrt(3).
    # Before it, the matrix shrinks by 0.1 (the weight decay) of the learning rate.
    expected = start * (1 - 0.05 * 0.1) - 0.05 * 0.2 * 3 ** 0.5 * newton_schulz(one)
    assert torch.allclose(p, expected.float(), atol=1e-5)
    assert torch.allclose(other, (-0.05 * 0.2 * 3 ** 0.5 * newton_schulz(two)).float(), atol=1e-5)
    p.grad = two.clone()
    optimizer.step(1.0)
    mean = 0.8 * 0.2 * one + 0.2 * two
    expected = expected * (1 - 0.1 * 0.1) - 0.1 * 0.2 * 3 ** 0.5 * newton_schulz(0.2 * two + 0.8 * mean)
    assert torch.allclose(p, expected.float(), atol=1e-5)


def test_two_adamw_steps_by_the_formula():
    # betas 0.9 and 0.95, eps 1e-8, no weight decay. After one step m / (1 - 0.9) = g and v / (1 - 0.95) = g^2: every
    # entry moves by the learning rate. What has no gradient stays, however large it is.
    start, one, two = torch.tensor([1.0, -2, 300]), torch.tensor([0.1, -5, 0]), torch.tensor([0.3, 1, 0])
    p = torch.nn.Parameter(start.clone())
    optimizer = Optimizer({"norm.weight": p}, "muon", 0.01)
    p.grad = one.clone()
    optimizer.step(1.0)
    assert p.tolist() == pytest.approx([0.99, -1.99, 300])
    p.grad = two.clone()
    optimizer.step(0.5)
    m, v = (0.9 * 0.1 * one + 0.1 * two) / (1 - 0.9 ** 2), (0.95 * 0.05 * one ** 2 + 0.05 * two ** 2) / (1 - 0.95 ** 2)
    expected = torch.tensor([0.99, -1.99, 300]) - 0.005 * m / (v.sqrt() + 1e-8)
    assert torch.allclose(p, expected, rtol=1e-6)


def test_muon_is_for_matrices_and_adamw_for_tables_and_vectors():
    vlm = VLM(preset("tiny"))
    optimizer = Optimizer(dict(vlm.named_parameters()), "muon", 0.1)
    adamw = {name for name, keys in optimizer.keys.items() if keys == ("step", "exp_avg", "exp_avg_sq")}
    tables = {"gpt.embed.weight", "vit.position", "bridge.perceiver.latents"}
    assert adamw == tables | {name for name, p in vlm.named_parameters() if p.ndim < 2}
    assert all(keys == ("muon",) for name, keys in optimizer.keys.items() if name not in adamw)


@pytest.mark.parametrize("name, shape", [("mlp.weight", (4, 4)), ("norm.weight", (4,))], ids=["muon", "adamw"])
def test_bfloat16_weights_follow_their_float32_masters_through_steps_too_small_for_them(name, shape):
    # Near 1, bfloat16 has 1, 0.996, 0.992, ...: a step of at most 0.0005 would be rounded away, a hundred are not.
    p = torch.nn.Parameter(torch.ones(shape))
    optimizer = Optimizer({name: p}, "muon", 5e-4)
    p.data = p.data.bfloat16()  # as vlm.to(torch.bfloat16) does, after the optimizer has taken the float32 weights
    for _ in range(100):
        p.grad = torch.eye(4).bfloat16() if p.ndim == 2 else torch.ones(4).bfloat16()
        optimizer.step(1.0)
        master = optimizer.master_weights[name]
        assert master.dtype == torch.float32 and torch.equal(p, master.bfloat16())
    moved = 1 - p.float().diagonal() if p.ndim == 2 else 1 - p.float()
    assert (moved > 0.01).all()
