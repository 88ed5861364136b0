from __future__ import annotations

import torch

from actionclip_deploy.export.layers import normalise


def test_vectors_get_unit_norm() -> None:
    given = normalise(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    torch.testing.assert_close(given, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))


def test_a_vector_of_zeros_stays_one() -> None:
    assert normalise(torch.zeros(1, 4)).tolist() == [[0.0] * 4]
