"On a GPU: FlashAttention over documents, compiled parts, CUDA graphs. Skipped by name without one."
import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import data
import model
import plumbing.engine
from model import VLM
from tests.helpers import RAGGED, far, prompts, request, say, tiny_vlm

pytest_plugins = ["tests.helpers"]  # its fixtures

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
both = pytest.mark.parametrize("qwen3", [False, True], ids=["qwen2", "qwen3"])


def fresh(qwen3: bool) -> VLM:
    "tiny, or tiny with a Qwen3's decoder: 4 heads of 48 channels at a width of 128."
    config = model.preset("tiny")
    config.decoder = replace(config.decoder, **({"head_dim": 48, "attention_bias": False, "use_qk_norm": True}
                                                if qwen3 else {}))
    return VLM(config)


@on_gpu
@both
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_the_loss_and_its_gradients_are_those_of_the_cpu(compiled, qwen3):
    vlm = fresh(qwen3)
    docs = [data.Document(i, torch.randint(0, 1000, (n,), generator=torch.Generator().manual_seed(i)).tolist(),
                          [0] * (n // 2) + [1] * (n - n // 2), [1] * (n > 12), {"id": "", "images": [i] * (n > 12)})
            for i, n in enumerate((40, 30, 9, 25, 50, 12, 33))]
    batch = data.collate(*data.pack(docs, 2, 100, vlm.config.bridge.num_tokens)[:2], lambda source, record:
                          torch.randint(0, 256, (3, 72, 72), dtype=torch.uint8))
    losses, gradients = [], []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)):
        there = copy.deepcopy(vlm).to(device, dtype)
        if compiled and device == "cuda":
            there.compile_parts()
        loss = there({name: value.to(device) if torch.is_tensor(value) else value
                      for name, value in batch.items()})
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().float().cpu() for p in there.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[2] == pytest.approx(losses[0], rel=2e-2)
    assert far(gradients[1], gradients[0]) < 0.01
    assert F.cosine_similarity(gradients[2], gradients[0], dim=0) > 0.99


@on_gpu
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs float8")
@both
@pytest.mark.parametrize("frozen", [False, True])
def test_on_a_gpu_training_in_float8_is_near_training_in_bfloat16(frozen, qwen3):
    vlm = fresh(qwen3).cuda().to(torch.bfloat16)
    vlm.compile_parts()
    for part in vlm.parts().values():
        part.requires_grad_(part is not vlm.gpt or not frozen)
    docs = [data.Document(i, torch.randint(0, 1000, (40,)).tolist(), [0] * 10 + [1] * 30, [1],
                          {"id": "", "images": [i]}) for i in range(12)]
    batch = data.collate(*data.pack(docs, 4, 128, vlm.config.bridge.num_tokens)[:2], lambda source, record:
                          torch.randint(0, 256, (3, 72, 72), dtype=torch.uint8))
    batch, losses, gradients = {n: v.cuda() if torch.is_tensor(v) else v for n, v in batch.items()}, [], []
    for float8 in (False, True):
        vlm.gpt.set_float8(float8)
        losses.append(vlm(batch))
        losses[-1].backward()
        assert all((p.grad is None) == (frozen and p in set(vlm.gpt.parameters())) for p in vlm.parameters())
        gradients.append(torch.cat([p.grad.flatten().float() for p in vlm.parameters() if p.grad is not None]))
        vlm.zero_grad()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02) and losses[1] != losses[0]
    assert F.cosine_similarity(*gradients, dim=0) > 0.95


@on_gpu
@both
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_recorded_decoding_says_what_the_cpu_says(compiled, qwen3):
    torch.backends.cuda.matmul.allow_tf32 = False
    vlm = tiny_vlm(qwen3=qwen3)
    there = copy.deepcopy(vlm).cuda()
    if compiled:
        there.compile_parts()
    asked = prompts(vlm, RAGGED)
    for options in ({}, {"repetition_penalty": 1.2}, {"temperature": 0.9, "samples": 3}):
        expected = say(vlm, asked, [1, 2, 3, 4], max_new_tokens=16, **options)
        for _ in range(3):  # as it is, recorded, replayed
            assert say(there, asked, [1, 2, 3, 4], max_new_tokens=16, **options) == expected
    one = say(vlm, asked[:1], [1], max_new_tokens=16)  # a single row has attention of its own when compiled
    assert all(say(there, asked[:1], [1], max_new_tokens=16) == one for _ in range(3))


@on_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_requests_that_join_and_leave_say_what_the_cpu_says(compiled):
    torch.backends.cuda.matmul.allow_tf32 = False
    vlm = tiny_vlm()
    there = copy.deepcopy(vlm).cuda()
    if compiled:
        there.compile_parts()
    expected = [request(vlm, i) for i in range(20)]
    list(plumbing.engine.Engine(vlm, expected).run())
    engine = plumbing.engine.Engine(there, rows=9, width=300)
    for _ in range(3):  # as it is, recorded, replayed; some prompts are still there the second time
        asked = [request(vlm, i) for i in range(20)]
        waiting = list(asked)
        for step in itertools.count():
            for r in waiting[:step % 3]:
                engine.submit(r)
            del waiting[:step % 3]
            if not (waiting or engine.busy):
                break
            engine.step()
        assert [r.answer for r in asked] == [r.answer for r in expected]
