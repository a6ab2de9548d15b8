"""ΔW from factors, for linear layers and convolutions."""

import torch

from visionlora.lora.functional import delta_weight, stack_factors


def test_linear_delta_is_the_scaled_product() -> None:
    lora_A, lora_B = torch.randn(3, 5), torch.randn(7, 3)
    torch.testing.assert_close(delta_weight(lora_A, lora_B, 0.5), 0.5 * lora_B @ lora_A, rtol=0, atol=0)


def test_conv_delta_has_the_shape_of_the_weight() -> None:
    lora_A, lora_B = torch.randn(3, 5, 2, 2), torch.randn(7, 3, 1, 1)
    expected = torch.einsum("or,rihw->oihw", lora_B[..., 0, 0], lora_A)
    torch.testing.assert_close(delta_weight(lora_A, lora_B, 1.0), expected, rtol=1e-6, atol=1e-6)


def test_half_precision_factors_are_multiplied_in_fp32() -> None:
    lora_A, lora_B = torch.randn(3, 5).half(), torch.randn(7, 3).half()
    assert delta_weight(lora_A, lora_B, 1.0).dtype == torch.float32
    torch.testing.assert_close(delta_weight(lora_A, lora_B, 1.0), lora_B.float() @ lora_A.float(), rtol=0, atol=0)


def test_stacked_factors_give_the_sum_of_the_deltas() -> None:
    factors = [(torch.randn(r, 5), torch.randn(7, r), s) for r, s in ((2, 0.5), (3, -1.0), (1, 2.0))]
    down, up = stack_factors(factors)
    assert down.shape == (6, 5)
    assert up.shape == (7, 6)
    torch.testing.assert_close(up @ down, sum(delta_weight(*f) for f in factors), rtol=1e-5, atol=1e-5)
