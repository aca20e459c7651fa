"Safetensors: the same bytes as the reference, and every broken file refused."
import json
import math
import random
import resource
import struct
import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import model
import plumbing.hub
import vision
from extras.export import hub_tensors
from model import GPT, VLM
from plumbing.weights import (DTYPES, LLAVA_NAMES, QWEN_NAMES, SIGLIP_NAMES, hub_names, load_tensors, read_header,
                              read_safetensors, write_safetensors)
from tests.helpers import (change_config, fails, far, image_tokens, long_form, needs, noise_image, save_onevision,
                           tiny_vlm)
from tokenizer import Rendered
from vision import Bridge, BridgeConfig, ViT, ViTConfig

pytest_plugins = ["tests.helpers"]  # its fixtures


def every_dtype() -> dict[str, torch.Tensor]:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, dtype in DTYPES.items():
        for shape in [(3, 5), (), (0, 4), (1,)]:  # a matrix, a single number, nothing at all
            top = 2 if dtype == torch.bool else 256
            raw = torch.randint(0, top, (math.prod(shape) * dtype.itemsize,), generator=generator).to(torch.uint8)
            tensors[f"{name} {shape}"] = raw.view(dtype).view(shape)
    return tensors


def same_bytes(ours: dict, theirs: dict) -> bool:
    "Compared as bytes: random ones hold NaNs, and a NaN does not equal itself."
    return ours.keys() == theirs.keys() and all(
        a.dtype == theirs[n].dtype and a.shape == theirs[n].shape
        and torch.equal(a.flatten().view(torch.uint8), theirs[n].flatten().view(torch.uint8)) for n, a in ours.items())


def test_safetensors_round_trip(tmp_path):
    path, tensors = tmp_path / "a.safetensors", every_dtype()
    tensors["transposed"] = torch.arange(6).view(2, 3).t()  # not contiguous
    write_safetensors(tensors, path, {"step": "7"})
    assert same_bytes(read_safetensors(path), tensors)
    assert read_header(path)[1] == {"step": "7"}
    write_safetensors({}, path)
    assert read_safetensors(path) == {}


@needs("safetensors")
def test_safetensors_library_reads_ours_and_we_read_its(tmp_path):
    import safetensors.torch
    ours, theirs, tensors = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", every_dtype()
    write_safetensors(tensors, ours, {"format": "pt"})
    assert same_bytes(safetensors.torch.load_file(ours), tensors)
    safetensors.torch.save_file(tensors, theirs, {"format": "pt"})
    assert same_bytes(read_safetensors(theirs), tensors)
    assert read_header(theirs)[1] == {"format": "pt"}


def entry(dtype="I32", shape=(2, 2), offsets=(0, 16)) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def framed(header, body: bytes = b"", pad: bytes = b"") -> bytes:
    raw = (header if isinstance(header, bytes) else json.dumps(header).encode()) + pad
    return struct.pack("<Q", len(raw)) + raw + body

BAD_FILES = {  # the reference implementation's own negative tests, and a few more
    "empty": b"",
    "seven_bytes": b"\x02" + bytes(6),
    "length_without_header": b"<" + bytes(7),
    "header_too_large": b"<\0\0\0\0\xff\xff\xff",
    "header_just_too_large": struct.pack("<Q", 100_000_001) + b"{}",
    "not_utf8": framed(b"\xff"),
    "open_brace": framed(b"{"),
    "leading_space": framed(b' {"a": {"dtype": "I32", "shape": [2, 2], "data_offsets": [0, 16]}}', bytes(16)),
    "a_list": framed([]),
    "two_objects": framed(b"{}{}"),
    "deep": framed(b'{"a":' + b"[" * 200_000),
    "extra_bytes": framed(entry(), bytes(20)),
    "two_bytes_short": framed(entry(), bytes(14)),
    "offsets_do_not_fit_the_shape": framed(entry(offsets=(0, 4)), bytes(4)),
    "offsets_backwards": framed(entry(shape=(0,), offsets=(16, 0)), bytes(16)),
    "overflow_in_the_product": framed(entry(shape=(2, 2 ** 64 - 2))),
    "overflow_in_the_bytes": framed(entry(shape=(2, 2 ** 63 - 1))),
    "empty_but_too_long_for_torch": framed(entry(shape=(0, 2 ** 64 - 1), offsets=(0, 0))),
    "empty_but_its_steps_overflow": framed(entry(shape=(0, 2 ** 40, 2 ** 40), offsets=(0, 0))),
    "one_place_for_many": framed({f"t{i}": entry()["a"] for i in range(100)}, bytes(16)),
    "hole": framed({"a": entry()["a"], "b": entry(offsets=(20, 36))["a"]}, bytes(36)),
    "starts_late": framed(entry(offsets=(4, 20)), bytes(20)),
    "negative": framed(entry(shape=(-2, -2)), bytes(16)),
    "fraction": framed(entry(shape=(2.0, 2)), bytes(16)),
    "truth_value": framed(entry(dtype="U8", shape=(True,), offsets=(0, 1)), bytes(1)),
    "unknown_dtype": framed(entry(dtype="F4"), bytes(16)),
    "dtype_is_a_list": framed(entry(dtype=[]), bytes(16)),
    "shape_is_a_number": framed(entry(shape=4), bytes(16)),
    "three_offsets": framed(entry(offsets=(0, 8, 16)), bytes(16)),
    "lacks_a_field": framed({"a": {"dtype": "I32", "shape": [2, 2]}}, bytes(16)),
    "entry_is_a_word": framed({"a": "I32"}),
    "name_twice": framed(b'{"a":%b,"a":%b}' % ((json.dumps(entry()["a"]).encode(),) * 2), bytes(16)),
    "field_twice": framed(b'{"a":{"dtype":"I32","dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}', bytes(16)),
    "metadata_of_numbers": framed({"__metadata__": {"step": 7}}),
    "metadata_is_a_list": framed({"__metadata__": []}),
    "newline_in_a_name": framed({"a\nb": entry(dtype="?")["a"]}, bytes(16)),
    "a_million_sides": framed(entry(shape=[1] * 10 ** 6)),
    "sides_of_4300_digits": framed(entry(shape=[10 ** 4299] * 2000)),
    "number_of_5000_digits": framed(b'{"a":{"dtype":"I32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}'),
    "name_of_50_MB": framed(b'{"%b":1}' % (b"a" * 50_000_000)),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_safetensors_file_is_one_line_that_names_it(tmp_path, name):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD_FILES[name])
    start = time.process_time()
    assert len(fails(lambda: read_safetensors(path), path)) < 1000
    assert time.process_time() - start < 3  # seconds; a header of 2,000 giant numbers once took minutes


def test_many_empty_tensors_do_not_hang_the_safetensors_reader(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(framed(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(40_000)}))
    start = time.process_time()
    assert len(read_safetensors(tmp_path / "a.safetensors")) == 40_000
    assert time.process_time() - start < 4  # seconds; with a search among all for each it would be minutes


@long_form
def test_10_000_mutated_files_are_read_or_refused(tmp_path):
    """Bytes changed, cut out, doubled and put in, in the header and behind it; memory stays flat."""
    raw, chance = fuzz_file(str(tmp_path)), random.Random(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    for number in range(10_000):
        mutant = bytearray(raw)
        for _ in range(chance.randint(1, 6)):
            at, n = chance.randrange(len(mutant) + 1), chance.randint(0, 20)
            kind = chance.randrange(4)
            piece = mutant[at:at + n]
            mutant[at:at + n] = (chance.randbytes(n), b"", piece * 2,
                                 chance.choice([b"0", b"9" * n, b"[", b"{", b'"', b"-", b"e9", b"\xff"]))[kind]
            mutant = mutant or bytearray(1)
        assert read_or_refuse(tmp_path / "mutant.safetensors", bytes(mutant)), number
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000


def test_safetensors_header_may_be_padded_at_its_end(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(framed(entry(), bytes(16), pad=b" \r\n\t "))
    assert read_safetensors(tmp_path / "a.safetensors")["a"].tolist() == [[0, 0], [0, 0]]


def read_or_refuse(path: Path, raw: bytes) -> bool:
    "Either every byte of every tensor can be touched, or it is one line that names the file."
    path.write_bytes(raw)
    try:
        for tensor in read_safetensors(path).values():
            tensor.flatten().view(torch.uint8).sum()
    except ValueError as error:
        return str(path) in str(error) and "\n" not in str(error)
    return True


@lru_cache
def fuzz_file(folder: str) -> bytes:
    path = Path(folder) / "valid.safetensors"
    tensors = {"w": torch.ones(3, 2), "b": torch.ones(2, dtype=torch.bfloat16), "e": torch.ones(0, 2)}
    write_safetensors(tensors, path, {"k": "v"})
    return path.read_bytes()


@given(st.lists(st.tuples(st.integers(0, 260), st.integers(0, 255)), max_size=5), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_no_corruption_crashes_the_safetensors_reader(tmp_path_factory, changes, length):
    folder = tmp_path_factory.getbasetemp()
    raw = bytearray(fuzz_file(str(folder)))
    for place, value in changes:
        raw[place % len(raw)] = value
    assert read_or_refuse(folder / "fuzz.safetensors", bytes(raw[:length]))

NUMBERS = st.one_of(st.integers(0, 4), st.sampled_from([-1, 2 ** 31, 2 ** 62, 2 ** 63, 2 ** 64 - 1, 2 ** 200]))
JUNK = st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=3) | NUMBERS,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                    max_leaves=4)

FIELDS = {"dtype": st.sampled_from(["F32", "U8", "BOOL"]) | JUNK, "shape": st.lists(NUMBERS, max_size=3) | JUNK,
          "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JUNK}

ENTRIES = st.fixed_dictionaries({}, optional=FIELDS) | JUNK


@given(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES, max_size=3))
@settings(max_examples=200, deadline=None)
def test_no_header_crashes_the_safetensors_reader(tmp_path_factory, header):
    assert read_or_refuse(tmp_path_factory.getbasetemp() / "fuzz.safetensors", framed(header, bytes(8)))


def test_loaded_weights_are_copies_and_the_mapped_file_is_let_go(tmp_path):
    # Else a file that is replaced while the model runs would pull its weights away, and training would write to it.
    linear = torch.nn.Linear(3, 2)
    write_safetensors(dict(linear.named_parameters()), tmp_path / "a.safetensors")
    tensors = read_safetensors(tmp_path / "a.safetensors")
    mapped = {tensor.data_ptr() for tensor in tensors.values()}
    load_tensors(linear, tensors, {"weight": ["weight"], "bias": ["bias"]}, "", "here")
    assert not tensors and not mapped & {p.data_ptr() for p in linear.parameters()}


def test_shards_that_do_not_match_their_index_are_one_line(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    assert fails(lambda: read_safetensors(tmp_path), index)
    for content in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "."}}',
                    '{"weight_map": {"a": ""}}', '{"weight_map": {"a": "../b"}}', '{"weight_map": ' + "[" * 200_000,
                    '{"weight_map": ' + "9" * 5000 + "}", '{"weight_map": {"a": "/etc/passwd"}}'):
        index.write_text(content)
        assert fails(lambda: read_safetensors(tmp_path), index)
    (tmp_path / "again").symlink_to(tmp_path)  # a folder in place of a shard would be read as a model, without end
    index.write_text(json.dumps({"weight_map": {"a": "again"}}))
    assert fails(lambda: read_safetensors(tmp_path), tmp_path / "again", "no such file")
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    write_safetensors({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    assert fails(lambda: read_safetensors(tmp_path), tmp_path / "2.safetensors")
    write_safetensors({"c": torch.ones(1)}, tmp_path / "2.safetensors")
    assert fails(lambda: read_safetensors(tmp_path), tmp_path / "2.safetensors", "b")


# ----------------------------------------------------------------------------------------------------------------------
# model.py: LLaVA-OneVision, and the sizes of the published files

def hf_pixels(images: list, side: int = 28) -> dict:
    "What transformers' processor makes of one picture (tiles) or of several (squares with bars)."
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
    pinpoints = [[side * a, side * b] for a in range(1, 7) for b in range(1, 7)]
    processor = LlavaOnevisionImageProcessorPil(size={"height": side, "width": side}, image_grid_pinpoints=pinpoints,
                                                image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return dict(processor([images], return_tensors="pt"))


def set_pixels(theirs: dict, pixels: torch.Tensor) -> None:
    "Their pixels, by Pillow, are ours within a level of 255. Ours take their place: so the models can be compared."
    mine, given = vision.normalize(pixels, torch.float32), theirs["pixel_values"].flatten(0, 1)[:len(pixels)]
    assert (mine - given).abs().max() < 1.01 / 127.5
    given.copy_(mine)

ONEVISION_SIZES = [[(28, 28)], [(20, 45)], [(150, 60)], [(61, 171)], [(100, 3)], [(200, 190)], [(30, 40), (50, 20)],
                   [(28, 28), (9, 60), (33, 33)]]


@needs("transformers")
@pytest.mark.parametrize("sizes", ONEVISION_SIZES, ids=str)
def test_onevision_equals_transformers(tmp_path, sizes):
    reference = save_onevision(tmp_path, old_names=len(sizes) > 1)
    vlm = model.load_checkpoint(tmp_path).eval()
    images = [noise_image(*size, seed) for seed, size in enumerate(sizes)]
    theirs = hf_pixels(images)
    ours = [vision.cut_tiles(images[0], 28)] if len(images) == 1 else \
        [vision.preprocess(image, 28, bicubic=True, pad=True) for image in images]
    pixels = ours[0].pixels if len(images) == 1 else torch.stack(ours)
    set_pixels(theirs, pixels)
    ids, slots = [3, 17], []
    for image in ours:
        slots.append(len(ids))
        ids += [300] * vlm.config.bridge.tokens_of(image) + [5, 6]
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([ids]), **theirs).logits
        places = [slot + i for slot, image in zip(slots, ours) for i in range(vlm.config.bridge.tokens_of(image))]
        x = vlm.embed(torch.tensor([ids]), image_tokens(vlm, ours), torch.tensor(places))
        assert far(vlm.gpt.hidden(x) @ vlm.gpt.head_weight.t(), expected) < 1e-4
        said = reference.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                                  max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0, **theirs)
    asked = Rendered(ids, [0] * len(ids), slots)
    assert [t for (t,) in vlm.generate([asked], ours, max_new_tokens=64)] == said[0, len(ids):].tolist()


@needs("transformers")
@pytest.mark.parametrize("tied, layer", [(False, -1), (True, -2), (False, 2)])
def test_onevision_reads_the_layer_and_head_that_its_config_names(tmp_path, tied, layer):
    reference, image = save_onevision(tmp_path, tied, layer), noise_image(50, 20)
    vlm = model.load_checkpoint(tmp_path).eval()
    ours, theirs = vision.cut_tiles(image, 28), hf_pixels([image])
    set_pixels(theirs, ours.pixels)
    with torch.no_grad():
        ids = [300] * vlm.config.bridge.tokens_of(ours) + [3]
        expected = reference(input_ids=torch.tensor([ids]), **theirs).logits[:, -1]
        x = vlm.embed(torch.tensor([ids]), image_tokens(vlm, [ours]), torch.arange(len(ids) - 1))
        assert far(vlm.gpt.hidden(x)[:, -1]
                   @ vlm.gpt.head_weight.t(), expected) < 1e-4


@needs("transformers")
def test_a_llava_that_computes_otherwise_is_refused(tmp_path):
    save_onevision(tmp_path)
    good = (tmp_path / "config.json").read_text()
    for key, value in (("projector_hidden_act", "relu"), ("vision_feature_select_strategy", "default"),
                       ("vision_feature_layer", [-1, -2]), ("vision_aspect_ratio", "anyres_max_4")):
        change_config(tmp_path, lambda config: config.update({key: value}))
        assert fails(lambda: model.load_checkpoint(tmp_path), tmp_path, key)
        (tmp_path / "config.json").write_text(good)

    def sparse(config):  # as the hub has it: what equals a default is left out
        for key in ("vision_feature_select_strategy", "vision_feature_layer", "projector_hidden_act"):
            config.pop(key, None)
    whole = model.load_checkpoint(tmp_path)
    change_config(tmp_path, sparse)
    assert asdict(model.load_checkpoint(tmp_path).config) == asdict(whole.config)


def test_tiles_take_as_many_tokens_as_the_reference_counts():
    # At 384 pixels a side: figures of transformers' own processor.
    for (height, width), tokens in {(384, 384): 1485, (480, 640): 2929, (899, 1024): 6551, (1080, 1920): 7269}.items():
        rows, columns = vision.best_grid(width, height, 384)
        assert vision.Tiles(None, rows, columns, width, height).num_tokens(729) == tokens


@given(st.integers(1, 3000), st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_tiles_cover_a_picture_of_any_shape(width, height):
    rows, columns = vision.best_grid(width, height, 14)
    tiles = vision.Tiles(torch.zeros(1 + rows * columns, 3, 14, 14, dtype=torch.uint8), rows, columns, width, height)
    bridge = Bridge(BridgeConfig("mlp", vision_size=8, text_size=8, num_patches=4, newline=True))
    with torch.no_grad():
        assert len(bridge.stitch(torch.randn(len(tiles.pixels), 4, 8), tiles)) == tiles.num_tokens(4)


def published_size(tensors: dict[str, torch.Tensor]) -> int:
    "Bytes of the safetensors file that holds these, as Hugging Face writes it: names in order, one dtype."
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name in sorted(tensors):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + offset


def in_dtype(tensors: dict, dtype: torch.dtype) -> dict:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name, size", [
    ("qwen2.5-0.5b", 988_097_824), ("qwen2.5-0.5b-instruct", 988_097_824), ("qwen2.5-1.5b", 3_087_467_144),
    ("qwen2.5-1.5b-instruct", 3_087_467_144)])
def test_qwen_presets_ask_for_the_published_file_to_the_byte(name, size):
    with torch.device("meta"):
        gpt = GPT(model.PRESETS[name].decoder)
    assert published_size(in_dtype(hub_tensors(gpt, QWEN_NAMES), torch.bfloat16)) == size
    assert size in [f[0] for f in plumbing.hub.REPOSITORIES[name].files.values()]


def siglip_tensors(config: ViTConfig, words: int, length: int) -> dict[str, torch.Tensor]:
    "All tensors of a SigLIP file, on no device: the vision tower as we ask for it, its head, and the text tower."
    D, I = config.hidden_size, config.intermediate_size
    shapes = {"logit_scale": [1], "logit_bias": [1],
              "text_model.embeddings.token_embedding.weight": [words, D],
              "text_model.embeddings.position_embedding.weight": [length, D], "text_model.head.weight": [D, D],
              "vision_model.head.probe": [1, 1, D], "vision_model.head.attention.in_proj_weight": [3 * D, D],
              "vision_model.head.attention.in_proj_bias": [3 * D],
              "vision_model.head.attention.out_proj.weight": [D, D], "vision_model.head.mlp.fc1.weight": [I, D],
              "vision_model.head.mlp.fc1.bias": [I], "vision_model.head.mlp.fc2.weight": [D, I]}
    shapes |= {name: [D] for name in (
        "text_model.final_layer_norm.weight", "text_model.final_layer_norm.bias", "text_model.head.bias",
        "vision_model.head.attention.out_proj.bias", "vision_model.head.layernorm.weight",
        "vision_model.head.layernorm.bias", "vision_model.head.mlp.fc2.bias")}
    with torch.device("meta"):
        tensors = hub_tensors(ViT(config), SIGLIP_NAMES, "vision_model.")
        tensors |= {"text_model." + name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()
                    if ".layers." in name}  # the text tower's blocks have the same form
        return tensors | {name: torch.empty(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("name, words, length, size", [
    ("siglip2-large-patch16-256", 256_000, 64, 3_526_204_360), ("siglip-large-patch16-256", 32_000, 64, 2_608_699_800),
    ("siglip2-base-patch16-224", 256_000, 64, 1_500_800_904), ("siglip-base-patch16-224", 32_000, 64, 812_672_320),
    ("siglip-so400m-patch14-224", 32_000, 16, 3_509_549_856), ("siglip-so400m-patch14-384", 32_000, 64, 3_511_950_624)])
def test_siglip_presets_ask_for_the_published_file_to_the_byte(name, words, length, size):
    tensors = siglip_tensors(vision.SIGLIP[name], words, length)
    assert published_size(tensors) == size
    assert plumbing.hub.REPOSITORIES[name].files["model.safetensors"][0] in (size, None)


def test_the_onevision_preset_asks_for_the_published_file_to_the_byte():
    with torch.device("meta"):
        vlm = VLM(model.preset("llava-ov-0.5b"))
        tensors = in_dtype(hub_tensors(vlm, LLAVA_NAMES), torch.float16)
    assert len(tensors) == 716 and published_size(tensors) == 1_787_445_680


def decoder_tensors(name: str) -> dict[str, torch.Tensor]:
    "A preset's tensors under the hub's names, on no device."
    with torch.device("meta"):
        return hub_tensors(GPT(model.PRESETS[name].decoder), QWEN_NAMES)


@pytest.mark.parametrize("name, count, size, shards", [
    ("qwen2.5-3b", 434, 6_171_877_376, [3_968_658_944, 2_203_268_048]),
    ("qwen2.5-7b-instruct", 339, 15_231_233_024, [3_945_441_440, 3_864_726_352, 3_864_726_424, 3_556_377_672])])
def test_the_large_qwen_presets_ask_for_the_published_bytes(name, count, size, shards):
    # Bytes of tensors, as the index says, and a header for each shard.
    tensors = decoder_tensors(name)
    assert len(tensors) == count and sum(2 * t.numel() for t in tensors.values()) == size
    listed = [f[0] for file, f in plumbing.hub.REPOSITORIES[name].files.items() if file.endswith(".safetensors")]
    assert listed == shards and 0 < sum(shards) - size < 100_000


@pytest.mark.parametrize("name, weights", [("0.6b", 596_049_920), ("1.7b", 1_720_574_976), ("4b", 4_022_468_096),
                                           ("8b", 8_190_735_360)])
def test_qwen3_presets_have_the_published_weights_and_names(name, weights):
    for kind, longest in (("", 40960), ("-base", 32768)):
        tensors, config = decoder_tensors(f"qwen3-{name}{kind}"), model.PRESETS[f"qwen3-{name}{kind}"].decoder
        assert sum(t.numel() for t in tensors.values()) == weights and config.max_position_embeddings == longest
        assert ("lm_head.weight" in tensors) == (name == "8b") and not any(n.endswith("proj.bias") for n in tensors)
        attention = "model.layers.1.self_attn"
        assert tensors[f"{attention}.q_norm.weight"].shape == tensors[f"{attention}.k_norm.weight"].shape == (128, )
        q = config.num_attention_heads * 128
        assert tensors[f"{attention}.q_proj.weight"].shape == (q, config.hidden_size)
        assert tensors[f"{attention}.o_proj.weight"].shape == (config.hidden_size, q)


def test_vit_weights_that_do_not_fit_are_one_line(tmp_path):
    vit, hub = tiny_vlm().vit, {}  # our tensors under the hub's names
    for ours, theirs in hub_names(vit, SIGLIP_NAMES, "vision_model.").items():
        hub |= dict(zip(theirs, vit.get_parameter(ours).detach().chunk(len(theirs))))
    fields = {name: value for name, value in asdict(vit.config).items() if isinstance(value, int)}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    write_safetensors(hub, tmp_path / "model.safetensors")
    pixels = torch.randint(0, 256, (1, 3, 24, 24), dtype=torch.uint8)
    assert torch.equal(ViT.from_pretrained(tmp_path)(pixels), vit(pixels))
    name = "vision_model.encoder.layers.1.self_attn.v_proj.bias"
    for broken in ({n: t for n, t in hub.items() if n != name}, hub | {name: torch.zeros(7)},
                   hub | {"vision_model.new": torch.zeros(1)}):
        write_safetensors(broken, tmp_path / "model.safetensors")
        assert fails(lambda: ViT.from_pretrained(tmp_path), tmp_path, "vision_model.")
