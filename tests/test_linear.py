"Products in 8 bits, LoRA."
import pytest
import torch

import extras.export
import model
import plumbing.checkpoints
import plumbing.linear
import plumbing.optimizer
import train_base
from model import GPT
from tests.helpers import HERE, QUICK, batch_of, documents, far, one_line, run, setup, shake, tiny_vlm, tokenizer

pytest_plugins = ["tests.helpers"]  # its fixtures


# ----------------------------------------------------------------------------------------------------------------------
# model.py: products in 8 bits

@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])  # bfloat16 has them all; 8 bits only beside a scale
def test_products_in_float8_are_near_the_exact_ones_whatever_the_size(size):
    torch.manual_seed(0)
    x, w, grad = (torch.randn(*shape, dtype=torch.bfloat16) * size for shape in ((48, 64), (32, 64), (48, 32)))
    x.requires_grad_(), w.requires_grad_()
    y = plumbing.linear.Float8Product.apply(x, w)
    y.backward(grad)
    # A fraction of 3 bits is off by up to 1/16, of 2 bits by up to 1/8; sums of many are off by less.
    for ours, exact, most in ((y, x.float() @ w.float().t(), 0.05), (x.grad, grad.float() @ w.float(), 0.08),
                              (w.grad, grad.float().t() @ x.float(), 0.08)):
        assert ours.dtype == torch.bfloat16 and far(ours.detach().float(), exact.detach()) < most
    zeros = plumbing.linear.Float8Product.apply(torch.zeros(16, 64, dtype=torch.bfloat16), w)
    assert (zeros == 0).all()  # not 0 / 0


@pytest.mark.parametrize("qwen3", [False, True], ids=["qwen2", "qwen3"])
def test_float8_is_for_the_decoders_training_alone(qwen3):
    vlm = tiny_vlm(qwen3=qwen3).to(torch.bfloat16)
    x, linear = torch.randn(2, 8, 32, dtype=torch.bfloat16), vlm.gpt.blocks[0].attention.qkv
    exact = linear(x)
    vlm.gpt.set_float8(True)
    coarse = linear(x)
    assert coarse.shape == exact.shape and 0 < far(coarse.float(), exact.float()) < 0.1
    with torch.no_grad():  # evaluation and answers are in full precision
        assert torch.equal(linear(x), exact)
    changed = [name for name, module in vlm.named_modules() if getattr(module, "float8", False)]
    assert len(changed) == 4 * len(vlm.gpt.blocks) and all(name.startswith("gpt.blocks.") for name in changed)
    vlm.gpt.set_float8(False)
    assert torch.equal(linear(x), exact)


# ----------------------------------------------------------------------------------------------------------------------
# model.py: LoRA and activation checkpointing

@pytest.mark.parametrize("qwen3", [False, True], ids=["qwen2", "qwen3"])
def test_lora_adds_nothing_at_first_and_then_learns_alone(qwen3):
    vlm = tiny_vlm(qwen3=qwen3)
    batch = batch_of(vlm, documents(vlm))
    before = vlm(batch).item()
    vlm.add_lora(4)
    assert vlm(batch).item() == before
    params = train_base.freeze_all_but(vlm, ["decoder"])
    assert params and all(".lora_" in name for name in params)
    assert sum(p.numel() for p in params.values()) == 4 * sum(
        sum(linear.weight.shape) for linear in vlm.modules() if isinstance(linear, plumbing.linear.LoRALinear))
    kept = {name: p.detach().clone() for name, p in vlm.named_parameters()}
    optimizer = plumbing.optimizer.Optimizer(params, "adamw", 0.01)
    for _ in range(2):  # a moves from the second step on: at first b, all zeros, hides it
        train_base.train_step(vlm, [batch], train_base.count_supervised([batch], setup()), optimizer, setup(), 1.0)
    for name, p in vlm.named_parameters():
        assert torch.equal(p, kept[name]) == (name not in params), name
    assert vlm(batch).item() < before


@pytest.mark.parametrize("qwen3", [False, True], ids=["qwen2", "qwen3"])
def test_lora_goes_through_checkpoints_and_is_merged_on_export(tmp_path, qwen3):
    vlm = tiny_vlm("mlp", qwen3=qwen3)
    vlm.add_lora(3)
    shake(vlm)
    plumbing.checkpoints.save_checkpoint(tmp_path / "lora", vlm, tokenizer())
    again, ids = model.load_checkpoint(tmp_path / "lora"), torch.arange(20)[None]
    assert again.config.lora_rank == 3 and torch.equal(again.gpt(ids), vlm.gpt(ids))
    extras.export.export(tmp_path / "hf", vlm, tokenizer(), decoder_only=True, dtype=torch.float32)
    plain = GPT.from_pretrained(tmp_path / "hf")
    assert not any(isinstance(m, plumbing.linear.LoRALinear) for m in plain.modules())
    assert far(plain(ids), vlm.gpt(ids)) < 1e-5


def test_activation_checkpointing_changes_no_gradient():
    vlm = tiny_vlm()
    batch, grads = batch_of(vlm, documents(vlm)), []
    for vlm.gpt.activation_checkpointing in (False, True):
        vlm.zero_grad()
        vlm(batch).backward()
        grads.append({name: p.grad.clone() for name, p in vlm.named_parameters()})
    assert max(far(grads[1][name], grads[0][name]) for name in grads[0]) < 1e-6


def test_lora_and_activation_checkpointing_through_the_chapters(trained, tmp_path):
    flags = ["--activation_checkpointing", f"--out_dir={tmp_path}"]
    start = run("train_sft", *QUICK, *flags, "--lora_rank=4", f"--init={trained[0] / 'tiny/align'}")
    assert start.code == 0, start.err
    before, after = (model.load_checkpoint(f) for f in (trained[0] / "tiny/align", tmp_path / "tiny/sft"))
    assert after.config.lora_rank == 4
    theirs = dict(after.gpt.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in before.gpt.named_parameters())
    assert any(theirs[name].abs().max() > 0 for name in theirs if name.endswith("lora_b"))
    # The next chapter goes on with them, unasked; another rank is refused; a picture is answered.
    assert run("train_rl", *QUICK, *flags).code == 0
    assert model.load_checkpoint(tmp_path / "tiny/rl").config.lora_rank == 4
    one_line(run("train_rl", *QUICK, *flags, "--lora_rank=8"), "--lora_rank=8", "4")
    ran = run("sample", f"--out_dir={tmp_path}", f"--image={HERE / 'cat.jpg'}", "--device=cpu", "--max_new_tokens=2")
    assert ran.code == 0
