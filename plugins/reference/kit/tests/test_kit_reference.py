import numpy as np
import pytest

import tersor
from tersor_kit_reference import decode_image, encode_image, require


def test_pixels_survive_exactly_and_other_values_are_refused():
    x = (np.arange(3 * 4 * 5) % 256).astype(np.float32).reshape(3, 4, 5) / np.float32(255)
    raw = encode_image(x, "png", "PNG", (1, 3, 4), on_grid=True)
    assert np.array_equal(decode_image(raw, tersor.Spec("image", x.shape, "float32"), "PNG"), x)
    with pytest.raises(tersor.InputError, match="k / 255"):
        encode_image(x * np.float32(0.999), "png", "PNG", (3,), on_grid=True)
    with pytest.raises(tersor.InputError, match="1 \\(L\\) channels; given: 3"):
        encode_image(x, "grey", "PNG", (1,))


def test_another_size_than_the_header_says_is_refused_before_decoding():
    raw = encode_image(np.zeros((3, 4, 5), np.float32), "png", "PNG", (3,))
    with pytest.raises(tersor.CorruptPayloadError, match="5 x 4, the header says 6 x 4"):
        decode_image(raw, tersor.Spec("image", (3, 4, 6), "float32"), "PNG")


def test_a_missing_encoder_is_named(monkeypatch):
    monkeypatch.setattr("tersor_kit_reference.features.check", lambda _: False)
    with pytest.raises(tersor.MissingLibraryError, match="avif"):
        require("avif", "avif")
