"Safetensors: the same bytes as the reference, and every broken file refused."
import json
import math
import random
import resource
import struct
import time
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import plumbing.weights
from tests.helpers import entry, fails, long_form, needs

pytest_plugins = ["tests.helpers"]  # its fixtures


def every_dtype() -> dict[str, torch.Tensor]:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, dtype in plumbing.weights.DTYPES.items():
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
    plumbing.weights.write_safetensors(tensors, path, {"step": "7"})
    assert same_bytes(plumbing.weights.read_safetensors(path), tensors)
    assert plumbing.weights.read_header(path)[1] == {"step": "7"}
    plumbing.weights.write_safetensors({}, path)
    assert plumbing.weights.read_safetensors(path) == {}


@needs("safetensors")
def test_safetensors_library_reads_ours_and_we_read_its(tmp_path):
    import safetensors.torch
    ours, theirs, tensors = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", every_dtype()
    plumbing.weights.write_safetensors(tensors, ours, {"format": "pt"})
    assert same_bytes(safetensors.torch.load_file(ours), tensors)
    safetensors.torch.save_file(tensors, theirs, {"format": "pt"})
    assert same_bytes(plumbing.weights.read_safetensors(theirs), tensors)
    assert plumbing.weights.read_header(theirs)[1] == {"format": "pt"}


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
    assert len(fails(lambda: plumbing.weights.read_safetensors(path), path)) < 1000
    assert time.process_time() - start < 3  # seconds; a header of 2,000 giant numbers once took minutes


def test_300_000_empty_tensors_do_not_hang_the_safetensors_reader(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(framed(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)}))
    start = time.process_time()
    assert len(plumbing.weights.read_safetensors(tmp_path / "a.safetensors")) == 300_000
    assert time.process_time() - start < 10


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
    assert plumbing.weights.read_safetensors(tmp_path / "a.safetensors")["a"].tolist() == [[0, 0], [0, 0]]


def read_or_refuse(path: Path, raw: bytes) -> bool:
    "Either every byte of every tensor can be touched, or it is one line that names the file."
    path.write_bytes(raw)
    try:
        for tensor in plumbing.weights.read_safetensors(path).values():
            tensor.flatten().view(torch.uint8).sum()
    except ValueError as error:
        return str(path) in str(error) and "\n" not in str(error)
    return True


@lru_cache
def fuzz_file(folder: str) -> bytes:
    path = Path(folder) / "valid.safetensors"
    tensors = {"w": torch.ones(3, 2), "b": torch.ones(2, dtype=torch.bfloat16), "e": torch.ones(0, 2)}
    plumbing.weights.write_safetensors(tensors, path, {"k": "v"})
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
    plumbing.weights.write_safetensors(dict(linear.named_parameters()), tmp_path / "a.safetensors")
    tensors = plumbing.weights.read_safetensors(tmp_path / "a.safetensors")
    mapped = {tensor.data_ptr() for tensor in tensors.values()}
    plumbing.weights.load_tensors(linear, tensors, {"weight": ["weight"], "bias": ["bias"]}, "", "here")
    assert not tensors and not mapped & {p.data_ptr() for p in linear.parameters()}


def test_shards_that_do_not_match_their_index_are_one_line(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    assert fails(lambda: plumbing.weights.read_safetensors(tmp_path), index)
    for content in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "."}}',
                    '{"weight_map": {"a": ""}}', '{"weight_map": {"a": "../b"}}', '{"weight_map": ' + "[" * 200_000,
                    '{"weight_map": ' + "9" * 5000 + "}", '{"weight_map": {"a": "/etc/passwd"}}'):
        index.write_text(content)
        assert fails(lambda: plumbing.weights.read_safetensors(tmp_path), index)
    (tmp_path / "again").symlink_to(tmp_path)  # a folder in place of a shard would be read as a model, without end
    index.write_text(json.dumps({"weight_map": {"a": "again"}}))
    assert fails(lambda: plumbing.weights.read_safetensors(tmp_path), tmp_path / "again", "no such file")
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    plumbing.weights.write_safetensors({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    assert fails(lambda: plumbing.weights.read_safetensors(tmp_path), tmp_path / "2.safetensors")
    plumbing.weights.write_safetensors({"c": torch.ones(1)}, tmp_path / "2.safetensors")
    assert fails(lambda: plumbing.weights.read_safetensors(tmp_path), tmp_path / "2.safetensors", "b")
