"""float32 products stay float32, whichever kernels compute them."""

import pytest
import torch

from prefloop.models import precision


@pytest.mark.parametrize("shape", [(1, 576, 1536), (7, 33, 5), (300, 576, 576), (64, 2048, 300)])
def test_products_are_float32(shape):
    precision.speed_up_float32()
    assert precision._is_float32(*shape, torch.Generator().manual_seed(1))


def test_bfloat16_products_would_be_noticed():
    with torch.autocast("cpu", torch.bfloat16):
        assert not precision._is_float32(8, 576, 1536, torch.Generator().manual_seed(0))


def test_a_precision_that_the_user_chose_is_left_alone():
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    precision.speed_up_float32.cache_clear()
    try:
        backend.fp32_precision = "ieee"
        assert not precision.speed_up_float32()
        assert backend.fp32_precision == "ieee"
    finally:
        backend.fp32_precision = before
        precision.speed_up_float32.cache_clear()
