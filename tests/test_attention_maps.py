"Where the model looked."
import pytest
import torch
from PIL import Image

import extras.attention_maps
import model
import vision
from tests.helpers import RAGGED, far, image_tokens, picture, run, say, shake, tiny_vlm, tokenizer

pytest_plugins = ["tests.helpers"]  # its fixtures


@pytest.mark.parametrize("kind, seeded, latents", [("perceiver", True, 4), ("perceiver", True, 5),
                                                   ("perceiver", False, 4), ("pixelshuffle", True, 4),
                                                   ("mlp", True, 4)])
def test_every_image_token_is_shared_out_over_the_patches(kind, seeded, latents):
    vlm = tiny_vlm(kind)
    vlm.config.bridge.num_latents, vlm.config.bridge.seeded = latents, seeded
    vlm.bridge = shake(vision.Bridge(vlm.config.bridge))
    features = vlm.vit_features(picture(1)[None])[0]
    shares = extras.attention_maps.patch_shares(vlm.bridge, features)
    assert shares.shape == (vlm.config.bridge.num_tokens, 16) and shares.min() >= 0
    assert torch.allclose(shares.sum(1), torch.ones(len(shares)), atol=1e-5)
    if kind != "perceiver":  # a patch that changes changes the tokens that have a share of it, and no other
        other = features.clone()
        other[5] += 1
        moved = (vlm.bridge.project(other[None]) - vlm.bridge.project(features[None]))[0].abs().sum(1) > 1e-6
        assert torch.equal(moved, shares[:, 5] > 0)


def test_the_overlay_shows_the_perceivers_own_attention_also_after_it_is_changed(monkeypatch):
    vlm, real = tiny_vlm(), vision.PerceiverLayer.project
    features = vlm.vit_features(picture(1)[None])[0]
    tokens, shares = vlm.bridge(features[None]), extras.attention_maps.patch_shares(vlm.bridge, features)

    def sharper(self, latents, features):  # an edit of the one place where queries are made
        q, k, v = real(self, latents, features)
        return 30 * q, k, v
    monkeypatch.setattr(vision.PerceiverLayer, "project", sharper)
    assert not torch.allclose(vlm.bridge(features[None]), tokens)
    assert extras.attention_maps.patch_shares(vlm.bridge, features).amax(1).mean() > shares.amax(1).mean() + 0.05


def test_the_overlay_is_the_decoders_own_attention():
    vlm, chat = tiny_vlm("mlp"), RAGGED[2]
    asked = tokenizer().render(chat["messages"], 16, add_generation_prompt=True)
    images = [picture(2), picture(3)]
    answer = say(vlm, [asked], [2, 3], max_new_tokens=6)[0]
    maps = extras.attention_maps.where_it_looked(vlm, asked, images, answer)
    assert [m.shape for m in maps] == [(6, 4, 4)] * 2 and all(m.min() >= 0 and m.max() <= 1 for m in maps)
    # By hand: keys and queries of each block, from hidden states that hooks catch.
    inputs = []
    for block in vlm.gpt.blocks:
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    ids, total = torch.tensor([list(asked.ids) + answer[:-1]]), 0
    places = torch.cat([torch.arange(16) + slot for slot in asked.slots])
    with torch.no_grad():
        vlm.gpt.hidden(vlm.embed(ids, image_tokens(vlm, images), places))
        rope = model.rope_table(torch.arange(ids.shape[1])[None], vlm.gpt.config)
        for block, x in zip(vlm.gpt.blocks, inputs):
            q, k, _ = block.attention.project(block.norm1(x), rope)
            for head in range(4):
                scores = q[0, :, head] @ k[0, :, head // 2].t() / 8 ** 0.5
                total = total + scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf).softmax(-1) / 4
    seen = total[int(places[-1]) + 1:, places[:16]]
    more = (seen - seen.mean(0)).clamp(min=0)[-6:]
    most = (more.max() * more.amax(1, keepdim=True)).sqrt().clamp(min=1e-9)
    assert far(maps[0].flatten(1), more / most) < 1e-4
    words = extras.attention_maps.words_of(tokenizer(), answer, maps)
    assert "".join(word for word, _ in words) == tokenizer().decode(answer) and all(len(m) == 2 for _, m in words)


def test_the_overlay_of_a_picture_in_tiles_covers_the_whole_picture():
    vlm = tiny_vlm("mlp")
    vlm.config.bridge.newline, vlm.bridge.newline = True, torch.nn.Parameter(torch.randn(32))
    tiles = vision.cut_tiles(Image.effect_noise((70, 40), 80).convert("RGB"), 24)
    asked = tokenizer().render([{"role": "user", "content": "<image>"}], [vlm.config.bridge.tokens_of(tiles)], True)
    (grid, ) = extras.attention_maps.where_it_looked(vlm, asked, [tiles], [5, 6, 7])
    assert grid.shape == (3, 4, 4) and grid.isfinite().all() and grid.max() > 0


def test_attention_is_drawn_as_one_sheet(trained, photo, tmp_path):
    flags = [f"--out_dir={trained[0]}", f"--image={photo}", "--device=cpu", "--max_new_tokens=12"]
    ran = run("sample", *flags, f"--attention={tmp_path / 'a.png'}")
    assert ran.code == 0 and ran.out == run("sample", *flags).out  # the answer is the same
    sheet = Image.open(tmp_path / "a.png")
    assert sheet.width == 8 * 158 and len(set(sheet.convert("L").getdata())) > 10
