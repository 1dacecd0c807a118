"""8-bit floats with scales: decoding, the nearest numbers, and scales that follow new values."""

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from graphs import round_once
from laws.coded_laws import held
from loraformat.dtypes import BY_NAME
from loraformat.encodings import CODED, Coder, Coding
from loraformat.encodings.float8_scaled import CODED as ENCODING

FORMS = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
BLOCKS = ((12, 20), (1, 20), (5, 8))
Array = NDArray[np.float64]


class Made:
    """A weight of random codes, and what it stands for."""

    def __init__(self, form: str, block: tuple[int, int]) -> None:
        rng = np.random.default_rng([*block, *form.encode()])
        self.form = BY_NAME[form].numpy()
        self.codes = rng.standard_normal((12, 20)).astype(np.float32).astype(self.form)
        shape = (-(-12 // block[0]), -(-20 // block[1]))
        self.scales = rng.uniform(0.01, 0.03, shape).astype(np.float32)
        self.block = block
        companions = {"scales": held("s", self.scales)}
        coding = Coding("float8_scaled", (12, 20), block, companions)
        self.coder: Coder = ENCODING.bind(coding, BY_NAME[form])

    def spread(self, scales: Array) -> Array:
        tall = np.repeat(np.asarray(scales, np.float64), self.block[0], axis=0)[:12]
        return np.repeat(tall, self.block[1], axis=1)[:, :20]

    def decode(self, coder: Coder, codes: NDArray[np.generic], step: int = 12) -> NDArray[np.float32]:
        out = np.empty((12, 20), np.float32)
        for start in range(0, 12, step):
            rows = range(start, min(start + step, 12))
            coder.decode(codes.view(np.uint8)[rows.start : rows.stop], rows, out[rows.start : rows.stop])
        return out


@pytest.fixture(params=[(form, block) for form in FORMS for block in BLOCKS], ids=str)
def made(request: pytest.FixtureRequest) -> Made:
    return Made(*request.param)


def test_its_room_finds_it() -> None:
    assert CODED.find("float8_scaled") is ENCODING


def test_values_are_numbers_times_scales_whatever_the_tiles(made: Made) -> None:
    wanted = made.codes.astype(np.float64) * made.spread(made.scales)
    found = made.decode(made.coder, made.codes)
    np.testing.assert_allclose(found, wanted, rtol=1e-7)
    np.testing.assert_array_equal(made.decode(made.coder, made.codes, step=5), found)


def test_codes_are_the_nearest_numbers_and_no_further_than_the_largest(made: Made) -> None:
    rng, largest = np.random.default_rng(1), float(ml_dtypes.finfo(made.form).max)
    values = (rng.standard_normal((12, 20)) * largest / 2 * made.spread(made.scales)).astype(np.float32)
    out = np.zeros((12, 20), np.uint8)
    made.coder.encode(values, range(12), out)
    quotients = values / made.spread(made.scales).astype(np.float32)
    wanted = round_once(np.clip(quotients, -largest, largest).astype(np.float64), made.form)
    assert (out == wanted.view(np.uint8)).mean() == 1
    assert (np.abs(quotients) > largest).any()


def test_what_was_decoded_encodes_to_itself(made: Made) -> None:
    out = np.zeros((12, 20), np.uint8)
    made.coder.encode(made.decode(made.coder, made.codes), range(12), out)
    assert out.tobytes() == made.codes.tobytes()


def test_only_blocks_that_change_get_the_scale_that_reaches(made: Made) -> None:
    fit, delta = made.coder.start_afresh(), np.zeros((12, 20), np.float32)
    delta[4, 6] = 9
    values = made.decode(made.coder, made.codes) + delta
    for start in (0, 7):
        rows = slice(start, 7 if start == 0 else 12)
        fit.see(made.codes.view(np.uint8)[rows], range(rows.start, rows.stop), values[rows], delta[rows])
    scales = fit.finish().tensors()["scales"]
    place = (4 // made.block[0], 6 // made.block[1])
    changed = scales != made.scales
    assert changed.sum() == 1
    assert changed[place]
    assert scales[place] == pytest.approx(np.abs(values).max() / float(ml_dtypes.finfo(made.form).max))


def test_steps_are_the_distances_to_the_next_number(made: Made) -> None:
    numbers = np.arange(256, dtype=np.uint8).view(made.form).astype(np.float64)
    ladder = np.unique(np.abs(numbers[np.isfinite(numbers)]))
    codes = np.abs(made.codes.astype(np.float64))
    above = ladder[np.searchsorted(ladder, codes, side="right")]
    values = made.decode(made.coder, made.codes)
    steps = np.broadcast_to(made.coder.steps(range(12), values), (12, 20))
    np.testing.assert_allclose(steps, (above - codes) * made.spread(made.scales), rtol=1e-6)
