"""Index arithmetic of the CUDA C++ kernels, tried exhaustively on the CPU, and the emulator, which must tell faults.

`index.cpp` and `faults.cu` are compiled with the C++ compiler, from the same headers as the kernels.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from native import emulated
from ovseg_fast import native
from ovseg_fast.ops.spatial_aggregation import REGION_MASK, window_layout

SOURCES = Path(__file__).parent
CSRC = emulated.ROOT / "csrc"


@pytest.fixture(scope="module")
def compile(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles sources against csrc."""
    compiler = emulated.compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")

    def compile(name: str, *arguments: object) -> Path:
        path = tmp_path_factory.mktemp("compiled") / name
        options = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{CSRC}"]
        command = [compiler, *options, *map(str, arguments), "-o", str(path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        return path

    return compile


@pytest.fixture(scope="module")
def index(compile: Callable[..., Path]) -> ctypes.CDLL:
    return ctypes.CDLL(str(compile("index.so", "-shared", "-fPIC", SOURCES / "index.cpp")))


def numbers(count: int) -> torch.Tensor:
    return torch.full((count,), -99, dtype=torch.int32)


def windows(index: ctypes.CDLL, height: int, width: int, window: int, shift: int) -> tuple[torch.Tensor, ...]:
    """places, regions (windows, window²) and plain (windows,)."""
    count = -(-height // window) * -(-width // window)
    places, regions, plain = numbers(count * window**2), numbers(count * window**2), numbers(count)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (places, regions, plain))
    assert index.windows(height, width, window, shift, *pointers) == count
    return places.view(count, -1).long(), regions.view(count, -1), plain.bool()


SIZES = [
    *((h, w, window) for h in range(1, 9) for w in range(1, 9) for window in range(1, min(h, w) + 1)),
    *((24, 24, 12), (24, 25, 12), (13, 23, 12), (48, 48, 12), (12, 12, 12), (40, 13, 7)),
]  # fmt: skip


def test_windows_are_those_of_the_pytorch_form(index: ctypes.CDLL) -> None:
    """Where each token lies and which others it sees, for every shift."""
    for height, width, window in SIZES:
        for shift in range(window):
            sizes = (height, width, window, shift)
            places, regions, plain = windows(index, *sizes)
            order, inverse, mask = window_layout.__wrapped__(*sizes, torch.device("cpu"), torch.float32)
            slots = places.t().flatten()
            assert torch.equal(slots.clamp(min=0), order), sizes
            assert torch.equal(slots[inverse], torch.arange(height * width)), sizes
            assert int((slots >= 0).sum()) == height * width, sizes
            seen = torch.where(regions[:, :, None] == regions[:, None, :], 0.0, REGION_MASK)
            seen = seen.masked_fill((places < 0)[:, None, :], float("-inf"))
            assert torch.equal(seen, torch.zeros_like(seen) if mask is None else mask), sizes
            all_see_each_other = (places >= 0).all(1) & (regions == regions[:, :1]).all(1)
            assert torch.equal(plain, all_see_each_other), sizes


def test_windows_in_plain_words(index: ctypes.CDLL) -> None:
    """The formula once more, from its definition: a padded map, displaced cyclically, cut into windows."""
    for height, width, window, shift in ((3, 5, 2, 1), (7, 4, 3, 2), (5, 5, 5, 0), (4, 4, 2, 1)):
        padded_height, padded_width = -(-height // window) * window, -(-width // window) * window
        places = windows(index, height, width, window, shift)[0]
        for y in range(padded_height):
            for x in range(padded_width):
                from_y, from_x = (y + shift) % padded_height, (x + shift) % padded_width
                inside = from_y < height and from_x < width
                which = y // window * (padded_width // window) + x // window
                token = y % window * window + x % window
                assert places[which, token] == (from_y * width + from_x if inside else -1)


def test_places_past_a_windows_tokens_are_beyond_the_map(index: ctypes.CDLL) -> None:
    assert all(index.place(8, 8, 4, 2, 1, token) == -1 for token in range(16, 144))


def test_windows_of_the_largest_maps_do_not_overflow(index: ctypes.CDLL) -> None:
    """Maps of up to 2^31 - 1 positions are taken, see takes_windows."""
    side = 46340  # its square just fits
    count = (-(-side // 12)) ** 2
    some = (0, count // 2, count - 1)
    places = {index.place(side, side, 12, 6, which, token) for which in some for token in range(144)}
    assert min(places) == -1 and max(places) < side**2
    last = side - 1 - 6  # the row and column that the shift makes the map's last
    which = last // 12 * -(-side // 12) + last // 12
    assert index.place(side, side, 12, 6, which, last % 12 * 12 + last % 12) == side**2 - 1


@pytest.mark.parametrize("row_bytes", [32, 64, 128, 256, 512, 1024])
def test_tiles_lose_nothing_and_ldmatrix_meets_no_bank_conflict(index: ctypes.CDLL, row_bytes: int) -> None:
    rows, pieces = 64, row_bytes // 16
    found = numbers(rows * pieces)
    assert index.tile_offsets(row_bytes, rows, ctypes.c_void_p(found.data_ptr())) == 0
    offsets = found.view(rows, pieces).long()
    assert torch.equal(found.long().sort()[0], torch.arange(0, rows * row_bytes, 16))
    assert torch.equal(offsets // row_bytes, torch.arange(rows)[:, None].expand_as(offsets)), "a row stays in its row"
    # A part of a tile that begins at a multiple of eight rows is a tile: Tile::rows_from.
    assert torch.equal(offsets[8:] - 8 * row_bytes, offsets[:-8])
    # The 16 bytes of eight rows in a column of pieces, read at once, lie in all 32 banks.
    banks = offsets.view(rows // 8, 8, pieces) % 128 // 16
    assert torch.equal(banks.sort(1)[0], torch.arange(8)[None, :, None].expand_as(banks))


def test_results_cover_16_rows_and_8_columns_as_the_manual_says(index: ctypes.CDLL) -> None:
    """PTX ISA, mma.m16n8k16 and mma.m16n8k8: matrix fragments of C and D."""
    rows, columns = numbers(128), numbers(128)
    index.results(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (rows, columns)))
    assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == 128
    for lane in range(32):
        for i in range(4):
            assert rows[4 * lane + i] == (lane >> 2) + (8 if i >= 2 else 0)
            assert columns[4 * lane + i] == (lane % 4) * 2 + (i & 1)


def test_ldmatrix_gives_the_factors_of_a_product_as_the_manual_says(index: ctypes.CDLL) -> None:
    """PTX ISA: word i of a lane is of matrix i, word lane % 4 of the 16 bytes of its row lane / 4, which lie where lane
    8 i + lane / 4 says. In 16 bit and TF32 alike, a product's K are two such pieces.
    """
    places = [numbers(32) for _ in range(4)]
    index.ldmatrix_places(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in places))
    a_row, a_piece, b_row, b_piece = (tensor.tolist() for tensor in places)
    for group in range(8):
        for word in range(4):
            source = 8 * word + group
            # A: rows g, g + 8, g, g + 8, and the second piece in words 2 and 3.
            assert (a_row[source], a_piece[source]) == (group + 8 * (word % 2), word // 2)
            # Two B, whose columns are the tile's rows: words 0 and 1 are the first one's, 2 and 3 the second's.
            assert (b_row[source], b_piece[source]) == (group + 8 * (word // 2), word % 2)


# --- the emulator tells faults that a GPU would hide ---

WRONG_NUMBERS = "wrong numbers"
# Fault, by its number in faults.cu -> what the emulator says.
TOLD = {
    "no fault": "",
    "no barrier": WRONG_NUMBERS,
    "a barrier that comes too late": WRONG_NUMBERS,
    "copies that nobody waits for": "a thread ends before it has waited for its asynchronous copies",
    "reading before a copy was waited for": WRONG_NUMBERS,
    "no barrier after waiting for copies": WRONG_NUMBERS,
    "a shuffle in half of a warp": "threads wait for one that has ended",
    "half of a warp in another meeting": "lanes of a warp do different things together",
    "a barrier in one warp only": WRONG_NUMBERS,
    "a misaligned read": "an address is not aligned to the size of its access",
    "a misaligned copy": "an address is not aligned to the size of its access",
    "a warp of 16 lanes": "a warp with fewer than 32 lanes works together",
    "shared memory that nobody has written": WRONG_NUMBERS,
}


@pytest.fixture(scope="module")
def faults(compile: Callable[..., Path]) -> Path:
    return compile("faults", "-x", "c++", SOURCES / "faults.cu", CSRC / "emulator" / "emulator.cpp")


def test_every_fault_is_tried() -> None:
    """Here, but for the last two, which are the sanitizer's."""
    listed = re.search(r"enum Fault \{(.*?)\}", (SOURCES / "faults.cu").read_text(), re.DOTALL)
    assert listed is not None and len(re.findall(r"\b[A-Z_]+\b", listed[1])) == len(TOLD) + 2


@pytest.mark.parametrize("fault", TOLD)
def test_emulator_tells(faults: Path, fault: str) -> None:
    number = str(list(TOLD).index(fault))
    result = subprocess.run([faults, number], capture_output=True, text=True, check=False, timeout=60)
    if TOLD[fault] in ("", WRONG_NUMBERS):
        assert result.returncode == 0 and not result.stderr
        assert (int(result.stdout) > 0) == (TOLD[fault] == WRONG_NUMBERS)
    else:
        assert result.returncode == -signal.SIGABRT
        assert result.stderr.startswith(f"emulated CUDA kernel: {TOLD[fault]} (block ")


# --- the sanitizers: accesses past a tensor or past shared memory, and undefined arithmetic ---

SANITIZE = "-fsanitize=address,undefined"
SMALL_CASES = """
import torch
import ovseg_fast as ovs
from ovseg_fast import native
from samples import floating, map_floating, tensors
from test_kernels import CASES, has_gradient

called, call = set(), native.call
native.call = lambda name, *arguments: (called.add(name), call(name, *arguments))[1]

for row in [row for backend, row in CASES if backend == "cuda" and "small" in row.tags]:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = row.build(torch.Generator().manual_seed(0), dtype, "cpu")
        with ovs.backend("cuda"):
            if not has_gradient("cuda", row.function):
                row.run(inputs)
            else:
                inputs = map_floating(lambda tensor: tensor.requires_grad_(), inputs)
                total = sum(result.float().sum() for result in tensors(row.run(inputs)))
                torch.autograd.grad(total, floating(inputs), allow_unused=True)
        assert ovs.last_backend(row.operator) == "cuda"
print(*sorted(called))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"), [(0, ""), (len(TOLD), "heap-buffer-overflow"), (len(TOLD) + 1, "heap-buffer-overflow")]
)
def test_sanitizer_sees_what_is_past_the_end(compile: Callable[..., Path], fault: int, said: str) -> None:
    """Of shared memory, and of a tensor: that it works with the emulator's fibers."""
    emulated.sanitizer("address")
    sources = (SOURCES / "faults.cu", CSRC / "emulator" / "emulator.cpp")
    program = compile("faults", SANITIZE, "-g1", "-x", "c++", *sources)
    result = subprocess.run([program, str(fault)], capture_output=True, text=True, check=False)
    assert (result.returncode != 0) == bool(said) and said in result.stderr


@pytest.mark.slow
def test_small_cases_of_every_kernel_are_clean_under_sanitizers() -> None:
    environment = {
        **os.environ,
        "LD_PRELOAD": emulated.sanitizer("address"),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CUDA_VISIBLE_DEVICES": "",
        "OVSEG_NATIVE_LIBRARY": str(emulated.build(sanitized=True)),
        "PYTHONPATH": os.pathsep.join([str(SOURCES.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", SMALL_CASES]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    assert result.stdout.split() == sorted(native.FUNCTIONS), "some function has no small sample"
    assert "runtime error" not in result.stderr and "ERROR" not in result.stderr
